//! The backward pass, layer by layer from the last, with each layer's state kept or made again from its input.

use super::decoder::{Decoder, LayerState, Linear};
use super::gradients::Gradients;
use super::params::Params;
use super::workspace::{Buffers, Kept, Workspace};
use crate::kernels::attention::{self, Layout};
use crate::kernels::gemm::{Left, Mat, Packed, Threads, Write, matmul};
use crate::kernels::rope::Rotary;
use crate::kernels::{activation, fit, norm, rows};

/// A model as its backward pass reads it. The transposed products turn the packed weights each time: that costs a few
/// percent of a pass over some hundred tokens, and saves a second copy of the model.
#[derive(Clone, Copy)]
pub struct Model<'a> {
    /// The forward pass.
    pub decoder: &'a Decoder,
    /// Where the parameters lie.
    pub params: &'a Params,
}

/// For y = x·Wᵀ + b: sets `dx` `[T, in]` to dy·W. `right` is storage for W turned.
fn linear(layer: &Linear, dy: &[f32], dx: &mut Vec<f32>, right: &mut Packed) {
    let (rows, cols) = (layer.weight.n(), layer.weight.k());
    right.set_transposed(&layer.weight, 0..rows);
    let tokens = dy.len() / rows;
    fit(dx, tokens * cols);
    let dy = Left::Rows(Mat::new(dy, tokens, rows));
    matmul(dy, right.panels(), dx, cols, Write::Set, Threads::All);
}

/// Carries `dx` `[T, hidden]`, the gradient of the residual stream after the last layer, back to the embedding, adding
/// every parameter's gradient on the way.
///
/// `layers` holds what is kept of each layer of the forward pass over the same batch; it goes back to `workspace`.
pub fn backward(
    model: Model,
    layout: &Layout,
    tokens: &[u32],
    mut layers: Vec<Kept>,
    mut dx: Vec<f32>,
    gradients: &mut Gradients,
    workspace: &mut Workspace,
) {
    let decoder = model.decoder;
    assert_eq!(layers.len(), decoder.layers.len());
    let rotary = decoder.rotary(layout.longest());
    let mut again = LayerState::default();
    while let Some(mut kept) = layers.pop() {
        let i = layers.len();
        let buffers = &mut workspace.buffers;
        let state = match &mut kept {
            Kept::State(state) => state,
            Kept::Input(x) => {
                std::mem::swap(&mut again.x, x);
                decoder.run_layer(i, layout, &rotary, &mut again, &mut buffers.inner);
                &mut again
            }
        };
        let pass = Pass {
            model,
            layout,
            rotary: &rotary,
            layer: i,
        };
        pass.mlp(state, &mut dx, buffers, gradients);
        pass.attention(state, &mut dx, buffers, gradients);
        workspace.give_back(kept);
    }
    gradients.embedding(tokens, &dx);
}

struct Pass<'a> {
    model: Model<'a>,
    layout: &'a Layout,
    rotary: &'a Rotary,
    layer: usize,
}

impl Pass<'_> {
    /// next = middle + down(swiglu(gate_up(norm(middle)))): turns the gradient of `next` into that of `middle`.
    /// The state's `gate_up` becomes its gradient.
    fn mlp(
        &self,
        state: &mut LayerState,
        dx: &mut [f32],
        b: &mut Buffers,
        gradients: &mut Gradients,
    ) {
        let (layer, p) = (
            &self.model.decoder.layers[self.layer],
            &self.model.params.layers[self.layer],
        );
        self.model.decoder.mlp_inner(&state.gate_up, &mut b.inner);
        gradients.linear(&p.down, &b.inner, dx, &mut b.right);
        linear(&layer.down, dx, &mut b.d_inner, &mut b.right);
        let d_gate_up = &mut state.gate_up;
        activation::swiglu_backward(d_gate_up, self.model.decoder.config.ffn, &b.d_inner);
        self.model
            .decoder
            .mlp_input(self.layer, &state.middle, &mut b.inner);
        gradients.linear(&p.gate_up, &b.inner, d_gate_up, &mut b.right);
        linear(&layer.gate_up, d_gate_up, &mut b.d_inner, &mut b.right);
        let eps = self.model.decoder.config.norm_eps;
        let d_weight = gradients
            .vector(&p.mlp_norm)
            .unwrap_or_else(|| spare(&mut b.unused, layer.mlp_norm.len()));
        norm::backward(
            &state.middle,
            &layer.mlp_norm,
            eps,
            &b.d_inner,
            dx,
            d_weight,
        );
    }

    /// middle = x + output(attention(rotate(qkv(norm(x))))): turns the gradient of `middle` into that of `x`.
    fn attention(
        &self,
        state: &LayerState,
        dx: &mut [f32],
        b: &mut Buffers,
        gradients: &mut Gradients,
    ) {
        let (layer, p) = (
            &self.model.decoder.layers[self.layer],
            &self.model.params.layers[self.layer],
        );
        let eps = self.model.decoder.config.norm_eps;
        gradients.linear(&p.output, &state.attention, dx, &mut b.right);
        linear(&layer.output, dx, &mut b.d_inner, &mut b.right);
        fit(&mut b.d_wide, state.qkv.len());
        rows(&mut b.d_wide, 1, |_, part| part.fill(0.0)); // attention adds to it
        attention::backward(
            self.layout,
            layer.heads,
            self.model.decoder.precision,
            (&state.qkv, &state.attention, &state.lse),
            &b.d_inner,
            &mut b.d_wide,
        );
        self.rotate_back(&mut b.d_wide);
        self.head_norms(state, b, gradients);
        fit(&mut b.inner, state.x.len());
        norm::forward(&state.x, &layer.input_norm, eps, &mut b.inner);
        gradients.linear(&p.qkv, &b.inner, &b.d_wide, &mut b.right);
        linear(&layer.qkv, &b.d_wide, &mut b.d_inner, &mut b.right);
        let d_weight = gradients
            .vector(&p.input_norm)
            .unwrap_or_else(|| spare(&mut b.unused, layer.input_norm.len()));
        norm::backward(&state.x, &layer.input_norm, eps, &b.d_inner, dx, d_weight);
    }

    fn rotate_back(&self, d_qkv: &mut [f32]) {
        if !self.model.decoder.config.rotates[self.layer] {
            return;
        }
        let heads = self.model.decoder.layers[self.layer].heads;
        let positions: Vec<usize> = self.layout.positions().collect();
        rows(d_qkv, heads.qkv_width(), |first, part| {
            for (row, &position) in part
                .chunks_exact_mut(heads.qkv_width())
                .zip(&positions[first..])
            {
                for head in row[..heads.q_width() + heads.kv_width()].chunks_exact_mut(heads.dim) {
                    self.rotary.rotate_back(head, position);
                }
            }
        });
    }

    /// Carries the gradient through the norms of query and key heads, where the family has them.
    fn head_norms(&self, state: &LayerState, b: &mut Buffers, gradients: &mut Gradients) {
        let (layer, p) = (
            &self.model.decoder.layers[self.layer],
            &self.model.params.layers[self.layer],
        );
        let (Some((q, k)), Some((q_span, k_span))) = (&layer.head_norms, &p.head_norms) else {
            return;
        };
        let (heads, eps) = (layer.heads, self.model.decoder.config.norm_eps);
        let width = heads.qkv_width();
        for (weight, span, columns) in [
            (q, q_span, 0..heads.q_width()),
            (
                k,
                k_span,
                heads.q_width()..heads.q_width() + heads.kv_width(),
            ),
        ] {
            let d_weight = gradients
                .vector(span)
                .unwrap_or_else(|| spare(&mut b.unused, weight.len()));
            for (raw, d_row) in state
                .qkv_raw
                .chunks_exact(width)
                .zip(b.d_wide.chunks_exact_mut(width))
            {
                let raw = raw[columns.clone()].chunks_exact(heads.dim);
                for (raw, d) in raw.zip(d_row[columns.clone()].chunks_exact_mut(heads.dim)) {
                    let dy = d.to_vec();
                    d.fill(0.0);
                    norm::backward_row(raw, weight, eps, &dy, d, d_weight);
                }
            }
        }
    }
}

/// A place for gradients that nobody wants.
fn spare(unused: &mut Vec<f32>, len: usize) -> &mut [f32] {
    unused.resize(len, 0.0);
    unused
}
