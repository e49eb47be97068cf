//! What a run of DICE left in its folder, round by round: only what is there, nothing else is assumed.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use common::jsonl::{Row, rows};
use common::metrics::{Sample, SampleFigures, SampleSet};
use common::program;
use common::reward::{Point, best_and_worst};
use serde_json::Value;

/// One round's folder, read.
pub struct Round {
    pub name: String,
    /// The samples that became pairs, before training (scored.jsonl).
    pub samples: Option<Samples>,
    /// Samples of check prompts by the policy before and after training (before.jsonl, after.jsonl).
    pub before: Option<Samples>,
    pub after: Option<Samples>,
    pub pairs: Option<Pairs>,
    /// What dice-pairs says of its choice (pairs.stats.json).
    pub stats: Option<Value>,
    /// dice-train's steps (steps.jsonl).
    pub steps: Vec<Value>,
    /// Rows of `dice-eval win-rate` (win-rate.jsonl).
    pub win_rates: Vec<Value>,
    /// Settings and fingerprints of the training (trainer_state.json of the new policy).
    pub trainer: Option<Value>,
    /// The shell's record of the round (commands.sh).
    pub commands: Option<String>,
}

/// A file of samples.
pub struct Samples {
    pub figures: SampleFigures,
    /// (characters, reward)
    pub points: Vec<(f64, f64)>,
    /// The first sample of each prompt, by the prompt's id.
    pub first: Vec<(String, Shown)>,
    /// Finished samples with a reward, by prompt: what α chose from.
    candidates: HashMap<String, Vec<Point>>,
    /// Every fingerprint in the rows: (role, fingerprint).
    pub fingerprints: Vec<(String, String)>,
}

/// A response to look at.
#[derive(Clone)]
pub struct Shown {
    pub prompt: String,
    pub response: String,
    pub reward: Option<f64>,
    pub truncated: bool,
}

/// The generated pairs of a round: lengths and scores of chosen and rejected, as trained on and as they would have been
/// at α = 0.
#[derive(Default)]
pub struct Pairs {
    pub generated: usize,
    pub replayed: usize,
    pub lengths: [Vec<f64>; 2],
    pub scores: [Vec<f64>; 2],
    pub lengths_without: [Vec<f64>; 2],
    pub scores_without: [Vec<f64>; 2],
}

/// The rounds of a run, in order: the folders `round-1`, `round-2`, …, or the folder itself.
///
/// # Errors
/// A folder in which there is nothing to report, or a file in it that is broken.
pub fn read(run: &Path) -> Result<Vec<Round>> {
    let mut folders: Vec<(u64, PathBuf)> = vec![];
    let entries = fs::read_dir(run).with_context(|| format!("cannot open {}", run.display()))?;
    for entry in entries {
        let path = entry?.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if let Some(number) = name.strip_prefix("round-").and_then(|n| n.parse().ok())
            && path.is_dir()
        {
            folders.push((number, path));
        }
    }
    folders.sort();
    if folders.is_empty() {
        folders.push((1, run.to_owned()));
    }
    let mut rounds = vec![];
    for (number, folder) in folders {
        program::check()?;
        let policy = run.join(format!("policy-{number}"));
        rounds.push(Round::read(&folder, number, &policy)?);
    }
    ensure!(
        rounds
            .iter()
            .any(|r| r.samples.is_some() || !r.steps.is_empty() || r.pairs.is_some()),
        "{}: there is no round-1 with scored.jsonl, pairs.jsonl or steps.jsonl in it",
        run.display()
    );
    Ok(rounds)
}

impl Round {
    fn read(folder: &Path, number: u64, policy: &Path) -> Result<Self> {
        let file = |name: &str| Some(folder.join(name)).filter(|path| path.is_file());
        let samples = |name: &str| file(name).map(|path| Samples::read(&path)).transpose();
        let values = |name: &str| -> Result<Vec<Value>> {
            let Some(path) = file(name) else {
                return Ok(vec![]);
            };
            rows(&[path])
                .map(|row| Ok(Value::Object(row?.fields)))
                .collect()
        };
        let scored = samples("scored.jsonl")?;
        let pairs = file("pairs.jsonl")
            .map(|path| Pairs::read(&path, scored.as_ref()))
            .transpose()?;
        Ok(Self {
            name: format!("round {number}"),
            before: samples("before.jsonl")?,
            after: samples("after.jsonl")?,
            pairs,
            stats: file("pairs.stats.json")
                .map(|path| json(&path))
                .transpose()?,
            steps: values("steps.jsonl")?,
            win_rates: values("win-rate.jsonl")?,
            trainer: Some(policy.join("trainer_state.json"))
                .filter(|path| path.is_file())
                .map(|path| json(&path))
                .transpose()?,
            commands: file("commands.sh")
                .map(|path| {
                    let text = fs::read_to_string(&path);
                    text.with_context(|| format!("cannot read {}", path.display()))
                })
                .transpose()?,
            samples: scored,
        })
    }

    /// A column of the steps: (step, value).
    pub fn course(&self, column: &str) -> Vec<(f64, f64)> {
        let points = self
            .steps
            .iter()
            .filter_map(|step| Some((step.get("step")?.as_f64()?, step.get(column)?.as_f64()?)));
        points.collect()
    }
}

fn json(path: &Path) -> Result<Value> {
    let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("{} is not JSON", path.display()))
}

impl Samples {
    fn read(path: &Path) -> Result<Self> {
        let mut set = SampleSet::default();
        let (mut points, mut first, mut fingerprints) = (vec![], vec![], vec![]);
        let mut candidates: HashMap<String, Vec<Point>> = HashMap::new();
        for row in rows(&[path.to_owned()]) {
            let row = row?;
            let id = row.id()?;
            let response = row.string("response")?;
            let finish = row.finish_reason("finish_reason")?;
            let truncated = finish == common::jsonl::FinishReason::Length;
            let reward = row.opt_number("reward")?;
            set.add(Sample {
                prompt: &id,
                response,
                tokens: row.opt_ids("token_ids")?.map(|ids| ids.len() as u64),
                finish,
                reward,
            });
            let length = response.chars().count();
            if let Some(reward) = reward {
                points.push((length as f64, reward));
                if !truncated {
                    candidates.entry(id.clone()).or_default().push(Point {
                        reward,
                        length: length as u64,
                    });
                }
            }
            for role in ["model", "policy", "ref"] {
                if let Some(fingerprint) = row.opt_string(role)? {
                    let named = (role.to_owned(), fingerprint.to_owned());
                    if !fingerprints.contains(&named) {
                        fingerprints.push(named);
                    }
                }
            }
            // Rows of a prompt are neighbours: the last one tells whether this is its first.
            if first.last().is_none_or(|(last, _)| *last != id) {
                let shown = Shown {
                    prompt: prompt_text(&row)?,
                    response: response.to_owned(),
                    reward,
                    truncated,
                };
                first.push((id, shown));
            }
        }
        Ok(Self {
            figures: set.figures(),
            points,
            first,
            candidates,
            fingerprints,
        })
    }
}

fn prompt_text(row: &Row) -> Result<String> {
    let messages = row.prompt()?.messages();
    let last = messages.last().and_then(|m| m.get("content")?.as_str());
    Ok(last.unwrap_or_default().to_owned())
}

impl Pairs {
    /// The share of replayed pairs; NaN of none.
    pub fn gamma(&self) -> f64 {
        self.replayed as f64 / (self.generated + self.replayed) as f64
    }

    fn read(path: &Path, samples: Option<&Samples>) -> Result<Self> {
        let mut found = Self::default();
        for row in rows(&[path.to_owned()]) {
            let row = row?;
            if row.opt_string("source")? == Some("replay") {
                found.replayed += 1;
                continue;
            }
            found.generated += 1;
            for (side, name) in ["chosen", "rejected"].into_iter().enumerate() {
                found.lengths[side].push(row.response(name)?.chars().count() as f64);
                found.scores[side].extend(row.opt_number(&format!("score_{name}"))?);
            }
            let candidates = samples.and_then(|samples| samples.candidates.get(&row.id().ok()?));
            let Some(candidates) = candidates else {
                continue;
            };
            if let Some((best, worst)) = best_and_worst(candidates, 0.0) {
                for (side, at) in [best, worst].into_iter().enumerate() {
                    found.lengths_without[side].push(candidates[at].length as f64);
                    found.scores_without[side].push(candidates[at].reward);
                }
            }
        }
        Ok(found)
    }
}
