//! Blocks of 8 bits: half the bytes of bfloat16, which is what a long response waits for.
//!
//! A key, or a value, is a scale and integers of −127 … 127; so its error is at most 1/254 of its largest element. Nothing
//! else is rounded so coarsely: queries, and the weights that values are summed with, have 16 bits, as two integers of 8
//! whose products are summed apart. All sums are exact, so that every machine gets the same scores from a query and a key.

use super::super::gemm::panel_width;
#[cfg(target_arch = "x86_64")]
use super::super::isa::Isa;
use super::super::isa::multiversion;
use super::super::softmax::MAGIC;
use super::{Block, Queries, soften, value_stride};

/// Elements of a word.
pub const PER_WORD: usize = 4;

/// Largest head: up to it, sums of products of 8 and 16 bits stay within 32.
const MOST_DIM: usize = 512;

/// The largest query element: its halves are at most 127.
const MOST_QUERY: f32 = 127.0 * 257.0;

/// The largest weight of a value.
const MOST_WEIGHT: f32 = 65_535.0;

/// What is added to keys' integers, since one factor of the instruction that multiplies has no sign.
const KEY_ZERO: i32 = 128;

/// Words of a query: upper halves, lower halves, the scale, and for either half what keys' zero adds to its sum, negated.
pub fn query_words(dim: usize) -> usize {
    2 * dim.div_ceil(PER_WORD) + 3
}

/// The bytes of words.
fn bytes(words: &[f32]) -> &[u8] {
    // SAFETY: floats have no padding, and bytes need no alignment.
    unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), size_of_val(words)) }
}

/// The bytes of words, writable.
fn bytes_mut(words: &mut [f32]) -> &mut [u8] {
    // SAFETY: as above, and floats may be any bytes.
    unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), size_of_val(words)) }
}

/// x to the nearest integer, for |x| < 2²²; anything for NaN.
#[inline(always)]
fn nearest(x: f32) -> i32 {
    (x + MAGIC).to_bits().wrapping_sub(MAGIC.to_bits()) as i32
}

/// The size of the largest Hadamard matrix that keys and queries are turned by. Keys have a few elements much larger than
/// the others, which one scale serves badly; turned, all are alike, and a product of two turned vectors is [`turned_by`]
/// times what it was (Ashkboos et al., *QuaRot*, arXiv 2404.00456).
const MOST_TURNED: usize = 64;

/// The size of the matrix that [`turn`] turns so many elements by, part by part: a power of two.
fn turned_by(elements: usize) -> usize {
    MOST_TURNED.min(1 << elements.trailing_zeros())
}

multiversion! {
    /// Turns a key, or a query that is to meet turned ones. All stages are alike, sums of neighbours before their differences,
    /// which puts the matrix's rows in another order.
    pub fn turn(x: &mut [f32]) {
        let size = turned_by(x.len());
        let mut turned = [0.0; MOST_TURNED];
        for part in x.chunks_exact_mut(size) {
            for _ in 0..size.ilog2() {
                let (sums, differences) = turned[..size].split_at_mut(size / 2);
                let to = sums.iter_mut().zip(differences);
                for ([a, b], (sum, difference)) in part.as_chunks().0.iter().zip(to) {
                    (*sum, *difference) = (a + b, a - b);
                }
                part.copy_from_slice(&turned[..size]);
            }
        }
    }
}

/// Lanes of a maximum.
const LANES: usize = 16;

/// How elements become integers up to some number, and back.
#[derive(Clone, Copy)]
pub struct Scale {
    /// What elements are multiplied by.
    to: f32,
    /// What integers are multiplied by; NaN where an element is not finite.
    back: f32,
}

multiversion! {
    /// The scale that makes the largest element `most`.
    pub fn scale(x: &[f32], most: f32) -> Scale {
        let (mut largest, mut unsound) = ([0.0f32; LANES], [0.0f32; LANES]);
        let mut add = |x: &[f32]| {
            for ((largest, unsound), x) in largest.iter_mut().zip(&mut unsound).zip(x) {
                *largest = if x.abs() > *largest { x.abs() } else { *largest };
                *unsound += x * 0.0;
            }
        };
        let (chunks, rest) = x.as_chunks::<LANES>();
        chunks.iter().for_each(|x| add(x));
        add(rest);
        let largest = largest.iter().fold(0.0, |a, &b| if b > a { b } else { a });
        let unsound: f32 = unsound.iter().sum();
        Scale {
            to: if largest > 0.0 { most / largest } else { 0.0 },
            back: largest / most + unsound,
        }
    }
}

multiversion! {
    /// Integers of 8 bits, with something added.
    pub fn to_bytes(x: &[f32], to: f32, zero: i32, out: &mut [u8]) {
        for (byte, x) in out.iter_mut().zip(x) {
            *byte = (nearest(x * to) + zero) as u8;
        }
    }
}

multiversion! {
    /// Integers of 16 bits as two of 8, n = 256·upper + lower; what [`KEY_ZERO`] adds to either's products comes back, negated.
    pub fn to_halves(x: &[f32], to: f32, upper: &mut [u8], lower: &mut [u8]) -> [i32; 2] {
        let mut sums = [0; 2];
        for ((x, upper), lower) in x.iter().zip(upper).zip(lower) {
            let n = nearest(x * to);
            let high = (n + 128) >> 8;
            let low = n - (high << 8);
            (*upper, *lower) = (high as u8, low as u8);
            // Of what is not finite come any numbers, and the scale says so.
            sums = [i32::wrapping_add(sums[0], high), i32::wrapping_add(sums[1], low)];
        }
        sums.map(|sum| sum.wrapping_mul(-KEY_ZERO))
    }
}

/// Writes a query, scaled; it is turned on the way.
pub fn put_query(query: &mut [f32], out: &mut [f32]) {
    turn(query);
    let Scale { to, back } = scale(query, MOST_QUERY);
    let (halves, rest) = out.split_at_mut(2 * query.len().div_ceil(PER_WORD));
    halves.fill(0.0);
    let (upper, lower) = halves.split_at_mut(halves.len() / 2);
    let zeros = to_halves(query, to, bytes_mut(upper), bytes_mut(lower));
    let zeros = zeros.map(|sum| f32::from_bits(sum as u32));
    rest.copy_from_slice(&[back / turned_by(query.len()) as f32, zeros[0], zeros[1]]);
}

/// Writes a key; its scale comes back.
pub fn put_key(key: &[f32], row: &mut [f32]) -> f32 {
    let mut turned = [0.0; MOST_DIM];
    let turned = &mut turned[..key.len()];
    turned.copy_from_slice(key);
    turn(turned);
    let Scale { to, back } = scale(turned, 127.0);
    to_bytes(turned, to, KEY_ZERO, bytes_mut(row));
    back
}

/// Writes the value of token `at`, whose word's line of values is given; its scale comes back.
pub fn put_value(value: &[f32], at: usize, line: &mut [f32]) -> f32 {
    let Scale { to, back } = scale(value, 127.0);
    for (word, x) in bytes_mut(line).chunks_exact_mut(PER_WORD).zip(value) {
        word[at % PER_WORD] = nearest(x * to) as u8;
    }
    back
}

/// For at most [`most`](super::most) rows; [`super::see`] has held the sizes.
pub fn see(rows: Queries, block: Block) {
    assert!(block.dim <= MOST_DIM);
    #[cfg(target_arch = "x86_64")]
    if Isa::current() == (Isa::Avx512 { bf16: true }) {
        // SAFETY: the instructions are there, and the caller has held what is read and written.
        unsafe {
            match rows.max.len() {
                1 => x86::see::<1>(rows, block),
                2 => x86::see::<2>(rows, block),
                3 => x86::see::<3>(rows, block),
                _ => x86::see::<4>(rows, block),
            }
        }
        return;
    }
    plain(rows, block);
}

/// A row's weights as integers, of the values' scales too, and the scale that gives them back: NaN if one of them is.
#[inline(always)]
fn weigh(weights: &[f32], scales: &[f32], seen: u32, out: &mut [i32]) -> f32 {
    let scaled = |i: usize| {
        if seen >> i & 1 == 1 {
            weights[i] * scales[i]
        } else {
            0.0
        }
    };
    let count = out.len();
    // No weight is negative, and among bits without a sign NaN, of whichever sign, is the largest.
    let largest = f32::from_bits((0..count).map(|i| scaled(i).to_bits()).max().unwrap_or(0));
    let to = MOST_WEIGHT / largest;
    (out.iter_mut().enumerate()).for_each(|(i, n)| *n = nearest(scaled(i) * to) & 0xffff);
    largest / MOST_WEIGHT
}

/// Tokens, or columns of values, whose sums are made at once.
const SUMS: usize = 16;

/// A byte of each word, as an integer, times `factor` is added to its sum.
#[inline(always)]
fn add_bytes(sums: &mut [i32; SUMS], words: &[f32], factor: i32, byte: impl Fn(u32) -> i32) {
    for (sum, word) in sums.iter_mut().zip(words) {
        *sum = sum.wrapping_add(factor.wrapping_mul(byte(word.to_bits())));
    }
}

multiversion! {
    /// In plain Rust, row by row.
    pub fn plain(rows: Queries, block: Block) {
        const MOST_WIDTH: usize = 32;
        let (width, stride) = (panel_width(), value_stride(block.dim));
        let words = block.dim.div_ceil(PER_WORD);
        let (key_scales, keys) = block.keys.split_at(width);
        let (value_scales, values) = block.values.split_at(width);
        let mut elements = [0i16; MOST_DIM];
        let elements = &mut elements[..words * PER_WORD];
        for (r, query) in rows.words.chunks_exact(query_words(block.dim)).enumerate() {
            let (halves, rest) = query.split_at(2 * words);
            let (upper, lower) = bytes(halves).split_at(words * PER_WORD);
            for ((q, &upper), &lower) in elements.iter_mut().zip(upper).zip(lower) {
                *q = ((upper as i8 as i16) << 8) + lower as i8 as i16;
            }
            let zero = ((rest[1].to_bits() as i32) << 8).wrapping_add(rest[2].to_bits() as i32);
            let mut sums = [zero; MOST_WIDTH];
            if block.panel {
                for (left, sums) in (0..width).step_by(SUMS).zip(sums.as_chunks_mut::<SUMS>().0) {
                    let mut some = [zero; SUMS];
                    for (q, line) in elements.as_chunks::<PER_WORD>().0.iter().zip(keys.chunks_exact(width)) {
                        for (b, &q) in q.iter().enumerate() {
                            add_bytes(&mut some, &line[left..left + SUMS], q as i32, |word| (word >> (8 * b) & 0xff) as i32);
                        }
                    }
                    *sums = some;
                }
            } else {
                for (sum, key) in sums[..block.tokens].iter_mut().zip(keys.chunks_exact(words)) {
                    let products = elements.iter().zip(bytes(key)).map(|(&q, &key)| q as i32 * key as i32);
                    *sum = products.fold(zero, i32::wrapping_add);
                }
            }
            let mut scores = [0.0f32; MOST_WIDTH];
            for ((score, &sum), &scale) in scores[..block.tokens].iter_mut().zip(&sums).zip(key_scales) {
                *score = sum as f32 * (rest[0] * scale);
            }
            let seen = rows.visible[r];
            let factor = soften::<FMA, MOST_WIDTH>(&mut scores, rows.cap, seen, &mut rows.max[r], &mut rows.sum[r]);
            let mut weights = [0i32; MOST_WIDTH];
            let unit = weigh(&scores, value_scales, seen, &mut weights[..block.tokens]);
            let lines = block.tokens.div_ceil(PER_WORD);
            for (left, weighted) in (0..stride).step_by(SUMS).zip(rows.weighted[r * stride..].as_chunks_mut::<SUMS>().0) {
                let mut some = [0i32; SUMS];
                for (weights, line) in weights.as_chunks::<PER_WORD>().0[..lines].iter().zip(values.chunks_exact(stride)) {
                    for (b, &weight) in weights.iter().enumerate() {
                        add_bytes(&mut some, &line[left..left + SUMS], weight, |word| (word << (24 - 8 * b)) as i32 >> 24);
                    }
                }
                for (weighted, sum) in weighted.iter_mut().zip(some) {
                    let before = *weighted * factor;
                    *weighted = if FMA { unit.mul_add(sum as f32, before) } else { unit * sum as f32 + before };
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[allow(clippy::needless_range_loop)] // rows and columns are of several arrays at once
mod x86 {
    use super::super::x86::{fetch_share, soften_wide};
    use super::{Block, MOST_WEIGHT, PER_WORD, Queries, query_words, value_stride};
    use crate::kernels::isa::x86::{fetch, mask};
    use std::arch::x86_64::*;

    /// Tokens of a block.
    const WIDTH: usize = 32;

    /// Sums of products of upper halves and of lower ones.
    type Halves = [__m512i; 2];

    /// What both stand for.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn joined([upper, lower]: Halves) -> __m512i {
        _mm512_add_epi32(_mm512_slli_epi32::<8>(upper), lower)
    }

    /// The words of a query.
    #[derive(Clone, Copy)]
    struct Query {
        /// Upper halves, then lower ones.
        halves: *const i32,
        words: usize,
    }

    impl Query {
        /// # Safety
        /// The row of the queries must be there.
        unsafe fn of(rows: &Queries, r: usize, dim: usize) -> Self {
            let words = dim.div_ceil(PER_WORD);
            // SAFETY: the caller's promise.
            let halves = unsafe { rows.words.as_ptr().add(r * query_words(dim)) }.cast();
            Self { halves, words }
        }

        /// What sums begin with, for the upper half or the lower.
        ///
        /// # Safety
        /// The query's words must be there.
        unsafe fn zero(self, half: usize) -> i32 {
            // SAFETY: the caller's promise.
            unsafe { *self.halves.add(2 * self.words + 1 + half) }
        }

        /// # Safety
        /// As [`Self::zero`].
        unsafe fn scale(self) -> f32 {
            // SAFETY: the caller's promise.
            unsafe { *self.halves.add(2 * self.words).cast() }
        }
    }

    /// A block for `R` rows, up to four.
    ///
    /// # Safety
    /// Needs the instructions; the sizes are those that [`super::super::see`] asserts.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")]
    pub unsafe fn see<const R: usize>(rows: Queries, block: Block) {
        let (key_scales, keys) = block.keys.split_at(WIDTH);
        let (value_scales, values) = block.values.split_at(WIDTH);
        let (stride, steps) = (value_stride(block.dim), block.tokens.div_ceil(PER_WORD));
        // SAFETY: the caller's promise.
        unsafe {
            let mut queries = [Query::of(&rows, 0, block.dim); R];
            for (r, query) in queries.iter_mut().enumerate() {
                *query = Query::of(&rows, r, block.dim);
            }
            let sums = match block.panel {
                true => panel(queries, keys.as_ptr(), block.ahead),
                false => by_token(queries, keys.as_ptr(), block),
            };
            let load = |scales: &[f32]| {
                let at = scales.as_ptr();
                [_mm512_loadu_ps(at), _mm512_loadu_ps(at.add(16))]
            };
            let (key_scales, value_scales) = (load(key_scales), load(value_scales));
            let mut parts = [Part::NONE; R];
            let ahead = block
                .ahead
                .wrapping_add(2 * WIDTH + queries[0].words * WIDTH);
            for r in 0..R {
                fetch_share::<R>(r, ahead, steps / 2 * stride);
                let (scale, seen) = (_mm512_set1_ps(queries[r].scale()), rows.visible[r]);
                let score = |j: usize| {
                    let scale = _mm512_mul_ps(scale, key_scales[j]);
                    _mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][j]), scale)
                };
                let (max, sum) = (&mut rows.max[r], &mut rows.sum[r]);
                let (weights, factor) = soften_wide([score(0), score(1)], rows.cap, seen, max, sum);
                parts[r] = Part::of(weights, value_scales, seen, factor);
            }
            let mut left = 0;
            while left < stride {
                let at = (values.as_ptr().add(left), ahead.wrapping_add(left));
                let weighted = rows.weighted.as_mut_ptr().add(left);
                // There are 32 registers, for the sums of both halves too.
                if R < 4 && left + WIDTH < stride {
                    weigh::<R, 4>(&parts, at, weighted, stride, steps);
                    left += 2 * WIDTH;
                } else {
                    weigh::<R, 2>(&parts, at, weighted, stride, steps);
                    left += WIDTH;
                }
            }
        }
    }

    /// Scores of a panel of keys, before the scales.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")]
    unsafe fn panel<const R: usize>(
        queries: [Query; R],
        keys: *const f32,
        ahead: *const f32,
    ) -> [[__m512i; 2]; R] {
        // SAFETY: the caller's promise.
        unsafe {
            let mut sums = [[[_mm512_setzero_si512(); 2]; 2]; R];
            for r in 0..R {
                for half in 0..2 {
                    let zero = _mm512_set1_epi32(queries[r].zero(half));
                    (sums[r][0][half], sums[r][1][half]) = (zero, zero);
                }
            }
            for p in 0..queries[0].words {
                let mut line = [_mm512_setzero_si512(); 2];
                for j in 0..2 {
                    fetch::<_MM_HINT_T0>(ahead.wrapping_add(p * WIDTH + 16 * j));
                    line[j] = _mm512_loadu_si512(keys.add(p * WIDTH + 16 * j).cast());
                }
                for (query, sums) in queries.iter().zip(&mut sums) {
                    for half in 0..2 {
                        let q = _mm512_set1_epi32(*query.halves.add(half * query.words + p));
                        for j in 0..2 {
                            sums[j][half] = _mm512_dpbusd_epi32(sums[j][half], line[j], q);
                        }
                    }
                }
            }
            let mut scores = [[_mm512_setzero_si512(); 2]; R];
            for r in 0..R {
                scores[r] = [joined(sums[r][0]), joined(sums[r][1])];
            }
            scores
        }
    }

    /// Scores of keys that lie token by token.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")]
    unsafe fn by_token<const R: usize>(
        queries: [Query; R],
        keys: *const f32,
        block: Block,
    ) -> [[__m512i; 2]; R] {
        let mut scores = [[0i32; WIDTH]; R];
        let k = queries[0].words;
        // SAFETY: the caller's promise; masked lanes are not read, and a row of scores is 32 words.
        unsafe {
            for token in 0..block.tokens {
                let mut sums = [[_mm512_setzero_si512(); 2]; R];
                for p in (0..k).step_by(16) {
                    fetch::<_MM_HINT_T0>(block.ahead.wrapping_add(token * k + p));
                    let lanes = mask(k - p);
                    let key = _mm512_maskz_loadu_epi32(lanes, keys.add(token * k + p).cast());
                    for (query, sums) in queries.iter().zip(&mut sums) {
                        for half in 0..2 {
                            let at = query.halves.add(half * k + p);
                            let q = _mm512_maskz_loadu_epi32(lanes, at);
                            sums[half] = _mm512_dpbusd_epi32(sums[half], key, q);
                        }
                    }
                }
                for r in 0..R {
                    let zero = (queries[r].zero(0) << 8) + queries[r].zero(1);
                    scores[r][token] = _mm512_reduce_add_epi32(joined(sums[r])).wrapping_add(zero);
                }
            }
            let mut rows = [[_mm512_setzero_si512(); 2]; R];
            for r in 0..R {
                for j in 0..2 {
                    rows[r][j] = _mm512_loadu_si512(scores[r].as_ptr().add(16 * j).cast());
                }
            }
            rows
        }
    }

    /// What a row adds of a block's values.
    #[derive(Clone, Copy)]
    struct Part {
        /// The halves of tokens' weights.
        halves: [[i32; WIDTH / PER_WORD]; 2],
        /// What gives them back.
        unit: __m512,
        /// Of what the row has.
        factor: __m512,
    }

    impl Part {
        /// Nothing, from nothing.
        const NONE: Self = {
            // SAFETY: vectors of floats may be any bits.
            let zero = unsafe { std::mem::zeroed() };
            Self {
                halves: [[0; WIDTH / PER_WORD]; 2],
                unit: zero,
                factor: zero,
            }
        };

        /// As [`super::weigh`].
        #[inline]
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
        fn of(weights: [__m512; 2], scales: [__m512; 2], seen: u32, factor: __m512) -> Self {
            let scaled =
                |j: usize| _mm512_maskz_mul_ps((seen >> (16 * j)) as u16, weights[j], scales[j]);
            let scaled = [scaled(0), scaled(1)];
            let bits = scaled.map(|x| _mm512_castps_si512(x));
            let largest = _mm512_reduce_max_epu32(_mm512_max_epu32(bits[0], bits[1]));
            let largest = _mm512_set1_ps(f32::from_bits(largest));
            let to = _mm512_div_ps(_mm512_set1_ps(MOST_WEIGHT), largest);
            let mut halves = [[0; WIDTH / PER_WORD]; 2];
            for j in 0..2 {
                let n = _mm512_cvtps_epi32(_mm512_mul_ps(scaled[j], to));
                let upper = _mm512_cvtepi32_epi8(_mm512_srli_epi32::<8>(n));
                let lower = _mm512_cvtepi32_epi8(n);
                for (half, bytes) in halves.iter_mut().zip([upper, lower]) {
                    // SAFETY: four words of the eight.
                    unsafe { _mm_storeu_si128(half.as_mut_ptr().add(4 * j).cast(), bytes) };
                }
            }
            let unit = _mm512_div_ps(largest, _mm512_set1_ps(MOST_WEIGHT));
            Self {
                halves,
                unit,
                factor,
            }
        }
    }

    /// Adds the values by their weights.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")]
    unsafe fn weigh<const R: usize, const V: usize>(
        parts: &[Part; R],
        (values, ahead): (*const f32, *const f32),
        weighted: *mut f32,
        stride: usize,
        steps: usize,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            let mut sums = [[[_mm512_setzero_si512(); 2]; V]; R];
            for p in 0..steps {
                let mut line = [_mm512_setzero_si512(); V];
                for (j, line) in line.iter_mut().enumerate() {
                    if p >= steps / 2 {
                        fetch::<_MM_HINT_T0>(ahead.wrapping_add(p * stride + 16 * j));
                    }
                    *line = _mm512_loadu_si512(values.add(p * stride + 16 * j).cast());
                }
                for (part, sums) in parts.iter().zip(&mut sums) {
                    for half in 0..2 {
                        let w = _mm512_set1_epi32(part.halves[half][p]);
                        for j in 0..V {
                            sums[j][half] = _mm512_dpbusd_epi32(sums[j][half], w, line[j]);
                        }
                    }
                }
            }
            for (r, (part, sums)) in parts.iter().zip(sums).enumerate() {
                for (j, halves) in sums.into_iter().enumerate() {
                    let target = weighted.add(r * stride + 16 * j);
                    let before = _mm512_mul_ps(_mm512_loadu_ps(target), part.factor);
                    let sum = _mm512_cvtepi32_ps(joined(halves));
                    _mm512_storeu_ps(target, _mm512_fmadd_ps(part.unit, sum, before));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::decoding::Format;
    use crate::kernels::testing::noise;

    #[test]
    fn turned_vectors_have_the_same_products_and_no_outliers() {
        for dim in [1, 6, 15, 16, 64, 96, 128, 256] {
            let mut key = noise(dim, 1);
            key[dim / 2] = 40.0;
            let query = noise(dim, 2);
            let dot = |a: &[f32], b: &[f32]| -> f32 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
            let (mut turned, mut other) = (key.clone(), query.clone());
            turn(&mut turned);
            turn(&mut other);
            let (found, expected) = (dot(&turned, &other), dot(&key, &query));
            let size = turned_by(dim) as f32;
            assert!(
                (found / size - expected).abs() < 1e-3,
                "{dim}: {found}, {expected}"
            );
            if dim == 64 {
                let largest = turned.iter().fold(0.0f32, |a, b| a.max(b.abs()));
                assert!(
                    largest < 2.0 * (dot(&turned, &turned) / 64.0).sqrt(),
                    "{largest}"
                );
            }
        }
    }

    /// Scores and weights of the vector kernel are those of plain Rust: integers leave no room.
    #[test]
    fn vectors_give_what_plain_rust_gives() {
        for (dim, tokens, panel) in [
            (64, 32, true),
            (64, 29, false),
            (96, 7, false),
            (20, 32, true),
        ] {
            for rows in 1..=4 {
                for cap in [None, Some(2.0)] {
                    compare(dim, tokens.min(panel_width()), panel, rows, cap);
                }
            }
        }
    }

    fn compare(dim: usize, tokens: usize, panel: bool, rows: usize, cap: Option<f32>) {
        let format = Format::Int8;
        let mut keys = vec![0.0; format.key_words(dim)];
        let mut values = vec![0.0; format.value_words(dim)];
        for at in 0..tokens {
            format.put_key(&noise(dim, at as u32), at, &mut keys);
            format.put_value(&noise(dim, 100 + at as u32), at, &mut values);
        }
        if panel {
            format.turn_keys(dim, &mut keys);
        }
        let words = query_words(dim);
        let mut queries = vec![0.0; rows * words];
        for (r, query) in queries.chunks_exact_mut(words).enumerate() {
            format.put_query(&mut noise(dim, 200 + r as u32), query);
        }
        let block = Block {
            keys: &keys,
            panel,
            values: &values,
            tokens,
            dim,
            format,
            ahead: keys.as_ptr(),
        };
        let visible: Vec<u32> = (0..rows)
            .map(|r| u32::MAX << r & ((1u64 << tokens) - 1) as u32)
            .collect();
        let run = |see: fn(Queries, Block)| {
            let (mut max, mut sum) = (vec![-0.5; rows], vec![1.0; rows]);
            let mut weighted = vec![1.0; rows * value_stride(dim)];
            let queries = Queries {
                words: &queries,
                cap,
                visible: &visible,
                max: &mut max,
                sum: &mut sum,
                weighted: &mut weighted,
            };
            see(queries, block);
            let columns = weighted.chunks_exact(value_stride(dim));
            let weighted: Vec<f32> = columns.flat_map(|row| row[..dim].to_vec()).collect();
            (max, sum, weighted)
        };
        let (found, expected) = (run(see), run(plain));
        assert_eq!(found.0, expected.0, "largest scores");
        let pairs = found
            .1
            .iter()
            .chain(&found.2)
            .zip(expected.1.iter().chain(&expected.2));
        for (found, expected) in pairs {
            assert!(
                (found - expected).abs() < 1e-5,
                "{dim}, {tokens}, {rows}: {found}, {expected}"
            );
        }
    }
}
