//! Storage that passes use again, part after part: to touch fresh pages costs more than what is computed in them.

use super::decoder::LayerState;
use crate::kernels::gemm::{Packed, Precision};

/// Layer states and buffers that no pass is using.
pub struct Workspace {
    spare: Vec<LayerState>,
    pub(super) buffers: Buffers,
}

/// What every layer of a backward pass uses.
pub(super) struct Buffers {
    pub inner: Vec<f32>,
    pub d_inner: Vec<f32>,
    pub d_wide: Vec<f32>,
    pub unused: Vec<f32>,
    /// The right operand of every product.
    pub right: Packed,
}

impl Workspace {
    /// Nothing yet.
    pub fn new(precision: Precision) -> Self {
        Self {
            spare: vec![],
            buffers: Buffers {
                inner: vec![],
                d_inner: vec![],
                d_wide: vec![],
                unused: vec![],
                right: Packed::empty(precision),
            },
        }
    }

    /// Takes a state that is to be kept, and leaves storage for the next in its place.
    pub fn keep(&mut self, state: &mut LayerState) -> LayerState {
        std::mem::replace(state, self.spare.pop().unwrap_or_default())
    }

    /// Has a state back.
    pub fn give_back(&mut self, state: LayerState) {
        self.spare.push(state);
    }
}
