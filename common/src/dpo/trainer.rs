//! What training is wherever it runs: its settings, what a step says, what a trainer does and what is kept of it.

use super::loss::Objective;
use super::optimizer::Scheduler;
use super::step::{Pair, Sums};
use crate::logprob::Group;
use crate::model::{Lora, Params};
use crate::weights::{self, Weights};
use anyhow::{Result, ensure};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
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
    /// The format of the optimiser's moments.
    #[serde(default, skip_serializing_if = "Moments::are_exact")]
    pub moments: Moments,
}

/// How the optimiser's moments are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Moments {
    /// Float32.
    #[default]
    F32,
    /// Bfloat16, rounded stochastically in every step: 4 bytes a parameter less.
    Bf16,
}

impl Moments {
    fn are_exact(&self) -> bool {
        *self == Self::F32
    }
}

impl Settings {
    /// The learning rate of a step, from 0.
    pub fn learning_rate(&self, step: u64) -> f64 {
        self.learning_rate * (self.scheduler).factor(step, self.warmup_steps, self.total_steps)
    }
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

/// A step whose loss or gradient is not a number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NotFinite {
    /// From 1.
    pub step: u64,
    /// The sum over the batch.
    pub loss: f64,
    /// Of the gradient.
    pub norm: f64,
    /// The batch's first pair that it comes from, where a pair's loss is not a number already.
    pub pair: Option<usize>,
}

impl NotFinite {
    /// Of a step's sums and its gradient's norm.
    pub(super) fn check(step: u64, sums: &Sums, norm: f64) -> Result<(), Self> {
        if sums.loss.is_finite() && norm.is_finite() {
            return Ok(());
        }
        Err(Self {
            step,
            loss: sums.loss,
            norm,
            pair: sums.broken,
        })
    }
}

impl std::fmt::Display for NotFinite {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            step, loss, norm, ..
        } = self;
        let wrong =
            format_args!("the loss ({loss}) or the gradient's norm ({norm}) is not a number");
        write!(f, "step {step}: {wrong}")
    }
}

impl std::error::Error for NotFinite {}

impl StepMetrics {
    /// The means over a step's pairs; `step` counts from 1, `tokens` are those of all steps so far.
    pub(crate) fn new(
        sums: &Sums,
        (step, epoch): (u64, f64),
        grad_norm: f64,
        learning_rate: f64,
        tokens: u64,
    ) -> Self {
        let mean = |sum: f64| sum / sums.pairs as f64;
        Self {
            step,
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
            num_tokens: tokens,
        }
    }
}

/// Flat buffers of numbers that training goes on from, as long as what is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// The weights, or the adapters.
    Trained,
    /// The optimiser's first moments.
    FirstMoment,
    /// Its second moments.
    SecondMoment,
}

impl Kept {
    /// PyTorch's name of it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Trained => "trained",
            Self::FirstMoment => "exp_avg",
            Self::SecondMoment => "exp_avg_sq",
        }
    }
}

/// Takes the runs of a flat buffer.
pub type Take<'a> = dyn FnMut(&[f32]) -> Result<()> + 'a;

/// A state of training: in a trainer, or in a checkpoint.
pub trait State {
    /// Hands over a flat buffer, run after run: the whole of a large one is never held twice.
    ///
    /// # Errors
    /// Those of `take`; numbers that cannot be read.
    fn runs(&self, kept: Kept, take: &mut Take) -> Result<()>;
}

/// How far a training is, and what it goes on with besides the numbers of its [`State`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Steps taken, or left out.
    #[serde(rename = "global_step")]
    pub steps: u64,
    /// Of all forward passes.
    #[serde(rename = "num_input_tokens_seen")]
    pub tokens: u64,
    /// Tokens of the parts that a batch is cut into: these decide in which order it is summed. What memory there is when
    /// training starts is not what there is when it goes on.
    pub part_tokens: usize,
}

/// Training in progress, on a CPU or a GPU.
pub trait Train: State {
    /// The settings.
    fn settings(&self) -> &Settings;

    /// Steps taken so far.
    fn steps(&self) -> u64 {
        self.progress().steps
    }

    /// How many numbers are trained.
    fn trained(&self) -> usize;

    /// Σ log p of each response of each group under the model in its present state, nats.
    ///
    /// # Errors
    /// A GPU that fails or has no room.
    fn score(&self, groups: &[Group]) -> Result<Vec<Vec<f64>>>;

    /// One optimiser step on a batch.
    ///
    /// # Errors
    /// [`NotFinite`]: nothing is changed then, and [`Self::skip`] goes on without this batch. A GPU that fails.
    fn step(&mut self, pairs: &[&Pair], epoch: f64) -> Result<StepMetrics>;

    /// Counts a step that is not taken; weights and moments stay as they are.
    fn skip(&mut self);

    /// How far it is.
    fn progress(&self) -> Progress;

    /// Goes back to a state of this trainer or of another with the same settings.
    ///
    /// # Errors
    /// Numbers of another length; those of `state`; a GPU without room for parts of that size.
    fn restore(&mut self, state: &dyn State, progress: Progress) -> Result<()>;

    /// Writes the model (adapters merged) into the folder `dir` as transformers reads it.
    fn save_model(&self, dir: &Path, start: &Weights) -> Result<()>;

    /// Writes the adapters into the folder `dir` as PEFT reads them; `base` is what they belong to.
    ///
    /// # Errors
    /// There are none: all weights were trained.
    fn save_adapter(&self, dir: &Path, base: &str) -> Result<()>;
}

/// Writes a trained model into the folder `dir`: all parameters as `read` gives them, or, where there are adapters, those of
/// the start with them added.
pub(super) fn save_trained<'a>(
    dir: &Path,
    start: &Weights,
    params: &Params,
    adapters: Option<(&Lora, &[f32])>,
    read: impl Fn(Range<usize>) -> Result<Cow<'a, [f32]>>,
) -> Result<()> {
    let places = params.places();
    let tensor = |(name, shape): (String, Vec<usize>)| {
        let values = match adapters {
            None => read(places[name.as_str()].clone())?,
            Some((lora, values)) => {
                let mut weight = start.tensor(&name, &shape)?;
                lora.add_to(&name, values, &mut weight);
                Cow::Owned(weight)
            }
        };
        Ok((name, shape, values))
    };
    let tensors = start.config.parameters().into_iter().map(tensor);
    weights::save(dir, &start.config, Some(start), tensors)
}

/// Puts a state's `len` numbers where they belong: `put` takes a run and the place of its first.
///
/// # Errors
/// More or fewer numbers; those of both sides.
pub(super) fn fill(
    len: usize,
    state: &dyn State,
    kept: Kept,
    mut put: impl FnMut(usize, &[f32]) -> Result<()>,
) -> Result<()> {
    const OTHER: &str = "the saved state is of another model or of other adapters";
    let mut at = 0;
    state.runs(kept, &mut |run| {
        ensure!(at + run.len() <= len, OTHER);
        put(at, run)?;
        at += run.len();
        Ok(())
    })?;
    ensure!(at == len, OTHER);
    Ok(())
}

/// The adapters that training starts from.
pub(super) fn initial_adapters(lora: &Lora, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    lora.initial(|| (rng.next_u32() >> 8) as f32 / (1 << 24) as f32)
}

/// The places of all matrices: what weight decay applies to.
pub(super) fn matrices(params: &Params) -> Vec<Range<usize>> {
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
