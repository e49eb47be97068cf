//! The backward pass, layer by layer from the last, with each layer's state kept or made again from its input.

use super::decoder::{Decoder, Layer, LayerState, Linear};
use super::gradients::Gradients;
use super::params::{LayerParams, Matrix, Params, Span};
use super::rotations::Rotations;
use super::workspace::{Buffers, Kept, Workspace};
use crate::kernels::attention::{self, Layout};
use crate::kernels::gemm::{Left, Mat, Packed, Threads, Write, matmul};
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
    let rotations = decoder.rotations(layout.longest());
    let mut again = LayerState::default();
    while let Some(mut kept) = layers.pop() {
        let i = layers.len();
        let buffers = &mut workspace.buffers;
        let state = match &mut kept {
            Kept::State(state) => state,
            Kept::Input(x) => {
                std::mem::swap(&mut again.x, x);
                decoder.run_layer(i, layout, &rotations, &mut again, &mut buffers.inner);
                &mut again
            }
        };
        let pass = Pass {
            model,
            layout,
            rotations: &rotations,
            layer: i,
        };
        pass.mlp(state, &mut dx, buffers, gradients);
        pass.attention(state, &mut dx, buffers, gradients);
        workspace.give_back(kept);
    }
    if decoder.config.embed_scale != 1.0 {
        let scale = decoder.config.embed_scale;
        rows(&mut dx, 1, |_, dx| dx.iter_mut().for_each(|x| *x *= scale));
    }
    gradients.embedding(tokens, &dx);
}

struct Pass<'a> {
    model: Model<'a>,
    layout: &'a Layout,
    rotations: &'a Rotations,
    layer: usize,
}

impl Pass<'_> {
    /// next = middle + norm(down(act(gate_up(norm(middle))))): turns the gradient of `next` into that of `middle`.
    /// The state's `gate_up` becomes its gradient.
    fn mlp(
        &self,
        state: &mut LayerState,
        dx: &mut [f32],
        b: &mut Buffers,
        gradients: &mut Gradients,
    ) {
        let decoder = self.model.decoder;
        let (layer, p) = self.layer();
        let mut d_given = std::mem::take(&mut b.d_given);
        let norm = (&layer.norms.after_mlp, &p.norms.after_mlp);
        let dy = self.given(norm, &state.down, dx, &mut d_given, b, gradients);
        decoder.mlp_inner(&state.gate_up, &mut b.inner);
        gradients.linear(&p.down, &b.inner, dy, &mut b.right);
        linear(&layer.down, dy, &mut b.d_inner, &mut b.right);
        b.d_given = d_given;
        let d_gate_up = &mut state.gate_up;
        let (activation, ffn) = (decoder.config.activation, decoder.config.ffn);
        activation::backward(activation, d_gate_up, ffn, &b.d_inner);
        let norm = (&layer.norms.before_mlp, &p.norms.before_mlp);
        let map = (&layer.gate_up, &p.gate_up);
        self.read(norm, map, &state.middle, d_gate_up, dx, b, gradients);
    }

    /// middle = x + norm(output(attention(rotate(qkv(norm(x)))))): turns the gradient of `middle` into that of `x`.
    fn attention(
        &self,
        state: &LayerState,
        dx: &mut [f32],
        b: &mut Buffers,
        gradients: &mut Gradients,
    ) {
        let (layer, p) = self.layer();
        let mut d_given = std::mem::take(&mut b.d_given);
        let norm = (&layer.norms.after_attention, &p.norms.after_attention);
        let dy = self.given(norm, &state.output, dx, &mut d_given, b, gradients);
        gradients.linear(&p.output, &state.attention, dy, &mut b.right);
        linear(&layer.output, dy, &mut b.d_inner, &mut b.right);
        b.d_given = d_given;
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
        self.qk_norms(state, b, gradients);
        let d_qkv = std::mem::take(&mut b.d_wide);
        let norm = (&layer.norms.before_attention, &p.norms.before_attention);
        let map = (&layer.qkv, &p.qkv);
        self.read(norm, map, &state.x, &d_qkv, dx, b, gradients);
        b.d_wide = d_qkv;
    }

    fn layer(&self) -> (&Layer, &LayerParams) {
        let Model { decoder, params } = self.model;
        (&decoder.layers[self.layer], &params.layers[self.layer])
    }

    /// The gradient of what a sublayer gave, given that of the residual stream, which gained it: the same, or, where there
    /// is a norm after it, through that, in `d_given`.
    fn given<'a>(
        &self,
        (weight, span): (&Option<Vec<f32>>, &Option<Span>),
        given: &[f32],
        dx: &'a [f32],
        d_given: &'a mut Vec<f32>,
        b: &mut Buffers,
        gradients: &mut Gradients,
    ) -> &'a [f32] {
        let (Some(weight), Some(span)) = (weight, span) else {
            return dx;
        };
        fit(d_given, dx.len());
        rows(d_given, 1, |_, part| part.fill(0.0));
        let d_weight = gradients
            .vector(span)
            .unwrap_or_else(|| spare(&mut b.unused, weight.len()));
        let eps = self.model.decoder.config.norm_eps;
        norm::backward(given, weight, eps, dx, d_given, d_weight);
        d_given
    }

    /// y = map(norm(x)), the norm where there is one: adds the gradients of both, and to `dx` what `x` gains, given `dy`.
    #[allow(clippy::too_many_arguments)]
    fn read(
        &self,
        (weight, span): (&Option<Vec<f32>>, &Option<Span>),
        (map, matrix): (&Linear, &Matrix),
        x: &[f32],
        dy: &[f32],
        dx: &mut [f32],
        b: &mut Buffers,
        gradients: &mut Gradients,
    ) {
        let eps = self.model.decoder.config.norm_eps;
        let (Some(weight), Some(span)) = (weight, span) else {
            gradients.linear(matrix, x, dy, &mut b.right);
            linear(map, dy, &mut b.d_inner, &mut b.right);
            let d_inner = &b.d_inner;
            return rows(dx, 1, |first, dx| {
                dx.iter_mut()
                    .zip(&d_inner[first..])
                    .for_each(|(dx, d)| *dx += d);
            });
        };
        fit(&mut b.inner, x.len());
        norm::forward(x, weight, eps, &mut b.inner);
        gradients.linear(matrix, &b.inner, dy, &mut b.right);
        linear(map, dy, &mut b.d_inner, &mut b.right);
        let d_weight = gradients
            .vector(span)
            .unwrap_or_else(|| spare(&mut b.unused, weight.len()));
        norm::backward(x, weight, eps, &b.d_inner, dx, d_weight);
    }

    fn rotate_back(&self, d_qkv: &mut [f32]) {
        let Some(rotary) = self.rotations.of(self.layer) else {
            return;
        };
        let heads = self.model.decoder.layers[self.layer].heads;
        let positions: Vec<usize> = self.layout.positions().collect();
        rows(d_qkv, heads.qkv_width(), |first, part| {
            for (row, &position) in part
                .chunks_exact_mut(heads.qkv_width())
                .zip(&positions[first..])
            {
                for head in row[..heads.q_width() + heads.kv_width()].chunks_exact_mut(heads.dim) {
                    rotary.rotate_back(head, position);
                }
            }
        });
    }

    /// Carries the gradient through the norms of queries and keys, where the family has them.
    fn qk_norms(&self, state: &LayerState, b: &mut Buffers, gradients: &mut Gradients) {
        let (layer, p) = self.layer();
        let (Some((q, k)), Some((q_span, k_span))) = (&layer.qk_norms, &p.qk_norms) else {
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
                let raw = raw[columns.clone()].chunks_exact(weight.len());
                for (raw, d) in raw.zip(d_row[columns.clone()].chunks_exact_mut(weight.len())) {
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
