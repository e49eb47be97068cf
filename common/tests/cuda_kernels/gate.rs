//! Gated attention. (Linear attention's gates are tested with it.)

use crate::device::{Element, assert_close, for_both, in_every_order, launch, noise, wide};

fn gates<T: Element>() {
    for (count, width, rest) in [(1, 6, 4), (3, 1028, 8), (5, 64, 96)] {
        let stride = 2 * width + rest;
        let raw: Vec<T> = noise(count * stride, 1);
        // As in the tools, the vector begins where the gates do.
        let gates = raw[width..].to_vec();
        let (x, dy): (Vec<T>, Vec<T>) = (noise(count * width, 2), noise(count * width, 3));
        let grid = [count, width.div_ceil(1024), 1];
        let (out, d, d_gates) = in_every_order(|| {
            let (mut out, mut d, mut d_gates) = (x.clone(), dy.clone(), gates.clone());
            let sizes = [width as i32, stride as i32];
            launch!(format!("gate_{}", T::NAME), grid, 256, 0; &x, &gates, &mut out, sizes[0], sizes[1]);
            launch!(format!("gate_backward_{}", T::NAME), grid, 256, 0;
                &x, &gates, &mut d, &mut d_gates, sizes[0], sizes[1]);
            (out, d, d_gates)
        });
        let (mut out_exact, mut d_exact, mut d_gates_exact) = (wide(&x), wide(&dy), wide(&gates));
        for r in 0..count {
            for c in 0..width {
                let (i, at) = (r * width + c, r * stride + c);
                let s = 1.0 / (1.0 + (-d_gates_exact[at]).exp());
                d_gates_exact[at] = d_exact[i] * out_exact[i] * s * (1.0 - s);
                out_exact[i] *= s;
                d_exact[i] *= s;
            }
        }
        assert_close("gated", &out, &out_exact, 4.0);
        assert_close("d", &d, &d_exact, 4.0);
        assert_close("d_gates", &d_gates, &d_gates_exact, 8.0);
    }
}

/// Gradients of queries, keys and values around those of gates.
fn spread<T: Element>() {
    for (count, queries, width) in [(1, 6, 14), (3, 512, 1100), (2, 8, 12)] {
        let d_qkv: Vec<T> = noise(count * width, 1);
        let before: Vec<T> = noise(count * (width + queries), 2);
        let d_raw = in_every_order(|| {
            let mut d_raw = before.clone();
            launch!(format!("spread_qkv_{}", T::NAME), [count, width.div_ceil(1024), 1], 256, 0;
                &d_qkv, &mut d_raw, queries as i32, width as i32, queries as i32);
            d_raw
        });
        let rows = d_qkv
            .chunks_exact(width)
            .zip(before.chunks_exact(width + queries));
        let expected = rows.flat_map(|(row, before)| {
            [
                &row[..queries],
                &before[queries..2 * queries],
                &row[queries..],
            ]
            .concat()
        });
        assert_eq!(d_raw, expected.collect::<Vec<_>>());
    }
}

for_both!(gates, spread);
