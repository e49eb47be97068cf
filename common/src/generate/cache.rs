//! What a run of tokens leaves behind in a layer. Keys and values are kept as the kernels want them: growing them is a write,
//! never a copy.
//!
//! A step reads the caches of all sequences from memory. A core gets some 40 GB/s from a stream that its prefetcher
//! follows, 15 GB/s from pieces of a few kilobytes; so a layer's keys and values of one run of tokens lie in one piece, in
//! the order in which they are read.

use crate::kernels::decoding::{AHEAD, Block, Format};
use crate::kernels::gemm::{Aligned, panel_width};
use crate::kernels::layout::Heads;
use crate::model::Memory;

/// What attention, or what stands in its place, knows of the past.
pub enum Past {
    /// Keys and values of a prompt, or of a response so far.
    Keys(LayerCache),
    /// Of what stands in its place: of a prompt, or of that and the response so far.
    Memory(Memory),
    /// Keys and values are an earlier layer's.
    Lent,
}

impl Past {
    /// That of a layer with attention.
    pub fn keys(&self) -> &LayerCache {
        match self {
            Self::Keys(cache) => cache,
            _ => unreachable!("it has no keys of its own"),
        }
    }

    /// The same, to grow.
    pub fn keys_mut(&mut self) -> &mut LayerCache {
        match self {
            Self::Keys(cache) => cache,
            _ => unreachable!("it has no keys of its own"),
        }
    }
}

/// One layer's keys and values of one run of tokens.
pub struct LayerCache {
    shape: Shape,
    /// Blocks of [`panel_width`] tokens.
    storage: Aligned,
    tokens: usize,
    /// Those of them whose keys are in panels.
    in_panels: usize,
}

/// How a block is laid out: head by head, the keys of all its tokens and then the values.
#[derive(Clone, Copy)]
pub struct Shape {
    /// The layer's heads.
    pub heads: Heads,
    /// How keys and values are kept.
    pub format: Format,
}

impl Shape {
    /// Words of a head's keys in a block.
    fn keys(self) -> usize {
        self.format.key_words(self.heads.dim)
    }

    fn head(self) -> usize {
        self.keys() + self.format.value_words(self.heads.dim)
    }

    fn blocks(self, tokens: usize) -> usize {
        tokens.div_ceil(panel_width()) * self.heads.kv * self.head()
    }
}

impl LayerCache {
    /// Nothing yet, with room for `most` tokens.
    pub fn new(shape: Shape, most: usize) -> Self {
        Self {
            shape,
            storage: Aligned::with_capacity(shape.blocks(most)),
            tokens: 0,
            in_panels: 0,
        }
    }

    /// The bytes that so many tokens take.
    pub fn bytes(shape: Shape, tokens: usize) -> usize {
        shape.blocks(tokens) * size_of::<f32>()
    }

    /// Appends a token: its row of the fused projection, after rotation.
    pub fn push(&mut self, qkv: &[f32]) {
        let (shape, at) = (self.shape, self.tokens % panel_width());
        let Shape { heads, format } = shape;
        let start = shape.blocks(self.tokens - at);
        assert!(self.in_panels <= self.tokens - at, "the cache was closed");
        self.tokens += 1;
        self.storage.grow(shape.blocks(self.tokens));
        let block = &mut self.storage.as_mut_slice()[start..];
        let (keys, values) = qkv[heads.q_width()..].split_at(heads.kv_width());
        let new = (keys.chunks_exact(heads.dim)).zip(values.chunks_exact(heads.dim));
        for ((key, value), head) in new.zip(block.chunks_exact_mut(shape.head())) {
            let (keys, values) = head.split_at_mut(shape.keys());
            format.put_key(key, at, keys);
            format.put_value(value, at, values);
        }
        if at + 1 == panel_width() {
            self.close();
        }
    }

    /// Turns the keys of the last block, too, when no token is to follow.
    pub fn close(&mut self) {
        if self.in_panels == self.tokens {
            return;
        }
        let shape = self.shape;
        let last = shape.blocks(self.tokens) - shape.blocks(1);
        for head in self.storage.as_mut_slice()[last..].chunks_exact_mut(shape.head()) {
            let keys = &mut head[..shape.keys()];
            shape.format.turn_keys(shape.heads.dim, keys);
        }
        self.in_panels = self.tokens;
    }

    /// The heads and the format.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The number of tokens.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// All blocks, in order, and of each one every head. After this cache, `next` will be read.
    pub fn blocks<'a>(
        &'a self,
        next: Option<&'a Self>,
    ) -> impl Iterator<Item = impl Iterator<Item = Block<'a>>> {
        let Shape { heads, format } = self.shape;
        let storage = self.storage.as_slice();
        let next = next.unwrap_or(self).storage.as_slice().as_ptr();
        let distance = self.shape.head().max(AHEAD);
        let firsts = (0..self.tokens).step_by(panel_width());
        let blocks = storage.chunks_exact(self.shape.blocks(1)).zip(firsts);
        blocks.map(move |(block, first)| {
            let tokens = (self.tokens - first).min(panel_width());
            let panel = first < self.in_panels;
            block.chunks_exact(self.shape.head()).map(move |head| {
                let (keys, values) = head.split_at(self.shape.keys());
                let begin = head.as_ptr() as usize - storage.as_ptr() as usize;
                let after = begin / size_of::<f32>() + distance;
                Block {
                    keys,
                    panel,
                    values,
                    tokens,
                    dim: heads.dim,
                    format,
                    ahead: match after.checked_sub(storage.len()) {
                        None => storage[after..].as_ptr(),
                        Some(past) => next.wrapping_add(past),
                    },
                }
            })
        })
    }
}
