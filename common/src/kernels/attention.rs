//! Causal attention over a packed, prefix-shared batch ([`super::layout`]), forward and backward. Scores are formed per block
//! of queries, never for the batch.

use super::gemm::{Left, Mat, Packed, PackedLeft, Precision, Threads, Write, matmul, multiply};
use super::layout::{Heads, Layout, Segment};
use super::shared::Shared;
use super::{cap, fit, softmax, team};
use std::cell::Cell;
use std::ops::Range;

/// Queries are taken in blocks of so many tokens (times the query heads that share a key head).
const BLOCK: usize = 64;

/// And keys in chunks, so that the scores of a block and a chunk, up to so many, stay in a core's cache.
const SCORES: usize = 192 * 128;

/// A task is about so many pairs of a query token and a key, so that the threads end together.
const TASK: usize = 1 << 18;

/// And a segment is cut into that many tasks at most: each packs the keys that it sees.
const MOST_TASKS: usize = 8;

/// Attention of every token: `qkv` is `[T, qkv_width]` after rotation, `out` `[T, q_width]`, `lse` `[T, query]` receives
/// the log-sum-exp of each score row for the backward pass. The products' operands have the given precision. `sinks`
/// `[query]`, where there are some, stand beside the scores of each row, with nothing to give.
///
/// Chunk by chunk of the keys, with an online softmax (Milakov and Gimelshein, *Online normalizer calculation for
/// softmax*, algorithm 3).
pub fn forward(
    layout: &Layout,
    heads: Heads,
    precision: Precision,
    (qkv, sinks): (&[f32], Option<&[f32]>),
    out: &mut [f32],
    lse: &mut [f32],
) {
    assert_eq!(qkv.len(), layout.tokens() * heads.qkv_width());
    let (out, lse) = (Shared::new(out), Shared::new(lse));
    let tasks: Vec<_> = parts(layout.segments())
        .flat_map(|part| (0..heads.kv).map(move |h| (part.clone(), h)))
        .collect();
    team::items(tasks, |_, (part, kv_head)| {
        let side = Side {
            heads,
            kv_head,
            qkv,
        };
        let mut storage = Storage::take(precision);
        let (sight, scratch) = storage.look(side, &part, Keys::set_for_forward);
        for block in sight.blocks() {
            block.attend(side, sinks, scratch);
            for r in 0..block.rows(heads) {
                let (token, head) = block.token_and_head(side, r);
                let sum = scratch.sums[r];
                // SAFETY: this task alone writes this part's rows of this key head's query heads.
                unsafe {
                    out.slice(token * heads.q_width() + head * heads.dim, heads.dim)
                        .iter_mut()
                        .zip(&scratch.result[r * heads.dim..])
                        .for_each(|(o, x)| *o = x / sum);
                    lse.slice(token * heads.query + head, 1)[0] = scratch.max[r] + sum.ln();
                }
            }
        }
        storage.give_back();
    });
}

/// Adds the gradient of `qkv` to `d_qkv` `[T, qkv_width]`, given that of the output, `d_out` `[T, q_width]`, and what
/// [`forward`] read and wrote: `qkv`, `out` and `lse`.
///
/// With P = exp(S − lse), δ = Σ dO∘O: dV = Pᵀ·dO, dS = P∘(dO·Vᵀ − δ), dQ = dS·K·scale, dK = dSᵀ·Q·scale
/// (FlashAttention-2, algorithm 2). Each task has sums of its own for the keys that it sees; they are added in the order
/// of the tasks, whichever ends first.
pub fn backward(
    layout: &Layout,
    heads: Heads,
    precision: Precision,
    (qkv, out, lse): (&[f32], &[f32], &[f32]),
    d_out: &[f32],
    d_qkv: &mut [f32],
) {
    let mut sums = SUMS.take();
    let parts: Vec<_> = parts(layout.segments()).collect();
    let lens = parts.iter().map(|part| part.keys() * 2 * heads.dim);
    fit(&mut sums, lens.clone().sum::<usize>() * heads.kv);
    let mut tasks = vec![];
    let mut rest = &mut sums[..];
    for (part, len) in parts.iter().zip(lens) {
        for kv_head in 0..heads.kv {
            let (own, others) = rest.split_at_mut(len);
            tasks.push((part, kv_head, own));
            rest = others;
        }
    }
    let d_qkv = Shared::new(d_qkv);
    team::items(tasks, |_, (part, kv_head, sums)| {
        let side = Side {
            heads,
            kv_head,
            qkv,
        };
        sums.fill(0.0);
        let mut storage = Storage::take(precision);
        let (sight, scratch) = storage.look(side, part, Keys::set_for_backward);
        for block in sight.blocks() {
            block.backward(side, (out, lse, d_out), scratch, sums);
            for r in 0..block.rows(heads) {
                let (token, head) = block.token_and_head(side, r);
                let at = token * heads.qkv_width() + head * heads.dim;
                // SAFETY: this task alone writes this part's rows of this key head's query heads.
                let target = unsafe { d_qkv.slice(at, heads.dim) };
                add_scaled(target, &scratch.result[r * heads.dim..], heads.scale);
            }
        }
        storage.give_back();
    });
    team::each(heads.kv, |kv_head| {
        let mut rest = &sums[..];
        for part in &parts {
            let len = part.keys() * 2 * heads.dim;
            let own = &rest[kv_head * len..][..len];
            rest = &rest[heads.kv * len..];
            for (token, sums) in part.tokens().zip(own.chunks_exact(2 * heads.dim)) {
                let (d_k, d_v) = sums.split_at(heads.dim);
                for (at, sums) in [(heads.k_at(kv_head), d_k), (heads.v_at(kv_head), d_v)] {
                    // SAFETY: one task owns this key head.
                    let target = unsafe { d_qkv.slice(token * heads.qkv_width() + at, heads.dim) };
                    add_scaled(target, sums, 1.0);
                }
            }
        }
    });
    SUMS.set(sums);
}

/// Adds the gradient of sinks to `d_sinks` `[query]`, given that of the output and what [`forward`] wrote: each takes
/// exp(sink − lse) of a row's weight, of which the row's other weights make δ = Σ dO∘O.
pub fn sinks_backward(
    heads: Heads,
    sinks: &[f32],
    (out, lse): (&[f32], &[f32]),
    d_out: &[f32],
    d_sinks: &mut [f32],
) {
    let d_sinks = Shared::new(d_sinks);
    team::each(heads.query, |head| {
        // SAFETY: one task owns this head.
        let d_sink = &mut unsafe { d_sinks.slice(head, 1) }[0];
        for (row, lse) in lse.iter().skip(head).step_by(heads.query).enumerate() {
            let own = row * heads.q_width() + head * heads.dim..;
            let delta = softmax::dot(&d_out[own.clone()][..heads.dim], &out[own][..heads.dim]);
            *d_sink -= (sinks[head] - lse).exp() * delta;
        }
    });
}

thread_local! {
    /// The tasks' sums of a backward pass; kept, since fresh pages cost more than what is done in them.
    static SUMS: Cell<Vec<f32>> = const { Cell::new(vec![]) };
}

/// target += x·scale.
fn add_scaled(target: &mut [f32], x: &[f32], scale: f32) {
    (target.iter_mut().zip(x)).for_each(|(t, x)| *t += x * scale);
}

/// One key/value head's part of the fused projection.
#[derive(Clone, Copy)]
struct Side<'a> {
    heads: Heads,
    kv_head: usize,
    qkv: &'a [f32],
}

impl<'a> Side<'a> {
    fn columns(&self, tokens: Range<usize>, at: usize) -> Mat<'a> {
        let width = self.heads.qkv_width();
        let start = (tokens.start * width + at).min(self.qkv.len());
        Mat::strided(&self.qkv[start..], tokens.len(), self.heads.dim, width)
    }

    fn keys(&self, tokens: Range<usize>) -> Mat<'a> {
        self.columns(tokens, self.heads.k_at(self.kv_head))
    }

    fn values(&self, tokens: Range<usize>) -> Mat<'a> {
        self.columns(tokens, self.heads.v_at(self.kv_head))
    }
}

/// A run of a segment's queries: a task, for each key head.
#[derive(Clone)]
struct Part<'a> {
    segment: &'a Segment,
    /// Of the segment's tokens.
    queries: Range<usize>,
}

/// Cuts segments into parts that cost about the same.
fn parts(segments: &[Segment]) -> impl Iterator<Item = Part<'_>> {
    segments.iter().flat_map(|segment| {
        let (len, seen) = (segment.tokens.len(), segment.position);
        // Twice the pairs of a query before token t and a key.
        let before = move |t: usize| t * (2 * seen + t);
        let count = (before(len) / (2 * TASK)).clamp(1, MOST_TASKS);
        let cut = move |i: usize| {
            let mut starts = (0..len).step_by(BLOCK);
            starts
                .find(|&t| count * before(t) >= i * before(len))
                .unwrap_or(len)
        };
        let queries = (0..count).map(move |i| cut(i)..if i + 1 < count { cut(i + 1) } else { len });
        queries
            .filter(|queries| !queries.is_empty())
            .map(move |queries| Part { segment, queries })
    })
}

impl Part<'_> {
    /// The segment's own tokens that it sees.
    fn own(&self) -> Range<usize> {
        let start = self.segment.tokens.start;
        start..start + self.queries.end
    }

    /// How many keys it sees.
    fn keys(&self) -> usize {
        self.segment.position + self.queries.end
    }

    /// The tokens of the keys that it sees.
    fn tokens(&self) -> impl Iterator<Item = usize> {
        self.segment
            .prefix
            .iter()
            .cloned()
            .flatten()
            .chain(self.own())
    }
}

/// The packed keys and values of some tokens and one head.
struct Keys {
    /// For Q·Kᵀ.
    k_rows: Packed,
    /// Forward: for P·V.
    v_columns: Packed,
    /// Backward: for dO·Vᵀ and dS·K.
    v_rows: Packed,
    k_columns: Packed,
}

impl Keys {
    fn empty(precision: Precision) -> Self {
        Self {
            k_rows: Packed::empty(precision),
            v_columns: Packed::empty(precision),
            v_rows: Packed::empty(precision),
            k_columns: Packed::empty(precision),
        }
    }

    fn set_for_forward(&mut self, side: Side, tokens: Range<usize>) {
        self.k_rows.set_rows(side.keys(tokens.clone()));
        self.v_columns.set_columns(side.values(tokens));
    }

    fn set_for_backward(&mut self, side: Side, tokens: Range<usize>) {
        self.k_rows.set_rows(side.keys(tokens.clone()));
        self.v_rows.set_rows(side.values(tokens.clone()));
        self.k_columns.set_columns(side.keys(tokens));
    }
}

/// What the queries of a part see: the prefix's keys, then the segment's own up to its last token.
#[derive(Clone, Copy)]
struct Sight<'a> {
    part: &'a Part<'a>,
    prefix: &'a Keys,
    own: &'a Keys,
}

impl<'a> Sight<'a> {
    fn blocks(self) -> impl Iterator<Item = Block<'a>> {
        let Range { start, end } = self.part.queries;
        (start..end).step_by(BLOCK).map(move |start| Block {
            sight: self,
            tokens: start..(start + BLOCK).min(end),
        })
    }
}

/// A block of queries. Row r of it is query head r / tokens of the key head's group, token r % tokens of the block.
struct Block<'a> {
    sight: Sight<'a>,
    /// Of the segment's.
    tokens: Range<usize>,
}

/// Some keys that a block sees.
struct Chunk<'a> {
    keys: &'a Keys,
    /// Which of them.
    range: Range<usize>,
    /// The position of the first.
    position: usize,
}

impl Chunk<'_> {
    fn len(&self) -> usize {
        self.range.len()
    }
}

impl<'a> Block<'a> {
    fn rows(&self, heads: Heads) -> usize {
        heads.group() * self.tokens.len()
    }

    fn token_and_head(&self, side: Side, r: usize) -> (usize, usize) {
        let (g, t) = (r / self.tokens.len(), r % self.tokens.len());
        (
            self.sight.part.segment.tokens.start + self.tokens.start + t,
            side.kv_head * side.heads.group() + g,
        )
    }

    /// The positions that row r may see.
    fn visible(&self, heads: Heads, r: usize) -> Range<usize> {
        let segment = self.sight.part.segment;
        let end = segment.position + self.tokens.start + r % self.tokens.len() + 1;
        end.saturating_sub(heads.window.unwrap_or(usize::MAX))..end
    }

    /// The keys that a row may see, in the order of their positions.
    fn chunks(&self, heads: Heads) -> impl Iterator<Item = Chunk<'a>> + use<'a> {
        let width = (SCORES / (BLOCK * heads.group())).next_multiple_of(32);
        let chunks = move |keys, len: usize, position| {
            (0..len).step_by(width).map(move |start| Chunk {
                keys,
                range: start..(start + width).min(len),
                position: position + start,
            })
        };
        let (sight, first) = (self.sight, self.visible(heads, 0).start);
        let seen = sight.part.segment.position;
        chunks(sight.prefix, seen, 0)
            .chain(chunks(sight.own, self.tokens.end, seen))
            .filter(move |chunk| chunk.position + chunk.len() > first)
    }

    /// The columns of a chunk that row r may see.
    fn visible_in(&self, heads: Heads, r: usize, chunk: &Chunk) -> Range<usize> {
        let visible = self.visible(heads, r);
        let column = |position: usize| position.saturating_sub(chunk.position).min(chunk.len());
        column(visible.start)..column(visible.end)
    }

    /// Collects the block's rows out of `[T, width]`, times `scale`, and packs them.
    fn gather(
        &self,
        side: Side,
        from: &[f32],
        (width, scale): (usize, f32),
        gathered: &mut Gathered,
    ) {
        let (dim, rows) = (side.heads.dim, self.rows(side.heads));
        gathered.rows.clear();
        for r in 0..rows {
            let (token, head) = self.token_and_head(side, r);
            let row = &from[token * width + head * dim..][..dim];
            gathered.rows.extend(row.iter().map(|x| x * scale));
        }
        let rows = Mat::new(&gathered.rows, rows, dim);
        gathered
            .left
            .set(Left::Rows(rows), gathered.columns.precision(), Threads::One);
    }

    /// Fills `result` with Σ exp(S − max)·V, `max` and `sums` with the rows' maxima and Σ exp(S − max).
    fn attend(&self, side: Side, sinks: Option<&[f32]>, scratch: &mut Scratch) {
        let (heads, rows) = (side.heads, self.rows(side.heads));
        let Scratch {
            q,
            scores,
            result,
            max,
            sums,
            ..
        } = scratch;
        self.gather(side, side.qkv, (heads.qkv_width(), heads.scale), q);
        set(result, rows * heads.dim, 0.0);
        set(max, rows, f32::NEG_INFINITY);
        set(sums, rows, 0.0);
        if let Some(sinks) = sinks {
            set(sums, rows, 1.0); // exp(sink − max)
            for (r, max) in max.iter_mut().enumerate() {
                *max = sinks[self.token_and_head(side, r).1];
            }
        }
        for chunk in self.chunks(heads) {
            let (keys, n) = (chunk.keys, chunk.len());
            let scores = sized(scores, rows * n);
            let panels = keys.k_rows.panel_range(chunk.range.start, n);
            multiply(&q.left, panels, scores, n, Write::Set, Threads::One);
            for (r, row) in scores.chunks_exact_mut(n).enumerate() {
                let row = show(row, self.visible_in(heads, r, &chunk));
                cap::bound(row, heads.cap);
                let top = softmax::max(row);
                if top > max[r] {
                    let factor = softmax::exp::<false>(max[r] - top);
                    sums[r] *= factor;
                    result[r * heads.dim..][..heads.dim]
                        .iter_mut()
                        .for_each(|x| *x *= factor);
                    max[r] = top;
                }
                sums[r] += softmax::exp_in_place(row, max[r]);
            }
            let weights = Left::Rows(Mat::new(scores, rows, n));
            let values = keys.v_columns.sum_range(chunk.range);
            matmul(weights, values, result, heads.dim, Write::Add, Threads::One);
        }
    }

    /// Fills `result` with the gradient of the queries (times √dim), and adds those of keys and values to `sums`, a row
    /// `[d_k | d_v]` for each key.
    fn backward(
        &self,
        side: Side,
        (out, lse, d_out): (&[f32], &[f32], &[f32]),
        scratch: &mut Scratch,
        sums: &mut [f32],
    ) {
        let (heads, rows, dim) = (side.heads, self.rows(side.heads), side.heads.dim);
        let Scratch {
            q,
            d_o,
            scores,
            d_scores,
            result,
            deltas,
            ..
        } = scratch;
        self.gather(side, side.qkv, (heads.qkv_width(), heads.scale), q);
        self.gather(side, d_out, (heads.q_width(), 1.0), d_o);
        for gathered in [&mut *q, &mut *d_o] {
            gathered
                .columns
                .set_columns(Mat::new(&gathered.rows, rows, dim));
        }
        deltas.clear();
        deltas.extend((0..rows).map(|r| {
            let (token, head) = self.token_and_head(side, r);
            let o = &out[token * heads.q_width() + head * dim..][..dim];
            softmax::dot(o, &d_o.rows[r * dim..][..dim])
        }));
        set(result, rows * dim, 0.0);
        for chunk in self.chunks(heads) {
            let (keys, n) = (chunk.keys, chunk.len());
            let (p, d) = (sized(scores, rows * n), sized(d_scores, rows * n));
            for (left, of, out) in [
                (&q.left, &keys.k_rows, &mut *p),
                (&d_o.left, &keys.v_rows, &mut *d),
            ] {
                let panels = of.panel_range(chunk.range.start, n);
                multiply(left, panels, out, n, Write::Set, Threads::One);
            }
            for (r, (p, d)) in p.chunks_exact_mut(n).zip(d.chunks_exact_mut(n)).enumerate() {
                let (token, head) = self.token_and_head(side, r);
                let visible = self.visible_in(heads, r, &chunk);
                let (p, d) = (show(p, visible.clone()), show(d, visible));
                cap::bound(p, heads.cap);
                let log_sum = lse[token * heads.query + head];
                softmax::backward(p, d, log_sum, deltas[r], cap::inverse(heads.cap));
            }
            let (weights, d_scores) = (Mat::new(p, rows, n), Mat::new(d, rows, n));
            let columns = keys.k_columns.sum_range(chunk.range);
            matmul(
                Left::Rows(d_scores),
                columns,
                result,
                dim,
                Write::Add,
                Threads::One,
            );
            for (left, right, at) in [(d_scores, &*q, 0), (weights, &*d_o, dim)] {
                let sums = &mut sums[chunk.position * 2 * dim + at..];
                let right = right.columns.panels();
                matmul(
                    Left::Columns(left),
                    right,
                    sums,
                    2 * dim,
                    Write::Add,
                    Threads::One,
                );
            }
        }
    }
}

/// Makes the columns that are not visible zero, and gives the others.
fn show(row: &mut [f32], visible: Range<usize>) -> &mut [f32] {
    row[..visible.start].fill(0.0);
    row[visible.end..].fill(0.0);
    &mut row[visible]
}

/// Sets all of a buffer, with another length.
fn set(buffer: &mut Vec<f32>, len: usize, value: f32) {
    buffer.clear();
    buffer.resize(len, value);
}

/// The first elements of a buffer, which grows to have so many.
fn sized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

/// What a task works in; kept from one to the next.
struct Storage {
    prefix: Keys,
    own: Keys,
    scratch: Scratch,
}

struct Scratch {
    q: Gathered,
    d_o: Gathered,
    scores: Vec<f32>,
    d_scores: Vec<f32>,
    result: Vec<f32>,
    max: Vec<f32>,
    sums: Vec<f32>,
    deltas: Vec<f32>,
}

/// A block's rows of a matrix: as they are, as a left operand, and as a right one.
struct Gathered {
    rows: Vec<f32>,
    left: PackedLeft,
    columns: Packed,
}

impl Gathered {
    fn empty(precision: Precision) -> Self {
        Self {
            rows: vec![],
            left: PackedLeft::default(),
            columns: Packed::empty(precision),
        }
    }
}

thread_local! {
    static STORAGE: Cell<Option<Storage>> = const { Cell::new(None) };
}

impl Storage {
    /// This thread's.
    fn take(precision: Precision) -> Self {
        let kept = STORAGE.take().filter(|s| s.precision() == precision);
        kept.unwrap_or_else(|| Self {
            prefix: Keys::empty(precision),
            own: Keys::empty(precision),
            scratch: Scratch {
                q: Gathered::empty(precision),
                d_o: Gathered::empty(precision),
                scores: vec![],
                d_scores: vec![],
                result: vec![],
                max: vec![],
                sums: vec![],
                deltas: vec![],
            },
        })
    }

    fn precision(&self) -> Precision {
        self.scratch.q.columns.precision()
    }

    /// Packs what a part sees.
    fn look<'a>(
        &'a mut self,
        side: Side,
        part: &'a Part,
        pack: fn(&mut Keys, Side, Range<usize>),
    ) -> (Sight<'a>, &'a mut Scratch) {
        if let Some(tokens) = &part.segment.prefix {
            pack(&mut self.prefix, side, tokens.clone());
        }
        pack(&mut self.own, side, part.own());
        let sight = Sight {
            part,
            prefix: &self.prefix,
            own: &self.own,
        };
        (sight, &mut self.scratch)
    }

    fn give_back(self) {
        STORAGE.set(Some(self));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{finite_difference, noise};

    fn heads() -> Heads {
        Heads::new(4, 2, 6)
    }

    fn run(
        layout: &Layout,
        heads: Heads,
        qkv: &[f32],
        sinks: Option<&[f32]>,
    ) -> (Vec<f32>, Vec<f32>) {
        let mut out = vec![f32::NAN; layout.tokens() * heads.q_width()];
        let mut lse = vec![f32::NAN; layout.tokens() * heads.query];
        let read = (qkv, sinks);
        forward(layout, heads, Precision::F32, read, &mut out, &mut lse);
        (out, lse)
    }

    /// Of four heads: above most scores, among them, below.
    const SINKS: [f32; 4] = [3.0, 0.5, -0.5, -4.0];

    /// Attention of one sequence, token by token, in float64.
    fn plain(heads: Heads, qkv: &[f32], sinks: Option<&[f32]>) -> Vec<f64> {
        let (width, dim) = (heads.qkv_width(), heads.dim);
        let tokens = qkv.len() / width;
        let mut out = vec![0.0; tokens * heads.q_width()];
        for t in 0..tokens {
            for head in 0..heads.query {
                let kv = head / heads.group();
                let first = (t + 1).saturating_sub(heads.window.unwrap_or(usize::MAX));
                let score = |s: usize| -> f64 {
                    let (q, k) = (
                        &qkv[t * width + head * dim..],
                        &qkv[s * width + heads.k_at(kv)..],
                    );
                    let score = (0..dim).map(|i| q[i] as f64 * k[i] as f64).sum::<f64>();
                    let score = score / (dim as f64).sqrt();
                    let capped = |cap: f32| cap as f64 * (score / cap as f64).tanh();
                    heads.cap.map_or(score, capped)
                };
                let weights: Vec<f64> = (first..=t).map(|s| score(s).exp()).collect();
                let sink = sinks.map_or(0.0, |sinks| f64::from(sinks[head]).exp());
                let total: f64 = weights.iter().sum::<f64>() + sink;
                for (w, s) in weights.iter().zip(first..) {
                    for i in 0..dim {
                        out[t * heads.q_width() + head * dim + i] +=
                            w / total * qkv[s * width + heads.v_at(kv) + i] as f64;
                    }
                }
            }
        }
        out
    }

    fn assert_close(ours: &[f32], exact: &[f64]) {
        assert_eq!(ours.len(), exact.len());
        for (x, y) in ours.iter().zip(exact) {
            assert!((*x as f64 - y).abs() < 1e-5, "{x} is not {y}");
        }
    }

    #[test]
    fn shared_prompts_give_what_whole_sequences_give() {
        for (window, cap, sinks) in [
            (None, None, None),
            (Some(5), None, None),
            (Some(90), Some(0.8), None),
            (None, Some(3.0), None),
            (None, None, Some(&SINKS[..])),
            (Some(90), Some(0.8), Some(&SINKS)),
        ] {
            let heads = Heads {
                window,
                cap,
                ..heads()
            };
            let (prompt, branches) = (70, [1, 100, 33]);
            let mut layout = Layout::default();
            layout.push(3, &[]);
            layout.push(prompt, &branches);
            let qkv = noise(layout.tokens() * heads.qkv_width(), 1)
                .iter()
                .map(|x| 2.0 * x)
                .collect::<Vec<_>>();
            let (out, _) = run(&layout, heads, &qkv, sinks);
            for segment in &layout.segments()[2..] {
                let rows = |width: usize, all: &[f32]| {
                    [
                        &all[3 * width..(3 + prompt) * width],
                        &all[segment.tokens.start * width..segment.tokens.end * width],
                    ]
                    .concat()
                };
                assert_close(
                    &rows(heads.q_width(), &out),
                    &plain(heads, &rows(heads.qkv_width(), &qkv), sinks),
                );
            }
        }
    }

    #[test]
    fn gradient_agrees_with_finite_differences() {
        for (window, cap, sinks) in [
            (None, None, None),
            (Some(3), None, None),
            (None, Some(0.4), None),
            (Some(3), None, Some(&SINKS[..])),
        ] {
            let heads = Heads {
                window,
                cap,
                ..heads()
            };
            let mut layout = Layout::default();
            layout.push(4, &[3, 2]);
            layout.push(2, &[]);
            let qkv = noise(layout.tokens() * heads.qkv_width(), 1);
            let d_out = noise(layout.tokens() * heads.q_width(), 2);
            let (out, lse) = run(&layout, heads, &qkv, sinks);
            let mut d_qkv = vec![0.0; qkv.len()];
            let f32 = Precision::F32;
            backward(&layout, heads, f32, (&qkv, &out, &lse), &d_out, &mut d_qkv);
            let loss = |qkv: &[f32], sinks: Option<&[f32]>| {
                let (out, _) = run(&layout, heads, qkv, sinks);
                out.iter().zip(&d_out).map(|(o, d)| (o * d) as f64).sum()
            };
            finite_difference(&qkv, &d_qkv, |qkv| loss(qkv, sinks));
            if let Some(sinks) = sinks {
                let mut d_sinks = [0.0; 4];
                sinks_backward(heads, sinks, (&out, &lse), &d_out, &mut d_sinks);
                finite_difference(sinks, &d_sinks, |sinks| loss(&qkv, Some(sinks)));
            }
        }
    }

    #[test]
    fn long_blocks_have_the_gradients_of_unshared_sequences() {
        let heads = heads();
        let (prompt, len) = (80, 130);
        let mut shared = Layout::default();
        shared.push(prompt, &[len]);
        let mut whole = Layout::default();
        whole.push(prompt + len, &[]);
        let qkv = noise(shared.tokens() * heads.qkv_width(), 1);
        let d_out = noise(shared.tokens() * heads.q_width(), 2);
        let gradient = |layout: &Layout| {
            let (out, lse) = run(layout, heads, &qkv, None);
            let mut d_qkv = vec![0.0; qkv.len()];
            let f32 = Precision::F32;
            backward(layout, heads, f32, (&qkv, &out, &lse), &d_out, &mut d_qkv);
            d_qkv
        };
        for (a, b) in gradient(&shared).iter().zip(&gradient(&whole)) {
            assert!((a - b).abs() < 1e-5);
        }
    }

    /// Of each segment the parts follow one another without gaps, whatever its length and its prompt's.
    #[test]
    fn parts_cover_every_query_once() {
        let mut layout = Layout::default();
        for (root, branches) in [
            (0, vec![0, 1]),
            (3000, vec![700, 64, 10]),
            (70_000, vec![10, 200]),
        ] {
            layout.push(root, &branches);
        }
        let parts: Vec<_> = parts(layout.segments()).collect();
        let mut tokens = 0;
        for part in &parts {
            assert_eq!(part.segment.tokens.start + part.queries.start, tokens);
            assert!(part.queries.start.is_multiple_of(BLOCK) && !part.queries.is_empty());
            tokens += part.queries.len();
        }
        assert_eq!(tokens, layout.tokens());
        let of = |i: usize| {
            parts
                .iter()
                .filter(|p| p.segment == &layout.segments()[i])
                .count()
        };
        assert_eq!((of(3), of(4), of(8), of(9)), (8, 8, 1, 4));
    }

    #[test]
    fn bfloat16_is_float32_but_for_its_rounding() {
        let heads = heads();
        let mut layout = Layout::default();
        layout.push(81, &[130, 7]);
        let qkv = noise(layout.tokens() * heads.qkv_width(), 1);
        let d_out = noise(layout.tokens() * heads.q_width(), 2);
        let run = |precision| {
            let mut out = vec![0.0; layout.tokens() * heads.q_width()];
            let mut lse = vec![0.0; layout.tokens() * heads.query];
            let read = (&qkv[..], None);
            forward(&layout, heads, precision, read, &mut out, &mut lse);
            let mut d_qkv = vec![0.0; qkv.len()];
            backward(
                &layout,
                heads,
                precision,
                (&qkv, &out, &lse),
                &d_out,
                &mut d_qkv,
            );
            (out, d_qkv)
        };
        let (exact, rounded) = (run(Precision::F32), run(Precision::Bf16));
        // Errors of 2⁻⁹ a factor, over sums of some dozen terms.
        for (exact, rounded) in [(exact.0, rounded.0), (exact.1, rounded.1)] {
            let norm = |x: &[f32]| x.iter().map(|x| (x * x) as f64).sum::<f64>().sqrt();
            let difference: Vec<f32> = exact.iter().zip(&rounded).map(|(a, b)| a - b).collect();
            let relative = norm(&difference) / norm(&exact);
            assert!((1e-5..5e-3).contains(&relative), "{relative}");
        }
    }
}
