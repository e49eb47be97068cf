//! SwiGLU: y = silu(gate)·up, from the fused projection [gate | up]; forward and backward.

use super::isa::multiversion;
use super::softmax::exp;

/// `gate_up` is `[T, 2·ffn]`, `out` `[T, ffn]`.
pub fn swiglu(gate_up: &[f32], ffn: usize, out: &mut [f32]) {
    super::rows(out, ffn, |first, out| {
        for (row, out) in gate_up[first * 2 * ffn..]
            .chunks_exact(2 * ffn)
            .zip(out.chunks_exact_mut(ffn))
        {
            forward_row(&row[..ffn], &row[ffn..], out);
        }
    });
}

/// Replaces `gate_up` `[T, 2·ffn]` by its gradient, given that of the output, `dy` `[T, ffn]`.
pub fn swiglu_backward(gate_up: &mut [f32], ffn: usize, dy: &[f32]) {
    super::rows(gate_up, 2 * ffn, |first, gate_up| {
        for (row, dy) in gate_up
            .chunks_exact_mut(2 * ffn)
            .zip(dy[first * ffn..].chunks_exact(ffn))
        {
            let (gate, up) = row.split_at_mut(ffn);
            backward_row(gate, up, dy);
        }
    });
}

multiversion! {
    pub fn forward_row(gate: &[f32], up: &[f32], out: &mut [f32]) {
        for ((out, &g), &u) in out.iter_mut().zip(gate).zip(up) {
            *out = g / (1.0 + exp::<FMA>(-g)) * u;
        }
    }
}

multiversion! {
    pub fn backward_row(gate: &mut [f32], up: &mut [f32], dy: &[f32]) {
        for ((gate, up), &dy) in gate.iter_mut().zip(up).zip(dy) {
            let (g, u) = (*gate, *up);
            let sigmoid = 1.0 / (1.0 + exp::<FMA>(-g));
            *up = dy * g * sigmoid;
            *gate = dy * u * sigmoid * (1.0 + g * (1.0 - sigmoid));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{finite_difference, noise};

    #[test]
    fn gradient_agrees_with_finite_differences() {
        let ffn = 19;
        let (x, dy) = (noise(2 * 2 * ffn, 1), noise(2 * ffn, 2));
        let mut dx = x.clone();
        swiglu_backward(&mut dx, ffn, &dy);
        finite_difference(&x, &dx, |x| {
            let mut y = vec![0.0; 2 * ffn];
            swiglu(x, ffn, &mut y);
            y.iter().zip(&dy).map(|(y, d)| (y * d) as f64).sum()
        });
    }

    #[test]
    fn large_gates_neither_overflow_nor_vanish() {
        let mut out = vec![0.0; 3];
        swiglu(&[200.0, -200.0, 0.0, 1.0, 1.0, 1.0], 3, &mut out);
        assert_eq!(out, [200.0, 0.0, 0.0]);
    }
}
