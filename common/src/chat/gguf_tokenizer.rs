//! Builds a tokenizer from a GGUF file's `tokenizer.ggml.*` entries.
//!
//! A GGUF file names its pre-tokenizer (`tokenizer.ggml.pre`) instead of describing it; [`pre_tokenizer`] is
//! our table of what those names mean in the models' own tokenizer.json. An unknown name is an error: with a
//! wrong pre-tokenizer every number downstream would be quietly off.

use std::collections::{BTreeMap, HashMap, HashSet};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Map, Value as Json, json};
use tokenizers::Tokenizer;

use super::Parts;
use crate::gguf::Value;

/// The split of Llama 3; Qwen 2 differs in the digits alone.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// As before, but marks (accents, vowel signs) are parts of words; nothing is composed before.
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// The split of Mistral's Tekken.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// The split of GPT-4o (tiktoken's o200k_base), which Phi-4-mini has.
const O200K: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// The splits of DeepSeek-V3, one after the other, which Hunyuan has: digits, Chinese and Japanese, the rest.
const DEEPSEEK3: [&str; 3] = [
    r"\p{N}{1,3}",
    "[\u{4e00}-\u{9fa5}\u{3040}-\u{309f}\u{30a0}-\u{30ff}]+",
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##,
];

/// SentencePiece's BPE with its merges.
const GEMMA4: &str = "gemma4";

// Values of `tokenizer.ggml.token_type`.
const UNKNOWN: i128 = 2;
const CONTROL: i128 = 3;
const USER_DEFINED: i128 = 4;
const BYTE: i128 = 6;

/// Reads what a GGUF file says about text.
pub fn read(metadata: &HashMap<String, Value>) -> Result<Parts> {
    let entries = Entries(metadata);
    let vocabulary = Vocabulary::read(&entries)?;
    let model = entries
        .text("tokenizer.ggml.model")?
        .context("no tokenizer.ggml.model: the file has no tokenizer")?;
    let plan = match model {
        "gpt2" => byte_level(&entries, &vocabulary)?,
        "llama" | GEMMA4 => sentence_piece(&entries, &vocabulary)?,
        other => bail!(
            "tokenizer.ggml.model {other:?} is not supported (gpt2, llama and gemma4 are): use the model's HF folder"
        ),
    };
    // Its special tokens take the white space after them, which no entry says: llama.cpp goes by the model's name.
    let phi3 = model == "llama" && entries.text("general.architecture")? == Some("phi3");
    let mut specials = BTreeMap::new();
    for (name, key) in [
        ("bos_token", "bos"),
        ("eos_token", "eos"),
        ("unk_token", "unknown"),
        ("pad_token", "padding"),
    ] {
        if let Some(id) = entries.id(&format!("tokenizer.ggml.{key}_token_id"))? {
            specials.insert(name.to_owned(), vocabulary.token(id, key)?.to_owned());
        }
    }
    let mut end_ids = Vec::new();
    for key in ["eos", "eot", "eom"] {
        if let Some(id) = entries.id(&format!("tokenizer.ggml.{key}_token_id"))? {
            vocabulary.token(id, key)?;
            end_ids.push(id);
        }
    }
    for end in unsaid_ends(&entries, model)? {
        let id = vocabulary.tokens.iter().position(|token| token == end);
        end_ids.extend(id.map(u32::try_from).transpose()?);
    }
    let add_bos = entries
        .flag("tokenizer.ggml.add_bos_token")?
        .unwrap_or(plan.add_bos);
    let bos = specials.get("bos_token").filter(|_| add_bos);
    let file = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": vocabulary.added(&specials, phi3),
        "normalizer": plan.normalizer,
        "pre_tokenizer": plan.pre_tokenizer,
        "post_processor": bos.map(|bos| begin_with(bos, &vocabulary)),
        "decoder": plan.decoder,
        "model": plan.model,
    });
    let tokenizer = Tokenizer::from_bytes(serde_json::to_vec(&file)?)
        .map_err(|error| anyhow!("tokenizer.ggml: {error}"))?;
    Ok(Parts {
        tokenizer,
        template: entries.text("tokenizer.chat_template")?.map(str::to_owned),
        add_bos: bos.is_some(),
        specials,
        end_ids,
        files: BTreeMap::new(),
    })
}

/// What ends a turn though files do not say so: llama.cpp knows the tokens.
fn unsaid_ends(entries: &Entries, model: &str) -> Result<&'static [&'static str]> {
    Ok(match entries.text("general.architecture")? {
        _ if model == GEMMA4 => &["<turn|>"],
        Some("gpt-oss") => &["<|return|>", "<|call|>"],
        _ => &[],
    })
}

/// The parts of a tokenizer.json that depend on the kind of tokenizer.
struct Plan {
    normalizer: Json,
    pre_tokenizer: Json,
    decoder: Json,
    model: Json,
    /// llama.cpp's default where the file does not say.
    add_bos: bool,
}

/// GPT-2's byte-level BPE with the pre-tokenizer of the given name.
fn byte_level(entries: &Entries, vocabulary: &Vocabulary) -> Result<Plan> {
    let name = entries.text("tokenizer.ggml.pre")?.unwrap_or("default");
    let (normalizer, pre_tokenizer, whole_words, add_bos) = pre_tokenizer(name)?;
    Ok(Plan {
        normalizer,
        pre_tokenizer,
        decoder: bytes_step(false),
        model: json!({
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": whole_words,
            "vocab": vocabulary.map(),
            "merges": written_merges(entries)?,
        }),
        add_bos,
    })
}

/// The merges that a file has, in their order.
fn written_merges(entries: &Entries) -> Result<Vec<(String, String)>> {
    let merges = entries
        .texts("tokenizer.ggml.merges")?
        .context("no tokenizer.ggml.merges")?;
    let tokens = |(rank, merge): (usize, &String)| {
        // The first character may itself be a space.
        let mut seams = merge.char_indices().skip(1);
        let (seam, _) = seams.find(|(_, c)| *c == ' ').with_context(|| {
            format!("tokenizer.ggml.merges[{rank}]: {merge:?} is not two tokens")
        })?;
        Ok((merge[..seam].to_owned(), merge[seam + 1..].to_owned()))
    };
    merges.iter().enumerate().map(tokens).collect()
}

/// Normaliser, pre-tokenizer, whether whole words in the vocabulary skip the merges, whether BOS is added
/// by default.
fn pre_tokenizer(name: &str) -> Result<(Json, Json, bool, bool)> {
    let splits = |patterns: &[&str]| {
        let split = |pattern: &&str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
        let mut steps: Vec<Json> = patterns.iter().map(split).collect();
        steps.push(bytes_step(false));
        json!({"type": "Sequence", "pretokenizers": steps})
    };
    let split = |pattern: &str| splits(&[pattern]);
    Ok(match name {
        "default" | "gpt-2" | "gpt2" | "phi-2" => (Json::Null, bytes_step(true), false, false),
        "smollm" | "starcoder" | "refact" | "command-r" => {
            let steps = json!([{"type": "Digits", "individual_digits": true}, bytes_step(true)]);
            let normalizer = match name {
                "command-r" => json!({"type": "NFC"}),
                _ => Json::Null,
            };
            let steps = json!({"type": "Sequence", "pretokenizers": steps});
            (normalizer, steps, false, false)
        }
        "llama-bpe" | "llama3" | "llama-v3" | "lfm2" => (Json::Null, split(LLAMA3), true, true),
        "dbrx" | "smaug-bpe" | "chatglm-bpe" => (Json::Null, split(LLAMA3), false, false),
        "glm4" => (Json::Null, split(LLAMA3), true, false),
        "hunyuan-dense" => (Json::Null, splits(&DEEPSEEK3), false, false),
        "qwen2" => (json!({"type": "NFC"}), split(QWEN2), false, false),
        "qwen35" => (Json::Null, split(QWEN35), false, false),
        // GPT-NeoX's: OLMoE has it, too.
        "olmo" => (json!({"type": "NFC"}), bytes_step(true), false, false),
        "tekken" => (Json::Null, split(TEKKEN), true, true),
        "gpt-4o" => (Json::Null, split(O200K), false, false),
        other => bail!(
            "tokenizer.ggml.pre {other:?} is not a known pre-tokenizer (known: gpt-2, phi-2, smollm, starcoder, \
             refact, command-r, llama-bpe, lfm2, dbrx, smaug-bpe, chatglm-bpe, glm4, hunyuan-dense, qwen2, qwen35, olmo, tekken, gpt-4o): use the model's HF folder"
        ),
    })
}

/// The byte-level step, with or without GPT-2's own splitting.
fn bytes_step(split: bool) -> Json {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": split})
}

/// SentencePiece's BPE (Llama 2, Mistral v0.1–0.3, Gemma): the merges follow from the scores, but where the file has them
/// (Gemma 4).
fn sentence_piece(entries: &Entries, vocabulary: &Vocabulary) -> Result<Plan> {
    let merges = match entries.text("tokenizer.ggml.model")? {
        Some(GEMMA4) => written_merges(entries)?,
        _ => merges_from_scores(vocabulary, scores(entries, vocabulary)?),
    };
    let unknown = vocabulary
        .types
        .iter()
        .position(|kind| *kind == UNKNOWN)
        .map(|id| &vocabulary.tokens[id]);
    let prefix = entries
        .flag("tokenizer.ggml.add_space_prefix")?
        .unwrap_or(true);
    let spaces = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    let mut normalizers = vec![spaces];
    if prefix {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    Ok(Plan {
        normalizer: json!({"type": "Sequence", "normalizers": normalizers}),
        pre_tokenizer: Json::Null,
        decoder: json!({"type": "Sequence", "decoders": decoders}),
        model: json!({
            "type": "BPE",
            "dropout": null,
            "unk_token": unknown,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": true,
            "byte_fallback": true,
            "ignore_merges": false,
            "vocab": vocabulary.map(),
            "merges": merges,
        }),
        add_bos: true,
    })
}

/// One for each token.
fn scores<'a>(entries: &'a Entries, vocabulary: &Vocabulary) -> Result<&'a [f64]> {
    let scores = entries
        .reals("tokenizer.ggml.scores")?
        .context("no tokenizer.ggml.scores")?;
    if scores.len() != vocabulary.tokens.len() {
        bail!(
            "tokenizer.ggml.scores has {} entries for {} tokens",
            scores.len(),
            vocabulary.tokens.len()
        );
    }
    Ok(scores)
}

/// Every way to join two tokens into a third, best score first: what SentencePiece does by looking scores up,
/// and the order in which transformers writes such a tokenizer.json.
fn merges_from_scores(vocabulary: &Vocabulary, scores: &[f64]) -> Vec<(String, String)> {
    let ids: HashMap<&str, usize> = vocabulary
        .tokens
        .iter()
        .enumerate()
        .filter(|(id, _)| {
            !matches!(
                vocabulary.types[*id],
                CONTROL | UNKNOWN | BYTE | USER_DEFINED
            )
        })
        .map(|(id, token)| (token.as_str(), id))
        .collect();
    let mut merges = Vec::new();
    for (id, token) in vocabulary.tokens.iter().enumerate() {
        if ids.get(token.as_str()) != Some(&id) {
            continue;
        }
        let mut local: Vec<(usize, usize)> = token
            .char_indices()
            .skip(1)
            .filter_map(|(seam, _)| Some((*ids.get(&token[..seam])?, *ids.get(&token[seam..])?)))
            .collect();
        local.sort_unstable();
        merges.extend(
            local
                .into_iter()
                .map(|(left, right)| (scores[id], left, right)),
        );
    }
    let length = |id: usize| vocabulary.tokens[id].chars().count();
    // Python's reversed sort keeps equal elements in order, and so does this one.
    merges.sort_by(|a, b| {
        b.0.total_cmp(&a.0)
            .then_with(|| length(b.1).cmp(&length(a.1)))
            .then_with(|| length(b.2).cmp(&length(a.2)))
    });
    merges
        .into_iter()
        .map(|(_, left, right)| {
            (
                vocabulary.tokens[left].clone(),
                vocabulary.tokens[right].clone(),
            )
        })
        .collect()
}

/// A post-processor that begins every document with BOS.
fn begin_with(bos: &str, vocabulary: &Vocabulary) -> Json {
    let special = json!({"SpecialToken": {"id": bos, "type_id": 0}});
    let sequence = |name: &str, kind: u32| json!({"Sequence": {"id": name, "type_id": kind}});
    let id = vocabulary.tokens.iter().position(|token| token == bos);
    json!({
        "type": "TemplateProcessing",
        "single": [special, sequence("A", 0)],
        "pair": [special, sequence("A", 0), sequence("B", 1)],
        "special_tokens": {bos: {"id": bos, "ids": [id], "tokens": [bos]}},
    })
}

/// Tokens and their types, in id order.
struct Vocabulary {
    tokens: Vec<String>,
    types: Vec<i128>,
}

impl Vocabulary {
    fn read(entries: &Entries) -> Result<Self> {
        let tokens = entries
            .texts("tokenizer.ggml.tokens")?
            .context("no tokenizer.ggml.tokens: the file has no tokenizer")?
            .to_vec();
        let types = match entries.wholes("tokenizer.ggml.token_type")? {
            Some(types) => types.to_vec(),
            None => vec![1; tokens.len()],
        };
        if types.len() != tokens.len() {
            bail!(
                "tokenizer.ggml.token_type has {} entries for {} tokens",
                types.len(),
                tokens.len()
            );
        }
        let mut seen = HashSet::new();
        if let Some(token) = tokens.iter().find(|token| !seen.insert(token.as_str())) {
            bail!("tokenizer.ggml.tokens: {token:?} stands there twice");
        }
        Ok(Self { tokens, types })
    }

    fn token(&self, id: u32, key: &str) -> Result<&str> {
        self.tokens
            .get(id as usize)
            .map(String::as_str)
            .with_context(|| {
                format!(
                    "tokenizer.ggml.{key}_token_id: {id} is outside the vocabulary of {}",
                    self.tokens.len()
                )
            })
    }

    fn map(&self) -> Map<String, Json> {
        self.tokens
            .iter()
            .enumerate()
            .map(|(id, token)| (token.clone(), id.into()))
            .collect()
    }

    /// Control tokens are special; user-defined ones are found in any text, as the models' own files have it.
    fn added(&self, specials: &BTreeMap<String, String>, strip: bool) -> Vec<Json> {
        let named: HashSet<&String> = specials.values().collect();
        (0..self.tokens.len())
            .filter(|id| {
                matches!(self.types[*id], CONTROL | UNKNOWN | USER_DEFINED)
                    || named.contains(&self.tokens[*id])
            })
            .filter(|id| !self.tokens[*id].is_empty())
            .map(|id| {
                json!({
                    "id": id,
                    "content": self.tokens[id],
                    "single_word": false,
                    "lstrip": false,
                    "rstrip": strip && !["<unk>", "<s>", "<|endoftext|>"].contains(&&*self.tokens[id]),
                    "normalized": false,
                    "special": self.types[id] != USER_DEFINED,
                })
            })
            .collect()
    }
}

/// Typed look-ups; an entry of another type is an error that names it.
struct Entries<'a>(&'a HashMap<String, Value>);

impl<'a> Entries<'a> {
    fn get<T>(
        &self,
        key: &str,
        what: &str,
        of: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let value = self.0.get(key);
        value
            .map(|value| of(value).with_context(|| format!("{key}: not {what}")))
            .transpose()
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>> {
        self.get(key, "a string", |value| match value {
            Value::Text(text) => Some(text.as_str()),
            _ => None,
        })
    }

    fn texts(&self, key: &str) -> Result<Option<&'a [String]>> {
        self.get(key, "an array of strings", |value| match value {
            Value::Texts(texts) => Some(texts.as_slice()),
            _ => None,
        })
    }

    fn reals(&self, key: &str) -> Result<Option<&'a [f64]>> {
        self.get(key, "an array of floats", |value| match value {
            Value::Reals(reals) => Some(reals.as_slice()),
            _ => None,
        })
    }

    fn wholes(&self, key: &str) -> Result<Option<&'a [i128]>> {
        self.get(key, "an array of whole numbers", |value| match value {
            Value::Wholes(wholes) => Some(wholes.as_slice()),
            _ => None,
        })
    }

    fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.get(key, "a boolean", |value| match value {
            Value::Flag(flag) => Some(*flag),
            _ => None,
        })
    }

    fn id(&self, key: &str) -> Result<Option<u32>> {
        self.get(key, "a token id", |value| match value {
            Value::Whole(id) => u32::try_from(*id).ok(),
            _ => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::chat::Chat;

    fn strings(items: &[&str]) -> Value {
        Value::Texts(items.iter().map(|item| (*item).to_owned()).collect())
    }

    /// The metadata of a GGUF from the golden file of make_gguf_tokenizers.py.
    fn metadata(entries: &Map<String, Json>) -> HashMap<String, Value> {
        let value = |key: &str, item: &Json| match item {
            Json::String(text) => Value::Text(text.clone()),
            Json::Bool(flag) => Value::Flag(*flag),
            Json::Array(items) if items.iter().all(Json::is_string) => Value::Texts(
                items
                    .iter()
                    .map(|item| item.as_str().unwrap().to_owned())
                    .collect(),
            ),
            Json::Array(items) if key.ends_with("scores") => {
                Value::Reals(items.iter().map(|item| item.as_f64().unwrap()).collect())
            }
            Json::Array(items) => Value::Wholes(
                items
                    .iter()
                    .map(|item| item.as_i64().unwrap().into())
                    .collect(),
            ),
            other => Value::Whole(other.as_u64().unwrap().into()),
        };
        entries
            .iter()
            .map(|(key, item)| (key.clone(), value(key, item)))
            .collect()
    }

    #[test]
    fn every_kind_of_tokenizer_agrees_with_its_reference() {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../tests/golden/gguf_tokenizers.json"
        );
        let golden: Json = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        for case in golden.as_array().unwrap() {
            let chat = Chat::from_gguf(&metadata(case["metadata"].as_object().unwrap())).unwrap();
            for row in case["texts"].as_array().unwrap() {
                let text = row["text"].as_str().unwrap();
                let ids: Vec<u32> = serde_json::from_value(row["ids"].clone()).unwrap();
                assert_eq!(
                    chat.response_ids(text, false).unwrap(),
                    ids,
                    "{} {text:?}",
                    case["name"]
                );
                assert_eq!(chat.decode(&ids).unwrap(), row["decoded"].as_str().unwrap());
            }
            let begin = chat
                .prompt_ids(&crate::records::Prompt::Text("x".into()))
                .unwrap()[0];
            assert_eq!(
                begin == 1,
                case["bos"].as_bool().unwrap(),
                "{}",
                case["name"]
            );
        }
    }

    #[test]
    fn a_template_without_bos_gets_one_when_the_file_asks_for_it() {
        let mut entries = small();
        entries.insert("tokenizer.ggml.add_bos_token".into(), Value::Flag(true));
        for template in [
            "{{ messages[0].content }}",
            "{{ bos_token }}{{ messages[0].content }}",
        ] {
            entries.insert(
                "tokenizer.chat_template".into(),
                Value::Text(template.into()),
            );
            let chat = Chat::from_gguf(&entries).unwrap();
            assert_eq!(
                chat.prompt_ids(&crate::records::Prompt::Text("ab".into()))
                    .unwrap(),
                [0, 4]
            );
        }
    }

    /// The ids that llama.cpp gives, and transformers: no line's end after a role, nor after the end of a turn.
    #[test]
    fn special_tokens_of_phi_3_take_the_white_space_after_them() {
        let tokens = [
            "<unk>", "<s>", "</s>", "▁", "a", "▁a", "<0x0A>", "<|end|>", "<|user|>",
        ];
        let mut entries = HashMap::from([
            (
                "tokenizer.ggml.model".to_owned(),
                Value::Text("llama".into()),
            ),
            ("tokenizer.ggml.tokens".to_owned(), strings(&tokens)),
            (
                "tokenizer.ggml.token_type".to_owned(),
                Value::Wholes(vec![2, 3, 3, 1, 1, 1, 6, 3, 3]),
            ),
            (
                "tokenizer.ggml.scores".to_owned(),
                Value::Reals(vec![0.0, 0.0, 0.0, -2.0, -3.0, -1.0, 0.0, 0.0, 0.0]),
            ),
            (
                "tokenizer.ggml.add_bos_token".to_owned(),
                Value::Flag(false),
            ),
            ("tokenizer.ggml.eos_token_id".to_owned(), Value::Whole(7)),
            (
                "tokenizer.chat_template".to_owned(),
                Value::Text("<|user|>\n{{ messages[0].content }}<|end|>\n".into()),
            ),
        ]);
        let mut ids = |architecture: &str| {
            let name = Value::Text(architecture.into());
            entries.insert("general.architecture".to_owned(), name);
            let chat = Chat::from_gguf(&entries).unwrap();
            let prompt = crate::records::Prompt::Text("a".into());
            chat.prompt_ids(&prompt).unwrap()
        };
        assert_eq!(ids("phi3"), [8, 5, 7]);
        assert_eq!(ids("llama"), [8, 3, 6, 4, 7]);
    }

    fn small() -> HashMap<String, Value> {
        HashMap::from([
            (
                "tokenizer.ggml.model".to_owned(),
                Value::Text("gpt2".into()),
            ),
            ("tokenizer.ggml.pre".to_owned(), Value::Text("gpt-2".into())),
            (
                "tokenizer.ggml.tokens".to_owned(),
                strings(&["<s>", "</s>", "a", "b", "ab"]),
            ),
            (
                "tokenizer.ggml.token_type".to_owned(),
                Value::Wholes(vec![3, 3, 1, 1, 1]),
            ),
            ("tokenizer.ggml.merges".to_owned(), strings(&["a b"])),
            ("tokenizer.ggml.bos_token_id".to_owned(), Value::Whole(0)),
            ("tokenizer.ggml.eos_token_id".to_owned(), Value::Whole(1)),
        ])
    }

    /// The template names one; an answer is in a channel, which it puts before what it is given.
    #[test]
    fn turns_of_gpt_oss_end_by_tokens_that_files_leave_unsaid() {
        let marks = [
            "<|return|>",
            "<|call|>",
            "<|end|>",
            "<|start|>",
            "<|message|>",
            "<|channel|>",
        ];
        let mut entries = small();
        let tokens = [&["<s>", "</s>", "a", "b", "ab"], &marks[..]].concat();
        entries.insert("tokenizer.ggml.tokens".to_owned(), strings(&tokens));
        let types = [vec![3, 3, 1, 1, 1], vec![3; marks.len()]].concat();
        entries.insert("tokenizer.ggml.token_type".to_owned(), Value::Wholes(types));
        let template = "{% for m in messages %}<|start|>{% if m.role == 'assistant' %}<|channel|>{% endif %}<|message|>\
            {{ m.content }}{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}\
            {% if add_generation_prompt %}<|start|>{% endif %}";
        let template = Value::Text(template.into());
        entries.insert("tokenizer.chat_template".to_owned(), template);
        let mut open = |architecture: &str| {
            let name = Value::Text(architecture.into());
            entries.insert("general.architecture".to_owned(), name);
            Chat::from_gguf(&entries).unwrap()
        };
        let chat = open("gpt-oss");
        assert_eq!((chat.end_of_turn(), chat.end_ids()), (5, &[1, 5, 6][..]));
        assert!(chat.opens_answers());
        assert_eq!(open("llama").end_ids(), [1, 5]);
    }

    #[test]
    fn damaged_entries_are_one_clear_line() {
        let cases = [
            (
                "tokenizer.ggml.pre",
                Value::Text("martian".into()),
                "\"martian\" is not a known pre-tokenizer",
            ),
            (
                "tokenizer.ggml.model",
                Value::Text("t5".into()),
                "\"t5\" is not supported",
            ),
            (
                "tokenizer.ggml.model",
                Value::Whole(1),
                "tokenizer.ggml.model",
            ),
            (
                "tokenizer.ggml.tokens",
                strings(&["a", "a"]),
                "token_type has 5 entries for 2 tokens",
            ),
            (
                "tokenizer.ggml.tokens",
                strings(&["a", "b", "c", "d", "a"]),
                "\"a\" stands there twice",
            ),
            (
                "tokenizer.ggml.tokens",
                Value::Whole(3),
                "tokenizer.ggml.tokens",
            ),
            ("tokenizer.ggml.merges", strings(&["ab"]), "merges[0]"),
            (
                "tokenizer.ggml.merges",
                strings(&["a zz"]),
                "tokenizer.ggml",
            ),
            (
                "tokenizer.ggml.eos_token_id",
                Value::Whole(5),
                "eos_token_id: 5 is outside",
            ),
            (
                "tokenizer.ggml.eos_token_id",
                Value::Whole(-1),
                "not a token id",
            ),
            (
                "tokenizer.ggml.eot_token_id",
                Value::Whole(9),
                "eot_token_id: 9 is outside",
            ),
        ];
        assert!(Chat::from_gguf(&small()).is_ok());
        for (key, value, expected) in cases {
            let mut entries = small();
            entries.insert(key.to_owned(), value);
            let message = format!("{:#}", Chat::from_gguf(&entries).err().expect(key));
            assert!(message.contains(expected), "{key}: {message}");
            assert_eq!(message.lines().count(), 1);
        }
        assert!(Chat::from_gguf(&HashMap::new()).is_err());
    }
}
