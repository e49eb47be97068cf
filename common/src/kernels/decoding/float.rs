//! Blocks whose words are those of products' operands: float32, or pairs of bfloat16.

use super::super::gemm::{Precision, words};
#[cfg(target_arch = "x86_64")]
use super::super::isa::Isa;
use super::super::isa::multiversion;
use super::super::softmax;
use super::{Block, Queries, soften, value_stride};

/// For at most [`MOST`](super::MOST) rows; [`super::see`] has held the sizes.
pub fn see(rows: Queries, block: Block, precision: Precision) {
    #[cfg(target_arch = "x86_64")]
    if let Isa::Avx512 { bf16 } = Isa::current() {
        let pairs = bf16 && precision == Precision::Bf16;
        // SAFETY: the instructions are there, and the caller has held what is read and written.
        unsafe {
            match (rows.max.len(), pairs) {
                (1, true) => x86::pairs::<1>(rows, block),
                (2, true) => x86::pairs::<2>(rows, block),
                (3, true) => x86::pairs::<3>(rows, block),
                (_, true) => x86::pairs::<4>(rows, block),
                (1, false) => x86::words::<1>(rows, block),
                (2, false) => x86::words::<2>(rows, block),
                (3, false) => x86::words::<3>(rows, block),
                (_, false) => x86::words::<4>(rows, block),
            }
        }
        return;
    }
    debug_assert_eq!(words(block.dim, precision), block.dim);
    plain(rows, block);
}

multiversion! {
    /// The same in plain Rust, row by row, for words that hold one element.
    pub fn plain(rows: Queries, block: Block) {
        const WIDTH: usize = 16;
        let (dim, stride) = (block.dim, value_stride(block.dim));
        for (r, query) in rows.words.chunks_exact(dim).enumerate() {
            let mut scores = [0.0f32; WIDTH];
            if block.panel {
                for (&q, keys) in query.iter().zip(block.keys.chunks_exact(WIDTH)) {
                    for (score, &key) in scores.iter_mut().zip(keys) {
                        *score = if FMA { q.mul_add(key, *score) } else { q * key + *score };
                    }
                }
            } else {
                let keys = block.keys.chunks_exact(dim).take(block.tokens);
                (scores.iter_mut().zip(keys)).for_each(|(score, key)| *score = softmax::dot(query, key));
            }
            let factor = soften::<FMA>(&mut scores, rows.cap, rows.visible[r], &mut rows.max[r], &mut rows.sum[r]);
            let weighted = &mut rows.weighted[r * stride..][..stride];
            weighted.iter_mut().for_each(|w| *w *= factor);
            for (&score, values) in scores.iter().zip(block.values.chunks_exact(stride)).take(block.tokens) {
                for (w, &value) in weighted.iter_mut().zip(values) {
                    *w = if FMA { score.mul_add(value, *w) } else { score * value + *w };
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::super::x86::{WIDTH, fetch_share, soften};
    use super::{Block, Queries, value_stride};
    use crate::kernels::isa::x86::{fetch, mask, multiply_pairs};
    use std::arch::x86_64::*;

    /// A block for up to four rows, whose scores and results stay in registers.
    macro_rules! kernel {
        ($(#[$doc:meta])* $name:ident, $features:literal, $per_word:literal, $multiply:ident, $store:ident) => {
            $(#[$doc])*
            ///
            /// # Safety
            /// Needs the instructions; the sizes are those that [`super::see`] asserts, with `R` rows.
            #[target_feature(enable = $features)]
            pub unsafe fn $name<const R: usize>(rows: Queries, block: Block) {
                let k = block.dim.div_ceil($per_word);
                // SAFETY: the caller's promise.
                let scores = unsafe {
                    match block.panel {
                        true => panel::<R>(rows.words, block.keys, k, block.ahead),
                        false => by_token::<R>(rows.words, block.keys, k, block),
                    }
                };
                let mut factors = [_mm512_setzero_ps(); R];
                let mut weights = [[0.0f32; WIDTH]; R];
                let stride = value_stride(block.dim);
                let steps = block.tokens.div_ceil($per_word);
                let ahead = block.ahead.wrapping_add(k * WIDTH);
                for r in 0..R {
                    fetch_share::<R>(r, ahead, steps / 2 * stride);
                    let (max, sum) = (&mut rows.max[r], &mut rows.sum[r]);
                    let ([low, high], factor) = soften(scores[r], rows.cap, rows.visible[r], max, sum);
                    factors[r] = factor;
                    $store(low, high, &mut weights[r]);
                }
                let (values, weighted) = (block.values.as_ptr(), rows.weighted.as_mut_ptr());
                for left in (0..stride).step_by(WIDTH * 2) {
                    // SAFETY: the caller's promise; a stride is whole panels of 32.
                    unsafe {
                        let at = (values.add(left), ahead.wrapping_add(left), weighted.add(left));
                        if left + WIDTH < stride {
                            weigh::<R, 4>(&weights, &factors, at, stride, steps);
                        } else {
                            weigh::<R, 2>(&weights, &factors, at, stride, steps);
                        }
                    }
                }

                /// Scores of a panel of keys.
                #[inline]
                #[target_feature(enable = $features)]
                unsafe fn panel<const R: usize>(
                    queries: &[f32],
                    keys: &[f32],
                    k: usize,
                    ahead: *const f32,
                ) -> [[__m512; 2]; R] {
                    // Even and odd words have sums of their own: few rows are too few chains for the multipliers.
                    let (mut even, mut odd) = ([[_mm512_setzero_ps(); 2]; R], [[_mm512_setzero_ps(); 2]; R]);
                    let add = |p: usize, sums: &mut [[__m512; 2]; R]| {
                        fetch::<_MM_HINT_T0>(ahead.wrapping_add(p * WIDTH));
                        fetch::<_MM_HINT_T0>(ahead.wrapping_add(p * WIDTH + 16));
                        // SAFETY: the caller's promise.
                        unsafe {
                            let line = keys.as_ptr().add(p * WIDTH);
                            let line = [_mm512_loadu_ps(line), _mm512_loadu_ps(line.add(16))];
                            for (r, sums) in sums.iter_mut().enumerate() {
                                let q = _mm512_set1_ps(*queries.as_ptr().add(r * k + p));
                                for j in 0..2 {
                                    sums[j] = $multiply(q, line[j], sums[j]);
                                }
                            }
                        }
                    };
                    for p in (0..k / 2 * 2).step_by(2) {
                        add(p, &mut even);
                        add(p + 1, &mut odd);
                    }
                    if k % 2 == 1 {
                        add(k - 1, &mut even);
                    }
                    let mut scores = even;
                    for r in 0..R {
                        for j in 0..2 {
                            scores[r][j] = _mm512_add_ps(even[r][j], odd[r][j]);
                        }
                    }
                    scores
                }

                /// Scores of keys that lie token by token.
                #[inline]
                #[target_feature(enable = $features)]
                unsafe fn by_token<const R: usize>(
                    queries: &[f32],
                    keys: &[f32],
                    k: usize,
                    block: Block,
                ) -> [[__m512; 2]; R] {
                    let mut scores = [[0.0f32; WIDTH]; R];
                    for token in 0..block.tokens {
                        let mut sums = [_mm512_setzero_ps(); R];
                        for p in (0..k).step_by(16) {
                            fetch::<_MM_HINT_T0>(block.ahead.wrapping_add(token * k + p));
                            let lanes = mask(k - p);
                            // SAFETY: the caller's promise; masked lanes are not read.
                            unsafe {
                                let key = _mm512_maskz_loadu_ps(lanes, keys.as_ptr().add(token * k + p));
                                for r in 0..R {
                                    let query = _mm512_maskz_loadu_ps(lanes, queries.as_ptr().add(r * k + p));
                                    sums[r] = $multiply(query, key, sums[r]);
                                }
                            }
                        }
                        for r in 0..R {
                            scores[r][token] = _mm512_reduce_add_ps(sums[r]);
                        }
                    }
                    let mut rows = [[_mm512_setzero_ps(); 2]; R];
                    for r in 0..R {
                        for j in 0..2 {
                            // SAFETY: 32 words a row.
                            rows[r][j] = unsafe { _mm512_loadu_ps(scores[r].as_ptr().add(16 * j)) };
                        }
                    }
                    rows
                }

                /// Adds the values by their weights.
                #[inline]
                #[target_feature(enable = $features)]
                unsafe fn weigh<const R: usize, const V: usize>(
                    weights: &[[f32; WIDTH]; R],
                    factors: &[__m512; R],
                    (values, ahead, weighted): (*const f32, *const f32, *mut f32),
                    stride: usize,
                    steps: usize,
                ) {
                    let mut sums = [[_mm512_setzero_ps(); V]; R];
                    for p in 0..steps {
                        let mut line = [_mm512_setzero_ps(); V];
                        for j in 0..V {
                            if p >= steps / 2 {
                                fetch::<_MM_HINT_T0>(ahead.wrapping_add(p * stride + 16 * j));
                            }
                            // SAFETY: as above.
                            line[j] = unsafe { _mm512_loadu_ps(values.add(p * stride + 16 * j)) };
                        }
                        for r in 0..R {
                            let w = _mm512_set1_ps(weights[r][p]);
                            for j in 0..V {
                                sums[r][j] = $multiply(w, line[j], sums[r][j]);
                            }
                        }
                    }
                    for r in 0..R {
                        for j in 0..V {
                            // SAFETY: as above.
                            unsafe {
                                let target = weighted.add(r * stride + 16 * j);
                                let sum = _mm512_fmadd_ps(_mm512_loadu_ps(target), factors[r], sums[r][j]);
                                _mm512_storeu_ps(target, sum);
                            }
                        }
                    }
                }
            }
        };
    }

    kernel!(
        /// Words that hold pairs of bfloat16.
        pairs, "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma", 2, multiply_pairs, store_pairs
    );
    kernel!(
        /// Words that hold one element.
        words, "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma", 1, multiply_words, store_words
    );

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn multiply_words(x: __m512, y: __m512, sum: __m512) -> __m512 {
        _mm512_fmadd_ps(x, y, sum)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn store_words(low: __m512, high: __m512, out: &mut [f32; WIDTH]) {
        // SAFETY: 32 words.
        unsafe {
            _mm512_storeu_ps(out.as_mut_ptr(), low);
            _mm512_storeu_ps(out.as_mut_ptr().add(16), high);
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    fn store_pairs(low: __m512, high: __m512, out: &mut [f32; WIDTH]) {
        // SAFETY: 16 words of pairs.
        unsafe {
            let pairs = _mm512_cvtne2ps_pbh(high, low);
            _mm512_storeu_ps(
                out.as_mut_ptr(),
                std::mem::transmute::<__m512bh, __m512>(pairs),
            );
        }
    }
}
