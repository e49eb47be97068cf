//! Reads the chat files of a Hugging Face folder: tokenizer, special tokens, template, end-of-turn ids.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value as Json};
use tokenizers::{AddedToken, Tokenizer};

use super::Parts;
use super::contained::contained;
use super::encoder::tokenizer_error;

/// Largest chat file that is read, in bytes; the largest tokenizer.json in use are about 35 MB.
const MAX_FILE: u64 = 512 << 20;

/// Files that belong to the tokenizer: kept as they are and written again with a checkpoint.
const KEPT: [&str; 10] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
];

/// The names under which HF passes special tokens to a template.
pub const SPECIALS: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

/// Reads what a folder says about text.
pub fn read(dir: &Path) -> Result<Parts> {
    let mut files = BTreeMap::new();
    for name in KEPT {
        if let Some(bytes) = read_file(dir, name)? {
            files.insert(name.to_owned(), bytes);
        }
    }
    let Some(bytes) = files.get("tokenizer.json") else {
        bail!(
            "{}: no tokenizer.json (save the model's fast tokenizer there)",
            dir.display()
        );
    };
    let place = |name: &str| dir.join(name).display().to_string();
    let mut tokenizer = contained(|| Tokenizer::from_bytes(bytes).map_err(tokenizer_error))
        .with_context(|| place("tokenizer.json"))?;
    check_added(&tokenizer, bytes).with_context(|| place("tokenizer.json"))?;

    let config = parse(dir, "tokenizer_config.json", &files)?;
    let map = parse(dir, "special_tokens_map.json", &files)?;
    add_missing(&mut tokenizer, &config).with_context(|| place("tokenizer_config.json"))?;
    let specials = specials(&mut tokenizer, [&config, &map])
        .with_context(|| place("tokenizer_config.json"))?;

    let mut end_ids = Vec::new();
    let model = read_file(dir, "config.json")?
        .map(|bytes| object(&bytes).with_context(|| place("config.json")))
        .transpose()?
        .unwrap_or_default();
    let generation = parse(dir, "generation_config.json", &files)?;
    let text = model.get("text_config").and_then(Json::as_object);
    for (name, object) in [
        ("generation_config.json", Some(&generation)),
        ("config.json", Some(&model)),
        ("config.json", text),
    ] {
        let ids = object.and_then(|object| object.get("eos_token_id"));
        end_ids.extend(eos_ids(ids).with_context(|| place(name))?);
    }
    let template = template(dir, &config, &files)?;
    Ok(Parts {
        tokenizer,
        template,
        specials,
        end_ids,
        add_bos: false,
        files,
    })
}

fn read_file(dir: &Path, name: &str) -> Result<Option<Vec<u8>>> {
    let path = dir.join(name);
    match fs::metadata(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| path.display().to_string()),
        Ok(meta) if meta.len() > MAX_FILE => bail!(
            "{}: {} bytes, more than the {MAX_FILE} that are accepted",
            path.display(),
            meta.len()
        ),
        Ok(_) => fs::read(&path)
            .map(Some)
            .with_context(|| path.display().to_string()),
    }
}

fn parse(dir: &Path, name: &str, files: &BTreeMap<String, Vec<u8>>) -> Result<Map<String, Json>> {
    match files.get(name) {
        Some(bytes) => object(bytes).with_context(|| dir.join(name).display().to_string()),
        None => Ok(Map::new()),
    }
}

fn object(bytes: &[u8]) -> Result<Map<String, Json>> {
    match serde_json::from_slice(bytes).context("not JSON")? {
        Json::Object(map) => Ok(map),
        _ => bail!("not a JSON object"),
    }
}

/// The tokenizers crate gives added tokens ids by its own count and only warns when the file says otherwise.
fn check_added(tokenizer: &Tokenizer, bytes: &[u8]) -> Result<()> {
    let file = object(bytes)?;
    for token in file
        .get("added_tokens")
        .and_then(Json::as_array)
        .into_iter()
        .flatten()
    {
        let (Some(content), Some(id)) = (token["content"].as_str(), token["id"].as_u64()) else {
            bail!("added_tokens: an entry without content and id");
        };
        let given = tokenizer.token_to_id(content);
        if given.map(u64::from) != Some(id) && !content.is_empty() {
            bail!(
                "added_tokens: {content:?} has the id {id}, but its place in the vocabulary is {given:?}"
            );
        }
    }
    Ok(())
}

/// Tokens that only tokenizer_config.json names join the vocabulary, as in transformers.
fn add_missing(tokenizer: &mut Tokenizer, config: &Map<String, Json>) -> Result<()> {
    let known = tokenizer.get_added_tokens_decoder();
    let Some(Json::Object(entries)) = config.get("added_tokens_decoder") else {
        return Ok(());
    };
    let mut missing = Vec::new();
    for (id, entry) in entries {
        let id: u32 = id
            .parse()
            .with_context(|| format!("added_tokens_decoder: {id:?} is not an id"))?;
        let content = entry["content"]
            .as_str()
            .context("added_tokens_decoder: an entry without content")?;
        if known.get(&id).is_some_and(|token| token.content == content) {
            continue;
        }
        let flag = |name: &str| entry[name].as_bool().unwrap_or(false);
        missing.push((
            id,
            AddedToken::from(content, flag("special"))
                .lstrip(flag("lstrip"))
                .rstrip(flag("rstrip"))
                .single_word(flag("single_word"))
                .normalized(flag("normalized")),
        ));
    }
    missing.sort_by_key(|(id, _)| *id);
    for (id, token) in missing {
        let content = token.content.clone();
        tokenizer.add_tokens([token]).map_err(tokenizer_error)?;
        if tokenizer.token_to_id(&content) != Some(id) {
            bail!("added_tokens_decoder: {content:?} does not have the id {id} in tokenizer.json");
        }
    }
    Ok(())
}

/// The named special tokens; those that the vocabulary holds but does not call special become so.
fn specials(
    tokenizer: &mut Tokenizer,
    sources: [&Map<String, Json>; 2],
) -> Result<BTreeMap<String, String>> {
    let mut specials = BTreeMap::new();
    for name in SPECIALS {
        let Some(text) = sources
            .iter()
            .find_map(|source| token_text(source.get(name)?))
        else {
            continue;
        };
        let Some(id) = tokenizer.token_to_id(text) else {
            bail!("{name}: {text:?} is not in tokenizer.json");
        };
        if !tokenizer.get_added_tokens_decoder().contains_key(&id) {
            tokenizer
                .add_special_tokens([AddedToken::from(text, true)])
                .map_err(tokenizer_error)?;
        }
        specials.insert(name.to_owned(), text.to_owned());
    }
    Ok(specials)
}

/// A special token is written as its text or as an object with a `content`.
fn token_text(value: &Json) -> Option<&str> {
    value.as_str().or_else(|| value["content"].as_str())
}

/// `eos_token_id` is absent, null, one id or a list of ids.
fn eos_ids(value: Option<&Json>) -> Result<Vec<u32>> {
    let one = |value: &Json| {
        value
            .as_u64()
            .and_then(|id| u32::try_from(id).ok())
            .with_context(|| format!("eos_token_id: {value} is not a token id"))
    };
    match value {
        None | Some(Json::Null) => Ok(Vec::new()),
        Some(Json::Array(ids)) => ids.iter().map(one).collect(),
        Some(id) => Ok(vec![one(id)?]),
    }
}

/// chat_template.jinja wins over the entry in tokenizer_config.json, as in transformers.
fn template(
    dir: &Path,
    config: &Map<String, Json>,
    files: &BTreeMap<String, Vec<u8>>,
) -> Result<Option<String>> {
    if let Some(bytes) = files.get("chat_template.jinja") {
        let text = String::from_utf8(bytes.clone())
            .with_context(|| dir.join("chat_template.jinja").display().to_string())?;
        return Ok(Some(text));
    }
    match config.get("chat_template") {
        None | Some(Json::Null) => Ok(None),
        Some(Json::String(text)) => Ok(Some(text.clone())),
        Some(Json::Array(named)) => default_template(named)
            .with_context(|| dir.join("tokenizer_config.json").display().to_string()),
        Some(_) => bail!(
            "{}: chat_template is neither a string nor a list of named ones",
            dir.join("tokenizer_config.json").display()
        ),
    }
}

/// Of several named templates, the one called `default`, or the only one.
fn default_template(named: &[Json]) -> Result<Option<String>> {
    let chosen = named
        .iter()
        .find(|entry| entry["name"] == "default")
        .or(if named.len() == 1 {
            named.first()
        } else {
            None
        });
    match chosen.and_then(|entry| entry["template"].as_str()) {
        Some(text) => Ok(Some(text.to_owned())),
        None => bail!(
            "chat_template: none of the {} named ones is called \"default\"",
            named.len()
        ),
    }
}
