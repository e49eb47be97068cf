//! Attention of a few rows of queries over a block of cached keys and values, with the soft-max made as blocks come: the
//! part of a decoding step that reads every sequence's own past.

use super::gemm::{Precision, panel_width, words};
use super::isa::{Isa, multiversion};
use super::softmax;

/// Keys and values of neighbouring tokens, at most [`panel_width`], of one key head; the words are as
/// [`words`](super::gemm::words) has them.
#[derive(Clone, Copy)]
pub struct Block<'a> {
    /// The keys.
    pub keys: Keys<'a>,
    /// `[word of token][value_stride]`.
    pub values: &'a [f32],
    /// How many tokens it holds; the values of others need not be there.
    pub tokens: usize,
    /// Elements of a key and of a value.
    pub dim: usize,
    /// The format of the words.
    pub precision: Precision,
    /// What will be read next, laid out like this block: it is asked for meanwhile, line by line, since caches come from
    /// memory, and the processor's own prefetching begins anew with every page. Any address will do.
    pub ahead: *const f32,
}

/// Keys as they lie.
#[derive(Clone, Copy)]
pub enum Keys<'a> {
    /// `[word of dim][panel_width]`: quickest to read.
    Panel(&'a [f32]),
    /// `[token][word of dim]`: quickest to grow, since a key does not touch a line for each of its words.
    ByToken(&'a [f32]),
}

/// Some queries, and what they have seen so far.
pub struct Queries<'a> {
    /// `[rows][words(dim)]`, scaled, in the format of the keys.
    pub words: &'a [f32],
    /// Of each row, the tokens of the block that it sees: bit i is token i.
    pub visible: &'a [u32],
    /// The largest score so far; −∞ where nothing has been seen.
    pub max: &'a mut [f32],
    /// Σ exp(score − max).
    pub sum: &'a mut [f32],
    /// Σ exp(score − max)·value, `[rows][value_stride]`.
    pub weighted: &'a mut [f32],
}

/// From the values of a token, or of a pair of tokens, to those of the next: whole panels.
pub fn value_stride(dim: usize) -> usize {
    dim.next_multiple_of(panel_width())
}

/// Queries that the kernel takes at once.
const MOST: usize = 4;

/// Lets rows see a block: what they have is brought to the largest score yet, and the block's part is added (Milakov and
/// Gimelshein, *Online normalizer calculation for softmax*, algorithm 3). A row's result does not depend on the rows
/// beside it.
pub fn see(rows: Queries, block: Block) {
    let (k, stride) = (words(block.dim, block.precision), value_stride(block.dim));
    let (count, value_words) = (rows.max.len(), words(block.tokens, block.precision));
    assert!(block.tokens <= panel_width());
    match block.keys {
        Keys::Panel(keys) => assert!(keys.len() >= k * panel_width()),
        Keys::ByToken(keys) => assert!(keys.len() >= k * block.tokens),
    }
    assert!(block.values.len() >= value_words * stride);
    assert!(rows.words.len() == count * k && rows.weighted.len() == count * stride);
    assert!(rows.visible.len() == count && rows.sum.len() == count);
    let mut start = 0;
    while start < count {
        let some = start..(start + MOST).min(count);
        let part = Queries {
            words: &rows.words[some.start * k..some.end * k],
            visible: &rows.visible[some.clone()],
            max: &mut rows.max[some.clone()],
            sum: &mut rows.sum[some.clone()],
            weighted: &mut rows.weighted[some.start * stride..some.end * stride],
        };
        start = some.end;
        #[cfg(target_arch = "x86_64")]
        if let Isa::Avx512 { bf16 } = Isa::current() {
            let pairs = bf16 && block.precision == Precision::Bf16;
            // SAFETY: the instructions are there, and the asserts above hold what is read and written.
            unsafe {
                match (part.max.len(), pairs) {
                    (1, true) => x86::pairs::<1>(part, block),
                    (2, true) => x86::pairs::<2>(part, block),
                    (3, true) => x86::pairs::<3>(part, block),
                    (_, true) => x86::pairs::<4>(part, block),
                    (1, false) => x86::words::<1>(part, block),
                    (2, false) => x86::words::<2>(part, block),
                    (3, false) => x86::words::<3>(part, block),
                    (_, false) => x86::words::<4>(part, block),
                }
            }
            continue;
        }
        plain(part, block);
    }
}

multiversion! {
    /// The same in plain Rust, row by row, for words that hold one element.
    pub fn plain(rows: Queries, block: Block) {
        const WIDTH: usize = 16;
        let (dim, stride) = (block.dim, block.dim.next_multiple_of(WIDTH));
        for (r, query) in rows.words.chunks_exact(dim).enumerate() {
            let mut scores = [0.0f32; WIDTH];
            match block.keys {
                Keys::Panel(keys) => {
                    for (&q, keys) in query.iter().zip(keys.chunks_exact(WIDTH)) {
                        for (score, &key) in scores.iter_mut().zip(keys) {
                            *score = if FMA { q.mul_add(key, *score) } else { q * key + *score };
                        }
                    }
                }
                Keys::ByToken(keys) => {
                    let keys = keys.chunks_exact(dim).take(block.tokens);
                    (scores.iter_mut().zip(keys)).for_each(|(score, key)| *score = softmax::dot(query, key));
                }
            }
            for (i, score) in scores.iter_mut().enumerate() {
                if rows.visible[r] >> i & 1 == 0 {
                    *score = f32::NEG_INFINITY;
                }
            }
            let top = scores.iter().fold(rows.max[r], |top, &s| if s > top { s } else { top });
            let base = if top == f32::NEG_INFINITY { 0.0 } else { top };
            let factor = softmax::exp::<FMA>(rows.max[r] - base);
            rows.max[r] = top;
            let mut sum = 0.0;
            for score in &mut scores {
                *score = softmax::exp::<FMA>(*score - base);
                sum += *score;
            }
            rows.sum[r] = rows.sum[r] * factor + sum;
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
    use super::super::softmax::x86::exp;
    use super::{Block, Keys, Queries, value_stride};
    use crate::kernels::isa::x86::{fetch, multiply_pairs};
    use std::arch::x86_64::*;

    const WIDTH: usize = 32;

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
                let scores = match block.keys {
                    // SAFETY: the caller's promise.
                    Keys::Panel(keys) => unsafe { panel::<R>(rows.words, keys, k, block.ahead) },
                    // SAFETY: as above.
                    Keys::ByToken(keys) => unsafe { by_token::<R>(rows.words, keys, k, block) },
                };
                let mut factors = [_mm512_setzero_ps(); R];
                let mut weights = [[0.0f32; WIDTH]; R];
                let unseen = _mm512_set1_ps(f32::NEG_INFINITY);
                for r in 0..R {
                    let seen = rows.visible[r];
                    let score = |j: usize| _mm512_mask_blend_ps((seen >> (16 * j)) as u16, unseen, scores[r][j]);
                    let (low, high) = (score(0), score(1));
                    let before = rows.max[r];
                    // Where a score is NaN the sum will be, too: it is computed from the score itself.
                    let top = _mm512_reduce_max_ps(_mm512_max_ps(low, high)).max(before);
                    let base = _mm512_set1_ps(if top == f32::NEG_INFINITY { 0.0 } else { top });
                    factors[r] = exp(_mm512_sub_ps(_mm512_set1_ps(before), base));
                    let (low, high) = (exp(_mm512_sub_ps(low, base)), exp(_mm512_sub_ps(high, base)));
                    let sum = _mm512_reduce_add_ps(_mm512_add_ps(low, high));
                    rows.max[r] = top;
                    rows.sum[r] = rows.sum[r] * _mm512_cvtss_f32(factors[r]) + sum;
                    $store(low, high, &mut weights[r]);
                }
                let stride = value_stride(block.dim);
                let steps = block.tokens.div_ceil($per_word);
                let (values, weighted) = (block.values.as_ptr(), rows.weighted.as_mut_ptr());
                let ahead = block.ahead.wrapping_add(k * WIDTH);
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
                            let lanes = ((1u32 << (k - p).min(16)) - 1) as u16;
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
                    // SAFETY: 32 words a row.
                    scores.map(|row| unsafe {
                        [_mm512_loadu_ps(row.as_ptr()), _mm512_loadu_ps(row.as_ptr().add(16))]
                    })
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
                            fetch::<_MM_HINT_T0>(ahead.wrapping_add(p * stride + 16 * j));
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
