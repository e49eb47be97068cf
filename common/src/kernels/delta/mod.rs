//! Linear attention by the gated delta rule (Yang, Kautz and Hatamizadeh, arXiv 2412.06464), as Qwen3.5 has it: a head keeps a
//! matrix S in the place of its past. It fades, S ← a·S, learns what it lacks of a token, S ← S + k·(β·(v − Sᵀk))ᵀ, and is
//! read, o = Sᵀq. What is read is normed and gated. Forward and backward, over a packed, prefix-shared batch, token by token: a
//! strip of S stays in the first cache, and beside a layer's products with weights that is a few percent.

mod memory;
mod rule;
mod short;

pub use memory::Memory;

use super::activation::{self, Activation};
use super::layout::{Layout, Segment};
use super::shared::Shared;
use super::{norm, rows, team};
use anyhow::{Result, ensure};
use rule::{Gradients, LANES, Strip, Trace, scan};
use std::ops::Range;

/// The heads of a layer. A row of the fused projection is `[q | k | v | z | b | a]`: what becomes queries, keys and values, the
/// gates of what is read, and a number each for a value head's rate and decay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Query and key heads; each serves `value_heads / key_heads` value heads.
    pub key_heads: usize,
    /// Value heads, each with a memory of its own.
    pub value_heads: usize,
    /// Elements of a query or key; even.
    pub key_dim: usize,
    /// Elements of a value.
    pub value_dim: usize,
    /// Tokens that the convolution sees.
    pub kernel: usize,
}

impl Shape {
    /// Elements of all keys of a token.
    pub fn key_width(self) -> usize {
        self.key_heads * self.key_dim
    }

    /// Elements of all values of a token.
    pub fn value_width(self) -> usize {
        self.value_heads * self.value_dim
    }

    /// Elements of `[q | k | v]`.
    pub fn qkv_width(self) -> usize {
        2 * self.key_width() + self.value_width()
    }

    /// Elements of a row of the fused projection.
    pub fn input_width(self) -> usize {
        self.qkv_width() + self.value_width() + 2 * self.value_heads
    }

    /// The bounds that the arithmetic relies on.
    ///
    /// # Errors
    /// A size beyond them, by its name in a config.
    pub fn check(self) -> Result<()> {
        for (what, size) in [
            ("linear_num_key_heads", self.key_heads),
            ("linear_num_value_heads", self.value_heads),
            ("linear_key_head_dim", self.key_dim),
            ("linear_value_head_dim", self.value_dim),
            ("linear_conv_kernel_dim", self.kernel),
        ] {
            ensure!(
                (1..=1 << 12).contains(&size),
                "{what} is {size}, outside 1 to {}",
                1 << 12
            );
        }
        ensure!(
            self.value_heads.is_multiple_of(self.key_heads),
            "linear_num_value_heads: {} cannot share {} key heads evenly",
            self.value_heads,
            self.key_heads
        );
        ensure!(
            self.key_dim.is_multiple_of(2),
            "linear_key_head_dim: {} is odd, which is not supported",
            self.key_dim
        );
        Ok(())
    }

    /// Value heads of a key head.
    fn group(self) -> usize {
        self.value_heads / self.key_heads
    }

    fn strips(self) -> usize {
        self.value_dim.div_ceil(LANES)
    }

    /// Elements of a strip's memory.
    fn strip_len(self) -> usize {
        self.key_dim * LANES
    }

    /// The heads of a row of `[q | k | v]` that are made of length 1: queries, then keys.
    fn unit_heads(self, qkv: &mut [f32]) -> impl Iterator<Item = &mut [f32]> {
        qkv[..2 * self.key_width()].chunks_exact_mut(self.key_dim)
    }

    /// What such a head is multiplied by then: queries by 1/√key_dim.
    fn scale(self, head: usize) -> f32 {
        match head < self.key_heads {
            true => 1.0 / (self.key_dim as f32).sqrt(),
            false => 1.0,
        }
    }

    /// The gates of what is read, in a row of the projection.
    fn gates(self) -> Range<usize> {
        self.qkv_width()..self.qkv_width() + self.value_width()
    }

    /// What rates and decays are made of.
    fn gate_inputs(self, raw: &[f32]) -> (&[f32], &[f32]) {
        raw[self.gates().end..].split_at(self.value_heads)
    }
}

/// A layer's parameters beside its projections.
#[derive(Clone, Copy)]
pub struct Weights<'a> {
    /// The convolution's, `[kernel, qkv_width]`: the oldest token's first.
    pub conv: &'a [f32],
    /// Added to what decays are made of, `[value_heads]`.
    pub dt_bias: &'a [f32],
    /// The logarithm of how fast memories fade, `[value_heads]`.
    pub a_log: &'a [f32],
    /// The norm of what a head reads, `[value_dim]`,
    pub norm: &'a [f32],
    /// and its epsilon.
    pub eps: f32,
}

impl<'a> Weights<'a> {
    fn taps(&self, shape: Shape) -> impl Iterator<Item = &'a [f32]> + use<'a> {
        self.conv.chunks_exact(shape.qkv_width())
    }
}

/// The gradients of [`Weights`], of the same shapes.
#[derive(Clone, Default)]
pub struct WeightGradients {
    pub conv: Vec<f32>,
    pub dt_bias: Vec<f32>,
    pub a_log: Vec<f32>,
    pub norm: Vec<f32>,
}

impl WeightGradients {
    fn new(shape: Shape) -> Self {
        Self {
            conv: vec![0.0; shape.kernel * shape.qkv_width()],
            dt_bias: vec![0.0; shape.value_heads],
            a_log: vec![0.0; shape.value_heads],
            norm: vec![0.0; shape.value_dim],
        }
    }

    fn add(&mut self, other: &Self) {
        for (sum, part) in [
            (&mut self.conv, &other.conv),
            (&mut self.dt_bias, &other.dt_bias),
            (&mut self.a_log, &other.a_log),
            (&mut self.norm, &other.norm),
        ] {
            sum.iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
        }
    }
}

/// The token that one of a segment's tokens sees so many tokens back; None before the first of its sequence.
fn back(segment: &Segment, at: usize, by: usize) -> Option<usize> {
    match (at.checked_sub(by), &segment.prefix) {
        (Some(own), _) => Some(segment.tokens.start + own),
        (None, Some(prefix)) => (prefix.end + at)
            .checked_sub(by)
            .filter(|t| *t >= prefix.start),
        (None, None) => None,
    }
}

/// For every token of a batch, its segment and its place in that.
fn places(layout: &Layout) -> Vec<(&Segment, usize)> {
    let segments = layout.segments().iter();
    segments
        .flat_map(|segment| (0..segment.tokens.len()).map(move |at| (segment, at)))
        .collect()
}

/// Prompts with their responses.
pub(crate) fn groups(layout: &Layout) -> impl Iterator<Item = &[Segment]> {
    let segments = layout.segments();
    segments.chunk_by(|_, next| next.prefix.is_some())
}

/// What a layer computes on its way, all `[T, …]`.
pub struct State<'a> {
    /// Queries, keys and values as the rule reads them, `[T, qkv_width]`.
    pub qkv: &'a mut [f32],
    /// Decays and rates, `[T, 2·value_heads]`.
    pub gates: &'a mut [f32],
    /// What the heads read of their memories, `[T, value_width]`,
    pub read: &'a mut [f32],
    /// and that normed and gated.
    pub out: &'a mut [f32],
}

/// Fills the state, given the fused projection `raw` `[T, input_width]`.
pub fn forward(layout: &Layout, shape: Shape, weights: Weights, raw: &[f32], state: State) {
    let places = places(layout);
    let width = shape.input_width();
    let raw_row = |token: usize| &raw[token * width..][..width];
    rows(state.qkv, shape.qkv_width(), |first, part| {
        let tokens = part.chunks_exact_mut(shape.qkv_width());
        for (qkv, &(segment, at)) in tokens.zip(&places[first..]) {
            let taps = (0..shape.kernel).rev().map(|by| back(segment, at, by));
            short::forward(shape, &weights, taps.map(|tap| tap.map(raw_row)), qkv);
        }
    });
    rows(state.gates, 2 * shape.value_heads, |first, part| {
        let tokens = part.chunks_exact_mut(2 * shape.value_heads);
        for (gates, token) in tokens.zip(first..) {
            short::gates(shape, &weights, raw_row(token), gates);
        }
    });
    let (qkv, gates) = (&*state.qkv, &*state.gates);
    let groups: Vec<_> = groups(layout).collect();
    let read = Shared::new(state.read);
    team::each(groups.len() * shape.value_heads, |task| {
        let (group, head) = (groups[task / shape.value_heads], task % shape.value_heads);
        for number in 0..shape.strips() {
            let strip = Strip {
                shape,
                head,
                number,
                qkv,
                gates,
            };
            let mut found = vec![];
            let mut run = |segment: &Segment, memory: &mut [f32]| {
                found.resize(segment.tokens.len() * LANES, 0.0);
                scan(strip, segment.tokens.clone(), memory, &mut found);
                let columns = strip.columns();
                for (token, found) in segment.tokens.clone().zip(found.chunks_exact(LANES)) {
                    let at = token * shape.value_width() + columns.start;
                    // SAFETY: this task alone writes this group's rows of this head.
                    let target = unsafe { read.slice(at, columns.len()) };
                    target.copy_from_slice(&found[..columns.len()]);
                }
            };
            let mut memory = vec![0.0; shape.strip_len()];
            run(&group[0], &mut memory);
            group[1..]
                .iter()
                .for_each(|branch| run(branch, &mut memory.clone()));
        }
    });
    let read = &*state.read;
    rows(state.out, shape.value_width(), |first, part| {
        let read = read[first * shape.value_width()..].chunks_exact(shape.value_width());
        for ((out, read), token) in part
            .chunks_exact_mut(shape.value_width())
            .zip(read)
            .zip(first..)
        {
            gate(shape, &weights, raw_row(token), read, out);
        }
    });
}

/// What a token's heads read, each normed and gated: norm(o)·SiLU(z).
fn gate(shape: Shape, weights: &Weights, raw: &[f32], read: &[f32], out: &mut [f32]) {
    let dim = shape.value_dim;
    let heads = raw[shape.gates()]
        .chunks_exact(dim)
        .zip(read.chunks_exact(dim));
    let mut normed = vec![0.0; dim];
    for ((z, read), out) in heads.zip(out.chunks_exact_mut(dim)) {
        norm::row(read, weights.norm, weights.eps, &mut normed);
        activation::forward_row(Activation::Silu.curve(), z, &normed, out);
    }
}

/// Writes the gradient of the fused projection, `d_raw`, given that of the output, `d_out` `[T, value_width]`, which becomes
/// that of what was read; gives those of the parameters. The rest is what [`forward`] read and wrote.
pub fn backward(
    layout: &Layout,
    shape: Shape,
    weights: Weights,
    raw: &[f32],
    (qkv, gates, read): (&[f32], &[f32], &[f32]),
    d_out: &mut [f32],
    d_raw: &mut [f32],
) -> WeightGradients {
    let tokens = layout.tokens();
    let mut sums = gate_backward(shape, &weights, raw, read, d_out, d_raw);
    let mut d_qkv = vec![0.0; tokens * shape.qkv_width()];
    let mut d_gates = vec![0.0; tokens * 2 * shape.value_heads];
    rule_backward(layout, shape, (qkv, gates), d_out, &mut d_qkv, &mut d_gates);
    sums.add(&short_backward(
        layout,
        shape,
        &weights,
        raw,
        (&mut d_qkv, &d_gates),
        d_raw,
    ));
    sums
}

/// Tokens whose gradients of parameters are added up together: at fixed places, so that the sum has one order whatever the
/// threads.
const TOKENS: usize = 64;

/// Runs `f(first token, rows of a, rows of b, sums)` over runs of tokens, and adds up the sums.
fn summed(
    shape: Shape,
    (a, a_width): (&mut [f32], usize),
    (b, b_width): (&mut [f32], usize),
    f: impl Fn(usize, &mut [f32], &mut [f32], &mut WeightGradients) + Sync,
) -> WeightGradients {
    let parts = a
        .chunks_mut(TOKENS * a_width)
        .zip(b.chunks_mut(TOKENS * b_width));
    let mut sums = vec![WeightGradients::new(shape); parts.len()];
    let tasks = parts.zip(&mut sums).collect();
    team::items(tasks, |i, ((a, b), sums)| f(i * TOKENS, a, b, sums));
    let mut total = WeightGradients::new(shape);
    sums.iter().for_each(|part| total.add(part));
    total
}

/// Turns the gradient of the output into that of what was read, and writes that of its gates.
fn gate_backward(
    shape: Shape,
    weights: &Weights,
    raw: &[f32],
    read: &[f32],
    d_out: &mut [f32],
    d_raw: &mut [f32],
) -> WeightGradients {
    let (width, values, dim) = (shape.input_width(), shape.value_width(), shape.value_dim);
    summed(
        shape,
        (d_out, values),
        (d_raw, width),
        |first, d_out, d_raw, sums| {
            let tokens = d_out
                .chunks_exact_mut(values)
                .zip(d_raw.chunks_exact_mut(width));
            for ((d_out, d_raw), token) in tokens.zip(first..) {
                let z = raw[token * width..][shape.gates()].chunks_exact(dim);
                let read = read[token * values..][..values].chunks_exact(dim);
                let d_z = d_raw[shape.gates()].chunks_exact_mut(dim);
                for (((z, read), d_z), d) in z.zip(read).zip(d_z).zip(d_out.chunks_exact_mut(dim)) {
                    let mut normed = vec![0.0; dim];
                    norm::row(read, weights.norm, weights.eps, &mut normed);
                    d_z.copy_from_slice(z);
                    activation::backward_row(Activation::Silu.curve(), d_z, &mut normed, d);
                    d.fill(0.0);
                    norm::backward_row(read, weights.norm, weights.eps, &normed, d, &mut sums.norm);
                }
            }
        },
    )
}

/// Adds the gradients of `[q | k | v]` and of ln a and β, given that of what was read.
fn rule_backward(
    layout: &Layout,
    shape: Shape,
    (qkv, gates): (&[f32], &[f32]),
    d_read: &[f32],
    d_qkv: &mut [f32],
    d_gates: &mut [f32],
) {
    let groups: Vec<_> = groups(layout).collect();
    let (d_qkv, d_gates) = (Shared::new(d_qkv), Shared::new(d_gates));
    team::each(groups.len() * shape.key_heads, |task| {
        let (group, key_head) = (groups[task / shape.key_heads], task % shape.key_heads);
        let mut pass = HeadPass::new(shape, group);
        for head in key_head * shape.group()..(key_head + 1) * shape.group() {
            for number in 0..shape.strips() {
                let strip = Strip {
                    shape,
                    head,
                    number,
                    qkv,
                    gates,
                };
                pass.run(strip, d_read);
                let columns = strip.columns();
                for (token, d) in pass.tokens().zip(pass.value.chunks_exact(LANES)) {
                    let at = token * shape.qkv_width() + 2 * shape.key_width() + columns.start;
                    // SAFETY: this task alone writes this group's rows of this key head and of its value heads.
                    let target = unsafe { d_qkv.slice(at, columns.len()) };
                    target.copy_from_slice(&d[..columns.len()]);
                }
            }
            for (token, d) in pass.tokens().zip(pass.gates.chunks_exact_mut(2)) {
                for (gate, d) in d.iter_mut().enumerate() {
                    let at = (token * 2 + gate) * shape.value_heads + head;
                    // SAFETY: as above.
                    let target = unsafe { d_gates.slice(at, 1) };
                    target[0] = std::mem::take(d);
                }
            }
        }
        for (d, first) in [(&pass.query, 0), (&pass.key, shape.key_width())] {
            for (token, d) in pass.tokens().zip(d.chunks_exact(shape.key_dim)) {
                let at = token * shape.qkv_width() + first + key_head * shape.key_dim;
                // SAFETY: as above.
                unsafe { d_qkv.slice(at, shape.key_dim) }.copy_from_slice(d);
            }
        }
    });
}

/// The backward pass of a group and a key head: its storage, and the gradients of the group's tokens.
struct HeadPass<'a> {
    group: &'a [Segment],
    trace: Trace,
    unread: Vec<f32>,
    query: Vec<f32>,
    key: Vec<f32>,
    value: Vec<f32>,
    gates: Vec<f32>,
}

impl<'a> HeadPass<'a> {
    fn new(shape: Shape, group: &'a [Segment]) -> Self {
        let tokens = Self::tokens_of(group).len();
        Self {
            group,
            trace: Trace::default(),
            unread: vec![],
            query: vec![0.0; tokens * shape.key_dim],
            key: vec![0.0; tokens * shape.key_dim],
            value: vec![0.0; tokens * LANES],
            gates: vec![0.0; tokens * 2],
        }
    }

    fn tokens_of(group: &[Segment]) -> Range<usize> {
        group[0].tokens.start..group[group.len() - 1].tokens.end
    }

    fn tokens(&self) -> Range<usize> {
        Self::tokens_of(self.group)
    }

    /// Runs a strip: the responses first, whose gradients of the memory after the prompt meet there.
    fn run(&mut self, strip: Strip, d_read: &[f32]) {
        let [root, branches @ ..] = self.group else {
            return;
        };
        let start = vec![0.0; strip.shape.strip_len()];
        let mut memory = start.clone();
        if !branches.is_empty() {
            self.unread.resize(root.tokens.len() * LANES, 0.0);
            scan(strip, root.tokens.clone(), &mut memory, &mut self.unread);
        }
        let mut d_root = start.clone();
        for branch in branches {
            let mut d_memory = start.clone();
            self.segment(strip, branch, &memory, d_read, &mut d_memory);
            d_root
                .iter_mut()
                .zip(d_memory)
                .for_each(|(sum, d)| *sum += d);
        }
        self.segment(strip, root, &start, d_read, &mut d_root);
    }

    fn segment(
        &mut self,
        strip: Strip,
        segment: &Segment,
        start: &[f32],
        d_read: &[f32],
        d_memory: &mut [f32],
    ) {
        let (first, dim) = (self.group[0].tokens.start, strip.shape.key_dim);
        let own = segment.tokens.start - first..segment.tokens.end - first;
        let part = |width: usize| own.start * width..own.end * width;
        let gradients = Gradients {
            query: &mut self.query[part(dim)],
            key: &mut self.key[part(dim)],
            value: &mut self.value[part(LANES)],
            gates: &mut self.gates[part(2)],
        };
        let tokens = segment.tokens.clone();
        self.trace
            .backward(strip, tokens, start, d_read, d_memory, gradients);
    }
}

/// From the gradients of `[q | k | v]` and of the gates to that of the projection.
fn short_backward(
    layout: &Layout,
    shape: Shape,
    weights: &Weights,
    raw: &[f32],
    (d_qkv, d_gates): (&mut [f32], &[f32]),
    d_raw: &mut [f32],
) -> WeightGradients {
    let places = places(layout);
    let (width, qkv_width) = (shape.input_width(), shape.qkv_width());
    let raw_row = |token: usize| &raw[token * width..][..width];
    let seen = |token: usize| {
        let (segment, at) = places[token];
        (0..shape.kernel)
            .rev()
            .map(move |by| back(segment, at, by).map(raw_row))
    };
    let sums = summed(
        shape,
        (d_qkv, qkv_width),
        (d_raw, width),
        |first, d_qkv, d_raw, sums| {
            let tokens = d_qkv
                .chunks_exact_mut(qkv_width)
                .zip(d_raw.chunks_exact_mut(width));
            for ((d_qkv, d_raw), token) in tokens.zip(first..) {
                short::backward(shape, weights, seen(token), d_qkv);
                for (d_weight, tap) in sums.conv.chunks_exact_mut(qkv_width).zip(seen(token)) {
                    if let Some(row) = tap {
                        short::add_products(d_qkv, &row[..qkv_width], d_weight);
                    }
                }
                let d_gates = &d_gates[token * 2 * shape.value_heads..][..2 * shape.value_heads];
                let given = (raw_row(token), d_gates);
                short::gates_backward(
                    shape,
                    weights,
                    given,
                    d_raw,
                    &mut sums.a_log,
                    &mut sums.dt_bias,
                );
            }
        },
    );
    // What a token gave to the convolutions of those after it.
    let followers = followers(layout, shape.kernel);
    let d_convolved = &*d_qkv;
    rows(d_raw, width, |first, part| {
        for (d_raw, followers) in part.chunks_exact_mut(width).zip(&followers[first..]) {
            let d_raw = &mut d_raw[..qkv_width];
            d_raw.fill(0.0);
            for &(token, by) in followers {
                let weight = &weights.conv[(shape.kernel - 1 - by) * qkv_width..][..qkv_width];
                short::add_products(
                    weight,
                    &d_convolved[token * qkv_width..][..qkv_width],
                    d_raw,
                );
            }
        }
    });
    sums
}

/// For every token, the tokens whose convolutions see it, and from how far.
fn followers(layout: &Layout, kernel: usize) -> Vec<Vec<(usize, usize)>> {
    let mut all = vec![vec![]; layout.tokens()];
    for (token, (segment, at)) in places(layout).into_iter().enumerate() {
        for by in 0..kernel {
            if let Some(seen) = back(segment, at, by) {
                all[seen].push((token, by));
            }
        }
    }
    all
}

#[cfg(test)]
mod tests;
