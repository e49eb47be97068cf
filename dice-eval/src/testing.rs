//! What the tests share: the tool as a function, and the real annotations beside the checkout.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Parser;
use serde_json::Value;

/// Runs `dice-eval COMMAND WORDS` in this process; the rows that it would have printed.
pub fn eval<'a>(command: &str, words: impl IntoIterator<Item = &'a str>) -> Result<Vec<Value>> {
    let text = text(command, words)?;
    Ok(text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect())
}

/// The same as text, for other formats.
pub fn text<'a>(command: &str, words: impl IntoIterator<Item = &'a str>) -> Result<String> {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let start = ["dice-eval", command, "--output", out.to_str().unwrap()];
    let mut all: Vec<String> = start.map(str::to_owned).to_vec();
    all.extend(words.into_iter().map(str::to_owned));
    let args = crate::Args::try_parse_from(all)?;
    crate::run(args)?;
    Ok(std::fs::read_to_string(out).unwrap())
}

/// The folder of AlpacaEval's annotations, which no licence lets into this repository: DICE_SHARED, or `shared` beside
/// the checkout. `None`, with a word on stderr, where it is not there.
pub fn alpaca_eval() -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared");
    let shared = std::env::var_os("DICE_SHARED").map_or(root, PathBuf::from);
    let data = shared.join("data/alpaca_eval");
    if data.is_dir() {
        return Some(data);
    }
    eprintln!(
        "skipped: {} is not there (DICE_SHARED names its place)",
        data.display()
    );
    None
}

/// (name, file of annotations, expected figures) of every model there.
pub fn models(data: &Path) -> Vec<(String, String, Value)> {
    let text = std::fs::read_to_string(data.join("expected.json")).unwrap();
    let expected: Value = serde_json::from_str(&text).unwrap();
    let models = expected.as_object().unwrap().iter();
    models
        .map(|(name, figures)| {
            let file = data.join(format!("annotations/{name}.jsonl"));
            (name.clone(), file.display().to_string(), figures.clone())
        })
        .collect()
}
