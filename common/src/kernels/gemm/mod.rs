//! Matrix product C (+)= A·Bᵀ: the heart of generation, scoring and training.
//!
//! B is stored in panels of [`panel_width`] rows, `[panel][k][width]`, A in blocks of up to 14 rows, `[block][k][rows]`
//! (up to three rows lie as they are), so that the inner kernel reads both in order and keeps its tile of C in registers
//! over the whole of k. While it works on some panels it fetches those after them, since weights come from memory. Each
//! element of C is one chain of fused multiply-adds in the order of k, whatever the sizes, blocks and threads are: a
//! row's result does not depend on the rows beside it.
//!
//! In bfloat16, 32-bit words hold the pair of elements (k, k+1); products are summed in float32 (`vdpbf16ps`). On a
//! machine without that instruction B lies so, too, for the sake of memory, and the kernel takes its pairs apart; A's elements
//! are rounded and have a word each. In float32, too, weights lie so that bfloat16 can say; then A is not rounded.

mod kernel;
mod pack;
mod packed;

pub use pack::{put_column, put_row, turn_words, words};
pub use packed::{Aligned, Packed, Panels};

use super::isa::Isa;
use super::{fit, team};
use kernel::{Operands, Tile, run_kernel};
use pack::{left_words, pack_left, sixteen_bits};
use std::cell::Cell;
use std::ops::Range;

/// The number format of a product's operands; sums are float32 always.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// IEEE single precision.
    F32,
    /// Operands rounded to bfloat16.
    Bf16,
}

/// A row-major matrix view: `rows` × `cols`, the rows `stride` elements apart.
#[derive(Clone, Copy)]
pub struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    stride: usize,
    /// The number of the first element in the buffer that the rounding of weights in training is derived from.
    dither: Option<usize>,
}

impl<'a> Mat<'a> {
    /// A dense matrix.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// A matrix whose rows lie `stride` elements apart.
    pub fn strided(data: &'a [f32], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(cols <= stride || rows <= 1);
        assert!(
            rows == 0 || (rows - 1) * stride + cols <= data.len(),
            "matrix view past its data"
        );
        Self {
            data,
            rows,
            cols,
            stride,
            dither: None,
        }
    }

    /// The same matrix, rounded to bfloat16 stochastically: up with the probability that keeps the expectation, by a
    /// noise that depends on the element's number alone, of which `first` is that of the first.
    ///
    /// Weights in training need this. A step of 1e-6 is far below bfloat16's resolution: to the nearest, most weights
    /// would not move for hundreds of steps, and those that began halfway (dequantised ones often do) would all jump
    /// with the first. This way every step shows in proportion, and rounding adds no noise of its own from step to step.
    pub fn dithered(self, first: usize) -> Self {
        Self {
            dither: Some(first),
            ..self
        }
    }

    /// Whether bfloat16 can say every element, also where it has no subnormal numbers (`vcvtne2ps2bf16` makes them zero).
    fn is_bfloat16(&self) -> bool {
        let exact = |x: &f32| x.to_bits() & 0xffff == 0 && !x.is_subnormal();
        (0..self.rows).all(|r| self.row(r).iter().all(exact))
    }

    /// A part of it, from an element on.
    fn part(self, start: usize, rows: usize, cols: usize) -> Self {
        Self {
            data: &self.data[start.min(self.data.len())..],
            rows,
            cols,
            dither: self.dither.map(|first| first + start),
            ..self
        }
    }

    /// What is added to element (r, c) before it is cut to bfloat16, if it is not rounded to the nearest.
    #[inline(always)]
    fn noise(&self, r: usize, c: usize) -> Option<u32> {
        self.dither
            .map(|first| sixteen_bits((first + r * self.stride + c) as u32))
    }

    fn row(&self, r: usize) -> &'a [f32] {
        &self.data[r * self.stride..][..self.cols]
    }
}

/// The left operand: `m` rows to multiply, given row by row or as the columns of a matrix.
#[derive(Clone, Copy)]
pub enum Left<'a> {
    /// `[m, k]`.
    Rows(Mat<'a>),
    /// `[k, m]`, used transposed.
    Columns(Mat<'a>),
}

impl Left<'_> {
    fn shape(&self) -> (usize, usize) {
        match self {
            Self::Rows(a) => (a.rows, a.cols),
            Self::Columns(a) => (a.cols, a.rows),
        }
    }

    /// The same rows with a part of k.
    fn part(self, k: Range<usize>) -> Self {
        match self {
            Self::Rows(a) => Self::Rows(a.part(k.start, a.rows, k.len())),
            Self::Columns(a) => Self::Columns(a.part(k.start * a.stride, k.len(), a.cols)),
        }
    }
}

/// How many rows of B a panel holds.
pub fn panel_width() -> usize {
    match Isa::current() {
        Isa::Avx512 { .. } => 32,
        Isa::Avx2 | Isa::Neon | Isa::Portable => 16,
    }
}

/// How many rows of A the kernel can take at once.
fn block_rows() -> usize {
    match Isa::current() {
        Isa::Avx512 { .. } => 14,
        Isa::Avx2 | Isa::Neon => 6,
        Isa::Portable => 4,
    }
}

/// Whether a product stays in the calling thread or may use the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Threads {
    /// In this thread alone (inside a loop that is parallel already).
    One,
    /// Over the pool.
    All,
}

/// What happens to what C holds before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    /// C = A·Bᵀ.
    Set,
    /// C += A·Bᵀ (the sum is formed first, then added).
    Add,
}

/// A packed left operand, for products with several right ones.
#[derive(Default)]
pub struct PackedLeft {
    storage: Aligned,
    /// Rows of a block; the last one may have fewer.
    block: usize,
    m: usize,
    k: usize,
    precision: Option<Precision>,
}

impl PackedLeft {
    /// Packs `a` into the storage that is there.
    pub fn set(&mut self, a: Left, precision: Precision, threads: Threads) {
        self.fill(a.shape(), precision, threads, |rows, out| {
            pack_left(a, rows, precision, out);
        });
    }

    /// The same for an operand `[m, k]` that is not there: `make(r, row)` writes row r of it. So it need not be written
    /// to memory and read again.
    pub fn set_made(
        &mut self,
        (m, k): (usize, usize),
        make: impl Fn(usize, &mut [f32]) + Sync,
        precision: Precision,
        threads: Threads,
    ) {
        self.fill((m, k), precision, threads, |rows, out| {
            let mut made = MADE.take();
            fit(&mut made, rows.len() * k);
            for (r, row) in rows.clone().zip(made.chunks_exact_mut(k)) {
                make(r, row);
            }
            let block = Left::Rows(Mat::new(&made, rows.len(), k));
            pack_left(block, 0..rows.len(), precision, out);
            MADE.set(made);
        });
    }

    fn fill(
        &mut self,
        shape: (usize, usize),
        precision: Precision,
        threads: Threads,
        fill: impl Fn(Range<usize>, &mut [f32]) + Sync,
    ) {
        (self.m, self.k) = shape;
        self.precision = Some(precision);
        // Even blocks: 16 rows are 8 + 8, not 14 + 2.
        self.block = self.m.div_ceil(self.m.div_ceil(block_rows()).max(1)).max(1);
        let k = left_words(self.k, precision);
        self.storage.grow(self.m * k);
        let out = &mut self.storage.as_mut_slice()[..self.m * k];
        let (len, block) = (self.block * k, self.block);
        let fill = |i: usize, out: &mut [f32]| fill(i * block..i * block + out.len() / k, out);
        if threads == Threads::One || out.len() < 1 << 15 {
            (out.chunks_mut(len.max(1)).enumerate()).for_each(|(i, out)| fill(i, out));
        } else {
            team::chunks(out, len, fill);
        }
    }
}

thread_local! {
    /// The left operand of [`matmul`]; kept, since fresh pages cost more than the packing.
    static LEFT: Cell<PackedLeft> = Cell::default();
    /// A block of rows that are made.
    static MADE: Cell<Vec<f32>> = const { Cell::new(vec![]) };
}

/// C (+)= A·Bᵀ: `a` is `[m, k]`, `b` has `n` rows of `k`, `c` is `[m, n]` with its rows `c_stride` apart.
pub fn matmul(a: Left, b: Panels, c: &mut [f32], c_stride: usize, write: Write, threads: Threads) {
    let mut left = LEFT.take();
    left.set(a, b.precision(), threads);
    multiply(&left, b, c, c_stride, write, threads);
    LEFT.set(left);
}

/// As [`matmul`], with row r of `a` `[m, k]` written by `make(r, row)`; see [`PackedLeft::set_made`].
pub fn matmul_made(
    m: usize,
    make: impl Fn(usize, &mut [f32]) + Sync,
    b: Panels,
    c: &mut [f32],
    c_stride: usize,
    write: Write,
) {
    let mut left = LEFT.take();
    left.set_made((m, b.k()), make, b.precision(), Threads::All);
    multiply(&left, b, c, c_stride, write, Threads::All);
    LEFT.set(left);
}

/// As [`matmul`], with `a` packed before.
pub fn multiply(
    a: &PackedLeft,
    b: Panels,
    c: &mut [f32],
    c_stride: usize,
    write: Write,
    threads: Threads,
) {
    assert_eq!(a.k, b.k(), "inner dimensions differ");
    assert_eq!(a.precision, Some(b.precision()), "formats differ");
    if a.m == 0 || b.n() == 0 {
        return;
    }
    assert!(b.n() <= c_stride || a.m == 1);
    assert!(
        (a.m - 1) * c_stride + b.n() <= c.len(),
        "result past its buffer"
    );
    let (row, words) = (left_words(a.k, b.precision()), b.words().of(a.k));
    let product = Product {
        a: &a.storage.as_slice()[..a.m * row],
        rows: a.block,
        m: a.m,
        row,
        words,
        b,
        c: c.as_mut_ptr(),
        c_stride,
        write,
        fetched: a.m <= FETCHED_ROWS && words * b.n() >= FETCHED_WORDS,
    };
    product.run(threads);
}

/// One product, ready to be cut into tiles.
struct Product<'a> {
    a: &'a [f32],
    /// Rows of a block of A; the last one may have fewer.
    rows: usize,
    m: usize,
    /// Words of a row of A.
    row: usize,
    /// Words of a row of B.
    words: usize,
    b: Panels<'a>,
    c: *mut f32,
    c_stride: usize,
    write: Write,
    /// Whether panels are fetched ahead.
    fetched: bool,
}

// SAFETY: tasks write disjoint tiles of C, which the caller borrowed mutably for the whole call.
unsafe impl Sync for Product<'_> {}

/// So many panels of B stay in the second cache while blocks of A run by them, each block in the first.
const PANELS: usize = 4;

impl Product<'_> {
    fn run(&self, threads: Threads) {
        let blocks = self.m.div_ceil(self.rows);
        let panels = self.b.n().div_ceil(panel_width());
        if threads == Threads::One {
            return self.tiles(0..blocks, 0..panels);
        }
        // Tasks of a few panels and about a hundred rows.
        let panel_step = panels
            .div_ceil(4 * rayon::current_num_threads())
            .clamp(1, PANELS);
        let block_step = blocks.min(10);
        let (across, down) = (panels.div_ceil(panel_step), blocks.div_ceil(block_step));
        team::each(across * down, |task| {
            // Neighbouring tasks share their panels of B: they are the larger operand as a rule.
            let (p, b) = (task / down * panel_step, task % down * block_step);
            self.tiles(
                b..(b + block_step).min(blocks),
                p..(p + panel_step).min(panels),
            );
        });
    }

    fn tiles(&self, blocks: Range<usize>, panels: Range<usize>) {
        for first in panels.clone().step_by(PANELS) {
            let some = first..(first + PANELS).min(panels.end);
            for (i, block) in blocks.clone().enumerate() {
                for panel in some.clone() {
                    self.tile(block, panel, some.len(), (i, blocks.len()));
                }
            }
        }
    }

    /// One call of the kernel, which fetches the i-th of `parts` parts of the panel that lies `ahead` after this one.
    fn tile(&self, block: usize, panel: usize, ahead: usize, (i, parts): (usize, usize)) {
        let width = panel_width();
        let (first, left) = (block * self.rows, panel * width);
        let rows = self.rows.min(self.m - first);
        let a = &self.a[first * self.row..][..rows * self.row];
        let lines = match self.fetched {
            true => (self.words * width / 16).div_ceil(parts),
            false => 1,
        };
        // SAFETY: the asserts of `matmul` and of `Panels` hold every pointer inside its buffer: A has `rows` × `row`
        // words here, a panel of B `words` steps of `width`, C `rows` × `columns`.
        unsafe {
            let tile = Tile {
                words: self.words,
                row: self.row,
                a: a.as_ptr(),
                b: self.b.panel(panel).as_ptr(),
                c: self.c.add(first * self.c_stride + left),
                c_stride: self.c_stride,
                columns: width.min(self.b.n() - left),
                add: self.write == Write::Add,
                operands: Operands::of(self.b),
                ahead: (self.b.ahead(panel + ahead)).wrapping_add(i * lines * 16),
                ahead_every: (self.words / lines.max(1)).max(1),
            };
            run_kernel(tile, rows);
        }
    }
}

/// Up to so many rows of A the panels of B are fetched ahead: those of a decoding step. With more a panel serves for
/// long, and what its fetching would hide is less than what it costs.
const FETCHED_ROWS: usize = 128;

/// Operands of fewer words, such as a segment's keys, come in sooner than they can be asked for.
const FETCHED_WORDS: usize = 1 << 14;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::noise;

    /// C = A·Bᵀ in float64.
    fn plain(a: &[f32], b: &[f32], m: usize, n: usize, k: usize) -> Vec<f64> {
        let at = |i: usize, j: usize| {
            (0..k)
                .map(|p| a[i * k + p] as f64 * b[j * k + p] as f64)
                .sum()
        };
        (0..m * n).map(|i| at(i / n, i % n)).collect()
    }

    fn transpose(a: &[f32], rows: usize, cols: usize) -> Vec<f32> {
        (0..rows * cols)
            .map(|i| a[i % rows * cols + i / rows])
            .collect()
    }

    #[test]
    fn products_of_all_layouts_agree_with_float64() {
        for (m, n, k) in [
            (1, 1, 1),
            (1, 100, 33),
            (3, 32, 64),
            (15, 31, 7),
            (16, 65, 130),
            (47, 200, 96),
            (150, 48, 51),
        ] {
            let (a, b) = (noise(m * k, 1), noise(n * k, 2));
            let (at, bt) = (transpose(&a, m, k), transpose(&b, n, k));
            let expected = plain(&a, &b, m, n, k);
            for precision in [Precision::F32, Precision::Bf16] {
                let tolerance = if precision == Precision::F32 {
                    1e-5
                } else {
                    0.02
                } * (k as f64).sqrt();
                let rows = Packed::from_rows(Mat::new(&b, n, k), precision);
                let columns = Packed::from_columns(Mat::new(&bt, k, n), precision);
                for b in [&rows, &columns] {
                    for a in [
                        Left::Rows(Mat::new(&a, m, k)),
                        Left::Columns(Mat::new(&at, k, m)),
                    ] {
                        for threads in [Threads::One, Threads::All] {
                            let mut c = vec![f32::NAN; m * n];
                            matmul(a, b.panels(), &mut c, n, Write::Set, threads);
                            matmul(a, b.panels(), &mut c, n, Write::Add, threads);
                            for (x, y) in c.iter().zip(&expected) {
                                assert!(
                                    (*x as f64 - 2.0 * y).abs() < 2.0 * tolerance,
                                    "{m}×{n}×{k} {precision:?}: {x} {y}"
                                );
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_the_rows_beside_it() {
        let (m, n, k) = (45, 70, 133);
        let (a, b) = (noise(m * k, 3), noise(n * k, 4));
        for precision in [Precision::F32, Precision::Bf16] {
            let b = Packed::from_rows(Mat::new(&b, n, k), precision);
            let mut together = vec![0.0; m * n];
            matmul(
                Left::Rows(Mat::new(&a, m, k)),
                b.panels(),
                &mut together,
                n,
                Write::Set,
                Threads::All,
            );
            for count in [1, 2, 7, 16, 30] {
                let mut alone = vec![0.0; count * n];
                let rows = Mat::new(&a[5 * k..], count, k);
                matmul(
                    Left::Rows(rows),
                    b.panels(),
                    &mut alone,
                    n,
                    Write::Set,
                    Threads::One,
                );
                assert_eq!(alone[..], together[5 * n..(5 + count) * n]);
            }
        }
    }

    #[test]
    fn weights_that_bfloat16_can_say_give_the_same_products_from_half_the_memory() {
        for (m, n, k) in [(1, 1, 1), (3, 70, 33), (4, 16, 64), (29, 100, 131)] {
            let (a, mut b) = (noise(m * k, 8), noise(n * k, 9));
            (b.iter_mut()).for_each(|x| *x = half::bf16::from_f32(*x).to_f32());
            let b = Mat::new(&b, n, k);
            let product = |b: &Packed| {
                let mut c = vec![0.0; m * n];
                let a = Left::Rows(Mat::new(&a, m, k));
                matmul(a, b.panels(), &mut c, n, Write::Set, Threads::All);
                c
            };
            let (kept, wide) = (
                Packed::of_weights(b, Precision::F32),
                Packed::from_rows(b, Precision::F32),
            );
            assert_eq!(product(&kept), product(&wide), "{m}×{n}×{k}");
            assert!(kept.panels().words() == pack::Words::Pairs);
            let turned = |of: &Packed| {
                let mut turned = Packed::empty(Precision::F32);
                turned.set_transposed(of, 0..n);
                let a = noise(m * n, 10);
                let mut c = vec![0.0; m * k];
                let a = Left::Rows(Mat::new(&a, m, n));
                matmul(a, turned.panels(), &mut c, k, Write::Set, Threads::One);
                c
            };
            assert_eq!(turned(&kept), turned(&wide), "{m}×{n}×{k} turned");
        }
        // One that it cannot: nothing is lost.
        let b = [1.0, 1.0 + 2.0_f32.powi(-20)];
        let kept = Packed::of_weights(Mat::new(&b, 1, 2), Precision::F32);
        let mut row = [0.0; 2];
        kept.read_row(0, &mut row);
        assert_eq!(row, b);
    }

    #[test]
    fn rows_can_be_read_back() {
        let (n, k) = (37, 9);
        let b = noise(n * k, 5);
        let packed = Packed::from_rows(Mat::new(&b, n, k), Precision::F32);
        let rounded = Packed::from_rows(Mat::new(&b, n, k), Precision::Bf16);
        let mut row = vec![0.0; k];
        for r in 0..n {
            packed.read_row(r, &mut row);
            assert_eq!(row, b[r * k..][..k]);
            rounded.read_row(r, &mut row);
            for (x, y) in row.iter().zip(&b[r * k..]) {
                assert_eq!(*x, half::bf16::from_f32(*y).to_f32());
            }
        }
    }

    #[test]
    fn weights_in_training_show_every_small_step() {
        let (n, k) = (40, 512);
        let read = |w: &[f32]| -> Vec<f32> {
            let packed = Packed::from_rows(Mat::new(w, n, k).dithered(7), Precision::Bf16);
            let mut out = vec![0.0; n * k];
            (out.chunks_exact_mut(k).enumerate()).for_each(|(r, row)| packed.read_row(r, row));
            out
        };
        let mean = |w: &[f32]| w.iter().map(|&x| x as f64).sum::<f64>() / w.len() as f64;
        // Halfway between two bfloat16 numbers, which lie 2⁻¹⁰ apart here, as dequantised weights often are.
        let halfway = vec![0.125 + 2.0_f32.powi(-11); n * k];
        let start = mean(&read(&halfway));
        let step = 2.0_f32.powi(-13);
        let moved: Vec<f32> = halfway.iter().map(|w| w + step).collect();
        let seen = mean(&read(&moved)) - start;
        assert!((start - 0.125 - 2.0_f64.powi(-11)).abs() < 1e-5, "{start}");
        assert!((seen / step as f64 - 1.0).abs() < 0.05, "{seen}");
        // What bfloat16 can say stays as it is; NaN stays NaN.
        assert_eq!(read(&vec![0.15625; n * k]), vec![0.15625; n * k]);
        assert!(read(&vec![f32::NAN; n * k]).iter().all(|x| x.is_nan()));
        // By vectors as one by one.
        let w = noise(n * k, 3);
        let expected = (7u32..).zip(&w).map(|(number, w)| {
            f32::from_bits((w.to_bits() + pack::sixteen_bits(number)) & 0xffff_0000)
        });
        assert_eq!(read(&w), expected.collect::<Vec<_>>());
    }

    #[test]
    fn a_packed_operand_can_be_turned() {
        for (n, k, rows) in [
            (1, 1, 0..1),
            (70, 45, 0..70),
            (70, 45, 32..69),
            (96, 64, 64..96),
            (33, 130, 0..33),
        ] {
            let b = noise(n * k, 5);
            for precision in [Precision::F32, Precision::Bf16] {
                let packed = Packed::from_rows(Mat::new(&b, n, k), precision);
                let mut turned = Packed::empty(precision);
                turned.set_transposed(&packed, rows.clone());
                let mut columns = Packed::empty(precision);
                columns.set_columns(Mat::new(
                    &b[rows.start * k..][..rows.len() * k],
                    rows.len(),
                    k,
                ));
                let (mut ours, mut theirs) = (vec![0.0; rows.len()], vec![0.0; rows.len()]);
                for r in 0..k {
                    turned.read_row(r, &mut ours);
                    columns.read_row(r, &mut theirs);
                    assert_eq!(ours, theirs, "column {r} of {n}×{k}, {precision:?}");
                }
                // What fills up panels and pairs is zero, as the kernel needs it.
                let a = noise(2 * rows.len(), 6);
                let product = |right: &Packed| {
                    let mut c = vec![0.0; 2 * k];
                    let a = Left::Rows(Mat::new(&a, 2, rows.len()));
                    matmul(a, right.panels(), &mut c, k, Write::Set, Threads::One);
                    c
                };
                assert_eq!(product(&turned), product(&columns));
            }
        }
    }

    #[test]
    fn strided_results_leave_the_gaps_alone() {
        let (a, b) = (noise(3 * 5, 6), noise(4 * 5, 7));
        let b = Packed::from_rows(Mat::new(&b, 4, 5), Precision::F32);
        let mut c = vec![9.0; 3 * 6];
        matmul(
            Left::Rows(Mat::new(&a, 3, 5)),
            b.panels(),
            &mut c,
            6,
            Write::Set,
            Threads::One,
        );
        assert!(c.chunks(6).all(|row| row[4..] == [9.0, 9.0]));
    }
}
