//! The matrix product at the shapes of SmolLM2-135M: what every stage's rate is held against (docs/performance.md).
//!
//! `cargo bench -p common` prints for each shape the time and the rate in items/s; an item is one FLOP.

use common::kernels::gemm::{Left, Mat, Packed, Precision, Threads, Write, matmul};
use divan::Bencher;
use divan::counter::ItemsCount;

fn main() {
    divan::main();
}

/// (rows of x, sums' length, columns): a long pass, a training part, a decoding step; layers and LM head.
const SHAPES: [(usize, usize, usize); 6] = [
    (2048, 576, 1536),
    (512, 576, 3072),
    (512, 1536, 576),
    (512, 576, 49152),
    (64, 576, 3072),
    (16, 576, 49152),
];

fn product(bencher: Bencher, (m, k, n): (usize, usize, usize), precision: Precision) {
    let fill =
        |len: usize| -> Vec<f32> { (0..len).map(|i| (i % 97) as f32 / 97.0 - 0.5).collect() };
    let (x, w) = (fill(m * k), fill(n * k));
    let w = Packed::from_rows(Mat::new(&w, n, k), precision);
    let mut y = vec![0.0; m * n];
    bencher
        .counter(ItemsCount::new(2 * m * k * n))
        .bench_local(|| {
            let x = Left::Rows(Mat::new(&x, m, k));
            matmul(x, w.panels(), &mut y, n, Write::Set, Threads::All);
        });
}

#[divan::bench(args = SHAPES)]
fn float32(bencher: Bencher, shape: (usize, usize, usize)) {
    product(bencher, shape, Precision::F32);
}

#[divan::bench(args = SHAPES)]
fn bfloat16(bencher: Bencher, shape: (usize, usize, usize)) {
    product(bencher, shape, Precision::Bf16);
}

/// Packing a layer's weights anew, as training does after each step: an item is one weight.
#[divan::bench(args = [false, true])]
fn packing_rows_dithered(bencher: Bencher, dithered: bool) {
    packing(bencher, dithered, Packed::set_rows);
}

#[divan::bench(args = [false, true])]
fn packing_columns_dithered(bencher: Bencher, dithered: bool) {
    packing(bencher, dithered, Packed::set_columns);
}

fn packing(bencher: Bencher, dithered: bool, set: fn(&mut Packed, Mat)) {
    let (n, k) = (1536, 576);
    let w = vec![0.1; n * k];
    let w = Mat::new(&w, n, k);
    let w = if dithered { w.dithered(5) } else { w };
    let mut packed = Packed::empty(Precision::Bf16);
    bencher
        .counter(ItemsCount::new(n * k))
        .bench_local(|| set(&mut packed, w));
}
