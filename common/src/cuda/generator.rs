//! Generation on the device: all sequences take a step together, as one captured graph.
//!
//! Keys and values lie in pages. A prompt's are stored once, for all of its samples; a sequence has its own pages for
//! what it may generate, taken when it starts and given back when it ends. A step draws a token for each sequence from
//! the logits that are there and runs those tokens; only the tokens and who is done come back. A prompt runs alone, and a
//! step always runs all slots, used or not: so no product's shape depends on what else there is to do, and a sample is
//! what it is whatever runs beside it.

use super::args;
use super::decoder::{CacheRows, Decoder, Pass, Rotation, THREADS};
use super::device::{Address, Arg, Buffer, Graph, Launch, Plain};
use crate::generate::{Finish, Generate, Queue, Request, Sample, Sampling, Stopped, stream_key};
use crate::kernels::attention::Layout;
use crate::kernels::gemm::Precision;
use anyhow::{Result, bail, ensure};
use std::collections::HashMap;
use std::sync::Arc;

/// Rows of a page.
const PAGE: usize = 64;
/// Slots that are taken where memory allows: beyond these the products are no longer bound by reading the weights.
const MOST_SLOTS: usize = 256;
/// Tokens of its prompt that a slot counts on, when memory is shared out.
const PROMPT: usize = 1024;
/// Parts that the keys of a prompt are read in side by side.
const PREFIX_SPLITS: usize = 4;

/// A sequence as kernels declare it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
struct Sequence {
    prefix_table: i32,
    prefix_len: i32,
    own_table: i32,
    limit: i32,
}
// SAFETY: four 32-bit numbers without padding.
unsafe impl Plain for Sequence {}

/// Queries that read one prompt together, as kernels declare it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
struct DecodeTile {
    first: i32,
    rows: i32,
    prefix_table: i32,
    prefix_len: i32,
}
// SAFETY: as above.
unsafe impl Plain for DecodeTile {}

/// How tokens are drawn, as kernels declare it.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct SamplingParams {
    temperature: f32,
    top_p: f32,
    min_p: f32,
    repetition_penalty: f32,
    top_k: i32,
}
// SAFETY: five 32-bit numbers without padding.
unsafe impl Plain for SamplingParams {}

/// Why the kernel ended a sequence.
const END_TOKEN: i32 = 1;
/// A slot that nobody uses, or whose sequence the host has ended.
const IDLE: i32 = 3;

/// What is kept of a prompt.
#[derive(Default)]
struct Prompt {
    /// Its keys and values, once it has run.
    pages: Vec<i32>,
    table: Option<usize>,
    running: usize,
}

/// A response at work.
struct Running {
    group: usize,
    number: usize,
    token_ids: Vec<u32>,
    pages: Vec<i32>,
    /// As the device has it.
    sequence: Sequence,
}

/// Generates on a device.
pub struct Generator<'a> {
    decoder: &'a Decoder,
    how: Sampling,
    groups: Queue<Prompt>,
    slots: Vec<Option<Running>>,
    pages: Pages,
    memory: Slots,
    rotary: Arc<Rotation>,
    /// By the number of tiles: none for a number that ran once, which makes everything ready for capture.
    graphs: HashMap<usize, Option<Graph>>,
    /// The host's lists are not what the device has.
    changed: bool,
    tokens: u64,
}

/// Which pages, and which tables of prompts, are free.
struct Pages {
    free: Vec<i32>,
    free_tables: Vec<usize>,
    /// Entries of a table.
    most: usize,
    all: usize,
}

/// What slots have on the device; each is `[slots]` of int32 unless it is said otherwise.
struct Slots {
    /// `[layers][pages · PAGE, 2 · kv · dim]`.
    cache: Buffer,
    layer_bytes: usize,
    /// `[tables, most pages]`; table s is slot s's own, the others are prompts'.
    tables: Buffer,
    sequences: Buffer,
    tiles: Buffer,
    positions: Buffer,
    cache_rows: Buffer,
    logit_rows: Buffer,
    /// `[2][slots]`: last tokens, then what finished.
    state: Buffer,
    /// `[slots, 8]`
    keys: Buffer,
    /// `[slots, ceil(vocab / 32)]`, with a repetition penalty only.
    seen: Option<Buffer>,
    ends: Buffer,
    end_count: usize,
    /// `[slots, capacity]`
    drawn: Buffer,
    /// `[slots, capacity]`, float32.
    logps: Buffer,
    capacity: usize,
    /// `[slots + prompts' tables, vocab]`, float32: of the slots, then of prompts that wait for their first draws.
    logits: Buffer,
    normed: Buffer,
    pass: Pass,
    /// `[parts, slots, heads, dim]` and `[parts, slots, heads]`, float32.
    partial: Buffer,
    partial_lse: Buffer,
    own_splits: usize,
}

impl<'a> Generator<'a> {
    /// At most `slots` sequences run at a time; without a number, as many as memory allows, up to 256.
    ///
    /// # Errors
    /// No room for a single response.
    pub fn new(
        decoder: &'a Decoder,
        how: Sampling,
        end_ids: &[u32],
        slots: Option<usize>,
    ) -> Result<Self> {
        let context = decoder.config.context;
        let capacity = how.max_tokens.min(context);
        let sizes = Sizes::new(decoder, capacity, how.repetition_penalty != 1.0);
        let (slots, pages) = sizes.share_out(decoder.device.memory()?.free, slots)?;
        let most = context
            .div_ceil(PAGE)
            .min(pages)
            .max(capacity.div_ceil(PAGE));
        let memory = Slots::new(decoder, &how, end_ids, (slots, capacity), (pages, most))?;
        Ok(Self {
            rotary: decoder.rotation(1)?,
            groups: Queue::new(),
            slots: (0..slots).map(|_| None).collect(),
            pages: Pages {
                free: (0..pages as i32).rev().collect(),
                free_tables: (slots..2 * slots + 1).rev().collect(),
                most,
                all: pages,
            },
            memory,
            graphs: HashMap::new(),
            changed: true,
            tokens: 0,
            decoder,
            how,
        })
    }

    /// How many sequences run at a time.
    pub fn slots(&self) -> usize {
        self.slots.len()
    }

    fn running(&self) -> usize {
        self.slots.iter().flatten().count()
    }

    /// Starts waiting samples in free slots, as long as there are pages.
    fn fill(&mut self) -> Result<()> {
        while let Some(slot) = self.slots.iter().position(Option::is_none)
            && let Some(group) = self.groups.next()
        {
            if !self.start(slot, group)? {
                ensure!(
                    self.running() > 0,
                    "the GPU's memory holds keys of {} tokens: too few for a prompt of {} and a response",
                    self.pages.all * PAGE,
                    self.groups.group(group).request.prompt.len()
                );
                break; // until somebody gives pages back
            }
        }
        Ok(())
    }

    /// Starts the next sample of a group in a slot, if there are pages for it.
    fn start(&mut self, slot: usize, group: usize) -> Result<bool> {
        let Self { decoder, how, .. } = self;
        let entry = self.groups.group(group);
        let prompt = entry.request.prompt.len();
        let limit = how.max_tokens.min(decoder.config.context - prompt);
        let own = limit.div_ceil(PAGE);
        let shared = match entry.own.table {
            None => prompt.div_ceil(PAGE),
            Some(_) => 0,
        };
        if own + shared > self.pages.free.len() || shared > self.pages.most {
            return Ok(false);
        }
        if shared > 0 {
            self.prefill(group)?;
        }
        let pages = self.pages.take(own);
        self.memory.tables.write(slot * self.pages.most, &pages)?;
        let number = self.groups.start(group);
        let entry = self.groups.group_mut(group);
        entry.own.running += 1;
        let table = entry.own.table.expect("the prompt ran");
        let key = stream_key(self.how.seed, &entry.request.key, number);
        let prefix_len = prompt as i32;
        let sequence = Sequence {
            prefix_table: table as i32,
            prefix_len,
            own_table: slot as i32,
            limit: limit as i32,
        };
        self.memory.keys.write(slot * key.len(), &key)?;
        if let Some(seen) = &self.memory.seen {
            let words = seen_words(self.decoder.config.vocab);
            let bits = bits_of(&entry.request.prompt, words);
            seen.write(slot * words, &bits)?;
        }
        self.slots[slot] = Some(Running {
            group,
            number,
            token_ids: vec![],
            pages,
            sequence,
        });
        self.changed = true;
        Ok(true)
    }

    /// Runs a prompt: its keys and values into pages, the logits after it into the row of its table.
    fn prefill(&mut self, group: usize) -> Result<()> {
        let decoder = self.decoder;
        let device = &decoder.device;
        let entry = self.groups.group_mut(group);
        let tokens = &entry.request.prompt;
        let pages = self.pages.take(tokens.len().div_ceil(PAGE));
        let table = self.pages.free_tables.pop().expect("a table for each slot");
        self.memory.tables.write(table * self.pages.most, &pages)?;
        let row = |i: usize| pages[i / PAGE] * PAGE as i32 + (i % PAGE) as i32;
        let rows: Vec<i32> = (0..tokens.len()).map(row).collect();
        let rows = device.buffer_of(&rows)?;
        let mut layout = Layout::default();
        layout.push(tokens.len(), &[]);
        let shape = decoder.shape(&layout)?;
        let pass = decoder.pass(tokens.len())?;
        decoder.prefill(&shape, tokens, &pass, |i| self.memory.layer(i), &rows)?;
        let last = device.buffer_of(&[tokens.len() as i32 - 1])?;
        decoder.final_norm(&pass.x, Some(&last), 1, &pass.normed)?;
        let (width, vocab) = (decoder.config.hidden, decoder.config.vocab);
        decoder.logits(
            pass.normed.rows(0, width, decoder.precision),
            1,
            (0, vocab),
            self.memory.logits.rows(table, vocab, Precision::F32),
        )?;
        entry.own.pages = pages;
        entry.own.table = Some(table);
        Ok(())
    }

    /// Brings what changed to the device.
    fn update(&mut self) -> Result<usize> {
        let tiles = self.tiles();
        // Few sizes, so few graphs; a tile without rows does nothing.
        let count = tiles.len().next_power_of_two();
        if !self.changed {
            return Ok(count);
        }
        let needed = |r: &Running| r.sequence.prefix_len + r.sequence.limit;
        let longest = self.slots.iter().flatten().map(needed).max().unwrap_or(1);
        let rotary = self.decoder.rotation(longest as usize)?;
        if !Arc::ptr_eq(&rotary, &self.rotary) {
            self.graphs.clear(); // they hold the old table's address
            self.rotary = rotary;
        }
        let mut padded = tiles;
        padded.resize(count, DecodeTile::default());
        self.memory.tiles.write(0, &padded)?;
        let slots = self.slots.len();
        let (mut positions, mut finished) = (vec![0i32; slots], vec![IDLE; slots]);
        let mut logit_rows: Vec<i32> = (0..slots as i32).collect();
        let mut sequences = vec![Sequence::default(); slots];
        let mut fresh = false;
        for (slot, running) in self.slots.iter().enumerate() {
            let Some(running) = running else { continue };
            let sequence = running.sequence;
            positions[slot] = sequence.prefix_len + running.token_ids.len() as i32 - 1;
            finished[slot] = 0;
            sequences[slot] = sequence;
            if running.token_ids.is_empty() {
                fresh = true;
                logit_rows[slot] = sequence.prefix_table;
            }
        }
        self.memory.sequences.write(0, &sequences)?;
        self.memory.positions.write(0, &positions)?;
        self.memory.state.write(slots, &finished)?;
        self.memory.logit_rows.write(0, &logit_rows)?;
        self.memory.cache_rows.write(0, &vec![-1i32; slots])?;
        self.changed = fresh; // after their first draw they have logits of their own
        Ok(count)
    }

    /// The queries of neighbouring slots that read the same prompt, cut to what a block takes.
    fn tiles(&self) -> Vec<DecodeTile> {
        let (each, most) = (
            self.decoder.heads(0).group(),
            self.decoder.attention_tiles().rows,
        );
        let prompt = |slot: &Option<Running>| {
            let sequence = slot.as_ref()?.sequence;
            Some((sequence.prefix_table, sequence.prefix_len))
        };
        let mut tiles = vec![];
        let mut first = 0;
        for together in self.slots.chunk_by(|a, b| prompt(a) == prompt(b)) {
            let end = first + together.len() * each;
            if let Some((prefix_table, prefix_len)) = prompt(&together[0]) {
                tiles.extend((first..end).step_by(most).map(|row| DecodeTile {
                    first: row as i32,
                    rows: (end - row).min(most) as i32,
                    prefix_table,
                    prefix_len,
                }));
            }
            first = end;
        }
        tiles
    }

    /// A draw for each running sequence, and the drawn tokens through the model.
    fn launch_step(&self, tile_count: usize) -> Result<()> {
        let (decoder, memory) = (self.decoder, &self.memory);
        let (config, slots) = (&decoder.config, self.slots.len());
        let how = SamplingParams {
            temperature: self.how.temperature,
            top_p: self.how.top_p,
            min_p: self.how.min_p,
            repetition_penalty: self.how.repetition_penalty,
            top_k: i32::try_from(self.how.top_k).unwrap_or(0),
        };
        let finished = memory.state.element(slots, 4);
        decoder.device.launch(
            "sample",
            Launch::row(slots, 512).shared(4 * config.vocab.div_ceil(1024) * 2),
            args![
                &memory.logits,
                &memory.logit_rows,
                config.vocab as i32,
                Arg::plain(how),
                &memory.keys,
                memory.seen.as_ref(),
                &memory.ends,
                memory.end_count as i32,
                &memory.sequences,
                &memory.tables,
                self.pages.most as i32,
                &memory.drawn,
                &memory.logps,
                memory.capacity as i32,
                &memory.state,
                &memory.positions,
                &memory.cache_rows,
                finished,
            ],
        )?;
        let pass = &memory.pass;
        decoder.embed(&memory.state, slots, &pass.x)?;
        for i in 0..config.layers {
            let rows = memory.cache_rows(i);
            decoder.project_rows(i, slots, &memory.positions, &self.rotary, pass, Some(rows))?;
            self.attend(i, tile_count)?;
            decoder.finish(i, slots, pass)?;
        }
        decoder.final_norm(&pass.x, None, slots, &memory.normed)?;
        decoder.logits(
            memory.normed.rows(0, config.hidden, decoder.precision),
            slots,
            (0, config.vocab),
            memory.logits.rows(0, config.vocab, Precision::F32),
        )
    }

    /// Attention of every slot's last token over its prompt and its own past.
    fn attend(&self, layer: usize, tile_count: usize) -> Result<()> {
        let (decoder, memory, slots) = (self.decoder, &self.memory, self.slots.len());
        let (heads, tiles) = (decoder.heads(layer), decoder.attention_tiles());
        let (own_splits, head_size) = (memory.own_splits, decoder.head_size());
        let shared = (3 * tiles.rows * tiles.pitch)
            .max(4 * 32 * tiles.pitch + 16 * head_size * 16 + 256)
            + tiles.extra;
        let launch = Launch::plane(
            tile_count * PREFIX_SPLITS + slots * own_splits,
            heads.kv * heads.group().div_ceil(16),
            tiles.threads,
        );
        decoder.device.launch(
            &decoder.kernels.decode_attention,
            launch.shared(shared),
            args![
                &memory.pass.qkv,
                memory.layer(layer),
                &memory.partial,
                &memory.partial_lse,
                &memory.sequences,
                &memory.positions,
                &memory.tiles,
                &memory.tables,
                self.pages.most as i32,
                slots as i32,
                tile_count as i32,
                PREFIX_SPLITS as i32,
                own_splits as i32,
                heads.query as i32,
                heads.kv as i32,
                heads.dim as i32,
                heads.window.unwrap_or(0) as i32,
                heads.scale(),
            ],
        )?;
        let rows = slots * heads.query;
        decoder.device.launch(
            &decoder.kernels.decode_merge,
            Launch::row(rows.div_ceil(8), THREADS),
            args![
                &memory.partial,
                &memory.partial_lse,
                &memory.pass.attention,
                (PREFIX_SPLITS + own_splits) as i32,
                rows as i32,
                heads.dim as i32,
            ],
        )
    }

    /// Runs a step: once as it comes, then captured, then as a graph.
    fn run_step(&mut self, tile_count: usize) -> Result<()> {
        match self.graphs.get(&tile_count) {
            Some(Some(graph)) => return graph.run(),
            Some(None) => {
                let graph = self
                    .decoder
                    .device
                    .capture(|| self.launch_step(tile_count))?;
                graph.run()?;
                self.graphs.insert(tile_count, Some(graph));
            }
            None => {
                self.launch_step(tile_count)?;
                self.graphs.insert(tile_count, None);
            }
        }
        Ok(())
    }

    /// Ends a sequence; its slot and pages are free.
    fn retire(&mut self, slot: usize, finish: Finish) -> Result<()> {
        let running = self.slots[slot].take().expect("it runs");
        let len = running.token_ids.len();
        let logps: Vec<f32> = self.memory.logps.read(slot * self.memory.capacity, len)?;
        let sample = Sample {
            token_ids: running.token_ids,
            finish,
            logp: logps.iter().map(|&l| f64::from(l)).sum(),
        };
        self.pages.free.extend(running.pages);
        let done = self.groups.finish(running.group, running.number, sample);
        let prompt = &mut self.groups.group_mut(running.group).own;
        prompt.running -= 1;
        if done {
            self.pages.free.append(&mut prompt.pages);
            self.pages.free_tables.extend(prompt.table.take());
        }
        self.changed = true;
        Ok(())
    }
}

impl Generate for Generator<'_> {
    fn wants_prompt(&self) -> bool {
        self.running() + self.groups.waiting() < self.slots.len()
    }

    fn is_idle(&self) -> bool {
        self.groups.is_empty()
    }

    fn tokens(&self) -> u64 {
        self.tokens
    }

    fn push(&mut self, request: Request) {
        assert!(!request.prompt.is_empty() && request.prompt.len() < self.decoder.config.context);
        self.groups.push(request, Prompt::default());
    }

    fn step(&mut self, stopped: Stopped) -> Result<()> {
        self.fill()?;
        if self.running() == 0 {
            return Ok(());
        }
        let tile_count = self.update()?;
        self.run_step(tile_count)?;
        let slots = self.slots.len();
        let state: Vec<i32> = self.memory.state.read(0, 2 * slots)?;
        let (tokens, finished) = state.split_at(slots);
        for slot in 0..slots {
            let Some(running) = &mut self.slots[slot] else {
                continue;
            };
            running.token_ids.push(tokens[slot] as u32);
            self.tokens += 1;
            if finished[slot] == END_TOKEN || stopped(&running.token_ids) {
                self.retire(slot, Finish::Stop)?;
            } else if finished[slot] != 0 {
                self.retire(slot, Finish::Length)?;
            }
        }
        Ok(())
    }

    fn finished(&mut self) -> Vec<(Request, Vec<Sample>)> {
        self.groups.finished()
    }
}

impl Pages {
    fn take(&mut self, count: usize) -> Vec<i32> {
        self.free.split_off(self.free.len() - count)
    }
}

/// What slots and pages cost, bytes.
struct Sizes {
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
    fn new(decoder: &Decoder, capacity: usize, seen: bool) -> Self {
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
                + (2 * config.vocab + partials + 2 * capacity) * float
                + if seen { config.vocab / 8 } else { 0 },
        }
    }

    /// How many slots, and how many pages for them and their prompts.
    fn share_out(&self, free: usize, wanted: Option<usize>) -> Result<(usize, usize)> {
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

/// Parts that a sequence's own keys are read in side by side: more where sequences are few.
fn own_splits(slots: usize, kv_heads: usize) -> usize {
    (256 / (slots * kv_heads)).clamp(1, 8)
}

fn seen_words(vocab: usize) -> usize {
    vocab.div_ceil(32)
}

/// A bit for each token that occurs.
fn bits_of(tokens: &[u32], words: usize) -> Vec<u32> {
    let mut bits = vec![0; words];
    for &token in tokens {
        bits[token as usize / 32] |= 1 << (token % 32);
    }
    bits
}

impl Slots {
    fn new(
        decoder: &Decoder,
        how: &Sampling,
        end_ids: &[u32],
        (slots, capacity): (usize, usize),
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
            state: numbers(2 * slots)?,
            keys: device.zeroed(slots * 32)?,
            seen: (how.repetition_penalty != 1.0)
                .then(|| numbers(slots * seen_words(vocab)))
                .transpose()?,
            ends: device.buffer_of(end_ids)?,
            end_count: end_ids.len(),
            drawn: numbers(slots * capacity)?,
            logps: numbers(slots * capacity)?,
            capacity,
            logits: numbers(tables * vocab)?,
            normed: device.zeroed(slots * config.hidden * decoder.size())?,
            pass: decoder.pass(slots)?,
            partial: numbers(parts * slots * heads.query * heads.dim)?,
            partial_lse: numbers(parts * slots * heads.query)?,
            own_splits,
        })
    }

    /// A layer's cache.
    fn layer(&self, i: usize) -> Address {
        self.cache.element(i, self.layer_bytes)
    }

    fn cache_rows(&self, layer: usize) -> CacheRows<'_> {
        CacheRows {
            cache: self.layer(layer),
            rows: &self.cache_rows,
        }
    }
}
