//! What layers take in beside the residual stream.

use crate::device::{Element, assert_close, for_both, in_every_order, launch, noise, wide};
use common::kernels::activation::Curve;

const SHAPES: [(usize, usize, usize); 3] = [(1, 6, 10), (3, 1028, 2056), (5, 64, 96)];

/// GELU by tanh.
const CURVE: Curve = Curve {
    c: 1.595_769,
    a: 0.044_715,
    limit: f32::INFINITY,
    plus: 0.0,
};

/// Of a gate: what it passes, and the slope of that.
fn gelu(x: f64) -> (f64, f64) {
    let [c, a] = [CURVE.c, CURVE.a].map(f64::from);
    let s = 1.0 / (1.0 + (-c * x * (1.0 + a * x * x)).exp());
    (x * s, s + x * s * (1.0 - s) * c * (1.0 + 3.0 * a * x * x))
}

fn layer_input<T: Element>() {
    for (count, width, stride) in SHAPES {
        let (gates, inputs): (Vec<T>, Vec<f32>) =
            (noise(count * width, 1), noise(count * stride, 2));
        let (sizes, scale) = ([width as i32, stride as i32], 0.5f32);
        let out = in_every_order(|| {
            let mut out = gates.clone();
            launch!(format!("layer_input_{}", T::NAME), [count, 1, 1], 256, 0;
                &gates, &inputs, &mut out, sizes[0], sizes[1], CURVE, scale);
            out
        });
        let gates = wide(&gates);
        let exact: Vec<f64> = (0..count * width)
            .map(|i| gelu(gates[i]).0 * f64::from(inputs[i / width * stride + i % width]) * 0.5)
            .collect();
        assert_close("taken in", &out, &exact, 4.0);
    }
}

fn layer_input_backward<T: Element>() {
    for (count, width, stride) in SHAPES {
        let (gates, d): (Vec<T>, Vec<T>) = (noise(count * width, 1), noise(count * width, 3));
        let (inputs, before): (Vec<f32>, Vec<f32>) =
            (noise(count * stride, 2), noise(count * stride, 4));
        let (d_gates, inner, d_inputs) = in_every_order(|| {
            let (mut gates, mut inner, mut d_inputs) = (gates.clone(), d.clone(), before.clone());
            launch!(format!("layer_input_backward_{}", T::NAME), [count, 1, 1], 256, 0;
                &mut gates, &inputs, &mut inner, &mut d_inputs, width as i32, stride as i32, CURVE);
            (gates, inner, d_inputs)
        });
        let (gates, d) = (wide(&gates), wide(&d));
        let (mut d_gates_exact, mut inner_exact, mut d_inputs_exact) =
            (vec![], vec![], wide(&before));
        for i in 0..count * width {
            let at = i / width * stride + i % width;
            let (passed, slope) = gelu(gates[i]);
            d_gates_exact.push(d[i] * slope * f64::from(inputs[at]));
            inner_exact.push(passed * f64::from(inputs[at]));
            d_inputs_exact[at] = d[i] * passed;
        }
        assert_close("d_gates", &d_gates, &d_gates_exact, 8.0);
        assert_close("inner", &inner, &inner_exact, 4.0);
        assert_close("d_inputs", &d_inputs, &d_inputs_exact, 8.0);
    }
}

fn copied_columns<T: Element>() {
    for (count, width, stride) in SHAPES {
        let from: Vec<T> = noise(count * stride, 1);
        let before: Vec<T> = noise(count * (width + 4), 2);
        let to = in_every_order(|| {
            let mut to = before.clone();
            launch!(format!("copy_columns_{}", T::NAME), [count, 1, 1], 256, 0;
                &from, &mut to, width as i32, stride as i32, width as i32 + 4);
            to
        });
        let rows = from
            .chunks_exact(stride)
            .zip(before.chunks_exact(width + 4));
        let exact = rows.flat_map(|(row, before)| [&row[..width], &before[width..]].concat());
        assert_eq!(to, exact.collect::<Vec<_>>());
    }
}

/// Gathered of two layers, and given to that which lent.
fn lent_gradients<T: Element>() {
    for (count, width, stride) in SHAPES {
        let all: [Vec<T>; 3] = [1, 2, 3].map(|seed| noise(count * stride, seed));
        let (sum, given) = in_every_order(|| {
            let mut sum = vec![0.0f32; count * width];
            let mut all = all.clone();
            for (d, gather) in all.iter_mut().zip([1, 1, 0]) {
                launch!(format!("lent_gradient_{}", T::NAME), [count, 1, 1], 256, 0;
                    d, &mut sum, width as i32, stride as i32, gather);
            }
            (sum, all[2].clone())
        });
        let [first, second, mut exact] = all.map(|d| wide(&d));
        let sums: Vec<f64> = (0..count * width)
            .map(|i| i / width * stride + i % width)
            .map(|at| first[at] + second[at])
            .collect();
        assert_close("gathered", &sum, &sums, 4.0);
        for (i, sum) in sums.iter().enumerate() {
            exact[i / width * stride + i % width] += sum;
        }
        assert_close("given", &given, &exact, 4.0);
    }
}

for_both!(
    layer_input,
    layer_input_backward,
    copied_columns,
    lent_gradients,
);
