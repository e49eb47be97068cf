//! The trainer on the CPU: float32 masters, their packed working copy, and one optimiser step after another.

use super::optimizer::{AdamW, clip_factor, norm};
use super::step::{Pair, StateBytes, Sums, accumulate};
use super::trainer::{
    Kept, Moments, NotFinite, Progress, Settings, State, StepMetrics, Take, Train, fill,
    initial_adapters, matrices, save_trained,
};
use crate::kernels::gemm::{Packed, Precision};
use crate::logprob::{Group, PassLimits, score_all};
use crate::model::{Decoder, Gradients, Lora, Model, Params, Workspace};
use crate::policy::TOKENS_AT_ONCE;
use crate::weights::Weights;
use anyhow::{Result, ensure};
use std::borrow::Cow;
use std::path::Path;

/// Training in progress on the CPU.
pub struct Trainer {
    settings: Settings,
    memory: StateBytes,
    part_tokens: usize,
    params: Params,
    trained: Trained,
    /// Storage: between steps it holds what the last one left.
    gradient: Vec<f32>,
    optimizer: AdamW,
    decoder: Decoder,
    workspace: Workspace,
    tokens: u64,
}

/// What is trained, flat.
enum Trained {
    /// All parameters.
    All(Vec<f32>),
    /// Adapters of frozen weights.
    Adapters {
        lora: Lora,
        values: Vec<f32>,
        base: Vec<Packed>,
    },
}

impl Trained {
    /// Its numbers.
    fn values(&self) -> &[f32] {
        match self {
            Self::All(values) | Self::Adapters { values, .. } => values,
        }
    }

    fn values_mut(&mut self) -> &mut [f32] {
        match self {
            Self::All(values) | Self::Adapters { values, .. } => values,
        }
    }

    fn adapters(&self) -> Option<(&Lora, &[f32])> {
        match self {
            Self::All(_) => None,
            Self::Adapters { lora, values, .. } => Some((lora, values)),
        }
    }

    /// Makes `decoder` the model that it is.
    fn show(&self, decoder: &mut Decoder, params: &Params) {
        match self {
            Self::All(model) => decoder.update(model, params),
            Self::Adapters { lora, values, base } => decoder.merge(base, (lora, values), params),
        }
    }
}

impl Trainer {
    /// Starts from a checkpoint. Layer states may take `memory`.
    ///
    /// # Errors
    /// A tensor that cannot be read; moments in bfloat16, which only a GPU keeps.
    pub fn new(
        start: &Weights,
        settings: Settings,
        precision: Precision,
        memory: StateBytes,
    ) -> Result<Self> {
        ensure!(
            settings.moments == Moments::F32,
            "a CPU keeps the moments in float32 alone"
        );
        let params = Params::new(&start.config);
        let (trained, decayed) = match settings.lora {
            None => (Trained::All(params.read(start)?), matrices(&params)),
            Some(s) => {
                let lora = Lora::new(&params, s.rank, s.alpha);
                let (all, values) = (0..lora.len, initial_adapters(&lora, settings.seed));
                let base = Lora::base(&params, start)?;
                (Trained::Adapters { lora, values, base }, vec![all])
            }
        };
        let mut decoder = match &trained {
            Trained::All(model) => Decoder::new(&start.config, model.as_slice(), precision)?,
            Trained::Adapters { .. } => Decoder::new(&start.config, start, precision)?,
        };
        trained.show(&mut decoder, &params);
        let len = trained.values().len();
        Ok(Self {
            optimizer: AdamW::new(len, decayed, settings.weight_decay as f32),
            gradient: vec![0.0; len],
            settings,
            memory,
            part_tokens: memory.part_tokens(&start.config),
            workspace: Workspace::new(precision),
            params,
            trained,
            decoder,
            tokens: 0,
        })
    }

    /// The model in its present state.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// The sums over a batch and the gradient of its mean loss, flat like [`Self::params`] (or like the adapters).
    pub fn gradient(&self, pairs: &[&Pair]) -> (Sums, Vec<f32>) {
        let mut gradient = vec![0.0; self.gradient.len()];
        let mut workspace = Workspace::new(self.decoder.precision);
        let sums = self.fill_gradient(pairs, &mut gradient, &mut workspace);
        (sums, gradient)
    }

    fn fill_gradient(&self, pairs: &[&Pair], flat: &mut [f32], workspace: &mut Workspace) -> Sums {
        let mut gradients = match &self.trained {
            Trained::All(_) => Gradients::Full {
                params: &self.params,
                flat,
                fresh: false,
            },
            Trained::Adapters { lora, values, .. } => Gradients::Lora { lora, values, flat },
        };
        let objective = &self.settings.objective;
        let model = Model {
            decoder: &self.decoder,
            params: &self.params,
        };
        let memory = (self.part_tokens, self.memory);
        accumulate(model, objective, pairs, memory, &mut gradients, workspace)
    }

    /// Where the model's parameters lie.
    pub fn params(&self) -> &Params {
        &self.params
    }
}

impl State for Trainer {
    fn runs(&self, kept: Kept, take: &mut Take) -> Result<()> {
        take(match kept {
            Kept::Trained => self.trained.values(),
            Kept::FirstMoment => &self.optimizer.m,
            Kept::SecondMoment => &self.optimizer.v,
        })
    }
}

impl Train for Trainer {
    fn settings(&self) -> &Settings {
        &self.settings
    }

    fn trained(&self) -> usize {
        self.gradient.len()
    }

    fn score(&self, groups: &[Group]) -> Result<Vec<Vec<f64>>> {
        let limits = PassLimits {
            gathered: TOKENS_AT_ONCE,
            most: self.memory.part / Decoder::forward_bytes(&self.decoder.config, 1),
        };
        Ok(score_all(&self.decoder, groups, limits))
    }

    fn step(&mut self, pairs: &[&Pair], epoch: f64) -> Result<StepMetrics> {
        let step = self.optimizer.steps;
        let mut gradient = std::mem::take(&mut self.gradient);
        let none = Workspace::new(self.decoder.precision);
        let mut workspace = std::mem::replace(&mut self.workspace, none);
        let sums = self.fill_gradient(pairs, &mut gradient, &mut workspace);
        (self.gradient, self.workspace) = (gradient, workspace);
        let grad_norm = norm(&self.gradient);
        if let Err(broken) = NotFinite::check(step + 1, &sums, grad_norm) {
            return Err(broken.into());
        }
        let learning_rate = self.settings.learning_rate(step);
        let factor = clip_factor(grad_norm, self.settings.max_grad_norm);
        let values = self.trained.values_mut();
        (self.optimizer).step(values, &self.gradient, factor, learning_rate);
        self.trained.show(&mut self.decoder, &self.params);
        self.tokens += sums.tokens;
        let at = (self.optimizer.steps, epoch);
        Ok(StepMetrics::new(
            &sums,
            at,
            grad_norm,
            learning_rate,
            self.tokens,
        ))
    }

    fn skip(&mut self) {
        self.optimizer.steps += 1;
    }

    fn progress(&self) -> Progress {
        Progress {
            steps: self.optimizer.steps,
            tokens: self.tokens,
            part_tokens: self.part_tokens,
        }
    }

    fn restore(&mut self, state: &dyn State, progress: Progress) -> Result<()> {
        for (target, kept) in [
            (self.trained.values_mut(), Kept::Trained),
            (&mut self.optimizer.m, Kept::FirstMoment),
            (&mut self.optimizer.v, Kept::SecondMoment),
        ] {
            fill(target.len(), state, kept, |at, run| {
                target[at..at + run.len()].copy_from_slice(run);
                Ok(())
            })?;
        }
        self.optimizer.steps = progress.steps;
        self.tokens = progress.tokens;
        self.part_tokens = progress.part_tokens;
        self.trained.show(&mut self.decoder, &self.params);
        Ok(())
    }

    fn save_model(&self, dir: &Path, start: &Weights) -> Result<()> {
        let read = |place| Ok(Cow::Borrowed(&self.trained.values()[place]));
        save_trained(dir, start, &self.params, self.trained.adapters(), read)
    }

    fn save_adapter(&self, dir: &Path, base: &str) -> Result<()> {
        let Some((lora, values)) = self.trained.adapters() else {
            anyhow::bail!("no adapters were trained")
        };
        lora.save(values, &self.decoder.config, dir, base)
    }
}
