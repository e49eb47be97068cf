//! Models that read images, too: their text part, where that is a model of a known family, is taken as one of its own.

use super::family;
use serde_json::{Map, Value, json};
use std::borrow::Cow;

/// What the published files leave to transformers' defaults, by the text part's `model_type`.
const LEFT_OUT: [(&str, &str, u32); 3] = [
    ("gemma3_text", "vocab_size", 262_208),
    ("gemma3_text", "num_attention_heads", 8),
    ("gemma3_text", "max_position_embeddings", 131_072),
];

/// What holds for the text part where it is said of the whole model.
const SHARED: [&str; 7] = [
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "dtype",
    "torch_dtype",
    "quantization_config",
];

/// The `config.json` of a folder's text part, as a model of text alone would have it; `config` itself where it is of one.
pub(super) fn config_of(config: Value) -> Value {
    text_of(&config).unwrap_or(config)
}

/// None where there is no text part that is of a known family.
fn text_of(config: &Value) -> Option<Value> {
    let known = |fields: &Map<String, Value>| family::of(fields.get("model_type")?.as_str()?);
    let whole = config.as_object().filter(|whole| known(whole).is_none())?;
    let mut text = whole.get("text_config")?.as_object()?.clone();
    let family = known(&text)?;
    for key in SHARED {
        if let Some(value) = whole.get(key).filter(|value| !value.is_null()) {
            text.insert(key.into(), value.clone());
        }
    }
    for (of, key, value) in LEFT_OUT {
        if of == family.model_type && text.get(key).is_none_or(Value::is_null) {
            text.insert(key.into(), json!(value));
        }
    }
    // A classifier or a reward model of that kind has no LM head to speak of.
    let generates = |name: &Value| {
        let name = name.as_str().unwrap_or_default();
        name.ends_with("ForConditionalGeneration") || name.ends_with("ForCausalLM")
    };
    let other = whole.get("architectures").filter(|names| {
        let names = names.as_array();
        names.is_some_and(|names| !names.is_empty() && !names.iter().any(generates))
    });
    let ours = || json!([family.architecture()]);
    text.insert("architectures".into(), other.cloned().unwrap_or_else(ours));
    Some(Value::Object(text))
}

/// How a folder names the tensors of its text part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Names {
    /// As a model of text alone does.
    Plain,
    /// `language_model.` before all of that, as most checkpoints have it.
    Before,
    /// This after `model.`: `language_model.`, as transformers 4.52 and later have it in memory, or `text_model.` (Idefics,
    /// SmolVLM).
    Within(&'static str),
}

/// What the tensors of a text part are told by.
const WITHIN: [&str; 2] = ["language_model.", "text_model."];

impl Names {
    /// The names that a folder has, by whether a tensor is in it.
    pub fn of(has: impl Fn(&str) -> bool) -> Self {
        let embedding = "model.embed_tokens.weight";
        let within = WITHIN.into_iter().map(Self::Within);
        let mut found = [Self::Before]
            .into_iter()
            .chain(within)
            .filter(|names| has(&names.stored(embedding)));
        found.next().unwrap_or(Self::Plain)
    }

    /// The folder's name for a tensor.
    pub fn stored(self, name: &str) -> Cow<'_, str> {
        match (self, name.strip_prefix("model.")) {
            (Self::Before, _) => format!("language_model.{name}").into(),
            (Self::Within(part), Some(rest)) => format!("model.{part}{rest}").into(),
            (Self::Plain, _) | (Self::Within(_), None) => name.into(),
        }
    }
}

/// A name as a model of text alone has it, whichever way it is written.
pub(super) fn plain(name: &str) -> Cow<'_, str> {
    for part in WITHIN {
        match name.split_once(part) {
            Some(("", rest)) => return rest.into(),
            Some(("model.", rest)) => return format!("model.{rest}").into(),
            _ => {}
        }
    }
    name.into()
}

/// Whether a name of a model with images is one of its text part.
pub(super) fn is_in(name: &str) -> bool {
    WITHIN.iter().any(|part| name.contains(part))
}

#[cfg(test)]
pub(super) mod testing {
    use super::super::{read_json, save::write_json};
    use super::*;
    use safetensors::SafeTensors;
    use std::fs;
    use std::path::Path;

    /// A folder with what is in `text` as a model with images has it.
    pub fn wrapped(text: &Path, names: Names) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let text_config = read_json(&text.join("config.json")).unwrap();
        let whole = json!({"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"],
            "text_config": text_config, "vision_config": {}, "eos_token_id": [1, 106], "tie_word_embeddings": false});
        write_json(&folder.path().join("config.json"), &whole).unwrap();
        let bytes = fs::read(text.join("model.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let renamed = tensors
            .iter()
            .map(|(name, view)| (names.stored(name).into_owned(), view));
        let file = safetensors::serialize(renamed, None).unwrap();
        fs::write(folder.path().join("model.safetensors"), file).unwrap();
        folder
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::*;
    use super::super::{Config, Weights, save};
    use super::testing::wrapped;
    use super::*;
    use std::path::Path;

    #[test]
    fn a_text_part_is_the_model_that_it_would_be_alone() {
        let (folder, _, tensors) = checkpoint("gemma3_text");
        let alone = open(folder.path()).unwrap();
        assert!(!alone.is_text_part());
        for names in [
            Names::Before,
            Names::Within(WITHIN[0]),
            Names::Within(WITHIN[1]),
        ] {
            let whole = wrapped(folder.path(), names);
            let part = open(whole.path()).unwrap();
            assert!(part.is_text_part());
            assert_eq!(part.config, alone.config);
            assert_holds(&part, &tensors);
            assert_eq!(part.fingerprint().unwrap(), alone.fingerprint().unwrap());
            let saved = tempfile::tempdir().unwrap();
            save(saved.path(), &part.config, Some(&part), borrowed(&tensors)).unwrap();
            let again: Weights = open(saved.path()).unwrap();
            assert!(!again.is_text_part());
            assert_eq!(again.fingerprint().unwrap(), alone.fingerprint().unwrap());
            assert_eq!(
                again.original["architectures"],
                json!(["Gemma3ForCausalLM"])
            );
            assert_eq!(again.original["eos_token_id"], json!([1, 106]));
        }
    }

    /// The fields of google/gemma-3-4b-it's file that matter here.
    #[test]
    fn what_the_published_files_leave_out_is_transformers_default() {
        let published = json!({"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"],
            "eos_token_id": [1, 106], "torch_dtype": "bfloat16", "text_config": {"hidden_size": 2560,
            "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}});
        let text = config_of(published);
        let config = Config::from_json(&text, Path::new("config.json")).unwrap();
        assert_eq!((config.vocab, config.context), (262_208, 131_072));
        assert_eq!(
            (config.heads, config.kv_heads, config.head_dim),
            (8, 4, 256)
        );
        assert!(config.tied);
        assert_eq!(text["eos_token_id"], json!([1, 106]));
        let windows: Vec<_> = config.windows[..6].iter().map(|w| w.is_some()).collect();
        assert_eq!(windows, [true, true, true, true, true, false]);
    }

    #[test]
    fn what_is_no_text_part_of_ours_is_left_and_what_holds_for_all_is_kept() {
        let unknown =
            json!({"model_type": "mllama", "text_config": {"model_type": "mllama_text_model"}});
        assert_eq!(config_of(unknown.clone()), unknown);
        let quantised = json!({"model_type": "gemma3", "quantization_config": {"bits": 4},
            "text_config": config_json("gemma3_text")});
        let error = Config::from_json(&config_of(quantised), Path::new("config.json"));
        let error = format!("{:#}", error.unwrap_err());
        assert!(error.contains("quantization_config"), "{error}");
    }

    /// A tied head is stored with none of them, whatever their configs say of the whole and of the part.
    #[test]
    fn a_text_part_without_a_head_is_tied() {
        let (folder, _, tensors) = checkpoint("gemma3_text");
        let whole = wrapped(folder.path(), Names::Before);
        let bytes = std::fs::read(whole.path().join("model.safetensors")).unwrap();
        let stored = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let head = "language_model.lm_head.weight";
        let rest = stored.iter().filter(|(name, _)| *name != head);
        let file = safetensors::serialize(rest, None).unwrap();
        std::fs::write(whole.path().join("model.safetensors"), file).unwrap();
        let part = open(whole.path()).unwrap();
        assert!(part.config.tied && !open(folder.path()).unwrap().config.tied);
        assert_eq!(part.original["tie_word_embeddings"], json!(true));
        let tensors = tensors
            .into_iter()
            .filter(|(name, ..)| name != "lm_head.weight");
        assert_holds(&part, &tensors.collect());
    }

    /// The configs of Mistral 3's wholes say that it is tied where nobody said anything.
    #[test]
    fn a_text_part_with_another_head_is_not_tied() {
        let (folder, _, tensors) = checkpoint("ministral3");
        let whole = wrapped(folder.path(), Names::Before);
        let path = whole.path().join("config.json");
        let mut json = super::super::read_json(&path).unwrap();
        json["tie_word_embeddings"] = json!(true);
        std::fs::write(path, json.to_string()).unwrap();
        let part = open(whole.path()).unwrap();
        assert!(!part.config.tied);
        assert_eq!(part.original["tie_word_embeddings"], json!(false));
        assert_holds(&part, &tensors);
    }

    #[test]
    fn a_reward_model_is_none_of_text() {
        let judge = json!({"model_type": "gemma3", "architectures": ["Gemma3ForSequenceClassification"],
            "text_config": config_json("gemma3_text")});
        let error = Config::from_json(&config_of(judge), Path::new("config.json"));
        let error = format!("{:#}", error.unwrap_err());
        assert!(error.contains("is not a causal language model"), "{error}");
    }

    #[test]
    fn names_go_there_and_back() {
        let within = WITHIN.map(Names::Within);
        for names in [Names::Plain, Names::Before].into_iter().chain(within) {
            for name in ["model.layers.3.mlp.up_proj", "lm_head.weight"] {
                assert_eq!(plain(&names.stored(name)), name, "{names:?}");
            }
        }
    }
}
