//! Long inputs stream: what a row adds to a tool's memory is a few numbers, not its text. `DICE_ROWS` sets their number.

use dice_tests::{Tiny, Tool, text};
use serde_json::json;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

fn rows() -> usize {
    match std::env::var("DICE_ROWS") {
        Ok(rows) => rows.parse().expect("DICE_ROWS is a number"),
        Err(_) => 60_000,
    }
}

/// Samples of a prompt.
const K: usize = 16;
/// Characters of a response, for tools that run no model.
const CHARS: usize = 1500;
/// The most that a row may add to a tool's memory, bytes: numbers, hashes, and a share of its prompt.
const MOST: f64 = 200.0;

/// Writes rows with so many characters of text, or with hardly any for a tool that runs a model. None is kept in memory,
/// because a child's peak counts its parent's.
fn write(path: &Path, count: usize, chars: usize) -> u64 {
    let mut file = BufWriter::new(File::create(path).unwrap());
    let filler = "lorem ipsum ".repeat(chars / 12);
    for i in 0..count {
        let reward = (i * 7919 % 1000) as f64 / 1000.0;
        let row = match chars {
            0 => json!({"prompt": format!("{}", i / K), "response": format!("{i}")}),
            _ => {
                let response = format!("{i} {}", &filler[..chars - i % 10 * chars / 20]);
                json!({"prompt": format!("Question {}", i / K), "sample": i % K, "response": response, "reward": reward,
                    "chosen": response, "rejected": "no", "judge_chosen": reward, "judge_rejected": 0.5})
            }
        };
        writeln!(file, "{row}").unwrap();
    }
    file.flush().unwrap();
    path.metadata().unwrap().len()
}

#[test]
fn long_inputs_stream() {
    let folder = tempfile::tempdir().unwrap();
    let arg = |name: &str| text(&folder.path().join(name));
    let stub = Tiny {
        layers: 1,
        ..Tiny::default()
    };
    stub.write(&folder.path().join("pi"), 1);
    stub.write(&folder.path().join("ref"), 2);
    let [pi, reference] = ["pi", "ref"].map(arg);
    let many = rows();
    let few = many / 10;
    for (tool, args, chars) in [
        ("dice-score", vec!["--policy", &pi, "--ref", &reference], 0),
        ("dice-pairs", vec!["--replay", "replay"], CHARS),
        ("dice-eval", vec!["samples"], CHARS),
        ("dice-eval", vec!["reward", "--score", "judge"], CHARS),
    ] {
        let mut found = vec![];
        for count in [few, many] {
            let input = folder.path().join("rows.jsonl");
            let bytes = write(&input, count, chars);
            let replay = folder.path().join("replay.jsonl");
            write(&replay, count / K, CHARS);
            let args = args.iter().map(|&arg| match arg {
                "replay" => text(&replay),
                arg => arg.to_owned(),
            });
            let started = std::time::Instant::now();
            let output = folder.path().join("out");
            let run = Tool::new(tool, args)
                .args([text(&input)])
                .args(["--output", &text(&output)]);
            let (run, peak) = run.run_measured();
            run.ok();
            std::fs::remove_file(output).unwrap();
            let seconds = started.elapsed().as_secs_f64();
            let mib = |bytes: f64| bytes / f64::from(1 << 20);
            println!(
                "{tool} {}: {count} rows, {:.0} MiB, {seconds:.0} s, peak {:.0} MiB",
                if tool == "dice-eval" {
                    "of figures"
                } else {
                    ""
                },
                mib(bytes as f64),
                mib(peak as f64 * 1024.0)
            );
            found.push((count as f64, peak as f64 * 1024.0));
        }
        let a_row = (found[1].1 - found[0].1) / (found[1].0 - found[0].0);
        assert!(
            a_row < MOST,
            "{tool}: a row adds {a_row:.0} bytes of memory"
        );
    }
}
