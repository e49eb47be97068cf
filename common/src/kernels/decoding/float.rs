//! Blocks whose words are those of products' operands: float32, or pairs of bfloat16.

use super::super::gemm::{Precision, words};
use super::super::isa::{Isa, multiversion};
use super::super::softmax;
use super::{Block, Queries, soften, value_stride};

/// For at most [`most`](super::most) rows; [`super::see`] has held the sizes.
pub fn see(rows: Queries, block: Block, precision: Precision) {
    #[cfg(target_arch = "x86_64")]
    macro_rules! by_rows {
        ($kernel:ident, $($rows:literal)*) => {
            match rows.max.len() {
                // SAFETY: the instructions are there, and the caller has held what is read and written.
                $($rows => unsafe { x86::$kernel::<$rows>(rows, block) },)*
                _ => unreachable!("more rows than a kernel takes"),
            }
        };
    }
    match Isa::current() {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 { bf16: true } if precision == Precision::Bf16 => by_rows!(pairs, 1 2 3 4),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 { .. } => by_rows!(wide_words, 1 2 3 4),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => by_rows!(narrow_words, 1 2 3),
        _ => {
            debug_assert_eq!(words(block.dim, precision), block.dim);
            plain(rows, block);
        }
    }
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
            let factor = soften::<FMA, WIDTH>(&mut scores, rows.cap, rows.visible[r], &mut rows.max[r], &mut rows.sum[r]);
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
    use super::super::x86::{fetch_share, soften_narrow, soften_wide};
    use super::{Block, Queries, value_stride};
    use crate::kernels::isa::x86::{fetch, multiply_pairs, narrow, wide};
    use std::arch::x86_64::*;

    /// A block for some rows, whose scores and results stay in registers. A panel is as wide as two vectors.
    macro_rules! kernel {
        ($(#[$doc:meta])* $name:ident, $features:literal, $width:ident, $registers:literal, $per_word:literal, $multiply:path,
         $soften:ident, $store:path) => {
            $(#[$doc])*
            ///
            /// # Safety
            /// Needs the instructions; the sizes are those that [`super::super::see`] asserts, with `R` rows.
            #[target_feature(enable = $features)]
            pub unsafe fn $name<const R: usize>(rows: Queries, block: Block) {
                use $width::{LANES, Vector, add, load, load_first, multiply_add, splat, store, total, zero};
                const WIDTH: usize = 2 * LANES;
                let k = block.dim.div_ceil($per_word);
                // SAFETY: the caller's promise.
                let scores = unsafe {
                    match block.panel {
                        true => panel::<R>(rows.words, block.keys, k, block.ahead),
                        false => by_token::<R>(rows.words, block.keys, k, block),
                    }
                };
                let mut factors = [zero(); R];
                let mut weights = [[0.0f32; WIDTH]; R];
                let stride = value_stride(block.dim);
                let steps = block.tokens.div_ceil($per_word);
                let ahead = block.ahead.wrapping_add(k * WIDTH);
                for r in 0..R {
                    fetch_share::<R>(r, ahead, steps / 2 * stride);
                    let (max, sum) = (&mut rows.max[r], &mut rows.sum[r]);
                    let (seen, factor) = $soften(scores[r], rows.cap, rows.visible[r], max, sum);
                    factors[r] = factor;
                    // SAFETY: a row is two vectors.
                    unsafe { $store(weights[r].as_mut_ptr(), seen) };
                }
                let (values, weighted) = (block.values.as_ptr(), rows.weighted.as_mut_ptr());
                let mut left = 0;
                while left < stride {
                    // SAFETY: the caller's promise; a stride is whole panels.
                    unsafe {
                        let at = (values.add(left), ahead.wrapping_add(left), weighted.add(left));
                        // As many sums as there are registers for.
                        if R * 4 < $registers && left + WIDTH < stride {
                            weigh::<R, 4>(&weights, &factors, at, stride, steps);
                            left += 2 * WIDTH;
                        } else {
                            weigh::<R, 2>(&weights, &factors, at, stride, steps);
                            left += WIDTH;
                        }
                    }
                }

                /// Asks for the line of a vector's words; the second half of a line is there with the first.
                #[inline(always)]
                fn ask(ahead: *const f32, word: usize) {
                    if word % 16 == 0 {
                        fetch::<_MM_HINT_T0>(ahead.wrapping_add(word));
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
                ) -> [[Vector; 2]; R] {
                    // Even and odd words have sums of their own: few rows are too few chains for the multipliers.
                    let (mut even, mut odd) = ([[zero(); 2]; R], [[zero(); 2]; R]);
                    let step = |p: usize, sums: &mut [[Vector; 2]; R]| {
                        ask(ahead.wrapping_add(p * WIDTH), 0);
                        ask(ahead.wrapping_add(p * WIDTH), LANES);
                        // SAFETY: the caller's promise.
                        unsafe {
                            let line = keys.as_ptr().add(p * WIDTH);
                            let line = [load(line), load(line.add(LANES))];
                            for (r, sums) in sums.iter_mut().enumerate() {
                                let q = splat(*queries.as_ptr().add(r * k + p));
                                for j in 0..2 {
                                    sums[j] = $multiply(q, line[j], sums[j]);
                                }
                            }
                        }
                    };
                    for p in (0..k / 2 * 2).step_by(2) {
                        step(p, &mut even);
                        step(p + 1, &mut odd);
                    }
                    if k % 2 == 1 {
                        step(k - 1, &mut even);
                    }
                    let mut scores = even;
                    for r in 0..R {
                        for j in 0..2 {
                            scores[r][j] = add(even[r][j], odd[r][j]);
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
                ) -> [[Vector; 2]; R] {
                    let mut scores = [[0.0f32; WIDTH]; R];
                    for token in 0..block.tokens {
                        let mut sums = [zero(); R];
                        for p in (0..k).step_by(LANES) {
                            ask(block.ahead.wrapping_add(token * k), p);
                            // SAFETY: the caller's promise; lanes past the end are not read.
                            unsafe {
                                let key = load_first(k - p, keys.as_ptr().add(token * k + p));
                                for r in 0..R {
                                    let query = load_first(k - p, queries.as_ptr().add(r * k + p));
                                    sums[r] = $multiply(query, key, sums[r]);
                                }
                            }
                        }
                        for r in 0..R {
                            scores[r][token] = total(sums[r]);
                        }
                    }
                    let mut rows = [[zero(); 2]; R];
                    for r in 0..R {
                        for j in 0..2 {
                            // SAFETY: a row is two vectors.
                            rows[r][j] = unsafe { load(scores[r].as_ptr().add(LANES * j)) };
                        }
                    }
                    rows
                }

                /// Adds the values by their weights.
                #[inline]
                #[target_feature(enable = $features)]
                unsafe fn weigh<const R: usize, const V: usize>(
                    weights: &[[f32; WIDTH]; R],
                    factors: &[Vector; R],
                    (values, ahead, weighted): (*const f32, *const f32, *mut f32),
                    stride: usize,
                    steps: usize,
                ) {
                    let mut sums = [[zero(); V]; R];
                    for p in 0..steps {
                        let mut line = [zero(); V];
                        for j in 0..V {
                            if p >= steps / 2 {
                                ask(ahead.wrapping_add(p * stride), LANES * j);
                            }
                            // SAFETY: the caller's promise.
                            line[j] = unsafe { load(values.add(p * stride + LANES * j)) };
                        }
                        for r in 0..R {
                            let w = splat(weights[r][p]);
                            for j in 0..V {
                                sums[r][j] = $multiply(w, line[j], sums[r][j]);
                            }
                        }
                    }
                    for r in 0..R {
                        for j in 0..V {
                            // SAFETY: as above.
                            unsafe {
                                let target = weighted.add(r * stride + LANES * j);
                                store(target, multiply_add(load(target), factors[r], sums[r][j]));
                            }
                        }
                    }
                }
            }
        };
    }

    kernel!(
        /// Words that hold pairs of bfloat16.
        pairs, "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma", wide, 32, 2, multiply_pairs, soften_wide, store_pairs
    );
    kernel!(
        /// Words that hold one element.
        wide_words, "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma", wide, 32, 1, wide::multiply_add, soften_wide, wide::store_two
    );
    kernel!(
        /// The same with half as many registers of half the width.
        narrow_words, "avx2,fma", narrow, 16, 1, narrow::multiply_add, soften_narrow, narrow::store_two
    );

    /// Two vectors as one of pairs.
    ///
    /// # Safety
    /// 16 words must be there.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn store_pairs(at: *mut f32, [low, high]: [__m512; 2]) {
        // SAFETY: the caller's promise; the same bits.
        unsafe {
            let pairs = _mm512_cvtne2ps_pbh(high, low);
            wide::store(at, std::mem::transmute::<__m512bh, __m512>(pairs));
        }
    }
}
