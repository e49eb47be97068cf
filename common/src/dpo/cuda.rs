//! The trainer on a GPU: parameters, gradients and moments live there; log-probs of responses come to the host, and the
//! loss's slopes go back.

use super::loss::Objective;
use super::memory::usable;
use super::optimizer::{corrections, kept};
use super::step::{Mean, Pair, Sums, parts};
use super::trainer::{
    Kept, Moments, NotFinite, Progress, Settings, State, StepMetrics, Take, Train, fill,
    initial_adapters, matrices, save_trained,
};
use crate::cuda::{self, Decoder, Device, Flat, Footprint, Forward, Gradients, Rates, Trained};
use crate::kernels::gemm::Precision;
use crate::logprob::Group;
use crate::model::{Lora, Params};
use crate::weights::{Config, Weights};
use anyhow::{Result, bail, ensure};
use std::borrow::Cow;
use std::ops::Range;
use std::path::Path;

/// Training in progress on a GPU.
pub struct CudaTrainer {
    settings: Settings,
    params: Params,
    lora: Option<Lora>,
    trained: Trained,
    decoder: Decoder,
    steps: u64,
    tokens: u64,
    /// What parts of a batch may take, bytes.
    free: usize,
    /// Tokens of a part; a single longer pair is run all the same.
    part_tokens: usize,
}

impl CudaTrainer {
    /// Starts from a checkpoint. In bfloat16 the masters are float32 all the same, and what is multiplied is a copy.
    ///
    /// # Errors
    /// A tensor that cannot be read; a device without room.
    pub fn new(
        device: &Device,
        start: &Weights,
        settings: Settings,
        precision: Precision,
    ) -> Result<Self> {
        let config = &start.config;
        Decoder::check(config)?;
        let params = Params::new(config);
        let lora = settings.lora.map(|s| Lora::new(&params, s.rank, s.alpha));
        let len = lora.as_ref().map_or(params.len, |lora| lora.len);
        let decayed = match &lora {
            Some(_) => std::iter::once(0..len).collect(),
            None => matrices(&params),
        };
        let moments = format_of(settings.moments);
        let trained = Trained::new(device, len, &decayed, precision.into(), moments)?;
        let decoder = match &lora {
            Some(lora) => {
                trained.write(Flat::Masters, 0, &initial_adapters(lora, settings.seed))?;
                let mut decoder = Decoder::new(device, config, start, precision.into())?;
                decoder.adapt(lora, &params, trained.working());
                decoder
            }
            None => {
                for (name, shape, range) in params.tensors() {
                    let mut at = range.start;
                    start.tensor_parts(name, shape, &mut |part| {
                        trained.write(Flat::Masters, at, part)?;
                        at += part.len();
                        Ok(())
                    })?;
                }
                let (masters, working) = (trained.masters(), trained.working());
                Decoder::over(device, config, precision.into(), masters, working)?
            }
        };
        trained.refresh()?;
        let free = usable(device.memory()?.free);
        let mut trainer = Self {
            settings,
            params,
            lora,
            trained,
            decoder,
            steps: 0,
            tokens: 0,
            free,
            part_tokens: 0,
        };
        trainer.part_tokens = trainer.footprint().tokens_at_once(free);
        Ok(trainer)
    }

    fn footprint(&self) -> Footprint<'_> {
        Footprint {
            config: &self.decoder.config,
            precision: self.decoder.precision,
            rank: self.lora.as_ref().map_or(0, |lora| lora.rank),
        }
    }

    /// Where the model's parameters lie.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// The sums over a batch and the gradient of its mean loss, flat like [`Self::params`] (or like the adapters).
    ///
    /// # Errors
    /// A device that fails or has no room.
    pub fn gradient(&self, pairs: &[&Pair]) -> Result<(Sums, Vec<f32>)> {
        let sums = self.accumulate(pairs)?;
        let gradient = self.trained.gradient.read(0, self.trained.len)?;
        self.trained.gradient.clear()?;
        Ok((sums, gradient))
    }

    /// Adds the gradient of the mean loss over `pairs`.
    fn accumulate(&self, pairs: &[&Pair]) -> Result<Sums> {
        let objective: &Objective = &self.settings.objective;
        let mean = Mean::new(objective, pairs);
        let mut sums = Sums::default();
        for part in parts(pairs, self.part_tokens) {
            self.part(mean, part, &mut sums)?;
        }
        Ok(sums)
    }

    fn part(&self, mean: Mean, pairs: &[&Pair], sums: &mut Sums) -> Result<()> {
        let groups: Vec<Group> = pairs.iter().map(|p| p.group()).collect();
        let tokens: usize = groups.iter().map(Group::tokens).sum();
        let batch = self.decoder.pack(&groups);
        let (rows, targets) = (batch.tokens.len(), batch.targets.len());
        let footprint = self.footprint();
        let least = footprint.part(rows, targets, 0);
        ensure!(
            least <= self.free,
            "a pair of {tokens} tokens takes {} MB of the GPU in training, of which {} MB are free: lower --max-length",
            least >> 20,
            self.free >> 20
        );
        let whole = footprint.whole_layers(rows, targets, self.free);
        let forward = Forward::new(&self.decoder, &batch, whole)?;
        let slopes = mean.slopes(pairs, &forward.sums()?, sums);
        sums.tokens += tokens as u64;
        let gradients = Gradients {
            flat: &self.trained.gradient,
            params: &self.params,
            adapters: self.lora.is_some(),
        };
        forward.backward(&slopes, gradients)
    }

    fn read(&self, flat: Flat, range: Range<usize>) -> Result<Vec<f32>> {
        let mut values = Vec::with_capacity(range.len());
        self.trained.read(flat, range, &mut |part| {
            values.extend_from_slice(part);
            Ok(())
        })?;
        Ok(values)
    }
}

impl State for CudaTrainer {
    fn runs(&self, kept: Kept, take: &mut Take) -> Result<()> {
        (self.trained).read(place_of(kept), 0..self.trained.len, take)
    }
}

impl Train for CudaTrainer {
    fn settings(&self) -> &Settings {
        &self.settings
    }

    fn trained(&self) -> usize {
        self.trained.len
    }

    fn score(&self, groups: &[Group]) -> Result<Vec<Vec<f64>>> {
        cuda::score_all(&self.decoder, groups, self.decoder.tokens_at_once()?)
    }

    fn step(&mut self, pairs: &[&Pair], epoch: f64) -> Result<StepMetrics> {
        let sums = self.accumulate(pairs)?;
        let grad_norm = self.trained.gradient_norm(self.settings.max_grad_norm)?;
        if let Err(broken) = NotFinite::check(self.steps + 1, &sums, grad_norm) {
            self.trained.drop_gradient()?;
            return Err(broken.into());
        }
        let learning_rate = self.settings.learning_rate(self.steps);
        self.steps += 1;
        let (rate, root) = corrections(self.steps, learning_rate);
        self.trained.step(Rates {
            rate,
            root,
            keep: kept(learning_rate, self.settings.weight_decay),
            step: self.steps,
        })?;
        self.tokens += sums.tokens;
        let at = (self.steps, epoch);
        Ok(StepMetrics::new(
            &sums,
            at,
            grad_norm,
            learning_rate,
            self.tokens,
        ))
    }

    fn skip(&mut self) {
        self.steps += 1;
    }

    fn progress(&self) -> Progress {
        Progress {
            steps: self.steps,
            tokens: self.tokens,
            part_tokens: self.part_tokens,
        }
    }

    fn restore(&mut self, state: &dyn State, progress: Progress) -> Result<()> {
        let parts = progress.part_tokens;
        ensure!(
            self.footprint().part(parts, parts, 0) <= self.free,
            "the run was begun in parts of {parts} tokens, for which the GPU has no room now ({} MB are free)",
            self.free >> 20
        );
        for kept in [Kept::Trained, Kept::FirstMoment, Kept::SecondMoment] {
            fill(self.trained.len, state, kept, |at, run| {
                self.trained.write(place_of(kept), at, run)
            })?;
        }
        (self.steps, self.tokens, self.part_tokens) = (progress.steps, progress.tokens, parts);
        self.trained.refresh()
    }

    fn save_model(&self, dir: &Path, start: &Weights) -> Result<()> {
        let values = match &self.lora {
            Some(lora) => self.read(Flat::Masters, 0..lora.len)?,
            None => vec![],
        };
        let adapters = self.lora.as_ref().map(|lora| (lora, values.as_slice()));
        let read = |place| self.read(Flat::Masters, place).map(Cow::Owned);
        save_trained(dir, start, &self.params, adapters, read)
    }

    fn save_adapter(&self, dir: &Path, base: &str) -> Result<()> {
        let Some(lora) = &self.lora else {
            bail!("no adapters were trained")
        };
        lora.save(
            &self.read(Flat::Masters, 0..lora.len)?,
            &self.decoder.config,
            dir,
            base,
        )
    }
}

fn place_of(kept: Kept) -> Flat {
    match kept {
        Kept::Trained => Flat::Masters,
        Kept::FirstMoment => Flat::Moments(0),
        Kept::SecondMoment => Flat::Moments(1),
    }
}

fn format_of(moments: Moments) -> cuda::Precision {
    match moments {
        Moments::F32 => cuda::Precision::F32,
        Moments::Bf16 => cuda::Precision::Bf16,
    }
}

/// The bytes of a GPU that training such a model takes all the time: weights, gradients and the optimiser's state. What a
/// part of a batch adds is [`Footprint::part`].
pub fn resident_bytes(config: &Config, settings: &Settings, precision: Precision) -> usize {
    let params = Params::new(config);
    let each = Trained::bytes(precision.into(), format_of(settings.moments));
    match settings.lora {
        None => params.len * each,
        Some(s) => {
            let adapters = Lora::new(&params, s.rank, s.alpha).len;
            Decoder::weight_bytes(config, precision.into()) + adapters * each
        }
    }
}
