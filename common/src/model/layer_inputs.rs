//! Embeddings that layers have of their own (Gemma 3n and 4): each token has a vector for each layer, which the layer takes
//! in after its MLP.
//!
//! With e the model's own embedding of a token, its vectors are norm(e·Wᵀ) + √width · table[token]; a layer's residual
//! stream x gains norm((act(x·Gᵀ) ∘ vector)·Pᵀ). transformers also multiplies e·Wᵀ by 1/√hidden, and the sum by 1/√2: a norm
//! sees of a factor nothing but that its epsilon counts otherwise, so here the epsilons are larger in their place.

use super::backward::{Model, Pass, linear};
use super::decoder::{Decoder, LayerState, Linear};
use super::gradients::Gradients;
use super::params::{InputParams, InputTables, Matrix, Span};
use super::workspace::Buffers;
use crate::kernels::gemm::{Packed, Write};
use crate::kernels::{activation, add, copy, fit, norm, rows, scale};
use crate::weights::Config;
use anyhow::Result;

/// What makes the vectors.
pub(super) struct Inputs {
    table: Packed,
    projection: Linear,
    norm: Vec<f32>,
}

/// How a layer takes in its own.
pub(super) struct LayerInput {
    pub gate: Linear,
    pub projection: Linear,
    pub norm: Vec<f32>,
}

/// How e·Wᵀ is normed,
pub fn making_norm(c: &Config) -> norm::Kind {
    with_eps(c, c.norm_eps * c.hidden as f32)
}

/// and what a layer gains.
pub fn taking_norm(c: &Config) -> norm::Kind {
    with_eps(c, c.norm_eps * 2.0)
}

fn with_eps(c: &Config, eps: f32) -> norm::Kind {
    norm::Kind { eps, ..c.norm() }
}

impl Inputs {
    pub fn new(
        p: &InputTables,
        table: impl Fn(&Span) -> Result<Packed>,
        linear: impl Fn(&Matrix) -> Result<Linear>,
        vector: impl Fn(&Span) -> Result<Vec<f32>>,
    ) -> Result<Self> {
        Ok(Self {
            table: table(&p.table)?,
            projection: linear(&p.projection)?,
            norm: vector(&p.norm)?,
        })
    }

    /// Takes over changed parameters from their flat buffer.
    pub fn update(&mut self, flat: &[f32], p: &InputTables) {
        let (rows, cols) = (self.table.n(), self.table.k());
        self.table.set_rows(p.table.rows(flat, 0..rows, cols));
        self.projection.update(flat, &p.projection);
        self.norm.copy_from_slice(&flat[p.norm.range.clone()]);
    }

    /// Those of all layers, `[T, layers · width]`, of tokens with these embeddings, `[T, hidden]`.
    pub fn make(&self, c: &Config, tokens: &[u32], embedded: &[f32], out: &mut Vec<f32>) {
        let (all, width) = (self.table.k(), self.norm.len());
        fit(out, tokens.len() * all);
        self.projection.forward(embedded, out, Write::Set);
        let (eps, scale) = (making_norm(c).eps, (width as f32).sqrt());
        rows(out, all, |first, part| {
            let mut own = vec![0.0; all];
            for (row, &token) in part.chunks_exact_mut(all).zip(&tokens[first..]) {
                let layers = row.chunks_exact_mut(width);
                layers.for_each(|x| norm::row_in_place(x, &self.norm, eps));
                self.table.read_row(token as usize, &mut own);
                row.iter_mut()
                    .zip(&own)
                    .for_each(|(x, own)| *x += scale * own);
            }
        });
    }

    /// Adds the gradients of what made them, given theirs, `d`, which is lost; to `dx` what the embeddings gain.
    pub fn backward(
        (model, tokens): (Model, &[u32]),
        d: &mut [f32],
        dx: &mut [f32],
        gradients: &mut Gradients,
        b: &mut Buffers,
    ) {
        let (Some(inputs), Some(p)) = (&model.decoder.inputs, &model.params.inputs) else {
            return;
        };
        let Some(d_weight) = gradients.vector(&p.norm) else {
            return; // neither they nor the embedding are trained
        };
        let (c, width) = (&model.decoder.config, inputs.norm.len());
        let mut embedded = vec![];
        model.decoder.embed(tokens, &mut embedded);
        let mut made = vec![0.0; d.len()];
        inputs.projection.forward(&embedded, &mut made, Write::Set);
        let mut d_made = vec![0.0; d.len()];
        norm::backward(
            &made,
            &inputs.norm,
            making_norm(c),
            d,
            &mut d_made,
            d_weight,
        );
        scale(d, (width as f32).sqrt());
        gradients.table(&p.table, tokens, d);
        gradients.linear(&p.projection, &embedded, &d_made, &mut b.right);
        linear(&inputs.projection, &d_made, &mut b.d_inner, &mut b.right);
        add(&b.d_inner, dx);
    }
}

impl LayerInput {
    /// Layer `i` takes in its vectors among `inputs`: `next` gains it.
    pub fn forward(
        &self,
        (c, i): (&Config, usize),
        inputs: &[f32],
        state: &mut LayerState,
        next: &mut [f32],
    ) {
        let (tokens, width) = (next.len() / c.hidden, self.gate.weight.n());
        let LayerState {
            last,
            input_gates,
            given_input,
            ..
        } = state;
        copy(next, last);
        fit(input_gates, tokens * width);
        self.gate.forward(last, input_gates, Write::Set);
        fit(given_input, next.len());
        let inner = |r: usize, row: &mut [f32]| {
            let gate = &input_gates[r * width..][..width];
            let input = own(c, i, inputs, r, width);
            activation::forward_row(c.activation.curve(), gate, input, row);
        };
        self.projection.forward_made(inner, given_input, Write::Set);
        norm::forward_add(given_input, &self.norm, taking_norm(c), next);
    }
}

/// A token's vector for a layer.
fn own<'a>(c: &Config, layer: usize, inputs: &'a [f32], token: usize, width: usize) -> &'a [f32] {
    &inputs[(token * c.layers + layer) * width..][..width]
}

impl Pass<'_, '_> {
    /// next = last + norm(projection(act(gate(last)) ∘ vector)): turns the gradient of `next` into that of `last`, and
    /// writes the vectors' to their place in `d_inputs`.
    pub(super) fn input(
        &mut self,
        (layer, p): (&LayerInput, &InputParams),
        (state, inputs): (&LayerState, &[f32]),
        dx: &mut [f32],
        d_inputs: &mut [f32],
    ) {
        let c = &self.model.decoder.config;
        let mut d_given = std::mem::take(&mut self.b.d_given);
        let norm = Some((&layer.norm[..], &p.norm));
        let dy = self.given(norm, taking_norm(c), &state.given_input, dx, &mut d_given);
        let (width, i) = (layer.gate.weight.n(), self.layer);
        let b = &mut *self.b;
        let mut gate_up = std::mem::take(&mut b.d_raw);
        fit(&mut gate_up, 2 * state.input_gates.len());
        let gates = state.input_gates.chunks_exact(width);
        for (r, (row, gates)) in gate_up.chunks_exact_mut(2 * width).zip(gates).enumerate() {
            row[..width].copy_from_slice(gates);
            row[width..].copy_from_slice(own(c, i, inputs, r, width));
        }
        fit(&mut b.inner, state.input_gates.len());
        activation::forward(c.activation, &gate_up, width, &mut b.inner);
        self.gradients
            .linear(&p.projection, &b.inner, dy, &mut b.right);
        linear(&layer.projection, dy, &mut b.d_inner, &mut b.right);
        activation::backward(c.activation, &mut gate_up, width, &b.d_inner);
        let mut d_gates = std::mem::take(&mut b.d_gates);
        fit(&mut d_gates, state.input_gates.len());
        let d = gate_up.chunks_exact(2 * width);
        for (r, (d, d_gates)) in d.zip(d_gates.chunks_exact_mut(width)).enumerate() {
            d_gates.copy_from_slice(&d[..width]);
            let at = (r * c.layers + i) * width;
            d_inputs[at..][..width].copy_from_slice(&d[width..]);
        }
        b.d_raw = gate_up;
        b.d_given = d_given;
        let reader = (&layer.gate, &p.gate, &d_gates[..]);
        self.read(None, &[reader], &state.last, dx);
        self.b.d_gates = d_gates;
    }
}

impl Decoder {
    /// Words that the vectors, their gradients and what makes them take for each token of a pass.
    pub(super) fn input_words(c: &Config) -> usize {
        3 * c.layers * c.layer_inputs.unwrap_or(0)
    }
}
