//! Storage that passes use again, part after part: to touch fresh pages costs more than what is computed in them.

use super::decoder::LayerState;
use super::experts;
use crate::kernels::gemm::{Packed, Precision};

/// Layer states, layers' inputs and buffers that no pass is using.
pub struct Workspace {
    states: Vec<LayerState>,
    inputs: Vec<Vec<f32>>,
    pub(super) buffers: Buffers,
}

/// What is kept of a layer from the forward pass to the backward pass.
pub enum Kept {
    /// All of it.
    State(Box<LayerState>),
    /// Its input, from which the rest is made again: the same operations, so the same numbers.
    Input(Vec<f32>),
}

/// What every layer of a backward pass uses.
pub(super) struct Buffers {
    pub inner: Vec<f32>,
    pub d_inner: Vec<f32>,
    pub d_given: Vec<f32>,
    pub d_qkv: Vec<f32>,
    pub d_raw: Vec<f32>,
    pub d_gates: Vec<f32>,
    pub unused: Vec<f32>,
    pub experts: experts::Buffers,
    /// The right operand of every product.
    pub right: Packed,
}

impl Workspace {
    /// Nothing yet.
    pub fn new(precision: Precision) -> Self {
        Self {
            states: vec![],
            inputs: vec![],
            buffers: Buffers {
                inner: vec![],
                d_inner: vec![],
                d_given: vec![],
                d_qkv: vec![],
                d_raw: vec![],
                d_gates: vec![],
                unused: vec![],
                experts: experts::Buffers::default(),
                right: Packed::empty(precision),
            },
        }
    }

    /// Takes a state that is to be kept, whole or its input alone, and leaves storage for the next in its place.
    pub fn keep(&mut self, state: &mut LayerState, whole: bool) -> Kept {
        if whole {
            let spare = self.states.pop().unwrap_or_default();
            Kept::State(Box::new(std::mem::replace(state, spare)))
        } else {
            let spare = self.inputs.pop().unwrap_or_default();
            Kept::Input(std::mem::replace(&mut state.x, spare))
        }
    }

    /// Has one back.
    pub fn give_back(&mut self, kept: Kept) {
        match kept {
            Kept::State(state) => self.states.push(*state),
            Kept::Input(x) => self.inputs.push(x),
        }
    }
}
