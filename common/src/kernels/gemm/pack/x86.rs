//! Rows turned into columns with 512-bit vectors.

use super::{Mat, NOISE};
use crate::kernels::isa::x86::{fetch, mask};
use std::arch::x86_64::*;

/// Turns squares of 16 rows by 16 words; what `load` gives of a row past its end must be zero.
macro_rules! turned {
    ($(#[$doc:meta])* $name:ident, $features:literal, $per_word:literal, $load:ident) => {
        $(#[$doc])*
        #[target_feature(enable = $features)]
        pub fn $name(a: Mat, first: usize, valid: usize, width: usize, out: &mut [f32]) {
            let lines = a.cols.div_ceil($per_word);
            assert!(lines * width <= out.len() && first + valid <= a.rows);
            for start in (0..lines).step_by(16) {
                for left in (0..width).step_by(16) {
                    let mut square = [_mm512_setzero_ps(); 16];
                    for (i, words) in square.iter_mut().enumerate().take(valid.saturating_sub(left)) {
                        // SAFETY: one of the rows that were asserted.
                        *words = unsafe { $load(a, first + left + i, start * $per_word, valid * a.stride) };
                    }
                    let lanes = mask(width - left);
                    for (line, words) in (start..lines).zip(turn(square)) {
                        // SAFETY: masked lanes are not touched; the others are inside the line.
                        unsafe { _mm512_mask_storeu_ps(out.as_mut_ptr().add(line * width + left), lanes, words) };
                    }
                }
            }
        }
    };
}

turned!(
    /// `[rows, k]` as `[k][width]`.
    rows, "avx512f", 1, load_words
);
turned!(
    /// `[rows, k]` as `[k / 2][width]` of pairs.
    row_pairs, "avx512f,avx512bw,avx512bf16", 2, load_pairs
);

/// 16 elements of a row from k on; those `ahead` words after them, which are packed next, are fetched: in the order of
/// packing they would be a miss each.
///
/// # Safety
/// The row must be one of the matrix's.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load_words(a: Mat, row: usize, k: usize, ahead: usize) -> __m512 {
    let x = a.data.as_ptr().wrapping_add(row * a.stride + k);
    fetch::<_MM_HINT_T1>(x.wrapping_add(ahead));
    // SAFETY: inside the row, which is inside the data; masked lanes, past its end, are not read.
    unsafe {
        match a.cols.saturating_sub(k) {
            16.. => _mm512_loadu_ps(x),
            rest => _mm512_maskz_loadu_ps(mask(rest), x),
        }
    }
}

/// 32 elements of a row from k on, as pairs of bfloat16.
///
/// # Safety
/// As [`load_words`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn load_pairs(a: Mat, row: usize, k: usize, ahead: usize) -> __m512 {
    // SAFETY: the caller's promise.
    let words = unsafe {
        (
            load_words(a, row, k, ahead),
            load_words(a, row, k + 16, ahead),
        )
    };
    let Some(first) = a.dither else {
        return nearest(words.0, words.1);
    };
    let number = (first + row * a.stride + k) as u32;
    let (even, odd) = even_and_odd(
        dithered(words.0, number),
        dithered(words.1, number.wrapping_add(16)),
    );
    pairs(even, odd)
}

/// The upper halves of words.
const UPPER: u32 = 0xaaaa_aaaa;

/// The even and the odd words of two vectors, in order.
#[target_feature(enable = "avx512f")]
fn even_and_odd(low: __m512i, high: __m512i) -> (__m512i, __m512i) {
    let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    let odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
    (
        _mm512_permutex2var_epi32(low, even, high),
        _mm512_permutex2var_epi32(low, odd, high),
    )
}

/// Words of the upper halves of two.
#[target_feature(enable = "avx512f,avx512bw")]
fn pairs(low: __m512i, high: __m512i) -> __m512 {
    let low = _mm512_srli_epi32::<16>(low);
    _mm512_castsi512_ps(_mm512_mask_blend_epi16(UPPER, low, high))
}

/// The nearest bfloat16 of the elements of two vectors, one after the other.
#[target_feature(enable = "avx512f,avx512bf16")]
fn nearest(low: __m512, high: __m512) -> __m512 {
    // SAFETY: the same bits.
    unsafe { std::mem::transmute::<__m512bh, __m512>(_mm512_cvtne2ps_pbh(high, low)) }
}

/// Words of the nearest bfloat16 of an element of each.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn nearest_pairs(low: __m512, high: __m512) -> __m512 {
    let halves: [u16; 32] = std::array::from_fn(|i| (i / 2 + i % 2 * 16) as u16);
    // SAFETY: a vector's size.
    let order = unsafe { _mm512_loadu_epi16(halves.as_ptr().cast()) };
    let found = _mm512_castps_si512(nearest(low, high));
    _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, found))
}

/// Elements whose upper half is what the noise of their number makes of them; `number` is that of the first.
#[target_feature(enable = "avx512f")]
fn dithered(x: __m512, number: u32) -> __m512i {
    let lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    let n = _mm512_add_epi32(_mm512_set1_epi32(number as i32), lanes);
    let n = _mm512_xor_si512(n, _mm512_srli_epi32::<16>(n));
    let n = _mm512_mullo_epi32(n, _mm512_set1_epi32(NOISE[0] as i32));
    let n = _mm512_xor_si512(n, _mm512_srli_epi32::<15>(n));
    let n = _mm512_mullo_epi32(n, _mm512_set1_epi32(NOISE[1] as i32));
    plus(x, _mm512_srli_epi32::<16>(n))
}

/// Elements with something added to their bits, but for NaN. See [`super::bf16_bits`].
#[target_feature(enable = "avx512f")]
fn plus(x: __m512, added: __m512i) -> __m512i {
    let bits = _mm512_castps_si512(x);
    let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
    _mm512_mask_or_epi32(
        _mm512_add_epi32(bits, added),
        nan,
        bits,
        _mm512_set1_epi32(0x40_0000),
    )
}

/// See [`super::pairs_of_row`].
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub fn pairs_of_row(x: &[f32], out: &mut [f32]) {
    let row = Mat::new(x, 1, x.len());
    for k in (0..x.len()).step_by(32) {
        // SAFETY: its only row.
        let words = unsafe { load_pairs(row, 0, k, 0) };
        let count = (x.len() - k).div_ceil(2).min(16);
        let target = &mut out[k / 2..][..count];
        // SAFETY: masked lanes are not touched; the others are in the target.
        unsafe { _mm512_mask_storeu_ps(target.as_mut_ptr(), mask(count), words) };
    }
}

/// See [`super::halves_of_column`].
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub fn halves_of_column(x: &[f32], first: bool, line: &mut [f32]) {
    for (x, line) in x.chunks(16).zip(line.chunks_mut(16)) {
        let lanes = mask(x.len().min(line.len()));
        // SAFETY: masked lanes are neither read nor touched.
        unsafe {
            let x = _mm512_maskz_loadu_ps(lanes, x.as_ptr());
            let words = match first {
                true => nearest_pairs(x, _mm512_setzero_ps()),
                false => {
                    let old = _mm512_castps_si512(_mm512_maskz_loadu_ps(lanes, line.as_ptr()));
                    let new = _mm512_castps_si512(nearest_pairs(x, x));
                    _mm512_castsi512_ps(_mm512_mask_blend_epi16(UPPER, old, new))
                }
            };
            _mm512_mask_storeu_ps(line.as_mut_ptr(), lanes, words);
        }
    }
}

/// `[k, columns]` as `[k / 2][width]` of pairs.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub fn column_pairs(a: Mat, first: usize, valid: usize, width: usize, out: &mut [f32]) {
    let load = |row: usize, left: usize| match row < a.rows {
        true => {
            let x = &a.row(row)[first + left.min(valid)..first + valid];
            fetch::<_MM_HINT_T1>(x.as_ptr().wrapping_add(width));
            // SAFETY: masked lanes, past the end, are not read.
            unsafe { _mm512_maskz_loadu_ps(mask(x.len()), x.as_ptr()) }
        }
        false => _mm512_setzero_ps(),
    };
    for (r, line) in out.chunks_exact_mut(width).enumerate() {
        for (i, part) in line.chunks_mut(16).enumerate() {
            let words = nearest_pairs(load(2 * r, 16 * i), load(2 * r + 1, 16 * i));
            // SAFETY: masked lanes are not touched.
            unsafe { _mm512_mask_storeu_ps(part.as_mut_ptr(), mask(part.len()), words) };
        }
    }
}

/// See [`super::turn_pairs`].
#[target_feature(enable = "avx512f,avx512bw")]
pub fn turn_pairs(from: &[f32], words: usize, out: &mut [f32]) {
    const WIDTH: usize = 32;
    assert!(words <= 16 && words * WIDTH <= from.len());
    // Line w has the elements 2w and 2w + 1 of rows 0 … 31; column e is to have element e of the rows 2r and 2r + 1.
    let mut columns = [_mm512_setzero_ps(); 32];
    for (line, two) in from
        .chunks_exact(WIDTH)
        .take(words)
        .zip(columns.chunks_exact_mut(2))
    {
        // SAFETY: a line is two vectors.
        let (low, high) = unsafe {
            (
                _mm512_loadu_epi32(line.as_ptr().cast()),
                _mm512_loadu_epi32(line.as_ptr().add(16).cast()),
            )
        };
        let (a, b) = even_and_odd(low, high);
        two[0] = _mm512_castsi512_ps(_mm512_mask_blend_epi16(
            UPPER,
            a,
            _mm512_slli_epi32::<16>(b),
        ));
        two[1] = pairs(a, b);
    }
    let (left, right) = columns.split_at(16);
    let both = turn(left.try_into().expect("16"))
        .into_iter()
        .zip(turn(right.try_into().expect("16")));
    for (line, (left, right)) in out.chunks_exact_mut(WIDTH).zip(both) {
        // SAFETY: a line is two vectors.
        unsafe {
            _mm512_storeu_ps(line.as_mut_ptr(), left);
            _mm512_storeu_ps(line.as_mut_ptr().add(16), right);
        }
    }
}

/// Rows become columns.
#[target_feature(enable = "avx512f")]
fn turn(r: [__m512; 16]) -> [__m512; 16] {
    let pair = |v: __m512| _mm512_castps_pd(v);
    let word = |v: __m512d| _mm512_castpd_ps(v);
    let mut quads = r;
    for g in (0..16).step_by(4) {
        let (a, b) = (
            _mm512_unpacklo_ps(r[g], r[g + 1]),
            _mm512_unpackhi_ps(r[g], r[g + 1]),
        );
        let (c, d) = (
            _mm512_unpacklo_ps(r[g + 2], r[g + 3]),
            _mm512_unpackhi_ps(r[g + 2], r[g + 3]),
        );
        quads[g] = word(_mm512_unpacklo_pd(pair(a), pair(c)));
        quads[g + 1] = word(_mm512_unpackhi_pd(pair(a), pair(c)));
        quads[g + 2] = word(_mm512_unpacklo_pd(pair(b), pair(d)));
        quads[g + 3] = word(_mm512_unpackhi_pd(pair(b), pair(d)));
    }
    // Now quarter q of quads[g + j] holds column 4q + j of the rows g … g + 3.
    let mut out = r;
    for j in 0..4 {
        let [a, b, c, d] = [quads[j], quads[4 + j], quads[8 + j], quads[12 + j]];
        let (even, odd) = (
            _mm512_shuffle_f32x4::<0x88>(a, b),
            _mm512_shuffle_f32x4::<0xdd>(a, b),
        );
        let (even2, odd2) = (
            _mm512_shuffle_f32x4::<0x88>(c, d),
            _mm512_shuffle_f32x4::<0xdd>(c, d),
        );
        out[j] = _mm512_shuffle_f32x4::<0x88>(even, even2);
        out[4 + j] = _mm512_shuffle_f32x4::<0x88>(odd, odd2);
        out[8 + j] = _mm512_shuffle_f32x4::<0xdd>(even, even2);
        out[12 + j] = _mm512_shuffle_f32x4::<0xdd>(odd, odd2);
    }
    out
}
