//! The outputs of two models, joined by prompt.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use anyhow::{Result, ensure};
use common::jsonl::Row;
use common::program;
use common::records::{Prompt, SAMPLE_FIELDS};
use serde_json::{Map, Value};

use crate::lists::list_or_lines;

/// Two outputs for one prompt.
pub struct Pair {
    /// The rows that hold them: the baseline's and the model's.
    pub rows: [Row; 2],
    pub prompt: Prompt,
    pub outputs: [String; 2],
}

/// What the tools here call a prompt and an output, and what AlpacaEval calls them.
const PROMPT: [&str; 2] = ["prompt", "instruction"];
const OUTPUT: [&str; 2] = ["response", "output"];

/// Reads both files and pairs the first output of each prompt, in the order of the first file.
///
/// # Errors
/// A field that is missing or wrong; no prompt in common.
pub fn pairs(a: &Path, b: &Path) -> Result<Vec<Pair>> {
    let [(first, repeated_a), (second, repeated_b)] = [firsts(a)?, firsts(b)?];
    let (in_a, in_b) = (first.len(), second.len());
    let mut second: HashMap<_, _> = second.into_iter().map(|one| (one.key, one)).collect();
    let pairs: Vec<Pair> = first
        .into_iter()
        .filter_map(|one| {
            let other = second.remove(&one.key)?;
            Some(Pair {
                rows: [one.row, other.row],
                prompt: one.prompt,
                outputs: [one.output, other.output],
            })
        })
        .collect();
    ensure!(
        !pairs.is_empty(),
        "{} and {} have no prompt in common",
        a.display(),
        b.display()
    );
    let alone = in_a + in_b - 2 * pairs.len();
    for (count, what) in [
        (alone, "prompts are in one file only and are left out"),
        (
            repeated_a + repeated_b,
            "further outputs of a prompt are left out: its first one is judged",
        ),
    ] {
        if count > 0 {
            program::say(format_args!("{count} {what}"));
        }
    }
    Ok(pairs)
}

struct First {
    /// Of the prompt.
    key: [u8; 32],
    row: Row,
    prompt: Prompt,
    output: String,
}

/// Each prompt's first output, and the number of further ones.
fn firsts(file: &Path) -> Result<(Vec<First>, usize)> {
    let (mut found, mut seen, mut repeated) = (vec![], HashSet::new(), 0);
    for row in list_or_lines(file)? {
        let row = row?;
        let [prompt, output] = [PROMPT, OUTPUT].map(|[ours, theirs]| {
            let is_theirs = !row.fields.contains_key(ours) && row.fields.contains_key(theirs);
            if is_theirs { theirs } else { ours }
        });
        let output = row.string(output)?.to_owned();
        let value = row.fields.get(prompt).cloned().unwrap_or_default();
        let prompt = Prompt::from_value(&value).map_err(|err| row.error(prompt, err))?;
        let key = *prompt.key().as_bytes();
        if seen.insert(key) {
            found.push(First {
                key,
                row,
                prompt,
                output,
            });
        } else {
            repeated += 1;
        }
    }
    Ok((found, repeated))
}

impl Pair {
    /// The prompt as one text: a conversation becomes its turns under their roles.
    pub fn instruction(&self) -> String {
        match &self.prompt {
            Prompt::Text(text) => text.clone(),
            Prompt::Messages(messages) => {
                let part = |message: &Map<String, Value>, field: &str| {
                    message[field].as_str().unwrap_or_default().to_owned()
                };
                match &messages[..] {
                    [only] => part(only, "content"),
                    turns => turns
                        .iter()
                        .map(|turn| format!("{}: {}", part(turn, "role"), part(turn, "content")))
                        .collect::<Vec<_>>()
                        .join("\n\n"),
                }
            }
        }
    }

    /// The fields that both rows have alike, but for those of a single sample.
    pub fn shared_fields(&self) -> impl Iterator<Item = (&String, &Value)> {
        const SHOWN: [&str; 3] = ["prompt", "instruction", "output"];
        let [one, other] = &self.rows;
        one.fields.iter().filter(move |(name, value)| {
            let name = name.as_str();
            let own = SHOWN.contains(&name) || SAMPLE_FIELDS.contains(&name);
            !own && other.fields.get(name) == Some(*value)
        })
    }
}

/// What to call the makers of both files: `generator` or `model` of their rows, else the files' names. Two files of one
/// name would look like a model judged against itself: they go by their files' names.
pub fn generators(files: [&Path; 2], pairs: &[Pair]) -> [String; 2] {
    let stem = |side: usize| {
        let stem = files[side].file_stem().unwrap_or(files[side].as_os_str());
        stem.to_string_lossy().into_owned()
    };
    let named = |side: usize| {
        let fields = &pairs[0].rows[side].fields;
        let name = ["generator", "model"]
            .into_iter()
            .find_map(|f| fields.get(f)?.as_str());
        name.map_or_else(|| stem(side), str::to_owned)
    };
    let names = [named(0), named(1)];
    if names[0] == names[1] && files[0] != files[1] {
        return match [stem(0), stem(1)] {
            [a, b] if a == b => files.map(|file| file.display().to_string()),
            stems => stems,
        };
    }
    names
}
