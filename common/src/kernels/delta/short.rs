//! What the rule reads: queries, keys and values by a short causal convolution of each channel and SiLU, queries and keys
//! made of length 1, and its two gates; forward and backward, a token at a time.

use super::{Shape, Weights};
use crate::kernels::isa::multiversion;
use crate::kernels::softmax::{dot, exp};
use crate::kernels::taps::convolve;

/// Beside the sum of squares of a query or key under the root.
const EPS: f32 = 1e-6;

/// 1 / √(Σ x² + ε).
fn inverse_length(x: &[f32]) -> f32 {
    1.0 / (dot(x, x) + EPS).sqrt()
}

/// Fills a token's row of `[q | k | v]`: `seen` are the rows of the projection that its convolution sees.
pub(super) fn forward<'t>(
    shape: Shape,
    weights: &Weights,
    seen: impl Iterator<Item = Option<&'t [f32]>>,
    qkv: &mut [f32],
) {
    convolve(weights.conv, seen, qkv);
    silu(qkv);
    for (number, head) in shape.unit_heads(qkv).enumerate() {
        let scale = inverse_length(head) * shape.scale(number);
        head.iter_mut().for_each(|x| *x *= scale);
    }
}

multiversion! {
    /// x ← x·σ(x).
    pub fn silu(x: &mut [f32]) {
        for x in x {
            *x /= 1.0 + exp::<FMA>(-*x);
        }
    }
}

multiversion! {
    /// Turns the gradient of y = x·σ(x) into that of x.
    pub fn silu_backward(x: &[f32], d: &mut [f32]) {
        for (d, &x) in d.iter_mut().zip(x) {
            let sigmoid = 1.0 / (1.0 + exp::<FMA>(-x));
            *d *= sigmoid * (1.0 + x * (1.0 - sigmoid));
        }
    }
}

/// Turns the gradient of a token's row of `[q | k | v]` into that of its convolution. `room` is as long as two such rows.
pub(super) fn backward<'t>(
    shape: Shape,
    weights: &Weights,
    seen: impl Iterator<Item = Option<&'t [f32]>>,
    d_qkv: &mut [f32],
    room: &mut [f32],
) {
    let (convolved, active) = room.split_at_mut(d_qkv.len());
    convolve(weights.conv, seen, convolved);
    active.copy_from_slice(convolved);
    silu(active);
    let heads = shape.unit_heads(active).zip(shape.unit_heads(d_qkv));
    for (number, (x, d)) in heads.enumerate() {
        // Of y = x·s: dx = s·(dy − y·(y·dy)), which ε does not change.
        let length = inverse_length(x);
        let along = dot(x, d) * length * length;
        let scale = length * shape.scale(number);
        for (d, x) in d.iter_mut().zip(x) {
            *d = scale * (*d - *x * along);
        }
    }
    silu_backward(convolved, d_qkv);
}

/// ln(1 + eˣ).
fn softplus(x: f32) -> f32 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// Fills a token's decays a = exp(−exp(A)·softplus(x + b)) and rates β = σ(y), given its row of the projection.
pub(super) fn gates(shape: Shape, weights: &Weights, raw: &[f32], gates: &mut [f32]) {
    let (rates, decays) = shape.gate_inputs(raw);
    for head in 0..shape.value_heads {
        let speed = weights.a_log[head].exp();
        gates[head] = (-speed * softplus(decays[head] + weights.dt_bias[head])).exp();
        gates[shape.value_heads + head] = sigmoid(rates[head]);
    }
}

/// Given the gradients of ln a and β, `d_gates`, writes those of their inputs into the token's row `d_raw`, and adds those of A
/// and b to `d_a_log` and `d_dt_bias`.
pub(super) fn gates_backward(
    shape: Shape,
    weights: &Weights,
    (raw, d_gates): (&[f32], &[f32]),
    d_raw: &mut [f32],
    d_a_log: &mut [f32],
    d_dt_bias: &mut [f32],
) {
    let (rates, decays) = shape.gate_inputs(raw);
    let (d_log, d_rate) = d_gates.split_at(shape.value_heads);
    let at = d_raw.len() - 2 * shape.value_heads;
    for head in 0..shape.value_heads {
        let speed = weights.a_log[head].exp();
        let x = decays[head] + weights.dt_bias[head];
        let d_x = -speed * d_log[head] * sigmoid(x);
        let rate = sigmoid(rates[head]);
        d_raw[at + head] = d_rate[head] * rate * (1.0 - rate);
        d_raw[at + shape.value_heads + head] = d_x;
        d_dt_bias[head] += d_x;
        d_a_log[head] -= speed * d_log[head] * softplus(x);
    }
}
