//! The rule itself, for some columns of a value head's memory: they do not depend on each other, so that a strip of them
//! stays in the first cache from token to token.

use super::Shape;
use crate::kernels::isa::multiversion;
use crate::kernels::shared::Shared;
use crate::kernels::{copy, fit};
use std::ops::Range;

/// Columns of a strip.
pub(super) const LANES: usize = 32;

type Lanes = [f32; LANES];

/// A strip of a value head, and the rows that it reads.
#[derive(Clone, Copy)]
pub(super) struct Strip<'a> {
    pub shape: Shape,
    /// The value head.
    pub head: usize,
    /// Which of its strips.
    pub number: usize,
    /// `[T, qkv_width]`: queries and keys of length 1 (queries over √key_dim), values.
    pub qkv: &'a [f32],
    /// `[T, 2·value_heads]`: decays, then rates.
    pub gates: &'a [f32],
}

impl Strip<'_> {
    fn row(&self, token: usize, at: usize, len: usize) -> &[f32] {
        &self.qkv[token * self.shape.qkv_width() + at..][..len]
    }

    fn query(&self, token: usize) -> &[f32] {
        let key_head = self.head / self.shape.group();
        self.row(token, key_head * self.shape.key_dim, self.shape.key_dim)
    }

    fn key(&self, token: usize) -> &[f32] {
        let at = self.shape.key_width() + self.head / self.shape.group() * self.shape.key_dim;
        self.row(token, at, self.shape.key_dim)
    }

    /// The columns of a row of values, `[T, value_width]`, that are this strip's.
    pub fn columns(&self) -> Range<usize> {
        let (dim, first) = (self.shape.value_dim, self.number * LANES);
        let start = self.head * dim + first;
        start..start + (dim - first).min(LANES)
    }

    fn value(&self, token: usize) -> Lanes {
        let Range { start, end } = self.columns();
        lanes(self.row(token, 2 * self.shape.key_width() + start, end - start))
    }

    /// What is left of the memory, and how much of what it lacks is learnt.
    fn gates(&self, token: usize) -> [f32; 2] {
        let row = &self.gates[token * 2 * self.shape.value_heads..];
        [row[self.head], row[self.shape.value_heads + self.head]]
    }
}

/// A strip may be wider than what is left of a head.
fn lanes(values: &[f32]) -> Lanes {
    let mut lanes = [0.0; LANES];
    lanes[..values.len()].copy_from_slice(values);
    lanes
}

#[inline(always)]
fn fused<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// Σ x·row over the rows of a strip: two sums side by side, since each waits for the one before.
#[inline(always)]
fn weighted_sum<const FMA: bool>(rows: &[f32], x: &[f32]) -> Lanes {
    let (mut even, mut odd) = ([0.0; LANES], [0.0; LANES]);
    for (rows, x) in rows.chunks_exact(2 * LANES).zip(x.chunks_exact(2)) {
        for j in 0..LANES {
            even[j] = fused::<FMA>(x[0], rows[j], even[j]);
            odd[j] = fused::<FMA>(x[1], rows[LANES + j], odd[j]);
        }
    }
    std::array::from_fn(|j| even[j] + odd[j])
}

/// The sum of all lanes, pair by pair: one order whatever the vectors' width.
#[inline(always)]
fn sum(mut lanes: Lanes) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for j in 0..width {
            lanes[j] += lanes[j + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// What a token learnt, what it had lacked, and what it then reads.
struct Step {
    moment: Moment,
    read: Lanes,
}

/// Carries a strip's memory `[key_dim, LANES]` over a token.
#[inline(always)]
fn advance<const FMA: bool>(strip: Strip, token: usize, memory: &mut [f32]) -> Step {
    let [decay, rate] = strip.gates(token);
    let (query, key) = (strip.query(token), strip.key(token));
    let known = weighted_sum::<FMA>(memory, key);
    let value = strip.value(token);
    let (mut lack, mut update) = ([0.0; LANES], [0.0; LANES]);
    for j in 0..LANES {
        lack[j] = value[j] - decay * known[j];
        update[j] = rate * lack[j];
    }
    let (mut even, mut odd) = ([0.0; LANES], [0.0; LANES]);
    let rows = memory.chunks_exact_mut(2 * LANES);
    for ((rows, k), q) in rows.zip(key.chunks_exact(2)).zip(query.chunks_exact(2)) {
        let (first, second) = rows.split_at_mut(LANES);
        for j in 0..LANES {
            first[j] = fused::<FMA>(k[0], update[j], decay * first[j]);
            even[j] = fused::<FMA>(q[0], first[j], even[j]);
            second[j] = fused::<FMA>(k[1], update[j], decay * second[j]);
            odd[j] = fused::<FMA>(q[1], second[j], odd[j]);
        }
    }
    Step {
        moment: Moment { update, lack },
        read: std::array::from_fn(|j| even[j] + odd[j]),
    }
}

multiversion! {
    /// Carries a strip's memory over some tokens; `read` `[tokens, LANES]` is what each finds in it.
    pub fn scan(strip: Strip<'_>, tokens: Range<usize>, memory: &mut [f32], read: &mut [f32]) {
        for (token, read) in tokens.zip(read.chunks_exact_mut(LANES)) {
            read.copy_from_slice(&advance::<FMA>(strip, token, memory).read);
        }
    }
}

/// As [`scan`], with what is found at its place in `read` `[T, value_width]`; `room` is storage.
///
/// # Safety
/// No other task may be at these tokens' columns of the strip.
pub(super) unsafe fn scan_to(
    strip: Strip,
    tokens: Range<usize>,
    memory: &mut [f32],
    read: &Shared,
    room: &mut Vec<f32>,
) {
    fit(room, tokens.len() * LANES);
    scan(strip, tokens.clone(), memory, room);
    let columns = strip.columns();
    for (token, found) in tokens.zip(room.chunks_exact(LANES)) {
        let at = token * strip.shape.value_width() + columns.start;
        // SAFETY: the caller's promise.
        let target = unsafe { read.slice(at, columns.len()) };
        target.copy_from_slice(&found[..columns.len()]);
    }
}

/// What the backward pass wants to know of a token: what it learnt, and what it had lacked.
#[derive(Clone, Copy)]
pub(super) struct Moment {
    update: Lanes,
    lack: Lanes,
}

/// Storage of a backward pass over a segment; kept, since fresh pages cost more than what is done in them.
#[derive(Default)]
pub(super) struct Trace {
    memory: Vec<f32>,
    /// The memory at the beginning of each run of tokens.
    starts: Vec<f32>,
    /// The faded memory of each token of one run,
    faded: Vec<f32>,
    /// and the rest.
    moments: Vec<Moment>,
    unread: Vec<f32>,
}

/// Tokens of a run: the memory is kept at the beginning of each, and made again for all tokens of one at a time.
const RUN: usize = 16;

/// Where a strip's backward pass over a segment adds, or writes, gradients.
pub(super) struct Gradients<'a> {
    /// Of queries and keys, `[tokens, key_dim]`, added.
    pub query: &'a mut [f32],
    pub key: &'a mut [f32],
    /// Of values, `[tokens, LANES]`, written.
    pub value: &'a mut [f32],
    /// Of the decay's logarithm and of the rate, `[tokens, 2]`, added.
    pub gates: &'a mut [f32],
}

impl Trace {
    /// Carries the gradient of a strip's memory after `tokens`, `d_memory`, back to that before them, `start`, given those of
    /// what the tokens read, `d_read` `[T, value_width]`.
    pub fn backward(
        &mut self,
        strip: Strip,
        tokens: Range<usize>,
        start: &[f32],
        d_read: &[f32],
        d_memory: &mut [f32],
        mut gradients: Gradients,
    ) {
        let len = start.len();
        let runs = || tokens.clone().step_by(RUN);
        copy(start, &mut self.memory);
        fit(&mut self.unread, RUN * LANES);
        fit(&mut self.starts, runs().len() * len);
        for (first, kept) in runs().zip(self.starts.chunks_exact_mut(len)) {
            kept.copy_from_slice(&self.memory);
            let run = first..(first + RUN).min(tokens.end);
            scan(strip, run, &mut self.memory, &mut self.unread);
        }
        fit(&mut self.faded, RUN * len);
        for (first, start) in runs().zip(self.starts.chunks_exact(len)).rev() {
            let run = first..(first + RUN).min(tokens.end);
            self.memory.copy_from_slice(start);
            self.moments.clear();
            let (faded, moments) = (&mut self.faded, &mut self.moments);
            remember(strip, run.clone(), &mut self.memory, faded, moments);
            for token in run.rev() {
                let faded = &faded[(token - first) * len..][..len];
                let made = (faded, &moments[token - first]);
                let d_read = &d_read[token * strip.shape.value_width()..][strip.columns()];
                let place = (token, token - tokens.start);
                back(strip, place, made, &lanes(d_read), d_memory, &mut gradients);
            }
        }
    }
}

multiversion! {
    /// As [`scan`], with every token's faded memory and moment kept in place of what is read.
    pub fn remember(
        strip: Strip<'_>,
        tokens: Range<usize>,
        memory: &mut [f32],
        faded: &mut [f32],
        moments: &mut Vec<Moment>,
    ) {
        for (token, faded) in tokens.zip(faded.chunks_exact_mut(memory.len())) {
            let [decay, _] = strip.gates(token);
            faded.iter_mut().zip(&*memory).for_each(|(faded, m)| *faded = decay * m);
            moments.push(advance::<FMA>(strip, token, memory).moment);
        }
    }
}

multiversion! {
    /// One token back. With D the faded memory, u = β·(v − Dᵀk) and S = D + k·uᵀ, of which o = Sᵀq is read:
    /// dS gains q·doᵀ; du = dSᵀk; dq = S·do; dβ = du·(v − Dᵀk); dv = β·du; dk = dS·u − D·dv; dD = dS − k·dvᵀ; of ln a it is
    /// Σ dD∘D; and the memory before gets a·dD.
    pub fn back(
        strip: Strip<'_>,
        place: (usize, usize),
        made: (&[f32], &Moment),
        d_read: &Lanes,
        d_memory: &mut [f32],
        gradients: &mut Gradients<'_>,
    ) {
        let ((token, at), (all_faded, moment)) = (place, made);
        let [decay, rate] = strip.gates(token);
        let (query, key) = (strip.query(token), strip.key(token));
        let dim = key.len();
        let (d_query, d_key) = (&mut gradients.query[at * dim..][..dim], &mut gradients.key[at * dim..][..dim]);
        let read: Lanes = std::array::from_fn(|j| moment.update[j] * d_read[j]);
        let read = sum(read);
        let mut d_update = [0.0f32; LANES];
        let faded = all_faded.chunks_exact(LANES);
        let rows = d_memory.chunks_exact_mut(LANES).zip(faded);
        for ((((row, faded), &q), &k), d_query) in rows.zip(query).zip(key).zip(d_query) {
            let mut found = [0.0f32; LANES];
            for j in 0..LANES {
                row[j] = fused::<FMA>(q, d_read[j], row[j]);
                d_update[j] = fused::<FMA>(k, row[j], d_update[j]);
                found[j] = faded[j] * d_read[j];
            }
            *d_query += fused::<FMA>(k, read, sum(found));
        }
        let mut d_value = [0.0f32; LANES];
        let mut d_rate = [0.0f32; LANES];
        for j in 0..LANES {
            d_value[j] = rate * d_update[j];
            d_rate[j] = d_update[j] * moment.lack[j];
        }
        let mut d_decay = [0.0f32; LANES];
        let faded = all_faded.chunks_exact(LANES);
        for (((row, faded), &k), d_key) in d_memory.chunks_exact_mut(LANES).zip(faded).zip(key).zip(d_key) {
            let mut felt = [0.0f32; LANES];
            for j in 0..LANES {
                felt[j] = fused::<FMA>(row[j], moment.update[j], -(faded[j] * d_value[j]));
                let d_faded = fused::<FMA>(-k, d_value[j], row[j]);
                d_decay[j] = fused::<FMA>(d_faded, faded[j], d_decay[j]);
                row[j] = decay * d_faded;
            }
            *d_key += sum(felt);
        }
        gradients.value[at * LANES..][..LANES].copy_from_slice(&d_value);
        gradients.gates[2 * at] += sum(d_decay);
        gradients.gates[2 * at + 1] += sum(d_rate);
    }
}
