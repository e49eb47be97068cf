//! Gathers and scatters, norms, activations, rotation.

use crate::device::{
    Arg, Element, Null, assert_close, in_every_order, launch, noise, unwritten, wide,
};
use common::kernels::activation::Activation;

fn embeddings<T: Element>() {
    let (vocab, width, tokens) = (7, 300, vec![3, 0, 6, 3i32]);
    let table: Vec<T> = noise(vocab * width, 1);
    let out = in_every_order(|| {
        let mut out: Vec<f32> = unwritten(tokens.len() * width);
        launch!(format!("embed_{}", T::NAME), [tokens.len(), 1, 1], 256, 0; &table, &tokens, 2.0f32, &mut out, width as i32);
        out
    });
    for (row, &token) in out.chunks_exact(width).zip(&tokens) {
        let expected: Vec<f32> = table[token as usize * width..][..width]
            .iter()
            .map(|x| x.to() * 2.0)
            .collect();
        assert_eq!(row, expected);
    }
}

#[test]
fn rows_are_added_in_their_order() {
    let width = 300;
    let x: Vec<f32> = noise(5 * width, 1);
    let before: Vec<f32> = noise(4 * width, 2);
    let (rows, starts, order) = (vec![3, 0i32], vec![0, 3, 5i32], vec![0, 2, 4, 1, 3i32]);
    let target = in_every_order(|| {
        let mut target = before.clone();
        launch!("add_rows", [2, 1, 1], 256, 0; &x, &rows, &starts, &order, &mut target, width as i32);
        target
    });
    let mut expected = before.clone();
    for (to, from) in [(3, [0, 2, 4].as_slice()), (0, &[1, 3])] {
        for c in 0..width {
            let sum = from.iter().fold(0.0, |sum, r| sum + x[r * width + c]);
            expected[to * width + c] += sum;
        }
    }
    assert_eq!(target, expected);
}

fn biases_and_sums_of_columns<T: Element>() {
    let (count, width) = (70, 300);
    let (x, bias): (Vec<T>, Vec<f32>) = (noise(count * width, 1), noise(width, 2));
    let out = in_every_order(|| {
        let mut out = x.clone();
        launch!(format!("add_bias_{}", T::NAME), [count, 1, 1], 256, 0; &mut out, &bias, width as i32);
        out
    });
    let exact: Vec<f64> = (wide(&x).iter().enumerate())
        .map(|(i, x)| x + bias[i % width] as f64)
        .collect();
    assert_close("bias", &out, &exact, 1.0);

    let parts = 3;
    let sums = in_every_order(|| {
        let mut partial: Vec<f32> = unwritten(parts * width);
        let mut sums = bias.clone();
        launch!(format!("sum_columns_{}", T::NAME), [width.div_ceil(32), parts, 1], 256, 0;
            &x, &mut partial, count as i32, width as i32, 0i32);
        launch!("sum_columns_f32", [width.div_ceil(32), 1, 1], 256, 0;
            &partial, &mut sums, parts as i32, width as i32, 1i32);
        sums
    });
    let exact: Vec<f64> = (0..width)
        .map(|c| {
            bias[c] as f64
                + (0..count)
                    .map(|r| x[r * width + c].to() as f64)
                    .sum::<f64>()
        })
        .collect();
    assert_close("sums", &sums, &exact, 10.0);
}

const EPS: f32 = 1e-5;

/// How kernels are told of it.
#[derive(Clone, Copy)]
#[repr(C)]
struct NormKind {
    eps: f32,
    centred: i32,
}

impl From<NormKind> for Arg {
    fn from(kind: NormKind) -> Self {
        Self::value(kind)
    }
}

const KINDS: [NormKind; 2] = [
    NormKind {
        eps: EPS,
        centred: 0,
    },
    NormKind {
        eps: EPS,
        centred: 1,
    },
];

/// The norm of one row, and its gradients (dx, dw): of a centred one, that of the row less its mean is without a mean.
fn norm_of(kind: NormKind, x: &[f64], w: &[f64], dy: &[f64]) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    if kind.centred == 0 {
        return norm(x, w, dy);
    }
    let centred = |x: &[f64]| {
        let mean = x.iter().sum::<f64>() / x.len() as f64;
        x.iter().map(|x| x - mean).collect::<Vec<_>>()
    };
    let (y, dx, dw) = norm(&centred(x), w, dy);
    (y, centred(&dx), dw)
}

/// RMSNorm of one row, and its gradients (dx, dw).
fn norm(x: &[f64], w: &[f64], dy: &[f64]) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let n = x.len() as f64;
    let s = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / n + EPS as f64).sqrt();
    let mean = (0..x.len()).map(|i| dy[i] * w[i] * x[i] * s).sum::<f64>() / n;
    (
        (0..x.len()).map(|i| x[i] * s * w[i]).collect(),
        (0..x.len())
            .map(|i| s * (dy[i] * w[i] - x[i] * s * mean))
            .collect(),
        (0..x.len()).map(|i| dy[i] * x[i] * s).collect(),
    )
}

fn norms<T: Element>() {
    KINDS.into_iter().for_each(norms_of_kind::<T>);
}

fn norms_of_kind<T: Element>(kind: NormKind) {
    let sizes = [
        (1, 5, false),
        (5, 300, true),
        (67, 64, false),
        (5, 1030, true),
        (3, 1028, false),
        (3, 5124, true),
    ];
    for (count, width, gathered) in sizes {
        let teams = if width <= 1024 { 8 } else { 1 };
        let rows: Option<Vec<i32>> =
            gathered.then(|| (0..count as i32).map(|i| (i * 3) % 4).collect());
        let (x, w): (Vec<f32>, Vec<f32>) = (noise(count.max(4) * width, 1), noise(width, 2));
        let dy: Vec<T> = noise(count * width, 3);
        let before: Vec<f32> = noise(count * width, 4);
        let y = in_every_order(|| {
            let mut y: Vec<T> = unwritten(count * width);
            launch!(format!("rms_norm_{}", T::NAME), [count.div_ceil(teams), 1, 1], 256, 0;
                &x, rows.as_ref(), &w, kind, &mut y, count as i32, width as i32);
            y
        });
        let blocks = count.min(4);
        let (dx, copy, dw) = in_every_order(|| {
            let (mut dx, mut copy, mut partial): (_, Vec<T>, Vec<f32>) = (
                before.clone(),
                unwritten(count * width),
                unwritten(blocks * width),
            );
            launch!(format!("rms_norm_backward_{}", T::NAME), [blocks, 1, 1], 256, teams * width * 4;
                &x, rows.as_ref(), &w, kind, &dy, &mut dx, &mut copy, &mut partial, count as i32, width as i32, 1i32);
            let mut dw = vec![0.0f32; width];
            launch!("sum_columns_f32", [width.div_ceil(32), 1, 1], 256, 0; &partial, &mut dw, blocks as i32, width as i32, 1i32);
            (dx, copy, dw)
        });
        let (mut y_exact, mut dx_exact, mut dw_exact) = (vec![], vec![], vec![0.0; width]);
        for r in 0..count {
            let from = rows.as_ref().map_or(r, |rows| rows[r] as usize);
            let (y, dx, dw) = norm_of(
                kind,
                &wide(&x[from * width..][..width]),
                &wide(&w),
                &wide(&dy[r * width..][..width]),
            );
            y_exact.extend(y);
            dx_exact.extend(
                dx.iter()
                    .zip(&before[r * width..])
                    .map(|(d, b)| d + *b as f64),
            );
            dw_exact.iter_mut().zip(dw).for_each(|(sum, d)| *sum += d);
        }
        assert_close("y", &y, &y_exact, 5.0);
        assert_close("dx", &dx, &dx_exact, 10.0);
        assert_close("dx copy", &copy, &dx_exact, 5.0);
        assert_close("dw", &dw, &dw_exact, 20.0);

        // Without what is optional, the gradient is set.
        let mut alone: Vec<f32> = unwritten(count * width);
        launch!(format!("rms_norm_backward_{}", T::NAME), [blocks, 1, 1], 256, teams * width * 4;
            &x, rows.as_ref(), &w, kind, &dy, &mut alone, Null, Null, count as i32, width as i32, 0i32);
        let exact: Vec<f64> = dx_exact
            .iter()
            .zip(&before)
            .map(|(d, b)| d - *b as f64)
            .collect();
        assert_close("dx alone", &alone, &exact, 10.0);
    }
}

/// The stream gains what a norm makes of something else.
fn norms_of_what_is_added<T: Element>() {
    KINDS.into_iter().for_each(norms_added::<T>);
}

fn norms_added<T: Element>(kind: NormKind) {
    for (count, width) in [(1, 5), (67, 64), (5, 1030), (3, 5124)] {
        let teams = if width <= 1024 { 8 } else { 1 };
        let (given, w): (Vec<f32>, Vec<f32>) = (noise(count * width, 1), noise(width, 2));
        let (before, dy): (Vec<f32>, Vec<f32>) = (noise(count * width, 3), noise(count * width, 4));
        let blocks = count.min(4);
        let (stream, d_given, dw) = in_every_order(|| {
            let mut stream = before.clone();
            launch!("rms_norm_add", [count.div_ceil(teams), 1, 1], 256, 0;
                &given, &w, kind, &mut stream, count as i32, width as i32);
            let (mut d, mut partial): (Vec<T>, Vec<f32>) =
                (unwritten(count * width), unwritten(blocks * width));
            launch!(format!("rms_norm_add_backward_{}", T::NAME), [blocks, 1, 1], 256, teams * width * 4;
                &given, &w, kind, &dy, &mut d, &mut partial, count as i32, width as i32);
            (stream, d, columns(&partial, width))
        });
        let (mut stream_exact, mut d_exact, mut dw_exact) = (vec![], vec![], vec![0.0; width]);
        for r in 0..count {
            let row = r * width..(r + 1) * width;
            let (y, dx, dw) = norm_of(
                kind,
                &wide(&given[row.clone()]),
                &wide(&w),
                &wide(&dy[row.clone()]),
            );
            stream_exact.extend(y.iter().zip(&before[row]).map(|(y, b)| y + *b as f64));
            d_exact.extend(dx);
            dw_exact.iter_mut().zip(dw).for_each(|(sum, d)| *sum += d);
        }
        assert_close("the stream", &stream, &stream_exact, 8.0);
        assert_close("d_given", &d_given, &d_exact, 8.0);
        assert_close("dw", &dw, &dw_exact, 20.0);
    }
}

/// Some columns of rows that are longer, in place.
fn norms_of_parts_of_rows<T: Element>() {
    KINDS.into_iter().for_each(norms_of_parts::<T>);
}

fn norms_of_parts<T: Element>(kind: NormKind) {
    for (count, stride, first, width, parts) in [
        (3, 30, 18, 6, 1),
        (3, 30, 6, 6, 3),
        (67, 96, 0, 64, 1),
        (67, 80, 16, 16, 4),
        (5, 1288, 8, 1024, 1),
        (2, 5200, 24, 5124, 1),
    ] {
        let teams = if width <= 1024 { 8 } else { 1 };
        let (x, dy): (Vec<T>, Vec<T>) = (noise(count * stride, 1), noise(count * stride, 2));
        let w: Vec<f32> = noise(parts * width, 3);
        let sizes = [count as i32, width as i32, stride as i32];
        let blocks = count.min(4);
        // As in the tools, the vectors begin where the part does.
        let (y, d, dw) = in_every_order(|| {
            let (mut y, mut d, mut partial): (_, _, Vec<f32>) = (
                x[first..].to_vec(),
                dy[first..].to_vec(),
                unwritten(blocks * parts * width),
            );
            launch!(format!("rms_norm_part_{}", T::NAME), [count.div_ceil(teams), parts, 1], 256, 0;
                &mut y, &w, kind, sizes[0], sizes[1], sizes[2]);
            launch!(format!("rms_norm_part_backward_{}", T::NAME), [blocks, parts, 1], 256, teams * width * 4;
                &x[first..].to_vec(), &w, kind, &mut d, &mut partial, sizes[0], sizes[1], sizes[2]);
            (y, d, columns(&partial, parts * width))
        });
        let (mut y_exact, mut d_exact) = (wide(&x[first..]), wide(&dy[first..]));
        let mut dw_exact = vec![0.0; parts * width];
        for (r, part) in (0..count).flat_map(|r| (0..parts).map(move |part| (r, part))) {
            let own = part * width..(part + 1) * width;
            let at = r * stride + own.start..r * stride + own.end;
            let (x, dy) = (&y_exact[at.clone()], &d_exact[at.clone()]);
            let (y, dx, dw) = norm_of(kind, x, &wide(&w[own.clone()]), dy);
            y_exact[at.clone()].copy_from_slice(&y);
            d_exact[at].copy_from_slice(&dx);
            (dw_exact[own].iter_mut().zip(dw)).for_each(|(sum, d)| *sum += d);
        }
        assert_close("y", &y, &y_exact, 5.0);
        assert_close("d", &d, &d_exact, 8.0);
        assert_close("dw", &dw, &dw_exact, 20.0);
    }
}

/// The sums of the columns of parts.
fn columns(partial: &Vec<f32>, width: usize) -> Vec<f32> {
    let mut sums = vec![0.0f32; width];
    let parts = (partial.len() / width) as i32;
    launch!("sum_columns_f32", [width.div_ceil(32), 1, 1], 256, 0; partial, &mut sums, parts, width as i32, 1i32);
    sums
}

/// All activations, of gates and ups that a limit holds and of others.
fn activations<T: Element>() {
    let (silu, gelu) = (Activation::Silu, Activation::GeluTanh);
    let clamped = Activation::Clamped {
        alpha: 1.702,
        limit: 3.0,
    };
    for (count, ffn, activation) in [
        (1, 1, silu),
        (3, 1030, silu),
        (2, 40, gelu),
        (1, 33, gelu),
        (2, 520, clamped),
    ] {
        let curve = activation.curve();
        let gate_up: Vec<T> = noise::<f32>(count * 2 * ffn, 1)
            .iter()
            .map(|x| T::from(x * 8.0))
            .collect();
        let dy: Vec<T> = noise(count * ffn, 2);
        let grid = [count, ffn.div_ceil(1024), 1];
        let (out, d, inner) = in_every_order(|| {
            let (mut out, mut d, mut inner): (Vec<T>, _, _) =
                (unwritten(count * ffn), gate_up.clone(), dy.clone());
            launch!(format!("activation_{}", T::NAME), grid, 256, 0; &gate_up, &mut out, ffn as i32, curve, 1.0f32);
            let shared = Arg::from(&mut inner); // the output may take the place of dy
            crate::device::run(
                &format!("activation_backward_{}", T::NAME),
                grid,
                256,
                0,
                vec![
                    Arg::from(&mut d),
                    shared,
                    shared,
                    (ffn as i32).into(),
                    curve.into(),
                ],
            );
            let mut again = gate_up.clone();
            launch!(format!("activation_backward_{}", T::NAME), grid, 256, 0; &mut again, &dy, Null, ffn as i32, curve);
            assert_eq!(again, d);
            (out, d, inner)
        });
        assert_eq!(out, inner);
        let (mut out_exact, mut d_exact) = (vec![0.0; count * ffn], vec![0.0; gate_up.len()]);
        for r in 0..count {
            for c in 0..ffn {
                let (g, u) = (
                    gate_up[r * 2 * ffn + c].to() as f64,
                    gate_up[(r * 2 + 1) * ffn + c].to() as f64,
                );
                let [c64, a64, limit, plus] =
                    [curve.c, curve.a, curve.limit, curve.plus].map(f64::from);
                let (free, up_free) = (g <= limit, u.abs() <= limit);
                let (g, u) = (g.min(limit), u.clamp(-limit, limit) + plus);
                let (v, slope) = (
                    c64 * g * (1.0 + a64 * g * g),
                    c64 * (1.0 + 3.0 * a64 * g * g),
                );
                let (s, d) = (1.0 / (1.0 + (-v).exp()), dy[r * ffn + c].to() as f64);
                out_exact[r * ffn + c] = g * s * u;
                d_exact[r * 2 * ffn + c] =
                    f64::from(free) * d * u * s * (1.0 + g * slope * (1.0 - s));
                d_exact[(r * 2 + 1) * ffn + c] = f64::from(up_free) * d * g * s;
            }
        }
        assert_close("activation", &out, &out_exact, 4.0);
        assert_close("its gradient", &d, &d_exact, 8.0);
    }
}

/// In half precision the output would not be far from the end of the range.
#[test]
fn activations_are_kept_small_in_half_precision() {
    let gate_up: Vec<half::f16> = [300.0, 2.0, 300.0, 3.0].map(Element::from).to_vec();
    let out = in_every_order(|| {
        let mut out: Vec<half::f16> = unwritten(2);
        let curve = Activation::Silu.curve();
        launch!("activation_f16", [1, 1, 1], 256, 0; &gate_up, &mut out, 2i32, curve, 1.0f32 / 64.0);
        out
    });
    let small = 2.0 / (1.0 + (-2.0f64).exp()) * 3.0 / 64.0;
    assert_close("activation", &out, &[90_000.0 / 64.0, small], 1.0);
}

/// Rows `[q | k | v]` with something else between queries and keys.
fn spaced<T: Element>(rows: &[T], width: usize, queries: usize, skipped: usize) -> Vec<T> {
    let spaced = rows.chunks_exact(width).flat_map(|row| {
        let (q, kv) = row.split_at(queries);
        [q, &unwritten(skipped), kv].concat()
    });
    spaced.collect()
}

/// What the fused projection has after its queries, and what becomes of that, as kernels number it.
#[derive(Clone, Copy, PartialEq)]
enum Values {
    Given,
    Normed,
    Keys,
    None,
}

struct Rotation {
    dim: usize,
    biased: bool,
    normed: bool,
    cached: bool,
    turned: bool,
    norms_last: bool,
    grown: bool,
    gated: bool,
    values: Values,
}

/// Everything between the projection and attention, with and without biases, head norms and rotation, in either order, and gates.
fn rotation<T: Element>() {
    for (dim, biased, normed, cached, turned, norms_last, grown, gated) in [
        (64, true, true, true, true, false, false, false),
        (64, true, true, true, true, true, false, true),
        (6, false, false, true, true, false, true, true),
        (16, false, true, false, true, false, true, true),
        (6, false, true, false, true, true, true, false),
        (96, true, false, false, true, false, false, false),
        (64, false, false, true, false, false, false, false),
        (16, true, true, false, false, false, false, false),
        (512, true, true, true, true, false, false, false),
    ] {
        rotate::<T>(&Rotation {
            dim,
            biased,
            normed,
            cached,
            turned,
            norms_last,
            grown,
            gated,
            values: Values::Given,
        });
    }
}

/// Values that are normed, that are the keys, or that are not there.
fn values_of_their_own<T: Element>() {
    for values in [Values::Normed, Values::Keys, Values::None] {
        for (dim, biased, normed, cached, norms_last, grown, gated) in [
            (64, true, true, true, false, false, false),
            (6, true, true, false, true, true, true),
            (512, false, true, true, false, false, false),
            (16, false, false, false, false, false, false),
        ] {
            rotate::<T>(&Rotation {
                dim,
                biased,
                normed,
                cached: cached && values != Values::None,
                turned: true,
                norms_last,
                grown,
                gated,
                values,
            });
        }
    }
}

fn rotate<T: Element>(how: &Rotation) {
    let &Rotation { dim, values, .. } = how;
    let (query, kv, count) = match values {
        Values::Given => (3, 1, 5),
        _ => (4, 2, 5),
    };
    let width = (query + 2 * kv) * dim;
    // Heads of the projection.
    let heads = match values {
        Values::Given | Values::Normed => query + 2 * kv,
        Values::Keys => query + kv,
        Values::None => query,
    };
    let input: Vec<T> = noise(count * heads * dim, 1);
    let bias = how.biased.then(|| noise::<f32>(heads * dim, 2));
    let q_norm = how.normed.then(|| noise::<f32>(dim, 3));
    let k_norm = (how.normed && values != Values::None).then(|| noise::<f32>(dim, 4));
    let norms_width = if k_norm.is_some() { 2 * dim } else { dim };
    let positions = vec![0, 3, 1, 7, 3i32];
    let speed = if how.turned { 1.0 } else { 0.0 };
    let angle = |p: usize, i: usize| speed * p as f64 * 0.9f64.powi(i as i32 % 40);
    // Rows of their own for queries that grow.
    let growth = |head: usize, p: usize| match how.grown && head < query {
        true => 1.0 + 0.5 * p as f64,
        false => 1.0,
    };
    let table = |f: fn(f64) -> f64| -> Vec<f32> {
        let rows = [query, 0].map(|head| (0..8).map(move |p| (head, p)));
        rows.into_iter()
            .flatten()
            .flat_map(|(head, p)| {
                (0..dim / 2).map(move |i| (f(angle(p, i)) * growth(head, p)) as f32)
            })
            .collect()
    };
    let queries = if how.grown { 8i32 } else { 0 };
    let (cos, sin) = (table(f64::cos), table(f64::sin));
    let (cos, sin) = (how.turned.then_some(&cos), how.turned.then_some(&sin));
    let cache_rows = vec![4, -1, 0, 6, 2i32];
    let d_out: Vec<T> = noise(count * width, 5);
    let skipped = if how.gated { query * dim } else { 0 };
    let rows = spaced(&input, heads * dim, query * dim, skipped);
    // What is not to be written is to stay.
    let before: Vec<T> = match values {
        Values::None => noise(count * width, 6),
        _ => unwritten(count * width),
    };
    let each: usize = if dim % 8 == 0 { 8 } else { 2 };
    let lanes = dim.div_ceil(each).next_power_of_two().min(32);
    let grid = [(count * (query + 2 * kv) * lanes).div_ceil(256), 1, 1];
    let blocks = 2;
    let forward = |input: Arg, out: Arg, cache: Arg, cache_rows: Arg, skipped: usize| {
        let args = vec![
            input,
            out,
            bias.as_ref().into(),
            q_norm.as_ref().into(),
            k_norm.as_ref().into(),
            EPS.into(),
            cos.into(),
            sin.into(),
            queries.into(),
            i32::from(how.norms_last).into(),
            (values as i32).into(),
            (&positions).into(),
            cache,
            cache_rows,
            (count as i32).into(),
            (query as i32).into(),
            (kv as i32).into(),
            (dim as i32).into(),
            (skipped as i32).into(),
        ];
        crate::device::run(&format!("qkv_rope_{}", T::NAME), grid, 256, 0, args);
    };
    let (out, cache, d_in, d_norms) = in_every_order(|| {
        let (mut out, mut cache) = (before.clone(), vec![T::default(); 8 * 2 * kv * dim]);
        let cache_arg = match how.cached {
            true => Arg::from(&mut cache),
            false => Arg::from(Null),
        };
        forward(
            (&rows).into(),
            (&mut out).into(),
            cache_arg,
            (&cache_rows).into(),
            skipped,
        );
        if heads * dim == width {
            let mut in_place = input.clone();
            let shared = Arg::from(&mut in_place);
            forward(shared, shared, Null.into(), Null.into(), 0);
            assert_eq!(in_place, out);
        }
        let mut d = d_out.clone();
        let mut partial: Vec<f32> = unwritten(blocks * norms_width);
        launch!(format!("qkv_rope_backward_{}", T::NAME), [blocks, 1, 1], 256, if how.normed { 512 / lanes * dim * 4 } else { 0 };
            &rows, &mut d, bias.as_ref(), q_norm.as_ref(), k_norm.as_ref(), EPS, cos, sin, queries, i32::from(how.norms_last),
            values as i32, &positions, &mut partial, count as i32, query as i32, kv as i32, dim as i32, skipped as i32);
        let d_norms = how.normed.then(|| columns(&partial, norms_width));
        if values == Values::None {
            for (ours, before) in d.chunks_exact(width).zip(d_out.chunks_exact(width)) {
                assert_eq!(ours[heads * dim..], before[heads * dim..]);
            }
        }
        let d: Vec<T> = (d.chunks_exact(width))
            .flat_map(|row| &row[..heads * dim])
            .copied()
            .collect();
        (out, cache, d, d_norms)
    });
    let (mut exact, mut d_exact) = (wide(&before), vec![0.0; input.len()]);
    let mut d_norms_exact = vec![0.0; norms_width];
    for (r, &position) in positions.iter().enumerate() {
        let turn = |v: &[f64], head: usize, sign: f64| -> Vec<f64> {
            let half = dim / 2;
            let mut out = vec![0.0; dim];
            for i in 0..half {
                let growth = growth(head, position as usize);
                let (s, c) = angle(position as usize, i).sin_cos();
                let (s, c) = (s * growth, c * growth);
                out[i] = v[i] * c - v[i + half] * s * sign;
                out[i + half] = v[i + half] * c + v[i] * s * sign;
            }
            out
        };
        for head in 0..query + 2 * kv {
            let value = head >= query + kv;
            let source = match values {
                Values::Keys if value => head - kv,
                _ => head,
            };
            if source >= heads {
                continue; // it stays as it was
            }
            let (at, from) = (r * width + head * dim, (r * heads + source) * dim);
            let shift = |i: usize| (bias.as_ref()).map_or(0.0, |b| b[source * dim + i] as f64);
            let x: Vec<f64> = (0..dim)
                .map(|i| input[from + i].to() as f64 + shift(i))
                .collect();
            let d = wide(&d_out[at..][..dim]);
            let weight = if head < query { &q_norm } else { &k_norm };
            let (y, dx) = match weight {
                _ if value && values == Values::Given => (x, d),
                _ if value => {
                    let (y, dx, _) = norm(&x, &vec![1.0; dim], &d);
                    (y, dx)
                }
                None => (turn(&x, head, 1.0), turn(&d, head, -1.0)),
                Some(w) => {
                    let w = wide(w);
                    let (y, dx, dw) = if how.norms_last {
                        let (y, dx, dw) = norm(&turn(&x, head, 1.0), &w, &d);
                        (y, turn(&dx, head, -1.0), dw)
                    } else {
                        let (y, dx, dw) = norm(&x, &w, &turn(&d, head, -1.0));
                        (turn(&y, head, 1.0), dx, dw)
                    };
                    let to = if head < query { 0 } else { dim };
                    (0..dim).for_each(|i| d_norms_exact[to + i] += dw[i]);
                    (y, dx)
                }
            };
            exact[at..at + dim].copy_from_slice(&y);
            (0..dim).for_each(|i| d_exact[from + i] += dx[i]);
        }
    }
    assert_close("qkv", &out, &exact, 8.0);
    assert_close("d_qkv", &d_in, &d_exact, 8.0);
    if let Some(d_norms) = d_norms {
        assert_close("d_norms", &d_norms, &d_norms_exact, 40.0);
    }
    let kv_width = 2 * kv * dim;
    let mut expected = vec![T::default(); 8 * kv_width];
    for (r, &to) in (cache_rows.iter().enumerate()).filter(|(_, to)| how.cached && **to >= 0) {
        let tail = &out[r * width + query * dim..(r + 1) * width];
        expected[to as usize * kv_width..][..kv_width].copy_from_slice(tail);
    }
    assert_eq!(cache, expected);
}

crate::device::for_both!(
    embeddings,
    biases_and_sums_of_columns,
    norms,
    norms_of_what_is_added,
    norms_of_parts_of_rows,
    activations,
    rotation,
    values_of_their_own
);
