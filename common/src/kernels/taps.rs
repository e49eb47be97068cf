//! Short causal convolutions over a packed, prefix-shared batch: which tokens a token sees, and the sums over them, channel by
//! channel. A weight is `[kernel, channels]`, the oldest token's first.

use super::isa::multiversion;
use super::layout::{Layout, Segment};

multiversion! {
    /// sum += x·y, channel by channel.
    pub fn add_products(x: &[f32], y: &[f32], sum: &mut [f32]) {
        for ((sum, &x), &y) in sum.iter_mut().zip(x).zip(y) {
            *sum += x * y;
        }
    }
}

/// The token that one of a segment's tokens sees so many tokens back; None before the first of its sequence.
fn back(segment: &Segment, at: usize, by: usize) -> Option<usize> {
    match (at.checked_sub(by), &segment.prefix) {
        (Some(own), _) => Some(segment.tokens.start + own),
        (None, Some(prefix)) => (prefix.end + at)
            .checked_sub(by)
            .filter(|t| *t >= prefix.start),
        (None, None) => None,
    }
}

/// For every token of a batch, what it sees.
pub(super) struct Taps<'a> {
    places: Vec<(&'a Segment, usize)>,
    kernel: usize,
}

impl<'a> Taps<'a> {
    pub fn new(layout: &'a Layout, kernel: usize) -> Self {
        let segments = layout.segments().iter();
        let places = segments
            .flat_map(|segment| (0..segment.tokens.len()).map(move |at| (segment, at)))
            .collect();
        Self { places, kernel }
    }

    /// The tokens that one sees, itself the last, None before the first of its sequence.
    pub fn of(&self, token: usize) -> impl Iterator<Item = Option<usize>> + use<'a> {
        let (segment, at) = self.places[token];
        (0..self.kernel).rev().map(move |by| back(segment, at, by))
    }

    /// For every token, the tokens that see it, and which of their weights it then has.
    pub fn followers(&self) -> Vec<Vec<(usize, usize)>> {
        let mut all = vec![vec![]; self.places.len()];
        for token in 0..self.places.len() {
            for (tap, seen) in self.of(token).enumerate() {
                if let Some(seen) = seen {
                    all[seen].push((token, tap));
                }
            }
        }
        all
    }
}

/// Σ weight·row over the rows that a token sees.
pub(super) fn convolve<'t>(
    weight: &[f32],
    seen: impl Iterator<Item = Option<&'t [f32]>>,
    out: &mut [f32],
) {
    out.fill(0.0);
    for (weight, row) in weight.chunks_exact(out.len()).zip(seen) {
        if let Some(row) = row {
            add_products(weight, &row[..out.len()], out);
        }
    }
}

/// The gradient of a token's row, that of which `followers` see: Σ weight·d over their convolutions, `d` `[T, channels]`.
pub(super) fn gather(weight: &[f32], followers: &[(usize, usize)], d: &[f32], out: &mut [f32]) {
    let width = out.len();
    out.fill(0.0);
    for &(token, tap) in followers {
        add_products(
            &weight[tap * width..][..width],
            &d[token * width..][..width],
            out,
        );
    }
}

/// Adds the gradient of the weight, given that of a token's convolution and the rows that it sees.
pub(super) fn add_to_weight<'t>(
    d: &[f32],
    seen: impl Iterator<Item = Option<&'t [f32]>>,
    d_weight: &mut [f32],
) {
    for (d_weight, row) in d_weight.chunks_exact_mut(d.len()).zip(seen) {
        if let Some(row) = row {
            add_products(d, &row[..d.len()], d_weight);
        }
    }
}

/// The rows of a sequence that its next token's convolution will see, the oldest first.
#[derive(Clone, Default)]
pub(super) struct PastRows(Vec<Vec<f32>>);

impl PastRows {
    /// Takes a token's row; gives what it sees, itself the last.
    pub fn push(&mut self, row: Vec<f32>, kernel: usize) -> impl Iterator<Item = Option<&[f32]>> {
        if self.0.len() == kernel {
            self.0.remove(0);
        }
        self.0.push(row);
        let missing = kernel - self.0.len();
        std::iter::repeat_n(None, missing).chain(self.0.iter().map(|row| Some(&row[..])))
    }
}
