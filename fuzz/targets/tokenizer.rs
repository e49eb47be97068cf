//! A folder's tokenizer.json and its companions, put to work on the text that ends the input.
#![no_main]

use common::chat::Chat;
use common::records::Prompt;
use dice_fuzz::{fill, folder};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let text = fill(
        input,
        &[
            "tokenizer.json",
            "tokenizer_config.json",
            "generation_config.json",
        ],
    );
    let text = String::from_utf8_lossy(&text);
    let Ok(chat) = Chat::from_folder(folder()) else {
        return;
    };
    drop(chat.prompt_ids(&Prompt::Text(text.to_string()).with_system("Be brief.")));
    if let Ok(ids) = chat.response_ids(&text, false) {
        assert!(ids.iter().all(|id| (*id as usize) < chat.vocab_size()));
        drop(chat.decode(&ids));
    }
});
