//! `dice-eval samples`: lengths, truncation, distinctness and reward of samples, file by file (round by round).

use std::path::PathBuf;

use anyhow::Result;
use common::jsonl::{Row, rows};
use common::metrics::{Sample, SampleSet};
use common::program;
use common::progress::Progress;
use serde_json::{Map, Value, to_value};

use crate::format::{Line, To, average, estimate, number, percent};

/// Lengths, truncation, distinctness and reward of samples, file by file
///
/// Reads sample rows (dice-gen's, or dice-score's with "reward") and gives one row of figures per file: give it one file
/// per round. distinct_1 and distinct_2 are different words and word pairs over all; they fall with the amount of text, so
/// compare files of equal numbers of samples. distinct_responses is 1 where no sample repeats another of its prompt.
///
/// Memory: numbers and hashes of every row, no texts.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  dice-eval samples --format markdown runs/round-*/scored.jsonl")]
pub struct Args {
    /// Group by this field of the rows instead of by file
    #[arg(long, value_name = "FIELD")]
    by: Option<String>,
    #[command(flatten)]
    to: To,
    /// Files of samples (JSON Lines); `-` or none reads stdin
    #[arg(value_name = "FILE")]
    files: Vec<PathBuf>,
}

pub fn run(args: Args) -> Result<()> {
    let progress = Progress::new("rows", None);
    let mut groups: Vec<(String, SampleSet)> = vec![];
    for row in rows(&args.files) {
        let row = row?;
        program::check()?;
        let group = match &args.by {
            Some(field) => name(&row, field),
            None => row.place.file.to_string(),
        };
        let at = groups.iter().position(|(name, _)| *name == group);
        let at = at.unwrap_or_else(|| {
            groups.push((group, SampleSet::default()));
            groups.len() - 1
        });
        groups[at].1.add(Sample {
            prompt: &row.id()?,
            response: row.string("response")?,
            tokens: row.opt_ids("token_ids")?.map(|ids| ids.len() as u64),
            finish: row.finish_reason("finish_reason")?,
            reward: row.opt_number("reward")?,
        });
        progress.add(1, 0);
    }
    progress.finish();
    let lines: Result<Vec<_>> = groups.iter().map(|(name, set)| line(name, set)).collect();
    args.to.write(&lines?)
}

/// What a row's field says, as a group's name.
pub fn name(row: &Row, field: &str) -> String {
    match row.fields.get(field) {
        None | Some(Value::Null) => format!("no {field}"),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    }
}

fn line(name: &str, set: &SampleSet) -> Result<Line> {
    let figures = set.figures();
    let mut json = Map::from_iter([("group".to_owned(), name.into())]);
    if let Value::Object(fields) = to_value(&figures)? {
        json.extend(fields);
    }
    let cells = vec![
        ("samples of", name.to_owned()),
        ("samples", figures.samples.to_string()),
        ("prompts", figures.prompts.to_string()),
        ("characters", average(figures.chars)),
        ("tokens", average(figures.tokens)),
        ("truncated", percent(figures.truncated)),
        ("distinct-1", number(figures.distinct_1, 3)),
        ("distinct-2", number(figures.distinct_2, 3)),
        ("distinct responses", number(figures.distinct_responses, 3)),
        ("reward", estimate(figures.reward)),
        (
            "reward ~ length",
            number(figures.reward_length_correlation, 2),
        ),
    ];
    Ok(Line { json, cells })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn figures_by_field() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("s.jsonl");
        let row = |response: &str, round: u8, finish: &str, reward: f64| {
            json!({"prompt": "p", "response": response, "round": round, "finish_reason": finish, "reward": reward}).to_string() + "\n"
        };
        let text = row("one two", 1, "stop", 1.0)
            + &row("one", 2, "length", 3.0)
            + &row("two two three", 2, "stop", 5.0);
        std::fs::write(&file, text).unwrap();
        let out = dir.path().join("out.json");
        let run_args = |format: &str| {
            #[derive(clap::Parser)]
            struct Cli {
                #[command(flatten)]
                args: Args,
            }
            let words = [
                "x",
                "--by",
                "round",
                "--format",
                format,
                "-o",
                out.to_str().unwrap(),
                file.to_str().unwrap(),
            ];
            run(<Cli as clap::Parser>::parse_from(words).args).unwrap();
            std::fs::read_to_string(&out).unwrap()
        };
        let rows: Vec<Value> = run_args("json")
            .lines()
            .map(|l| serde_json::from_str(l).unwrap())
            .collect();
        assert_eq!(rows.len(), 2);
        assert_eq!(rows[0]["group"], "1");
        assert_eq!(rows[1]["samples"], 2);
        assert_eq!(rows[1]["chars"]["mean"], 8.0);
        assert_eq!(rows[1]["truncated"]["value"], 0.5);
        assert_eq!(rows[1]["reward"]["value"], 4.0);
        assert_eq!(rows[1]["tokens"], Value::Null);
        let table = run_args("markdown");
        assert_eq!(table.lines().count(), 4, "{table}");
        assert!(table.contains("| 2 | 2 | 1 | 8.0 | – | 50.0%"), "{table}");
    }
}
