//! A language model as the tools use it: where it computes, weights, tokenizer and decoder together, rows turned into token
//! ids, and two models that are a reward.

mod checkpoint;
mod compute;
mod gathered;
mod rewards;

pub use checkpoint::{
    CHOSEN, Checkpoint, Engine, PAIR, REJECTED, RESPONSE, Response, TOKENS_AT_ONCE, TooLong,
    is_of_prompt, name_prompt, responses,
};
pub use compute::{Compute, Dtype, KvCacheDtype, OnNan, Place, Stage, sampling_dtype};
pub use gathered::{Gathered, Ready};
pub use rewards::{Logps, RewardModel};
