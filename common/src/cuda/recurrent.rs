//! What stands in the place of attention, on the device: see `model/recurrent.rs`.

use super::backward::Backward;
use super::batch;
use super::conv::{self, Conv};
use super::decoder::Decoder;
use super::delta::{self, Delta};
use super::delta_backward;
use super::device::Buffer;
use super::pass::{Kept, Pass};
use super::slots::Slots;
use crate::model::{RecurrentParams, Span};
use crate::weights::{Config, Recurrence};
use anyhow::Result;

/// It, beside its projections.
pub(super) enum Recurrent {
    Delta(Delta),
    Conv(Conv),
}

impl Recurrent {
    /// `put` gives the place of a span.
    pub fn new(params: &RecurrentParams, put: impl Fn(&Span) -> Result<Buffer>) -> Result<Self> {
        Ok(match params {
            RecurrentParams::Delta(params) => Self::Delta(Delta::new(params, put)?),
            RecurrentParams::Conv(params) => Self::Conv(Conv::new(params, put)?),
        })
    }
}

/// What such a layer has of sequences that are carried on token by token; each has a number.
pub(super) enum Memories {
    Delta(delta::Memories),
    /// `[numbers, kernel − 1, channels]`: see [`conv::past_bytes`].
    Conv(Buffer),
}

impl Memories {
    /// Room for so many.
    pub fn new(decoder: &Decoder, of: Recurrence, count: usize) -> Result<Self> {
        Ok(match of {
            Recurrence::Delta(shape) => Self::Delta(delta::Memories::new(decoder, shape, count)?),
            Recurrence::Conv(shape) => {
                Self::Conv(decoder.device.allocate(count * conv::past_bytes(shape))?)
            }
        })
    }

    /// The bytes of a number in all layers, in a format of so many bytes.
    pub fn table_bytes(config: &Config, size: usize) -> usize {
        let bytes = |recurrence: &Recurrence| match *recurrence {
            Recurrence::Delta(shape) => delta::Memories::bytes(shape, size),
            Recurrence::Conv(shape) => conv::past_bytes(shape),
        };
        config.recurrences.iter().flatten().map(bytes).sum()
    }
}

/// Elements of the largest partial sums on the way back.
pub(super) fn partial_elements(config: &Config, count: usize) -> usize {
    let each = |recurrence: &Recurrence| match *recurrence {
        Recurrence::Delta(shape) => delta_backward::partial_elements(shape, count),
        Recurrence::Conv(shape) => conv::partial_elements(shape, count),
    };
    let recurrences = config.recurrences.iter().flatten();
    recurrences.map(each).max().unwrap_or(0)
}

impl Decoder {
    /// What stands in the place of attention: from `pass.qkv_raw` to `pass.attention`.
    pub(super) fn recur(
        &self,
        recurrent: &Recurrent,
        batch: &batch::Shape,
        pass: &Pass,
        kept: Option<Kept>,
    ) -> Result<()> {
        let kept = match kept {
            Some(Kept::Memories(memories, spans)) => Some((memories, spans)),
            _ => None,
        };
        match (recurrent, kept) {
            (Recurrent::Delta(delta), None) => self.attend_linearly(delta, batch, pass, None),
            (Recurrent::Conv(conv), None) => self.convolve(conv, batch, pass, None),
            (Recurrent::Delta(delta), Some((Memories::Delta(memories), spans))) => {
                self.attend_linearly(delta, batch, pass, Some((memories, spans)))
            }
            (Recurrent::Conv(conv), Some((Memories::Conv(past), spans))) => {
                self.convolve(conv, batch, pass, Some((past, spans)))
            }
            _ => unreachable!("memories are of their layer"),
        }
    }

    /// The same of one token of each slot that is not finished: it goes on from the memories of its row of logits, and leaves
    /// its own.
    pub(super) fn recur_once(
        &self,
        recurrent: &Recurrent,
        slots: &Slots,
        memories: &Memories,
        count: usize,
    ) -> Result<()> {
        match (recurrent, memories) {
            (Recurrent::Delta(delta), Memories::Delta(memories)) => {
                self.step_linearly(delta, slots, memories, count)
            }
            (Recurrent::Conv(conv), Memories::Conv(past)) => {
                self.step_convolution(conv, slots, past, count)
            }
            _ => unreachable!("memories are of their layer"),
        }
    }
}

impl Backward<'_> {
    /// From `d_attention`, the gradient of what stands in the place of attention gave, to `d_raw`, that of the fused projection.
    pub(super) fn recur(
        &self,
        recurrent: &Recurrent,
        places: &RecurrentParams,
        pass: &Pass,
    ) -> Result<()> {
        match (recurrent, places) {
            (Recurrent::Delta(delta), RecurrentParams::Delta(places)) => {
                self.attend_linearly(delta, places, pass)
            }
            (Recurrent::Conv(conv), RecurrentParams::Conv(places)) => {
                self.convolve(conv, places, pass)
            }
            _ => unreachable!("a layer is what its parameters are for"),
        }
    }
}
