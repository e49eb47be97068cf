//! One batch of pairs: forward over the packed pairs, the loss, and back through LM head and layers.

use super::loss::{Objective, PairLogps};
use crate::kernels::team;
use crate::logprob::{Batch, Group, TargetLogps, target_logps, target_logps_backward};
use crate::model::{Aside, Decoder, Gradients, Kept, LayerState, Model, Workspace, backward};
use crate::weights::Config;

/// A pair ready to train on.
#[derive(Clone, Debug, PartialEq)]
pub struct Pair {
    /// The rendered prompt.
    pub prompt: Vec<u32>,
    /// The better response, with its end-of-turn token.
    pub chosen: Vec<u32>,
    /// The worse one.
    pub rejected: Vec<u32>,
    /// log π_ref of both, nats.
    pub reference: (f64, f64),
}

impl Pair {
    /// Prompt and both responses as a group to score.
    pub fn group(&self) -> Group {
        Group {
            prompt: self.prompt.clone(),
            responses: vec![self.chosen.clone(), self.rejected.clone()],
        }
    }

    /// Tokens of prompt and both responses.
    pub fn tokens(&self) -> usize {
        self.prompt.len() + self.chosen.len() + self.rejected.len()
    }

    /// Tokens of the longer of the two sequences.
    pub fn length(&self) -> usize {
        self.prompt.len() + self.chosen.len().max(self.rejected.len())
    }
}

/// Sums over the pairs of a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sums {
    /// The preference loss and the RPO term's share.
    pub loss: f64,
    /// β·(log π − log π_ref).
    pub reward_chosen: f64,
    /// The same of the rejected responses.
    pub reward_rejected: f64,
    /// Pairs whose chosen response has the higher reward.
    pub correct: f64,
    /// log π(chosen).
    pub logp_chosen: f64,
    /// log π(rejected).
    pub logp_rejected: f64,
    /// Tokens of the forward passes.
    pub tokens: u64,
    /// Pairs so far.
    pub pairs: usize,
    /// The batch's first pair whose loss is not a number.
    pub broken: Option<usize>,
}

/// The memory of a training on a CPU for layer states, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StateBytes {
    /// A batch runs in parts whose states take so much. Where a single pair would take more, layers that do not fit keep
    /// their inputs, and are run again in the backward pass.
    pub part: usize,
    /// The same for a pair of more than `LONG` tokens.
    pub long: usize,
}

/// Tokens from which on a pair may take more memory than others.
const LONG: usize = 1024;

impl StateBytes {
    /// Tokens of a part; a single longer pair is run all the same. Not fewer than 256, below which packing the weights
    /// costs more than making the states again; nor more than 2048, above which nothing is gained.
    pub(super) fn part_tokens(self, config: &Config) -> usize {
        (self.part / Decoder::state_bytes(config, 1)).clamp(256, 2048)
    }

    /// How many layers' states are kept in a pass over so many tokens; of the others their inputs are.
    fn whole_layers(self, decoder: &Decoder, tokens: usize) -> usize {
        let most = match tokens > LONG {
            true => self.long,
            false => self.part,
        };
        let layers = decoder.config.layers;
        let state = Decoder::state_bytes(&decoder.config, tokens) / layers.max(1);
        let input = tokens * decoder.config.hidden * size_of::<f32>();
        (most.saturating_sub(layers * input) / (state - input).max(1)).min(layers)
    }
}

/// Makes the gradient of the mean loss over `pairs` in `gradients` and returns the sums of its metrics. They run in parts of
/// at most so many tokens, whose layer states may take so much memory.
pub fn accumulate(
    model: Model,
    objective: &Objective,
    pairs: &[&Pair],
    (part_tokens, memory): (usize, StateBytes),
    gradients: &mut Gradients,
    workspace: &mut Workspace,
) -> Sums {
    let mean = Mean::new(objective, pairs);
    let mut sums = Sums::default();
    gradients.begin();
    for part in parts(pairs, part_tokens) {
        team::with(|| accumulate_part(model, mean, part, memory, gradients, workspace, &mut sums));
        gradients.passed();
    }
    sums
}

/// The loss of a batch: the mean over its pairs.
#[derive(Clone, Copy)]
pub(super) struct Mean<'a> {
    objective: &'a Objective,
    pairs: usize,
    chosen_tokens: usize,
}

impl<'a> Mean<'a> {
    /// Over these pairs, which may be run in parts.
    pub fn new(objective: &'a Objective, pairs: &[&Pair]) -> Self {
        Self {
            objective,
            pairs: pairs.len(),
            chosen_tokens: pairs.iter().map(|p| p.chosen.len()).sum(),
        }
    }

    /// Adds a part's pairs to the sums and gives ∂L/∂ log π of their responses, chosen and rejected in turn, as `logps`
    /// has log π of them.
    pub fn slopes(self, pairs: &[&Pair], logps: &[f64], sums: &mut Sums) -> Vec<f32> {
        let rpo = self.objective.rpo_alpha / self.chosen_tokens as f64;
        let n = self.pairs as f64;
        let mut slopes = vec![];
        for (pair, logps) in pairs.iter().zip(logps.chunks_exact(2)) {
            let (chosen, rejected) = (logps[0], logps[1]);
            let found = self.objective.pair(&PairLogps {
                policy_chosen: chosen,
                policy_rejected: rejected,
                ref_chosen: pair.reference.0,
                ref_rejected: pair.reference.1,
                chosen_tokens: pair.chosen.len(),
                rejected_tokens: pair.rejected.len(),
            });
            slopes.push((found.d_chosen / n - rpo) as f32);
            slopes.push((found.d_rejected / n) as f32);
            let loss = found.loss - rpo * n * chosen;
            if !loss.is_finite() {
                sums.broken = sums.broken.or(Some(sums.pairs));
            }
            sums.pairs += 1;
            sums.loss += loss;
            sums.reward_chosen += found.reward_chosen;
            sums.reward_rejected += found.reward_rejected;
            sums.correct += f64::from(found.reward_chosen > found.reward_rejected);
            sums.logp_chosen += chosen;
            sums.logp_rejected += rejected;
        }
        slopes
    }
}

/// Cuts a batch into runs of pairs of at most so many tokens.
pub(super) fn parts<'a, 'b>(pairs: &'a [&'b Pair], limit: usize) -> Vec<&'a [&'b Pair]> {
    let mut out = vec![];
    let (mut start, mut tokens) = (0, 0);
    for (i, pair) in pairs.iter().enumerate() {
        let more = pair.tokens();
        if i > start && tokens + more > limit {
            out.push(&pairs[start..i]);
            (start, tokens) = (i, 0);
        }
        tokens += more;
    }
    out.push(&pairs[start..]);
    out
}

fn accumulate_part(
    model: Model,
    mean: Mean,
    pairs: &[&Pair],
    memory: StateBytes,
    gradients: &mut Gradients,
    workspace: &mut Workspace,
    sums: &mut Sums,
) {
    let groups: Vec<Group> = pairs.iter().map(|p| p.group()).collect();
    let batch = Batch::new(&groups);
    let whole = memory.whole_layers(model.decoder, batch.tokens.len());
    let pass = Forward::new(model.decoder, &batch, whole, workspace);
    let logps = pass.batch.sums(&pass.found.logps);
    let mut d_logps = vec![0.0; pass.batch.targets.len()];
    for (response, slope) in (pass.batch.responses.iter()).zip(mean.slopes(pairs, &logps, sums)) {
        d_logps[response.clone()].fill(slope);
    }
    sums.tokens += pass.batch.tokens.len() as u64;
    pass.backward(model, &d_logps, gradients, workspace);
}

/// A forward pass with what its backward pass needs.
pub(crate) struct Forward {
    pub batch: Batch,
    layers: Vec<Kept>,
    aside: Aside,
    /// The residual stream of the rows that predict, `[targets, hidden]`.
    gathered: Vec<f32>,
    /// The same after the last norm.
    normed: Vec<f32>,
    pub found: TargetLogps,
}

impl Forward {
    /// Runs the batch. The states of the last `whole` layers are kept, of the others their inputs.
    pub fn new(decoder: &Decoder, batch: &Batch, whole: usize, workspace: &mut Workspace) -> Self {
        let mut layers = vec![];
        let mut aside = Aside::default();
        let keep = |i: usize, state: &mut LayerState| {
            layers.push(workspace.keep(state, i + whole >= decoder.config.layers));
        };
        let hidden = decoder.forward(&batch.layout, &batch.tokens, &mut aside, keep);
        let gathered = batch.gather(&hidden, decoder.config.hidden);
        let mut normed = vec![];
        decoder.final_norm(&gathered, &mut normed);
        let found = target_logps(decoder, &normed, &batch.targets);
        Self {
            batch: batch.clone(),
            layers,
            aside,
            gathered,
            normed,
            found,
        }
    }

    /// Adds the gradients, given ∂L/∂(log p) of every target.
    pub fn backward(
        mut self,
        model: Model,
        d_logps: &[f32],
        gradients: &mut Gradients,
        workspace: &mut Workspace,
    ) {
        let decoder = model.decoder;
        let width = decoder.config.hidden;
        let mut d_normed = vec![0.0; self.normed.len()];
        target_logps_backward(
            model,
            &self.normed,
            &self.batch.targets,
            &self.found.lse,
            d_logps,
            &mut d_normed,
            gradients.head(),
        );
        let mut d_gathered = vec![0.0; self.normed.len()];
        decoder.final_norm_backward(
            &self.gathered,
            &mut d_normed,
            &mut d_gathered,
            gradients.vector(&model.params.norm),
        );
        let mut dx = vec![0.0; self.batch.tokens.len() * width];
        self.batch.scatter(&d_gathered, width, &mut dx);
        backward(
            model,
            &self.batch.layout,
            &self.batch.tokens,
            (self.layers, &mut self.aside),
            dx,
            gradients,
            workspace,
        );
    }
}
