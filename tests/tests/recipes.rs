//! The recipes on a tiny model: two rounds, and the same two rounds under fire; the sweep, interrupted and not.

use dice_tests::{Act, Fields, JudgeServer, Mount, Tiny, lines, read_rows, text, workspace};
use serde_json::json;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

fn just_is_there() -> bool {
    let there = Command::new("just").arg("--version").output().is_ok();
    if !there {
        eprintln!("skipped: just is not installed (cargo install --locked just)");
    }
    there
}

/// `just VARIABLES RECIPE` with everything it makes in `world/runs`, in a process group of its own.
fn just(world: &Path, runs: &str, variables: &[&str], recipe: &str) -> Command {
    let mut command = Command::new("just");
    let path = |name: &str| text(&world.join(name));
    command
        .current_dir(workspace())
        .args([
            format!("base={}", path("base")),
            format!("prompts={}", path("prompts.jsonl")),
            format!("preferences={}", path("preferences.jsonl")),
            format!("runs={}", path(runs)),
        ])
        .args([
            "count=6",
            "k=4",
            "max_tokens=30",
            "min_samples=2",
            "check=4",
            "batch_size=4",
        ])
        .args(["seed_learning_rate=1e-3", "learning_rate=1e-3"])
        .args(variables)
        .arg(recipe)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0);
    command
}

/// What makes a checkpoint the judge.
fn judge(world: &Path) -> String {
    let path = |name: &str| text(&world.join(name));
    format!("judge=--policy {} --ref {}", path("judge"), path("base"))
}

fn round(world: &Path, runs: &str) -> Command {
    just(world, runs, &[&judge(world)], "round")
}

/// Runs it for a while, then kills the whole group: just, its shell and the tool at work.
fn kill_after(command: Command, milliseconds: u64) {
    let until = Instant::now() + Duration::from_millis(milliseconds);
    kill_when(command, || Instant::now() > until);
}

/// Kills the whole group when something has come, or lets it end; whether it was killed.
fn kill_when(mut command: Command, come: impl Fn() -> bool) -> bool {
    let mut child = command
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    while !come() {
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    let _ = Command::new("kill")
        .args(["-KILL", "--", &format!("-{}", child.id())])
        .stderr(Stdio::null())
        .status();
    child.wait().unwrap();
    true
}

/// Whether a file or a folder of work that is begun holds any of it.
fn is_begun(part: &Path) -> bool {
    match fs::read_dir(part) {
        Ok(mut entries) => entries.next().is_some(),
        Err(_) => part.metadata().is_ok_and(|meta| meta.len() > 0),
    }
}

/// What every stage of a first round works on, in order.
const STAGES: [&str; 11] = [
    "policy-0.part",
    "round-1/samples.jsonl.part",
    "round-1/scored.jsonl.part",
    "round-1/pairs.jsonl.part",
    "policy-1.part",
    "round-1/before-samples.jsonl.part",
    "round-1/after-samples.jsonl.part",
    "round-1/before.jsonl.part",
    "round-1/after.jsonl.part",
    "round-1/judged.jsonl.part",
    "round-1/summary.part",
];

#[track_caller]
fn succeeds(mut command: Command) -> String {
    let output = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn fails(mut command: Command, why: &str) {
    let output = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && stderr.contains(why), "{stderr}");
}

fn world() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let tiny = Tiny {
        context: 1024,
        ..Tiny::default()
    };
    tiny.write(&folder.path().join("base"), 1);
    tiny.write(&folder.path().join("judge"), 2);
    let prompts: Vec<_> = (0..40)
        .map(|i| json!({"prompt": format!("Say {i}")}))
        .collect();
    fs::write(folder.path().join("prompts.jsonl"), lines(&prompts)).unwrap();
    let pairs: Vec<_> = (0..40)
        .map(|i| json!({"prompt": format!("Offline {i}"), "chosen": "yes, gladly", "rejected": "no"}))
        .collect();
    fs::write(folder.path().join("preferences.jsonl"), lines(&pairs)).unwrap();
    folder
}

/// Everything that two rounds must leave behind, whatever happened on the way.
const RESULTS: [&str; 14] = [
    "policy-0/model.safetensors",
    "seed-steps.jsonl",
    "round-1/samples.jsonl",
    "round-1/scored.jsonl",
    "round-1/pairs.jsonl",
    "round-1/steps.jsonl",
    "round-1/win-rate.jsonl",
    "policy-1/model.safetensors",
    "round-2/samples.jsonl",
    "round-2/scored.jsonl",
    "round-2/pairs.jsonl",
    "round-2/steps.jsonl",
    "round-2/win-rate.jsonl",
    "policy-2/model.safetensors",
];

/// A round's commands repeat it by themselves; `just` does not go on with a round that was begun otherwise.
fn again(folder: &Path, just: Command) {
    let script = folder.join("commands.sh");
    for file in ["pairs.jsonl", "win-rate.jsonl", "summary.md"] {
        fs::remove_file(folder.join(file)).unwrap();
    }
    let commands = fs::read_to_string(&script).unwrap();
    fs::write(&script, commands.replace("--k 4", "--k 5")).unwrap();
    fails(just, "was begun with other settings");

    fs::write(&script, commands).unwrap();
    let mut bash = Command::new("bash");
    bash.arg(&script);
    succeeds(bash);
    assert!(folder.join("summary.md").exists());
}

#[test]
fn two_rounds_and_the_same_under_fire() {
    if !just_is_there() {
        return;
    }
    let folder = world();
    let world = folder.path();
    for t in [1, 2] {
        let stdout = succeeds(round(world, "calm"));
        assert!(stdout.starts_with(&format!("# Round {t}: ")), "{stdout}");
        for (what, name) in [
            ("new policy", format!("calm/policy-{t}")),
            ("report of all rounds", "calm/report.html".into()),
            ("the commands", format!("calm/round-{t}/commands.sh")),
        ] {
            let path = text(&world.join(name));
            assert!(stdout.contains(&format!("- {what}: {path}\n")), "{stdout}");
            assert!(Path::new(&path).exists(), "{path}");
        }
    }
    // The report has both rounds, their win rates and their commands.
    let report = fs::read_to_string(world.join("calm/report.html")).unwrap();
    for t in [1, 2] {
        let win_rates = read_rows(&world.join(format!("calm/round-{t}/win-rate.jsonl")));
        assert_eq!(win_rates[0]["n_total"], 4);
        let row = format!("round {t}: {}", win_rates[0]["model"].as_str().unwrap());
        assert!(report.contains(&row), "{row}");
        assert!(report.contains(&format!("# Round {t}, from ")));
    }
    // The second round's reward is against the first round's start.
    let scored = |t: u8| read_rows(&world.join(format!("calm/round-{t}/scored.jsonl")));
    assert_eq!(scored(1)[0]["policy"], scored(2)[0]["ref"]);
    assert_ne!(scored(1)[0]["policy"], scored(2)[0]["policy"]);

    again(&world.join("calm/round-2"), round(world, "calm"));

    // A kill in the middle of every stage of the first round, then kills at moments that spread over both. Where a stage
    // was over before it was seen, the round ends, and a new one waits for the next stage.
    let fire = world.join("fire");
    let mut struck = vec![];
    for stage in STAGES {
        let part = fire.join(stage);
        if kill_when(round(world, "fire"), || is_begun(&part)) {
            struck.push(stage);
        } else {
            first_round(world, "fire");
            fs::remove_dir_all(&fire).unwrap();
        }
    }
    eprintln!("struck: {struck:?}");
    assert!(struck.len() >= 7, "too quick to be struck: only {struck:?}");
    let mut wait = 120;
    while !fire.join("round-2/summary.md").exists() {
        kill_after(round(world, "fire"), wait);
        wait = wait * 5 / 4;
        assert!(wait < 600_000, "no end in sight");
    }
    for file in RESULTS {
        check_same(world, file, "fire");
    }

    // A disk that is too small for the first round, again and again.
    let mut kib = 300;
    let Some(disk) = Mount::new(&world.join("small"), kib) else {
        return;
    };
    let mut refused = 0;
    while !world.join("small/round-1/summary.md").exists() {
        let output = round(world, "small").output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        if !output.status.success() {
            assert!(stderr.contains("No space left on device"), "{stderr}");
            refused += 1;
        }
        kib += kib / 4;
        disk.resize(kib);
        assert!(refused < 30, "no end in sight");
    }
    assert!(refused > 2, "the disk was large enough");
    first_round(world, "small");
}

/// Whoever has a DPO-tuned model and its reference starts there; with no preference pairs at all there is nothing to replay.
#[test]
fn rounds_from_a_policy_that_is_there() {
    if !just_is_there() {
        return;
    }
    let folder = world();
    let world = folder.path();
    let given = |policy: &str, reference: &str| {
        let policy = format!("policy={}", text(&world.join(policy)));
        let reference = format!("reference={reference}");
        let variables = [&policy, &reference, "preferences="];
        just(world, "runs", &variables, "round")
    };
    for t in [1, 2] {
        let summary = succeeds(given("judge", "base"));
        assert!(summary.starts_with(&format!("# Round {t}: ")), "{summary}");
        assert!(!summary.contains("Preference pairs"), "{summary}");
        let pairs = read_rows(&world.join(format!("runs/round-{t}/pairs.jsonl")));
        assert!(!pairs.is_empty());
        assert!(pairs.iter().all(|pair| pair["source"] == "generated"));
    }
    assert!(!world.join("runs/policy-0").exists(), "no seed policy");
    let scored = |t: u8| read_rows(&world.join(format!("runs/round-{t}/scored.jsonl")))[0].clone();
    assert_eq!(scored(1)["ref"], scored(2)["ref"], "the base model");
    assert_ne!(scored(1)["policy"], scored(2)["policy"]);

    fails(given("base", "base"), "was begun with other settings");
    fails(given("judge", "first"), "known are previous and base");
    let bare = just(world, "bare", &["preferences="], "round");
    fails(bare, "a seed policy takes preferences=");
}

/// The first round's results are the calm one's.
#[track_caller]
fn first_round(world: &Path, runs: &str) {
    for file in RESULTS.into_iter().filter(|file| !file.contains("-2")) {
        check_same(world, file, runs);
    }
}

#[track_caller]
fn check_same(world: &Path, file: &str, runs: &str) {
    let read = |runs: &str| {
        fs::read(world.join(runs).join(file)).unwrap_or_else(|err| panic!("{runs}/{file}: {err}"))
    };
    assert!(read("calm") == read(runs), "{file} is another in {runs}");
}

#[test]
fn a_sweep_chooses_by_validation_and_goes_on_after_kills() {
    if !just_is_there() {
        return;
    }
    let folder = world();
    let world = folder.path();
    let table = succeeds(just(world, "calm", &[], "sweep"));
    let read = |file: &str| fs::read_to_string(world.join(file)).unwrap();
    let points = read_rows(&world.join("calm/sweep/sweep.jsonl"));
    assert_eq!(points.len(), 4 * 3 + 1);
    let accuracy = |row: &Fields| {
        let figures = row["validation"].as_object().unwrap();
        ["accuracy", "margin"].map(|figure| figures[figure]["value"].as_f64().unwrap())
    };
    let best = points
        .iter()
        .max_by(|a, b| accuracy(a).partial_cmp(&accuracy(b)).unwrap())
        .unwrap();
    let tested = |point: &Fields| {
        let test = format!("calm/sweep/{}/test.json", point["point"].as_str().unwrap());
        world.join(test).exists()
    };
    for point in &points {
        assert_eq!(point["steps"], points[0]["steps"]);
        assert_eq!(tested(point), point == best, "the test is looked at once");
    }
    assert_eq!(table.matches("| chosen |").count(), 1);
    assert!(table.contains("looked at once"));

    let mut wait = 1000;
    while !world.join("fire/sweep/sweep.md").exists() {
        kill_after(just(world, "fire", &[], "sweep"), wait);
        wait = wait * 5 / 4;
        assert!(wait < 600_000, "no end in sight");
    }
    for file in ["sweep.jsonl", "sweep.md"] {
        let [calm, fire] = ["calm", "fire"].map(|runs| read(&format!("{runs}/sweep/{file}")));
        assert_eq!(calm, fire, "{file}");
    }

    let table = succeeds(just(world, "calm", &[], "sweep"));
    assert_eq!(table, read("calm/sweep/sweep.md"));
    let other = just(world, "calm", &["gamma=0", "k=5"], "sweep");
    fails(other, "was begun with other settings");
}

#[test]
fn a_sweep_with_a_judge_chooses_by_win_rate() {
    if !just_is_there() {
        return;
    }
    let folder = world();
    let server = JudgeServer::start(&[Act::Weigh]);
    let judge = format!("judge=--endpoint {} --judge llama", server.url);
    let table = succeeds(just(folder.path(), "runs", &[&judge], "sweep"));
    assert!(table.contains("length-controlled win rate"), "{table}");
    assert_eq!(table.matches("| chosen |").count(), 1);
    assert!(server.asked() > 0);
}

#[test]
fn the_experiment_has_all_its_arms_and_goes_on_after_kills() {
    if !just_is_there() {
        return;
    }
    let folder = world();
    let world = folder.path();
    let run = |runs| just(world, runs, &["judged=12"], "experiment");
    let results = succeeds(run("calm"));
    let rates = read_rows(&world.join("calm/experiment/results.jsonl"));
    let arms = ["dice", "alpha-0", "no-replay", "offline"];
    let expected: Vec<_> = arms
        .iter()
        .flat_map(|arm| [1, 2].map(|t| format!("{arm}-{t}")))
        .collect();
    let names: Vec<_> = rates.iter().map(|row| row["model"].as_str()).collect();
    assert_eq!(
        names,
        expected.iter().map(|n| Some(&n[..])).collect::<Vec<_>>()
    );
    for rate in &rates {
        assert_eq!(
            (&rate["baseline"], &rate["n_total"]),
            (&json!("seed"), &json!(12))
        );
        let name = rate["model"].as_str().unwrap();
        assert!(results.contains(&format!("| {name} |")), "{results}");
        let (arm, t) = name.rsplit_once('-').unwrap();
        let at = |file: &str| world.join("calm/experiment").join(arm).join(file);
        let steps = read_rows(&at(&format!("round-{t}/steps.jsonl"))).len();
        assert_eq!(steps, 6 / 4, "as many in every arm");
        let pairs = read_rows(&at(&format!("round-{t}/pairs.jsonl")));
        let replayed = pairs.iter().filter(|p| p["source"] == "replay").count();
        match arm {
            "offline" => assert_eq!(replayed, pairs.len()),
            "no-replay" => assert_eq!(replayed, 0),
            _ => assert!(0 < replayed && replayed < pairs.len()),
        }
    }
    // The halves share no prompt, and neither has one that is judged.
    let prompts = |file: &str| -> Vec<_> {
        let rows = read_rows(&world.join("calm/experiment").join(file));
        rows.iter().map(|row| row["prompt"].clone()).collect()
    };
    let [a, b, judged] = ["a.jsonl", "b.jsonl", "judged-prompts.jsonl"].map(prompts);
    assert!(a.len() > 5 && b.len() > 5 && a.len() + b.len() == 40);
    assert!(!a.iter().any(|prompt| b.contains(prompt)));
    assert!(!judged.iter().any(|p| a.contains(p) || b.contains(p)));

    let mut wait = 1000;
    while !world.join("fire/experiment/results.md").exists() {
        kill_after(run("fire"), wait);
        wait = wait * 5 / 4;
        assert!(wait < 600_000, "no end in sight");
    }
    let [calm, fire] = ["calm", "fire"]
        .map(|runs| fs::read(world.join(runs).join("experiment/results.jsonl")).unwrap());
    assert!(calm == fire, "kills changed the results");
}

/// A program says what is preferred: it judges, and has an arm of its own.
#[test]
fn an_experiment_may_know_what_is_preferred() {
    if !just_is_there() {
        return;
    }
    let folder = world();
    let world = folder.path();
    // Short responses are good ones.
    let script = "import json, sys\nfor line in sys.stdin:\n    row = json.loads(line)\n    \
        print(json.dumps({**row, 'reward': -len(row['response'])}))\n";
    fs::write(world.join("marks.py"), script).unwrap();
    let marks = format!("marks=python3 {}", world.join("marks.py").display());
    let flags = ["judged=12", "arms=offline base-reference", &marks];
    let results = succeeds(just(world, "runs", &flags, "experiment"));
    let at = |file: &str| world.join("runs/experiment").join(file);
    let rates = read_rows(&at("results.jsonl"));
    let names: Vec<_> = rates
        .iter()
        .map(|row| row["model"].as_str().unwrap())
        .collect();
    let expected = [
        "dice-1",
        "dice-2",
        "offline-1",
        "offline-2",
        "base-reference-2",
        "marks-1",
        "marks-2",
    ];
    assert_eq!(names, expected);
    assert!(!at("judge").exists(), "no model judges");
    for row in [
        "dice-1-chosen",
        "base-reference-2-chosen",
        "dice-2",
        "base-reference-2",
    ] {
        assert!(results.contains(&format!("| {row} |")), "{row}: {results}");
    }
    // Both arms' second rounds have one policy's samples, under rewards against another reference.
    let scored = |arm: &str| read_rows(&at(&format!("{arm}/round-2/scored.jsonl")))[0].clone();
    let [dice, base] = ["dice", "base-reference"].map(scored);
    assert_eq!(
        (&dice["response"], &dice["policy"]),
        (&base["response"], &base["policy"])
    );
    assert_ne!(dice["ref"], base["ref"]);
    for t in [1, 2] {
        for pair in read_rows(&at(&format!("marks/round-{t}/pairs.jsonl"))) {
            let length = |which: &str| pair[which].as_str().unwrap().chars().count();
            if pair["source"] == "generated" {
                assert!(length("chosen") < length("rejected"));
            }
        }
        // Verdicts on the pairs that DICE made are those of the program.
        for row in read_rows(&at(&format!("dice/round-{t}/dice-{t}-chosen-judged.jsonl"))) {
            let length = |which: &str| row[which].as_str().unwrap().chars().count();
            let wins = row["preference"].as_f64().unwrap() > 1.5;
            assert_eq!(wins, length("output_2") < length("output_1"), "{row:?}");
        }
    }
}
