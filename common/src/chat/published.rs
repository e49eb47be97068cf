//! What published models come with, as llama.cpp's sources have it (`just published` fetches it): vocabularies in GGUF with
//! the ids that the models' own tokenizers give some fifty texts, and chat templates.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use serde_json::{Map, Value as Json};

use super::template::Template;
use super::{Chat, opening, strftime};
use crate::records::turn;

/// What stands between two texts of a `.inp` file.
const BETWEEN: &str = "\n__ggml_vocab_test__\n";

/// DICE_PUBLISHED, or where the recipe puts them; none, with a word on stderr, if they are not there.
fn published() -> Option<PathBuf> {
    let cache = env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| Some(Path::new(&env::var_os("HOME")?).join(".cache")));
    let usual = cache.map(|cache| cache.join("dice/published"));
    let folder = env::var_os("DICE_PUBLISHED").map(PathBuf::from).or(usual)?;
    if folder.is_dir() {
        return Some(folder);
    }
    eprintln!(
        "skipped: {} is not there (`just published` fetches it)",
        folder.display()
    );
    None
}

/// Files of a folder with an ending, in order.
fn files(folder: &Path, ending: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap();
    let paths: BTreeSet<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    let has_it = |path: &PathBuf| path.to_string_lossy().ends_with(ending);
    paths.into_iter().filter(has_it).collect()
}

#[test]
fn texts_have_the_ids_of_the_models_own_tokenizers() {
    let Some(folder) = published() else { return };
    let mut right = vec![];
    for inputs in files(&folder, ".gguf.inp") {
        let file = inputs.with_extension("");
        let name = file.file_stem().unwrap().to_string_lossy().into_owned();
        let chat = match Chat::open(&file) {
            Ok(chat) => chat,
            Err(err) => {
                // Of models that are none of ours.
                let message = format!("{err:#}");
                assert!(message.ends_with("use the model's HF folder"), "{message}");
                continue;
            }
        };
        let texts = fs::read_to_string(&inputs).unwrap();
        let expected = fs::read_to_string(file.with_extension("gguf.out")).unwrap();
        for (text, line) in texts.split(BETWEEN).zip(expected.lines()) {
            let ids = chat.response_ids(text, false).unwrap();
            let written: Vec<String> = ids.iter().map(u32::to_string).collect();
            assert_eq!(written.join(" "), line.trim(), "{name}: {text:?}");
            assert_eq!(chat.decode(&ids).unwrap(), text, "{name}");
        }
        right.push(name.trim_start_matches("ggml-vocab-").to_owned());
    }
    let ours = "command-r gemma-4 gpt-2 llama-bpe llama-spm phi-3 qwen2 qwen35 refact starcoder";
    assert_eq!(right.join(" "), ours);
}

#[test]
fn templates_write_what_they_write_in_transformers() {
    let Some(folder) = published() else { return };
    let Ok(python) = env::var("DICE_PYTHON") else {
        eprintln!("skipped: DICE_PYTHON names no Python that has transformers");
        return;
    };
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let rendered = Command::new(python)
        .arg(root.join("../tests/golden/render_templates.py"))
        .args([folder.join("templates"), strftime::today().into()])
        .output()
        .unwrap();
    assert!(
        rendered.status.success(),
        "{}",
        String::from_utf8_lossy(&rendered.stderr)
    );
    let specials = ["bos", "eos", "unk", "pad"].map(|name| format!("{name}_token"));
    let tokens = ["<s>", "</s>", "<unk>", "<pad>"].map(str::to_owned);
    let specials = specials.into_iter().zip(tokens).collect();
    let templates: BTreeMap<String, Template> = files(&folder.join("templates"), ".jinja")
        .into_iter()
        .map(|file| {
            let source = fs::read_to_string(&file).unwrap();
            let name = file.file_name().unwrap().to_string_lossy().into_owned();
            let template = Template::new(&source, &specials);
            (
                name.clone(),
                template.unwrap_or_else(|err| panic!("{name}: {err}")),
            )
        })
        .collect();
    let mut conversations = 0;
    for row in String::from_utf8(rendered.stdout).unwrap().lines() {
        let row: Json = serde_json::from_str(row).unwrap();
        let name = row["template"].as_str().unwrap();
        let [messages, more] = ["messages", "more"].map(|field| row[field].clone());
        // It adds a tool's text to one that is marked as `safe`, which in Python escapes what is added.
        if name.starts_with("meetkai-functionary-medium-v3.1") && more.get("tools").is_some() {
            continue;
        }
        let messages: Vec<Map<String, Json>> = serde_json::from_value(messages).unwrap();
        let generation = row["add_generation_prompt"].as_bool().unwrap();
        let text = templates[name]
            .render_with(&messages, generation, more.as_object().unwrap())
            .unwrap_or_else(|err| panic!("{name}: {row}: {err}"));
        assert_eq!(text, row["text"].as_str().unwrap(), "{name}: {row}");
        conversations += 1;
    }
    assert!(
        templates.len() > 60 && conversations > 1500,
        "{conversations}"
    );
}

/// What stands before the text of an answer that is given as a message, as TRL has it of transformers' rendering.
#[test]
fn answers_are_opened_as_published_templates_do() {
    let Some(folder) = published() else { return };
    for (name, expected) in [
        ("Qwen-Qwen3-0.6B", Some("<think>\n\n</think>\n\n")),
        ("openai-gpt-oss-120b", Some("<|channel|>final<|message|>")),
        ("Qwen-Qwen2.5-7B-Instruct", None),
        ("meta-llama-Llama-3.1-8B-Instruct", None),
    ] {
        let file = folder.join("templates").join(format!("{name}.jinja"));
        let source = fs::read_to_string(file).unwrap();
        let template = Template::new(&source, &BTreeMap::new()).unwrap();
        let messages = [turn("user", "Why?"), turn("assistant", "So it is.")];
        let opening = opening(&template, &messages, &Map::new()).unwrap();
        assert_eq!(opening.as_deref(), expected, "{name}");
    }
}
