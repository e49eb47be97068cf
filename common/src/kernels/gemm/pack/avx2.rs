//! Rows turned into columns with 256-bit vectors.

use super::Mat;
use crate::kernels::isa::x86::fetch;
use crate::kernels::isa::x86::narrow::{load, load_first, store, zero};
use std::arch::x86_64::*;

/// `[rows, k]` as `[k][width]`, in squares of 8. What a width below 8 leaves of a square in the next line, that line
/// overwrites.
#[target_feature(enable = "avx2,fma")]
pub fn rows(a: Mat, first: usize, valid: usize, width: usize, out: &mut [f32]) {
    assert!(first + valid <= a.rows && (width < 8 || width.is_multiple_of(8)));
    let out = &mut out[..a.cols * width];
    for start in (0..a.cols).step_by(8) {
        for left in (0..width).step_by(8) {
            let there = valid.saturating_sub(left).min(8);
            let at = (first + left) * a.stride + start;
            let from = Square {
                // (There may be none, past the end.)
                at: a.data.as_ptr().wrapping_add(at),
                stride: a.stride,
                ahead: valid * a.stride,
                k: a.cols - start,
            };
            let to = &mut out[start * width + left..];
            macro_rules! by_rows {
                ($($rows:literal)*) => {
                    match there {
                        // SAFETY: rows that were asserted.
                        $($rows => unsafe { from.turn::<$rows>(to, width) },)*
                        _ => unreachable!("a square has eight"),
                    }
                };
            }
            by_rows!(0 1 2 3 4 5 6 7 8);
        }
    }
}

/// Some rows of a matrix, from a column on.
struct Square {
    at: *const f32,
    stride: usize,
    /// From a word to that which is packed next.
    ahead: usize,
    /// Columns that are left.
    k: usize,
}

impl Square {
    /// Writes the first eight columns, or what is left of them, as lines `width` words apart.
    ///
    /// # Safety
    /// There must be `R` rows.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn turn<const R: usize>(&self, to: &mut [f32], width: usize) {
        let mut square = [zero(); 8];
        for (i, words) in square.iter_mut().enumerate().take(R) {
            let row = self.at.wrapping_add(i * self.stride);
            fetch::<_MM_HINT_T1>(row.wrapping_add(self.ahead));
            // SAFETY: inside the row, which is there.
            *words = unsafe {
                match self.k {
                    8.. => load(row),
                    rest => load_first(rest, row),
                }
            };
        }
        let columns = turn(square);
        if self.k >= 8 && to.len() >= 7 * width + 8 {
            for (i, words) in columns.into_iter().enumerate() {
                // SAFETY: eight words, of a slice that is as long.
                unsafe { store(to.as_mut_ptr().add(i * width), words) };
            }
            return;
        }
        for (line, words) in to.chunks_mut(width).zip(columns).take(self.k) {
            let mut copied = [0.0; 8];
            // SAFETY: eight words.
            unsafe { store(copied.as_mut_ptr(), words) };
            let lanes = line.len().min(8);
            line[..lanes].copy_from_slice(&copied[..lanes]);
        }
    }
}

/// Rows become columns.
#[inline]
#[target_feature(enable = "avx2")]
fn turn(r: [__m256; 8]) -> [__m256; 8] {
    let pair = |v: __m256| _mm256_castps_pd(v);
    let word = |v: __m256d| _mm256_castpd_ps(v);
    let mut quads = r;
    for g in [0, 4] {
        let (a, b) = (
            _mm256_unpacklo_ps(r[g], r[g + 1]),
            _mm256_unpackhi_ps(r[g], r[g + 1]),
        );
        let (c, d) = (
            _mm256_unpacklo_ps(r[g + 2], r[g + 3]),
            _mm256_unpackhi_ps(r[g + 2], r[g + 3]),
        );
        quads[g] = word(_mm256_unpacklo_pd(pair(a), pair(c)));
        quads[g + 1] = word(_mm256_unpackhi_pd(pair(a), pair(c)));
        quads[g + 2] = word(_mm256_unpacklo_pd(pair(b), pair(d)));
        quads[g + 3] = word(_mm256_unpackhi_pd(pair(b), pair(d)));
    }
    // Now half h of quads[g + j] holds column 4h + j of the rows g … g + 3.
    let mut out = r;
    for j in 0..4 {
        out[j] = _mm256_permute2f128_ps::<0x20>(quads[j], quads[4 + j]);
        out[4 + j] = _mm256_permute2f128_ps::<0x31>(quads[j], quads[4 + j]);
    }
    out
}
