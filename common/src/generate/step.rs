//! One step of some of the running sequences: their last tokens through the model, and a draw from the logits.

use super::attention::Rows;
use super::cache::Past;
use super::engine::{Prefix, Sequence};
use super::logits::Logits;
use super::queue::{Group, Queue};
use super::sampler::Sampling;
use crate::kernels::{fit, team};
use crate::model::{Aside, Decoder, LayerState, Recurrent, Rotations};
use std::cell::Cell;

/// What all sequences share.
pub(super) struct Step<'a> {
    pub decoder: &'a Decoder,
    pub how: &'a Sampling,
    pub rotations: &'a Rotations,
    pub groups: &'a Queue<Prefix>,
}

/// Storage for a share of the running sequences, kept from step to step: fresh pages would cost a few percent.
#[derive(Default)]
pub(super) struct Storage {
    state: LayerState,
    aside: Aside,
    next: Vec<f32>,
    logits: Logits,
}

impl Step<'_> {
    fn group(&self, sequence: &Sequence) -> &Group<Prefix> {
        self.groups.group(sequence.group)
    }

    /// Draws the next token of each sequence.
    pub fn run(&self, running: &mut [Sequence], storage: &mut Storage) {
        self.advance(running, storage);
        let logits = &storage.logits;
        team::items(running.iter_mut().collect(), |row, sequence| {
            let prompt = &self.group(sequence).request.prompt;
            sequence.draw(logits.row(row), prompt, self.how);
        });
    }

    /// Runs the last token of every sequence, up to the logits of the next.
    fn advance(&self, running: &mut [Sequence], storage: &mut Storage) {
        let decoder = self.decoder;
        let positions: Vec<usize> = running
            .iter()
            .map(|s| self.group(s).request.prompt.len() + s.token_ids.len() - 1)
            .collect();
        let last: Vec<u32> = running
            .iter()
            .map(|s| *s.token_ids.last().expect("a token was drawn"))
            .collect();
        let Storage {
            state,
            aside,
            next,
            logits,
        } = storage;
        decoder.begin(&last, aside, &mut state.x);
        for i in 0..decoder.config.layers {
            decoder.project(i, &positions, self.rotations, aside, state);
            match decoder.recurrent(i) {
                Some(recurrent) => go_on(i, recurrent, running, state),
                None => {
                    let width = decoder.heads(i).q_width();
                    state.attention.resize(last.len() * width, 0.0);
                    self.attention(i, running, &state.qkv, &mut state.attention);
                }
            }
            decoder.finish(i, aside, state, next);
            std::mem::swap(&mut state.x, next);
        }
        logits.set(decoder, &state.x, self.how.scale());
    }

    /// Attention of each sequence's last token over its prompt and its own past, to which its key and value are added (where
    /// these are an earlier layer's, that has added them):
    /// `qkv` `[running, qkv_width]`, `out` `[running, q_width]`.
    fn attention(&self, layer: usize, running: &mut [Sequence], qkv: &[f32], out: &mut [f32]) {
        let heads = self.decoder.heads(layer);
        let keys_of = self.decoder.keys_of(layer);
        let new = usize::from(keys_of == layer);
        // Enough in a task to share the reading of the prompt's keys, few enough to share the work.
        let most = (running.len() / (4 * rayon::current_num_threads())).clamp(1, 8);
        let mut tasks = vec![];
        let (mut qkv, mut out) = (qkv, out);
        for group in running.chunk_by_mut(|a, b| a.group == b.group) {
            for members in group.chunks_mut(most) {
                let (queries, left) = qkv.split_at(members.len() * heads.qkv_width());
                let (result, rest) = out.split_at_mut(members.len() * heads.q_width());
                tasks.push((members, queries, result));
                (qkv, out) = (left, rest);
            }
        }
        team::items(tasks, |_, (members, qkv, out)| {
            let prefix = self.group(&members[0]).own.past[keys_of].keys();
            let (shape, seen) = (prefix.shape(), prefix.tokens());
            let first = |m: &Sequence| {
                let end = seen + m.past[keys_of].keys().tokens() + new;
                end.saturating_sub(heads.window.unwrap_or(usize::MAX))
            };
            let first: Vec<usize> = members.iter().map(first).collect();
            let mut rows = ROWS.take();
            rows.start(shape, qkv, self.decoder.sinks(layer));
            let own = members.first().map(|m| m.past[keys_of].keys());
            rows.see(0..members.len(), (prefix, own), |m| first[m]);
            let mut left = members;
            for (m, qkv) in qkv.chunks_exact(heads.qkv_width()).enumerate() {
                let (member, after) = left.split_first_mut().expect("one for each row");
                let own = member.past[keys_of].keys_mut();
                if keys_of == layer {
                    own.push(qkv);
                }
                let next = after.first().map(|m| m.past[keys_of].keys());
                rows.see(m..m + 1, (own, next), |m| first[m].saturating_sub(seen));
                left = after;
            }
            rows.finish(shape, out);
            ROWS.set(rows);
        });
    }
}

/// What stands in the place of attention, of each sequence's last token: from `state.qkv_raw` to `state.attention`.
fn go_on(layer: usize, recurrent: &Recurrent, running: &mut [Sequence], state: &mut LayerState) {
    let kind = recurrent.kind();
    fit(&mut state.attention, running.len() * kind.output_width());
    let rows = state
        .qkv_raw
        .chunks_exact(kind.input_width())
        .zip(state.attention.chunks_exact_mut(kind.output_width()));
    team::items(
        running.iter_mut().zip(rows).collect(),
        |_, (sequence, (raw, out))| match &mut sequence.past[layer] {
            Past::Memory(memory) => recurrent.go_on(memory, raw, out),
            _ => unreachable!("it keeps no keys"),
        },
    );
}

thread_local! {
    /// The rows that a thread is at; kept, since fresh storage in every layer costs.
    static ROWS: Cell<Rows> = Cell::default();
}
