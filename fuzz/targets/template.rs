//! A chat template from a stranger, over a conversation from another: bounded work, one line of error, no forged turn.
#![no_main]

use common::chat::Chat;
use common::records::Prompt;
use dice_fuzz::{fill, folder};
use libfuzzer_sys::fuzz_target;
use std::fs;

const TOKENIZER: &[u8] = include_bytes!("../../tests/golden/tiny_chat/tokenizer.json");

fuzz_target!(|input: &[u8]| {
    let text = fill(input, &["chat_template.jinja"]);
    fs::write(folder().join("tokenizer.json"), TOKENIZER).expect("the folder takes files");
    let config = br#"{"eos_token": "<|im_end|>"}"#;
    fs::write(folder().join("tokenizer_config.json"), config).expect("the folder takes files");
    let Ok(chat) = Chat::from_folder(folder()) else {
        return;
    };
    let text = String::from_utf8_lossy(&text);
    let outcome = chat.prompt_ids(&Prompt::Text(text.into()));
    if let Err(error) = outcome {
        assert!(!format!("{error:#}").contains('\n'), "one line: {error:#}");
    }
});
