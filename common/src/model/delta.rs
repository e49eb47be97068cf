//! A layer's linear attention: its parameters as the kernels want them, and its part of both passes.

use super::decoder::LayerState;
use super::gradients::Gradients;
use super::params::DeltaParams;
use super::recurrent::turned;
use crate::kernels::delta::{self, Memory, Shape, State, WeightGradients, Weights};
use crate::kernels::fit;
use crate::kernels::layout::Layout;
use anyhow::Result;
use std::borrow::Cow;

/// It, beside the projections.
pub struct Delta {
    /// Its heads.
    pub(super) shape: Shape,
    /// `[kernel, qkv_width]`: files have a channel's weights side by side.
    conv: Vec<f32>,
    dt_bias: Vec<f32>,
    a_log: Vec<f32>,
    norm: Vec<f32>,
    eps: f32,
}

impl Delta {
    /// Of values that `get` gives, one for each of [`DeltaParams::spans`].
    pub(super) fn new<'v>(
        params: &DeltaParams,
        eps: f32,
        get: impl Fn(&super::Span) -> Result<Cow<'v, [f32]>>,
    ) -> Result<Self> {
        Ok(Self {
            shape: params.shape,
            conv: turned(&get(&params.conv)?, params.shape.kernel),
            dt_bias: get(&params.dt_bias)?.into_owned(),
            a_log: get(&params.a_log)?.into_owned(),
            norm: get(&params.norm)?.into_owned(),
            eps,
        })
    }

    fn weights(&self) -> Weights<'_> {
        Weights {
            conv: &self.conv,
            dt_bias: &self.dt_bias,
            a_log: &self.a_log,
            norm: &self.norm,
            eps: self.eps,
        }
    }

    /// From `state.qkv_raw`, the fused projection, to `state.attention`.
    pub(super) fn forward(&self, layout: &Layout, state: &mut LayerState) {
        let (tokens, shape) = (layout.tokens(), self.shape);
        fit(&mut state.qkv, tokens * shape.qkv_width());
        fit(&mut state.gates, tokens * 2 * shape.value_heads);
        fit(&mut state.read, tokens * shape.value_width());
        fit(&mut state.attention, tokens * shape.value_width());
        let made = State {
            qkv: &mut state.qkv,
            gates: &mut state.gates,
            read: &mut state.read,
            out: &mut state.attention,
        };
        delta::forward(layout, shape, self.weights(), &state.qkv_raw, made);
    }

    /// Writes the gradient of the fused projection to `d_raw`, and adds those of the parameters, given that of
    /// `state.attention`, which is lost.
    pub(super) fn backward(
        &self,
        params: &DeltaParams,
        layout: &Layout,
        state: &LayerState,
        d_attention: &mut [f32],
        d_raw: &mut [f32],
        gradients: &mut Gradients,
    ) {
        let made = (&state.qkv[..], &state.gates[..], &state.read[..]);
        let WeightGradients {
            conv,
            dt_bias,
            a_log,
            norm,
        } = delta::backward(
            layout,
            self.shape,
            self.weights(),
            &state.qkv_raw,
            made,
            d_attention,
            d_raw,
        );
        let conv = turned(&conv, self.shape.qkv_width());
        for (span, d) in params.spans().into_iter().zip([conv, dt_bias, a_log, norm]) {
            gradients.add(span, &d);
        }
    }

    /// Carries a sequence on over tokens, of which `raw` is the fused projection; `out` `[n, value_width]` is what they give.
    pub(super) fn go_on(&self, memory: &mut Memory, raw: &[f32], out: &mut [f32]) {
        memory.read(&self.weights(), raw, out);
    }

    /// Words that a layer's state takes for each token beside what comes in and goes out.
    pub(super) fn state_words(shape: Shape) -> usize {
        shape.qkv_width() + 2 * shape.value_heads + shape.value_width()
    }
}
