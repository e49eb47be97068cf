//! Gathers and scatters, norms, activations, rotation.

use crate::device::{
    Arg, Element, Null, assert_close, in_every_order, launch, noise, unwritten, wide,
};

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
                &x, rows.as_ref(), &w, EPS, &mut y, count as i32, width as i32);
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
                &x, rows.as_ref(), &w, EPS, &dy, &mut dx, &mut copy, &mut partial, count as i32, width as i32, 1i32);
            let mut dw = vec![0.0f32; width];
            launch!("sum_columns_f32", [width.div_ceil(32), 1, 1], 256, 0; &partial, &mut dw, blocks as i32, width as i32, 1i32);
            (dx, copy, dw)
        });
        let (mut y_exact, mut dx_exact, mut dw_exact) = (vec![], vec![], vec![0.0; width]);
        for r in 0..count {
            let from = rows.as_ref().map_or(r, |rows| rows[r] as usize);
            let (y, dx, dw) = norm(
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
            &x, rows.as_ref(), &w, EPS, &dy, &mut alone, Null, Null, count as i32, width as i32, 0i32);
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
    for (count, width) in [(1, 5), (67, 64), (5, 1030), (3, 5124)] {
        let teams = if width <= 1024 { 8 } else { 1 };
        let (given, w): (Vec<f32>, Vec<f32>) = (noise(count * width, 1), noise(width, 2));
        let (before, dy): (Vec<f32>, Vec<f32>) = (noise(count * width, 3), noise(count * width, 4));
        let blocks = count.min(4);
        let (stream, d_given, dw) = in_every_order(|| {
            let mut stream = before.clone();
            launch!("rms_norm_add", [count.div_ceil(teams), 1, 1], 256, 0;
                &given, &w, EPS, &mut stream, count as i32, width as i32);
            let (mut d, mut partial): (Vec<T>, Vec<f32>) =
                (unwritten(count * width), unwritten(blocks * width));
            launch!(format!("rms_norm_add_backward_{}", T::NAME), [blocks, 1, 1], 256, teams * width * 4;
                &given, &w, EPS, &dy, &mut d, &mut partial, count as i32, width as i32);
            (stream, d, columns(&partial, width))
        });
        let (mut stream_exact, mut d_exact, mut dw_exact) = (vec![], vec![], vec![0.0; width]);
        for r in 0..count {
            let row = r * width..(r + 1) * width;
            let (y, dx, dw) = norm(
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
    for (count, stride, first, width) in [
        (3, 30, 18, 6),
        (67, 96, 0, 64),
        (5, 1288, 8, 1024),
        (2, 5200, 24, 5124),
    ] {
        let teams = if width <= 1024 { 8 } else { 1 };
        let (x, dy): (Vec<T>, Vec<T>) = (noise(count * stride, 1), noise(count * stride, 2));
        let w: Vec<f32> = noise(width, 3);
        let sizes = [count as i32, width as i32, stride as i32];
        let blocks = count.min(4);
        // As in the tools, the vectors begin where the part does.
        let (y, d, dw) = in_every_order(|| {
            let (mut y, mut d, mut partial): (_, _, Vec<f32>) = (
                x[first..].to_vec(),
                dy[first..].to_vec(),
                unwritten(blocks * width),
            );
            launch!(format!("rms_norm_part_{}", T::NAME), [count.div_ceil(teams), 1, 1], 256, 0;
                &mut y, &w, EPS, sizes[0], sizes[1], sizes[2]);
            launch!(format!("rms_norm_part_backward_{}", T::NAME), [blocks, 1, 1], 256, teams * width * 4;
                &x[first..].to_vec(), &w, EPS, &mut d, &mut partial, sizes[0], sizes[1], sizes[2]);
            (y, d, columns(&partial, width))
        });
        let (mut y_exact, mut d_exact) = (wide(&x[first..]), wide(&dy[first..]));
        let mut dw_exact = vec![0.0; width];
        for r in 0..count {
            let part = r * stride..r * stride + width;
            let (y, dx, dw) = norm(&y_exact[part.clone()], &wide(&w), &d_exact[part.clone()]);
            y_exact[part.clone()].copy_from_slice(&y);
            d_exact[part].copy_from_slice(&dx);
            dw_exact.iter_mut().zip(dw).for_each(|(sum, d)| *sum += d);
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

/// SiLU and GELU by tanh, as the curve that their gate is multiplied with the sigmoid of.
fn activations<T: Element>() {
    let (silu, gelu) = ([1.0f32, 0.0], [1.595_769_2, 0.044_715]);
    for (count, ffn, curve) in [(1, 1, silu), (3, 1030, silu), (2, 40, gelu), (1, 33, gelu)] {
        let [c, a] = curve;
        let gate_up: Vec<T> = noise::<f32>(count * 2 * ffn, 1)
            .iter()
            .map(|x| T::from(x * 8.0))
            .collect();
        let dy: Vec<T> = noise(count * ffn, 2);
        let grid = [count, ffn.div_ceil(1024), 1];
        let (out, d, inner) = in_every_order(|| {
            let (mut out, mut d, mut inner): (Vec<T>, _, _) =
                (unwritten(count * ffn), gate_up.clone(), dy.clone());
            launch!(format!("activation_{}", T::NAME), grid, 256, 0; &gate_up, &mut out, ffn as i32, c, a, 1.0f32);
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
                    c.into(),
                    a.into(),
                ],
            );
            let mut again = gate_up.clone();
            launch!(format!("activation_backward_{}", T::NAME), grid, 256, 0; &mut again, &dy, Null, ffn as i32, c, a);
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
                let (c64, a64) = (f64::from(curve[0]), f64::from(curve[1]));
                let (v, slope) = (
                    c64 * g * (1.0 + a64 * g * g),
                    c64 * (1.0 + 3.0 * a64 * g * g),
                );
                let (s, d) = (1.0 / (1.0 + (-v).exp()), dy[r * ffn + c].to() as f64);
                out_exact[r * ffn + c] = g * s * u;
                d_exact[r * 2 * ffn + c] = d * u * s * (1.0 + g * slope * (1.0 - s));
                d_exact[(r * 2 + 1) * ffn + c] = d * g * s;
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
        launch!("activation_f16", [1, 1, 1], 256, 0; &gate_up, &mut out, 2i32, 1.0f32, 0.0f32, 1.0f32 / 64.0);
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
    ] {
        let (query, kv, count) = (3, 1, 5);
        let width = (query + 2 * kv) * dim;
        let input: Vec<T> = noise(count * width, 1);
        let bias = biased.then(|| noise::<f32>(width, 2));
        let norms = normed.then(|| (noise::<f32>(dim, 3), noise::<f32>(dim, 4)));
        let positions = vec![0, 3, 1, 7, 3i32];
        let speed = if turned { 1.0 } else { 0.0 };
        let angle = |p: usize, i: usize| speed * p as f64 * 0.9f64.powi(i as i32 % 40);
        // Rows of their own for queries that grow.
        let growth = |head: usize, p: usize| match grown && head < query {
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
        let queries = if grown { 8i32 } else { 0 };
        let (cos, sin) = (table(f64::cos), table(f64::sin));
        let (cos, sin) = (turned.then_some(&cos), turned.then_some(&sin));
        let cache_rows = vec![4, -1, 0, 6, 2i32];
        let d_out: Vec<T> = noise(count * width, 5);
        let skipped = if gated { query * dim } else { 0 };
        let rows = spaced(&input, width, query * dim, skipped);
        let sizes = [query as i32, kv as i32, dim as i32];
        let (q_norm, k_norm) = (norms.as_ref().map(|n| &n.0), norms.as_ref().map(|n| &n.1));
        let each: usize = if dim % 8 == 0 { 8 } else { 2 };
        let lanes = dim.div_ceil(each).next_power_of_two().min(32);
        let grid = [(count * (query + 2 * kv) * lanes).div_ceil(256), 1, 1];
        let blocks = 2;
        let (out, cache, d_in, d_norms) = in_every_order(|| {
            let (mut out, mut cache): (Vec<T>, Vec<T>) = (
                unwritten(count * width),
                vec![T::default(); 8 * 2 * kv * dim],
            );
            let cache_arg = if cached {
                Arg::from(&mut cache)
            } else {
                Arg::from(Null)
            };
            crate::device::run(
                &format!("qkv_rope_{}", T::NAME),
                grid,
                256,
                0,
                vec![
                    (&rows).into(),
                    (&mut out).into(),
                    bias.as_ref().into(),
                    q_norm.into(),
                    k_norm.into(),
                    EPS.into(),
                    cos.into(),
                    sin.into(),
                    queries.into(),
                    i32::from(norms_last).into(),
                    (&positions).into(),
                    cache_arg,
                    (&cache_rows).into(),
                    (count as i32).into(),
                    sizes[0].into(),
                    sizes[1].into(),
                    sizes[2].into(),
                    (skipped as i32).into(),
                ],
            );
            let mut in_place = input.clone();
            let shared = Arg::from(&mut in_place);
            crate::device::run(
                &format!("qkv_rope_{}", T::NAME),
                grid,
                256,
                0,
                vec![
                    shared,
                    shared,
                    bias.as_ref().into(),
                    q_norm.into(),
                    k_norm.into(),
                    EPS.into(),
                    cos.into(),
                    sin.into(),
                    queries.into(),
                    i32::from(norms_last).into(),
                    (&positions).into(),
                    Null.into(),
                    Null.into(),
                    (count as i32).into(),
                    sizes[0].into(),
                    sizes[1].into(),
                    sizes[2].into(),
                    0i32.into(),
                ],
            );
            assert_eq!(in_place, out);
            let mut d = d_out.clone();
            let mut partial: Vec<f32> = unwritten(blocks * 2 * dim);
            launch!(format!("qkv_rope_backward_{}", T::NAME), [blocks, 1, 1], 256, if normed { 512 / lanes * dim * 4 } else { 0 };
                &rows, &mut d, bias.as_ref(), q_norm, k_norm, EPS, cos, sin, queries, i32::from(norms_last), &positions, &mut partial,
                count as i32, sizes[0], sizes[1], sizes[2], skipped as i32);
            let mut d_norms = vec![0.0f32; 2 * dim];
            if normed {
                launch!("sum_columns_f32", [(2 * dim).div_ceil(32), 1, 1], 256, 0; &partial, &mut d_norms, blocks as i32, 2 * dim as i32, 1i32);
            }
            (out, cache, d, d_norms)
        });
        let (mut exact, mut d_exact, mut d_norms_exact) = (vec![], vec![], vec![0.0; 2 * dim]);
        for (r, &position) in positions.iter().enumerate() {
            for head in 0..query + 2 * kv {
                let at = r * width + head * dim;
                let shift = |i: usize| bias.as_ref().map_or(0.0, |b| b[head * dim + i] as f64);
                let x: Vec<f64> = (0..dim)
                    .map(|i| input[at + i].to() as f64 + shift(i))
                    .collect();
                let d = wide(&d_out[at..][..dim]);
                if head >= query + kv {
                    exact.extend(x);
                    d_exact.extend(d);
                    continue;
                }
                let turn = |v: &[f64], sign: f64| -> Vec<f64> {
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
                let Some((q, k)) = &norms else {
                    exact.extend(turn(&x, 1.0));
                    d_exact.extend(turn(&d, -1.0));
                    continue;
                };
                let (w, to) = if head < query { (q, 0) } else { (k, dim) };
                let w = wide(w);
                let (out, d_in, dw) = if norms_last {
                    let (y, dx, dw) = norm(&turn(&x, 1.0), &w, &d);
                    (y, turn(&dx, -1.0), dw)
                } else {
                    let (y, dx, dw) = norm(&x, &w, &turn(&d, -1.0));
                    (turn(&y, 1.0), dx, dw)
                };
                exact.extend(out);
                d_exact.extend(d_in);
                (0..dim).for_each(|i| d_norms_exact[to + i] += dw[i]);
            }
        }
        assert_close("qkv", &out, &exact, 8.0);
        assert_close("d_qkv", &d_in, &d_exact, 8.0);
        if normed {
            assert_close("d_norms", &d_norms, &d_norms_exact, 40.0);
        }
        let kv_width = 2 * kv * dim;
        let mut expected = vec![T::default(); 8 * kv_width];
        for (r, &to) in cache_rows
            .iter()
            .enumerate()
            .filter(|(_, to)| cached && **to >= 0)
        {
            let tail = &out[r * width + query * dim..(r + 1) * width];
            expected[to as usize * kv_width..][..kv_width].copy_from_slice(tail);
        }
        assert_eq!(cache, expected);
    }
}

crate::device::for_both!(
    embeddings,
    biases_and_sums_of_columns,
    norms,
    norms_of_what_is_added,
    norms_of_parts_of_rows,
    activations,
    rotation
);
