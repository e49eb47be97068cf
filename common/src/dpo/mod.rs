//! DPO (arXiv 2305.18290): the loss as a pure function, the optimiser, and the loop that ties them to the decoder.

mod step;

pub use step::head_and_layers_backward;
