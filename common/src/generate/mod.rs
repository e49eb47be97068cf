//! Sampling K responses of a prompt: token ids in, token ids out; it knows nothing of text.
//!
//! All running sequences step together. A prompt is run once; its samples share its keys and values. A finished
//! sequence's slot is filled at once. What a sequence becomes depends on (seed, prompt's key, sample's number) and on
//! its own tokens alone, never on what runs beside it.

mod attention;
mod cache;
mod engine;
mod logits;
mod queue;
mod sampler;
mod step;

pub use engine::{Generate, Generator, Limits, Request, Sample, Stopped};
pub(crate) use queue::Queue;
pub use sampler::Sampling;
pub(crate) use sampler::stream_key;
