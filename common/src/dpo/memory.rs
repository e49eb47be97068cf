//! What memory training has: for layer states and batches, beside weights, gradients and moments.

use super::cuda::resident_bytes;
use super::step::StateBytes;
use super::trainer::Settings;
use crate::budget;
use crate::cuda::Footprint;
use crate::kernels::gemm::Precision;
use crate::model::{Lora, Params, Recurrent};
use crate::policy::Place;
use crate::weights::Config;
use anyhow::{Result, ensure};

/// What a training may take at a place.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// For layer states on a CPU. What decides over the numbers depends on the command alone, never on the machine.
    pub states: StateBytes,
    /// Most tokens of a pair, prompt and both responses.
    pub longest: usize,
}

impl Memory {
    /// What is left for a model of that shape.
    ///
    /// # Errors
    /// Not even what is there all the time fits.
    pub fn new(config: &Config, settings: &Settings, place: &Place) -> Result<Self> {
        match &place.gpu {
            None => Self::on_cpu(config, settings, place),
            Some(gpu) => Self::on_gpu(config, settings, place, gpu.memory()?.free),
        }
    }

    fn on_cpu(config: &Config, settings: &Settings, place: &Place) -> Result<Self> {
        let precision = place.full_range_precision();
        let fixed = fixed_bytes(config, settings, precision);
        let part = state_bytes(precision);
        let (left, most) = match place.budget {
            Some(budget) => {
                let left = budget::beyond(budget, fixed)?;
                (left, left / 2)
            }
            None => {
                let left = budget::left_beside(None, fixed)?;
                // What the machine seems to lack now may be there when it is wanted.
                (left.max(part), (left / 2).max(part))
            }
        };
        Ok(Self {
            states: StateBytes {
                part: part.min(most),
                long: most,
            },
            longest: left / pair_bytes(config),
        })
    }

    /// The trainer there cuts its parts by what is free then.
    fn on_gpu(config: &Config, settings: &Settings, place: &Place, free: usize) -> Result<Self> {
        let precision = place.full_range_precision();
        let resident = resident_bytes(config, settings, precision);
        ensure!(
            resident <= free,
            "training takes {} MB before any activation, and {} MB of the GPU are free: --optimizer adamw-bf16 and --lora-rank take less",
            resident >> 20,
            free >> 20
        );
        let footprint = Footprint {
            config,
            precision: precision.into(),
            rank: settings.lora.map_or(0, |lora| lora.rank),
        };
        Ok(Self {
            states: StateBytes::default(),
            longest: footprint.longest(usable(free - resident)),
        })
    }
}

/// Some of a GPU's memory is left to the rounding of allocations.
pub(super) fn usable(free: usize) -> usize {
    free / 100 * 95
}

/// What layer states may take on a CPU, so that four pairs of 512 tokens need less than 1 GB beside weights, gradients and
/// moments. In bfloat16 the packed weights leave room for more.
const fn state_bytes(precision: Precision) -> usize {
    match precision {
        Precision::F32 => 192 << 20,
        Precision::Bf16 => 640 << 20,
    }
}

/// What is there all the time on a CPU: the packed weights, and values, gradient and two moments of what is trained; of
/// adapters, also what they are added to.
fn fixed_bytes(config: &Config, settings: &Settings, precision: Precision) -> usize {
    const TRAINED: usize = 16;
    let params = Params::new(config);
    let packed = match precision {
        Precision::F32 => 4,
        Precision::Bf16 => 2,
    };
    let trained = match settings.lora {
        None => TRAINED * params.len,
        Some(s) => {
            let adapted = params.layers.iter().flat_map(|layer| layer.adapted());
            let base: usize = adapted.map(|map| map.rows * map.cols).sum();
            4 * base + TRAINED * Lora::new(&params, s.rank, s.alpha).len
        }
    };
    packed * params.len + trained
}

/// What each token of a pair takes on a CPU whose states do not fit: it keeps its layers' inputs, and makes one layer's state
/// and gradients at a time.
fn pair_bytes(config: &Config) -> usize {
    let given = config.mixture().map_or(0, |experts| experts.each());
    let mlp = 4 * config.widest_mlp() + 3 * given * config.hidden;
    let attention = 2 * config.heads * config.widest_head();
    let recurrences = config.recurrences.iter().flatten();
    let mixed = recurrences.map(|recurrence| Recurrent::state_words(*recurrence));
    let row = 4 * config.hidden + mixed.fold(attention, usize::max) + mlp;
    (config.layers * config.hidden + 3 * row) * size_of::<f32>()
}
