//! `dice-eval pairs`: does the implicit reward prefer the chosen responses of preference pairs, and by how much?

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use common::jsonl::{Row, rows};
use common::metrics::{Estimate, Spread, correlation, mean, preferences, share, spread};
use common::policy::{Compute, Logps, Prefers, RewardModel, TOKENS_AT_ONCE, dtype_name};
use common::program::{self, Progress};
use common::records::Split;
use common::reward::implicit_reward;
use serde::Serialize;
use serde_json::{Map, Value, to_value};

use crate::format::{Line, To, average, estimate, number, percent};
use crate::samples::name;

/// Accuracy and margin of the implicit reward on preference pairs, overall and by source
///
/// Reads rows with "prompt", "chosen" and "rejected" and gives one row of figures for all of them and one for each value of
/// --by: the share of pairs whose chosen response has the higher reward (95% Wilson interval), the mean margin, lengths in
/// characters, and how much of the margin is length.
///
/// With --policy and --ref the pairs are scored, but for those that dice-score scored with these very models. Without,
/// every row must bring its log-probs (policy_chosen_logps, ref_chosen_logps, ... as dice-score writes them).
///
/// Example: dice-eval pairs --policy ./next --ref ./base --split test --format markdown preferences.jsonl
#[derive(clap::Args)]
pub struct Args {
    /// The tuned model pi: a Hugging Face folder, a .gguf file, or a hub id org/name[@revision]
    #[arg(long, requires = "reference")]
    policy: Option<String>,
    /// Its reference pi_ref, of the same vocabulary
    #[arg(long = "ref", requires = "policy")]
    reference: Option<String>,
    /// Scale of the reward
    #[arg(long, default_value_t = 0.1)]
    beta: f64,
    /// Group by this field of the rows, too
    #[arg(long, value_name = "FIELD", default_value = "source")]
    by: String,
    /// Take only the pairs whose prompt is in this part (by a stable hash, the same in every tool)
    #[arg(long, value_enum, default_value_t = Split::All)]
    split: Split,
    /// What to call all pairs in the output, where tables of several runs are put together
    #[arg(long, value_name = "TEXT", default_value = "all")]
    name: String,
    #[command(flatten)]
    compute: Compute,
    #[command(flatten)]
    to: To,
    /// Files of pairs (JSON Lines), read one after the other; `-` or none reads stdin
    #[arg(value_name = "FILE")]
    files: Vec<PathBuf>,
}

pub fn run(args: Args) -> Result<()> {
    let progress = Progress::new("dice-eval", "pairs", None);
    let mut scorer = Scorer::open(&args)?;
    let mut all = Group::default();
    let mut groups: Vec<(String, Group)> = vec![];
    let mut take = |scored: Vec<(Row, [Logps; 2])>| -> Result<()> {
        for (row, logps) in scored {
            let pair = Pair::new(&row, logps, args.beta)?;
            all.0.push(pair);
            if row.fields.contains_key(&args.by) {
                let group = name(&row, &args.by);
                match groups.iter_mut().find(|(name, _)| *name == group) {
                    Some((_, pairs)) => pairs.0.push(pair),
                    None => groups.push((group, Group(vec![pair]))),
                }
            }
            progress.add(1, 0);
        }
        Ok(())
    };
    for row in rows(&args.files) {
        let row = row?;
        program::check()?;
        if args.split.holds(&row.prompt()?) {
            take(scorer.push(row)?)?;
        } else {
            progress.skip("not in --split", 1);
        }
    }
    take(scorer.finish())?;
    progress.finish();
    let mut lines = vec![all.line(&args.name)?];
    // One group says nothing that the whole does not.
    if groups.len() > 1 {
        groups.sort_by(|a, b| a.0.cmp(&b.0));
        for (name, group) in &groups {
            lines.push(group.line(name)?);
        }
    }
    args.to.write(&lines)
}

/// Gives pairs their log-probs: from their rows, or from the models.
struct Scorer {
    models: Option<(RewardModel, (String, String))>,
    /// Pairs that wait until there are tokens enough for a forward pass.
    waiting: Vec<(Row, common::logprob::Group)>,
    tokens: usize,
}

impl Scorer {
    fn open(args: &Args) -> Result<Self> {
        let models = match (&args.policy, &args.reference) {
            (Some(policy), Some(reference)) => {
                let precision = args.compute.precision(Prefers::Exactness)?;
                let models = RewardModel::open(policy, reference, precision)?;
                program::say(format_args!("computing in {}", dtype_name(precision)));
                let fingerprints = models.fingerprints()?;
                Some((models, fingerprints))
            }
            _ => None,
        };
        Ok(Self {
            models,
            waiting: vec![],
            tokens: 0,
        })
    }

    /// Takes a pair; gives those that have their log-probs now.
    fn push(&mut self, row: Row) -> Result<Vec<(Row, [Logps; 2])>> {
        let Some((models, (policy, reference))) = &self.models else {
            let logps = given(&row).with_context(|| {
                "without --policy and --ref every row needs the log-probs that dice-score writes"
            })?;
            return Ok(vec![(row, logps)]);
        };
        let theirs =
            row.opt_string("policy")? == Some(policy) && row.opt_string("ref")? == Some(reference);
        if let (true, Ok(logps)) = (theirs, given(&row)) {
            return Ok(vec![(row, logps)]);
        }
        let group = models.encode(std::slice::from_ref(&row))?;
        ensure!(
            group.responses.len() == 2,
            row.error("chosen", "or \"rejected\" is missing")
        );
        let tokens = group.tokens();
        let ready = if self.tokens + tokens > TOKENS_AT_ONCE {
            self.finish()
        } else {
            vec![]
        };
        self.tokens += tokens;
        self.waiting.push((row, group));
        Ok(ready)
    }

    /// Scores the pairs that wait.
    fn finish(&mut self) -> Vec<(Row, [Logps; 2])> {
        let Some((models, _)) = &self.models else {
            return vec![];
        };
        self.tokens = 0;
        let (rows, groups): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.waiting).into_iter().unzip();
        let scores = models.score(&groups, vec![None; groups.len()]);
        rows.into_iter()
            .zip(scores)
            .map(|(row, logps)| (row, [logps[0], logps[1]]))
            .collect()
    }
}

/// The log-probs that a row brings.
fn given(row: &Row) -> Result<[Logps; 2]> {
    let of = |role: &str| -> Result<Logps> {
        Ok(Logps {
            policy: row.number(&format!("policy_{role}_logps"))?,
            reference: row.number(&format!("ref_{role}_logps"))?,
        })
    };
    Ok([of("chosen")?, of("rejected")?])
}

/// A preference pair as the figures see it.
#[derive(Clone, Copy)]
struct Pair {
    /// Implicit rewards of chosen and rejected.
    rewards: [f64; 2],
    /// Characters of chosen and rejected.
    chars: [f64; 2],
}

impl Pair {
    fn new(row: &Row, logps: [Logps; 2], beta: f64) -> Result<Self> {
        let chars = |field| Ok::<_, anyhow::Error>(row.string(field)?.chars().count() as f64);
        let rewards = logps.map(|l| implicit_reward(beta, l.policy, l.reference));
        ensure!(
            rewards.iter().all(|r| r.is_finite()),
            row.error(
                "chosen",
                "or \"rejected\" has a log-prob that is not a number"
            )
        );
        Ok(Self {
            rewards,
            chars: [chars("chosen")?, chars("rejected")?],
        })
    }
}

#[derive(Default)]
struct Group(Vec<Pair>);

/// The figures of a group, `null` where there are no pairs.
#[derive(Serialize)]
struct Figures {
    pairs: u64,
    accuracy: Option<Estimate>,
    margin: Option<Estimate>,
    #[serde(rename = "rewards/chosen")]
    rewards_chosen: Option<Estimate>,
    #[serde(rename = "rewards/rejected")]
    rewards_rejected: Option<Estimate>,
    chars_chosen: Option<Spread>,
    chars_rejected: Option<Spread>,
    /// Share of pairs whose chosen response is the longer; equal lengths count half.
    chosen_longer: Option<Estimate>,
    /// Pearson's, of the margin and the difference in length: 0 where the reward does not look at length.
    margin_length_correlation: Option<f64>,
}

impl Group {
    fn figures(&self) -> Figures {
        let side = |f: fn(&Pair) -> f64| self.0.iter().map(f).collect::<Vec<_>>();
        let margins = side(|p| p.rewards[0] - p.rewards[1]);
        let longer = side(|p| p.chars[0] - p.chars[1]);
        let hits = longer.iter().map(|&d| match d {
            d if d > 0.0 => 1.0,
            0.0 => 0.5,
            _ => 0.0,
        });
        let preferences = preferences(&margins);
        let points: Vec<_> = margins
            .iter()
            .copied()
            .zip(longer.iter().copied())
            .collect();
        Figures {
            pairs: self.0.len() as u64,
            accuracy: preferences.map(|p| p.accuracy),
            margin: preferences.map(|p| p.margin),
            rewards_chosen: mean(&side(|p| p.rewards[0])),
            rewards_rejected: mean(&side(|p| p.rewards[1])),
            chars_chosen: spread(&side(|p| p.chars[0])),
            chars_rejected: spread(&side(|p| p.chars[1])),
            chosen_longer: share(hits.sum(), self.0.len() as u64),
            margin_length_correlation: correlation(&points),
        }
    }

    fn line(&self, name: &str) -> Result<Line> {
        let figures = self.figures();
        let mut json = Map::from_iter([("group".to_owned(), name.into())]);
        if let Value::Object(fields) = to_value(&figures)? {
            json.extend(fields);
        }
        let cells = vec![
            ("pairs of", name.to_owned()),
            ("pairs", figures.pairs.to_string()),
            ("accuracy", percent(figures.accuracy)),
            ("margin", estimate(figures.margin)),
            (
                "reward of chosen",
                number(figures.rewards_chosen.map(|e| e.value), 3),
            ),
            (
                "of rejected",
                number(figures.rewards_rejected.map(|e| e.value), 3),
            ),
            ("characters of chosen", average(figures.chars_chosen)),
            ("of rejected", average(figures.chars_rejected)),
            ("chosen longer", percent(figures.chosen_longer)),
            (
                "margin ~ length",
                number(figures.margin_length_correlation, 2),
            ),
        ];
        Ok(Line { json, cells })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[derive(clap::Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    fn eval(rows: &[Value], flags: &[&str]) -> Result<Vec<Value>> {
        let dir = tempfile::tempdir().unwrap();
        let (file, out) = (dir.path().join("p.jsonl"), dir.path().join("out.json"));
        let text: String = rows.iter().map(|row| format!("{row}\n")).collect();
        std::fs::write(&file, text).unwrap();
        let paths = ["-o", out.to_str().unwrap(), file.to_str().unwrap()];
        let words = ["x"].iter().chain(flags).chain(&paths);
        run(<Cli as clap::Parser>::parse_from(words).args)?;
        let text = std::fs::read_to_string(&out).unwrap();
        Ok(text
            .lines()
            .map(|l| serde_json::from_str(l).unwrap())
            .collect())
    }

    fn pair(source: &str, logps: [f64; 4]) -> Value {
        json!({"prompt": format!("{logps:?}"), "chosen": "four", "rejected": "sixsix", "source": source,
            "policy_chosen_logps": logps[0], "ref_chosen_logps": logps[1],
            "policy_rejected_logps": logps[2], "ref_rejected_logps": logps[3]})
    }

    #[test]
    fn accuracy_and_margin_overall_and_by_source() {
        let rows = [
            pair("replay", [-1.0, -3.0, -5.0, -5.0]),
            pair("replay", [-2.0, -2.0, -5.0, -6.0]),
            pair("generated", [-1.0, -2.0, -1.0, -2.0]),
        ];
        let got = eval(&rows, &["--beta", "0.5"]).unwrap();
        let named: Vec<_> = got.iter().map(|g| g["group"].as_str().unwrap()).collect();
        assert_eq!(named, ["all", "generated", "replay"]);
        // Margins 1, -0.5 and 0: a tie counts half.
        assert_eq!(got[0]["accuracy"]["value"], 0.5);
        assert!((got[0]["margin"]["value"].as_f64().unwrap() - 0.5 / 3.0).abs() < 1e-12);
        assert_eq!(got[2]["rewards/chosen"]["value"], 0.5);
        assert_eq!(got[2]["chars_rejected"]["mean"], 6.0);
        assert_eq!(got[2]["chosen_longer"]["value"], 0.0);
    }

    #[test]
    fn a_split_takes_its_prompts_only() {
        let rows: Vec<_> = (0..50)
            .map(|i| pair("x", [f64::from(i), 0.0, 0.0, 0.0]))
            .collect();
        let pairs = |split: &str| {
            eval(&rows, &["--split", split]).unwrap()[0]["pairs"]
                .as_u64()
                .unwrap()
        };
        assert_eq!(pairs("train") + pairs("validation") + pairs("test"), 50);
        assert!(pairs("train") > 30, "{}", pairs("train"));
    }

    #[test]
    fn rows_without_log_probs_need_models() {
        let row = json!({"prompt": "p", "chosen": "a", "rejected": "b"});
        let message = format!("{:#}", eval(&[row], &[]).unwrap_err());
        assert!(
            message.contains("--policy")
                && message.contains("p.jsonl:1: field \"policy_chosen_logps\" is missing"),
            "{message}"
        );
    }
}
