//! `config.json`: read as each family means it, written as transformers 4 and 5 and vLLM all read it.

mod experts;
mod fields;
mod positions;
mod read;
mod recurrences;
mod uneven;
mod write;

pub(super) use fields::Fields;

use super::config::Config;
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::path::Path;

impl Config {
    /// Reads a `config.json` as transformers 5 and older wrote it; `path` is for the error lines.
    /// What is absent gets transformers' default, except the sizes, which must be there.
    ///
    /// # Errors
    /// An unknown architecture, rope type or option that the decoder would silently get wrong; a missing or absurd size.
    pub fn from_json(value: &Value, path: &Path) -> Result<Self> {
        let fields = Fields(
            value
                .as_object()
                .with_context(|| format!("{}: must be a JSON object", path.display()))?,
        );
        read::read(&fields).with_context(|| path.display().to_string())
    }

    /// The `config.json` of a saved checkpoint. A folder's own file is kept as it was but for the
    /// dtype, float32, and how weights were quantised; otherwise (GGUF) the fields are written with the names that transformers 4 and 5
    /// and vLLM all read, over whatever `original` holds (token ids).
    pub fn to_json(&self, original: Option<&Value>) -> Value {
        let mut fields = original
            .and_then(Value::as_object)
            .cloned()
            .unwrap_or_default();
        let unchanged = read::read(&Fields(&fields)).is_ok_and(|config| config == *self);
        if !unchanged {
            write::write(self, &mut fields);
        }
        let dtype = ["dtype", "torch_dtype"]
            .into_iter()
            .find(|key| fields.contains_key(*key))
            .unwrap_or("torch_dtype");
        fields.insert(dtype.to_owned(), json!("float32"));
        fields.shift_remove("quantization_config");
        Value::Object(fields)
    }
}

/// A float32 as the shortest decimal that reads back the same (1e-5, not 9.999999747378752e-6).
pub(super) fn shortest(value: f32) -> Value {
    json!(value.to_string().parse::<f64>().unwrap_or(f64::from(value)))
}

/// The fields of soft caps: of scores, and of logits.
pub(super) const CAPS: [&str; 2] = ["attn_logit_softcapping", "final_logit_softcapping"];

/// The numbers of a clamped activation.
pub(super) const SWIGLU: [&str; 2] = ["swiglu_alpha", "swiglu_limit"];

#[cfg(test)]
mod tests;
