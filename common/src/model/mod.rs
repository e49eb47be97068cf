//! The one decoder: where its parameters lie, its forward pass over packed, prefix-shared batches, and its backward pass.

mod backward;
mod conv;
mod decoder;
mod delta;
mod experts;
mod gradients;
mod layer_inputs;
mod lora;
mod params;
mod qkv;
mod recurrent;
mod rotations;
mod workspace;

pub use backward::{Model, backward};
pub use decoder::{Aside, Decoder, LayerState};
pub use gradients::Gradients;
pub use layer_inputs::{making_norm, taking_norm};
pub use lora::{Adapter, Lora};
pub use params::{
    ConvParams, DeltaParams, InputParams, InputTables, LayerNorms, LayerParams, Matrix, MlpParams,
    Params, RecurrentParams, Source, Span,
};
pub use recurrent::{Memory, Recurrent};
pub use rotations::Rotations;
pub use workspace::{Kept, Workspace};
