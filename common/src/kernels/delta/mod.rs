//! Linear attention by the gated delta rule (Yang, Kautz and Hatamizadeh, arXiv 2412.06464), as Qwen3.5 has it: a head keeps a
//! matrix S in the place of its past. It fades, S ← a·S, learns what it lacks of a token, S ← S + k·(β·(v − Sᵀk))ᵀ, and is
//! read, o = Sᵀq. What is read is normed and gated. Forward and backward, over a packed, prefix-shared batch, token by token: a
//! strip of S stays in the first cache, and beside a layer's products with weights that is a few percent.

mod backward;
mod memory;
mod rule;
mod short;

pub use backward::{WeightGradients, backward};
pub use memory::Memory;

use super::activation::{self, Activation};
use super::layout::{Layout, Segment};
use super::shared::Shared;
use super::taps::Taps;
use super::{norm, rows, team};
use anyhow::{Result, ensure};
use rule::{LANES, Strip, scan_to};
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
    let taps = Taps::new(layout, shape.kernel);
    let width = shape.input_width();
    let raw_row = |token: usize| &raw[token * width..][..width];
    rows(state.qkv, shape.qkv_width(), |first, part| {
        let tokens = part.chunks_exact_mut(shape.qkv_width());
        for (qkv, token) in tokens.zip(first..) {
            let seen = taps.of(token).map(|tap| tap.map(raw_row));
            short::forward(shape, &weights, seen, qkv);
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
            let mut room = vec![];
            let mut run = |segment: &Segment, memory: &mut [f32]| {
                // SAFETY: this task alone writes this group's rows of this head.
                unsafe { scan_to(strip, segment.tokens.clone(), memory, &read, &mut room) };
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

#[cfg(test)]
mod tests;
