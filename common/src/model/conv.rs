//! A layer's gated short convolution: its weight as the kernel wants it, and its part of both passes.

use super::decoder::LayerState;
use super::gradients::Gradients;
use super::params::ConvParams;
use super::recurrent::turned;
use crate::kernels::fit;
use crate::kernels::gated_conv::{self, Memory, Shape};
use crate::kernels::layout::Layout;
use anyhow::Result;
use std::borrow::Cow;

/// It, beside the projections.
pub struct Conv {
    pub(super) shape: Shape,
    /// `[kernel, channels]`: files have a channel's weights side by side.
    weight: Vec<f32>,
}

impl Conv {
    /// Of the values that `get` gives.
    pub(super) fn new<'v>(
        params: &ConvParams,
        get: impl Fn(&super::Span) -> Result<Cow<'v, [f32]>>,
    ) -> Result<Self> {
        Ok(Self {
            shape: params.shape,
            weight: turned(&get(&params.weight)?, params.shape.kernel),
        })
    }

    /// From `state.qkv_raw`, the fused projection, to `state.attention`.
    pub(super) fn forward(&self, layout: &Layout, state: &mut LayerState) {
        fit(&mut state.attention, layout.tokens() * self.shape.channels);
        gated_conv::forward(
            layout,
            self.shape,
            &self.weight,
            &state.qkv_raw,
            &mut state.attention,
        );
    }

    /// Writes the gradient of the fused projection to `d_raw`, and adds that of the weight, given that of
    /// `state.attention`, which is lost.
    pub(super) fn backward(
        &self,
        params: &ConvParams,
        layout: &Layout,
        state: &LayerState,
        d_attention: &mut [f32],
        d_raw: &mut [f32],
        gradients: &mut Gradients,
    ) {
        let d_weight = gated_conv::backward(
            layout,
            self.shape,
            &self.weight,
            &state.qkv_raw,
            d_attention,
            d_raw,
        );
        gradients.add(&params.weight, &turned(&d_weight, self.shape.channels));
    }

    /// Carries a sequence on over tokens, of which `raw` is the fused projection; `out` `[n, channels]` is what they give.
    pub(super) fn go_on(&self, memory: &mut Memory, raw: &[f32], out: &mut [f32]) {
        memory.read(&self.weight, raw, out);
    }
}
