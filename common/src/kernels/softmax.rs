//! Exponentials and log-sum-exp over rows.

use super::cap;
use super::isa::multiversion;

/// Lanes that sums and maxima run in; fixed, so that every instruction set adds in the same order.
const LANES: usize = 16;

/// eˣ to about one unit in the last place; 0 below −87, infinity above 88.7; NaN stays NaN.
///
/// 2ⁿ·e^r with n = round(x / ln 2) and a polynomial for |r| ≤ ln 2 / 2 (Taylor to the seventh power: its error there,
/// 5e-9 relative, is under float32's). Branch-free, so that loops over it vectorise.
#[inline(always)]
pub fn exp<const FMA: bool>(x: f32) -> f32 {
    let (p, n) = reduced::<FMA>(x);
    // 2ⁿ in two factors, so that n = 128 does not overflow before the product does.
    let half = n >> 1;
    let y = p * power(half) * power(n.wrapping_sub(half));
    let y = if x < -87.0 { 0.0 } else { y };
    if x > 88.72 { f32::INFINITY } else { y }
}

/// As [`exp`], quicker, for x up to 88: logits less their maximum.
#[inline(always)]
fn exp_low<const FMA: bool>(x: f32) -> f32 {
    let (p, n) = reduced::<FMA>(x);
    let y = p * power(n);
    if x < -87.0 { 0.0 } else { y }
}

/// 1.5·2²³: adding it rounds to an integer in the low bits.
pub(super) const MAGIC: f32 = 12_582_912.0;

/// −ln 2 in two parts, of which the first has few bits, so that its multiples are exact.
const MINUS_LN_2: [f32; 2] = [-0.693_359_4, 2.121_944_4e-4];

/// The terms of e^r below the seventh power.
const TAYLOR: [f32; 7] = [
    1.0 / 720.0,
    1.0 / 120.0,
    1.0 / 24.0,
    1.0 / 6.0,
    0.5,
    1.0,
    1.0,
];

/// (p, n) with eˣ = p·2ⁿ; anything where n is no exponent.
#[inline(always)]
fn reduced<const FMA: bool>(x: f32) -> (f32, i32) {
    let fused = |a: f32, b: f32, c: f32| if FMA { a.mul_add(b, c) } else { a * b + c };
    let shifted = fused(x, std::f32::consts::LOG2_E, MAGIC);
    let n = shifted - MAGIC;
    let r = fused(n, MINUS_LN_2[0], x);
    let r = fused(n, MINUS_LN_2[1], r);
    let p = (TAYLOR.iter()).fold(1.0 / 5040.0, |p, &term| fused(p, r, term));
    let n = shifted.to_bits().wrapping_sub(MAGIC.to_bits()) as i32;
    (p, n)
}

/// 2ⁿ.
#[inline(always)]
fn power(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

multiversion! {
    /// The largest element; −∞ for an empty row. NaN is ignored here (the sum that follows keeps it).
    pub fn max(row: &[f32]) -> f32 {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let mut chunks = row.chunks_exact(LANES);
        for chunk in &mut chunks {
            for (lane, &x) in lanes.iter_mut().zip(chunk) {
                *lane = if x > *lane { x } else { *lane };
            }
        }
        chunks.remainder().iter().chain(&lanes).fold(f32::NEG_INFINITY, |m, &x| if x > m { x } else { m })
    }
}

multiversion! {
    /// Σ exp((x − max)·scale).
    pub fn sum_exp(row: &[f32], max: f32, scale: f32) -> f32 {
        let mut lanes = [0.0f32; LANES];
        let mut chunks = row.chunks_exact(LANES);
        for chunk in &mut chunks {
            for (lane, &x) in lanes.iter_mut().zip(chunk) {
                *lane += exp_low::<FMA>((x - max) * scale);
            }
        }
        for (lane, &x) in lanes.iter_mut().zip(chunks.remainder()) {
            *lane += exp_low::<FMA>((x - max) * scale);
        }
        sum(lanes)
    }
}

multiversion! {
    /// x ← exp(x − max), returning the sum.
    pub fn exp_in_place(row: &mut [f32], max: f32) -> f32 {
        let mut lanes = [0.0f32; LANES];
        let mut chunks = row.chunks_exact_mut(LANES);
        for chunk in &mut chunks {
            for (lane, x) in lanes.iter_mut().zip(chunk) {
                *x = exp_low::<FMA>(*x - max);
                *lane += *x;
            }
        }
        for (lane, x) in lanes.iter_mut().zip(chunks.into_remainder()) {
            *x = exp_low::<FMA>(*x - max);
            *lane += *x;
        }
        sum(lanes)
    }
}

multiversion! {
    /// S in `p` becomes P = exp(S − log_sum), dP in `d` becomes dS = P∘(dP − delta), times the slope of the scores' cap.
    pub fn backward(p: &mut [f32], d: &mut [f32], log_sum: f32, delta: f32, inverse_cap: f32) {
        for (p, d) in p.iter_mut().zip(d) {
            let slope = cap::slope(*p, inverse_cap);
            *p = exp_low::<FMA>(*p - log_sum);
            *d = *p * (*d - delta) * slope;
        }
    }
}

multiversion! {
    /// Logits become their gradient where that of the target's log-prob is `d`: d·(onehot − exp(l − log_sum)), times the
    /// slope of their cap. `target` is the target's place, if it is among them.
    pub fn log_prob_backward(row: &mut [f32], log_sum: f32, d: f32, target: Option<usize>, inverse_cap: f32) {
        let own = target.map(|at| (at, d * cap::slope(row[at], inverse_cap)));
        for l in row.iter_mut() {
            let slope = cap::slope(*l, inverse_cap);
            *l = exp_low::<FMA>(*l - log_sum) * -d * slope;
        }
        if let Some((at, own)) = own {
            row[at] += own;
        }
    }
}

multiversion! {
    /// Σ a·b.
    pub fn dot(a: &[f32], b: &[f32]) -> f32 {
        let mut lanes = [0.0f32; LANES];
        let (mut a, mut b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
        for (a, b) in (&mut a).zip(&mut b) {
            for ((lane, &x), &y) in lanes.iter_mut().zip(a).zip(b) {
                *lane += x * y;
            }
        }
        for ((lane, &x), &y) in lanes.iter_mut().zip(a.remainder()).zip(b.remainder()) {
            *lane += x * y;
        }
        sum(lanes)
    }
}

/// All lanes as one, joined pairwise; `N` is a power of two.
#[inline(always)]
pub(super) fn fold<const N: usize>(mut lanes: [f32; N], join: impl Fn(f32, f32) -> f32) -> f32 {
    let mut width = N / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] = join(lanes[i], lanes[i + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// The sum of all lanes.
#[inline(always)]
fn sum(lanes: [f32; LANES]) -> f32 {
    fold(lanes, |a, b| a + b)
}

#[cfg(target_arch = "x86_64")]
pub(super) mod x86 {
    //! The exponential for kernels that hold their numbers in vectors.
    use std::arch::x86_64::*;

    /// As [`exp`](super::exp), for x up to 88: where that gives 0 this gives what float32 has below its normal numbers.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn exp(x: __m512) -> __m512 {
        let x = _mm512_max_ps(_mm512_set1_ps(-200.0), x); // −∞ would become NaN below; NaN as the second stays
        let n =
            _mm512_roundscale_ps::<0>(_mm512_mul_ps(x, _mm512_set1_ps(std::f32::consts::LOG2_E)));
        let r = _mm512_fmadd_ps(n, _mm512_set1_ps(super::MINUS_LN_2[0]), x);
        let r = _mm512_fmadd_ps(n, _mm512_set1_ps(super::MINUS_LN_2[1]), r);
        let mut p = _mm512_set1_ps(1.0 / 5040.0);
        for term in super::TAYLOR {
            p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(term));
        }
        _mm512_scalef_ps(p, n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_right_to_float32() {
        fn check(exp: fn(f32) -> f32, up_to: i32) {
            for i in -8700..up_to {
                let x = i as f32 * 0.01;
                let (ours, exact) = (exp(x) as f64, (x as f64).exp());
                assert!(
                    ((ours - exact) / exact).abs() < 2e-7,
                    "exp({x}) = {ours}, not {exact}"
                );
            }
            assert_eq!(exp(f32::NEG_INFINITY), 0.0);
            assert_eq!(exp(-1e9), 0.0);
            assert!(exp(f32::NAN).is_nan());
        }
        check(exp::<false>, 8872);
        check(exp::<true>, 8872);
        check(exp_low::<false>, 8800);
        check(exp_low::<true>, 8800);
        assert_eq!(exp::<true>(1e9), f32::INFINITY);
    }

    #[test]
    fn sums_and_maxima_cover_every_element() {
        for len in [0, 1, 15, 16, 17, 100] {
            let row: Vec<f32> = (0..len).map(|i| ((i * 37) % 11) as f32 * 0.3).collect();
            let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(max(&row), top);
            let expected: f64 = row.iter().map(|&x| ((x - 1.0) as f64 * 0.5).exp()).sum();
            assert!((sum_exp(&row, 1.0, 0.5) as f64 - expected).abs() <= 1e-6 * expected);
            let mut copy = row.clone();
            let sum = exp_in_place(&mut copy, 1.0) as f64;
            assert!(
                (sum - row.iter().map(|&x| ((x - 1.0) as f64).exp()).sum::<f64>()).abs()
                    <= 1e-6 * sum.max(1.0)
            );
            let product: f64 = row.iter().map(|&x| x as f64 * x as f64).sum();
            assert!((dot(&row, &row) as f64 - product).abs() <= 1e-5 * product.max(1.0));
        }
    }
}
