//! What sequences have on the device while they are generated, and how its memory is shared out among them.

use super::decoder::Decoder;
use super::device::{Address, Buffer, Plain};
use super::pass::{CacheRows, Kept, Pass};
use super::recurrent::Memories;
use crate::generate::Sampling;
use crate::weights::Config;
use anyhow::{Result, bail};

/// A slot that nobody uses, or whose sequence the host has ended.
const IDLE: i32 = 3;
/// Rows of a page.
pub const PAGE: usize = 64;
/// Slots that are taken where memory allows. The products of a big model are bound by arithmetic from some 200 on, but a
/// small one's step takes hardly longer for many sequences than for few.
const MOST_SLOTS: usize = 1024;
/// Tokens of its prompt that a slot counts on, when memory is shared out: a prompt serves all of its samples.
const PROMPT: usize = 256;
/// A response is expected to take one part in so many of the longest.
pub const EXPECTED: usize = 4;
/// Rows of a pass over prompts of up to half as many tokens.
const PROMPT_ROWS: usize = 512;
/// Prompts of a pass, at most.
pub const PROMPTS: usize = 16;
/// Parts that the keys of prompts are read in side by side, at most, and the keys of a part, at least (as kernels have it):
/// each part is one more to be merged.
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

/// Queries that read one prompt together, as kernels declare it: rows count in the order of [`Given::order`].
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
pub struct DecodeTile {
    pub first: i32,
    pub rows: i32,
    pub prefix_table: i32,
    pub prefix_len: i32,
}

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

/// Rows of the pass that a prompt runs in. Its own length decides alone; those of the same number can share a pass.
pub fn prompt_rows(prompt: usize) -> usize {
    match prompt > PROMPT_ROWS / 2 {
        true => prompt.next_multiple_of(PROMPT_ROWS / 4),
        false => PROMPT_ROWS,
    }
}

/// Numbers of a [`Sequence`] and of a [`DecodeTile`].
const SEQUENCE: usize = size_of::<Sequence>() / size_of::<i32>();
const TILE: usize = size_of::<DecodeTile>() / size_of::<i32>();

/// Rows of the table of pages: one for each slot, one for the prompt of each, and those of prompts that run ahead.
pub fn tables(slots: usize) -> usize {
    2 * slots + PROMPTS
}

/// What a layer has of sequences.
enum Layer {
    /// Keys and values: where the layers' caches have its own, in bytes.
    Keys(usize),
    /// Those of an earlier layer.
    Lent(usize),
    /// A memory for each table.
    Memories(Memories),
}

/// What slots have on the device; each is `[slots]` of int32 unless it is said otherwise.
pub struct Slots {
    /// `[layers with keys][pages · PAGE, 2 · kv · dim]`.
    cache: Buffer,
    /// What each layer has of a sequence.
    layers: Vec<Layer>,
    /// Of which `state` and what the host gives are parts.
    block: Buffer,
    /// `[tables, most pages]`; table s is slot s's own, the others are prompts'.
    pub tables: Buffer,
    /// `[3][slots]`: the last tokens, their log-probs, and what finished: what a step is read of.
    pub state: Buffer,
    /// Of `state`, float32.
    pub logps: Buffer,
    /// Of `state`; from here on it is what the host gives: these, in one block.
    pub finished: Buffer,
    pub positions: Buffer,
    pub cache_rows: Buffer,
    pub logit_rows: Buffer,
    pub order: Buffer,
    pub sequences: Buffer,
    pub tiles: Buffer,
    /// `[slots, 8]`
    pub keys: Buffer,
    /// `[slots, ceil(vocab / 32)]`, with a repetition penalty only.
    pub seen: Option<Buffer>,
    pub ends: Buffer,
    pub end_count: usize,
    /// `[slots + prompts' tables, vocab]`, float32: of the slots, then of prompts that wait for their first draws. Memories of
    /// what stands in the place of attention have the same rows.
    pub logits: Buffer,
    /// `[PROMPTS, vocab]`, float32: of a pass over prompts.
    pub after_prompts: Buffer,
    pub normed: Buffer,
    pub pass: Pass,
    /// `[parts, slots, heads, dim]` and `[parts, slots, heads]`, float32.
    pub partial: Buffer,
    pub partial_lse: Buffer,
    pub own_splits: usize,
}

/// What the host says of the slots, each `[slots]`.
pub struct Given {
    pub finished: Vec<i32>,
    pub positions: Vec<i32>,
    pub logit_rows: Vec<i32>,
    /// The slots in use, those of a prompt after each other; what comes then is nobody's.
    pub order: Vec<i32>,
    pub sequences: Vec<Sequence>,
}

impl Given {
    /// Slots that nobody uses.
    pub fn new(slots: usize) -> Self {
        Self {
            finished: vec![IDLE; slots],
            positions: vec![0; slots],
            logit_rows: (0..slots as i32).collect(),
            order: vec![0; slots],
            sequences: vec![Sequence::default(); slots],
        }
    }
}

/// What slots and pages cost, bytes.
pub struct Sizes {
    page: usize,
    /// Pages of a response of the longest kind.
    own_pages: usize,
    /// Pages of a prompt of the longest kind.
    prompt_pages: usize,
    slot: usize,
    /// Of the pass over a prompt.
    row: usize,
    /// What prompts of such a pass take besides its rows.
    prompts: usize,
}

/// How a device's memory is shared out.
pub struct Shares {
    pub slots: usize,
    /// For the slots and their prompts.
    pub pages: usize,
    /// Rows of the longest pass over a prompt that there is room for.
    pub rows: usize,
}

impl Sizes {
    pub fn new(decoder: &Decoder, capacity: usize, seen: bool) -> Self {
        let config = &decoder.config;
        let heads = decoder.heads(0);
        let (float, pass) = (
            size_of::<f32>(),
            Decoder::pass_bytes(config, decoder.precision),
        );
        let tables = if config.query_growth.is_some() { 2 } else { 1 };
        let memory = Memories::table_bytes(config, decoder.size());
        let dim = config.widest_head();
        let partials = (PREFIX_SPLITS + own_splits(1, heads.kv)) * heads.query * (dim + 1);
        let row: usize = (0..config.layers).map(|i| key_bytes(decoder, i)).sum();
        Self {
            page: (PAGE * row).max(1),
            own_pages: capacity.div_ceil(PAGE),
            prompt_pages: config.context.div_ceil(PAGE),
            // Beside activations a row has its token, position and place, and two tables of rotations are there while
            // the longer one is made.
            row: pass + (4 + 2 * dim * tables) * float,
            // Logits exist twice.
            prompts: PROMPTS * (2 * config.vocab * float + memory),
            // It has logits and memories, and its prompt may have some.
            slot: pass
                + (2 * config.vocab + partials) * float
                + 2 * memory
                + if seen { config.vocab / 8 } else { 0 },
        }
    }

    /// How many slots, and how many pages for them and their prompts. Responses are rarely of the longest kind: slots count
    /// on a part of one, and where that is too few, some wait.
    pub fn share_out(&self, free: usize, wanted: Option<usize>) -> Result<Shares> {
        let run = PROMPT_ROWS * self.row + self.prompts;
        let usable = free.saturating_sub(run.max(free / 5)); // prompts run in the rest
        let prompt = self.prompt_pages.min(PROMPT.div_ceil(PAGE));
        let longest = self.own_pages + prompt;
        let each = self.slot + (self.own_pages.div_ceil(EXPECTED) + prompt) * self.page;
        // One of the longest kind always fits.
        let beside = usable.saturating_sub(longest * self.page);
        let most = wanted.unwrap_or(MOST_SLOTS).max(1);
        let slots = (usable / each).min(beside / self.slot).min(most);
        if slots == 0 {
            bail!(
                "the GPU has {} MB free, but a response of --max-tokens takes {} MB: lower --max-tokens",
                free >> 20,
                (self.slot + longest * self.page) >> 20
            );
        }
        let pages = (usable - slots * self.slot) / self.page;
        // A single long prompt finds room where there is any.
        let pages = pages.min(slots * longest + self.prompt_pages);
        let rest = (free - slots * self.slot - pages * self.page) / 10 * 9; // allocations are rounded
        Ok(Shares {
            slots,
            pages,
            rows: (rest.saturating_sub(self.prompts) / self.row).max(PROMPT_ROWS),
        })
    }
}

/// What a token's keys and values take in the cache of layer `i`; nothing where it has none of its own.
fn key_bytes(decoder: &Decoder, i: usize) -> usize {
    let config = &decoder.config;
    match config.recurrences[i].is_none() && config.keys_of(i) == i {
        true => 2 * decoder.heads(i).kv_width() * decoder.size(),
        false => 0,
    }
}

/// The numbers of queries that share a key, of which there may be more than one in a model.
pub fn query_groups(config: &Config) -> Vec<usize> {
    let mut groups: Vec<_> = (0..config.layers)
        .map(|i| config.heads_of(i).group())
        .collect();
    groups.sort_unstable();
    groups.dedup();
    groups
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
        let (vocab, tables) = (config.vocab, tables(slots));
        let numbers = |n: usize| device.zeroed(n * size_of::<i32>());
        let own_splits = own_splits(slots, heads.kv);
        let parts = PREFIX_SPLITS + own_splits;
        let groups = query_groups(config);
        let most_group = groups.last().copied().unwrap_or(1);
        let most_tiles = slots * most_group.div_ceil(decoder.tile_rows());
        let most_tiles = most_tiles.next_power_of_two() * groups.len();
        // Of 32-bit numbers, one after the other: see `give`.
        let block = numbers((7 + SEQUENCE) * slots + TILE * most_tiles)?;
        let of_slots = |first: usize| block.part(first * slots, slots, size_of::<i32>());
        let (mut layers, mut cached) = (vec![], 0);
        for (i, recurrence) in config.recurrences.iter().enumerate() {
            layers.push(match (recurrence, config.keys_of(i)) {
                (Some(of), _) => Layer::Memories(Memories::new(decoder, *of, tables)?),
                (None, own) if own == i => Layer::Keys(cached),
                (None, earlier) => Layer::Lent(earlier),
            });
            cached += pages * PAGE * key_bytes(decoder, i);
        }
        Ok(Self {
            cache: device.allocate(cached)?,
            layers,
            tables: numbers(tables * most)?,
            state: block.part(0, 3 * slots, size_of::<i32>()),
            logps: of_slots(1),
            finished: of_slots(2),
            positions: of_slots(3),
            cache_rows: of_slots(4),
            logit_rows: of_slots(5),
            order: of_slots(6),
            sequences: block.part(7 * slots, SEQUENCE * slots, size_of::<i32>()),
            tiles: block.part((7 + SEQUENCE) * slots, TILE * most_tiles, size_of::<i32>()),
            block,
            keys: device.zeroed(slots * 32)?,
            seen: (how.repetition_penalty != 1.0)
                .then(|| numbers(slots * seen_words(vocab)))
                .transpose()?,
            ends: device.buffer_of(end_ids)?,
            end_count: end_ids.len(),
            logits: numbers(tables * vocab)?,
            after_prompts: numbers(PROMPTS * vocab)?,
            normed: device.zeroed(slots * config.hidden * decoder.size())?,
            pass: decoder.pass(slots)?,
            partial: numbers(parts * slots * heads.query * config.widest_head())?,
            partial_lse: numbers(parts * slots * heads.query)?,
            own_splits,
        })
    }

    /// Brings to the device which sequences there are, in one copy.
    pub fn give(&self, given: &Given, tiles: &[DecodeTile]) -> Result<()> {
        let slots = given.finished.len();
        let mut numbers = [
            &given.finished[..],
            &given.positions,
            &vec![-1; slots],
            &given.logit_rows,
            &given.order,
        ]
        .concat();
        for s in &given.sequences {
            numbers.extend([s.prefix_table, s.prefix_len, s.own_table, s.limit]);
        }
        for t in tiles {
            numbers.extend([t.first, t.rows, t.prefix_table, t.prefix_len]);
        }
        self.block.write(2 * slots, &numbers)
    }

    /// What layer `i` keeps of a pass: keys and values in these rows of its cache, or the memories that these spans leave;
    /// nothing where it attends to an earlier layer's keys.
    pub fn kept<'a>(&'a self, i: usize, rows: &'a Buffer, spans: &'a Buffer) -> Option<Kept<'a>> {
        match &self.layers[i] {
            Layer::Keys(_) => Some(Kept::Keys(CacheRows {
                cache: self.cache_of(i),
                rows,
            })),
            Layer::Lent(_) => None,
            Layer::Memories(memories) => Some(Kept::Memories(memories, spans)),
        }
    }

    /// The cache of what a layer with attention attends to.
    pub fn cache_of(&self, i: usize) -> Address {
        match self.layers[i] {
            Layer::Keys(at) => self.cache.element(at, 1),
            Layer::Lent(earlier) => self.cache_of(earlier),
            Layer::Memories(_) => unreachable!("it has no keys"),
        }
    }

    /// The memories of a layer without attention.
    pub fn memories(&self, i: usize) -> Option<&Memories> {
        match &self.layers[i] {
            Layer::Keys(_) | Layer::Lent(_) => None,
            Layer::Memories(memories) => Some(memories),
        }
    }
}
