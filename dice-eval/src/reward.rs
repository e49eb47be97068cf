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
/// Example: dice-eval reward --policy ./next --ref ./base --score judge --format markdown preferences.jsonl
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    models: Models,
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
    #[command(flatten)]
    to: To,
    /// Files of pairs (JSON Lines), read one after the other; `-` or none reads stdin
    #[arg(value_name = "FILE")]
    files: Vec<PathBuf>,
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
        lines.extend(named("implicit", implicit)?);
    }
    for (name, groups) in args.score.iter().zip(external) {
        lines.extend(named(name, groups)?);
    }
    args.to.write(&lines)
}

/// The lines of one reward, under its name.
fn named(reward: &str, groups: Groups) -> Result<Vec<Line>> {
    let mean = groups.mean_accuracy();
    let mut lines = groups.lines("all")?;
    for (at, line) in lines.iter_mut().enumerate() {
        line.json.shift_insert(0, "reward".into(), json!(reward));
        line.cells.insert(0, ("reward", reward.to_owned()));
        let of_all = mean.filter(|_| at == 0);
        line.cells.push((
            "mean accuracy of groups",
            of_all.map_or(String::new(), |m| percent(Some(m))),
        ));
        if at == 0 {
            line.json
                .insert("accuracy_mean_of_groups".into(), json!(mean));
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
