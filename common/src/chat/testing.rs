//! A tiny model's chat for unit tests: bytes as tokens, a few merges, ChatML turns.

use std::path::PathBuf;

use super::Chat;

/// A chat over 261 tokens: `<|endoftext|>` 0, `<|im_start|>` 1, `<|im_end|>` 2 (end of turn), then the 256
/// bytes, then two merges. Its folder is tests/golden/tiny_chat.
pub fn tiny() -> Chat {
    Chat::from_folder(&tiny_folder()).expect("the committed tiny tokenizer opens")
}

/// The folder of [`tiny`].
pub fn tiny_folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/tiny_chat")
}
