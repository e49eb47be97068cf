//! DPO (arXiv 2305.18290): the losses as pure functions, the optimiser, and the trainer that ties them to the decoder.

pub mod checkpoint;
mod cpu;
mod cuda;
mod loss;
mod memory;
mod optimizer;
mod step;
mod trainer;

pub use cpu::Trainer;
pub use cuda::{CudaTrainer, resident_bytes};
pub use loss::{LossType, Objective, PairLogps, PairLoss};
pub use memory::Memory;
pub use optimizer::{AdamW, Scheduler};
#[cfg(test)]
pub(crate) use step::Forward;
pub use step::{Pair, StateBytes, Sums};
pub use trainer::{
    Kept, LoraSettings, Moments, NotFinite, Progress, Settings, State, StepMetrics, Take, Train,
    order,
};

use crate::policy::Place;
use crate::weights::Weights;
use anyhow::Result;

/// Starts training from a checkpoint, at a place. On a CPU, layer states may take `memory`.
///
/// # Errors
/// A tensor that cannot be read; a GPU without room; an optimiser that the place does not have.
pub fn trainer(
    start: &Weights,
    settings: Settings,
    place: &Place,
    memory: StateBytes,
) -> Result<Box<dyn Train>> {
    let precision = place.full_range_precision();
    Ok(match &place.gpu {
        None => Box::new(Trainer::new(start, settings, precision, memory)?),
        Some(gpu) => Box::new(CudaTrainer::new(gpu, start, settings, precision)?),
    })
}
