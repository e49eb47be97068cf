//! Operands brought into the order and the number format that the kernel reads.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod x86;

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
    Words::multiplied(precision).of(k.next_multiple_of(2))
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
    let (mut apart, mut turned) = ([0.0; WIDEST * WIDEST], [0.0; WIDEST * WIDEST]);
    for (i, left) in (0..of.n()).step_by(width).enumerate() {
        let some = width.min(of.n() - left);
        let square = &mut out[words.of(left) * width..][..words.of(some) * width];
        let panel = &of.panel(i)[from * width..][..lines * width];
        let turn = |elements: &[f32], out: &mut [f32]| {
            let elements = Mat::strided(elements, valid, some, width);
            rows(elements, 0, valid, width, out);
        };
        match words {
            Words::Pairs if multiplies_pairs() => turn_pairs(panel, lines, square),
            Words::Pairs => {
                take_apart(panel, width, &mut apart);
                let lines = &mut turned[..some * width];
                turn(&apart, lines);
                join(lines, width, square);
            }
            Words::Whole | Words::Rounded => turn(panel, square),
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
