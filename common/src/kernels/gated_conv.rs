//! A short convolution between two gates, as LFM2 has it in the place of attention (`Lfm2ShortConv` in transformers): y = c ∘ conv(b ∘ x), of the
//! fused projection `[b | c | x]`; forward and backward, over a packed, prefix-shared batch.

use super::isa::multiversion;
use super::layout::Layout;
use super::taps::{self, PastRows, Taps};
use super::{rows, team};
use anyhow::{Result, ensure};

/// A row of the fused projection is `[b | c | x]`, each of so many channels; the convolution sees `kernel` tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    pub channels: usize,
    pub kernel: usize,
}

impl Shape {
    /// The bounds that the arithmetic relies on.
    ///
    /// # Errors
    /// A size beyond them, by its name in a config.
    pub fn check(self) -> Result<()> {
        ensure!(
            (1..=64).contains(&self.kernel),
            "conv_L_cache is {}, outside 1 to 64",
            self.kernel
        );
        Ok(())
    }

    /// Elements of a row of the fused projection.
    pub fn input_width(self) -> usize {
        3 * self.channels
    }
}

/// `[b | c | x]` of a row.
fn parts(row: &[f32]) -> [&[f32]; 3] {
    let width = row.len() / 3;
    [&row[..width], &row[width..2 * width], &row[2 * width..]]
}

multiversion! {
    /// out = x·y, channel by channel.
    pub fn multiply(x: &[f32], y: &[f32], out: &mut [f32]) {
        for ((out, &x), &y) in out.iter_mut().zip(x).zip(y) {
            *out = x * y;
        }
    }
}

/// b ∘ x of every token, `[T, channels]`.
fn gated(shape: Shape, raw: &[f32]) -> Vec<f32> {
    let mut all = vec![0.0; raw.len() / 3];
    rows(&mut all, shape.channels, |first, part| {
        let raw = raw[first * shape.input_width()..].chunks_exact(shape.input_width());
        for (out, row) in part.chunks_exact_mut(shape.channels).zip(raw) {
            let [b, _, x] = parts(row);
            multiply(b, x, out);
        }
    });
    all
}

/// `out` `[T, channels]`, given the fused projection `raw` `[T, 3·channels]` and the weight `[kernel, channels]`.
pub fn forward(layout: &Layout, shape: Shape, weight: &[f32], raw: &[f32], out: &mut [f32]) {
    let (taps, width) = (Taps::new(layout, shape.kernel), shape.channels);
    let gated = gated(shape, raw);
    rows(out, width, |first, part| {
        for (out, token) in part.chunks_exact_mut(width).zip(first..) {
            let seen = taps
                .of(token)
                .map(|tap| tap.map(|t| &gated[t * width..][..width]));
            taps::convolve(weight, seen, out);
            let [_, c, _] = parts(&raw[token * 3 * width..][..3 * width]);
            out.iter_mut().zip(c).for_each(|(out, c)| *out *= c);
        }
    });
}

/// Tokens whose gradients of the weight are added up together: at fixed places, so that the sum has one order.
const TOKENS: usize = 64;

/// Writes the gradient of the fused projection, `d_raw`, given that of the output, `d_out`, which becomes that of the
/// convolution; gives that of the weight.
pub fn backward(
    layout: &Layout,
    shape: Shape,
    weight: &[f32],
    raw: &[f32],
    d_out: &mut [f32],
    d_raw: &mut [f32],
) -> Vec<f32> {
    let (taps, width) = (Taps::new(layout, shape.kernel), shape.channels);
    let gated = gated(shape, raw);
    let raw_row = |token: usize| parts(&raw[token * 3 * width..][..3 * width]);
    let seen = |token: usize| {
        taps.of(token)
            .map(|tap| tap.map(|t| &gated[t * width..][..width]))
    };
    let tasks = (d_out.chunks_mut(TOKENS * width)).zip(d_raw.chunks_mut(TOKENS * 3 * width));
    let mut sums = vec![vec![0.0; weight.len()]; tasks.len()];
    team::items(
        tasks.zip(&mut sums).collect(),
        |i, ((d_out, d_raw), sum)| {
            let mut convolved = vec![0.0; width];
            let each = d_out
                .chunks_exact_mut(width)
                .zip(d_raw.chunks_exact_mut(3 * width));
            for ((d_out, d_raw), token) in each.zip(i * TOKENS..) {
                taps::convolve(weight, seen(token), &mut convolved);
                multiply(d_out, &convolved, &mut d_raw[width..2 * width]);
                let [_, c, _] = raw_row(token);
                d_out.iter_mut().zip(c).for_each(|(d, c)| *d *= c);
                taps::add_to_weight(d_out, seen(token), sum);
            }
        },
    );
    let (followers, d_convolved) = (taps.followers(), &*d_out);
    rows(d_raw, 3 * width, |first, part| {
        let mut d_gated = vec![0.0; width];
        for (d_raw, token) in part.chunks_exact_mut(3 * width).zip(first..) {
            taps::gather(weight, &followers[token], d_convolved, &mut d_gated);
            let [b, _, x] = raw_row(token);
            multiply(&d_gated, x, &mut d_raw[..width]);
            multiply(&d_gated, b, &mut d_raw[2 * width..]);
        }
    });
    let mut total = vec![0.0; weight.len()];
    for sum in sums {
        total.iter_mut().zip(sum).for_each(|(total, x)| *total += x);
    }
    total
}

/// What a sequence leaves behind in a layer.
#[derive(Clone)]
pub struct Memory {
    shape: Shape,
    past: PastRows,
}

impl Memory {
    /// Nothing yet.
    pub fn new(shape: Shape) -> Self {
        let past = PastRows::default();
        Self { shape, past }
    }

    /// The bytes that it takes, however long the sequence.
    pub fn bytes(shape: Shape) -> usize {
        shape.kernel * shape.channels * size_of::<f32>()
    }

    /// Goes on over some tokens: `raw` `[n, 3·channels]` is their fused projection, `out` `[n, channels]` what they give.
    pub fn read(&mut self, weight: &[f32], raw: &[f32], out: &mut [f32]) {
        let rows = raw.chunks_exact(self.shape.input_width());
        for (row, out) in rows.zip(out.chunks_exact_mut(self.shape.channels)) {
            let [b, c, x] = parts(row);
            let mut gated = vec![0.0; b.len()];
            multiply(b, x, &mut gated);
            taps::convolve(weight, self.past.push(gated, self.shape.kernel), out);
            out.iter_mut().zip(c).for_each(|(out, c)| *out *= c);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{finite_difference, noise};

    const SHAPE: Shape = Shape {
        channels: 5,
        kernel: 3,
    };

    fn layout() -> Layout {
        let mut layout = Layout::default();
        layout.push(4, &[3, 1]);
        layout.push(1, &[2]);
        layout
    }

    fn run(layout: &Layout, weight: &[f32], raw: &[f32]) -> Vec<f32> {
        let mut out = vec![0.0; layout.tokens() * SHAPE.channels];
        forward(layout, SHAPE, weight, raw, &mut out);
        out
    }

    #[test]
    fn it_is_what_it_says_and_a_memory_goes_on_where_it_was() {
        let (layout, weight) = (layout(), noise(15, 1));
        let raw = noise(layout.tokens() * SHAPE.input_width(), 2);
        let found = run(&layout, &weight, &raw);
        for segment in layout.segments() {
            let tokens: Vec<usize> = (segment.prefix.iter().cloned().flatten())
                .chain(segment.tokens.clone())
                .collect();
            let at = |t: usize, part: usize, c: usize| {
                f64::from(raw[(tokens[t] * 3 + part) * SHAPE.channels + c])
            };
            let mut memory = Memory::new(SHAPE);
            for (t, token) in tokens.iter().enumerate() {
                let mut out = [0.0; 5];
                let raw = &raw[token * SHAPE.input_width()..][..SHAPE.input_width()];
                memory.read(&weight, raw, &mut out);
                let expected = &found[token * SHAPE.channels..][..SHAPE.channels];
                assert_eq!(out, expected);
                for (c, found) in out.into_iter().enumerate() {
                    let tap = |by: usize| f64::from(weight[(2 - by) * SHAPE.channels + c]);
                    let sum: f64 = (0..=t.min(2))
                        .map(|by| tap(by) * at(t - by, 0, c) * at(t - by, 2, c))
                        .sum();
                    assert!((f64::from(found) - sum * at(t, 1, c)).abs() < 1e-6);
                }
            }
        }
    }

    #[test]
    fn gradients_agree_with_differences() {
        let (layout, weight) = (layout(), noise(15, 1));
        let raw = noise(layout.tokens() * SHAPE.input_width(), 2);
        let dy = noise(layout.tokens() * SHAPE.channels, 3);
        let mut d_raw = vec![f32::NAN; raw.len()]; // written whole
        let d_weight = backward(&layout, SHAPE, &weight, &raw, &mut dy.clone(), &mut d_raw);
        let loss = |weight: &[f32], raw: &[f32]| -> f64 {
            let out = run(&layout, weight, raw);
            out.iter().zip(&dy).map(|(y, d)| f64::from(y * d)).sum()
        };
        finite_difference(&raw, &d_raw, |raw| loss(&weight, raw));
        finite_difference(&weight, &d_weight, |weight| loss(weight, &raw));
    }
}
