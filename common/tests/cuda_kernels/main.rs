//! Every kernel of the device, run on the CPU (feature `cuda-emulated`) and held to plain float64 references: both
//! storage types, all head sizes, ragged batches, sizes of one and beside the tiles. Each runs with the threads of a block
//! in several orders, which must not change a bit: where they would, a barrier is missing. Built with the feature `cuda`,
//! too, and run where there is a GPU, the kernels run there instead.

#[path = "../../cuda/kernels.rs"]
#[allow(dead_code)] // the images for GPUs are loaded by the device
mod kernels;

mod attention;
mod conv;
mod decode;
mod delta;
mod device;
mod experts;
mod gate;
mod inputs;
mod logprob;
mod rows;
mod sample;
mod training;
