//! dice-eval from outside: figures that scipy knows, the documents' commands against a judge on loopback, a killed judge,
//! AlpacaEval's files from the hub's cache.

use dice_tests::{
    Act, Fields, JudgeServer, Mount, Tool, golden, lines, number, pipe, read_rows, text, workspace,
};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::time::Duration;

fn win_rate(words: &[&str]) -> Vec<Fields> {
    let command = ["win-rate"].iter().chain(words);
    Tool::new("dice-eval", command).run().ok().rows()
}

#[track_caller]
fn near(got: f64, expected: f64, tolerance: f64, what: &str) {
    assert!(
        (got - expected).abs() <= tolerance,
        "{what}: {got}, not {expected}"
    );
}

/// A case of length_control.json as files; the options that name them.
fn case_files(case: &Value, folder: &Path) -> Vec<String> {
    let list = |of: &Value, name: &str| of[name].as_array().unwrap().clone();
    let columns = ["len_1", "len_2", "preference"].map(|name| list(case, name));
    let row = |i: usize| json!({"index": i, "len_1": columns[0][i], "len_2": columns[1][i], "preference": columns[2][i]});
    let rows: Vec<_> = (0..columns[0].len()).map(row).collect();
    let write = |name: &str, contents: String| {
        fs::write(folder.join(name), contents).unwrap();
        text(&folder.join(name))
    };
    let mut words = vec![write("annotations.jsonl", lines(&rows))];
    if let Some(difficulties) = case["difficulty"].as_array() {
        let rows = difficulties
            .iter()
            .zip(0..)
            .map(|(d, i)| format!("{i},{d}\n"));
        let table = "index,instruction_difficulty\n".to_owned() + &rows.collect::<String>();
        words.extend(["--difficulty".into(), write("difficulty.csv", table)]);
    }
    let baselines = case["baselines"].as_array().unwrap();
    if !baselines.is_empty() {
        let mut table = "variant,index,len_1,len_2,preference\n".to_owned();
        for baseline in baselines {
            let [len_1, len_2, preference] =
                ["len_1", "len_2", "preference"].map(|name| list(baseline, name));
            let variant = baseline["variant"].as_str().unwrap();
            let rows = len_1.iter().zip(&len_2).zip(&preference);
            for (i, ((len_1, len_2), preference)) in rows.enumerate() {
                table += &format!("{variant},{i},{len_1},{len_2},{preference}\n");
            }
        }
        words.extend(["--baselines".into(), write("baselines.csv", table)]);
    }
    words
}

/// Win rates of annotations that nobody published, by numpy, scipy and scikit-learn (tests/golden/make_length_control.py).
#[test]
fn invented_annotations_have_the_rates_that_scipy_finds() {
    let golden = fs::read_to_string(golden("length_control.json")).unwrap();
    let golden: Value = serde_json::from_str(&golden).unwrap();
    for case in golden["cases"].as_array().unwrap() {
        let folder = tempfile::tempdir().unwrap();
        let words = case_files(case, folder.path());
        let run = |more: &[&str]| {
            let words = words.iter().map(String::as_str).chain(more.iter().copied());
            win_rate(&words.collect::<Vec<_>>()).remove(0)
        };
        let name = case["name"].as_str().unwrap();
        let expected = &case["expected"];
        let figure = |of: &Value, column: &str| of[column].as_f64().unwrap();

        // As a reader would run it: C by cross-validation.
        let got = run(&[]);
        for column in ["win_rate", "standard_error", "discrete_win_rate"] {
            near(number(&got, column), figure(expected, column), 1e-9, name);
        }
        for column in ["n_wins", "n_wins_base", "n_draws", "n_total", "avg_length"] {
            assert_eq!(got[column], expected[column], "{name}: {column}");
        }
        let c = figure(expected, "c");
        near(number(&got, "lc_c"), c, 1e-9 * c, name);
        // Percentiles of a thousand resamples beside those of two thousand others: a tenth of the width is their chance.
        for interval in ["win_rate", "length_controlled"] {
            let [low, high] =
                [0, 1].map(|side| expected["intervals"][interval][side].as_f64().unwrap());
            let tolerance = 0.1 * (high - low);
            near(
                number(&got, &format!("{interval}_low")),
                low,
                tolerance,
                name,
            );
            near(
                number(&got, &format!("{interval}_high")),
                high,
                tolerance,
                name,
            );
        }

        for (c, optimum) in expected["by_c"].as_object().unwrap() {
            let got = run(&["--lc-c", c, "--bootstrap", "0"]);
            for column in ["length_controlled_winrate", "lc_standard_error"] {
                near(
                    number(&got, column),
                    figure(optimum, column),
                    1e-5,
                    &format!("{name}, C {c}: {column}"),
                );
            }
            let weights = got["glm_weights"].as_object().unwrap().values();
            for (weight, expected) in weights.zip(optimum["glm_weights"].as_array().unwrap()) {
                near(
                    weight.as_f64().unwrap(),
                    expected.as_f64().unwrap(),
                    1e-6,
                    &format!("{name}, C {c}"),
                );
            }
        }
    }
}

/// The `sh` blocks of docs/evaluation.md.
fn blocks() -> Vec<String> {
    let document = fs::read_to_string(workspace().join("docs/evaluation.md")).unwrap();
    let blocks = document.split("```sh\n").skip(1);
    blocks
        .map(|rest| rest.split("```").next().unwrap().to_owned())
        .collect()
}

/// Sixty prompts, whose answers have more exclamation marks from round to round; pairs with scores of their own.
fn write_world(folder: &Path) {
    let prompt = |i: usize| format!("question {i}");
    for (name, every) in [("base", 7), ("round-1", 3), ("round-2", 2)] {
        let row = |i: usize| {
            let marks = "!".repeat(1 + usize::from(i.is_multiple_of(every)));
            json!({"prompt": prompt(i), "response": format!("{} answer{marks}", "some ".repeat(i % 5 + every % 4)),
                "dataset": (["a", "b"][i % 2]), "finish_reason": "stop"})
        };
        let rows: Vec<_> = (0..60).map(row).collect();
        fs::write(folder.join(format!("{name}.jsonl")), lines(&rows)).unwrap();
    }
    let pair = |i: usize| {
        json!({"prompt": prompt(i / 3), "chosen": "yes, ".repeat(i % 4 + 1), "rejected": "no, ".repeat(i % 3 + 1), "source": "x",
            "subset": (["chat", "code"][i % 2]), "rm_chosen": i % 5, "rm_rejected": i % 4})
    };
    let pairs: Vec<_> = (0..60).map(pair).collect();
    fs::write(folder.join("pairs.jsonl"), lines(&pairs)).unwrap();
    let score = "import json, sys\nfor line in sys.stdin:\n    print(json.dumps({'score': json.loads(line)['response'].count('!')}))\n";
    fs::write(folder.join("score.py"), score).unwrap();
}

/// Runs every command of the document that is no recipe, in its order, in one folder.
#[test]
fn the_documents_commands_work() {
    let folder = tempfile::tempdir().unwrap();
    let server = JudgeServer::start(&[Act::Weigh]);
    write_world(folder.path());
    let hub = hub_cache(&folder.path().join("hub"));
    let mut ran = 0;
    for block in blocks() {
        // Recipes are the tests of recipes.rs; the hub's files may not be there.
        if block.contains("just ") || (hub.is_none() && block.contains("--alpaca-eval")) {
            continue;
        }
        let script = block.replace("http://127.0.0.1:8000/v1", server.url.trim_end_matches('/'));
        let script = format!("cd '{}'\n{script}", text(folder.path()));
        let hub = hub.clone().unwrap_or_default();
        let done = pipe(&script)
            .env("HF_HUB_CACHE", &hub)
            .env("HF_HUB_OFFLINE", "1")
            .run()
            .ok();
        assert!(!done.stdout.contains("NaN"), "{}", done.stdout);
        ran += 1;
    }
    let least = if hub.is_some() { 4 } else { 3 };
    assert!(
        ran >= least,
        "only {ran} blocks found: has the document changed its form?"
    );
    // In both orders 60 pairs of base and round-2, and those 23 of base and round-1 that differ.
    assert_eq!(server.asked(), 2 * (60 + 23));
    let judged = read_rows(&folder.path().join("2.jsonl"));
    assert_eq!(
        (judged.len(), &judged[0]["generator_2"]),
        (60, &json!("round-2"))
    );
}

/// Judges base against round-2.
fn judge(folder: &Path, server: &JudgeServer, output: &str) -> Tool {
    let path = |name: &str| text(&folder.join(name));
    let files = [
        ["--a".to_owned(), path("base.jsonl")],
        ["--b".to_owned(), path("round-2.jsonl")],
        ["--output".to_owned(), path(output)],
    ];
    let words = [
        "--judge",
        "j",
        "--in-flight",
        "2",
        "--resume",
        "--endpoint",
        &server.url,
    ];
    Tool::new("dice-eval", ["judge"])
        .args(files.concat())
        .args(words)
}

/// Two answers come while the journal's disk is full: a line that the first tears must not spoil the file.
#[test]
fn a_full_disk_spoils_no_journal() {
    let folder = tempfile::tempdir().unwrap();
    write_world(folder.path());
    let Some(disk) = Mount::new(&folder.path().join("disk"), 8) else {
        return;
    };
    let server = JudgeServer::start(&[Act::Weigh]);
    let journal = ["--journal".to_owned(), text(&folder.path().join("disk/j"))];
    let full = judge(folder.path(), &server, "out.jsonl")
        .args(&journal)
        .run();
    let line = full.error_line();
    assert!(
        line.contains("cannot write the journal: No space left"),
        "{line}"
    );
    let kept = fs::read(folder.path().join("disk/j")).unwrap();
    assert_eq!(kept.last(), Some(&b'\n'));
    disk.resize(64);
    judge(folder.path(), &server, "out.jsonl")
        .args(&journal)
        .run()
        .ok();
    let asked = server.asked();
    assert!((120..=120 + 2).contains(&asked), "{asked} questions");
}

#[test]
fn a_killed_judge_asks_nothing_twice() {
    let folder = tempfile::tempdir().unwrap();
    write_world(folder.path());
    let judge = |server: &JudgeServer, output: &str| judge(folder.path(), server, output);
    let calm = JudgeServer::start(&[Act::Weigh]);
    judge(&calm, "calm.jsonl").run().ok();

    let server = JudgeServer::start(&[Act::Weigh]);
    for after in [9, 40, 77] {
        let mut child = judge(&server, "fire.jsonl").start();
        while server.asked() < after {
            std::thread::sleep(Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
    judge(&server, "fire.jsonl").run().ok();
    // What was on its way when the run was killed could not be kept.
    let (asked, needed) = (server.asked(), calm.asked());
    assert!(
        (needed..=needed + 3 * 2).contains(&asked),
        "{asked} questions for {needed}"
    );
    let read = |name: &str| fs::read(folder.path().join(name)).unwrap();
    assert!(
        read("calm.jsonl") == read("fire.jsonl"),
        "kills changed the annotations"
    );
}

/// A cache of the hub that holds AlpacaEval's files, where they are beside the checkout.
fn hub_cache(folder: &Path) -> Option<String> {
    let shared = std::env::var_os("DICE_SHARED").map_or(workspace().join("../shared"), Into::into);
    let data = shared.join("data/alpaca_eval");
    if !data.is_dir() {
        eprintln!(
            "skipped: {} is not there (DICE_SHARED names its place)",
            data.display()
        );
        return None;
    }
    let repository = folder.join("datasets--tatsu-lab--alpaca_eval");
    let commit = "0123456789abcdef0123456789abcdef01234567";
    let snapshot = repository.join("snapshots").join(commit);
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(repository.join("refs")).unwrap();
    fs::write(repository.join("refs/main"), commit).unwrap();
    for (theirs, name) in [
        ("instruction_difficulty.csv", "instruction_difficulty.csv"),
        ("gamed_baseline.csv", "df_gamed.csv"),
    ] {
        fs::copy(data.join(theirs), snapshot.join(name)).unwrap();
    }
    let annotations = fs::read_to_string(data.join("annotations/claude-2.1.jsonl")).unwrap();
    // A JSON list, as AlpacaEval writes it.
    let list = format!("[{}]", annotations.trim_end().replace('\n', ",\n"));
    fs::write(folder.parent().unwrap().join("annotations.json"), list).unwrap();
    Some(text(folder))
}

#[test]
fn the_leaderboards_rate_comes_from_the_hubs_files() {
    let folder = tempfile::tempdir().unwrap();
    let Some(hub) = hub_cache(&folder.path().join("hub")) else {
        return;
    };
    let file = text(&folder.path().join("annotations.json"));
    let run = |offline: &str, cache: &str| {
        let words = ["win-rate", "--alpaca-eval", "--bootstrap", "0", &file];
        let tool = Tool::new("dice-eval", words).env("HF_HUB_CACHE", cache);
        tool.env("HF_HUB_OFFLINE", offline).run()
    };
    let got = run("0", &hub).ok().rows().remove(0);
    // Published: 25.251943886133027.
    near(
        number(&got, "length_controlled_winrate"),
        25.2519,
        0.15,
        "claude-2.1",
    );
    assert_eq!(got["lc_form"], "length_controlled");
    let none = run("1", &text(folder.path()));
    let line = none.error_line();
    assert!(
        line.contains(
            "--alpaca-eval: data set tatsu-lab/alpaca_eval: instruction_difficulty.csv is not in"
        ),
        "{line}"
    );
}

#[test]
fn every_form_of_input_and_output() {
    let row = |i: usize| {
        json!({"instruction": format!("i{i}"), "output_1": "ä".repeat(i + 3), "output_2": "b".repeat(i * 7 % 20), "generator_1": "base",
            "generator_2": "m|odel", "preference": 1.0 + (i % 5) as f64 / 4.0, "category": (["x", "y, z"][i % 2])})
    };
    let rows: Vec<_> = (0..40).map(row).collect();
    let compact = rows.iter().map(|row| {
        let length = |name: &str| row[name].as_str().unwrap().chars().count();
        let mut row = row.clone();
        for (side, name) in [("len_1", "output_1"), ("len_2", "output_2")] {
            row[side] = json!(length(name));
            row.as_object_mut().unwrap().remove(name);
        }
        row
    });
    let compact: Vec<_> = compact.collect();
    let run = |input: &str, words: &[&str]| {
        let words = ["win-rate", "--bootstrap", "50"].iter().chain(words);
        Tool::new("dice-eval", words).stdin(input).run().ok()
    };
    let list = json!(rows).to_string();
    let figures = |input: &str| {
        let mut rows = run(input, &[]).rows();
        // Only texts tell that some are alike.
        rows[0].remove("warnings");
        rows
    };
    let whole = figures(&lines(&rows));
    assert_eq!(whole.len(), 1);
    for other in [&list, &lines(&compact)] {
        assert_eq!(figures(other), whole);
    }
    // A pipe that has a name can be read once: what was looked at is not to be had again.
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("rows.jsonl");
    for input in [&list, &lines(&rows)] {
        fs::write(&file, input).unwrap();
        let script = format!("dice-eval win-rate --bootstrap 50 <(cat '{}')", text(&file));
        let mut rows = pipe(&script).run().ok().rows();
        rows[0].remove("warnings");
        assert_eq!(rows, whole);
    }
    let by = ["--by", "category", "--length-bins", "2"];
    let groups = run(&list, &by).rows();
    let named = |row: &Fields| row["group"].as_str().unwrap().to_owned();
    assert_eq!(
        groups.iter().map(named).collect::<Vec<_>>()[..3],
        ["all", "x", "y, z"]
    );
    assert_eq!(groups.len(), 5);

    let markdown = run(&list, &[&by[..], &["--format", "markdown"]].concat()).stdout;
    assert_eq!(markdown.lines().count(), 2 + 5);
    let bars = |line: &str| line.replace("\\|", "").matches('|').count();
    assert!(
        markdown
            .lines()
            .all(|line| bars(line) == bars(markdown.lines().next().unwrap())),
        "{markdown}"
    );

    let table = run(&list, &[&by[..], &["--format", "csv"]].concat()).stdout;
    let script = "import csv, json, sys; print(json.dumps(list(csv.DictReader(sys.stdin))))";
    let mut python = std::process::Command::new("python3");
    python.args(["-c", script]);
    let read = Tool::of("python3", python).stdin(table).run().ok().stdout;
    let read: Vec<Fields> = serde_json::from_str(&read).unwrap();
    assert_eq!(read.len(), 5);
    for (row, expected) in read.iter().zip(&groups) {
        assert_eq!(row["group"], expected["group"]);
        for column in ["win_rate", "length_controlled_low", "n_total"] {
            let cell: f64 = row[column].as_str().unwrap().parse().unwrap();
            near(cell, number(expected, column), 1e-12, column);
        }
    }
}
