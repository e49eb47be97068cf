//! DPO (arXiv 2305.18290): the losses as pure functions, the optimiser, and the trainer that ties them to the decoder.

pub mod checkpoint;
mod loss;
mod optimizer;
mod step;
mod trainer;

pub use loss::{LossType, Objective, PairLogps, PairLoss};
pub use optimizer::{AdamW, Scheduler};
#[cfg(test)]
pub(crate) use step::Forward;
pub use step::{Pair, Sums};
pub use trainer::{LoraSettings, NotFinite, Settings, StepMetrics, Trainer, order};
