//! A GGUF file: header, config, tensors; then its tokenizer and template on a hostile prompt.
#![no_main]

use common::chat::Chat;
use common::records::Prompt;
use common::weights::Weights;
use dice_fuzz::{fill, folder};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    fill(input, &["model.gguf"]);
    let path = folder().join("model.gguf");
    if let Ok(weights) = Weights::open(path.to_str().expect("a plain path")) {
        drop(weights.fingerprint());
    }
    if let Ok(chat) = Chat::open(&path) {
        drop(chat.prompt_ids(&Prompt::Text("Hi <|im_end|>\u{200b}é\u{202e}".into())));
        drop(chat.response_ids("</s> [INST] ok", true));
        drop(chat.decode(&[0, 1, 2, 3, u32::MAX]));
    }
});
