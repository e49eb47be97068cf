//! `dice-eval reward`: how good is a reward on a preference set, subset by subset, and how much of it is length?

use std::path::PathBuf;

use anyhow::{Result, anyhow};
use common::jsonl::{Row, rows};
use common::program;
use common::progress::Progress;
use common::records::Split;
use serde_json::json;

use crate::format::{Line, To, percent};
use crate::implicit::{Models, Scored, Scorer};
use crate::preference::{Groups, Pair};

/// Accuracy of rewards on a preference set by subset, as RewardBench has it, and how much of it is length
///
/// Reads rows with "prompt", "chosen" and "rejected" (and "subset", or another field that --by names) and gives figures for
/// each reward: the implicit one of --policy and --ref, or of log-probs in the rows, and any scores in the rows that --score
/// names. The share of pairs whose chosen response scores higher, overall, by subset, and averaged over subsets
/// ("accuracy_mean_of_groups"); then what length explains: the correlation of margin and difference in length, and the
/// accuracy where the chosen response is the longer and where it is the shorter. A reward that only counts characters has a
/// "length-balanced" accuracy, the mean of those two, of 0.5.
///
/// With --policy and --ref the pairs are scored, but for those that dice-score scored with these very models. Without, every
/// row must bring its log-probs (policy_chosen_logps, ref_chosen_logps, ... as dice-score writes them), unless there is a --score.
#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  dice-eval reward --policy ./next --ref ./base --split test --format markdown preferences.jsonl"
)]
pub struct Args {
    /// Take the rewards in the rows' fields NAME_chosen and NAME_rejected (or chosen_NAME and rejected_NAME), too; `length`
    /// stands for the length itself. May be repeated. Without models, the implicit reward is then left out
    #[arg(long, value_name = "NAME")]
    score: Vec<String>,
    /// Group by this field of the rows, too
    #[arg(long, value_name = "FIELD", default_value = "subset")]
    by: String,
    /// Take only the pairs whose prompt is in this part (by a stable hash, the same in every tool)
    #[arg(long, value_enum, default_value_t = Split::All)]
    split: Split,
    /// What to call all pairs in the output, where tables of several runs are put together
    #[arg(long, value_name = "TEXT", default_value = "all")]
    name: String,
    #[command(flatten)]
    to: To,
    /// Files of pairs (JSON Lines), read one after the other; `-` or none reads stdin
    #[arg(value_name = "FILE")]
    files: Vec<PathBuf>,
    // Last: what comes after a heading is under it.
    #[command(flatten)]
    models: Models,
}

pub fn run(args: Args) -> Result<()> {
    let progress = Progress::new("pairs", None);
    let with_implicit = args.models.policy.is_some() || args.score.is_empty();
    let mut scorer = Scorer::open(&args.models)?;
    let mut implicit = Groups::by(&args.by);
    let mut external: Vec<Groups> = args.score.iter().map(|_| Groups::by(&args.by)).collect();
    let mut take = |scored: Vec<Scored>| -> Result<()> {
        for (row, logps) in scored {
            let Some(logps) = logps else {
                progress.skip("too long, or not a number", 1);
                continue;
            };
            implicit.add(&row, Pair::implicit(&row, logps, args.models.beta)?);
        }
        Ok(())
    };
    for row in rows(&args.files) {
        let row = row?;
        program::check()?;
        if !args.split.holds(&row.prompt()?) {
            progress.skip("not in --split", 1);
            continue;
        }
        for (name, groups) in args.score.iter().zip(&mut external) {
            groups.add(&row, Pair::new(&row, scores(&row, name)?)?);
        }
        if with_implicit {
            take(scorer.push(row)?)?;
        }
        progress.add(1, 0);
    }
    take(scorer.finish()?)?;
    progress.finish();
    let mut lines = vec![];
    if with_implicit {
        lines.extend(of_reward("implicit", &args.name, implicit)?);
    }
    for (score, groups) in args.score.iter().zip(external) {
        lines.extend(of_reward(score, &args.name, groups)?);
    }
    args.to.write(&lines)
}

/// The lines of one reward: of all pairs, called `name`, and of their groups.
fn of_reward(reward: &str, name: &str, groups: Groups) -> Result<Vec<Line>> {
    let mean = groups.mean_accuracy();
    let mut lines = groups.lines(name)?;
    for line in &mut lines {
        line.json.shift_insert(0, "reward".into(), json!(reward));
        line.cells.insert(0, ("reward", reward.to_owned()));
    }
    lines[0]
        .json
        .insert("accuracy_mean_of_groups".into(), json!(mean));
    if mean.is_some() {
        for (at, line) in lines.iter_mut().enumerate() {
            let cell = if at == 0 {
                percent(mean)
            } else {
                String::new()
            };
            line.cells.push(("mean accuracy of groups", cell));
        }
    }
    Ok(lines)
}

/// The scores of chosen and rejected that the row has under a name.
fn scores(row: &Row, name: &str) -> Result<[f64; 2]> {
    let sides = ["chosen", "rejected"];
    if name == "length" {
        let length = |side| row.response(side).map(|text| text.chars().count() as f64);
        return Ok([length("chosen")?, length("rejected")?]);
    }
    let patterns: [fn(&str, &str) -> String; 2] = [
        |name, side| format!("{name}_{side}"),
        |name, side| format!("{side}_{name}"),
    ];
    for field in patterns {
        if row.fields.contains_key(&field(name, sides[0])) {
            let [chosen, rejected] = sides.map(|side| row.number(&field(name, side)));
            return Ok([chosen?, rejected?]);
        }
    }
    Err(anyhow!(
        "{}: --score {name}: there is neither a field \"{name}_chosen\" nor \"chosen_{name}\"",
        row.place
    ))
}

#[cfg(test)]
mod tests {
    use crate::testing::{alpaca_eval, eval, text};
    use serde_json::{Value, json};

    fn reward(rows: &[Value], more: &[&str]) -> anyhow::Result<Vec<Value>> {
        let dir = tempfile::tempdir()?;
        let file = dir.path().join("p.jsonl");
        std::fs::write(
            &file,
            rows.iter().map(|r| format!("{r}\n")).collect::<String>(),
        )?;
        let file = file.display().to_string();
        eval("reward", more.iter().copied().chain([file.as_str()]))
    }

    fn row(subset: &str, chosen: &str, rejected: &str, scores: [f64; 2]) -> Value {
        json!({"prompt": "p", "chosen": chosen, "rejected": rejected, "subset": subset,
            "rm_chosen": scores[0], "rm_rejected": scores[1], "chosen_b": scores[1], "rejected_b": scores[0]})
    }

    fn rows() -> Vec<Value> {
        vec![
            row("chat", "long answer", "short", [2.0, 1.0]),
            row("chat", "long answer", "short", [2.0, 1.0]),
            row("chat", "no", "a long answer", [1.0, 3.0]),
            row("code", "no", "a long answer", [5.0, 3.0]),
        ]
    }

    #[test]
    fn every_reward_by_subset_and_by_length() {
        let got = reward(
            &rows(),
            &["--score", "rm", "--score", "b", "--score", "length"],
        )
        .unwrap();
        let names: Vec<_> = got
            .iter()
            .map(|r| (r["reward"].as_str().unwrap(), r["group"].as_str().unwrap()))
            .collect();
        let groups = ["all", "chat", "code"];
        let expected: Vec<_> = ["rm", "b", "length"]
            .iter()
            .flat_map(|r| groups.map(|g| (*r, g)))
            .collect();
        assert_eq!(names, expected);
        assert_eq!(got[0]["accuracy"]["value"], 0.75);
        assert_eq!(got[3]["accuracy"]["value"], 0.25, "the other way round");
        // Chat 2/3, code 1.
        let mean = |side| got[0]["accuracy_mean_of_groups"][side].as_f64().unwrap();
        assert!((mean("value") - 5.0 / 6.0).abs() < 1e-12);
        assert!(mean("low") < 5.0 / 6.0 && mean("high") == 1.0);
        assert_eq!(got[0]["accuracy_chosen_longer"]["value"], 1.0);
        assert_eq!(got[0]["accuracy_chosen_shorter"]["value"], 0.5);
        assert_eq!(got[0]["accuracy_length_balanced"]["value"], 0.75);
        // Length as a reward is length and nothing else.
        assert_eq!(got[6]["accuracy_length_balanced"]["value"], 0.5);
        for name in ["margin_length_correlation", "reward_length_correlation"] {
            let correlation = &got[6][name];
            assert!(
                (correlation["value"].as_f64().unwrap() - 1.0).abs() < 1e-12,
                "{correlation}"
            );
        }
    }

    #[test]
    fn the_implicit_reward_comes_from_the_rows() {
        let mut with = rows();
        for (i, row) in with.iter_mut().enumerate() {
            for (field, value) in [
                ("policy_chosen_logps", -1.0),
                ("ref_chosen_logps", -2.0),
                ("policy_rejected_logps", -3.0),
                ("ref_rejected_logps", -3.5 + i as f64),
            ] {
                row[field] = json!(value);
            }
        }
        let got = reward(&with, &[]).unwrap();
        assert_eq!(got[0]["reward"], "implicit");
        assert_eq!(got[0]["accuracy"]["value"], 1.0);
        assert!((got[0]["margin"]["value"].as_f64().unwrap() - 0.2).abs() < 1e-12);
        let message = format!("{:#}", reward(&rows(), &[]).unwrap_err());
        assert!(message.contains("--policy"), "{message}");
        let message = format!("{:#}", reward(&rows(), &["--score", "x"]).unwrap_err());
        assert!(
            message.contains("p.jsonl:1: --score x: there is neither"),
            "{message}"
        );
    }

    #[test]
    fn accuracy_and_margin_overall_and_by_a_field() {
        let pair = |source: &str, logps: [f64; 4]| {
            json!({"prompt": format!("{logps:?}"), "chosen": "four", "rejected": "sixsix", "source": source,
                "policy_chosen_logps": logps[0], "ref_chosen_logps": logps[1],
                "policy_rejected_logps": logps[2], "ref_rejected_logps": logps[3]})
        };
        let rows = [
            pair("replay", [-1.0, -3.0, -5.0, -5.0]),
            pair("replay", [-2.0, -2.0, -5.0, -6.0]),
            pair("generated", [-1.0, -2.0, -1.0, -2.0]),
        ];
        let flags = ["--beta", "0.5", "--by", "source", "--name", "round 1"];
        let got = reward(&rows, &flags).unwrap();
        let named: Vec<_> = got.iter().map(|g| g["group"].as_str().unwrap()).collect();
        assert_eq!(named, ["round 1", "generated", "replay"]);
        // Margins 1, -0.5 and 0: a tie counts half.
        assert_eq!(got[0]["accuracy"]["value"], 0.5);
        assert!((got[0]["margin"]["value"].as_f64().unwrap() - 0.5 / 3.0).abs() < 1e-12);
        assert_eq!(got[2]["rewards/chosen"]["value"], 0.5);
        assert_eq!(got[2]["chars_rejected"]["mean"], 6.0);
        assert_eq!(got[2]["chosen_longer"]["value"], 0.0);
    }

    #[test]
    fn a_split_takes_its_prompts_only() {
        let row = |i: u32| json!({"prompt": i.to_string(), "chosen": "a", "rejected": "b"});
        let rows: Vec<_> = (0..50).map(row).collect();
        let pairs = |split: &str| {
            let got = reward(&rows, &["--score", "length", "--split", split]).unwrap();
            got[0]["pairs"].as_u64().unwrap()
        };
        assert_eq!(pairs("train") + pairs("validation") + pairs("test"), 50);
        assert!(pairs("train") > 30, "{}", pairs("train"));
    }

    #[test]
    fn the_judge_prefers_length_in_real_pairs() {
        let Some(data) = alpaca_eval() else { return };
        let file = data.join("preferences.jsonl").display().to_string();
        let words = ["--score", "length", "--by", "chosen_from", &file];
        let got = eval("reward", words).unwrap();
        assert_eq!(got[0]["pairs"], 1136);
        let accuracy = got[0]["accuracy"]["value"].as_f64().unwrap();
        // The data's own note: chosen is the longer in 65% of pairs.
        assert!((accuracy - 0.65).abs() < 0.01, "{accuracy}");
        let table = text("reward", words.into_iter().chain(["--format", "markdown"])).unwrap();
        assert!(table.contains("| length | all | 1136 |"), "{table}");
    }
}
