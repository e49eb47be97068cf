//! The matrix product at the shapes of SmolLM2-135M: what every stage's rate is held against (docs/performance.md). And
//! what lies beside it: packing, attention, sums of exponentials.
//!
//! `cargo bench -p common` prints for each shape the time and the rate in items/s; an item is one FLOP.

use common::kernels::attention;
use common::kernels::decoding::{self, Format, value_stride};
use common::kernels::delta;
use common::kernels::gemm::{
    Aligned, Left, Mat, Packed, PackedLeft, Precision, Threads, Write, matmul, panel_width,
};
use common::kernels::layout::{Heads, Layout};
use common::kernels::softmax;
use divan::Bencher;
use divan::counter::ItemsCount;
use rayon::prelude::*;

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

/// How weights lie.
type Pack = fn(Mat) -> Packed;
const WORDS: Pack = |w| Packed::from_rows(w, Precision::F32);
/// The same products, two bytes a weight: of weights that bfloat16 can say.
const PAIRS: Pack = |w| Packed::of_weights(w, Precision::F32);
const BF16: Pack = |w| Packed::from_rows(w, Precision::Bf16);

fn product(bencher: Bencher, (m, k, n): (usize, usize, usize), pack: Pack) {
    let fill =
        |len: usize| -> Vec<f32> { (0..len).map(|i| (i % 97) as f32 / 128.0 - 0.5).collect() };
    let (x, w) = (fill(m * k), fill(n * k));
    let w = pack(Mat::new(&w, n, k));
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
    product(bencher, shape, WORDS);
}

#[divan::bench(args = SHAPES)]
fn float32_of_pairs(bencher: Bencher, shape: (usize, usize, usize)) {
    product(bencher, shape, PAIRS);
}

#[divan::bench(args = SHAPES)]
fn bfloat16(bencher: Bencher, shape: (usize, usize, usize)) {
    product(bencher, shape, BF16);
}

/// A decoding step's products of all layers, whose weights come from memory; 64 rows, of one core's share.
#[divan::bench(args = [1, 14, 64])]
fn decoding_float32(bencher: Bencher, rows: usize) {
    decoding(bencher, rows, WORDS);
}

#[divan::bench(args = [1, 14, 64])]
fn decoding_float32_of_pairs(bencher: Bencher, rows: usize) {
    decoding(bencher, rows, PAIRS);
}

#[divan::bench(args = [1, 14, 64])]
fn decoding_bfloat16(bencher: Bencher, rows: usize) {
    decoding(bencher, rows, BF16);
}

fn decoding(bencher: Bencher, rows: usize, pack: Pack) {
    const MAPS: [(usize, usize); 4] = [(576, 960), (576, 576), (576, 3072), (1536, 576)];
    const LAYERS: usize = 30;
    let weights: Vec<Packed> = (0..LAYERS)
        .flat_map(|_| MAPS)
        .map(|(k, n)| pack(Mat::new(&vec![0.125; n * k], n, k)))
        .collect();
    let x = vec![0.1; rows * 1536];
    let mut y = vec![0.0; rows * 3072];
    let flops: usize = weights.iter().map(|w| 2 * rows * w.k() * w.n()).sum();
    bencher.counter(ItemsCount::new(flops)).bench_local(|| {
        for w in &weights {
            let x = Left::Rows(Mat::new(&x, rows, w.k()));
            matmul(x, w.panels(), &mut y, w.n(), Write::Set, Threads::One);
        }
    });
}

/// Attention of a prompt of 64 tokens and 8 responses of 128, forward and backward; an item is one token.
#[divan::bench(args = [false, true])]
fn attention_float32(bencher: Bencher, backward: bool) {
    attend(bencher, backward, Precision::F32);
}

#[divan::bench(args = [false, true])]
fn attention_bfloat16(bencher: Bencher, backward: bool) {
    attend(bencher, backward, Precision::Bf16);
}

fn attend(bencher: Bencher, backward: bool, precision: Precision) {
    let heads = Heads::new(9, 3, 64);
    let mut layout = Layout::default();
    layout.push(64, &[128; 8]);
    let tokens = layout.tokens();
    let qkv: Vec<f32> = (0..tokens * heads.qkv_width())
        .map(|i| (i % 101) as f32 / 101.0 - 0.5)
        .collect();
    let mut out = vec![0.0; tokens * heads.q_width()];
    let mut lse = vec![0.0; tokens * heads.query];
    attention::forward(&layout, heads, precision, (&qkv, None), &mut out, &mut lse);
    let mut d_qkv = vec![0.0; qkv.len()];
    bencher.counter(ItemsCount::new(tokens)).bench_local(|| {
        if backward {
            attention::backward(
                &layout,
                heads,
                precision,
                (&qkv, &out, &lse),
                &out,
                &mut d_qkv,
            );
        } else {
            let (mut out, mut lse) = (out.clone(), lse.clone());
            attention::forward(&layout, heads, precision, (&qkv, None), &mut out, &mut lse);
        }
    });
}

/// What memory gives, to one core and to all: the largest of 256 million floats. An item is a byte.
#[divan::bench(args = [false, true])]
fn reading(bencher: Bencher, all: bool) {
    let threads = if all { rayon::current_num_threads() } else { 1 };
    let floats = vec![0.5f32; 1 << 28];
    let bytes = ItemsCount::new(size_of_val(&floats[..]));
    let part = floats.len().div_ceil(threads);
    bencher.counter(bytes).bench_local(|| {
        let parts = floats.par_chunks(part);
        parts.map(softmax::max).reduce(|| 0.0, f32::max)
    });
}

/// Attention of a decoding step over its sequences' own keys and values, 64 tokens each in 30 layers: of one sequence, which
/// a cache holds, and of 64, whose keys and values come from memory. An item is a byte of them; 0 is float32, 1 bfloat16, 2 is
/// 8 bits.
#[divan::bench(args = [1, 64], consts = [0, 1, 2])]
fn decoding_attention<const FORMAT: usize>(bencher: Bencher, sequences: usize) {
    const DIM: usize = 64;
    let format = [
        Format::Float(Precision::F32),
        Format::Float(Precision::Bf16),
        Format::Int8,
    ][FORMAT];
    let head = format.key_words(DIM) + format.value_words(DIM);
    let blocks = sequences * 30 * 3 * 64 / panel_width();
    let mut cache = Aligned::with_capacity(blocks * head);
    cache.grow(blocks * head);
    cache.as_mut_slice().fill(0.5);
    let mut queries = vec![0.0; 3 * format.query_words(DIM)];
    (queries.chunks_mut(format.query_words(DIM)))
        .for_each(|q| format.put_query(&mut [0.1; DIM], q));
    let mut weighted = vec![0.0; 3 * value_stride(DIM)];
    let bytes = ItemsCount::new(size_of_val(cache.as_slice()));
    bencher.counter(bytes).bench_local(|| {
        for block in cache.as_slice().chunks_exact(head) {
            let (keys, values) = block.split_at(format.key_words(DIM));
            let rows = decoding::Queries {
                words: &queries,
                cap: None,
                visible: &[u32::MAX; 3],
                max: &mut [f32::NEG_INFINITY; 3],
                sum: &mut [0.0; 3],
                weighted: &mut weighted,
            };
            let block = decoding::Block {
                keys,
                panel: true,
                values,
                tokens: panel_width(),
                dim: DIM,
                format,
                ahead: block.as_ptr().wrapping_add(head.max(decoding::AHEAD)),
            };
            decoding::see(rows, block);
        }
    });
}

/// log Σ exp of a row of logits: an item is one.
#[divan::bench]
fn sum_exp(bencher: Bencher) {
    let row: Vec<f32> = (0..49152).map(|i| (i % 113) as f32 / 10.0 - 5.0).collect();
    bencher
        .counter(ItemsCount::new(row.len()))
        .bench_local(|| softmax::sum_exp(&row, softmax::max(&row), 1.0));
}

/// Packing a layer's weights anew, as training does after each step: an item is one weight.
#[divan::bench(args = [false, true])]
fn packing_rows_dithered(bencher: Bencher, dithered: bool) {
    packing(bencher, Precision::Bf16, dithered, Packed::set_rows);
}

/// Packing in float32: a layer's weights; and activations, in blocks of as many rows as the kernel takes.
#[divan::bench(args = [false, true])]
fn packing_rows_float32(bencher: Bencher, left: bool) {
    if !left {
        return packing(bencher, Precision::F32, false, Packed::set_rows);
    }
    let mut packed = PackedLeft::default();
    let set = |_: &mut Packed, x: Mat| packed.set(Left::Rows(x), Precision::F32, Threads::All);
    packing(bencher, Precision::F32, false, set);
}

/// Activations packed by their columns, for the gradients of weights; and packed weights turned.
#[divan::bench(args = [Precision::F32, Precision::Bf16])]
fn packing_columns(bencher: Bencher, precision: Precision) {
    packing(bencher, precision, false, Packed::set_columns);
}

#[divan::bench(args = [Precision::F32, Precision::Bf16])]
fn packing_turned(bencher: Bencher, precision: Precision) {
    let w = Packed::from_rows(Mat::new(&vec![0.1; 1536 * 576], 1536, 576), precision);
    packing(bencher, precision, false, |packed, _| {
        packed.set_transposed(&w, 0..1536)
    });
}

fn packing(
    bencher: Bencher,
    precision: Precision,
    dithered: bool,
    mut set: impl FnMut(&mut Packed, Mat),
) {
    let (n, k) = (1536, 576);
    let w = vec![0.1; n * k];
    let w = Mat::new(&w, n, k);
    let w = if dithered { w.dithered(5) } else { w };
    let mut packed = Packed::empty(precision);
    bencher
        .counter(ItemsCount::new(n * k))
        .bench_local(|| set(&mut packed, w));
}

/// Linear attention with Qwen3.5-0.8B's heads, a prompt of 64 tokens and four responses of 128: an item is one FLOP of the rule,
/// 7 for each number of a memory and token forward.
#[divan::bench(args = [false, true])]
fn delta_rule(bencher: Bencher, backward: bool) {
    let shape = delta::Shape {
        key_heads: 16,
        value_heads: 16,
        key_dim: 128,
        value_dim: 128,
        kernel: 4,
    };
    let mut layout = Layout::default();
    layout.push(64, &[128; 4]);
    let tokens = layout.tokens();
    let fill = |width: usize| -> Vec<f32> {
        (0..width * tokens)
            .map(|i| (i % 97) as f32 / 128.0 - 0.3)
            .collect()
    };
    let raw = fill(shape.input_width());
    let (conv, ones) = (vec![0.3; shape.kernel * shape.qkv_width()], vec![1.0; 128]);
    let weights = delta::Weights {
        conv: &conv,
        dt_bias: &ones[..16],
        a_log: &ones[..16],
        norm: &ones,
        eps: 1e-6,
    };
    let (mut qkv, mut gates) = (fill(shape.qkv_width()), fill(2 * shape.value_heads));
    let (mut read, mut out) = (fill(shape.value_width()), fill(shape.value_width()));
    let mut d_raw = fill(shape.input_width());
    let items = 7 * tokens * shape.value_heads * shape.key_dim * shape.value_dim;
    let bencher = bencher.counter(ItemsCount::new(items));
    let mut forward = || {
        let state = delta::State {
            qkv: &mut qkv,
            gates: &mut gates,
            read: &mut read,
            out: &mut out,
        };
        delta::forward(&layout, shape, weights, &raw, state);
    };
    forward();
    match backward {
        false => bencher.bench_local(forward),
        true => bencher.bench_local(|| {
            let made = (&qkv[..], &gates[..], &read[..]);
            delta::backward(
                &layout,
                shape,
                weights,
                &raw,
                made,
                &mut out.clone(),
                &mut d_raw,
            )
        }),
    }
}
