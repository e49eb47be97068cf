//! Writes the chat files of a checkpoint, so that transformers and vLLM load it as it is.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Map, Value as Json, json};

use super::Chat;
use super::encoder::tokenizer_error;

impl Chat {
    /// Writes tokenizer.json, tokenizer_config.json, special_tokens_map.json and generation_config.json into
    /// a folder. Files that came with the model are written byte for byte; the others are made.
    pub fn save(&self, dir: &Path) -> Result<()> {
        let mut files = self.files.clone();
        let mut made = vec![
            ("tokenizer_config.json", pretty(&self.tokenizer_config())?),
            ("special_tokens_map.json", pretty(&json!(self.specials))?),
            ("generation_config.json", pretty(&self.generation_config())?),
        ];
        if !files.contains_key("tokenizer.json") {
            let text = self.encoder.tokenizer().to_string(false);
            made.push(("tokenizer.json", text.map_err(tokenizer_error)?));
        }
        for (name, text) in made {
            files
                .entry(name.to_owned())
                .or_insert_with(|| text.into_bytes());
        }
        for (name, bytes) in &files {
            let path = dir.join(name);
            fs::write(&path, bytes).with_context(|| path.display().to_string())?;
        }
        Ok(())
    }

    fn tokenizer_config(&self) -> Json {
        let mut config = Map::new();
        for (name, text) in &self.specials {
            config.insert(name.clone(), text.as_str().into());
        }
        if let Some(template) = &self.template {
            config.insert("chat_template".into(), template.source().into());
        }
        config.insert("clean_up_tokenization_spaces".into(), false.into());
        config.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
        config.into()
    }

    fn generation_config(&self) -> Json {
        let id = |name: &str| {
            let text = self.specials.get(name)?;
            self.encoder.tokenizer().token_to_id(text)
        };
        let mut config = Map::new();
        if let Some(id) = id("bos_token") {
            config.insert("bos_token_id".into(), id.into());
        }
        let ends = match self.end_ids.as_slice() {
            [one] => json!(one),
            several => json!(several),
        };
        config.insert("eos_token_id".into(), ends);
        if let Some(id) = id("pad_token") {
            config.insert("pad_token_id".into(), id.into());
        }
        config.into()
    }
}

fn pretty(value: &Json) -> Result<String> {
    Ok(serde_json::to_string_pretty(value)? + "\n")
}
