//! Linear attention: the walks held to the delta rule in float64, the whole layer to the CPU's kernels.

use crate::device::{
    Arg, Element, assert_close, for_both, in_every_order, launch, noise, unwritten, wide,
};
use common::kernels::delta::{self, Shape, State, WeightGradients, Weights};
use common::kernels::layout::{Layout, Segment};

const EPS: f32 = 1e-3;
const KEY_DIMS: [usize; 3] = [32, 64, 128];
/// Columns of a memory that a block has, on the way forth and on the way back.
const COLUMNS: usize = 64;
const STRIP: usize = 128;

#[derive(Clone, Copy)]
#[repr(C)]
struct Heads([i32; 5]);

/// `DeltaSpan` and `DeltaSegment`.
pub type Numbers = [i32; 5];

/// Prompts with their responses.
fn groups(layout: &Layout) -> Vec<&[Segment]> {
    let segments = layout.segments();
    segments.chunk_by(|_, next| next.prefix.is_some()).collect()
}

/// The segment of each row, and the segments.
pub fn segments(layout: &Layout) -> (Vec<i32>, Vec<Numbers>) {
    let (mut of, mut segments) = (vec![], vec![]);
    for group in groups(layout) {
        let end = group[group.len() - 1].tokens.end;
        for segment in group {
            of.extend(vec![segments.len() as i32; segment.tokens.len()]);
            let prefix = segment.prefix.clone().unwrap_or(0..0);
            let end = segment.prefix.as_ref().map_or(end, |_| segment.tokens.end);
            let (start, rows) = (segment.tokens.start, segment.tokens.len());
            segments.push([start, rows, prefix.start, prefix.len(), end].map(|n| n as i32));
        }
    }
    (of, segments)
}

/// A layer and a batch: prompts with responses, some shorter than the convolution, some of nothing.
struct Case {
    shape: Shape,
    layout: Layout,
}

fn cases() -> Vec<Case> {
    let shape = |key_heads, value_heads, key_dim, value_dim, kernel| Shape {
        key_heads,
        value_heads,
        key_dim,
        value_dim,
        kernel,
    };
    let shapes = [
        shape(2, 4, 8, 6, 4),
        shape(1, 1, 64, 64, 2),
        shape(1, 2, 70, 150, 3),
    ];
    let layout = |groups: &[(usize, &[usize])]| {
        let mut layout = Layout::default();
        groups
            .iter()
            .for_each(|(root, own)| layout.push(*root, own));
        layout
    };
    let layouts = [
        layout(&[(5, &[4, 2, 19]), (7, &[]), (2, &[3, 0]), (9, &[0, 1])]),
        layout(&[(1, &[1]), (17, &[8])]),
        layout(&[(1, &[9, 2]), (3, &[])]),
    ];
    let each = shapes.into_iter().zip(layouts);
    each.map(|(shape, layout)| Case { shape, layout }).collect()
}

impl Case {
    fn heads(&self) -> Heads {
        let s = self.shape;
        Heads([s.key_heads, s.value_heads, s.key_dim, s.value_dim, s.kernel].map(|n| n as i32))
    }

    fn tokens(&self) -> usize {
        self.layout.tokens()
    }

    fn walk<T: Element>(&self, stem: &str) -> String {
        let size = KEY_DIMS
            .into_iter()
            .find(|&size| size >= self.shape.key_dim);
        format!("{stem}_{}_{}", T::NAME, size.unwrap())
    }

    fn shared(&self, columns: usize) -> usize {
        let size = KEY_DIMS
            .into_iter()
            .find(|&size| size >= self.shape.key_dim);
        64 * (2 * size.unwrap() + 2 * columns + 4)
    }

    fn groups(&self) -> Vec<&[Segment]> {
        groups(&self.layout)
    }

    /// Which segment each row is of, and the segments.
    fn segments(&self) -> (Vec<i32>, Vec<Numbers>) {
        segments(&self.layout)
    }

    /// Spans of roots and of branches, forth and back, every segment with a memory of its own.
    fn spans(&self) -> [Vec<Numbers>; 4] {
        let mut all = [const { vec![] }; 4];
        let mut number = 0;
        for group in self.groups() {
            let span = |segment: &Segment, from, froms, to| {
                let tokens = &segment.tokens;
                [tokens.start as i32, tokens.len() as i32, from, froms, to]
            };
            let branches = group.len() as i32 - 1;
            all[0].push(span(&group[0], 0, 0, number));
            all[3].push(span(&group[0], number + 1, branches, -1));
            for (branch, own) in group[1..].iter().zip(number + 1..) {
                all[1].push(span(branch, number, 1, -1));
                all[2].push(span(branch, 0, 0, own));
            }
            number += branches + 1;
        }
        all
    }

    fn memories(&self) -> Vec<f32> {
        let shape = self.shape;
        unwritten(self.layout.segments().len() * shape.value_width() * shape.key_dim)
    }
}

/// What the rule reads, and gradients of what it gives.
struct Read<T> {
    qkv: Vec<T>,
    gates: Vec<f32>,
    d_read: Vec<T>,
}

impl<T: Element> Read<T> {
    fn new(case: &Case) -> Self {
        let (shape, tokens) = (case.shape, case.tokens());
        let mut qkv = noise::<f32>(tokens * shape.qkv_width(), 1);
        for row in qkv.chunks_exact_mut(shape.qkv_width()) {
            for head in row[..2 * shape.key_width()].chunks_exact_mut(shape.key_dim) {
                let length = head.iter().map(|x| x * x).sum::<f32>().sqrt();
                head.iter_mut().for_each(|x| *x /= length);
            }
        }
        // Some heads forget nearly everything at every token, others hardly anything.
        let gates = noise::<f32>(tokens * 2 * shape.value_heads, 2);
        let gate = |(i, x): (usize, &f32)| match i / shape.value_heads % 2 {
            0 if i % shape.value_heads % 2 == 0 => (x + 1.0) / 4.0,
            _ => 1.0 - (x + 1.0) / 20.0,
        };
        Self {
            qkv: qkv.into_iter().map(T::from).collect(),
            gates: gates.iter().enumerate().map(gate).collect(),
            d_read: noise(tokens * shape.value_width(), 3),
        }
    }
}

/// What the walks find, or should find.
#[derive(Clone, Debug, PartialEq)]
struct Found<T, G> {
    read: Vec<T>,
    d_qkv: Vec<T>,
    d_gates: Vec<G>,
}

/// The rule token by token, with all memories kept.
fn exact<T: Element>(case: &Case, given: &Read<T>) -> Found<f64, f64> {
    let (shape, tokens) = (case.shape, case.tokens());
    let (keys, values) = (shape.key_dim, shape.value_dim);
    let (qkv, d_read) = (wide(&given.qkv), wide(&given.d_read));
    let mut found = Found {
        read: vec![0.0; tokens * shape.value_width()],
        d_qkv: vec![0.0; tokens * shape.qkv_width()],
        d_gates: vec![0.0; tokens * 2 * shape.value_heads],
    };
    for head in 0..shape.value_heads {
        let q_at = head / (shape.value_heads / shape.key_heads) * keys;
        let k_at = shape.key_width() + q_at;
        let v_at = 2 * shape.key_width() + head * values;
        let gate = |token: usize, which: usize| {
            f64::from(given.gates[(2 * token + which) * shape.value_heads + head])
        };
        // The memory before each token, and after the last.
        let forth = |segment: &Segment, start: &[f64], read: &mut [f64]| {
            let mut memories = vec![start.to_vec()];
            for token in segment.tokens.clone() {
                let row = &qkv[token * shape.qkv_width()..];
                let (q, k, v) = (&row[q_at..], &row[k_at..], &row[v_at..]);
                let mut memory = memories[memories.len() - 1].clone();
                memory.iter_mut().for_each(|s| *s *= gate(token, 0));
                for j in 0..values {
                    let known: f64 = (0..keys).map(|i| memory[i * values + j] * k[i]).sum();
                    let mut sum = 0.0;
                    for i in 0..keys {
                        memory[i * values + j] += k[i] * gate(token, 1) * (v[j] - known);
                        sum += memory[i * values + j] * q[i];
                    }
                    read[token * shape.value_width() + head * values + j] = sum;
                }
                memories.push(memory);
            }
            memories
        };
        let back = |segment: &Segment,
                    memories: &[Vec<f64>],
                    d: &mut Vec<f64>,
                    found: &mut Found<f64, f64>| {
            for (token, before) in segment.tokens.clone().zip(memories).rev() {
                let row = &qkv[token * shape.qkv_width()..];
                let (q, k, v) = (&row[q_at..], &row[k_at..], &row[v_at..]);
                let d_row = &mut found.d_qkv[token * shape.qkv_width()..];
                let d_out = &d_read[token * shape.value_width() + head * values..];
                let (decay, rate) = (gate(token, 0), gate(token, 1));
                for j in 0..values {
                    let faded = |i: usize| decay * before[i * values + j];
                    let lack = v[j] - (0..keys).map(|i| faded(i) * k[i]).sum::<f64>();
                    for i in 0..keys {
                        d[i * values + j] += q[i] * d_out[j];
                        d_row[q_at + i] += (faded(i) + k[i] * rate * lack) * d_out[j];
                    }
                    let d_learnt: f64 = (0..keys).map(|i| d[i * values + j] * k[i]).sum();
                    d_row[v_at + j] = rate * d_learnt;
                    let at = token * 2 * shape.value_heads + head;
                    found.d_gates[at + shape.value_heads] += d_learnt * lack;
                    for i in 0..keys {
                        let d_memory = &mut d[i * values + j];
                        d_row[k_at + i] += *d_memory * rate * lack - faded(i) * rate * d_learnt;
                        *d_memory -= k[i] * rate * d_learnt;
                        found.d_gates[at] += *d_memory * faded(i);
                        *d_memory *= decay;
                    }
                }
            }
        };
        for group in case.groups() {
            let none = vec![0.0; keys * values];
            let root = forth(&group[0], &none, &mut found.read);
            let mut d_root = none.clone();
            for branch in &group[1..] {
                let memories = forth(branch, &root[root.len() - 1], &mut found.read);
                let mut d = none.clone();
                back(branch, &memories, &mut d, &mut found);
                d_root.iter_mut().zip(d).for_each(|(sum, d)| *sum += d);
            }
            back(&group[0], &root, &mut d_root, &mut found);
        }
    }
    found
}

/// Forth: what is read.
fn scan<T: Element>(case: &Case, qkv: &Vec<T>, gates: &Vec<f32>) -> Vec<T> {
    let shape = case.shape;
    let blocks = shape.value_heads * shape.value_dim.div_ceil(COLUMNS);
    let [roots, branches, ..] = case.spans();
    let mut memories = case.memories();
    let mut read: Vec<T> = unwritten(case.tokens() * shape.value_width());
    for spans in [&roots, &branches]
        .into_iter()
        .filter(|spans| !spans.is_empty())
    {
        launch!(case.walk::<T>("delta_scan"), [blocks, spans.len(), 1], 128, case.shared(COLUMNS);
            qkv, gates, spans, &mut memories, &mut read, Arg::value(case.heads()));
    }
    read
}

/// And back.
fn scan_backward<T: Element>(case: &Case, given: &Read<T>) -> (Vec<T>, Vec<f32>) {
    let (shape, tokens, heads) = (case.shape, case.tokens(), case.heads());
    let Read { qkv, gates, d_read } = given;
    let strips = shape.value_dim.div_ceil(STRIP);
    let shared =
        case.shared(STRIP) + 256 * KEY_DIMS.into_iter().find(|&d| d >= shape.key_dim).unwrap();
    let grid = |spans: &Vec<Numbers>| [shape.value_heads * strips, spans.len(), 1];
    let room = |width: usize| unwritten::<f32>(tokens * width);
    let (mut lack, mut d_learnt) = (room(shape.value_width()), room(shape.value_width()));
    let keys = shape.value_heads * strips * shape.key_dim;
    let (mut d_query, mut d_key) = (room(keys), room(keys));
    let mut memories = case.memories();
    let [roots, branches, branches_back, roots_back] = case.spans();
    for spans in [&roots, &branches]
        .into_iter()
        .filter(|spans| !spans.is_empty())
    {
        launch!(case.walk::<T>("delta_trace"), grid(spans), 256, shared;
            qkv, gates, d_read, spans, &mut memories, &mut lack, &mut d_query, Arg::value(heads));
    }
    for spans in [&branches_back, &roots_back]
        .into_iter()
        .filter(|spans| !spans.is_empty())
    {
        launch!(case.walk::<T>("delta_back"), grid(spans), 256, shared;
            qkv, gates, d_read, &lack, spans, &mut memories, &mut d_learnt, &mut d_key, Arg::value(heads));
    }
    let both = [roots, branches].concat();
    launch!(case.walk::<T>("delta_again"), grid(&both), 256, shared;
        qkv, gates, &lack, &d_learnt, &both, &mut memories, &mut d_key, Arg::value(heads));
    let mut d_qkv: Vec<T> = unwritten(tokens * shape.qkv_width());
    let (mut terms, mut d_gates) = (room(shape.value_heads), room(2 * shape.value_heads));
    launch!(format!("delta_gradients_{}", T::NAME), [(tokens * shape.key_heads).div_ceil(8), 1, 1], 256, 0;
        qkv, gates, &lack, &d_learnt, &d_query, &d_key, &mut d_qkv, &mut terms, &mut d_gates, tokens as i32,
        Arg::value(heads));
    let (_, segments) = case.segments();
    launch!("delta_decays", [shape.value_heads, segments.len(), 1], 256, 0;
        &terms, &segments, &mut d_gates, shape.value_heads as i32);
    (d_qkv, d_gates)
}

fn walks<T: Element>() {
    for case in cases() {
        let given = Read::<T>::new(&case);
        let expected = exact(&case, &given);
        let (read, d_qkv, d_gates) = in_every_order(|| {
            let read = scan(&case, &given.qkv, &given.gates);
            let (d_qkv, d_gates) = scan_backward(&case, &given);
            (read, d_qkv, d_gates)
        });
        assert_close("read", &read, &expected.read, 8.0);
        assert_close("d_qkv", &d_qkv, &expected.d_qkv, 8.0);
        assert_close("d_gates", &d_gates, &expected.d_gates, 30.0);
    }
}

/// A layer's parameters, as the CPU has them; `conv` as files and GPUs have it, too.
struct Parameters {
    conv: Vec<f32>,
    turned: Vec<f32>,
    dt_bias: Vec<f32>,
    a_log: Vec<f32>,
    norm: Vec<f32>,
}

/// `[rows, cols]` as `[cols, rows]`.
pub fn turn(values: &[f32], cols: usize) -> Vec<f32> {
    let rows = values.len() / cols;
    let at = |i| values[i % rows * cols + i / rows];
    (0..values.len()).map(at).collect()
}

impl Parameters {
    fn new(shape: Shape) -> Self {
        let conv = noise(shape.qkv_width() * shape.kernel, 11);
        Self {
            turned: turn(&conv, shape.kernel),
            conv,
            dt_bias: noise(shape.value_heads, 12),
            a_log: noise(shape.value_heads, 13),
            norm: noise(shape.value_dim, 14),
        }
    }

    fn on_cpu(&self) -> Weights<'_> {
        Weights {
            conv: &self.turned,
            dt_bias: &self.dt_bias,
            a_log: &self.a_log,
            norm: &self.norm,
            eps: EPS,
        }
    }
}

/// What a layer makes on its way.
#[derive(Clone, Debug, PartialEq)]
struct Made<T> {
    qkv: Vec<T>,
    gates: Vec<f32>,
    read: Vec<T>,
    out: Vec<T>,
}

/// A warp each for the heads of `[q | k | v]` of so many rows.
fn inputs_grid(shape: Shape, count: usize) -> [usize; 3] {
    let units = count * (2 * shape.key_heads + shape.value_heads);
    [units.div_ceil(8), 1, 1]
}

fn inputs<T: Element>(case: &Case, with: &Parameters, raw: &Vec<T>) -> (Vec<T>, Vec<f32>) {
    let (shape, tokens, heads) = (case.shape, case.tokens(), case.heads());
    let (segment_of, segments) = case.segments();
    let mut qkv: Vec<T> = unwritten(tokens * shape.qkv_width());
    launch!(format!("delta_inputs_{}", T::NAME), inputs_grid(shape, tokens), 256, 0;
        raw, &segment_of, &segments, &with.conv, &mut qkv, tokens as i32, Arg::value(heads));
    (qkv, gates(case, with, raw, tokens))
}

fn gates<T: Element>(case: &Case, with: &Parameters, raw: &Vec<T>, count: usize) -> Vec<f32> {
    let heads = case.shape.value_heads;
    let mut gates: Vec<f32> = unwritten(count * 2 * heads);
    launch!(format!("delta_gates_{}", T::NAME), [(count * heads).div_ceil(256), 1, 1], 256, 0;
        raw, &with.dt_bias, &with.a_log, &mut gates, count as i32, Arg::value(case.heads()));
    gates
}

fn forward<T: Element>(case: &Case, with: &Parameters, raw: &Vec<T>) -> Made<T> {
    let (shape, tokens) = (case.shape, case.tokens());
    let (qkv, gates) = inputs(case, with, raw);
    let read = scan(case, &qkv, &gates);
    let mut out: Vec<T> = unwritten(read.len());
    let z = raw[shape.qkv_width()..].to_vec(); // as in the tools, it begins where the part does
    launch!(format!("gated_norm_{}", T::NAME), [(tokens * shape.value_heads).div_ceil(8), 1, 1], 256, 0;
        &read, &z, &with.norm, EPS, &mut out, tokens as i32, shape.value_heads as i32, shape.value_dim as i32,
        shape.input_width() as i32);
    Made {
        qkv,
        gates,
        read,
        out,
    }
}

/// The sums of the columns of parts.
fn columns(partial: &Vec<f32>, width: usize) -> Vec<f32> {
    let mut sums = vec![0.0f32; width];
    let parts = (partial.len() / width) as i32;
    launch!("sum_columns_f32", [width.div_ceil(32), 1, 1], 256, 0; partial, &mut sums, parts, width as i32, 1i32);
    sums
}

/// The gradients of the projection, and of [convolution, dt_bias and a_log, norm].
fn backward<T: Element>(
    case: &Case,
    with: &Parameters,
    raw: &Vec<T>,
    made: &Made<T>,
    d_out: &[T],
) -> (Vec<T>, [Vec<f32>; 3]) {
    let (shape, tokens, heads) = (case.shape, case.tokens(), case.heads());
    let (blocks, width) = (3.min(tokens), shape.qkv_width());
    let (segment_of, segments) = case.segments();
    let (z, mut d_z) = (raw[width..].to_vec(), unwritten::<T>(raw.len() - width));
    let mut d_read = d_out.to_vec();
    let mut d_norm: Vec<f32> = unwritten(blocks * shape.value_dim);
    launch!(format!("gated_norm_backward_{}", T::NAME), [blocks, 1, 1], 256, 8 * shape.value_dim * 4;
        &made.read, &z, &with.norm, EPS, &mut d_read, &mut d_z, &mut d_norm, tokens as i32, shape.value_heads as i32,
        shape.value_dim as i32, shape.input_width() as i32);
    let mut d_raw = [unwritten(width), d_z].concat();
    let given = Read {
        qkv: made.qkv.clone(),
        gates: made.gates.clone(),
        d_read,
    };
    let (mut d_qkv, d_gates) = scan_backward(case, &given);
    launch!(format!("delta_inputs_backward_{}", T::NAME), inputs_grid(shape, tokens), 256, 0;
        raw, &segment_of, &segments, &with.conv, &mut d_qkv, tokens as i32, Arg::value(heads));
    launch!(format!("delta_conv_backward_{}", T::NAME), [tokens, 1, 1], 256, 0;
        &d_qkv, &segment_of, &segments, &with.conv, &mut d_raw, Arg::value(heads));
    let mut d_conv: Vec<f32> = unwritten(2 * width * shape.kernel);
    launch!(format!("delta_conv_gradient_{}", T::NAME), [width.div_ceil(256), 2, 1], 256, 0;
        raw, &d_qkv, &segment_of, &segments, &mut d_conv, tokens as i32, Arg::value(heads));
    let mut d_parameters: Vec<f32> = unwritten(blocks * 2 * shape.value_heads);
    launch!(format!("delta_gates_backward_{}", T::NAME), [blocks, 1, 1], 256, 0;
        raw, &with.dt_bias, &with.a_log, &d_gates, &mut d_raw, &mut d_parameters, tokens as i32, Arg::value(heads));
    let sums = [
        columns(&d_conv, width * shape.kernel),
        columns(&d_parameters, 2 * shape.value_heads),
        columns(&d_norm, shape.value_dim),
    ];
    (d_raw, sums)
}

pub fn narrow<T: Element>(x: &[T]) -> Vec<f32> {
    x.iter().map(|x| x.to()).collect()
}

fn layers<T: Element>() {
    for case in cases() {
        let (shape, tokens, with) = (case.shape, case.tokens(), Parameters::new(case.shape));
        let raw: Vec<T> = noise(tokens * shape.input_width(), 5);
        let d_out: Vec<T> = noise(tokens * shape.value_width(), 6);
        let (made, (d_raw, sums)) = in_every_order(|| {
            let made = forward(&case, &with, &raw);
            let gradients = backward(&case, &with, &raw, &made, &d_out);
            (made, gradients)
        });
        let zeros = |width: usize| vec![0.0f32; tokens * width];
        let mut cpu = Made {
            qkv: zeros(shape.qkv_width()),
            gates: zeros(2 * shape.value_heads),
            read: zeros(shape.value_width()),
            out: zeros(shape.value_width()),
        };
        let state = State {
            qkv: &mut cpu.qkv,
            gates: &mut cpu.gates,
            read: &mut cpu.read,
            out: &mut cpu.out,
        };
        let raw = narrow(&raw);
        delta::forward(&case.layout, shape, with.on_cpu(), &raw, state);
        let (mut d_read, mut cpu_d_raw) = (narrow(&d_out), zeros(shape.input_width()));
        let kept = (&cpu.qkv[..], &cpu.gates[..], &cpu.read[..]);
        let WeightGradients {
            conv,
            dt_bias,
            a_log,
            norm,
        } = delta::backward(
            &case.layout,
            shape,
            with.on_cpu(),
            &raw,
            kept,
            &mut d_read,
            &mut cpu_d_raw,
        );
        assert_close("qkv", &made.qkv, &wide(&cpu.qkv), 4.0);
        assert_close("gates", &made.gates, &wide(&cpu.gates), 10.0);
        assert_close("read", &made.read, &wide(&cpu.read), 10.0);
        assert_close("out", &made.out, &wide(&cpu.out), 10.0);
        assert_close("d_raw", &d_raw, &wide(&cpu_d_raw), 20.0);
        let rounded = |x: &[f32]| x.iter().map(|&x| T::from(x)).collect::<Vec<_>>();
        let [d_conv, d_parameters, d_norm] = sums;
        let conv = wide(&turn(&conv, shape.qkv_width()));
        assert_close("d_conv", &rounded(&d_conv), &conv, 20.0);
        // (What decays gain is what is left of sums over all tokens after them; roundings add up.)
        let parameters = wide(&[dt_bias, a_log].concat());
        assert_close(
            "d_dt_bias and d_a_log",
            &rounded(&d_parameters),
            &parameters,
            300.0,
        );
        assert_close("d_norm", &rounded(&d_norm), &wide(&norm), 20.0);
    }
}

/// Token by token, from what a walk left, to the same bits as all at once.
fn steps<T: Element>() {
    for shape in cases().iter().map(|case| case.shape) {
        let (slots, lengths, prompts) = (3, [9, 7], [4, 2]); // the last slot is nobody's
        let mut layout = Layout::default();
        lengths.iter().for_each(|&len| layout.push(len, &[]));
        let case = Case { shape, layout };
        let (with, width) = (Parameters::new(shape), shape.input_width());
        let raw: Vec<T> = noise(case.tokens() * width, 5);
        let (qkv, decays) = inputs(&case, &with, &raw);
        let all = scan(&case, &qkv, &decays);
        let blocks = shape.value_heads * shape.value_dim.div_ceil(COLUMNS);
        // The prompts' memories come after those of the slots.
        let spans: Vec<Numbers> = vec![[0, prompts[0], 0, 0, 3], [9, prompts[1], 0, 0, 4]];
        in_every_order(|| {
            let mut memories: Vec<f32> = unwritten(5 * shape.value_width() * shape.key_dim);
            let mut past: Vec<T> = unwritten(5 * (shape.kernel - 1) * shape.qkv_width());
            let mut read: Vec<T> = unwritten(all.len());
            launch!(case.walk::<T>("delta_scan"), [blocks, 2, 1], 128, case.shared(COLUMNS);
                &qkv, &decays, &spans, &mut memories, &mut read, Arg::value(case.heads()));
            launch!(format!("delta_keep_{}", T::NAME), [shape.qkv_width().div_ceil(256), 2, 1], 256, 0;
                &raw, &spans, &mut past, Arg::value(case.heads()));
            let finished = vec![0, 0, 1i32];
            for step in 0..5 {
                let from = if step == 0 {
                    vec![3, 4, 2i32]
                } else {
                    vec![0, 1, 2]
                };
                let rows = [prompts[0] as usize + step, 9 + prompts[1] as usize + step];
                let row = |r: usize| &raw[r * width..(r + 1) * width];
                let own = [rows[0], rows[1], 0].map(row).concat();
                let mut qkv: Vec<T> = unwritten(slots * shape.qkv_width());
                launch!(format!("delta_step_inputs_{}", T::NAME), inputs_grid(shape, slots), 256, 0;
                    &own, &mut past, &from, &finished, &with.conv, &mut qkv, slots as i32, Arg::value(case.heads()));
                let gates = gates(&case, &with, &own, slots);
                let mut found: Vec<T> = unwritten(slots * shape.value_width());
                launch!(case.walk::<T>("delta_step"), [blocks, slots, 1], 128, case.shared(COLUMNS);
                    &qkv, &gates, &from, &finished, &mut memories, &mut found, Arg::value(case.heads()));
                let row = |r: usize| &all[r * shape.value_width()..(r + 1) * shape.value_width()];
                let (found, nobodys) = found.split_at(2 * shape.value_width());
                assert_eq!(found, rows.map(row).concat());
                assert!(nobodys.iter().all(|x| x.to().is_nan()));
            }
            let own = shape.value_width() * shape.key_dim;
            assert!(memories[2 * own..3 * own].iter().all(|x| x.is_nan()));
        });
    }
}

for_both!(walks, layers, steps);
