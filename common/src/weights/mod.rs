//! From a MODEL argument to a config and float32 tensors by their Hugging Face names, and back to a folder.

mod config;
mod rope;

pub use config::{Activation, Config, FAMILIES};
pub use rope::{Rope, RopeScaling};
