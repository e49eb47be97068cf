//! What a sequence leaves behind in a layer: its heads' memories, and the last rows that the convolution will see.

use super::rule::{Strip, scan_to};
use super::{Shape, Weights, gate, short};
use crate::kernels::shared::Shared;
use crate::kernels::taps::PastRows;
use crate::kernels::team;

/// It, to be carried on token by token.
#[derive(Clone)]
pub struct Memory {
    shape: Shape,
    /// Rows of `[q | k | v]` before the convolution.
    past: PastRows,
    /// Strip by strip of every value head.
    heads: Vec<f32>,
}

impl Memory {
    /// Nothing yet.
    pub fn new(shape: Shape) -> Self {
        Self {
            shape,
            past: PastRows::default(),
            heads: vec![0.0; shape.value_heads * shape.strips() * shape.strip_len()],
        }
    }

    /// The bytes that it takes, however long the sequence.
    pub fn bytes(shape: Shape) -> usize {
        let heads = shape.value_heads * shape.strips() * shape.strip_len();
        (heads + shape.kernel * shape.qkv_width()) * size_of::<f32>()
    }

    /// Goes on over some tokens: `raw` `[n, input_width]` is their fused projection, `out` `[n, value_width]` what they give.
    pub fn read(&mut self, weights: &Weights, raw: &[f32], out: &mut [f32]) {
        let shape = self.shape;
        let (width, values) = (shape.input_width(), shape.value_width());
        let tokens = raw.len() / width;
        let mut qkv = vec![0.0; tokens * shape.qkv_width()];
        let mut gates = vec![0.0; tokens * 2 * shape.value_heads];
        let each = qkv
            .chunks_exact_mut(shape.qkv_width())
            .zip(gates.chunks_exact_mut(2 * shape.value_heads));
        for (raw, (qkv, gates)) in raw.chunks_exact(width).zip(each) {
            let row = raw[..shape.qkv_width()].to_vec();
            let seen = self.past.push(row, shape.kernel);
            short::forward(shape, weights, seen, qkv);
            short::gates(shape, weights, raw, gates);
        }
        let (qkv, gates) = (&qkv[..], &gates[..]);
        let mut read = vec![0.0; tokens * values];
        let target = Shared::new(&mut read);
        let heads = self.heads.chunks_exact_mut(shape.strip_len()).collect();
        team::items(heads, |i, memory| {
            let (head, number) = (i / shape.strips(), i % shape.strips());
            let strip = Strip {
                shape,
                head,
                number,
                qkv,
                gates,
            };
            // SAFETY: this task alone writes this strip's columns.
            unsafe { scan_to(strip, 0..tokens, memory, &target, &mut vec![]) };
        });
        let each = raw.chunks_exact(width).zip(read.chunks_exact(values));
        for ((raw, read), out) in each.zip(out.chunks_exact_mut(values)) {
            gate(shape, weights, raw, read, out);
        }
    }
}
