//! Operands brought into the order and the number format that the kernel reads.

use super::super::isa::{Isa, multiversion};
use super::{Left, Mat, Panels, Precision, panel_width};
use std::ops::Range;

/// What a word of 32 bits holds.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Words {
    /// An element.
    Whole,
    /// An element, rounded to bfloat16.
    Rounded,
    /// Two elements in bfloat16, k and k + 1.
    Pairs,
}

/// Whether the machine multiplies pairs.
pub(super) fn multiplies_pairs() -> bool {
    Isa::current() == Isa::Avx512 { bf16: true }
}

impl Words {
    /// Those that are multiplied as they are: of left operands, and of caches.
    pub fn multiplied(precision: Precision) -> Self {
        match precision {
            Precision::F32 => Self::Whole,
            Precision::Bf16 if multiplies_pairs() => Self::Pairs,
            Precision::Bf16 => Self::Rounded,
        }
    }

    /// Those of right operands: pairs take half the memory, whether or not the kernel has to take them apart.
    pub fn of_panels(precision: Precision) -> Self {
        match precision {
            Precision::F32 => Self::Whole,
            Precision::Bf16 => Self::Pairs,
        }
    }

    /// How many a row of `k` elements takes.
    pub fn of(self, k: usize) -> usize {
        match self {
            Self::Whole | Self::Rounded => k,
            Self::Pairs => k.div_ceil(2),
        }
    }
}

/// The number of 32-bit words that a row of `k` elements takes in a cache: bfloat16 comes in pairs, where the machine can
/// multiply them.
pub fn words(k: usize, precision: Precision) -> usize {
    Words::multiplied(precision).of(k)
}

/// The same of the left operand: where the kernel may take panels' pairs apart, there is an element for each half.
pub(super) fn left_words(k: usize, precision: Precision) -> usize {
    match Words::multiplied(precision) {
        Words::Whole | Words::Rounded => k.next_multiple_of(2),
        Words::Pairs => k.div_ceil(2),
    }
}

/// Writes a row of a cache, its words one after another.
pub fn put_row(x: &[f32], precision: Precision, out: &mut [f32]) {
    match Words::multiplied(precision) {
        Words::Pairs => pairs_of_row(x, out),
        words => (out.iter_mut().zip(x)).for_each(|(word, &x)| *word = rounded(x, words)),
    }
}

/// Writes element k of the rows of a cache, of which `line` holds the words that it belongs to. Elements come in
/// the order of k.
pub fn put_column(x: &[f32], k: usize, precision: Precision, line: &mut [f32]) {
    match Words::multiplied(precision) {
        Words::Pairs => halves_of_column(x, k.is_multiple_of(2), line),
        words => (line.iter_mut().zip(x)).for_each(|(word, &x)| *word = rounded(x, words)),
    }
}

/// Blocks of the left operand of so few rows lie row by row: to turn them would cost more than to read them so.
pub(super) const FEW: usize = 3;

/// Packs some rows of the left operand: as a panel is, or one after another.
pub(super) fn pack_left(source: Left, rows: Range<usize>, precision: Precision, out: &mut [f32]) {
    let ((_, k), words) = (source.shape(), Words::multiplied(precision));
    let filled = words.of(k);
    if rows.len() > FEW {
        let (lines, rest) = out.split_at_mut(filled * rows.len());
        rest.fill(0.0);
        return pack(source, rows.start, rows.len(), words, lines);
    }
    let lines = out.chunks_exact_mut(left_words(k, precision).max(1));
    for (r, line) in rows.zip(lines) {
        match source {
            Left::Rows(a) => put_row(a.row(r), precision, line),
            Left::Columns(a) => {
                let row: Vec<f32> = (0..k).map(|c| a.row(c)[r]).collect();
                put_row(&row, precision, line);
            }
        }
        line[filled..].fill(0.0);
    }
}

/// What a word of its own holds of x.
fn rounded(x: f32, words: Words) -> f32 {
    match words {
        Words::Rounded => f32::from_bits(bf16_bits(x, None) << 16),
        Words::Whole | Words::Pairs => x,
    }
}

/// Packs rows `first .. first + width` of an operand as `[words of k][width]`; rows past the end become zero.
pub(super) fn pack(source: Left, first: usize, width: usize, words: Words, out: &mut [f32]) {
    let (m, _) = source.shape();
    let valid = width.min(m - first);
    match (source, words) {
        (Left::Rows(a), Words::Pairs) if multiplies_pairs() => {
            row_pairs(a, first, valid, width, out)
        }
        (Left::Columns(a), Words::Pairs) if multiplies_pairs() => {
            assert!(
                a.dither.is_none(),
                "weights in training are packed by their rows"
            );
            column_pairs(a, first, valid, width, out)
        }
        (_, Words::Pairs) => join_strips(source, first, width, out),
        (Left::Rows(a), _) => rows(a, first, valid, width, out),
        (Left::Columns(a), _) => pack_columns(a, first, valid, width, out),
    }
    if words == Words::Rounded {
        round_panel(source, first, valid, width, out);
    }
}

/// Elements of a row that are packed at a time before they are joined.
const STRIP: usize = 64;

/// Packs pairs by way of words of their own.
fn join_strips(source: Left, first: usize, width: usize, out: &mut [f32]) {
    let (_, k) = source.shape();
    let mut lines = [0.0; STRIP * WIDEST];
    for (start, out) in (0..k).step_by(STRIP).zip(out.chunks_mut(STRIP / 2 * width)) {
        let count = STRIP.min(k - start);
        let lines = &mut lines[..count * width];
        pack(
            source.part(start..start + count),
            first,
            width,
            Words::Rounded,
            lines,
        );
        join(lines, width, out);
    }
}

/// Rows of float32, turned: in squares of 16 or 8 where there are vectors so wide.
fn rows(a: Mat, first: usize, valid: usize, width: usize, out: &mut [f32]) {
    match Isa::current() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the instructions are there.
        Isa::Avx512 { .. } => unsafe { x86::rows(a, first, valid, width, out) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 => unsafe { avx2::rows(a, first, valid, width, out) },
        _ => strips(a, first, valid, width, out),
    }
}

/// Rows of words, one after another, as a panel: `[rows, k]` as `[k][panel_width]`.
pub fn turn_words(from: &[f32], k: usize, out: &mut [f32]) {
    let count = from.len() / k;
    rows(Mat::new(from, count, k), 0, count, panel_width(), out);
}

/// The same in plain Rust: of each row a cache line at a time, which goes to as many lines of the target.
fn strips(a: Mat, first: usize, valid: usize, width: usize, out: &mut [f32]) {
    for (strip, target) in out.chunks_mut(16 * width).enumerate() {
        for i in 0..valid {
            let row = &a.row(first + i)[16 * strip..];
            for (line, &x) in target.chunks_exact_mut(width).zip(row) {
                line[i] = x;
            }
        }
        for line in target.chunks_exact_mut(width) {
            line[valid..].fill(0.0);
        }
    }
}

/// Packs the elements `first ..` of the sums of a packed operand as the rows of a panel, one for each element: out is
/// `[row of the operand][width]`, in the operand's own words.
pub(super) fn transpose(of: Panels, first: usize, out: &mut [f32]) {
    let width = panel_width();
    let valid = width.min(of.k() - first);
    let words = of.words();
    let (from, lines) = (words.of(first), words.of(valid));
    for (i, left) in (0..of.n()).step_by(width).enumerate() {
        let some = width.min(of.n() - left);
        let square = &mut out[words.of(left) * width..][..words.of(some) * width];
        let panel = &of.panel(i)[from * width..][..lines * width];
        match words {
            Words::Pairs if multiplies_pairs() => turn_pairs(panel, lines, square),
            Words::Pairs => {
                let (mut apart, mut turned) = ([0.0; WIDEST * WIDEST], [0.0; WIDEST * WIDEST]);
                take_apart(panel, width, &mut apart);
                let lines = &mut turned[..some * width];
                rows(
                    Mat::strided(&apart, valid, some, width),
                    0,
                    valid,
                    width,
                    lines,
                );
                join(lines, width, square);
            }
            Words::Whole | Words::Rounded => {
                rows(
                    Mat::strided(panel, valid, some, width),
                    0,
                    valid,
                    width,
                    square,
                );
            }
        }
    }
}

/// The most rows of a panel.
const WIDEST: usize = 32;

/// Functions on pairs of bfloat16, which vectors alone make.
macro_rules! on_pairs {
    ($($(#[$doc:meta])* fn $name:ident($($arg:ident: $ty:ty),*);)*) => {$(
        $(#[$doc])*
        fn $name($($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: pairs are made only where the instructions are.
            unsafe {
                x86::$name($($arg),*)
            }
            #[cfg(not(target_arch = "x86_64"))]
            {
                let _ = ($($arg),*);
                unreachable!("no such machine multiplies pairs")
            }
        }
    )*};
}

on_pairs! {
    /// A square of pairs turned: `words` lines of 32 rows' words become lines of 32 elements, each of two rows.
    fn turn_pairs(from: &[f32], words: usize, out: &mut [f32]);
    /// A row as pairs of bfloat16.
    fn pairs_of_row(x: &[f32], out: &mut [f32]);
    /// Elements as the first halves of their words, the second zero; or as the second, the first left as they are.
    fn halves_of_column(x: &[f32], first: bool, line: &mut [f32]);
    /// Rows as pairs of bfloat16.
    fn row_pairs(a: Mat, first: usize, valid: usize, width: usize, out: &mut [f32]);
    /// Columns as pairs of bfloat16, to the nearest.
    fn column_pairs(a: Mat, first: usize, valid: usize, width: usize, out: &mut [f32]);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
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
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
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
}

multiversion! {
    pub fn pack_columns(a: Mat, first: usize, valid: usize, width: usize, out: &mut [f32]) {
        for (r, line) in out.chunks_exact_mut(width).enumerate() {
            line[..valid].copy_from_slice(&a.row(r)[first..first + valid]);
            line[valid..].fill(0.0);
        }
    }
}

multiversion! {
    /// Lines of words that are bfloat16 numbers become half as many of pairs.
    pub fn join(lines: &[f32], width: usize, out: &mut [f32]) {
        for (two, out) in lines.chunks(2 * width).zip(out.chunks_exact_mut(width)) {
            let (low, high) = two.split_at(width);
            for (i, (out, low)) in out.iter_mut().zip(low).enumerate() {
                let high = high.get(i).map_or(0, |x| x.to_bits());
                *out = f32::from_bits(low.to_bits() >> 16 | high);
            }
        }
    }
}

multiversion! {
    /// The reverse of [`join`].
    pub fn take_apart(lines: &[f32], width: usize, out: &mut [f32]) {
        for (line, two) in lines.chunks_exact(width).zip(out.chunks_exact_mut(2 * width)) {
            let (low, high) = two.split_at_mut(width);
            for ((word, low), high) in line.iter().zip(low).zip(high) {
                [*low, *high] = halves(*word);
            }
        }
    }
}

/// The elements of a pair.
#[inline(always)]
pub(super) fn halves(word: f32) -> [f32; 2] {
    let word = word.to_bits();
    [word << 16, word & 0xffff_0000].map(f32::from_bits)
}

multiversion! {
    pub fn round_panel(source: Left, first: usize, valid: usize, width: usize, out: &mut [f32]) {
        for (c, line) in out.chunks_exact_mut(width).enumerate() {
            for (i, x) in line[..valid].iter_mut().enumerate() {
                let noise = match source {
                    Left::Rows(a) => a.noise(first + i, c),
                    Left::Columns(a) => a.noise(c, first + i),
                };
                *x = f32::from_bits(bf16_bits(*x, noise) << 16);
            }
        }
    }
}

/// x in bfloat16, in the low half of a word: the nearest (ties to even), or what `noise` (16 bits) makes of it. NaN
/// stays NaN.
#[inline(always)]
fn bf16_bits(x: f32, noise: Option<u32>) -> u32 {
    let bits = x.to_bits();
    let added = noise.unwrap_or(0x7fff + ((bits >> 16) & 1));
    if x.is_nan() {
        (bits >> 16) | 0x40
    } else {
        bits.wrapping_add(added) >> 16
    }
}

/// The factors of the hash below.
const NOISE: [u32; 2] = [0x7feb_352d, 0x846c_a68b];

/// Bits that look random, from an element's number.
#[inline(always)]
pub(super) fn sixteen_bits(number: u32) -> u32 {
    let x = (number ^ (number >> 16)).wrapping_mul(NOISE[0]);
    let x = (x ^ (x >> 15)).wrapping_mul(NOISE[1]);
    x >> 16
}
