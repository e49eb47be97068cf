//! Causal attention over a packed, prefix-shared batch, forward and backward.
//!
//! A batch is a row of segments without padding. A root segment (a prompt) is followed by its branches (responses):
//! a branch's tokens see the whole root and their own past, not their siblings. So K responses cost one pass over the
//! prompt, and the gradients of all of them meet in it. Scores are formed per block of queries, never for the batch.

use super::gemm::{Left, Mat, Packed, Panels, Precision, Threads, Write, matmul};
use super::softmax;
use super::team;
use std::cell::Cell;
use std::ops::Range;

/// A run of tokens in the batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Its tokens' rows in the batch.
    pub tokens: Range<usize>,
    /// The position of its first token in its sequence.
    pub position: usize,
    /// The tokens of the root that it continues; none for a root.
    pub prefix: Option<Range<usize>>,
}

/// The segments of a batch, in the order of their tokens, which they cover without gaps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    segments: Vec<Segment>,
}

impl Layout {
    /// Appends a prompt of `root` tokens and one branch per entry of `branches`.
    pub fn push(&mut self, root: usize, branches: &[usize]) {
        let start = self.tokens();
        let prefix = start..start + root;
        self.segments.push(Segment {
            tokens: prefix.clone(),
            position: 0,
            prefix: None,
        });
        for &len in branches {
            let start = self.tokens();
            let tokens = start..start + len;
            self.segments.push(Segment {
                tokens,
                position: root,
                prefix: Some(prefix.clone()),
            });
        }
    }

    /// The segments.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// The number of tokens of the batch.
    pub fn tokens(&self) -> usize {
        self.segments.last().map_or(0, |s| s.tokens.end)
    }

    /// The position of every token in its sequence.
    pub fn positions(&self) -> impl Iterator<Item = usize> {
        self.segments
            .iter()
            .flat_map(|s| (0..s.tokens.len()).map(|i| s.position + i))
    }

    /// The largest position plus one.
    pub fn longest(&self) -> usize {
        self.segments
            .iter()
            .map(|s| s.position + s.tokens.len())
            .max()
            .unwrap_or(0)
    }

    /// A root and its branches, group by group.
    fn groups(&self) -> Vec<&[Segment]> {
        self.segments
            .chunk_by(|_, next| next.prefix.is_some())
            .collect()
    }
}

/// The heads of a layer. A row of the fused projection is `[q: heads·dim | k: kv_heads·dim | v: kv_heads·dim]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Heads {
    /// Query heads.
    pub query: usize,
    /// Key and value heads; each serves `query / kv` query heads.
    pub kv: usize,
    /// Elements per head.
    pub dim: usize,
    /// How many positions back a token sees, itself included; none for all.
    pub window: Option<usize>,
}

impl Heads {
    /// Elements of a row of q.
    pub fn q_width(&self) -> usize {
        self.query * self.dim
    }

    /// Elements of a row of k, and of v.
    pub fn kv_width(&self) -> usize {
        self.kv * self.dim
    }

    /// Elements of a row of the fused projection.
    pub fn qkv_width(&self) -> usize {
        self.q_width() + 2 * self.kv_width()
    }

    /// Query heads per key/value head.
    pub fn group(&self) -> usize {
        self.query / self.kv
    }

    /// 1/√dim.
    pub fn scale(&self) -> f32 {
        1.0 / (self.dim as f32).sqrt()
    }

    fn k_at(&self, kv_head: usize) -> usize {
        self.q_width() + kv_head * self.dim
    }

    fn v_at(&self, kv_head: usize) -> usize {
        self.q_width() + self.kv_width() + kv_head * self.dim
    }
}

/// Queries are taken in blocks of so many tokens (times the query heads that share a key head).
const BLOCK: usize = 64;

/// Attention of every token: `qkv` is `[T, qkv_width]` after rotation, `out` `[T, q_width]`, `lse` `[T, query]` receives
/// the log-sum-exp of each score row for the backward pass. The products' operands have the given precision.
pub fn forward(
    layout: &Layout,
    heads: Heads,
    precision: Precision,
    qkv: &[f32],
    out: &mut [f32],
    lse: &mut [f32],
) {
    assert_eq!(qkv.len(), layout.tokens() * heads.qkv_width());
    let (out, lse) = (Shared::new(out), Shared::new(lse));
    let tasks: Vec<_> = layout
        .segments
        .iter()
        .flat_map(|s| (0..heads.kv).map(move |h| (s, h)))
        .collect();
    team::items(tasks, |_, (segment, kv_head)| {
        let side = Side {
            heads,
            kv_head,
            qkv,
        };
        let mut storage = Storage::take(precision);
        let Storage {
            prefix,
            own,
            scratch,
        } = &mut storage;
        let prefix = segment.prefix.as_ref().map(|tokens| {
            prefix.set_for_forward(side, tokens.clone());
            &*prefix
        });
        own.set_for_forward(side, segment.tokens.clone());
        for block in blocks(segment) {
            let view = View {
                segment,
                block,
                prefix,
                own,
            };
            view.gather(
                side,
                qkv,
                0,
                heads.qkv_width(),
                heads.scale(),
                &mut scratch.q,
            );
            view.scores(side, scratch);
            let rows = view.rows(heads);
            let Scratch {
                scores,
                result,
                log_sums,
                ..
            } = &mut *scratch;
            result.resize(rows * heads.dim, 0.0);
            log_sums.resize(rows, 0.0);
            for (r, row) in scores.chunks_exact_mut(view.columns()).enumerate() {
                let visible = view.visible(heads, r);
                row[..visible.start].fill(0.0);
                row[visible.end..].fill(0.0);
                let row = &mut row[visible];
                let max = softmax::max(row);
                let sum = softmax::exp_in_place(row, max);
                log_sums[r] = max + sum.ln();
                row.iter_mut().for_each(|p| *p /= sum);
            }
            view.weighted_values(heads, scores, result);
            for r in 0..rows {
                let (token, head) = view.token_and_head(side, r);
                // SAFETY: this task alone writes this segment's rows of this key head's query heads.
                unsafe {
                    out.slice(token * heads.q_width() + head * heads.dim, heads.dim)
                        .copy_from_slice(&result[r * heads.dim..][..heads.dim]);
                    lse.slice(token * heads.query + head, 1)[0] = log_sums[r];
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
/// (FlashAttention-2, algorithm 2). One task per group and key head, so that the sums over branches and query heads
/// have one order and no two tasks share a target.
pub fn backward(
    layout: &Layout,
    heads: Heads,
    precision: Precision,
    (qkv, out, lse): (&[f32], &[f32], &[f32]),
    d_out: &[f32],
    d_qkv: &mut [f32],
) {
    let d_qkv = Shared::new(d_qkv);
    let groups = layout.groups();
    let tasks: Vec<_> = groups
        .iter()
        .flat_map(|g| (0..heads.kv).map(move |h| (*g, h)))
        .collect();
    team::items(tasks, |_, (group, kv_head)| {
        let side = Side {
            heads,
            kv_head,
            qkv,
        };
        let mut storage = Storage::take(precision);
        let Storage {
            prefix: root,
            own,
            scratch,
        } = &mut storage;
        let given = (out, lse, d_out);
        root.set_for_backward(side, group[0].tokens.clone());
        for segment in &group[1..] {
            own.set_for_backward(side, segment.tokens.clone());
            backward_segment(side, segment, (Some(root), own), given, scratch, &d_qkv);
            own.scatter(side, &d_qkv);
        }
        backward_segment(side, &group[0], (None, root), given, scratch, &d_qkv);
        root.scatter(side, &d_qkv);
        storage.give_back();
    });
}

fn backward_segment(
    side: Side,
    segment: &Segment,
    (mut prefix, own): (Option<&mut Keys>, &mut Keys),
    (out, lse, d_out): (&[f32], &[f32], &[f32]),
    scratch: &mut Scratch,
    d_qkv: &Shared,
) {
    let heads = side.heads;
    for block in blocks(segment) {
        let view = View {
            segment,
            block: block.clone(),
            prefix: prefix.as_deref(),
            own,
        };
        let (rows, columns, seen) = (view.rows(heads), view.columns(), view.prefix_len());
        view.gather(
            side,
            side.qkv,
            0,
            heads.qkv_width(),
            heads.scale(),
            &mut scratch.q,
        );
        view.scores(side, scratch);
        let Scratch {
            q,
            scores,
            d_o,
            d_scores,
            d_q,
            q_columns,
            d_o_columns,
            ..
        } = &mut *scratch;
        view.gather(side, d_out, 0, heads.q_width(), 1.0, d_o);
        d_scores.resize(rows * columns, 0.0);
        view.products(d_o, heads.dim, |keys| &keys.v_rows, d_scores);
        for r in 0..rows {
            let (token, head) = view.token_and_head(side, r);
            let log_sum = lse[token * heads.query + head];
            let o = &out[token * heads.q_width() + head * heads.dim..][..heads.dim];
            let delta = softmax::dot(o, &d_o[r * heads.dim..][..heads.dim]);
            let visible = view.visible(heads, r);
            let (p, d) = (
                &mut scores[r * columns..][..columns],
                &mut d_scores[r * columns..][..columns],
            );
            for hidden in [0..visible.start, visible.end..columns] {
                p[hidden.clone()].fill(0.0);
                d[hidden].fill(0.0);
            }
            let (p, d) = (&mut p[visible.clone()], &mut d[visible]);
            softmax::exp_in_place(p, log_sum);
            d.iter_mut()
                .zip(p)
                .for_each(|(d, p)| *d = *p * (*d - delta));
        }
        d_q.clear();
        d_q.resize(rows * heads.dim, 0.0);
        let own_columns = view.own_len();
        let add = |a: Mat, b: Panels, out: &mut [f32]| {
            matmul(Left::Rows(a), b, out, heads.dim, Write::Add, Threads::One);
        };
        if let Some(prefix) = view.prefix {
            add(
                Mat::strided(d_scores, rows, seen, columns),
                prefix.k_columns.panels(),
                d_q,
            );
        }
        add(
            Mat::strided(&d_scores[seen..], rows, own_columns, columns),
            view.own.k_columns.sum_range(0..own_columns),
            d_q,
        );
        for r in 0..rows {
            let (token, head) = view.token_and_head(side, r);
            // SAFETY: this task alone writes this group's rows of this key head's query heads.
            let target =
                unsafe { d_qkv.slice(token * heads.qkv_width() + head * heads.dim, heads.dim) };
            target
                .iter_mut()
                .zip(&d_q[r * heads.dim..])
                .for_each(|(t, d)| *t += d * heads.scale());
        }
        q_columns.set_columns(Mat::new(q, rows, heads.dim));
        d_o_columns.set_columns(Mat::new(d_o, rows, heads.dim));
        let collect = |keys: &mut Keys, first: usize, len: usize| {
            for (weights, right, out) in [
                (&*scores, &*d_o_columns, &mut keys.d_v),
                (&*d_scores, &*q_columns, &mut keys.d_k),
            ] {
                let left = Left::Columns(Mat::strided(&weights[first..], rows, len, columns));
                matmul(
                    left,
                    right.panels(),
                    out,
                    heads.dim,
                    Write::Add,
                    Threads::One,
                );
            }
        };
        if let Some(prefix) = prefix.as_deref_mut() {
            collect(prefix, 0, seen);
        }
        collect(own, seen, own_columns);
    }
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

/// The packed keys and values of one segment and head, and their gradients.
struct Keys {
    tokens: Range<usize>,
    /// For Q·Kᵀ.
    k_rows: Packed,
    /// Forward: for P·V.
    v_columns: Packed,
    /// Backward: for dO·Vᵀ and dS·K.
    v_rows: Packed,
    k_columns: Packed,
    d_k: Vec<f32>,
    d_v: Vec<f32>,
}

impl Keys {
    fn empty(precision: Precision) -> Self {
        Self {
            tokens: 0..0,
            k_rows: Packed::empty(precision),
            v_columns: Packed::empty(precision),
            v_rows: Packed::empty(precision),
            k_columns: Packed::empty(precision),
            d_k: vec![],
            d_v: vec![],
        }
    }

    fn set_for_forward(&mut self, side: Side, tokens: Range<usize>) {
        self.k_rows.set_rows(side.keys(tokens.clone()));
        self.v_columns.set_columns(side.values(tokens.clone()));
        self.tokens = tokens;
    }

    fn set_for_backward(&mut self, side: Side, tokens: Range<usize>) {
        self.k_rows.set_rows(side.keys(tokens.clone()));
        self.v_rows.set_rows(side.values(tokens.clone()));
        self.k_columns.set_columns(side.keys(tokens.clone()));
        for gradient in [&mut self.d_k, &mut self.d_v] {
            gradient.clear();
            gradient.resize(tokens.len() * side.heads.dim, 0.0);
        }
        self.tokens = tokens;
    }

    /// Adds the gradients of keys and values to their places.
    fn scatter(&self, side: Side, d_qkv: &Shared) {
        let heads = side.heads;
        for (i, token) in self.tokens.clone().enumerate() {
            for (at, gradient) in [
                (heads.k_at(side.kv_head), &self.d_k),
                (heads.v_at(side.kv_head), &self.d_v),
            ] {
                // SAFETY: one task owns this group's rows of this key head.
                let target = unsafe { d_qkv.slice(token * heads.qkv_width() + at, heads.dim) };
                target
                    .iter_mut()
                    .zip(&gradient[i * heads.dim..])
                    .for_each(|(t, g)| *t += g);
            }
        }
    }
}

/// A block of queries of one segment, and the keys that it sees: the prefix's, then its own up to its last token.
/// Row r of it is query head r / tokens of the key head's group, token r % tokens of the block.
struct View<'a> {
    segment: &'a Segment,
    block: Range<usize>,
    prefix: Option<&'a Keys>,
    own: &'a Keys,
}

/// What a task works in; kept from one to the next.
struct Storage {
    prefix: Keys,
    own: Keys,
    scratch: Scratch,
}

struct Scratch {
    q: Vec<f32>,
    scores: Vec<f32>,
    result: Vec<f32>,
    log_sums: Vec<f32>,
    d_o: Vec<f32>,
    d_scores: Vec<f32>,
    d_q: Vec<f32>,
    q_columns: Packed,
    d_o_columns: Packed,
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
                q: vec![],
                scores: vec![],
                result: vec![],
                log_sums: vec![],
                d_o: vec![],
                d_scores: vec![],
                d_q: vec![],
                q_columns: Packed::empty(precision),
                d_o_columns: Packed::empty(precision),
            },
        })
    }

    fn precision(&self) -> Precision {
        self.scratch.q_columns.precision()
    }

    fn give_back(self) {
        STORAGE.set(Some(self));
    }
}

fn blocks(segment: &Segment) -> impl Iterator<Item = Range<usize>> {
    let len = segment.tokens.len();
    (0..len)
        .step_by(BLOCK)
        .map(move |start| start..(start + BLOCK).min(len))
}

impl View<'_> {
    fn rows(&self, heads: Heads) -> usize {
        heads.group() * self.block.len()
    }

    fn prefix_len(&self) -> usize {
        self.prefix.map_or(0, |p| p.tokens.len())
    }

    fn own_len(&self) -> usize {
        self.block.end
    }

    fn columns(&self) -> usize {
        self.prefix_len() + self.own_len()
    }

    fn token_and_head(&self, side: Side, r: usize) -> (usize, usize) {
        let (g, t) = (r / self.block.len(), r % self.block.len());
        (
            self.segment.tokens.start + self.block.start + t,
            side.kv_head * side.heads.group() + g,
        )
    }

    /// The columns that row r may see.
    fn visible(&self, heads: Heads, r: usize) -> Range<usize> {
        let end = self.prefix_len() + self.block.start + r % self.block.len() + 1;
        // Columns are positions: a root starts at 0, and a branch where its root ends.
        end.saturating_sub(heads.window.unwrap_or(usize::MAX))..end
    }

    /// Collects the block's query rows out of `[T, width]`, times `scale`.
    fn gather(
        &self,
        side: Side,
        from: &[f32],
        at: usize,
        width: usize,
        scale: f32,
        out: &mut Vec<f32>,
    ) {
        let dim = side.heads.dim;
        out.clear();
        for r in 0..self.rows(side.heads) {
            let (token, head) = self.token_and_head(side, r);
            out.extend(
                from[token * width + at + head * dim..][..dim]
                    .iter()
                    .map(|x| x * scale),
            );
        }
    }

    /// S = Q·Kᵀ over all columns.
    fn scores(&self, side: Side, scratch: &mut Scratch) {
        scratch
            .scores
            .resize(self.rows(side.heads) * self.columns(), 0.0);
        self.products(
            &scratch.q,
            side.heads.dim,
            |keys| &keys.k_rows,
            &mut scratch.scores,
        );
    }

    /// `left` `[rows, dim]` times the chosen operand of the prefix and of the own keys, side by side in `out`.
    fn products(
        &self,
        left: &[f32],
        dim: usize,
        operand: impl Fn(&Keys) -> &Packed,
        out: &mut [f32],
    ) {
        let (columns, seen) = (self.columns(), self.prefix_len());
        let left = Left::Rows(Mat::new(left, left.len() / dim, dim));
        if let Some(prefix) = self.prefix {
            matmul(
                left,
                operand(prefix).panels(),
                out,
                columns,
                Write::Set,
                Threads::One,
            );
        }
        let own = operand(self.own).panel_range(0, self.own_len());
        matmul(
            left,
            own,
            &mut out[seen..],
            columns,
            Write::Set,
            Threads::One,
        );
    }

    /// O = P·V.
    fn weighted_values(&self, heads: Heads, weights: &[f32], out: &mut [f32]) {
        let (rows, columns, seen) = (self.rows(heads), self.columns(), self.prefix_len());
        if let Some(prefix) = self.prefix {
            let left = Left::Rows(Mat::strided(weights, rows, seen, columns));
            matmul(
                left,
                prefix.v_columns.panels(),
                out,
                heads.dim,
                Write::Set,
                Threads::One,
            );
        }
        let left = Left::Rows(Mat::strided(
            &weights[seen..],
            rows,
            self.own_len(),
            columns,
        ));
        let own = self.own.v_columns.sum_range(0..self.own_len());
        let write = match self.prefix {
            Some(_) => Write::Add,
            None => Write::Set,
        };
        matmul(left, own, out, heads.dim, write, Threads::One);
    }
}

/// A buffer that parallel tasks write in disjoint places.
struct Shared {
    data: *mut f32,
    len: usize,
}

// SAFETY: `slice` is unsafe; its callers promise that no two tasks touch the same place.
unsafe impl Sync for Shared {}

impl Shared {
    fn new(data: &mut [f32]) -> Self {
        Self {
            data: data.as_mut_ptr(),
            len: data.len(),
        }
    }

    /// # Safety
    /// No other reference to these elements may be alive.
    #[allow(clippy::mut_from_ref)]
    unsafe fn slice(&self, at: usize, len: usize) -> &mut [f32] {
        assert!(at + len <= self.len);
        // SAFETY: in bounds; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(at), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{finite_difference, noise};

    const HEADS: Heads = Heads {
        query: 4,
        kv: 2,
        dim: 6,
        window: None,
    };

    fn run(layout: &Layout, heads: Heads, qkv: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let mut out = vec![f32::NAN; layout.tokens() * heads.q_width()];
        let mut lse = vec![f32::NAN; layout.tokens() * heads.query];
        forward(layout, heads, Precision::F32, qkv, &mut out, &mut lse);
        (out, lse)
    }

    /// Attention of one sequence, token by token, in float64.
    fn plain(heads: Heads, qkv: &[f32]) -> Vec<f64> {
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
                    (0..dim).map(|i| q[i] as f64 * k[i] as f64).sum::<f64>() / (dim as f64).sqrt()
                };
                let weights: Vec<f64> = (first..=t).map(|s| score(s).exp()).collect();
                let total: f64 = weights.iter().sum();
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
        for window in [None, Some(5), Some(90)] {
            let heads = Heads { window, ..HEADS };
            let (prompt, branches) = (70, [1, 100, 33]);
            let mut layout = Layout::default();
            layout.push(3, &[]);
            layout.push(prompt, &branches);
            let qkv = noise(layout.tokens() * heads.qkv_width(), 1)
                .iter()
                .map(|x| 2.0 * x)
                .collect::<Vec<_>>();
            let (out, _) = run(&layout, heads, &qkv);
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
                    &plain(heads, &rows(heads.qkv_width(), &qkv)),
                );
            }
        }
    }

    #[test]
    fn gradient_agrees_with_finite_differences() {
        for window in [None, Some(3)] {
            let heads = Heads { window, ..HEADS };
            let mut layout = Layout::default();
            layout.push(4, &[3, 2]);
            layout.push(2, &[]);
            let qkv = noise(layout.tokens() * heads.qkv_width(), 1);
            let d_out = noise(layout.tokens() * heads.q_width(), 2);
            let (out, lse) = run(&layout, heads, &qkv);
            let mut d_qkv = vec![0.0; qkv.len()];
            let f32 = Precision::F32;
            backward(&layout, heads, f32, (&qkv, &out, &lse), &d_out, &mut d_qkv);
            finite_difference(&qkv, &d_qkv, |qkv| {
                run(&layout, heads, qkv)
                    .0
                    .iter()
                    .zip(&d_out)
                    .map(|(o, d)| (o * d) as f64)
                    .sum()
            });
        }
    }

    #[test]
    fn long_blocks_have_the_gradients_of_unshared_sequences() {
        let heads = HEADS;
        let (prompt, len) = (80, 130);
        let mut shared = Layout::default();
        shared.push(prompt, &[len]);
        let mut whole = Layout::default();
        whole.push(prompt + len, &[]);
        let qkv = noise(shared.tokens() * heads.qkv_width(), 1);
        let d_out = noise(shared.tokens() * heads.q_width(), 2);
        let gradient = |layout: &Layout| {
            let (out, lse) = run(layout, heads, &qkv);
            let mut d_qkv = vec![0.0; qkv.len()];
            let f32 = Precision::F32;
            backward(layout, heads, f32, (&qkv, &out, &lse), &d_out, &mut d_qkv);
            d_qkv
        };
        for (a, b) in gradient(&shared).iter().zip(&gradient(&whole)) {
            assert!((a - b).abs() < 1e-5);
        }
    }

    #[test]
    fn bfloat16_is_float32_but_for_its_rounding() {
        let heads = HEADS;
        let mut layout = Layout::default();
        layout.push(81, &[130, 7]);
        let qkv = noise(layout.tokens() * heads.qkv_width(), 1);
        let d_out = noise(layout.tokens() * heads.q_width(), 2);
        let run = |precision| {
            let mut out = vec![0.0; layout.tokens() * heads.q_width()];
            let mut lse = vec![0.0; layout.tokens() * heads.query];
            forward(&layout, heads, precision, &qkv, &mut out, &mut lse);
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
