//! Matrix product C (+)= A·Bᵀ with packed operands: the heart of generation, scoring and training.
//!
//! B is stored in panels of [`panel_width`] rows, `[panel][k][width]`, A in blocks of up to 14 rows, `[block][k][rows]`,
//! so that the inner kernel reads both in order and keeps its tile of C in registers over the whole of k. Each element
//! of C is one chain of fused multiply-adds in the order of k, whatever the sizes, blocks and threads are: a row's
//! result does not depend on the rows beside it.
//!
//! In bfloat16, 32-bit words hold the pair of elements (k, k+1); products are summed in float32 (`vdpbf16ps`). On a
//! machine without that instruction the operands are rounded to bfloat16 and multiplied in float32.

use super::isa::{Isa, multiversion};
use rayon::prelude::*;
use std::cell::RefCell;

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
}

/// How many rows of B a panel holds.
pub fn panel_width() -> usize {
    match Isa::current() {
        Isa::Avx512 { .. } => 32,
        Isa::Avx2 | Isa::Portable => 16,
    }
}

/// How many rows of A the kernel can take at once.
fn block_rows() -> usize {
    match Isa::current() {
        Isa::Avx512 { .. } => 14,
        Isa::Avx2 => 6,
        Isa::Portable => 4,
    }
}

/// Whether operands of this precision are stored as pairs of bfloat16 (else as float32, rounded where asked).
fn paired(precision: Precision) -> bool {
    precision == Precision::Bf16 && Isa::current() == Isa::Avx512 { bf16: true }
}

/// Zeroed float32 storage aligned to a cache line.
#[derive(Clone, Default)]
pub struct Aligned {
    lines: Vec<Line>,
}

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

impl Aligned {
    /// Zeroed storage for at least `len` elements.
    pub fn zeroed(len: usize) -> Self {
        Self {
            lines: vec![Line([0.0; 16]); len.div_ceil(16)],
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
}

impl Packed {
    /// Storage for operands to come.
    pub fn empty(precision: Precision) -> Self {
        Self {
            storage: Aligned::default(),
            n: 0,
            k: 0,
            precision,
        }
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
        self.fill(Left::Rows(b));
    }

    /// As [`Self::from_columns`], into the storage that is there.
    pub fn set_columns(&mut self, b: Mat) {
        self.fill(Left::Columns(b));
    }

    fn fill(&mut self, b: Left) {
        let width = panel_width();
        (self.n, self.k) = b.shape();
        let panel = words(self.k, self.precision) * width;
        let len = self.n.div_ceil(width) * panel;
        self.storage.grow(len);
        if len > 0 {
            let precision = self.precision;
            // Small operands (attention inside a parallel loop) are packed by the caller's thread.
            let panels = &mut self.storage.as_mut_slice()[..len];
            if len < 1 << 16 {
                panels
                    .chunks_mut(panel)
                    .enumerate()
                    .for_each(|(i, out)| pack(b, i * width, width, precision, out));
            } else {
                panels
                    .par_chunks_mut(panel)
                    .enumerate()
                    .for_each(|(i, out)| pack(b, i * width, width, precision, out));
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
        let panel = words(self.k, self.precision) * width;
        Panels {
            data: &self.storage.as_slice()[start / width * panel..],
            n,
            k: self.k,
            panel_stride: panel,
            row_stride: width,
            precision: self.precision,
        }
    }

    /// All rows of B with their sums taken over a part of `k` alone; it must begin at an even place.
    pub fn sum_range(&self, part: std::ops::Range<usize>) -> Panels<'_> {
        assert!(part.start.is_multiple_of(2) && part.end <= self.k);
        assert!(
            part.end == self.k || part.end.is_multiple_of(2) || !paired(self.precision),
            "a pair would be cut"
        );
        let all = self.panels();
        let skipped = words(part.start, self.precision) * all.row_stride;
        Panels {
            data: &all.data[skipped.min(all.data.len())..],
            k: part.len(),
            ..all
        }
    }

    /// Copies row `r` of B (rounded, if the precision rounds) into `out`, `[k]`.
    pub fn read_row(&self, r: usize, out: &mut [f32]) {
        let width = panel_width();
        let k_words = words(self.k, self.precision);
        let panel = &self.storage.as_slice()[r / width * k_words * width..];
        for (i, out) in out[..self.k].iter_mut().enumerate() {
            *out = if paired(self.precision) {
                let word = panel[i / 2 * width + r % width].to_bits();
                f32::from_bits(if i % 2 == 0 {
                    word << 16
                } else {
                    word & 0xffff_0000
                })
            } else {
                panel[i * width + r % width]
            };
        }
    }
}

/// A borrowed right operand in panels: a [`Packed`], a part of it, or a key/value cache that keeps this layout.
#[derive(Clone, Copy)]
pub struct Panels<'a> {
    data: &'a [f32],
    n: usize,
    k: usize,
    panel_stride: usize,
    row_stride: usize,
    precision: Precision,
}

impl<'a> Panels<'a> {
    /// An operand of `n` rows and sums of length `k`: word w of row r (see [`words`]) lies at
    /// `r / width * panel_stride + w * row_stride + r % width`. The data must reach to the end of the last panel.
    pub fn strided(
        data: &'a [f32],
        (n, k): (usize, usize),
        (panel_stride, row_stride): (usize, usize),
        precision: Precision,
    ) -> Self {
        let width = panel_width();
        if n > 0 && k > 0 {
            let end = (n.div_ceil(width) - 1) * panel_stride
                + (words(k, precision) - 1) * row_stride
                + width;
            assert!(end <= data.len(), "panels past their data");
        }
        Self {
            data,
            n,
            k,
            panel_stride,
            row_stride,
            precision,
        }
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

thread_local! {
    /// The packed left operand; kept, since fresh pages cost more than the packing.
    static LEFT: RefCell<Aligned> = const { RefCell::new(Aligned { lines: Vec::new() }) };
}

/// C (+)= A·Bᵀ: `a` is `[m, k]`, `b` has `n` rows of `k`, `c` is `[m, n]` with its rows `c_stride` apart.
pub fn matmul(a: Left, b: Panels, c: &mut [f32], c_stride: usize, write: Write, threads: Threads) {
    let (m, k) = a.shape();
    assert_eq!(k, b.k, "inner dimensions differ");
    if m == 0 || b.n == 0 {
        return;
    }
    assert!(b.n <= c_stride || m == 1);
    assert!(
        (m - 1) * c_stride + b.n <= c.len(),
        "result past its buffer"
    );
    let rows = m.div_ceil(m.div_ceil(block_rows())); // even blocks: 16 rows are 8 + 8, not 14 + 2
    let mut packed = LEFT.with(RefCell::take);
    let block = words(k, b.precision) * rows;
    let len = m.div_ceil(rows) * block;
    packed.grow(len);
    let blocks = &mut packed.as_mut_slice()[..len];
    if threads == Threads::One || len < 1 << 15 {
        blocks
            .chunks_mut(block.max(1))
            .enumerate()
            .for_each(|(i, out)| pack(a, i * rows, rows, b.precision, out));
    } else {
        blocks
            .par_chunks_mut(block.max(1))
            .enumerate()
            .for_each(|(i, out)| pack(a, i * rows, rows, b.precision, out));
    }
    let product = Product {
        a: packed.as_slice(),
        rows,
        m,
        b,
        c: c.as_mut_ptr(),
        c_stride,
        write,
    };
    product.run(threads);
    LEFT.with(|left| *left.borrow_mut() = packed);
}

/// One product, ready to be cut into tiles.
struct Product<'a> {
    a: &'a [f32],
    rows: usize,
    m: usize,
    b: Panels<'a>,
    c: *mut f32,
    c_stride: usize,
    write: Write,
}

// SAFETY: tasks write disjoint tiles of C, which the caller borrowed mutably for the whole call.
unsafe impl Sync for Product<'_> {}

impl Product<'_> {
    fn run(&self, threads: Threads) {
        let blocks = self.m.div_ceil(self.rows);
        let panels = self.b.n.div_ceil(panel_width());
        if threads == Threads::One {
            return self.tile(0..blocks, 0..panels);
        }
        // Tasks of a few panels (they stay in L2 while the blocks of A pass by) and about a hundred rows.
        let panel_step = panels
            .div_ceil(4 * rayon::current_num_threads())
            .clamp(1, 4);
        let block_step = blocks.min(10);
        let (across, down) = (panels.div_ceil(panel_step), blocks.div_ceil(block_step));
        (0..across * down).into_par_iter().for_each(|task| {
            // Neighbouring tasks share their panels of B: they are the larger operand as a rule.
            let (p, b) = (task / down * panel_step, task % down * block_step);
            self.tile(
                b..(b + block_step).min(blocks),
                p..(p + panel_step).min(panels),
            );
        });
    }

    fn tile(&self, blocks: std::ops::Range<usize>, panels: std::ops::Range<usize>) {
        let width = panel_width();
        let k = words(self.b.k, self.b.precision);
        for block in blocks {
            let first = block * self.rows;
            let rows = self.rows.min(self.m - first);
            let a = &self.a[block * self.rows * k..][..self.rows * k];
            for panel in panels.clone() {
                let b = &self.b.data[panel * self.b.panel_stride..];
                let columns = width.min(self.b.n - panel * width);
                // SAFETY: the asserts of `matmul` and of `Panels` hold every pointer inside its buffer: A has
                // `self.rows` × k words here, B `k` rows of `width`, C `rows` × `columns`.
                unsafe {
                    let c = self.c.add(first * self.c_stride + panel * width);
                    let tile = Tile {
                        k,
                        a: a.as_ptr(),
                        b: b.as_ptr(),
                        b_stride: self.b.row_stride,
                        c,
                        c_stride: self.c_stride,
                        rows,
                        columns,
                        add: self.write == Write::Add,
                    };
                    run_kernel(tile, self.rows, paired(self.b.precision));
                }
            }
        }
    }
}

/// One call of the inner kernel: a tile of `rows` × `columns` of C over the whole of k.
#[derive(Clone, Copy)]
struct Tile {
    k: usize,
    a: *const f32,
    b: *const f32,
    b_stride: usize,
    c: *mut f32,
    c_stride: usize,
    rows: usize,
    columns: usize,
    add: bool,
}

/// The number of 32-bit words that a row of `k` elements takes in an operand: bfloat16 comes in pairs, where the
/// machine can multiply them.
pub fn words(k: usize, precision: Precision) -> usize {
    if paired(precision) { k.div_ceil(2) } else { k }
}

/// Stores element `k` of one row of an operand; `word(w)` is the place of the row's word w.
#[inline(always)]
pub fn store<'a>(k: usize, x: f32, precision: Precision, word: impl FnOnce(usize) -> &'a mut f32) {
    if paired(precision) {
        let word = word(k / 2);
        let (keep, shift) = if k.is_multiple_of(2) {
            (0xffff_0000, 0)
        } else {
            (0xffff, 16)
        };
        *word = f32::from_bits(word.to_bits() & keep | bf16_bits(x, None) << shift);
    } else if precision == Precision::Bf16 {
        *word(k) = f32::from_bits(bf16_bits(x, None) << 16);
    } else {
        *word(k) = x;
    }
}

/// Packs rows `first .. first + width` of an operand as `[k][width]`; rows past the end become zero.
fn pack(source: Left, first: usize, width: usize, precision: Precision, out: &mut [f32]) {
    let (m, _) = source.shape();
    let valid = width.min(m - first);
    match (source, paired(precision)) {
        (Left::Rows(a), false) => pack_rows(a, first, valid, width, out),
        (Left::Columns(a), false) => pack_columns(a, first, valid, width, out),
        (Left::Rows(a), true) => return pack_row_pairs(a, first, valid, width, out),
        (Left::Columns(a), true) => return pack_column_pairs(a, first, valid, width, out),
    }
    if precision == Precision::Bf16 {
        round_panel(source, first, valid, width, out);
    }
}

/// How many elements of each row are moved at a time: a cache line of the source, `width` lines of the target.
const STRIP: usize = 16;

multiversion! {
    pub fn pack_rows(a: Mat, first: usize, valid: usize, width: usize, out: &mut [f32]) {
        for start in (0..a.cols).step_by(STRIP) {
            let len = STRIP.min(a.cols - start);
            let target = &mut out[start * width..(start + len) * width];
            for i in 0..valid {
                let row = &a.row(first + i)[start..start + len];
                for (line, &x) in target.chunks_exact_mut(width).zip(row) {
                    line[i] = x;
                }
            }
            for line in target.chunks_exact_mut(width) {
                line[valid..].fill(0.0);
            }
        }
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
    pub fn pack_row_pairs(a: Mat, first: usize, valid: usize, width: usize, out: &mut [f32]) {
        for start in (0..a.cols).step_by(2 * STRIP) {
            let len = (2 * STRIP).min(a.cols - start);
            let target = &mut out[start / 2 * width..(start + len).div_ceil(2) * width];
            for i in 0..valid {
                let row = &a.row(first + i)[start..start + len];
                let number = a.dither.map(|n| (n + (first + i) * a.stride + start) as u32);
                let pairs = match row.try_into() {
                    Ok(strip) => strip_pairs(strip, number),
                    Err(_) => {
                        let mut strip = [0.0; 2 * STRIP];
                        strip[..len].copy_from_slice(row);
                        strip_pairs(&strip, number)
                    }
                };
                for (line, pair) in target.chunks_exact_mut(width).zip(pairs) {
                    line[i] = pair;
                }
            }
            for line in target.chunks_exact_mut(width) {
                line[valid..].fill(0.0);
            }
        }
    }
}

/// Neighbours of a strip as words of two bfloat16; `number` is that of the first element where rounding is dithered.
#[inline(always)]
fn strip_pairs(strip: &[f32; 2 * STRIP], number: Option<u32>) -> [f32; STRIP] {
    // Rounded in whole vectors first, then paired: in one loop the compiler would not see the vectors.
    let mut bits = [0; 2 * STRIP];
    match number {
        None => (bits.iter_mut().zip(strip)).for_each(|(b, &x)| *b = bf16_bits(x, None)),
        Some(first) => (0u32..)
            .zip(bits.iter_mut().zip(strip))
            .for_each(|(i, (b, &x))| {
                *b = bf16_bits(x, Some(sixteen_bits(first.wrapping_add(i))));
            }),
    }
    std::array::from_fn(|i| bf16_pair(bits[2 * i], bits[2 * i + 1]))
}

multiversion! {
    pub fn pack_column_pairs(a: Mat, first: usize, valid: usize, width: usize, out: &mut [f32]) {
        for (r, line) in out.chunks_exact_mut(width).enumerate() {
            let low = &a.row(2 * r)[first..first + valid];
            if 2 * r + 1 < a.rows {
                let high = &a.row(2 * r + 1)[first..first + valid];
                for (c, ((x, &low), &high)) in line.iter_mut().zip(low).zip(high).enumerate() {
                    let noise = |odd| a.noise(2 * r + odd, first + c);
                    *x = bf16_pair(bf16_bits(low, noise(0)), bf16_bits(high, noise(1)));
                }
            } else {
                for (c, (x, &low)) in line.iter_mut().zip(low).enumerate() {
                    *x = bf16_pair(bf16_bits(low, a.noise(2 * r, first + c)), 0);
                }
            }
            line[valid..].fill(0.0);
        }
    }
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

#[inline(always)]
fn bf16_pair(low: u32, high: u32) -> f32 {
    f32::from_bits(low | (high << 16))
}

/// Bits that look random, from an element's number.
#[inline(always)]
fn sixteen_bits(number: u32) -> u32 {
    let x = (number ^ (number >> 16)).wrapping_mul(0x7feb_352d);
    let x = (x ^ (x >> 15)).wrapping_mul(0x846c_a68b);
    x >> 16
}

/// Runs the kernel for blocks of `block` rows.
///
/// # Safety
/// All pointers of the tile must be valid for the sizes that it names, A for `block` × k words.
unsafe fn run_kernel(tile: Tile, block: usize, pairs: bool) {
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
    match Isa::current() {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 { .. } if pairs => by_rows!(avx512_bf16, 1 2 3 4 5 6 7 8 9 10 11 12 13 14),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 { .. } => by_rows!(avx512, 1 2 3 4 5 6 7 8 9 10 11 12 13 14),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => by_rows!(avx2, 1 2 3 4 5 6),
        _ => by_rows!(portable, 1 2 3 4),
    }
}

/// The kernel in plain Rust, 16 columns wide.
///
/// # Safety
/// As [`run_kernel`], with `R` the block.
unsafe fn portable<const R: usize>(t: Tile) {
    let mut sums = [[0.0f32; 16]; R];
    for p in 0..t.k {
        // SAFETY: A has k × R words, B k rows of 16 words.
        let (a, b) = unsafe {
            (
                &*t.a.add(p * R).cast::<[f32; R]>(),
                &*t.b.add(p * t.b_stride).cast::<[f32; 16]>(),
            )
        };
        for (sum, &x) in sums.iter_mut().zip(a) {
            for (s, &y) in sum.iter_mut().zip(b) {
                *s += x * y;
            }
        }
    }
    // SAFETY: the caller's promise on C.
    unsafe { write_rows(&sums, t) }
}

/// Stores the sums of 16 columns through a plain loop, for kernels without masked stores.
///
/// # Safety
/// C must hold `rows` × `columns` at its stride.
unsafe fn write_rows<const R: usize>(sums: &[[f32; 16]; R], t: Tile) {
    for (i, sum) in sums.iter().take(t.rows).enumerate() {
        // SAFETY: the caller's promise.
        let row = unsafe { std::slice::from_raw_parts_mut(t.c.add(i * t.c_stride), t.columns) };
        for (c, &s) in row.iter_mut().zip(sum) {
            *c = if t.add { *c + s } else { s };
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! The kernels on x86-64 vectors: `R` rows by two registers of columns, one broadcast of A per row and step.
    use super::{Tile, write_rows};
    use std::arch::x86_64::*;

    /// # Safety
    /// As [`super::run_kernel`], with `R` the block; needs AVX-512F.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn avx512<const R: usize>(t: Tile) {
        let mut left = [_mm512_setzero_ps(); R];
        let mut right = [_mm512_setzero_ps(); R];
        for p in 0..t.k {
            // SAFETY: A has k × R words, B k rows of 32 words.
            unsafe {
                let b = t.b.add(p * t.b_stride);
                let (b0, b1) = (_mm512_loadu_ps(b), _mm512_loadu_ps(b.add(16)));
                for i in 0..R {
                    let x = _mm512_set1_ps(*t.a.add(p * R + i));
                    left[i] = _mm512_fmadd_ps(x, b0, left[i]);
                    right[i] = _mm512_fmadd_ps(x, b1, right[i]);
                }
            }
        }
        // SAFETY: the caller's promise on C.
        unsafe { write_masked(&left, &right, t) }
    }

    /// # Safety
    /// As [`avx512`], with words that hold pairs of bfloat16; needs AVX512_BF16.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub unsafe fn avx512_bf16<const R: usize>(t: Tile) {
        let mut left = [_mm512_setzero_ps(); R];
        let mut right = [_mm512_setzero_ps(); R];
        for p in 0..t.k {
            // SAFETY: A has k × R words, B k rows of 32 words; a vector of words is one of bfloat16 pairs.
            unsafe {
                let b = t.b.add(p * t.b_stride);
                let b0: __m512bh = std::mem::transmute(_mm512_loadu_ps(b));
                let b1: __m512bh = std::mem::transmute(_mm512_loadu_ps(b.add(16)));
                for i in 0..R {
                    let x: __m512bh = std::mem::transmute(_mm512_set1_ps(*t.a.add(p * R + i)));
                    left[i] = _mm512_dpbf16_ps(left[i], x, b0);
                    right[i] = _mm512_dpbf16_ps(right[i], x, b1);
                }
            }
        }
        // SAFETY: the caller's promise on C.
        unsafe { write_masked(&left, &right, t) }
    }

    #[target_feature(enable = "avx512f")]
    unsafe fn write_masked<const R: usize>(left: &[__m512; R], right: &[__m512; R], t: Tile) {
        let mask = |columns: usize| ((1u32 << columns.min(16)) - 1) as u16;
        let (m0, m1) = (mask(t.columns), mask(t.columns.saturating_sub(16)));
        for i in 0..t.rows.min(R) {
            // SAFETY: masked lanes are not touched, and C holds `rows` × `columns`.
            unsafe {
                let c = t.c.add(i * t.c_stride);
                let high = c.wrapping_add(16);
                let (mut x, mut y) = (left[i], right[i]);
                if t.add {
                    x = _mm512_add_ps(_mm512_maskz_loadu_ps(m0, c), x);
                    y = _mm512_add_ps(_mm512_maskz_loadu_ps(m1, high), y);
                }
                _mm512_mask_storeu_ps(c, m0, x);
                _mm512_mask_storeu_ps(high, m1, y);
            }
        }
    }

    /// # Safety
    /// As [`super::run_kernel`], with `R` the block; needs AVX2 and FMA.
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn avx2<const R: usize>(t: Tile) {
        let mut left = [_mm256_setzero_ps(); R];
        let mut right = [_mm256_setzero_ps(); R];
        for p in 0..t.k {
            // SAFETY: A has k × R words, B k rows of 16 words.
            unsafe {
                let b = t.b.add(p * t.b_stride);
                let (b0, b1) = (_mm256_loadu_ps(b), _mm256_loadu_ps(b.add(8)));
                for i in 0..R {
                    let x = _mm256_set1_ps(*t.a.add(p * R + i));
                    left[i] = _mm256_fmadd_ps(x, b0, left[i]);
                    right[i] = _mm256_fmadd_ps(x, b1, right[i]);
                }
            }
        }
        let mut sums = [[0.0f32; 16]; R];
        for i in 0..R {
            // SAFETY: each row of `sums` holds 16 floats.
            unsafe {
                _mm256_storeu_ps(sums[i].as_mut_ptr(), left[i]);
                _mm256_storeu_ps(sums[i].as_mut_ptr().add(8), right[i]);
            }
        }
        // SAFETY: the caller's promise on C.
        unsafe { write_rows(&sums, t) }
    }
}

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
        let read = |w: &[f32], columns: bool| -> Vec<f32> {
            let mut packed = Packed::empty(Precision::Bf16);
            let mut out = vec![0.0; n * k];
            if columns {
                packed.set_columns(Mat::new(w, n, k).dithered(7));
                let mut row = vec![0.0; n];
                for c in 0..k {
                    packed.read_row(c, &mut row);
                    (0..n).for_each(|r| out[r * k + c] = row[r]);
                }
            } else {
                packed.set_rows(Mat::new(w, n, k).dithered(7));
                out.chunks_exact_mut(k)
                    .enumerate()
                    .for_each(|(r, row)| packed.read_row(r, row));
            }
            out
        };
        let mean = |w: &[f32]| w.iter().map(|&x| x as f64).sum::<f64>() / w.len() as f64;
        // Halfway between two bfloat16 numbers, which lie 2⁻¹⁰ apart here, as dequantised weights often are.
        let halfway = vec![0.125 + 2.0_f32.powi(-11); n * k];
        let start = mean(&read(&halfway, false));
        let step = 2.0_f32.powi(-13);
        let moved: Vec<f32> = halfway.iter().map(|w| w + step).collect();
        let seen = mean(&read(&moved, false)) - start;
        assert!((start - 0.125 - 2.0_f64.powi(-11)).abs() < 1e-5, "{start}");
        assert!((seen / step as f64 - 1.0).abs() < 0.05, "{seen}");
        // What bfloat16 can say stays as it is, and both orders of packing round alike.
        assert_eq!(read(&vec![0.15625; n * k], false), vec![0.15625; n * k]);
        let w = noise(n * k, 3);
        assert_eq!(read(&w, false), read(&w, true));
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
