//! The model on an NVIDIA GPU: the same decoder, scoring, sampling and gradients as on the CPU, over device memory.
//!
//! What a GPU is to the rest is in `device`; the kernels are in `common/cuda`. Everything here is compiled always, and
//! runs on the CPU in tests (feature `cuda-emulated`); the feature `cuda` adds the driver. Batches, parameters and
//! numbers of a sampler are those of the CPU. The residual stream, sums, norms and logits are float32 in both formats.

mod backward;
mod batch;
mod conv;
mod decoder;
mod delta;
mod delta_backward;
mod device;
#[cfg(feature = "cuda")]
mod driver;
#[cfg(feature = "cuda-emulated")]
mod emulated;
mod experts;
mod generator;
#[cfg(any(feature = "cuda", feature = "cuda-emulated"))]
#[path = "../../cuda/kernels.rs"]
#[allow(dead_code)] // each backend, and the kernels' own tests, use some of it
mod images;
mod inputs;
mod launches;
mod lora;
mod optimizer;
mod pass;
mod recurrent;
mod reward;
mod scoring;
mod slots;
mod training;
mod walks;

pub use backward::Gradients;
pub use batch::Shape;
pub use decoder::Decoder;
pub use device::{
    Address, Arg, Buffer, Device, Form, Graph, Launch, Memory, Operand, Plain, Precision, Product,
    bytes_of,
};
pub use generator::Generator;
pub use optimizer::{Flat, Rates, Trained};
pub use pass::Pass;
pub use reward::{Choice, rewards};
pub use scoring::{most_tokens, score, score_all, target_logps};
pub use training::{Footprint, Forward};

use anyhow::Result;

/// The arguments of a kernel in order.
macro_rules! args {
    ($($value:expr),* $(,)?) => { &[$($crate::cuda::Arg::from($value)),*] };
}
pub(crate) use args;

/// How many GPUs this program can use: none without the feature `cuda` or without a driver.
pub fn count() -> usize {
    #[cfg(feature = "cuda")]
    return driver::count();
    #[cfg(not(feature = "cuda"))]
    0
}

/// Opens the GPU with this number, from 0. In a build for tests alone, 0 is the emulated one.
///
/// # Errors
/// A build without the feature `cuda`; no driver, no such GPU, one that is too old, or no cuBLAS.
pub fn open(ordinal: usize) -> Result<Device> {
    #[cfg(feature = "cuda")]
    return driver::open(ordinal);
    #[cfg(all(feature = "cuda-emulated", not(feature = "cuda")))]
    if ordinal == 0 {
        return Ok(emulated(4 << 30));
    }
    #[cfg(not(feature = "cuda"))]
    anyhow::bail!(
        "this build computes on the CPU alone (GPU {ordinal} needs one with --features cuda)"
    )
}

/// A device of so much memory that is the CPU in truth, for tests.
#[cfg(feature = "cuda-emulated")]
pub fn emulated(bytes: usize) -> Device {
    emulated::open(bytes)
}
