//! The inner kernel: a tile of C kept in registers over the whole of k.

use super::super::isa::Isa;
use super::pack::FEW;

/// One call of the inner kernel: a tile of `rows` × `columns` of C over `k` words.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    pub k: usize,
    /// Word p of row i of the block lies at [`place`].
    pub a: *const f32,
    /// A panel.
    pub b: *const f32,
    pub c: *mut f32,
    pub c_stride: usize,
    pub columns: usize,
    pub add: bool,
    /// What the next calls will read: a line of 64 bytes from here on is asked for every `ahead_every` steps.
    pub ahead: *const f32,
    pub ahead_every: usize,
}

/// Where word p of row i of a block of `rows` rows lies: see [`FEW`].
#[inline(always)]
fn place(rows: usize, k: usize, (i, p): (usize, usize)) -> usize {
    if rows <= FEW { i * k + p } else { p * rows + i }
}

/// Runs the kernel for a block of `block` rows and a panel.
///
/// # Safety
/// A, B and C must be valid for the sizes that the tile names, A for `block` × k words, B for k steps.
pub(super) unsafe fn run_kernel(tile: Tile, block: usize, pairs: bool) {
    #[cfg(target_arch = "aarch64")]
    use arm::neon;
    #[cfg(target_arch = "x86_64")]
    use x86::{avx2, avx512, avx512_bf16};
    macro_rules! by_rows {
        ($kernel:ident, $($rows:literal)*) => {
            match block {
                // SAFETY: the caller's promise; the instruction set was detected.
                $($rows => unsafe { $kernel::<$rows>(tile) },)*
                _ => unreachable!("blocks are at most block_rows() high"),
            }
        };
    }
    #[cfg(not(target_arch = "x86_64"))]
    debug_assert!(!pairs, "only AVX-512 multiplies pairs");
    match Isa::current() {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 { .. } if pairs => by_rows!(avx512_bf16, 1 2 3 4 5 6 7 8 9 10 11 12 13 14),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 { .. } => by_rows!(avx512, 1 2 3 4 5 6 7 8 9 10 11 12 13 14),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => by_rows!(avx2, 1 2 3 4 5 6),
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => by_rows!(neon, 1 2 3 4 5 6),
        _ => by_rows!(portable, 1 2 3 4),
    }
}

/// The kernel in plain Rust, for one panel of 16 columns.
///
/// # Safety
/// As [`run_kernel`], with `R` the block's rows.
unsafe fn portable<const R: usize>(t: Tile) {
    let mut sums = [[0.0f32; 16]; R];
    for p in 0..t.k {
        // SAFETY: B has k steps of 16 words.
        let b = unsafe { &*t.b.add(p * 16).cast::<[f32; 16]>() };
        for (i, sum) in sums.iter_mut().enumerate() {
            // SAFETY: A has k × R words.
            let x = unsafe { *t.a.add(place(R, t.k, (i, p))) };
            for (s, &y) in sum.iter_mut().zip(b) {
                *s += x * y;
            }
        }
    }
    for (i, sum) in sums.iter().enumerate() {
        // SAFETY: the caller's promise on C.
        unsafe { write_row(sum, i, t) }
    }
}

/// Stores the sums of 16 columns through a plain loop, for kernels without masked stores.
///
/// # Safety
/// C must hold so many columns in this row.
unsafe fn write_row(sums: &[f32; 16], row: usize, t: Tile) {
    // SAFETY: the caller's promise.
    let c = unsafe { std::slice::from_raw_parts_mut(t.c.add(row * t.c_stride), t.columns) };
    for (c, &sum) in c.iter_mut().zip(sums) {
        *c = if t.add { *c + sum } else { sum };
    }
}

/// The loop over k, which the kernels on vectors share: `R` rows by the vectors of a panel, one broadcast of A per row and
/// step. What differs are the vectors and how they are multiplied.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! kernel {
    ($(#[$doc:meta])* $name:ident, $features:literal, $vectors:literal x $lanes:literal, $zero:expr, $load:ident, $broadcast:ident,
     $multiply:ident, $write:ident) => {
        $(#[$doc])*
        ///
        /// # Safety
        /// As [`super::run_kernel`], with `R` the block's rows; needs the instructions.
        #[target_feature(enable = $features)]
        pub unsafe fn $name<const R: usize>(t: Tile) {
            let mut sums = [[$zero; $vectors]; R];
            let mut ahead = t.ahead;
            if t.add {
                // What the sums are added to is read last: gradients come from memory, too.
                for i in 0..R {
                    let c = t.c.wrapping_add(i * t.c_stride);
                    ask(c);
                    ask(c.wrapping_add(16));
                }
            }
            for start in (0..t.k).step_by(t.ahead_every) {
                ask(ahead);
                ahead = ahead.wrapping_add(16);
                for p in start..(start + t.ahead_every).min(t.k) {
                    // SAFETY: A has k × R words, each panel of B k steps of its vectors.
                    unsafe {
                        let b = t.b.add(p * $vectors * $lanes);
                        let mut columns = [$zero; $vectors];
                        for j in 0..$vectors {
                            columns[j] = $load(b.add(j * $lanes));
                        }
                        for i in 0..R {
                            let x = $broadcast(*t.a.add(place(R, t.k, (i, p))));
                            for j in 0..$vectors {
                                sums[i][j] = $multiply(x, columns[j], sums[i][j]);
                            }
                        }
                    }
                }
            }
            for (i, sums) in sums.into_iter().enumerate() {
                // SAFETY: the caller's promise on C.
                unsafe { $write(sums, i, t) }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! The kernels on x86-64 vectors.
    use super::{Tile, place, write_row};
    use crate::kernels::isa::x86::{fetch, multiply_pairs};
    use std::arch::x86_64::*;

    /// Asks for a line, into the second cache.
    #[inline(always)]
    fn ask(word: *const f32) {
        fetch::<_MM_HINT_T1>(word);
    }

    kernel!(
        /// Float32.
        avx512, "avx512f", 2 x 16, _mm512_setzero_ps(), _mm512_loadu_ps, _mm512_set1_ps, _mm512_fmadd_ps, write_masked
    );

    kernel!(
        /// Words that hold pairs of bfloat16.
        avx512_bf16, "avx512f,avx512bf16", 2 x 16, _mm512_setzero_ps(), _mm512_loadu_ps, _mm512_set1_ps, multiply_pairs,
        write_masked
    );

    kernel!(
        /// Float32 in half the width.
        avx2, "avx2,fma", 2 x 8, _mm256_setzero_ps(), _mm256_loadu_ps, _mm256_set1_ps, _mm256_fmadd_ps, write_halves
    );

    /// Row by row: a function that is given all sums would have them in memory, if it is not inlined, and then they are
    /// written there in every step.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn write_masked([mut low, mut high]: [__m512; 2], row: usize, t: Tile) {
        let mask = |columns: usize| ((1u32 << columns.min(16)) - 1) as u16;
        let (m0, m1) = (mask(t.columns), mask(t.columns.saturating_sub(16)));
        let c = t.c.wrapping_add(row * t.c_stride);
        let next = c.wrapping_add(16);
        // SAFETY: masked lanes are not touched, and C holds `rows` × `columns`.
        unsafe {
            if t.add {
                low = _mm512_add_ps(_mm512_maskz_loadu_ps(m0, c), low);
                high = _mm512_add_ps(_mm512_maskz_loadu_ps(m1, next), high);
            }
            _mm512_mask_storeu_ps(c, m0, low);
            _mm512_mask_storeu_ps(next, m1, high);
        }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn write_halves([mut low, mut high]: [__m256; 2], row: usize, t: Tile) {
        let c = t.c.wrapping_add(row * t.c_stride);
        let next = c.wrapping_add(8);
        // SAFETY: 16 floats, of the array or of C by the caller's promise.
        unsafe {
            if t.columns < 16 {
                let mut copied = [0.0f32; 16];
                _mm256_storeu_ps(copied.as_mut_ptr(), low);
                _mm256_storeu_ps(copied.as_mut_ptr().add(8), high);
                return write_row(&copied, row, t);
            }
            if t.add {
                low = _mm256_add_ps(_mm256_loadu_ps(c), low);
                high = _mm256_add_ps(_mm256_loadu_ps(next), high);
            }
            _mm256_storeu_ps(c, low);
            _mm256_storeu_ps(next, high);
        }
    }
}

#[cfg(target_arch = "aarch64")]
mod arm {
    //! The kernel on 64-bit ARM's vectors: 24 sums, four columns and a broadcast are 29 of its 32 registers.
    use super::{Tile, place, write_row};
    use std::arch::aarch64::*;

    /// Left to the processor, whose own prefetching follows panels; nobody has measured more.
    #[inline(always)]
    fn ask(_: *const f32) {}

    kernel!(
        /// Float32.
        neon, "neon", 4 x 4, vdupq_n_f32(0.0), vld1q_f32, vdupq_n_f32, multiply, write_copied
    );

    #[inline]
    #[target_feature(enable = "neon")]
    fn multiply(x: float32x4_t, y: float32x4_t, sum: float32x4_t) -> float32x4_t {
        vfmaq_f32(sum, x, y)
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn write_copied(sums: [float32x4_t; 4], row: usize, t: Tile) {
        let mut copied = [0.0f32; 16];
        // SAFETY: 16 floats; the caller's promise on C.
        unsafe {
            for (j, sum) in sums.into_iter().enumerate() {
                vst1q_f32(copied.as_mut_ptr().add(4 * j), sum);
            }
            write_row(&copied, row, t);
        }
    }
}
