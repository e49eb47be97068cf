//! One step of some of the running sequences: their last tokens through the model, and a draw from the logits.

use super::cache::LayerCache;
use super::engine::{Prefix, Sequence};
use super::logits::Logits;
use super::queue::{Group, Queue};
use super::sampler::Sampling;
use crate::kernels::attention::Heads;
use crate::kernels::gemm::{Left, Mat, Panels, Threads, Write, matmul};
use crate::kernels::rope::Rotary;
use crate::kernels::{softmax, team};
use crate::model::{Decoder, LayerState};
use rayon::prelude::*;

/// What all sequences share.
pub(super) struct Step<'a> {
    pub decoder: &'a Decoder,
    pub how: &'a Sampling,
    pub rotary: &'a Rotary,
    pub groups: &'a Queue<Prefix>,
}

/// Storage for a share of the running sequences, kept from step to step: fresh pages would cost a few percent.
#[derive(Default)]
pub(super) struct Storage {
    state: LayerState,
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
            next,
            logits,
        } = storage;
        decoder.embed(&last, &mut state.x);
        for i in 0..decoder.config.layers {
            let heads = decoder.heads(i);
            decoder.project(i, &positions, self.rotary, state);
            state.attention.resize(last.len() * heads.q_width(), 0.0);
            self.attention(i, running, &state.qkv, &mut state.attention);
            decoder.finish(i, state, next);
            std::mem::swap(&mut state.x, next);
        }
        logits.set(decoder, &state.x, self.how.scale());
    }

    /// Attention of each sequence's last token over its prompt and its own past, to which its key and value are added:
    /// `qkv` `[running, qkv_width]`, `out` `[running, q_width]`.
    fn attention(&self, layer: usize, running: &mut [Sequence], qkv: &[f32], out: &mut [f32]) {
        let heads = self.decoder.heads(layer);
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
        tasks
            .into_par_iter()
            .for_each_init(Scratch::default, |scratch, (members, qkv, out)| {
                let prefix = &self.group(&members[0]).own.cache[layer];
                for head in 0..heads.kv {
                    scratch.attend(heads, head, prefix, (layer, &mut *members), qkv, out);
                }
            });
    }
}

/// Storage for one key head's attention of some sequences of one group.
#[derive(Default)]
struct Scratch {
    /// `[members, group, dim]`
    queries: Vec<f32>,
    /// `[members, group, prompt and past]`
    scores: Vec<f32>,
    /// `[members, group, dim]`
    result: Vec<f32>,
}

impl Scratch {
    /// `qkv` `[members, qkv_width]`; writes its columns of `out` `[members, q_width]`.
    fn attend(
        &mut self,
        heads: Heads,
        kv_head: usize,
        prefix: &LayerCache,
        (layer, members): (usize, &mut [Sequence]),
        qkv: &[f32],
        out: &mut [f32],
    ) {
        let (dim, group) = (heads.dim, heads.group());
        let width = group * dim; // the query heads of a key head lie side by side
        let rows = members.len() * group;
        let seen = prefix.tokens(kv_head);
        let longest = (members.iter())
            .map(|m| m.cache[layer].tokens(kv_head) + 1)
            .max();
        let stride = seen + longest.unwrap_or(0);
        self.queries.clear();
        for row in qkv.chunks_exact(heads.qkv_width()) {
            let queries = &row[kv_head * width..][..width];
            self.queries
                .extend(queries.iter().map(|q| q * heads.scale()));
        }
        self.scores.resize(rows * stride, 0.0);
        let one = |a: Mat, b: Panels, c: &mut [f32], stride, write| {
            matmul(Left::Rows(a), b, c, stride, write, Threads::One)
        };
        let queries = Mat::new(&self.queries, rows, dim);
        one(
            queries,
            prefix.keys(kv_head),
            &mut self.scores,
            stride,
            Write::Set,
        );
        for (m, scores) in self.scores.chunks_exact_mut(group * stride).enumerate() {
            let own = &mut members[m].cache[layer];
            own.push_head(heads, kv_head, &qkv[m * heads.qkv_width()..]);
            let queries = Mat::new(&self.queries[m * width..], group, dim);
            one(
                queries,
                own.keys(kv_head),
                &mut scores[seen..],
                stride,
                Write::Set,
            );
            let end = seen + own.tokens(kv_head);
            let start = end.saturating_sub(heads.window.unwrap_or(usize::MAX));
            for row in scores.chunks_exact_mut(stride) {
                row[..start].fill(0.0);
                let visible = &mut row[start..end];
                let max = softmax::max(visible);
                let scale = 1.0 / softmax::exp_in_place(visible, max);
                visible.iter_mut().for_each(|p| *p *= scale);
            }
        }
        self.result.resize(rows * dim, 0.0);
        let weights = Mat::strided(&self.scores, rows, seen, stride);
        one(
            weights,
            prefix.values(kv_head),
            &mut self.result,
            dim,
            Write::Set,
        );
        for (m, result) in self.result.chunks_exact_mut(width).enumerate() {
            let past = &self.scores[m * group * stride + seen..];
            let own = &members[m].cache[layer];
            let weights = Mat::strided(past, group, own.tokens(kv_head), stride);
            one(weights, own.values(kv_head), result, dim, Write::Add);
        }
        let columns = out.chunks_exact_mut(heads.q_width());
        for (out, result) in columns.zip(self.result.chunks_exact(width)) {
            out[kv_head * width..][..width].copy_from_slice(result);
        }
    }
}
