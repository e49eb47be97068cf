//! `dice-eval pairs`: does the implicit reward prefer the chosen responses of preference pairs, and by how much?

use std::path::PathBuf;

use anyhow::Result;
use common::jsonl::rows;
use common::program;
use common::progress::Progress;
use common::records::Split;

use crate::format::To;
use crate::implicit::{Models, Scored, Scorer};
use crate::preference::{Groups, Pair};

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
    #[command(flatten)]
    models: Models,
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
    to: To,
    /// Files of pairs (JSON Lines), read one after the other; `-` or none reads stdin
    #[arg(value_name = "FILE")]
    files: Vec<PathBuf>,
}

pub fn run(args: Args) -> Result<()> {
    let progress = Progress::new("pairs", None);
    let mut scorer = Scorer::open(&args.models)?;
    let mut groups = Groups::by(&args.by);
    let mut take = |scored: Vec<Scored>| -> Result<()> {
        for (row, logps) in scored {
            let Some(logps) = logps else {
                progress.skip("too long, or not a number", 1);
                continue;
            };
            groups.add(&row, Pair::implicit(&row, logps, args.models.beta)?);
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
    take(scorer.finish()?)?;
    progress.finish();
    args.to.write(&groups.lines(&args.name)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

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
