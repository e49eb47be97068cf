//! DPO (arXiv 2305.18290): the losses as pure functions, the optimiser, and the trainer that ties them to the decoder.

pub mod checkpoint;
mod cuda;
mod loss;
mod optimizer;
mod step;
mod trainer;

pub use cuda::{CudaTrainer, resident_bytes};
pub use loss::{LossType, Objective, PairLogps, PairLoss};
pub use optimizer::{AdamW, Scheduler};
#[cfg(test)]
pub(crate) use step::Forward;
pub use step::{Pair, Sums};
pub use trainer::{
    Kept, LoraSettings, Moments, Settings, State, StepMetrics, Take, Train, Trainer, order,
};
