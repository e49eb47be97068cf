//! What a layer may have in the place of attention: something whose past is a memory of one size, however long the sequence.

use super::Span;
use super::conv::Conv;
use super::decoder::LayerState;
use super::delta::Delta;
use super::gradients::Gradients;
use super::params::RecurrentParams;
use crate::kernels::layout::Layout;
use crate::kernels::{delta, fit, gated_conv};
use crate::weights::Recurrence;
use anyhow::Result;
use std::borrow::Cow;

/// It, beside its projections.
pub enum Recurrent {
    /// Linear attention by the gated delta rule.
    Delta(Delta),
    /// A short convolution between gates.
    Conv(Conv),
}

/// What a sequence leaves behind in such a layer.
#[derive(Clone)]
pub enum Memory {
    /// Of linear attention.
    Delta(delta::Memory),
    /// Of a convolution.
    Conv(gated_conv::Memory),
}

impl Memory {
    /// Nothing yet.
    fn new(of: Recurrence) -> Self {
        match of {
            Recurrence::Delta(shape) => Self::Delta(delta::Memory::new(shape)),
            Recurrence::Conv(shape) => Self::Conv(gated_conv::Memory::new(shape)),
        }
    }

    /// The bytes that it takes.
    pub fn bytes(of: Recurrence) -> usize {
        match of {
            Recurrence::Delta(shape) => delta::Memory::bytes(shape),
            Recurrence::Conv(shape) => gated_conv::Memory::bytes(shape),
        }
    }
}

/// `[rows, cols]` as `[cols, rows]`.
pub(super) fn turned(values: &[f32], cols: usize) -> Vec<f32> {
    let rows = values.len() / cols;
    (0..values.len())
        .map(|i| values[i % rows * cols + i / rows])
        .collect()
}

impl Recurrent {
    /// Of values that `get` gives, one for each of [`RecurrentParams::spans`].
    pub(super) fn new<'v>(
        params: &RecurrentParams,
        eps: f32,
        get: impl Fn(&Span) -> Result<Cow<'v, [f32]>>,
    ) -> Result<Self> {
        Ok(match params {
            RecurrentParams::Delta(params) => Self::Delta(Delta::new(params, eps, get)?),
            RecurrentParams::Conv(params) => Self::Conv(Conv::new(params, get)?),
        })
    }

    /// What it is.
    pub fn kind(&self) -> Recurrence {
        match self {
            Self::Delta(delta) => Recurrence::Delta(delta.shape),
            Self::Conv(conv) => Recurrence::Conv(conv.shape),
        }
    }

    /// From `state.qkv_raw`, the fused projection, to `state.attention`.
    pub(super) fn forward(&self, layout: &Layout, state: &mut LayerState) {
        match self {
            Self::Delta(delta) => delta.forward(layout, state),
            Self::Conv(conv) => conv.forward(layout, state),
        }
    }

    /// Writes the gradient of the fused projection to `d_raw`, and adds those of the parameters, given that of
    /// `state.attention`, which is lost.
    pub(super) fn backward(
        &self,
        params: &RecurrentParams,
        layout: &Layout,
        state: &LayerState,
        d_attention: &mut [f32],
        d_raw: &mut Vec<f32>,
        gradients: &mut Gradients,
    ) {
        fit(d_raw, state.qkv_raw.len());
        match (self, params) {
            (Self::Delta(delta), RecurrentParams::Delta(params)) => {
                delta.backward(params, layout, state, d_attention, d_raw, gradients);
            }
            (Self::Conv(conv), RecurrentParams::Conv(params)) => {
                conv.backward(params, layout, state, d_attention, d_raw, gradients);
            }
            _ => unreachable!("a layer is what its parameters are for"),
        }
    }

    /// What a sequence leaves behind, of which `raw` is the fused projection.
    pub fn after(&self, raw: &[f32]) -> Memory {
        let kind = self.kind();
        let mut memory = Memory::new(kind);
        let tokens = raw.len() / kind.input_width();
        let read = match kind {
            Recurrence::Delta(_) => tokens,
            Recurrence::Conv(shape) => tokens.min(shape.kernel), // it remembers no others
        };
        let raw = &raw[(tokens - read) * kind.input_width()..];
        self.go_on(&mut memory, raw, &mut vec![0.0; read * kind.output_width()]);
        memory
    }

    /// Carries a sequence on over tokens, of which `raw` is the fused projection; `out` `[n, output_width]` is what they give.
    pub fn go_on(&self, memory: &mut Memory, raw: &[f32], out: &mut [f32]) {
        match (self, memory) {
            (Self::Delta(delta), Memory::Delta(memory)) => delta.go_on(memory, raw, out),
            (Self::Conv(conv), Memory::Conv(memory)) => conv.go_on(memory, raw, out),
            _ => unreachable!("a memory is of its layer"),
        }
    }

    /// Words that a layer's state takes for each token.
    pub fn state_words(of: Recurrence) -> usize {
        of.input_width()
            + of.output_width()
            + match of {
                Recurrence::Delta(shape) => Delta::state_words(shape),
                Recurrence::Conv(_) => 0,
            }
    }
}
