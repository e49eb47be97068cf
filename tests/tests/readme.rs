//! The README's commands, word for word, on tiny checkpoints; and what it and `docs` name must exist.

use dice_tests::{Tiny, Tool, lines, pipe, read_rows, text, workspace};
use serde_json::json;
use std::fs;
use std::path::Path;
use std::process::Command;

fn readme() -> String {
    fs::read_to_string(workspace().join("README.md")).unwrap()
}

/// The README and what lies in `docs`.
fn documents() -> String {
    let docs = fs::read_dir(workspace().join("docs")).unwrap();
    let texts = docs.map(|entry| fs::read_to_string(entry.unwrap().path()).unwrap());
    readme() + &texts.collect::<String>()
}

/// The `sh` blocks of a text.
fn blocks(text: &str) -> Vec<String> {
    let blocks = text.split("```sh\n").skip(1);
    blocks
        .map(|rest| rest.split("```").next().unwrap().to_owned())
        .collect()
}

/// The README's one block that holds `word`.
fn block(word: &str) -> String {
    let found: Vec<_> = blocks(&readme())
        .into_iter()
        .filter(|b| b.contains(word))
        .collect();
    assert_eq!(found.len(), 1, "blocks with {word:?}: {found:?}");
    found[0].clone()
}

/// A folder with what the README's commands read: π, π_ref, prompts and offline pairs.
fn world() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: String| fs::write(folder.path().join(name), text).unwrap();
    let tiny = Tiny {
        context: 4096,
        ..Tiny::default()
    };
    tiny.write(&folder.path().join("π"), 1);
    tiny.write(&folder.path().join("π_ref"), 2);
    let prompts: Vec<_> = (0..6)
        .map(|i| json!({"prompt": format!("Say {i}")}))
        .collect();
    write("prompts.jsonl", lines(&prompts));
    let offline: Vec<_> = (0..9)
        .map(|i| json!({"prompt": format!("Offline {i}"), "chosen": "yes, gladly", "rejected": "no"}))
        .collect();
    write("offline.jsonl", lines(&offline));
    folder
}

fn run_in(folder: &Path, script: &str) -> dice_tests::Finished {
    pipe(&format!("cd '{}'\n{script}", text(folder))).run().ok()
}

#[test]
fn the_pipe_makes_a_checkpoint() {
    let folder = world();
    let script = block("dice-gen --model π prompts.jsonl");
    // The programs are on the PATH already; what the README exports is the newcomer's.
    let script = script.replace("export PATH=\"$PWD/target/release:$PATH\"\n", "");
    run_in(folder.path(), &script);
    assert!(folder.path().join("next/model.safetensors").is_file());
    assert!(!read_rows(&folder.path().join("steps.jsonl")).is_empty());
}

#[test]
fn jq_in_the_place_of_dice_pairs() {
    if Command::new("jq").arg("--version").output().is_err() {
        eprintln!("skipped: jq is not installed");
        return;
    }
    let folder = world();
    let sample = "dice-gen --model π --k 6 --max-tokens 40 prompts.jsonl > samples.jsonl\n";
    let done = run_in(folder.path(), &format!("{sample}{}", block("jq -c -s")));
    done.note("6 pairs done; 6 with reference log-probs");
    assert!(folder.path().join("next/model.safetensors").is_file());
}

#[test]
fn recipes_and_variables_are_those_of_the_justfile() {
    let files = [
        "Justfile",
        "experiments/sweep.just",
        "experiments/experiment.just",
    ];
    let justfile: String = files
        .map(|file| fs::read_to_string(workspace().join(file)).unwrap())
        .concat();
    let mut seen = 0;
    let blocks: Vec<_> = (blocks(&documents()).iter())
        .map(|block| block.replace("\\\n", "")) // a command may go on in the next line
        .collect();
    for line in blocks.iter().flat_map(|block| block.lines()) {
        let line = line.split(" #").next().unwrap().trim();
        let Some(command) = line.rsplit("&& ").next().unwrap().strip_prefix("just ") else {
            continue;
        };
        // A value in quotes is nobody's name.
        let unquoted: String = command.split('"').step_by(2).collect();
        for word in unquoted.split_whitespace() {
            let here = match word.split_once('=') {
                Some((variable, _)) => format!("\n{variable} := "),
                None => format!("\n{word}"),
            };
            assert!(justfile.contains(&here), "the Justfile has no {word}");
            seen += 1;
        }
    }
    assert!(
        seen > 6,
        "only {seen} words found: has the README changed its form?"
    );
}

#[test]
fn subcommands_and_flags_are_those_of_dice_eval() {
    let mut seen = 0;
    for line in blocks(&documents()).iter().flat_map(|block| block.lines()) {
        let Some(command) = line.strip_prefix("dice-eval ") else {
            continue;
        };
        let mut words = command.split_whitespace();
        let help = [words.next().unwrap(), "--help"];
        let help = Tool::new("dice-eval", help).run().ok().stdout;
        for flag in words.filter(|word| word.starts_with('-')) {
            let known = help.split([' ', ',', '\n']).any(|word| word == flag);
            assert!(known, "{flag}: {line}");
            seen += 1;
        }
    }
    assert!(
        seen > 6,
        "only {seen} flags found: have the documents changed their form?"
    );
}

#[test]
fn tools_and_files_that_it_names_are_there() {
    let readme = readme();
    for name in [
        "dice-gen",
        "dice-score",
        "dice-pairs",
        "dice-train",
        "dice-eval",
    ] {
        let help = Tool::new(name, ["--help"]).run().ok().stdout;
        let row = readme
            .lines()
            .find(|line| line.starts_with(&format!("| `{name}`")))
            .unwrap_or_else(|| panic!("no row for {name}"));
        for word in row.split(['`', ' ']).filter(|w| w.starts_with("--")) {
            assert!(help.contains(word), "{name} --help does not know {word}");
        }
    }
    for word in readme.split(['`', ' ', '(', ')', '\n']) {
        let path = word.trim_end_matches(['.', ',']);
        if ["examples/", "docs/", "tests/", "common/"]
            .iter()
            .any(|f| path.starts_with(f))
        {
            assert!(workspace().join(path).exists(), "{path} is not there");
        }
    }
}
