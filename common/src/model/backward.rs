//! The backward pass, layer by layer from the last, with each layer's state kept or made again from its input.

use super::decoder::{Aside, Decoder, Layer, LayerState, Linear, Mlp};
use super::gradients::Gradients;
use super::layer_inputs::Inputs;
use super::params::{LayerParams, Matrix, MlpParams, Params, Span};
use super::rotations::Rotations;
use super::workspace::{Buffers, Kept, Workspace};
use crate::kernels::attention;
use crate::kernels::gemm::{Left, Mat, Packed, Threads, Write, matmul};
use crate::kernels::layout::Layout;
use crate::kernels::{activation, add, copy, fit, norm, rows, scale};
use crate::weights::Fused;
use std::collections::BTreeMap;

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
pub(super) fn linear(layer: &Linear, dy: &[f32], dx: &mut Vec<f32>, right: &mut Packed) {
    linear_to(layer, dy, (dx, Write::Set), right);
}

/// The same, or `dx` gains it.
fn linear_to(layer: &Linear, dy: &[f32], (dx, write): (&mut Vec<f32>, Write), right: &mut Packed) {
    let (rows, cols) = (layer.weight.n(), layer.weight.k());
    right.set_transposed(&layer.weight, 0..rows);
    let tokens = dy.len() / rows;
    fit(dx, tokens * cols);
    let dy = Left::Rows(Mat::new(dy, tokens, rows));
    matmul(dy, right.panels(), dx, cols, write, Threads::All);
}

/// Carries `dx` `[T, hidden]`, the gradient of the residual stream after the last layer, back to the embedding, adding
/// every parameter's gradient on the way.
///
/// `layers` holds what is kept of each layer of the forward pass over the same batch; it goes back to `workspace`. `aside` is as
/// that left it.
pub fn backward(
    model: Model,
    layout: &Layout,
    tokens: &[u32],
    (mut layers, aside): (Vec<Kept>, &mut Aside),
    mut dx: Vec<f32>,
    gradients: &mut Gradients,
    workspace: &mut Workspace,
) {
    let decoder = model.decoder;
    assert_eq!(layers.len(), decoder.layers.len());
    let rotations = decoder.rotations(layout.longest());
    let mut again = LayerState::default();
    let mut d_aside = Aside {
        inputs: vec![0.0; aside.inputs.len()],
        keys: BTreeMap::new(),
    };
    while let Some(mut kept) = layers.pop() {
        let i = layers.len();
        let buffers = &mut workspace.buffers;
        let state = match &mut kept {
            Kept::State(state) => state,
            Kept::Input(x) => {
                std::mem::swap(&mut again.x, x);
                let next = &mut buffers.inner;
                decoder.run_again(i, (layout, &rotations), aside, &mut again, next);
                &mut again
            }
        };
        let mut pass = Pass {
            model,
            layout,
            rotations: &rotations,
            layer: i,
            b: buffers,
            gradients,
            lent: &mut d_aside.keys,
        };
        let (layer, p) = pass.layer();
        if let Some(by) = layer.scale {
            scale(&mut dx, by);
        }
        if let (Some(input), Some(p)) = (&layer.input, &p.input) {
            let given = (&*state, &aside.inputs[..]);
            pass.input((input, p), given, &mut dx, &mut d_aside.inputs);
        }
        pass.mlp(state, &mut dx);
        pass.attention(state, &mut dx);
        workspace.give_back(kept);
    }
    let b = &mut workspace.buffers;
    Inputs::backward((model, tokens), &mut d_aside.inputs, &mut dx, gradients, b);
    scale(&mut dx, decoder.config.embed_scale);
    gradients.table(&model.params.embedding, tokens, &dx);
}

/// The backward pass of one layer.
pub(super) struct Pass<'a, 'g> {
    pub model: Model<'a>,
    pub layout: &'a Layout,
    pub rotations: &'a Rotations,
    pub layer: usize,
    pub b: &'a mut Buffers,
    pub gradients: &'a mut Gradients<'g>,
    /// Gradients of keys and values that later layers attended to, by the layer that made them.
    pub lent: &'a mut BTreeMap<usize, Vec<f32>>,
}

/// A norm and its place among the parameters, where the layer has it.
pub(super) type Norm<'a> = Option<(&'a [f32], &'a Span)>;

pub(super) fn norm_at<'a>(weight: &'a Option<Vec<f32>>, span: &'a Option<Span>) -> Norm<'a> {
    weight.as_deref().zip(span.as_ref())
}

/// A linear map of what is read of the residual stream, its place among the parameters, and the gradient of what it gives.
pub(super) type Reader<'a> = (&'a Linear, &'a Matrix, &'a [f32]);

/// What a sublayer read of `x`: it, or, where there is a norm, that of it, made in `room`.
pub(super) fn normed<'x>(
    norm: Norm,
    x: &'x [f32],
    kind: norm::Kind,
    room: &'x mut Vec<f32>,
) -> &'x [f32] {
    let Some((weight, _)) = norm else {
        return x;
    };
    fit(room, x.len());
    norm::forward(x, weight, kind, room);
    room
}

impl<'a> Pass<'a, '_> {
    /// next = middle + norm(down(act(gate_up(norm(middle))))): turns the gradient of `next` into that of `middle`.
    /// The state's `gate_up` becomes its gradient. (That of what attention read, too, is left to [`Self::attention`].)
    fn mlp(&mut self, state: &mut LayerState, dx: &mut [f32]) {
        let (layer, p) = self.layer();
        let decoder = self.model.decoder;
        let mut d_given = std::mem::take(&mut self.b.d_given);
        let norm = norm_at(&layer.norms.after_mlp, &p.norms.after_mlp);
        let kind = decoder.config.norm();
        let dy = self.given(norm, kind, &state.down, dx, &mut d_given);
        if let Some(how) = decoder.config.experts[self.layer] {
            copy(dy, &mut self.b.experts.dy);
            self.b.d_given = d_given;
            return self.experts(how, state, dx);
        }
        let (mlp, places) = (&layer.mlps[0], p.mlp());
        self.mlp_inner((mlp, places), &mut state.gate_up, dy);
        self.b.d_given = d_given;
        if decoder.config.is_parallel() {
            return;
        }
        let norm = norm_at(&layer.norms.before_mlp, &p.norms.before_mlp);
        self.read(norm, &[gate_up(layer, p, state)], &state.middle, dx);
    }

    /// From the gradient of what an MLP gave to that of its `gate_up`, which becomes that.
    pub(super) fn mlp_inner(
        &mut self,
        (mlp, places): (&Mlp, &MlpParams),
        gate_up: &mut [f32],
        dy: &[f32],
    ) {
        let (decoder, b) = (self.model.decoder, &mut *self.b);
        decoder.mlp_inner(mlp, gate_up, &mut b.inner);
        self.gradients
            .linear(&places.down, &b.inner, dy, &mut b.right);
        linear(&mlp.down, dy, &mut b.d_inner, &mut b.right);
        activation::backward(decoder.config.activation, gate_up, mlp.ffn(), &b.d_inner);
    }

    /// middle = x + norm(output(attention(rotate(qkv(norm(x)))))), or what stands in its place: turns the gradient of `middle`
    /// into that of `x`, to which the MLP adds where it read the same.
    fn attention(&mut self, state: &LayerState, dx: &mut [f32]) {
        let (layer, p) = self.layer();
        let mut d_given = std::mem::take(&mut self.b.d_given);
        let norm = norm_at(&layer.norms.after_attention, &p.norms.after_attention);
        let kind = self.model.decoder.config.norm();
        let dy = self.given(norm, kind, &state.output, dx, &mut d_given);
        let b = &mut *self.b;
        let gates = self.model.decoder.gates_of(self.layer, &state.qkv_raw);
        let read = match &gates {
            None => &state.attention,
            Some(gates) => gated(gates, &state.attention, layer.heads.q_width(), &mut b.inner),
        };
        (self.gradients).linear(&p.output, read, dy, &mut b.right);
        linear(&layer.output, dy, &mut b.d_inner, &mut b.right);
        b.d_given = d_given;
        let mut d_raw = std::mem::take(&mut b.d_raw);
        if let (Some(recurrent), Some(places)) = (&layer.recurrent, &p.recurrent) {
            let d_attention = &mut b.d_inner;
            recurrent.backward(
                places,
                self.layout,
                state,
                d_attention,
                &mut d_raw,
                self.gradients,
            );
        } else {
            if let Some(gates) = gates {
                let d = (&mut b.d_inner[..], &mut b.d_gates);
                gates_backward(gates, &state.attention, layer.heads.q_width(), d);
            }
            let mut d_qkv = std::mem::take(&mut b.d_qkv);
            self.attention_proper(state, &mut d_qkv);
            match layer.fused {
                Fused::All => std::mem::swap(&mut d_raw, &mut d_qkv),
                _ => layer.gather(&d_qkv, &self.b.d_gates, &mut d_raw),
            }
            self.b.d_qkv = d_qkv;
        }
        let norm = norm_at(&layer.norms.before_attention, &p.norms.before_attention);
        let mut readers = vec![(&layer.qkv, &p.qkv, &d_raw[..])];
        if self.model.decoder.config.is_parallel() {
            readers.push(gate_up(layer, p, state));
        }
        self.read(norm, &readers, &state.x, dx);
        self.b.d_raw = d_raw;
    }

    /// attention(rotate(norm(q | k | v))): writes the gradient of q, k and v, given that of the result, in `d_inner`.
    fn attention_proper(&mut self, state: &LayerState, d_qkv: &mut Vec<f32>) {
        let (layer, p) = self.layer();
        fit(d_qkv, state.qkv.len());
        rows(d_qkv, 1, |_, part| part.fill(0.0)); // attention adds to it
        attention::backward(
            self.layout,
            layer.heads,
            self.model.decoder.precision,
            (&state.qkv, &state.attention, &state.lse),
            &self.b.d_inner,
            d_qkv,
        );
        let d_sinks = p
            .sinks
            .as_ref()
            .and_then(|span| self.gradients.vector(span));
        if let (Some(sinks), Some(d_sinks)) = (&layer.sinks, d_sinks) {
            let given = (&state.attention[..], &state.lse[..]);
            attention::sinks_backward(layer.heads, sinks, given, &self.b.d_inner, d_sinks);
        }
        self.lent_keys(layer, d_qkv);
        let [before, after] = self.rotations.around_norms(self.layer);
        self.rotate_back(after, d_qkv);
        self.qk_norms(&state.qkv_raw, before, d_qkv);
        self.rotate_back(before, d_qkv);
    }

    pub(super) fn layer(&self) -> (&'a Layer, &'a LayerParams) {
        let Model { decoder, params } = self.model;
        (&decoder.layers[self.layer], &params.layers[self.layer])
    }

    /// The gradient of what a sublayer gave, given that of the residual stream, which gained it: the same, or, where there
    /// is a norm after it, through that, in `d_given`.
    pub(super) fn given<'d>(
        &mut self,
        norm: Norm,
        kind: norm::Kind,
        given: &[f32],
        dx: &'d [f32],
        d_given: &'d mut Vec<f32>,
    ) -> &'d [f32] {
        let Some(norm) = norm else {
            return dx;
        };
        fit(d_given, dx.len());
        rows(d_given, 1, |_, part| part.fill(0.0)); // the norm adds to it
        let d_weight = wanted(self.gradients, &mut self.b.unused, norm.0, Some(norm.1));
        norm::backward(given, norm.0, kind, dx, d_given, d_weight);
        d_given
    }

    /// y = map(norm(x)) of each of these maps, the norm where there is one: adds the gradients of all, and to `dx` what `x` gains.
    pub(super) fn read(&mut self, norm: Norm, readers: &[Reader], x: &[f32], dx: &mut [f32]) {
        let kind = self.model.decoder.config.norm();
        let Buffers {
            inner,
            d_inner,
            right,
            ..
        } = &mut *self.b;
        let read = normed(norm, x, kind, inner);
        let mut write = Write::Set;
        for &(map, matrix, dy) in readers {
            self.gradients.linear(matrix, read, dy, right);
            linear_to(map, dy, (d_inner, write), right);
            write = Write::Add;
        }
        let d_read = std::mem::take(d_inner);
        self.through(norm, x, &d_read, dx);
        self.b.d_inner = d_read;
    }

    /// Adds to `dx` what `x` gains by its norm, where there is one, given the gradient of that; and the norm's own.
    pub(super) fn through(&mut self, norm: Norm, x: &[f32], d_read: &[f32], dx: &mut [f32]) {
        let kind = self.model.decoder.config.norm();
        match norm {
            Some(norm) => {
                let d_weight = wanted(self.gradients, &mut self.b.unused, norm.0, Some(norm.1));
                norm::backward(x, norm.0, kind, d_read, dx, d_weight);
            }
            None => add(d_read, dx),
        }
    }
}

/// What reads the residual stream for a layer's MLP, whose state has the gradient by now.
fn gate_up<'a>(layer: &'a Layer, p: &'a LayerParams, state: &'a LayerState) -> Reader<'a> {
    (&layer.mlps[0].gate_up, &p.mlp().gate_up, &state.gate_up)
}

/// What gated attention gives, made in `room`: each row of `attention` times σ(gate).
fn gated<'a, 'r>(
    gates: &(impl Fn(usize) -> &'a [f32] + Sync),
    attention: &[f32],
    width: usize,
    room: &'r mut Vec<f32>,
) -> &'r Vec<f32> {
    fit(room, attention.len());
    rows(room, width, |first, part| {
        let each = part
            .chunks_exact_mut(width)
            .zip(attention[first * width..].chunks_exact(width));
        for ((out, x), token) in each.zip(first..) {
            activation::gate_row(gates(token), x, out);
        }
    });
    room
}

/// Turns the gradient of what gated attention gives into that of attention's result, and writes that of the gates.
fn gates_backward<'a>(
    gates: impl Fn(usize) -> &'a [f32],
    attention: &[f32],
    width: usize,
    (d, d_gates): (&mut [f32], &mut Vec<f32>),
) {
    fit(d_gates, d.len());
    let each = d
        .chunks_exact_mut(width)
        .zip(d_gates.chunks_exact_mut(width));
    for (token, ((d, d_gates), x)) in each.zip(attention.chunks_exact(width)).enumerate() {
        activation::gate_row_backward(gates(token), x, d, d_gates);
    }
}

/// Where a norm's gradient is added: to the parameters', or, where they are not trained, to a place that nobody reads.
pub(super) fn wanted<'a>(
    gradients: &'a mut Gradients,
    unused: &'a mut Vec<f32>,
    weight: &[f32],
    span: Option<&Span>,
) -> &'a mut [f32] {
    let trained = span.and_then(|span| gradients.vector(span));
    trained.unwrap_or_else(|| {
        unused.resize(weight.len(), 0.0);
        unused
    })
}
