//! The trainer: float32 masters, their packed working copy, and one optimiser step after another.

use super::loss::Objective;
use super::optimizer::{AdamW, Scheduler, clip_factor, norm};
use super::step::{Limits, Pair, Sums, accumulate};
use crate::kernels::gemm::Precision;
use crate::logprob::{Group, score_all};
use crate::model::{Decoder, Gradients, Lora, Model, Params, Workspace};
use crate::policy::TOKENS_AT_ONCE;
use crate::weights::{self, Weights};
use anyhow::{Result, ensure};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

/// Low-rank adapters instead of all weights.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoraSettings {
    /// r.
    pub rank: usize,
    /// α.
    pub alpha: f32,
}

/// Everything that the weights after training depend on, besides the start and the pairs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// The loss.
    pub objective: Objective,
    /// The peak learning rate.
    pub learning_rate: f64,
    /// Its course.
    pub scheduler: Scheduler,
    /// Steps from 0 to the peak.
    pub warmup_steps: u64,
    /// All steps.
    pub total_steps: u64,
    /// Pairs per step.
    pub batch_size: usize,
    /// Largest norm of the gradient; 0 is no limit.
    pub max_grad_norm: f64,
    /// AdamW's λ, on matrices.
    pub weight_decay: f64,
    /// Of the order of pairs and the adapters' start.
    pub seed: u64,
    /// A new order of the pairs in every epoch.
    pub shuffle: bool,
    /// Adapters, or none for all weights.
    pub lora: Option<LoraSettings>,
}

/// A step's figures, averaged over its pairs; the names are TRL's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// From 1.
    pub step: u64,
    /// Passes over the pairs after this step.
    pub epoch: f64,
    /// Mean loss.
    pub loss: f64,
    /// Mean β·(log π − log π_ref) of the chosen responses.
    #[serde(rename = "rewards/chosen")]
    pub rewards_chosen: f64,
    /// The same of the rejected ones.
    #[serde(rename = "rewards/rejected")]
    pub rewards_rejected: f64,
    /// Their difference.
    #[serde(rename = "rewards/margins")]
    pub rewards_margins: f64,
    /// Share of pairs with a positive margin.
    #[serde(rename = "rewards/accuracies")]
    pub rewards_accuracies: f64,
    /// Mean log π(chosen), nats.
    #[serde(rename = "logps/chosen")]
    pub logps_chosen: f64,
    /// Mean log π(rejected).
    #[serde(rename = "logps/rejected")]
    pub logps_rejected: f64,
    /// Before clipping.
    pub grad_norm: f64,
    /// Of this step.
    pub learning_rate: f64,
    /// Tokens of all forward passes so far; a prompt counts once for both its responses.
    pub num_tokens: u64,
}

/// Training in progress.
pub struct Trainer {
    settings: Settings,
    limits: Limits,
    params: Params,
    /// The model's parameters as the next forward pass sees them, flat.
    model: Vec<f32>,
    adapters: Option<Adapters>,
    /// Zero between steps.
    gradient: Vec<f32>,
    optimizer: AdamW,
    decoder: Decoder,
    workspace: Workspace,
    tokens: u64,
}

struct Adapters {
    lora: Lora,
    values: Vec<f32>,
    /// The frozen parameters.
    base: Vec<f32>,
}

impl Trainer {
    /// Starts from a checkpoint. Layer states may take `state_bytes` (see [`Limits`]).
    ///
    /// # Errors
    /// A tensor that cannot be read.
    pub fn new(
        start: &Weights,
        settings: Settings,
        precision: Precision,
        state_bytes: usize,
    ) -> Result<Self> {
        let params = Params::new(&start.config);
        let model = params.read(start)?;
        let adapters = settings.lora.map(|s| {
            let lora = Lora::new(&params, s.rank, s.alpha);
            let mut rng = ChaCha8Rng::seed_from_u64(settings.seed);
            let values = lora.initial(|| (rng.next_u32() >> 8) as f32 / (1 << 24) as f32);
            Adapters {
                lora,
                values,
                base: model.clone(),
            }
        });
        let (len, decayed) = match &adapters {
            Some(adapters) => (
                adapters.lora.len,
                std::iter::once(0..adapters.lora.len).collect(),
            ),
            None => (params.len, matrices(&params)),
        };
        let mut decoder = Decoder::new(&start.config, model.as_slice(), precision)?;
        decoder.update(&model, &params);
        Ok(Self {
            optimizer: AdamW::new(len, decayed, settings.weight_decay as f32),
            gradient: vec![0.0; len],
            settings,
            limits: Limits::new(&decoder, state_bytes),
            workspace: Workspace::new(precision),
            params,
            model,
            adapters,
            decoder,
            tokens: 0,
        })
    }

    /// The model in its present state.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// Σ log p of each response of each group under the model in its present state, nats.
    pub fn score(&self, groups: &[Group]) -> Result<Vec<Vec<f64>>> {
        Ok(score_all(&self.decoder, groups, TOKENS_AT_ONCE))
    }

    /// The settings.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Steps taken so far.
    pub fn steps(&self) -> u64 {
        self.optimizer.steps
    }

    /// One optimiser step on a batch.
    ///
    /// # Errors
    /// A loss or gradient that is not finite: no parameter is changed then, and the trainer is of no further use.
    pub fn step(&mut self, pairs: &[&Pair], epoch: f64) -> Result<StepMetrics> {
        let step = self.optimizer.steps;
        let mut gradient = std::mem::take(&mut self.gradient);
        let none = Workspace::new(self.decoder.precision);
        let mut workspace = std::mem::replace(&mut self.workspace, none);
        let sums = self.add_gradient(pairs, &mut gradient, &mut workspace);
        (self.gradient, self.workspace) = (gradient, workspace);
        let grad_norm = norm(&self.gradient);
        ensure!(
            sums.loss.is_finite() && grad_norm.is_finite(),
            "step {}: the loss ({}) or the gradient's norm ({grad_norm}) is not a number; lower --learning-rate",
            step + 1,
            sums.loss
        );
        let s = &self.settings;
        let learning_rate =
            s.learning_rate * s.scheduler.factor(step, s.warmup_steps, s.total_steps);
        let factor = clip_factor(grad_norm, s.max_grad_norm);
        match &mut self.adapters {
            None => self
                .optimizer
                .step(&mut self.model, &mut self.gradient, factor, learning_rate),
            Some(a) => {
                self.optimizer
                    .step(&mut a.values, &mut self.gradient, factor, learning_rate);
                a.lora.merge(&a.values, &a.base, &mut self.model);
            }
        }
        self.decoder.update(&self.model, &self.params);
        self.tokens += sums.tokens;
        Ok(self.metrics(&sums, pairs.len(), epoch, grad_norm, learning_rate))
    }

    /// The sums over a batch and the gradient of its mean loss, flat like [`Self::params`] (or like the adapters).
    pub fn gradient(&self, pairs: &[&Pair]) -> (Sums, Vec<f32>) {
        let mut gradient = vec![0.0; self.gradient.len()];
        let mut workspace = Workspace::new(self.decoder.precision);
        let sums = self.add_gradient(pairs, &mut gradient, &mut workspace);
        (sums, gradient)
    }

    fn add_gradient(&self, pairs: &[&Pair], flat: &mut [f32], workspace: &mut Workspace) -> Sums {
        let mut gradients = match &self.adapters {
            None => Gradients::Full {
                params: &self.params,
                flat,
            },
            Some(a) => Gradients::Lora {
                lora: &a.lora,
                values: &a.values,
                flat,
            },
        };
        let objective = &self.settings.objective;
        let model = Model {
            decoder: &self.decoder,
            params: &self.params,
            flat: &self.model,
        };
        let limits = self.limits;
        accumulate(model, objective, pairs, limits, &mut gradients, workspace)
    }

    /// Where the model's parameters lie.
    pub fn params(&self) -> &Params {
        &self.params
    }

    fn metrics(
        &self,
        sums: &Sums,
        pairs: usize,
        epoch: f64,
        grad_norm: f64,
        learning_rate: f64,
    ) -> StepMetrics {
        let mean = |sum: f64| sum / pairs as f64;
        StepMetrics {
            step: self.optimizer.steps,
            epoch,
            loss: mean(sums.loss),
            rewards_chosen: mean(sums.reward_chosen),
            rewards_rejected: mean(sums.reward_rejected),
            rewards_margins: mean(sums.reward_chosen - sums.reward_rejected),
            rewards_accuracies: mean(sums.correct),
            logps_chosen: mean(sums.logp_chosen),
            logps_rejected: mean(sums.logp_rejected),
            grad_norm,
            learning_rate,
            num_tokens: self.tokens,
        }
    }

    /// Writes the model (adapters merged) into the folder `dir` as transformers reads it.
    pub fn save_model(&self, dir: &Path, start: &Weights) -> Result<()> {
        let places: HashMap<&str, Range<usize>> = self
            .params
            .tensors()
            .into_iter()
            .map(|(name, _, range)| (name, range))
            .collect();
        let tensors = start.config.parameters().into_iter().map(|(name, shape)| {
            let values = &self.model[places[name.as_str()].clone()];
            (name, shape, Cow::Borrowed(values))
        });
        weights::save(dir, &start.config, Some(start), tensors)
    }

    /// Writes the adapters into the folder `dir` as PEFT reads them; `base` is what they belong to.
    ///
    /// # Errors
    /// There are none: all weights were trained.
    pub fn save_adapter(&self, dir: &Path, base: &str) -> Result<()> {
        let Some(a) = &self.adapters else {
            anyhow::bail!("no adapters were trained")
        };
        let modules: Vec<_> = a
            .lora
            .adapters
            .iter()
            .map(|x| weights::LoraModule {
                name: x.module.clone(),
                input: x.cols,
                output: x.rows,
                a: Cow::Borrowed(&a.values[x.a.clone()]),
                b: Cow::Borrowed(&a.values[x.b.clone()]),
            })
            .collect();
        weights::save_adapter(dir, base, a.lora.rank, a.lora.alpha, &modules)
    }

    /// The numbers that training goes on from: what is trained, and the optimiser's moments.
    pub fn state(&self) -> [(&'static str, &[f32]); 3] {
        let trained = self.adapters.as_ref().map_or(&self.model, |a| &a.values);
        [
            ("trained", trained),
            ("exp_avg", &self.optimizer.m),
            ("exp_avg_sq", &self.optimizer.v),
        ]
    }

    /// Goes back to a state that [`Self::state`] gave after `steps` steps and `tokens` tokens.
    ///
    /// # Errors
    /// Numbers of another length.
    pub fn restore(&mut self, state: [Vec<f32>; 3], steps: u64, tokens: u64) -> Result<()> {
        ensure!(
            state
                .iter()
                .all(|values| values.len() == self.gradient.len()),
            "the saved state is of another model or of other adapters"
        );
        let [trained, m, v] = state;
        match &mut self.adapters {
            None => self.model = trained,
            Some(a) => {
                a.values = trained;
                a.lora.merge(&a.values, &a.base, &mut self.model);
            }
        }
        (self.optimizer.m, self.optimizer.v, self.optimizer.steps) = (m, v, steps);
        self.tokens = tokens;
        self.decoder.update(&self.model, &self.params);
        Ok(())
    }
}

/// The places of all matrices: what weight decay applies to.
fn matrices(params: &Params) -> Vec<Range<usize>> {
    params
        .tensors()
        .into_iter()
        .filter(|(_, shape, _)| shape.len() > 1)
        .map(|(_, _, range)| range)
        .collect()
}

/// The order of `n` pairs in an epoch: a permutation that depends on the seed and the epoch alone.
pub fn order(n: usize, epoch: u64, settings: &Settings) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    if settings.shuffle {
        let mut rng = ChaCha8Rng::seed_from_u64(settings.seed);
        rng.set_stream(epoch + 1);
        for i in (1..n).rev() {
            order.swap(i, (rng.next_u64() % (i as u64 + 1)) as usize);
        }
    }
    order
}
