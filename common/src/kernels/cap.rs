//! Soft caps: x becomes c·tanh(x / c), which keeps scores or logits within ±c (Gemma 2, arXiv 2408.00118).

use super::isa::multiversion;
use super::softmax::exp;

/// c·tanh(x / c), as c·(1 − 2 / (1 + e^(2x/c))): off by some 1e-7·c, as float32 is where the cap is near.
#[inline(always)]
pub fn capped<const FMA: bool>(x: f32, cap: f32) -> f32 {
    cap - 2.0 * cap / (1.0 + exp::<FMA>(2.0 / cap * x))
}

/// Caps every element of a row, where there is a cap; NaN stays NaN.
#[inline]
pub fn bound(row: &mut [f32], cap: Option<f32>) {
    if let Some(cap) = cap {
        bound_by(row, cap);
    }
}

multiversion! {
    /// With this cap.
    pub fn bound_by(row: &mut [f32], cap: f32) {
        row.iter_mut().for_each(|x| *x = capped::<FMA>(*x, cap));
    }
}

/// What a backward pass takes of a cap: 1 / c, or 0 where there is none.
pub fn inverse(cap: Option<f32>) -> f32 {
    cap.map_or(0.0, |cap| 1.0 / cap)
}

/// The slope of a cap, 1 − (y / c)², where it gave y; `inverse` is [`inverse`], so that the slope is 1 where there is none.
#[inline(always)]
pub fn slope(capped: f32, inverse: f32) -> f32 {
    let share = capped * inverse;
    1.0 - share * share
}

#[cfg(target_arch = "x86_64")]
pub(super) mod x86 {
    //! The same for kernels that hold their numbers in vectors.
    use super::super::softmax::x86::exp;
    use std::arch::x86_64::*;

    /// As [`capped`](super::capped).
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn capped(x: __m512, cap: f32) -> __m512 {
        let doubled = _mm512_mul_ps(x, _mm512_set1_ps(2.0 / cap));
        // The exponential has a range; beyond it is the cap itself. (NaN as the second stays.)
        let e = exp(_mm512_min_ps(_mm512_set1_ps(40.0), doubled));
        let below = _mm512_div_ps(
            _mm512_set1_ps(2.0 * cap),
            _mm512_add_ps(_mm512_set1_ps(1.0), e),
        );
        _mm512_sub_ps(_mm512_set1_ps(cap), below)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Small, large and beyond the exponential's range; the cap's own size last.
    const ROW: [f32; 16] = [
        0.0, 1e-3, -0.5, 3.0, -7.0, 29.0, -31.0, 55.0, -120.0, 900.0, -900.0, 1e4, -1e6, 3e38,
        -3e38, 30.0,
    ];

    fn assert_capped(found: &[f32], cap: f32) {
        for (x, y) in ROW.iter().zip(found) {
            let exact = f64::from(cap) * (f64::from(*x) / f64::from(cap)).tanh();
            let error = (f64::from(*y) - exact).abs();
            assert!(error < 3e-7 * f64::from(cap), "{x}: {y}, not {exact}");
        }
    }

    #[test]
    fn caps_are_the_hyperbolic_tangents() {
        for cap in [30.0, 50.0, 0.7] {
            let mut row = ROW;
            bound(&mut row, Some(cap));
            assert_capped(&row, cap);
            let mut row = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
            bound(&mut row, Some(cap));
            assert!(row[0].is_nan() && row[1..] == [cap, -cap], "{row:?}");
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn vectors_cap_alike() {
        use crate::kernels::isa::Isa;
        use std::arch::x86_64::*;
        if !matches!(Isa::current(), Isa::Avx512 { .. }) {
            return eprintln!("no AVX-512: the vectors' cap is not tested here");
        }
        #[target_feature(enable = "avx512f")]
        fn row(row: [f32; 16]) -> [f32; 16] {
            // SAFETY: sixteen words, read and written.
            unsafe {
                let mut out = [0.0; 16];
                _mm512_storeu_ps(
                    out.as_mut_ptr(),
                    x86::capped(_mm512_loadu_ps(row.as_ptr()), 30.0),
                );
                out
            }
        }
        // SAFETY: asked above.
        assert_capped(&unsafe { row(ROW) }, 30.0);
        // SAFETY: as above.
        assert!(unsafe { row([f32::NAN; 16]) }.iter().all(|y| y.is_nan()));
    }

    #[test]
    fn slopes_are_the_derivatives() {
        let cap = 5.0f64;
        for x in [-20.0f64, -4.0, -0.1, 0.0, 2.0, 7.0] {
            let at = |x: f64| cap * (x / cap).tanh();
            let exact = (at(x + 1e-5) - at(x - 1e-5)) / 2e-5;
            let found = slope(at(x) as f32, inverse(Some(cap as f32)));
            assert!(
                (f64::from(found) - exact).abs() < 1e-5,
                "{x}: {found}, {exact}"
            );
        }
        assert_eq!(slope(123.0, inverse(None)), 1.0);
    }
}
