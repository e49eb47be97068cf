//! The activation of a gated MLP: y = g·σ(v)·up, from the fused projection [gate | up], and the gate of gated attention,
//! y = σ(g)·x; forward and backward.

use super::isa::multiversion;
use super::softmax::exp;

/// What a gated MLP makes of gate g and up u: g·σ(v)·u, v = c·g·(1 + a·g²).
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// SiLU, g·σ(g).
    Silu,
    /// GELU by its approximation ½g·(1 + tanh u), u = √(2/π)·(g + 0.044715·g³), which is g·σ(2u).
    GeluTanh,
    /// g·σ(alpha·g)·(u + 1), g at most the limit and u within plus and minus it (gpt-oss).
    Clamped { alpha: f32, limit: f32 },
}

/// An [`Activation`] in numbers: those of v, what g and u are held within, and what u gains.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Curve {
    pub c: f32,
    pub a: f32,
    pub limit: f32,
    pub plus: f32,
}

impl Activation {
    /// The same in numbers.
    pub fn curve(self) -> Curve {
        let plain = Curve {
            c: 1.0,
            a: 0.0,
            limit: f32::INFINITY,
            plus: 0.0,
        };
        match self {
            Self::Silu => plain,
            Self::GeluTanh => Curve {
                c: 1.595_769_2,
                a: 0.044_715,
                ..plain
            },
            Self::Clamped { alpha, limit } => Curve {
                c: alpha,
                limit,
                plus: 1.0,
                ..plain
            },
        }
    }
}

impl Curve {
    /// g and u within the limit, which keeps what is no number.
    #[inline(always)]
    fn held(self, g: f32, u: f32) -> (f32, f32) {
        let low = |x: f32| if x > self.limit { self.limit } else { x };
        let u = low(u);
        (low(g), if u < -self.limit { -self.limit } else { u })
    }
}

/// `gate_up` is `[T, 2·ffn]`, `out` `[T, ffn]`.
pub fn forward(activation: Activation, gate_up: &[f32], ffn: usize, out: &mut [f32]) {
    super::rows(out, ffn, |first, out| {
        for (row, out) in gate_up[first * 2 * ffn..]
            .chunks_exact(2 * ffn)
            .zip(out.chunks_exact_mut(ffn))
        {
            forward_row(activation.curve(), &row[..ffn], &row[ffn..], out);
        }
    });
}

/// Replaces `gate_up` `[T, 2·ffn]` by its gradient, given that of the output, `dy` `[T, ffn]`.
pub fn backward(activation: Activation, gate_up: &mut [f32], ffn: usize, dy: &[f32]) {
    super::rows(gate_up, 2 * ffn, |first, gate_up| {
        for (row, dy) in gate_up
            .chunks_exact_mut(2 * ffn)
            .zip(dy[first * ffn..].chunks_exact(ffn))
        {
            let (gate, up) = row.split_at_mut(ffn);
            backward_row(activation.curve(), gate, up, dy);
        }
    });
}

multiversion! {
    pub fn forward_row(curve: Curve, gate: &[f32], up: &[f32], out: &mut [f32]) {
        let Curve { c, a, plus, .. } = curve;
        for ((out, &g), &u) in out.iter_mut().zip(gate).zip(up) {
            let (g, u) = curve.held(g, u);
            *out = g / (1.0 + exp::<FMA>(-c * g * (1.0 + a * g * g))) * (u + plus);
        }
    }
}

multiversion! {
    pub fn backward_row(curve: Curve, gate: &mut [f32], up: &mut [f32], dy: &[f32]) {
        let Curve { c, a, plus, .. } = curve;
        for ((gate, up), &dy) in gate.iter_mut().zip(up).zip(dy) {
            let (g, u) = curve.held(*gate, *up);
            let sigmoid = 1.0 / (1.0 + exp::<FMA>(-c * g * (1.0 + a * g * g)));
            let slope = c * (1.0 + 3.0 * a * g * g);
            let d_up = dy * g * sigmoid;
            let d_gate = dy * (u + plus) * sigmoid * (1.0 + g * slope * (1.0 - sigmoid));
            // What is held does not move with what it was.
            *up = if up.abs() > curve.limit { 0.0 } else { d_up };
            *gate = if *gate > curve.limit { 0.0 } else { d_gate };
        }
    }
}

multiversion! {
    /// y = σ(g)·x.
    pub fn gate_row(gate: &[f32], x: &[f32], out: &mut [f32]) {
        for ((out, &g), &x) in out.iter_mut().zip(gate).zip(x) {
            *out = x / (1.0 + exp::<FMA>(-g));
        }
    }
}

multiversion! {
    /// Turns the gradient of y = σ(g)·x into that of x, and writes that of g.
    pub fn gate_row_backward(gate: &[f32], x: &[f32], d: &mut [f32], d_gate: &mut [f32]) {
        for (((d, d_gate), &g), &x) in d.iter_mut().zip(d_gate).zip(gate).zip(x) {
            let sigmoid = 1.0 / (1.0 + exp::<FMA>(-g));
            *d_gate = *d * x * sigmoid * (1.0 - sigmoid);
            *d *= sigmoid;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{finite_difference, noise};

    const ALL: [Activation; 3] = [
        Activation::Silu,
        Activation::GeluTanh,
        Activation::Clamped {
            alpha: 1.702,
            limit: 0.68,
        },
    ];

    #[test]
    fn gradient_agrees_with_finite_differences() {
        let ffn = 19;
        let (x, dy) = (noise(2 * 2 * ffn, 1), noise(2 * ffn, 2));
        for activation in ALL {
            let mut dx = x.clone();
            backward(activation, &mut dx, ffn, &dy);
            finite_difference(&x, &dx, |x| {
                let mut y = vec![0.0; 2 * ffn];
                forward(activation, x, ffn, &mut y);
                y.iter().zip(&dy).map(|(y, d)| (y * d) as f64).sum()
            });
        }
    }

    #[test]
    fn gradients_of_gates_agree_with_differences() {
        let (g, x, dy) = (noise(19, 1), noise(19, 2), noise(19, 3));
        let loss = |g: &[f32], x: &[f32]| -> f64 {
            let mut y = [0.0; 19];
            gate_row(g, x, &mut y);
            y.iter().zip(&dy).map(|(y, d)| (y * d) as f64).sum()
        };
        let (mut dx, mut dg) = (dy.clone(), [0.0; 19]);
        gate_row_backward(&g, &x, &mut dx, &mut dg);
        finite_difference(&g, &dg, |g| loss(g, &x));
        finite_difference(&x, &dx, |x| loss(&g, x));
    }

    #[test]
    fn gates_are_what_their_names_say() {
        let gates = [-3.0f32, -0.7, 0.0, 0.4, 2.5];
        for activation in ALL {
            let mut out = [0.0; 5];
            forward_row(activation.curve(), &gates, &[1.0; 5], &mut out);
            for (out, g) in out.into_iter().zip(gates.map(f64::from)) {
                let inner = (2.0 / std::f64::consts::PI).sqrt() * (g + 0.044715 * g.powi(3));
                let held = g.min(0.68);
                let expected = match activation {
                    Activation::Silu => g / (1.0 + (-g).exp()),
                    Activation::GeluTanh => 0.5 * g * (1.0 + inner.tanh()),
                    Activation::Clamped { .. } => 1.68 * held / (1.0 + (-1.702 * held).exp()),
                };
                assert!(
                    (f64::from(out) - expected).abs() < 1e-6,
                    "{activation:?} {g}"
                );
            }
        }
    }

    #[test]
    fn large_gates_neither_overflow_nor_vanish() {
        for activation in &ALL[..2] {
            let mut out = vec![0.0; 3];
            forward(
                *activation,
                &[200.0, -200.0, 0.0, 1.0, 1.0, 1.0],
                3,
                &mut out,
            );
            assert_eq!(out, [200.0, 0.0, 0.0], "{activation:?}");
        }
    }
}
