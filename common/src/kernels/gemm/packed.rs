//! The right operand in panels, and the storage that operands lie in.

use super::super::team;
use super::pack::{Words, halves, pack, transpose};
use super::{Left, Mat, Precision, panel_width};
use std::ops::Range;

/// Float32 storage aligned to a cache line.
#[derive(Clone, Default)]
pub struct Aligned {
    lines: Vec<Line>,
}

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

impl Aligned {
    /// None yet.
    pub const fn new() -> Self {
        Self { lines: Vec::new() }
    }

    /// None yet, with room for `len` elements: memory that is not touched before it is needed.
    pub fn with_capacity(len: usize) -> Self {
        Self {
            lines: Vec::with_capacity(len.div_ceil(16)),
        }
    }

    /// Makes room for `len` elements; what was there stays, new elements are zero.
    pub fn grow(&mut self, len: usize) {
        let lines = len.div_ceil(16);
        if lines > self.lines.len() {
            self.lines.resize(lines, Line([0.0; 16]));
        }
    }

    /// The elements.
    pub fn as_slice(&self) -> &[f32] {
        // SAFETY: a `Line` is exactly 16 floats without padding, and f32 needs less alignment.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.lines.len() * 16) }
    }

    /// The elements, writable.
    pub fn as_mut_slice(&mut self) -> &mut [f32] {
        // SAFETY: as in `as_slice`.
        unsafe {
            std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.lines.len() * 16)
        }
    }
}

/// A packed right operand B: `n` rows of length `k`.
#[derive(Clone)]
pub struct Packed {
    storage: Aligned,
    n: usize,
    k: usize,
    precision: Precision,
    words: Words,
}

impl Packed {
    /// Storage for operands to come.
    pub fn empty(precision: Precision) -> Self {
        Self {
            storage: Aligned::default(),
            n: 0,
            k: 0,
            precision,
            words: Words::of_panels(precision),
        }
    }

    /// As [`Self::from_rows`], of weights that stay. Those that bfloat16 can say, as most published ones, take half the memory in
    /// float32, too; products are the same to the bit.
    pub fn of_weights(b: Mat, precision: Precision) -> Self {
        let mut packed = Self::empty(precision);
        if packed.words == Words::Whole && b.is_bfloat16() {
            packed.words = Words::Pairs;
        }
        packed.fill(Left::Rows(b));
        packed
    }

    /// Packs the rows of `b`, `[n, k]`: the product is A·bᵀ.
    pub fn from_rows(b: Mat, precision: Precision) -> Self {
        let mut packed = Self::empty(precision);
        packed.set_rows(b);
        packed
    }

    /// Packs the columns of `b`, `[k, n]`: the product is A·b.
    pub fn from_columns(b: Mat, precision: Precision) -> Self {
        let mut packed = Self::empty(precision);
        packed.set_columns(b);
        packed
    }

    /// As [`Self::from_rows`], into the storage that is there.
    pub fn set_rows(&mut self, b: Mat) {
        self.words = Words::of_panels(self.precision);
        self.fill(Left::Rows(b));
    }

    /// As [`Self::from_columns`], into the storage that is there.
    pub fn set_columns(&mut self, b: Mat) {
        self.words = Words::of_panels(self.precision);
        self.fill(Left::Columns(b));
    }

    /// Packs the transpose of some rows of `of`, `[rows, k]`: the product is A·rows. The first row must begin a panel.
    /// What was rounded there stays as it is, which a second packing of the source could not be sure of.
    pub fn set_transposed(&mut self, of: &Packed, rows: Range<usize>) {
        assert_eq!(self.precision, of.precision);
        let width = panel_width();
        (self.n, self.k, self.words) = (of.k, rows.len(), of.words);
        let panel = self.words.of(self.k) * width;
        let len = self.n.div_ceil(width) * panel;
        self.storage.grow(len);
        let source = of.panel_range(rows.start, rows.len());
        team::chunks(&mut self.storage.as_mut_slice()[..len], panel, |i, out| {
            transpose(source, i * width, out);
        });
    }

    fn fill(&mut self, b: Left) {
        let width = panel_width();
        (self.n, self.k) = b.shape();
        let panel = self.words.of(self.k) * width;
        let len = self.n.div_ceil(width) * panel;
        self.storage.grow(len);
        if len > 0 {
            let words = self.words;
            // Small operands (attention inside a parallel loop) are packed by the caller's thread.
            let panels = &mut self.storage.as_mut_slice()[..len];
            if len < 1 << 16 {
                panels
                    .chunks_mut(panel)
                    .enumerate()
                    .for_each(|(i, out)| pack(b, i * width, width, words, out));
            } else {
                team::chunks(panels, panel, |i, out| {
                    pack(b, i * width, width, words, out)
                });
            }
        }
    }

    /// The format of the elements.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// The number of rows of B (columns of the product).
    pub fn n(&self) -> usize {
        self.n
    }

    /// The length of the sums.
    pub fn k(&self) -> usize {
        self.k
    }

    /// All of B.
    pub fn panels(&self) -> Panels<'_> {
        self.panel_range(0, self.n)
    }

    /// The rows `start .. start + n` of B; `start` must be a multiple of [`panel_width`].
    pub fn panel_range(&self, start: usize, n: usize) -> Panels<'_> {
        let width = panel_width();
        assert!(start.is_multiple_of(width) && start + n <= self.n);
        let panel = self.words.of(self.k) * width;
        Panels {
            data: &self.storage.as_slice()[start / width * panel..],
            n,
            k: self.k,
            panel_stride: panel,
            precision: self.precision,
            words: self.words,
        }
    }

    /// All rows of B with their sums taken over a part of `k` alone; it must begin at an even place.
    pub fn sum_range(&self, part: Range<usize>) -> Panels<'_> {
        assert!(part.start.is_multiple_of(2) && part.end <= self.k);
        assert!(
            part.end == self.k || part.end.is_multiple_of(2) || self.words != Words::Pairs,
            "a pair would be cut"
        );
        let all = self.panels();
        let skipped = self.words.of(part.start) * panel_width();
        Panels {
            data: &all.data[skipped.min(all.data.len())..],
            k: part.len(),
            ..all
        }
    }

    /// Copies all rows of B (rounded, if the precision rounds) into `out`, `[n, k]`.
    pub fn read(&self, out: &mut [f32]) {
        let (width, k) = (panel_width(), self.k);
        assert_eq!(out.len(), self.n * k);
        team::chunks(out, width * k, |panel, rows| {
            for (r, row) in rows.chunks_exact_mut(k).enumerate() {
                self.read_row(panel * width + r, row);
            }
        });
    }

    /// Copies row `r` of B (rounded, if the precision rounds) into `out`, `[k]`.
    pub fn read_row(&self, r: usize, out: &mut [f32]) {
        let width = panel_width();
        let k_words = self.words.of(self.k);
        let panel = &self.storage.as_slice()[r / width * k_words * width..];
        for (i, out) in out[..self.k].iter_mut().enumerate() {
            *out = match self.words {
                Words::Pairs => halves(panel[i / 2 * width + r % width])[i % 2],
                Words::Whole | Words::Rounded => panel[i * width + r % width],
            };
        }
    }
}

/// A borrowed right operand in panels: a [`Packed`] or a part of it. Word w of row r lies at
/// `r / width * panel_stride + w * width + r % width`.
#[derive(Clone, Copy)]
pub struct Panels<'a> {
    data: &'a [f32],
    n: usize,
    k: usize,
    panel_stride: usize,
    precision: Precision,
    words: Words,
}

impl<'a> Panels<'a> {
    pub(super) fn n(&self) -> usize {
        self.n
    }

    pub(super) fn k(&self) -> usize {
        self.k
    }

    pub(super) fn precision(&self) -> Precision {
        self.precision
    }

    /// What a panel's first word begins.
    pub(super) fn panel(&self, i: usize) -> &'a [f32] {
        &self.data[i * self.panel_stride..]
    }

    /// Where panel i is, if there is one.
    pub(super) fn ahead(&self, i: usize) -> *const f32 {
        self.data.as_ptr().wrapping_add(i * self.panel_stride)
    }

    /// What its words hold.
    pub(super) fn words(&self) -> Words {
        self.words
    }
}
