//! log p(y|x): hidden states in, the log-probability of each target token out, and back.
//!
//! Only rows that predict a response token meet the LM head, and they meet it tile by tile: the logits of a few
//! hundred rows by a few thousand words exist at a time, never those of a whole batch by the whole vocabulary. The
//! backward pass makes each tile again.

use crate::kernels::gemm::{Left, Mat, Packed, PackedLeft, Threads, Write, matmul, multiply};
use crate::kernels::layout::Layout;
use crate::kernels::{cap, rows, softmax, team};
use crate::model::{Aside, Decoder, Model};
use anyhow::Result;
use std::cell::Cell;
use std::ops::Range;

/// A prompt and the responses to score after it, as token ids.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Group {
    /// At least one token.
    pub prompt: Vec<u32>,
    /// Each with the end-of-turn token where it is finished.
    pub responses: Vec<Vec<u32>>,
}

impl Group {
    /// The tokens that a forward pass over the group runs on.
    pub fn tokens(&self) -> usize {
        self.prompt.len()
            + self
                .responses
                .iter()
                .map(|r| r.len().saturating_sub(1))
                .sum::<usize>()
    }
}

/// Groups packed for one forward pass.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// The segments.
    pub layout: Layout,
    /// The input tokens.
    pub tokens: Vec<u32>,
    /// For each target, the row of the batch whose hidden state predicts it.
    pub rows: Vec<usize>,
    /// The tokens to predict, response after response.
    pub targets: Vec<u32>,
    /// Each response's place in `targets`, in order.
    pub responses: Vec<Range<usize>>,
}

impl Batch {
    /// Packs groups one after another. The last token of a response predicts nothing and is left out of the input.
    pub fn new<'a>(groups: impl IntoIterator<Item = &'a Group>) -> Self {
        let mut batch = Self::default();
        for group in groups {
            assert!(!group.prompt.is_empty(), "a prompt has at least one token");
            let inputs: Vec<usize> = group
                .responses
                .iter()
                .map(|r| r.len().saturating_sub(1))
                .collect();
            batch.layout.push(group.prompt.len(), &inputs);
            batch.tokens.extend(&group.prompt);
            let last_of_prompt = batch.tokens.len() - 1;
            for response in &group.responses {
                let first = batch.tokens.len();
                batch
                    .responses
                    .push(batch.targets.len()..batch.targets.len() + response.len());
                batch.rows.extend((0..response.len()).map(|i| {
                    if i == 0 {
                        last_of_prompt
                    } else {
                        first + i - 1
                    }
                }));
                batch.targets.extend(response);
                batch
                    .tokens
                    .extend(&response[..response.len().saturating_sub(1)]);
            }
        }
        batch
    }

    /// The rows of `hidden` `[T, width]` that predict targets, `[targets, width]`.
    pub fn gather(&self, hidden: &[f32], width: usize) -> Vec<f32> {
        let mut out = Vec::with_capacity(self.rows.len() * width);
        for &r in &self.rows {
            out.extend_from_slice(&hidden[r * width..][..width]);
        }
        out
    }

    /// Adds the gradient of the gathered rows to those of the batch, `[T, width]`.
    pub fn scatter(&self, gathered: &[f32], width: usize, hidden: &mut [f32]) {
        for (&r, row) in self.rows.iter().zip(gathered.chunks_exact(width)) {
            hidden[r * width..][..width]
                .iter_mut()
                .zip(row)
                .for_each(|(h, g)| *h += g);
        }
    }

    /// Sums per-target values over each response.
    pub fn sums(&self, values: &[f32]) -> Vec<f64> {
        self.responses
            .iter()
            .map(|r| values[r.clone()].iter().map(|&v| v as f64).sum())
            .collect()
    }
}

/// Σ log p over the tokens of each response, in nats, groups and responses in order.
pub fn score(decoder: &Decoder, groups: &[Group]) -> Vec<f64> {
    let batch = Batch::new(groups);
    let found = team::with(|| {
        let mut aside = Aside::default();
        let hidden = decoder.forward(&batch.layout, &batch.tokens, &mut aside, |_, _| {});
        let mut normed = vec![];
        decoder.final_norm(&batch.gather(&hidden, decoder.config.hidden), &mut normed);
        target_logps(decoder, &normed, &batch.targets)
    });
    batch.sums(&found.logps)
}

/// What one pass over the LM head finds for each target.
pub struct TargetLogps {
    /// log p(target), nats.
    pub logps: Vec<f32>,
    /// log Σ exp(logits).
    pub lse: Vec<f32>,
}

/// Words per tile of logits; a multiple of every panel width.
const WORDS: usize = 2048;

thread_local! {
    /// A tile of logits, kept: fresh pages cost more than a tile.
    static LOGITS: Cell<Vec<f32>> = const { Cell::new(vec![]) };
}

/// log p of each target, for `normed` `[targets, hidden]`, the hidden states after the last norm.
pub fn target_logps(decoder: &Decoder, normed: &[f32], targets: &[u32]) -> TargetLogps {
    // Each task takes rows whose tile of logits stays in its core's second cache, through all words; all cores have as
    // many tasks.
    const ROWS: usize = 112;
    let tasks = (targets.len().div_ceil(ROWS)).next_multiple_of(rayon::current_num_threads());
    let rows = targets.len().div_ceil(tasks.max(1)).max(1);
    let width = decoder.config.hidden;
    let mut stats = vec![
        Running {
            max: f32::NEG_INFINITY,
            sum: 0.0,
            target: f32::NAN
        };
        targets.len()
    ];
    team::chunks(&mut stats, rows, |i, stats| {
        let at = i * rows;
        let normed = &normed[at * width..][..stats.len() * width];
        let left = packed(decoder, normed, Threads::One);
        let mut logits = LOGITS.take();
        for words in tiles(decoder.config.vocab) {
            let rows = (&left, stats.len());
            tile(decoder, rows, words.clone(), &mut logits, Threads::One);
            let rows = logits.chunks_exact_mut(words.len());
            for ((s, &target), row) in stats.iter_mut().zip(&targets[at..]).zip(rows) {
                cap::bound(row, decoder.config.logit_cap);
                s.add(row);
                if words.contains(&(target as usize)) {
                    s.target = row[target as usize - words.start];
                }
            }
        }
        LOGITS.set(logits);
    });
    let (logps, lse) = (stats.iter())
        .map(|s| {
            let lse = s.max as f64 + s.sum.ln();
            ((s.target as f64 - lse) as f32, lse as f32)
        })
        .unzip();
    TargetLogps { logps, lse }
}

/// Log-sum-exp over tiles that come one after another.
#[derive(Clone)]
struct Running {
    max: f32,
    sum: f64,
    target: f32,
}

impl Running {
    fn add(&mut self, row: &[f32]) {
        let max = softmax::max(row).max(self.max);
        self.sum =
            self.sum * ((self.max - max) as f64).exp() + softmax::sum_exp(row, max, 1.0) as f64;
        self.max = max;
    }
}

/// Given ∂L/∂(log p) of each target in `d_logps`, sets `d_normed` `[targets, hidden]` and adds the LM head's gradient
/// to `d_head` `[vocab, hidden]`, or writes it there, where it is wanted.
///
/// ∂log p(t)/∂logits = onehot(t) − softmax, each tile of it made and used at once. Words come first, rows second: so
/// weights are turned once, and the gradient of some words is near while it is added to.
pub fn target_logps_backward(
    model: Model,
    normed: &[f32],
    targets: &[u32],
    lse: &[f32],
    d_logps: &[f32],
    d_normed: &mut [f32],
    mut d_head: Option<(&mut [f32], Write)>,
) {
    // Rows per tile of logits.
    const ROWS: usize = 512;
    let decoder = model.decoder;
    let (width, logit_cap) = (decoder.config.hidden, decoder.config.logit_cap);
    let mut head = Packed::empty(decoder.precision);
    d_normed.fill(0.0);
    let chunks: Vec<_> = (normed.chunks(ROWS * width))
        .map(|normed| {
            let columns = Mat::new(normed, normed.len() / width, width);
            (
                packed(decoder, normed, Threads::All),
                Packed::from_columns(columns, decoder.precision),
            )
        })
        .collect();
    let mut logits = vec![];
    for words in tiles(decoder.config.vocab) {
        let n = words.len();
        head.set_transposed(decoder.head(), words.clone());
        let parts = chunks.iter().zip(d_normed.chunks_mut(ROWS * width));
        for (i, ((left, right), d_normed)) in parts.enumerate() {
            let rows_of = (left, d_normed.len() / width);
            tile(decoder, rows_of, words.clone(), &mut logits, Threads::All);
            rows(&mut logits, n, |first, part| {
                for (r, row) in part.chunks_exact_mut(n).enumerate() {
                    let r = i * ROWS + first + r;
                    cap::bound(row, logit_cap);
                    let target = (targets[r] as usize).checked_sub(words.start);
                    let target = target.filter(|&at| at < n);
                    let inverse_cap = cap::inverse(logit_cap);
                    softmax::log_prob_backward(row, lse[r], d_logps[r], target, inverse_cap);
                }
            });
            let d_logits = Mat::new(&logits, logits.len() / n, n);
            matmul(
                Left::Rows(d_logits),
                head.panels(),
                d_normed,
                width,
                Write::Add,
                Threads::All,
            );
            if let Some((d_head, first)) = &mut d_head {
                let target = &mut d_head[words.start * width..];
                let write = if i == 0 { *first } else { Write::Add };
                matmul(
                    Left::Columns(d_logits),
                    right.panels(),
                    target,
                    width,
                    write,
                    Threads::All,
                );
            }
        }
    }
}

/// How many tokens run at once.
#[derive(Clone, Copy, Debug)]
pub struct PassLimits {
    /// As many as are worth to be gathered for a forward pass.
    pub gathered: usize,
    /// More than these do not fit into the memory; a single longer response is run all the same.
    pub most: usize,
}

impl PassLimits {
    /// Tokens of a pass over responses to one prompt. What is cut off needs the prompt once more: so at most a sixteenth
    /// of a pass is prompt, where memory allows.
    fn for_prompt(self, prompt: usize) -> usize {
        self.gathered.max(16 * prompt).min(self.most)
    }
}

/// Scores many groups on the CPU; see [`in_parts`].
pub fn score_all(decoder: &Decoder, groups: &[Group], limits: PassLimits) -> Vec<Vec<f64>> {
    in_parts(groups, limits, |part| Ok(score(decoder, part))).expect("a CPU does not fail")
}

/// Scores many groups, some tokens in a forward pass, `score`; a group of more is cut between its responses. Gives
/// Σ log p of each response, group by group.
///
/// # Errors
/// Those of `score`.
pub fn in_parts(
    groups: &[Group],
    limits: PassLimits,
    mut score: impl FnMut(&[Group]) -> Result<Vec<f64>>,
) -> Result<Vec<Vec<f64>>> {
    let mut parts: Vec<(usize, Group)> = vec![];
    for (i, group) in groups.iter().enumerate() {
        let limit = limits.for_prompt(group.prompt.len());
        let mut part = Group {
            prompt: group.prompt.clone(),
            responses: vec![],
        };
        for response in &group.responses {
            if !part.responses.is_empty() && part.tokens() + response.len() > limit {
                let next = Group {
                    prompt: group.prompt.clone(),
                    responses: vec![],
                };
                parts.push((i, std::mem::replace(&mut part, next)));
            }
            part.responses.push(response.clone());
        }
        parts.push((i, part));
    }
    let mut scores = vec![vec![]; groups.len()];
    let mut rest = parts.as_slice();
    while !rest.is_empty() {
        let mut tokens = 0;
        let fits = rest.iter().take_while(|(_, part)| {
            tokens += part.tokens();
            tokens <= limits.gathered.min(limits.most)
        });
        let (now, later) = rest.split_at(fits.count().max(1));
        let batch: Vec<Group> = now.iter().map(|(_, part)| part.clone()).collect();
        let mut found = score(&batch)?.into_iter();
        for (i, part) in now {
            scores[*i].extend(found.by_ref().take(part.responses.len()));
        }
        rest = later;
    }
    Ok(scores)
}

fn tiles(vocab: usize) -> impl Iterator<Item = Range<usize>> {
    (0..vocab)
        .step_by(WORDS)
        .map(move |start| start..(start + WORDS).min(vocab))
}

/// The logits of `rows` packed rows for a range of words, `[rows, words]`.
fn tile(
    decoder: &Decoder,
    (left, rows): (&PackedLeft, usize),
    words: Range<usize>,
    logits: &mut Vec<f32>,
    threads: Threads,
) {
    let n = words.len();
    logits.resize(rows * n, 0.0);
    let panels = decoder.head().panel_range(words.start, n);
    multiply(left, panels, logits, n, Write::Set, threads);
}

/// Packs rows that meet the LM head, once for all tiles.
fn packed(decoder: &Decoder, normed: &[f32], threads: Threads) -> PackedLeft {
    let width = decoder.config.hidden;
    let rows = Left::Rows(Mat::new(normed, normed.len() / width, width));
    let mut left = PackedLeft::default();
    left.set(rows, decoder.precision, threads);
    left
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dpo::Forward;
    use crate::kernels::activation::Activation;
    use crate::kernels::gemm::Precision;
    use crate::kernels::testing::noise;
    use crate::model::{Gradients, Params, Workspace};
    use crate::weights::{Config, Norms, QkNorm, QueryGrowth, Rope, RopeScaling};
    use serde_json::json;
    use std::path::Path;

    /// A small model of each kind of part: biases, head norms, windows, tied and untied heads.
    fn configs() -> Vec<Config> {
        let base = json!({
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 40, "hidden_size": 16,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
            "intermediate_size": 20, "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "rope_theta": 100.0,
            "tie_word_embeddings": true, "hidden_act": "silu"
        });
        let llama = Config::from_json(&base, Path::new("config.json")).unwrap();
        let biased = Config {
            qkv_bias: true,
            o_bias: true,
            mlp_bias: true,
            tied: false,
            ..llama.clone()
        };
        let normed = Config {
            qk_norm: Some(QkNorm::Heads),
            windows: vec![Some(3), None],
            ropes: vec![llama.ropes[0].clone(), None],
            ..llama.clone()
        };
        // What is rotated grows by that, too, before it is normed.
        let grown = Rope {
            theta: 100.0,
            scaling: RopeScaling::Yarn {
                factor: 4.0,
                original_context: 16.0,
                beta_fast: 4.0,
                beta_slow: 1.0,
                attention_factor: 1.5,
                truncate: false,
            },
        };
        let turned = Config {
            qk_norm: Some(QkNorm::Turned),
            norm_eps: 0.1,
            ropes: vec![Some(grown), None],
            query_growth: Some(QueryGrowth {
                beta: 0.7,
                context: 2,
            }),
            ..biased.clone()
        };
        let after = Config {
            norms: Norms::After,
            qk_norm: Some(QkNorm::Rows),
            ..llama.clone()
        };
        let around = Config {
            norms: Norms::Around,
            embed_scale: 3.0,
            attention_scale: 0.6,
            attention_cap: Some(0.5),
            logit_cap: Some(0.7),
            logit_scale: 0.6,
            activation: Activation::GeluTanh,
            ..llama.clone()
        };
        let once = Config {
            norms: Norms::Once,
            norms_centred: true,
            logit_scale: 0.6,
            qk_norm: Some(QkNorm::Apart),
            ..biased.clone()
        };
        vec![llama, biased, normed, turned, after, around, once]
    }

    fn weights(params: &Params) -> Vec<f32> {
        let mut flat: Vec<f32> = noise(params.len, 9).iter().map(|x| x * 0.5).collect();
        for (name, _, range) in params.tensors() {
            if name.ends_with("norm.weight") || name.ends_with("layernorm.weight") {
                flat[range].iter_mut().for_each(|x| *x += 1.0);
            }
        }
        flat
    }

    fn groups() -> Vec<Group> {
        let group = |prompt: &[u32], responses: &[&[u32]]| Group {
            prompt: prompt.to_vec(),
            responses: responses.iter().map(|r| r.to_vec()).collect(),
        };
        vec![
            group(&[1, 5, 9], &[&[2, 3, 4, 5, 6], &[7], &[]]),
            group(&[3], &[&[39, 1]]),
        ]
    }

    fn decoder(config: &Config, flat: &[f32]) -> Decoder {
        Decoder::new(config, flat, Precision::F32).unwrap()
    }

    #[test]
    fn packing_and_sharing_do_not_change_a_score() {
        for config in configs() {
            let params = Params::new(&config);
            let decoder = decoder(&config, &weights(&params));
            let together = score(&decoder, &groups());
            let mut alone = vec![];
            for group in groups() {
                for response in group.responses {
                    alone.extend(score(
                        &decoder,
                        &[Group {
                            prompt: group.prompt.clone(),
                            responses: vec![response],
                        }],
                    ));
                }
            }
            assert_eq!(together, alone);
            for (gathered, most) in [(1, 1), (6, 6), (9, 9), (1, 1000), (1000, 1000)] {
                let limits = PassLimits { gathered, most };
                let found = score_all(&decoder, &groups(), limits).concat();
                assert_eq!(found, together, "{limits:?}");
            }
            assert_eq!(together[2], 0.0, "an empty response has probability 1");
            assert!(together[0] < -5.0);
        }
    }

    #[test]
    fn a_prompt_is_run_again_only_where_it_costs_little() {
        let response = vec![3; 50];
        let groups = |prompt| {
            vec![Group {
                prompt: vec![2; prompt],
                responses: vec![response.clone(); 40],
            }]
        };
        for (prompt, (gathered, most), passes) in [
            (10, (500, 5000), 5),  // at most 9 responses to a pass
            (100, (500, 5000), 2), // 30, since 1600 tokens are worth the prompt
            (100, (500, 500), 5),  // but there is room for 8
            (400, (500, 5000), 1),
            (400, (500, 300), 40), // each alone, whatever it takes
        ] {
            let limits = PassLimits { gathered, most };
            let mut found = 0;
            let scores = in_parts(&groups(prompt), limits, |part| {
                found += 1;
                Ok(vec![0.0; part[0].responses.len()])
            });
            assert_eq!(
                (found, scores.unwrap()[0].len()),
                (passes, 40),
                "{limits:?}"
            );
        }
    }

    /// The gradient of Σ coefficient · log p over the responses, with so many layers' states kept, the others made again.
    fn gradient(
        config: &Config,
        params: &Params,
        flat: &[f32],
        coefficients: &[f32],
        whole: usize,
    ) -> Vec<f32> {
        let decoder = decoder(config, flat);
        let mut workspace = Workspace::new(Precision::F32);
        let pass = Forward::new(&decoder, &Batch::new(&groups()), whole, &mut workspace);
        let mut d_logps = vec![0.0; pass.batch.targets.len()];
        for (range, c) in pass.batch.responses.iter().zip(coefficients) {
            d_logps[range.clone()].fill(*c);
        }
        let mut sum = vec![f32::NAN; params.len]; // what was there does not matter
        let mut gradients = Gradients::Full {
            params,
            flat: &mut sum,
            fresh: false,
        };
        gradients.begin();
        let model = Model {
            decoder: &decoder,
            params,
        };
        pass.backward(model, &d_logps, &mut gradients, &mut workspace);
        sum
    }

    #[test]
    fn every_parameter_has_the_gradient_that_differences_give() {
        let coefficients = [1.0, -0.5, 0.0, 0.7];
        for config in configs() {
            let params = Params::new(&config);
            let flat = weights(&params);
            let ours = gradient(&config, &params, &flat, &coefficients, config.layers);
            for whole in 0..config.layers {
                assert_eq!(
                    ours,
                    gradient(&config, &params, &flat, &coefficients, whole),
                    "recompute changes the gradient"
                );
            }
            let loss = |flat: &[f32]| -> f64 {
                let scores = score(&decoder(&config, flat), &groups());
                scores
                    .iter()
                    .zip(coefficients)
                    .map(|(s, c)| s * c as f64)
                    .sum()
            };
            for (name, _, range) in params.tensors() {
                let scale = ours[range.clone()]
                    .iter()
                    .fold(0.0f32, |m, g| m.max(g.abs()));
                assert!(scale > 1e-3, "{name} has no gradient");
                for i in range.clone().step_by(range.len().div_ceil(9)) {
                    let at = |step: f32| {
                        let mut moved = flat.clone();
                        moved[i] += step;
                        loss(&moved)
                    };
                    let estimate = (at(4e-3) - at(-4e-3)) / 8e-3;
                    let error = (estimate - ours[i] as f64).abs();
                    assert!(
                        error < 0.01 * (scale as f64).max(0.1),
                        "{name}[{}]: {} but {estimate}",
                        i - range.start,
                        ours[i]
                    );
                }
            }
        }
    }
}
