//! Generation on the device: all sequences take a step together, as one captured graph.
//!
//! Keys and values lie in pages; linear attention has a memory for each slot, and one for each prompt, from which its samples go
//! on as they draw from its logits. A prompt's are stored once, for all of its samples; a sequence takes a page when its last
//! is full. Where none is left, those that are last in the line give theirs back and start over later: their draws are the
//! same then. A step draws a token for each sequence from the logits that are there and runs those tokens; only the tokens
//! and who is done come back. Prompts run together, filled up to a fixed number of rows, and a step always runs all slots,
//! used or not: so no product's shape depends on what else there is to do, and a sample is what it is whatever runs beside
//! it. A step is under way while the host writes out what the one before has finished.

mod admission;

use super::args;
use super::batch::Rotation;
use super::decoder::Decoder;
use super::device::{Arg, Buffer, Graph, Launch, Precision};
use super::launches::{Scores, THREADS};
use super::pass::CacheRows;
use super::slots::{
    DecodeTile, Given, PAGE, PREFIX_SPLIT, PREFIX_SPLITS, PROMPTS, SamplingParams, Sequence,
    Shares, Sizes, Slots, bits_of, prompt_rows, query_groups, seen_words, tables,
};
use super::walks::DeltaSpan;
use crate::generate::{Generate, Queue, Request, Sample, Sampling, Stopped, stream_key};
use crate::jsonl::FinishReason;
use crate::kernels::layout::Layout;
use anyhow::Result;
use std::collections::HashMap;
use std::sync::Arc;

/// Why the kernel ended a sequence.
const END_TOKEN: i32 = 1;

/// What is kept of a prompt.
#[derive(Default)]
struct Prompt {
    /// Its keys and values, once it has run.
    pages: Vec<i32>,
    table: Option<usize>,
}

/// A response at work.
struct Running {
    group: usize,
    number: usize,
    token_ids: Vec<u32>,
    /// Σ log p of them, nats.
    logp: f64,
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
    /// Rows of the longest pass over a prompt.
    most_rows: usize,
    memory: Slots,
    rotary: Arc<Rotation>,
    /// None for what ran once, which makes everything ready for capture.
    graphs: HashMap<PromptParts, Option<Graph>>,
    /// Samples that gave their pages back, the first to start again last.
    again: Vec<(usize, usize)>,
    /// How many responses have ended.
    ended: u64,
    /// A step is under way: what it draws has not been read.
    under_way: bool,
    /// The host's lists are not what the device has.
    changed: bool,
    /// Of what the device has.
    parts: PromptParts,
    /// Of all responses that have ended.
    tokens: u64,
}

/// How the prompts' keys are shared out among blocks.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
struct PromptParts {
    /// Tiles of queries.
    tiles: usize,
    /// Parts of the keys, side by side.
    splits: usize,
}

/// Which pages, and which tables of prompts, are free.
struct Pages {
    free: Vec<i32>,
    free_tables: Vec<usize>,
    /// Entries of a table.
    most: usize,
    all: usize,
}

impl<'a> Generator<'a> {
    /// At most `slots` sequences run at a time; without a number, as many as memory allows, up to 1024.
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
        let Shares { slots, pages, rows } =
            sizes.share_out(decoder.device.memory()?.free, slots)?;
        let most = context
            .div_ceil(PAGE)
            .min(pages)
            .max(capacity.div_ceil(PAGE));
        let memory = Slots::new(decoder, &how, end_ids, slots, (pages, most))?;
        Ok(Self {
            rotary: decoder.rotation(1)?,
            groups: Queue::new(),
            slots: (0..slots).map(|_| None).collect(),
            pages: Pages {
                free: (0..pages as i32).rev().collect(),
                free_tables: (slots..tables(slots)).rev().collect(),
                most,
                all: pages,
            },
            most_rows: rows,
            memory,
            graphs: HashMap::new(),
            again: vec![],
            ended: 0,
            under_way: false,
            changed: true,
            parts: PromptParts::default(),
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

    /// How many tokens a response to a prompt of so many may have.
    fn limit(&self, prompt: usize) -> usize {
        self.how
            .max_tokens
            .min(self.decoder.config.context - prompt)
    }

    /// Pages for a response to a prompt of so many tokens.
    fn own_pages(&self, prompt: usize) -> usize {
        self.limit(prompt).div_ceil(PAGE)
    }

    /// Starts a sample of a group in a slot; there are pages.
    fn start(&mut self, slot: usize, group: usize, number: usize) -> Result<()> {
        if self.groups.group(group).own.table.is_none() {
            if self.pages.free_tables.is_empty() {
                self.forget_prompt();
            }
            self.prefill(&self.together(group))?;
        }
        let pages = self.pages.take(1);
        self.memory.tables.write(slot * self.pages.most, &pages)?;
        let entry = self.groups.group(group);
        let table = entry.own.table.expect("the prompt ran");
        let key = stream_key(self.how.seed, &entry.request.key, number);
        let prompt = entry.request.prompt.len();
        let sequence = Sequence {
            prefix_table: table as i32,
            prefix_len: prompt as i32,
            own_table: slot as i32,
            limit: self.limit(prompt) as i32,
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
            logp: 0.0,
            pages,
            sequence,
        });
        self.changed = true;
        Ok(())
    }

    /// The prompts that run together: that of `group`, whose keys are not there, and those after it for which there is room.
    fn together(&self, group: usize) -> Vec<usize> {
        let prompt = |group: usize| self.groups.group(group).request.prompt.len();
        let mut found = vec![group];
        let all = prompt_rows(prompt(group));
        let mut rows = prompt(group);
        let mut free = self.pages.free.len() - self.unseated(group);
        let reserve = self.expected() + self.promised();
        for next in self
            .groups
            .after(group)
            .filter(|&next| self.groups.is_unstarted(next))
        {
            rows += prompt(next);
            free = free.saturating_sub(prompt(next).div_ceil(PAGE));
            let ran = self.groups.group(next).own.table.is_some();
            let fits = !ran && rows <= all && prompt_rows(prompt(next)) == all;
            let most = PROMPTS.min(self.pages.free_tables.len());
            if !fits || free < reserve || found.len() == most {
                break;
            }
            found.push(next);
        }
        found
    }

    /// Gives prompts that run together pages and tables.
    fn seat(&mut self, groups: &[usize]) -> Result<Prompts> {
        let first = self.groups.group(groups[0]).request.prompt.len();
        let mut batch = Prompts::default();
        for &group in groups {
            let entry = self.groups.group_mut(group);
            let prompt = &entry.request.prompt;
            let pages = self.pages.take(prompt.len().div_ceil(PAGE));
            let table = self.pages.free_tables.pop().expect("a table for each slot");
            let at = table * self.pages.most;
            self.memory.tables.write(at, &pages)?;
            batch.push(prompt, &pages);
            entry.own.pages = pages;
            entry.own.table = Some(table);
        }
        batch.fill_up(prompt_rows(first));
        Ok(batch)
    }

    /// Runs prompts: their keys and values into pages, the logits after each into the row of its table.
    fn prefill(&mut self, groups: &[usize]) -> Result<()> {
        let batch = self.seat(groups)?;
        let (decoder, memory) = (self.decoder, &self.memory);
        let device = &decoder.device;
        let rows = device.buffer_of(&batch.rows)?;
        let spans = device.buffer_of(&self.spans(&batch, groups))?;
        let shape = decoder.shape(&batch.layout)?;
        let pass = decoder.pass(batch.tokens.len())?;
        decoder.forward(&shape, &batch.tokens, &pass, |i| {
            memory.kept(i, &rows, &spans)
        })?;
        let last = device.buffer_of(&batch.last)?;
        decoder.final_norm(&pass.x, Some(&last), PROMPTS, &pass.normed)?;
        let (width, vocab) = (decoder.config.hidden, decoder.config.vocab);
        decoder.logits(
            pass.normed.rows(0, width, decoder.precision),
            PROMPTS,
            (0, vocab),
            memory.after_prompts.rows(0, vocab, Precision::F32),
        )?;
        for (i, &group) in groups.iter().enumerate() {
            let table = self.groups.group(group).own.table.expect("just given");
            let logits = |of: &Buffer, row| of.part(row * vocab, vocab, size_of::<f32>());
            let from = logits(&memory.after_prompts, i);
            logits(&memory.logits, table).copy_from(&from, from.bytes())?;
        }
        Ok(())
    }

    /// What linear attention walks over: each prompt, to the memory of its table, and what belongs to nobody.
    fn spans(&self, batch: &Prompts, groups: &[usize]) -> Vec<DeltaSpan> {
        let mut spans: Vec<_> = (batch.layout.segments().iter())
            .map(DeltaSpan::over)
            .collect();
        for (span, &group) in spans.iter_mut().zip(groups) {
            let table = self.groups.group(group).own.table;
            span.to = table.expect("just given") as i32;
        }
        spans
    }

    /// Brings what changed to the device.
    fn update(&mut self) -> Result<PromptParts> {
        if !self.changed {
            return Ok(self.parts);
        }
        let order = self.order();
        let groups = query_groups(&self.decoder.config);
        let mut tiles: Vec<_> = (groups.iter())
            .map(|&group| self.tiles(&order, group))
            .collect();
        let longest = |of: fn(Sequence) -> i32| {
            let running = self.slots.iter().flatten();
            running.map(|r| of(r.sequence)).max().unwrap_or(1) as usize
        };
        // Few sizes, so few graphs; a tile without rows does nothing.
        self.parts = PromptParts {
            tiles: tiles
                .iter()
                .map(Vec::len)
                .max()
                .map_or(1, usize::next_power_of_two),
            splits: (longest(|s| s.prefix_len) / PREFIX_SPLIT).clamp(1, PREFIX_SPLITS),
        };
        let longest = longest(|s| s.prefix_len + s.limit);
        let rotary = self.decoder.rotation(longest)?;
        if !Arc::ptr_eq(&rotary, &self.rotary) {
            self.graphs.clear(); // they hold the old table's address
            self.rotary = rotary;
        }
        for tiles in &mut tiles {
            tiles.resize(self.parts.tiles, DecodeTile::default());
        }
        let mut given = Given::new(self.slots.len());
        (given.order.iter_mut().zip(&order)).for_each(|(to, &slot)| *to = slot as i32);
        let mut fresh = false;
        for (slot, running) in self.slots.iter().enumerate() {
            let Some(running) = running else { continue };
            let sequence = running.sequence;
            given.positions[slot] = sequence.prefix_len + running.token_ids.len() as i32 - 1;
            given.finished[slot] = 0;
            given.sequences[slot] = sequence;
            if running.token_ids.is_empty() {
                fresh = true;
                given.logit_rows[slot] = sequence.prefix_table;
            }
        }
        self.memory.give(&given, &tiles.concat())?;
        self.changed = fresh; // after their first draw they have logits of their own
        Ok(self.parts)
    }

    /// The slots in use, those of a prompt after each other.
    fn order(&self) -> Vec<usize> {
        let in_use = |&slot: &usize| self.slots[slot].is_some();
        let mut order: Vec<usize> = (0..self.slots.len()).filter(in_use).collect();
        order.sort_by_key(|&slot| self.prefix(slot));
        order
    }

    /// The table of the prompt of a slot in use, and the prompt's length.
    fn prefix(&self, slot: usize) -> (i32, i32) {
        let running = self.slots[slot].as_ref().expect("it is in use");
        (running.sequence.prefix_table, running.sequence.prefix_len)
    }

    /// The queries that read the same prompt, `each` to a key, cut to what a block takes.
    fn tiles(&self, order: &[usize], each: usize) -> Vec<DecodeTile> {
        let most = self.decoder.tile_rows();
        let mut tiles = vec![];
        let mut first = 0;
        for together in order.chunk_by(|&a, &b| self.prefix(a) == self.prefix(b)) {
            let end = first + together.len() * each;
            let (prefix_table, prefix_len) = self.prefix(together[0]);
            tiles.extend((first..end).step_by(most).map(|row| DecodeTile {
                first: row as i32,
                rows: (end - row).min(most) as i32,
                prefix_table,
                prefix_len,
            }));
            first = end;
        }
        tiles
    }

    /// A draw for each running sequence, and the drawn tokens through the model.
    fn launch_step(&self, prompts: PromptParts) -> Result<()> {
        let (decoder, memory) = (self.decoder, &self.memory);
        let (config, slots) = (&decoder.config, self.slots.len());
        let how = SamplingParams {
            temperature: self.how.temperature,
            top_p: self.how.top_p,
            min_p: self.how.min_p,
            repetition_penalty: self.how.repetition_penalty,
            top_k: i32::try_from(self.how.top_k).unwrap_or(0),
        };
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
                &memory.logps,
                &memory.state,
                &memory.positions,
                &memory.cache_rows,
                &memory.finished,
            ],
        )?;
        let pass = &memory.pass;
        decoder.begin(&memory.state, slots, &pass.x, pass)?;
        for (i, layer) in decoder.layers.iter().enumerate() {
            if let (Some(recurrent), Some(memories)) = (&layer.recurrent, memory.memories(i)) {
                decoder.project_raw(i, slots, pass)?;
                decoder.recur_once(recurrent, memory, memories, slots)?;
            } else {
                let cache = (layer.keys_of == i).then(|| CacheRows {
                    cache: memory.cache_of(i),
                    rows: &memory.cache_rows,
                });
                let positions = &memory.positions;
                decoder.project_rows(i, slots, positions, &self.rotary, pass, cache)?;
                self.attend(i, prompts)?;
            }
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
    fn attend(&self, layer: usize, prompts: PromptParts) -> Result<()> {
        let (decoder, memory, slots) = (self.decoder, &self.memory, self.slots.len());
        let (heads, launches) = (decoder.heads(layer), decoder.attention_launches(layer));
        let own_splits = memory.own_splits;
        let groups = query_groups(&decoder.config);
        let group = groups.iter().position(|&group| group == heads.group());
        let first = group.unwrap_or(0) * prompts.tiles;
        decoder.device.launch(
            &decoder.kernels.of_heads("decode_attention", heads),
            launches.decode(prompts.tiles * prompts.splits, slots * own_splits),
            args![
                &memory.pass.qkv,
                memory.cache_of(layer),
                &memory.partial,
                &memory.partial_lse,
                &memory.sequences,
                &memory.positions,
                memory.tiles.element(first, size_of::<DecodeTile>()),
                &memory.order,
                &memory.tables,
                self.pages.most as i32,
                slots as i32,
                prompts.tiles as i32,
                prompts.splits as i32,
                own_splits as i32,
                heads.query as i32,
                heads.kv as i32,
                heads.dim as i32,
                heads.window.unwrap_or(0) as i32,
                Arg::plain(Scores::of(heads)),
            ],
        )?;
        let rows = slots * heads.query;
        decoder.device.launch(
            &decoder.kernels.decode_merge,
            Launch::row(rows.div_ceil(8), THREADS),
            args![
                &memory.partial,
                &memory.partial_lse,
                decoder.layers[layer].sinks.as_ref(),
                &memory.pass.attention,
                (prompts.splits + own_splits) as i32,
                rows as i32,
                heads.query as i32,
                heads.dim as i32,
            ],
        )?;
        decoder.gate(layer, slots, &memory.pass)
    }

    /// Runs a step: once as it comes, then captured, then as a graph.
    fn run_step(&mut self, prompts: PromptParts) -> Result<()> {
        match self.graphs.get(&prompts) {
            Some(Some(graph)) => return graph.run(),
            Some(None) => {
                let graph = self.decoder.device.capture(|| self.launch_step(prompts))?;
                graph.run()?;
                self.graphs.insert(prompts, Some(graph));
            }
            None => {
                self.launch_step(prompts)?;
                self.graphs.insert(prompts, None);
            }
        }
        Ok(())
    }

    /// Waits for the step that is under way, and takes what it drew.
    fn take_drawn(&mut self, stopped: Stopped) -> Result<()> {
        let slots = self.slots.len();
        let state: Vec<i32> = self.memory.state.read(0, 3 * slots)?;
        let (tokens, state) = state.split_at(slots);
        let (logps, finished) = state.split_at(slots);
        for slot in 0..slots {
            let Some(running) = &mut self.slots[slot] else {
                continue;
            };
            running.token_ids.push(tokens[slot] as u32);
            running.logp += f64::from(f32::from_bits(logps[slot] as u32));
            if finished[slot] == END_TOKEN || stopped(&running.token_ids) {
                self.retire(slot, FinishReason::Stop)?;
            } else if finished[slot] != 0 {
                self.retire(slot, FinishReason::Length)?;
            }
        }
        Ok(())
    }

    /// Ends a sequence; its slot and pages are free.
    fn retire(&mut self, slot: usize, finish: FinishReason) -> Result<()> {
        let running = self.slots[slot].take().expect("it runs");
        let sample = Sample {
            token_ids: running.token_ids,
            finish,
            logp: running.logp,
        };
        self.tokens += sample.token_ids.len() as u64;
        self.ended += 1;
        self.pages.free.extend(running.pages);
        if self.groups.finish(running.group, running.number, sample) {
            self.pages
                .give_back(&mut self.groups.group_mut(running.group).own);
        }
        self.changed = true;
        Ok(())
    }
}

impl Generate for Generator<'_> {
    fn wants_prompt(&self) -> bool {
        self.groups.unstarted() < PROMPTS
            || self.running() + self.again.len() + self.groups.waiting() < self.slots.len()
    }

    fn is_idle(&self) -> bool {
        self.groups.is_empty()
    }

    fn tokens(&self) -> u64 {
        self.tokens
    }

    fn has_room_for(&self, prompt: usize) -> bool {
        let shared = prompt.div_ceil(PAGE);
        prompt_rows(prompt) <= self.most_rows
            && shared <= self.pages.most
            && shared + self.own_pages(prompt) <= self.pages.all
    }

    fn push(&mut self, request: Request) {
        assert!(!request.prompt.is_empty() && request.prompt.len() < self.decoder.config.context);
        self.groups.push(request, Prompt::default());
    }

    fn step(&mut self, stopped: Stopped) -> Result<()> {
        if std::mem::take(&mut self.under_way) {
            self.take_drawn(stopped)?;
        }
        self.grow()?;
        self.fill()?;
        if self.running() > 0 {
            let prompts = self.update()?;
            self.run_step(prompts)?;
            self.under_way = true;
        }
        Ok(())
    }

    fn finished(&mut self) -> Vec<(Request, Vec<Sample>)> {
        self.groups.finished()
    }
}

/// Prompts of a pass.
#[derive(Default)]
struct Prompts {
    layout: Layout,
    tokens: Vec<u32>,
    /// Where in the cache each token goes; −1 for nowhere.
    rows: Vec<i32>,
    /// The last token of each prompt.
    last: Vec<i32>,
}

impl Prompts {
    fn push(&mut self, prompt: &[u32], pages: &[i32]) {
        let row = |i: usize| pages[i / PAGE] * PAGE as i32 + (i % PAGE) as i32;
        self.layout.push(prompt.len(), &[]);
        self.tokens.extend_from_slice(prompt);
        self.rows.extend((0..prompt.len()).map(row));
        self.last.push(self.tokens.len() as i32 - 1);
    }

    /// Adds what belongs to nobody, up to so many tokens and to [`PROMPTS`] prompts.
    fn fill_up(&mut self, tokens: usize) {
        if tokens > self.tokens.len() {
            self.layout.push(tokens - self.tokens.len(), &[]);
        }
        self.tokens.resize(tokens, 0);
        self.rows.resize(tokens, -1);
        self.last.resize(PROMPTS, 0);
    }
}

impl Pages {
    fn give_back(&mut self, prompt: &mut Prompt) {
        self.free.append(&mut prompt.pages);
        self.free_tables.extend(prompt.table.take());
    }

    fn take(&mut self, count: usize) -> Vec<i32> {
        self.free.split_off(self.free.len() - count)
    }
}
