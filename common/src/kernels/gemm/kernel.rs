//! The inner kernel: a tile of C kept in registers over the whole of k.

use super::super::isa::Isa;
use super::Panels;
use super::pack::{FEW, Words, halves};

/// One call of the inner kernel: a tile of `rows` × `columns` of C.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    pub operands: Operands,
    /// Words of a row of B.
    pub words: usize,
    /// Words of a row of A.
    pub row: usize,
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

/// What words of A meet what words of B.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Operands {
    /// Elements meet elements.
    Elements,
    /// Elements meet pairs, which the kernel takes apart.
    Halves,
    /// Pairs meet pairs.
    Pairs,
}

impl Operands {
    /// Those of products with such panels.
    pub fn of(b: Panels) -> Self {
        match (Words::multiplied(b.precision()), b.words()) {
            (Words::Pairs, _) => Self::Pairs,
            (_, Words::Pairs) => Self::Halves,
            _ => Self::Elements,
        }
    }
}

/// Where word p of row i of a block of `rows` rows lies: see [`FEW`].
#[inline(always)]
fn place(rows: usize, row: usize, (i, p): (usize, usize)) -> usize {
    if rows <= FEW {
        i * row + p
    } else {
        p * rows + i
    }
}

/// Runs the kernel for a block of `block` rows and a panel.
///
/// # Safety
/// A, B and C must be valid for the sizes that the tile names, A for `block` rows; where pairs are taken apart, a row of it has
/// two words for each of B's.
pub(super) unsafe fn run_kernel(tile: Tile, block: usize) {
    #[cfg(target_arch = "aarch64")]
    use arm::{neon, neon_halves};
    #[cfg(target_arch = "x86_64")]
    use x86::{avx2, avx2_halves, avx512, avx512_halves, avx512_pairs};
    macro_rules! by_rows {
        ($kernel:ident, $($rows:literal)*) => {
            match block {
                // SAFETY: the caller's promise; the instruction set was detected.
                $($rows => unsafe { $kernel::<$rows>(tile) },)*
                _ => unreachable!("blocks are at most block_rows() high"),
            }
        };
    }
    match (Isa::current(), tile.operands) {
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512 { .. }, Operands::Elements) => {
            by_rows!(avx512, 1 2 3 4 5 6 7 8 9 10 11 12 13 14)
        }
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512 { .. }, Operands::Halves) => {
            by_rows!(avx512_halves, 1 2 3 4 5 6 7 8 9 10 11 12 13 14)
        }
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512 { .. }, Operands::Pairs) => {
            by_rows!(avx512_pairs, 1 2 3 4 5 6 7 8 9 10 11 12 13 14)
        }
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx2, Operands::Halves) => by_rows!(avx2_halves, 1 2 3 4 5 6),
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx2, _) => by_rows!(avx2, 1 2 3 4 5 6),
        #[cfg(target_arch = "aarch64")]
        (Isa::Neon, Operands::Halves) => by_rows!(neon_halves, 1 2 3 4 5 6),
        #[cfg(target_arch = "aarch64")]
        (Isa::Neon, _) => by_rows!(neon, 1 2 3 4 5 6),
        _ => by_rows!(portable, 1 2 3 4),
    }
}

/// The kernel in plain Rust, for one panel of 16 columns.
///
/// # Safety
/// As [`run_kernel`], with `R` the block's rows.
unsafe fn portable<const R: usize>(t: Tile) {
    let elements = if t.operands == Operands::Halves { 2 } else { 1 };
    let mut sums = [[0.0f32; 16]; R];
    for p in 0..t.words {
        // SAFETY: B has so many steps of 16 words.
        let words = unsafe { &*t.b.add(p * 16).cast::<[f32; 16]>() };
        for e in 0..elements {
            let b = match elements {
                1 => *words,
                _ => words.map(|word| halves(word)[e]),
            };
            for (i, sum) in sums.iter_mut().enumerate() {
                // SAFETY: A has so many words for each of `R` rows.
                let x = unsafe { *t.a.add(place(R, t.row, (i, elements * p + e))) };
                for (s, y) in sum.iter_mut().zip(b) {
                    *s += x * y;
                }
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
/// element. What differs are the vectors, how they are multiplied, and how many elements a word of B is taken apart into.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! kernel {
    ($(#[$doc:meta])* $name:ident, $features:literal, $vectors:literal x $lanes:literal, $zero:expr,
     $elements:literal of $load:ident, $broadcast:ident, $multiply:ident, $write:ident) => {
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
            for start in (0..t.words).step_by(t.ahead_every) {
                ask(ahead);
                ahead = ahead.wrapping_add(16);
                for p in start..(start + t.ahead_every).min(t.words) {
                    // SAFETY: A has so many words for each of `R` rows, each panel of B so many steps of its vectors.
                    unsafe {
                        let b = t.b.add(p * $vectors * $lanes);
                        for e in 0..$elements {
                            let b = if e == 0 { b } else { read_anew(b) };
                            let mut columns = [$zero; $vectors];
                            for j in 0..$vectors {
                                columns[j] = $load(b.add(j * $lanes), e);
                            }
                            for i in 0..R {
                                let at = place(R, t.row, (i, $elements * p + e));
                                let x = $broadcast(*t.a.add(at));
                                for j in 0..$vectors {
                                    sums[i][j] = $multiply(x, columns[j], sums[i][j]);
                                }
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

/// The same place, which the compiler does not know to be the same: the second halves of pairs are read anew, where the words
/// of the first would take registers from the sums.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[inline(always)]
#[allow(clippy::pointers_in_nomem_asm_block)] // Nothing is read here.
fn read_anew(mut at: *const f32) -> *const f32 {
    // SAFETY: there is no instruction in it.
    unsafe {
        std::arch::asm!("/* {0} */", inout(reg) at, options(pure, nomem, nostack, preserves_flags));
    }
    at
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! The kernels on x86-64 vectors.
    use super::{Tile, place, read_anew, write_row};
    use crate::kernels::isa::x86::{fetch, multiply_pairs};
    use std::arch::x86_64::*;

    /// Asks for a line, into the second cache.
    #[inline(always)]
    fn ask(word: *const f32) {
        fetch::<_MM_HINT_T1>(word);
    }

    kernel!(
        /// Float32.
        avx512, "avx512f", 2 x 16, _mm512_setzero_ps(), 1 of load_16, _mm512_set1_ps,
        _mm512_fmadd_ps, write_masked
    );

    kernel!(
        /// Elements by pairs of bfloat16.
        avx512_halves, "avx512f", 2 x 16, _mm512_setzero_ps(), 2 of load_half_of_16, _mm512_set1_ps,
        _mm512_fmadd_ps, write_masked
    );

    kernel!(
        /// Pairs by pairs.
        avx512_pairs, "avx512f,avx512bf16", 2 x 16, _mm512_setzero_ps(), 1 of load_16, _mm512_set1_ps,
        multiply_pairs, write_masked
    );

    kernel!(
        /// Float32 in half the width.
        avx2, "avx2,fma", 2 x 8, _mm256_setzero_ps(), 1 of load_8, _mm256_set1_ps, _mm256_fmadd_ps,
        write_halves
    );

    kernel!(
        /// Elements by pairs in half the width.
        avx2_halves, "avx2,fma", 2 x 8, _mm256_setzero_ps(), 2 of load_half_of_8, _mm256_set1_ps, _mm256_fmadd_ps,
        write_halves
    );

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load_16(at: *const f32, _: usize) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_loadu_ps(at) }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn load_8(at: *const f32, _: usize) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { _mm256_loadu_ps(at) }
    }

    /// The first or the second elements of 16 pairs.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load_half_of_16(at: *const f32, e: usize) -> __m512 {
        // SAFETY: the caller's promise.
        let words = |at: *const f32| unsafe { _mm512_loadu_epi32(at.cast()) };
        _mm512_castsi512_ps(match e {
            0 => _mm512_slli_epi32::<16>(words(at)),
            _ => _mm512_and_si512(words(at), _mm512_set1_epi32(UPPER)),
        })
    }

    /// The first or the second elements of eight pairs.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn load_half_of_8(at: *const f32, e: usize) -> __m256 {
        // SAFETY: the caller's promise.
        let words = |at: *const f32| unsafe { _mm256_loadu_si256(at.cast()) };
        _mm256_castsi256_ps(match e {
            0 => _mm256_slli_epi32::<16>(words(at)),
            _ => _mm256_and_si256(words(at), _mm256_set1_epi32(UPPER)),
        })
    }

    /// The upper half of a word.
    const UPPER: i32 = 0xffff_0000_u32 as i32;

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
    use super::{Tile, place, read_anew, write_row};
    use std::arch::aarch64::*;

    /// Left to the processor, whose own prefetching follows panels; nobody has measured more.
    #[inline(always)]
    fn ask(_: *const f32) {}

    kernel!(
        /// Float32.
        neon, "neon", 4 x 4, vdupq_n_f32(0.0), 1 of load, vdupq_n_f32, multiply, write_copied
    );

    kernel!(
        /// Elements by pairs of bfloat16.
        neon_halves, "neon", 4 x 4, vdupq_n_f32(0.0), 2 of load_half, vdupq_n_f32, multiply, write_copied
    );

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn load(at: *const f32, _: usize) -> float32x4_t {
        // SAFETY: the caller's promise.
        unsafe { vld1q_f32(at) }
    }

    /// The first or the second elements of four pairs.
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn load_half(at: *const f32, e: usize) -> float32x4_t {
        // SAFETY: the caller's promise.
        let words = |at: *const f32| unsafe { vld1q_u32(at.cast()) };
        vreinterpretq_f32_u32(match e {
            0 => vshlq_n_u32::<16>(words(at)),
            _ => vandq_u32(words(at), vdupq_n_u32(0xffff_0000)),
        })
    }

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
