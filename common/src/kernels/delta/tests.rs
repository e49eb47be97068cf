//! The layer against its definition in float64, and gradients against differences.

use super::*;
use crate::kernels::testing::{finite_difference, noise};

/// Two value heads to a key head, values that do not fill a strip.
const SHAPE: Shape = Shape {
    key_heads: 2,
    value_heads: 4,
    key_dim: 6,
    value_dim: 5,
    kernel: 4,
};
const EPS: f32 = 1e-3;

struct Owned {
    conv: Vec<f32>,
    dt_bias: Vec<f32>,
    a_log: Vec<f32>,
    norm: Vec<f32>,
}

impl Owned {
    fn new(shape: Shape) -> Self {
        Self {
            conv: noise(shape.kernel * shape.qkv_width(), 1),
            dt_bias: noise(shape.value_heads, 2),
            a_log: noise(shape.value_heads, 3),
            norm: noise(shape.value_dim, 4),
        }
    }

    fn weights(&self) -> Weights<'_> {
        Weights {
            conv: &self.conv,
            dt_bias: &self.dt_bias,
            a_log: &self.a_log,
            norm: &self.norm,
            eps: EPS,
        }
    }
}

/// A prompt with three responses, one of them shorter than the convolution, a prompt alone, and one shorter than that.
fn layout() -> Layout {
    let mut layout = Layout::default();
    layout.push(5, &[4, 2, 19]);
    layout.push(7, &[]);
    layout.push(2, &[3]);
    layout
}

/// All that a forward pass writes.
struct Found {
    qkv: Vec<f32>,
    gates: Vec<f32>,
    read: Vec<f32>,
    out: Vec<f32>,
}

fn run(layout: &Layout, shape: Shape, weights: Weights, raw: &[f32]) -> Found {
    let zeros = |width: usize| vec![0.0; layout.tokens() * width];
    let mut found = Found {
        qkv: zeros(shape.qkv_width()),
        gates: zeros(2 * shape.value_heads),
        read: zeros(shape.value_width()),
        out: zeros(shape.value_width()),
    };
    let state = State {
        qkv: &mut found.qkv,
        gates: &mut found.gates,
        read: &mut found.read,
        out: &mut found.out,
    };
    forward(layout, shape, weights, raw, state);
    found
}

/// The layer over one sequence, as the paper and transformers' `Qwen3_5GatedDeltaNet` define it.
fn plain(shape: Shape, w: &Weights, raw: &[&[f32]]) -> Vec<Vec<f64>> {
    let silu = |x: f64| x / (1.0 + (-x).exp());
    let wide = |x: &f32| f64::from(*x);
    let mut memories = vec![vec![vec![0.0; shape.value_dim]; shape.key_dim]; shape.value_heads];
    let mut out = vec![];
    for t in 0..raw.len() {
        let convolved: Vec<f64> = (0..shape.qkv_width())
            .map(|c| {
                let taps = (0..shape.kernel).filter(|by| *by <= t);
                let weight = |by: usize| w.conv[(shape.kernel - 1 - by) * shape.qkv_width() + c];
                silu(
                    taps.map(|by| wide(&weight(by)) * wide(&raw[t - by][c]))
                        .sum(),
                )
            })
            .collect();
        let unit = |at: usize| {
            let x = &convolved[at..][..shape.key_dim];
            let length = (x.iter().map(|x| x * x).sum::<f64>() + 1e-6).sqrt();
            x.iter().map(|x| x / length).collect::<Vec<_>>()
        };
        let mut row = vec![];
        for head in 0..shape.value_heads {
            let key_head = head / (shape.value_heads / shape.key_heads);
            let q = unit(key_head * shape.key_dim);
            let k = unit(shape.key_width() + key_head * shape.key_dim);
            let at = 2 * shape.key_width() + head * shape.value_dim;
            let v = &convolved[at..][..shape.value_dim];
            let end = shape.input_width();
            let rate = wide(&raw[t][end - 2 * shape.value_heads + head]);
            let decay = wide(&raw[t][end - shape.value_heads + head]) + wide(&w.dt_bias[head]);
            let rate = 1.0 / (1.0 + (-rate).exp());
            let decay = (-wide(&w.a_log[head]).exp() * decay.exp().ln_1p()).exp();
            let memory = &mut memories[head];
            memory.iter_mut().flatten().for_each(|s| *s *= decay);
            let mut read = vec![0.0; shape.value_dim];
            for j in 0..shape.value_dim {
                let known: f64 = (0..shape.key_dim).map(|i| memory[i][j] * k[i]).sum();
                for i in 0..shape.key_dim {
                    memory[i][j] += k[i] * rate * (v[j] - known);
                    read[j] += memory[i][j] * q[i] / (shape.key_dim as f64).sqrt();
                }
            }
            let mean = read.iter().map(|x| x * x).sum::<f64>() / shape.value_dim as f64;
            let z = &raw[t][shape.qkv_width() + head * shape.value_dim..];
            for j in 0..shape.value_dim {
                let normed = read[j] / (mean + f64::from(EPS)).sqrt() * wide(&w.norm[j]);
                row.push(normed * silu(wide(&z[j])));
            }
        }
        out.push(row);
    }
    out
}

/// The tokens of a segment's sequence up to its end.
fn sequence(segment: &Segment) -> Vec<usize> {
    let prefix = segment.prefix.clone().unwrap_or(0..0);
    prefix.chain(segment.tokens.clone()).collect()
}

#[test]
fn it_is_what_the_paper_defines() {
    let wide = Shape {
        key_heads: 1,
        value_heads: 1,
        key_dim: 4,
        value_dim: 70,
        kernel: 3,
    };
    for shape in [SHAPE, wide] {
        let (layout, owned) = (layout(), Owned::new(shape));
        let raw = noise(layout.tokens() * shape.input_width(), 5);
        let found = run(&layout, shape, owned.weights(), &raw);
        for segment in layout.segments() {
            let tokens = sequence(segment);
            let rows: Vec<_> = tokens
                .iter()
                .map(|t| &raw[t * shape.input_width()..][..shape.input_width()])
                .collect();
            let expected = plain(shape, &owned.weights(), &rows);
            for (token, expected) in tokens.iter().zip(expected) {
                let found = &found.out[token * shape.value_width()..][..shape.value_width()];
                for (found, expected) in found.iter().zip(expected) {
                    assert!(
                        (f64::from(*found) - expected).abs() < 1e-5,
                        "{shape:?}, token {token}: {found}, not {expected}"
                    );
                }
            }
        }
    }
}

/// To the bit, however many tokens come at a time.
#[test]
fn a_memory_goes_on_where_it_was() {
    let (layout, owned) = (layout(), Owned::new(SHAPE));
    let (width, values) = (SHAPE.input_width(), SHAPE.value_width());
    let raw = noise(layout.tokens() * width, 5);
    let expected = run(&layout, SHAPE, owned.weights(), &raw).out;
    for segment in layout.segments() {
        let rows: Vec<f32> = sequence(segment)
            .iter()
            .flat_map(|t| &raw[t * width..][..width])
            .copied()
            .collect();
        for at_once in [1, 3, 100] {
            let mut memory = Memory::new(SHAPE);
            let mut found = vec![];
            for part in rows.chunks(at_once * width) {
                let mut out = vec![0.0; part.len() / width * values];
                memory.clone().read(&owned.weights(), part, &mut out); // a copy is another's
                memory.read(&owned.weights(), part, &mut out);
                found.extend(out);
            }
            let own = segment.position * values..;
            let expected = &expected[segment.tokens.start * values..segment.tokens.end * values];
            assert_eq!(&found[own], expected);
        }
    }
}

#[test]
fn gradients_agree_with_differences() {
    let (layout, owned) = (layout(), Owned::new(SHAPE));
    let raw = noise(layout.tokens() * SHAPE.input_width(), 5);
    let dy = noise(layout.tokens() * SHAPE.value_width(), 6);
    let found = run(&layout, SHAPE, owned.weights(), &raw);
    let mut d_raw = vec![f32::NAN; raw.len()]; // written whole
    let mut d_out = dy.clone();
    let kept = (&found.qkv[..], &found.gates[..], &found.read[..]);
    let d = backward(
        &layout,
        SHAPE,
        owned.weights(),
        &raw,
        kept,
        &mut d_out,
        &mut d_raw,
    );
    let loss = |weights: Weights, raw: &[f32]| -> f64 {
        let out = run(&layout, SHAPE, weights, raw).out;
        out.iter().zip(&dy).map(|(y, d)| f64::from(y * d)).sum()
    };
    let w = owned.weights();
    finite_difference(&raw, &d_raw, |raw| loss(w, raw));
    finite_difference(w.conv, &d.conv, |conv| loss(Weights { conv, ..w }, &raw));
    finite_difference(w.dt_bias, &d.dt_bias, |dt_bias| {
        loss(Weights { dt_bias, ..w }, &raw)
    });
    finite_difference(w.a_log, &d.a_log, |a_log| {
        loss(Weights { a_log, ..w }, &raw)
    });
    finite_difference(w.norm, &d.norm, |norm| loss(Weights { norm, ..w }, &raw));
}
