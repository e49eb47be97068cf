//! What sequences have on the device while they are generated, and how its memory is shared out among them.

use super::decoder::{CacheRows, Decoder, Pass};
use super::device::{Address, Buffer, Plain};
use crate::generate::Sampling;
use anyhow::{Result, bail};

/// Rows of a page.
pub const PAGE: usize = 64;
/// Slots that are taken where memory allows. The products of a big model are bound by arithmetic from some 200 on, but a
/// small one's step takes hardly longer for many sequences than for few.
const MOST_SLOTS: usize = 1024;
/// Tokens of its prompt that a slot counts on, when memory is shared out: a prompt serves all of its samples.
const PROMPT: usize = 256;
/// Parts that the keys of prompts are read in side by side, at most, and the keys of a part, at least: each part is one
/// more to be merged.
pub const PREFIX_SPLITS: usize = 4;
pub const PREFIX_SPLIT: usize = 256;

/// A sequence as kernels declare it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
pub struct Sequence {
    pub prefix_table: i32,
    pub prefix_len: i32,
    pub own_table: i32,
    pub limit: i32,
}
// SAFETY: four 32-bit numbers without padding.
unsafe impl Plain for Sequence {}

/// Queries that read one prompt together, as kernels declare it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
pub struct DecodeTile {
    pub first: i32,
    pub rows: i32,
    pub prefix_table: i32,
    pub prefix_len: i32,
}
// SAFETY: as above.
unsafe impl Plain for DecodeTile {}

/// How tokens are drawn, as kernels declare it.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct SamplingParams {
    pub temperature: f32,
    pub top_p: f32,
    pub min_p: f32,
    pub repetition_penalty: f32,
    pub top_k: i32,
}
// SAFETY: five 32-bit numbers without padding.
unsafe impl Plain for SamplingParams {}

/// What slots have on the device; each is `[slots]` of int32 unless it is said otherwise.
pub struct Slots {
    /// `[layers][pages · PAGE, 2 · kv · dim]`.
    cache: Buffer,
    layer_bytes: usize,
    /// `[tables, most pages]`; table s is slot s's own, the others are prompts'.
    pub tables: Buffer,
    pub sequences: Buffer,
    pub tiles: Buffer,
    pub positions: Buffer,
    pub cache_rows: Buffer,
    pub logit_rows: Buffer,
    /// `[3][slots]`: last tokens, what finished, and the log-probs of the tokens, float32: what a step is read of.
    pub state: Buffer,
    /// `[slots, 8]`
    pub keys: Buffer,
    /// `[slots, ceil(vocab / 32)]`, with a repetition penalty only.
    pub seen: Option<Buffer>,
    pub ends: Buffer,
    pub end_count: usize,
    /// `[slots + prompts' tables, vocab]`, float32: of the slots, then of prompts that wait for their first draws.
    pub logits: Buffer,
    pub normed: Buffer,
    pub pass: Pass,
    /// `[parts, slots, heads, dim]` and `[parts, slots, heads]`, float32.
    pub partial: Buffer,
    pub partial_lse: Buffer,
    pub own_splits: usize,
}

/// What slots and pages cost, bytes.
pub struct Sizes {
    page: usize,
    /// Pages of a response of the longest kind.
    own_pages: usize,
    /// Pages of a prompt of the longest kind.
    prompt_pages: usize,
    slot: usize,
    /// Bytes for a prompt to run in.
    run: usize,
}

impl Sizes {
    pub fn new(decoder: &Decoder, capacity: usize, seen: bool) -> Self {
        let config = &decoder.config;
        let heads = decoder.heads(0);
        let row = 2 * heads.kv_width() * decoder.size();
        let float = size_of::<f32>();
        let partials = (PREFIX_SPLITS + own_splits(1, heads.kv)) * heads.query * (heads.dim + 1);
        Self {
            page: PAGE * row * config.layers,
            own_pages: capacity.div_ceil(PAGE),
            prompt_pages: config.context.div_ceil(PAGE),
            run: config.context.min(PROMPT) * decoder.pass_bytes(),
            slot: decoder.pass_bytes()
                + (2 * config.vocab + partials) * float
                + if seen { config.vocab / 8 } else { 0 },
        }
    }

    /// How many slots, and how many pages for them and their prompts.
    pub fn share_out(&self, free: usize, wanted: Option<usize>) -> Result<(usize, usize)> {
        let usable = free.saturating_sub(self.run.max(free / 5)); // prompts run in the rest
        let prompt = self.prompt_pages.min(PROMPT.div_ceil(PAGE));
        let each = self.slot + (self.own_pages + prompt) * self.page;
        let most = wanted.unwrap_or(MOST_SLOTS).max(1);
        let slots = (usable / each).min(most);
        if slots == 0 {
            bail!(
                "the GPU has {} MB free, but a response of --max-tokens takes {} MB: lower --max-tokens",
                free >> 20,
                each >> 20
            );
        }
        let left = (usable - slots * each) / self.page;
        let more = left.min(self.prompt_pages); // a single long prompt finds room where there is any
        Ok((slots, slots * (self.own_pages + prompt) + more))
    }
}

/// Parts that a sequence's own keys are read in side by side, a warp each: more where sequences are few.
pub fn own_splits(slots: usize, kv_heads: usize) -> usize {
    (1024 / (slots * kv_heads)).clamp(1, 8)
}

pub fn seen_words(vocab: usize) -> usize {
    vocab.div_ceil(32)
}

/// A bit for each token that occurs.
pub fn bits_of(tokens: &[u32], words: usize) -> Vec<u32> {
    let mut bits = vec![0; words];
    for &token in tokens {
        bits[token as usize / 32] |= 1 << (token % 32);
    }
    bits
}

impl Slots {
    pub fn new(
        decoder: &Decoder,
        how: &Sampling,
        end_ids: &[u32],
        slots: usize,
        (pages, most): (usize, usize),
    ) -> Result<Self> {
        let device = &decoder.device;
        let (config, heads) = (&decoder.config, decoder.heads(0));
        let (vocab, tables) = (config.vocab, 2 * slots + 1);
        let numbers = |n: usize| device.zeroed(n * size_of::<i32>());
        let own_splits = own_splits(slots, heads.kv);
        let parts = PREFIX_SPLITS + own_splits;
        let most_tiles = slots * heads.group().div_ceil(decoder.attention_tiles().rows);
        let layer_bytes = pages * PAGE * 2 * heads.kv_width() * decoder.size();
        Ok(Self {
            cache: device.allocate(layer_bytes * config.layers)?,
            layer_bytes,
            tables: numbers(tables * most)?,
            sequences: device.zeroed(slots * size_of::<Sequence>())?,
            tiles: device.zeroed(most_tiles.next_power_of_two() * size_of::<DecodeTile>())?,
            positions: numbers(slots)?,
            cache_rows: numbers(slots)?,
            logit_rows: numbers(slots)?,
            state: numbers(3 * slots)?,
            keys: device.zeroed(slots * 32)?,
            seen: (how.repetition_penalty != 1.0)
                .then(|| numbers(slots * seen_words(vocab)))
                .transpose()?,
            ends: device.buffer_of(end_ids)?,
            end_count: end_ids.len(),
            logits: numbers(tables * vocab)?,
            normed: device.zeroed(slots * config.hidden * decoder.size())?,
            pass: decoder.pass(slots)?,
            partial: numbers(parts * slots * heads.query * heads.dim)?,
            partial_lse: numbers(parts * slots * heads.query)?,
            own_splits,
        })
    }

    /// A layer's cache.
    pub fn layer(&self, i: usize) -> Address {
        self.cache.element(i, self.layer_bytes)
    }

    pub fn cache_rows(&self, layer: usize) -> CacheRows<'_> {
        CacheRows {
            cache: self.layer(layer),
            rows: &self.cache_rows,
        }
    }
}
