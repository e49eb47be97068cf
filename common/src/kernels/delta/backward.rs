//! The backward pass, from what is read to the projection: the gates, the rule, the convolution.

use super::rule::{Gradients, LANES, Strip, Trace, scan};
use super::{Shape, Weights, groups, short};
use crate::kernels::activation::{self, Activation};
use crate::kernels::layout::{Layout, Segment};
use crate::kernels::shared::Shared;
use crate::kernels::taps::{self, Taps};
use crate::kernels::{norm, rows, team};
use std::cell::Cell;
use std::ops::Range;

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

/// Writes the gradient of the fused projection, `d_raw`, given that of the output, `d_out` `[T, value_width]`, which becomes
/// that of what was read; gives those of the parameters. The rest is what [`super::forward`] read and wrote.
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
        let mut pass = HeadPass::new(shape, group, TRACE.take());
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
        TRACE.set(pass.trace);
    });
}

thread_local! {
    static TRACE: Cell<Trace> = Cell::default();
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
    fn new(shape: Shape, group: &'a [Segment], trace: Trace) -> Self {
        let tokens = Self::tokens_of(group).len();
        Self {
            group,
            trace,
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
    let taps = Taps::new(layout, shape.kernel);
    let (width, qkv_width) = (shape.input_width(), shape.qkv_width());
    let raw_row = |token: usize| &raw[token * width..][..width];
    let seen = |token: usize| taps.of(token).map(|tap| tap.map(raw_row));
    let (d_qkv_rows, d_raw_rows) = ((&mut *d_qkv, qkv_width), (&mut *d_raw, width));
    let sums = summed(
        shape,
        d_qkv_rows,
        d_raw_rows,
        |first, d_qkv, d_raw, sums| {
            let tokens = (d_qkv.chunks_exact_mut(qkv_width)).zip(d_raw.chunks_exact_mut(width));
            let mut room = vec![0.0; 2 * qkv_width];
            for ((d_qkv, d_raw), token) in tokens.zip(first..) {
                short::backward(shape, weights, seen(token), d_qkv, &mut room);
                taps::add_to_weight(d_qkv, seen(token), &mut sums.conv);
                let d_gates = &d_gates[token * 2 * shape.value_heads..][..2 * shape.value_heads];
                let given = (raw_row(token), d_gates);
                let (d_a_log, d_dt_bias) = (&mut sums.a_log, &mut sums.dt_bias);
                short::gates_backward(shape, weights, given, d_raw, d_a_log, d_dt_bias);
            }
        },
    );
    // What a token gave to the convolutions of those after it.
    let followers = taps.followers();
    rows(d_raw, width, |first, part| {
        for (d_raw, followers) in part.chunks_exact_mut(width).zip(&followers[first..]) {
            taps::gather(weights.conv, followers, d_qkv, &mut d_raw[..qkv_width]);
        }
    });
    sums
}
