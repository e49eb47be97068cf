//! The substance of DICE, in flow order: each module uses only those above it.

// Floor 1: rows.
pub mod program; // how every tool starts, reports and ends

pub mod files; // files and folders that appear whole or not at all

pub mod records; // prompts and their ids

pub mod jsonl; // rows in and out: line-numbered errors, whole-or-.part outputs, resume

// Floor 2: text and weights.
#[cfg(feature = "model")]
pub mod chat; // chat templates, tokenisation of prompt and response
#[cfg(feature = "model")]
pub mod weights; // config and tensors from a folder, the hub or GGUF; writing checkpoints

// Floor 3: arithmetic.
#[cfg(feature = "model")]
pub mod generate;
#[cfg(feature = "model")]
pub mod kernels; // GEMM, norms, rotary, attention on the CPU
#[cfg(feature = "model")]
pub mod logprob; // log p(y|x)
#[cfg(feature = "model")]
pub mod model; // the one decoder: forward and backward over packed, prefix-shared batches // sampling K responses of a prompt

// Floor 4: the method.
#[cfg(feature = "model")]
pub mod dpo; // loss, optimiser, trainer, checkpoints
pub mod reward; // implicit reward, length shaping, α*

pub mod pairs; // best against worst, replay

pub mod metrics; // accuracy, lengths, distinctness
