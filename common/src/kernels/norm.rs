//! RMSNorm: y = x / √(mean(x²) + ε) · w, forward and backward; of rows as they are, or less their mean, which is LayerNorm
//! without a bias.

use super::isa::multiversion;
use super::softmax::dot;
use std::borrow::Cow;

/// How rows are normalised.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Kind {
    pub eps: f32,
    /// Their means are subtracted first.
    pub centred: bool,
}

impl Kind {
    /// One row as it is normalised: itself, or that less its mean.
    fn of(self, x: &[f32]) -> Cow<'_, [f32]> {
        let mut x = Cow::Borrowed(x);
        if self.centred {
            centre(x.to_mut());
        }
        x
    }

    /// Normalises one row.
    fn row(self, x: &[f32], weight: &[f32], out: &mut [f32]) {
        if !self.centred {
            return row(x, weight, self.eps, out);
        }
        out.copy_from_slice(x);
        self.row_in_place(out, weight);
    }

    /// Normalises one row where it lies.
    pub fn row_in_place(self, x: &mut [f32], weight: &[f32]) {
        if self.centred {
            centre(x);
        }
        row_in_place(x, weight, self.eps);
    }

    /// The gradient of one row: see [`backward_row`].
    pub fn backward_row(
        self,
        x: &[f32],
        weight: &[f32],
        dy: &[f32],
        dx: &mut [f32],
        dw: &mut [f32],
    ) {
        if !self.centred {
            return backward_row(x, weight, self.eps, dy, dx, dw);
        }
        let mut d_centred = vec![0.0; x.len()];
        backward_row(&self.of(x), weight, self.eps, dy, &mut d_centred, dw);
        centre(&mut d_centred); // each element is a part of all means
        dx.iter_mut().zip(&d_centred).for_each(|(dx, d)| *dx += d);
    }
}

/// Normalises each row of `x` into `out`; rows are as long as `weight`.
pub fn forward(x: &[f32], weight: &[f32], kind: Kind, out: &mut [f32]) {
    super::rows(out, weight.len(), |first, out| {
        let x = &x[first * weight.len()..];
        for (x, out) in x
            .chunks_exact(weight.len())
            .zip(out.chunks_exact_mut(weight.len()))
        {
            kind.row(x, weight, out);
        }
    });
}

/// Adds each row of `x`, normalised, to that of `sum`.
pub fn forward_add(x: &[f32], weight: &[f32], kind: Kind, sum: &mut [f32]) {
    super::rows(sum, weight.len(), |first, sum| {
        let x = x[first * weight.len()..].chunks_exact(weight.len());
        for (x, sum) in x.zip(sum.chunks_exact_mut(weight.len())) {
            let x = kind.of(x);
            add_scaled_row(&x, weight, inverse_rms(&x, kind.eps), sum);
        }
    });
}

/// What writes row r of `x` `[T, width]`, normalised where there is a weight: an operand that is made row by row.
pub fn rows_of<'a>(
    x: &'a [f32],
    width: usize,
    weight: Option<&'a [f32]>,
    kind: Kind,
) -> impl Fn(usize, &mut [f32]) + Sync + 'a {
    move |r, out| {
        let x = &x[r * width..][..width];
        match weight {
            Some(weight) => kind.row(x, weight, out),
            None => out.copy_from_slice(x),
        }
    }
}

/// One row less its mean.
fn centre(x: &mut [f32]) {
    let mean = sum(x) / x.len() as f32;
    shift(x, mean);
}

multiversion! {
    pub fn sum(x: &[f32]) -> f32 {
        let mut lanes = [0.0f32; 16];
        let mut x = x.chunks_exact(16);
        for x in &mut x {
            for i in 0..16 {
                lanes[i] += x[i];
            }
        }
        x.remainder().iter().fold(lanes.iter().sum(), |sum, x| sum + x)
    }
}

multiversion! {
    pub fn shift(x: &mut [f32], by: f32) {
        for x in x {
            *x -= by;
        }
    }
}

/// 1 / √(mean(x²) + ε) of one row.
pub fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt()
}

/// Normalises one row.
pub fn row(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    scale_row(x, weight, inverse_rms(x, eps), out);
}

/// Normalises one row where it lies.
pub fn row_in_place(x: &mut [f32], weight: &[f32], eps: f32) {
    let scale = inverse_rms(x, eps);
    scale_in_place(x, weight, scale);
}

multiversion! {
    pub fn scale_in_place(x: &mut [f32], weight: &[f32], scale: f32) {
        for (x, &w) in x.iter_mut().zip(weight) {
            *x = *x * scale * w;
        }
    }
}

multiversion! {
    pub fn add_scaled_row(x: &[f32], weight: &[f32], scale: f32, sum: &mut [f32]) {
        for ((sum, &x), &w) in sum.iter_mut().zip(x).zip(weight) {
            *sum += x * scale * w;
        }
    }
}

multiversion! {
    pub fn scale_row(x: &[f32], weight: &[f32], scale: f32, out: &mut [f32]) {
        for ((out, &x), &w) in out.iter_mut().zip(x).zip(weight) {
            *out = x * scale * w;
        }
    }
}

/// The gradient of one row: adds ∂L/∂x to `dx`, and ∂L/∂w to `dw`.
///
/// With x̂ = x·s, s = 1/rms: dx = s·(g − x̂·mean(g·x̂)), g = dy·w; dw = dy·x̂.
pub fn backward_row(
    x: &[f32],
    weight: &[f32],
    eps: f32,
    dy: &[f32],
    dx: &mut [f32],
    dw: &mut [f32],
) {
    let scale = inverse_rms(x, eps);
    let mean = weighted_dot(x, weight, dy) * scale / x.len() as f32;
    apply(x, weight, dy, scale, mean, dx, dw);
}

multiversion! {
    pub fn weighted_dot(x: &[f32], weight: &[f32], dy: &[f32]) -> f32 {
        let mut lanes = [0.0f32; 16];
        let (mut x, mut w, mut d) = (x.chunks_exact(16), weight.chunks_exact(16), dy.chunks_exact(16));
        for ((x, w), d) in (&mut x).zip(&mut w).zip(&mut d) {
            for i in 0..16 {
                lanes[i] += x[i] * w[i] * d[i];
            }
        }
        let rest = x.remainder().iter().zip(w.remainder()).zip(d.remainder());
        rest.fold(lanes.iter().sum(), |sum, ((x, w), d)| sum + x * w * d)
    }
}

multiversion! {
    pub fn apply(x: &[f32], weight: &[f32], dy: &[f32], scale: f32, mean: f32, dx: &mut [f32], dw: &mut [f32]) {
        for ((((dx, dw), &x), &w), &dy) in dx.iter_mut().zip(dw).zip(x).zip(weight).zip(dy) {
            let normed = x * scale;
            *dx += scale * (dy * w - normed * mean);
            *dw += dy * normed;
        }
    }
}

/// The gradient of all rows: adds ∂L/∂x to `dx` and ∂L/∂w to `dw`. The rows are cut at fixed places, so that the sum
/// over rows has one order whatever the threads.
pub fn backward(x: &[f32], weight: &[f32], kind: Kind, dy: &[f32], dx: &mut [f32], dw: &mut [f32]) {
    const ROWS: usize = 64;
    let width = weight.len();
    let mut parts = vec![0.0; dx.len().div_ceil(ROWS * width) * width];
    let tasks = dx.chunks_mut(ROWS * width).zip(parts.chunks_mut(width));
    super::team::items(tasks.collect(), |i, (dx, dw)| {
        let at = i * ROWS * width;
        let rows = (x[at..].chunks_exact(width)).zip(dy[at..].chunks_exact(width));
        for (dx, (x, dy)) in dx.chunks_exact_mut(width).zip(rows) {
            kind.backward_row(x, weight, dy, dx, dw);
        }
    });
    for part in parts.chunks_exact(width) {
        dw.iter_mut().zip(part).for_each(|(dw, part)| *dw += part);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{finite_difference, noise};

    #[test]
    fn gradients_agree_with_finite_differences() {
        let (rows, width) = (3, 21);
        let (x, w, dy) = (
            noise(rows * width, 1),
            noise(width, 2),
            noise(rows * width, 3),
        );
        for centred in [false, true] {
            let kind = Kind { eps: 1e-5, centred };
            let loss = |x: &[f32], w: &[f32]| -> f64 {
                let mut y = vec![0.0; x.len()];
                forward(x, w, kind, &mut y);
                y.iter().zip(&dy).map(|(y, d)| (y * d) as f64).sum()
            };
            let (mut dx, mut dw) = (vec![0.0; x.len()], vec![0.0; w.len()]);
            backward(&x, &w, kind, &dy, &mut dx, &mut dw);
            finite_difference(&x, &dx, |x| loss(x, &w));
            finite_difference(&w, &dw, |w| loss(&x, w));
        }
    }

    #[test]
    fn centred_rows_have_no_mean_and_a_variance_of_one() {
        let (width, kind) = (37, |centred| Kind { eps: 0.0, centred });
        let x: Vec<f32> = noise(2 * width, 1).iter().map(|x| x + 3.0).collect();
        let ones = vec![1.0; width];
        let mut y = vec![0.0; x.len()];
        forward(&x, &ones, kind(true), &mut y);
        for row in y.chunks_exact(width) {
            let mean = row.iter().sum::<f32>() / width as f32;
            let variance = row.iter().map(|y| y * y).sum::<f32>() / width as f32;
            assert!(mean.abs() < 1e-6 && (variance - 1.0).abs() < 1e-5);
        }
        // What writes rows and what adds them agree, bit by bit.
        let write = rows_of(&x, width, Some(&ones), kind(true));
        let (mut row, mut sum) = (vec![0.0; width], vec![0.0; x.len()]);
        write(1, &mut row);
        forward_add(&x, &ones, kind(true), &mut sum);
        assert_eq!(row, y[width..]);
        assert_eq!(sum, y);
    }
}
