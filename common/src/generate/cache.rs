//! Keys and values of a run of tokens, kept as the matrix kernel wants them: growing them is a write, never a copy.

use crate::kernels::attention::Heads;
use crate::kernels::gemm::{Aligned, Panels, Precision, panel_width, put_column, put_row, words};

/// One layer's keys and values of one run of tokens, all key heads.
pub struct LayerCache {
    heads: Vec<HeadCache>,
    precision: Precision,
}

struct HeadCache {
    /// Panels of [`panel_width`] tokens, `[panel][word of dim][token]`: for q·Kᵀ.
    keys: Aligned,
    /// `[word of token][dim, rounded up to whole panels]`: for P·V.
    values: Aligned,
    tokens: usize,
    dim: usize,
}

impl LayerCache {
    /// Nothing yet, for a layer with these heads.
    pub fn new(heads: Heads, precision: Precision) -> Self {
        let head = || HeadCache {
            keys: Aligned::default(),
            values: Aligned::default(),
            tokens: 0,
            dim: heads.dim,
        };
        Self {
            heads: (0..heads.kv).map(|_| head()).collect(),
            precision,
        }
    }

    /// The bytes that so many tokens take: storage doubles as it grows.
    pub fn bytes(heads: Heads, precision: Precision, tokens: usize) -> usize {
        let capacity = tokens.next_power_of_two().max(panel_width());
        let stride = heads.dim.next_multiple_of(panel_width());
        let keys = capacity * words(heads.dim, precision);
        heads.kv * (keys + words(capacity, precision) * stride) * size_of::<f32>()
    }

    /// Appends a token: its row of the fused projection, after rotation.
    pub fn push(&mut self, heads: Heads, qkv: &[f32]) {
        for kv_head in 0..heads.kv {
            self.push_head(heads, kv_head, qkv);
        }
    }

    /// Appends a token to one head alone.
    pub fn push_head(&mut self, heads: Heads, kv_head: usize, qkv: &[f32]) {
        let (keys, values) = qkv[heads.q_width()..].split_at(heads.kv_width());
        let at = kv_head * heads.dim;
        self.heads[kv_head].push(
            &keys[at..][..heads.dim],
            &values[at..][..heads.dim],
            self.precision,
        );
    }

    /// The number of tokens of a head.
    pub fn tokens(&self, kv_head: usize) -> usize {
        self.heads[kv_head].tokens
    }

    /// The keys of a head as an operand: queries times this are scores.
    pub fn keys(&self, kv_head: usize) -> Panels<'_> {
        let head = &self.heads[kv_head];
        let panel = words(head.dim, self.precision) * panel_width();
        Panels::strided(
            head.keys.as_slice(),
            (head.tokens, head.dim),
            (panel, panel_width()),
            self.precision,
        )
    }

    /// The values of a head as an operand: weights times this are results.
    pub fn values(&self, kv_head: usize) -> Panels<'_> {
        let head = &self.heads[kv_head];
        Panels::strided(
            head.values.as_slice(),
            (head.dim, head.tokens),
            (panel_width(), head.value_stride()),
            self.precision,
        )
    }
}

impl HeadCache {
    fn value_stride(&self) -> usize {
        self.dim.next_multiple_of(panel_width())
    }

    fn push(&mut self, key: &[f32], value: &[f32], precision: Precision) {
        let (width, at, stride) = (panel_width(), self.tokens, self.value_stride());
        let panel = words(self.dim, precision) * width;
        let capacity = (at + 1).next_power_of_two().max(width);
        self.keys.grow(capacity / width * panel);
        self.values.grow(words(capacity, precision) * stride);
        let keys = &mut self.keys.as_mut_slice()[at / width * panel..][..panel];
        put_row(key, precision, width, &mut keys[at % width..]);
        let line = (words(at + 1, precision) - 1) * stride;
        let values = &mut self.values.as_mut_slice()[line..];
        put_column(value, at, precision, values);
        self.tokens += 1;
    }
}
