//! Killed, stopped and torn runs: `--resume` makes of them, byte for byte, what an undisturbed run makes.

use dice_tests::world::{
    Made, Moment, ROW_TOOLS, TOOLS, World, newest_checkpoint, pairs, prompts, samples, signal,
};
use dice_tests::{Finished, Tool, copy_folder, lines, parse_rows, text};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde_json::json;
use std::fs;
use std::net::TcpListener;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// SIGKILLs per tool: `DICE_KILLS`, else few enough for every run of the tests.
fn kills() -> usize {
    match std::env::var("DICE_KILLS") {
        Ok(kills) => kills.parse().expect("DICE_KILLS is a number"),
        Err(_) => 12,
    }
}

fn below(rng: &mut ChaCha8Rng, n: u64) -> u64 {
    rng.next_u64() % n.max(1)
}

/// Kills a tool again and again, resuming it each time, until it is done; and that again until there were `kills()`.
fn kill_and_resume(tool: &str) {
    let world = World::new();
    let (straight, duration) = world.undisturbed(tool);
    let rows = ROW_TOOLS.contains(&tool);
    // What grows as the work goes on.
    let watched = world.path(if rows { "out.part" } else { "out.log" });
    let size = match rows {
        true => straight.files[""].len(),
        false => straight.log.len(),
    } as u64;
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let (mut killed, mut in_the_middle, mut attempts) = (0, 0, 0);
    while killed < kills() {
        // At most three kills a job, so that some jobs are killed once and some while they go on for the third time.
        for _ in 0..1 + below(&mut rng, 3) {
            attempts += 1;
            assert!(
                attempts < 20 * kills(),
                "only {killed} of {attempts} runs were killed before their end"
            );
            let moment = match below(&mut rng, 2) {
                0 => Moment::Time(duration.mul_f64(below(&mut rng, 1000) as f64 / 1000.0)),
                _ => Moment::Bytes(watched.clone(), below(&mut rng, size)),
            };
            let mut child = world
                .tool(tool, "out")
                .args(["--resume"])
                .stdout_to(world.path("out.log"))
                .start();
            moment.wait(&mut child);
            child.kill().unwrap();
            let output = child.wait_with_output().unwrap();
            if output.status.signal().is_none() {
                Finished::new(tool, output).ok();
                break;
            }
            killed += 1;
            in_the_middle += usize::from(check_left(&world, &straight));
        }
        world
            .tool(tool, "out")
            .args(["--resume"])
            .stdout_to(world.path("out.log"))
            .run()
            .ok();
        if !world
            .path("out.log")
            .metadata()
            .is_ok_and(|log| log.len() == 0 && !rows)
        {
            Made::read(&world, "out").assert_same(&straight);
        }
        world.check_no_part_left();
        world.remove("out");
    }
    assert!(
        in_the_middle > 0,
        "no kill of {killed} hit {tool} at its work"
    );
}

/// After a kill: what is there is a part of what will be. Gives whether there was work to keep.
fn check_left(world: &World, straight: &Made) -> bool {
    let (out, part) = (world.path("out"), world.path("out.part"));
    if out.is_file() {
        assert!(
            fs::read(&out).unwrap() == straight.files[""],
            "a torn file has the name of a whole one"
        );
    } else if out.is_dir() {
        let files = Made::files(&out);
        assert!(
            files == straight.files,
            "a torn folder has the name of a whole one"
        );
    }
    if part.is_file() {
        let bytes = fs::read(&part).unwrap();
        assert!(
            straight.files[""].starts_with(&bytes),
            "rows were lost or doubled on the way"
        );
        return !bytes.is_empty();
    }
    // Where the output is there, the part was being removed.
    part.is_dir() && !out.exists() && newest_checkpoint(&part).is_some()
}

#[test]
fn killed_sampling_goes_on() {
    kill_and_resume("dice-gen");
}

#[test]
fn killed_scoring_goes_on() {
    kill_and_resume("dice-score");
}

#[test]
fn killed_choosing_goes_on() {
    kill_and_resume("dice-pairs");
}

#[test]
fn killed_judging_goes_on() {
    kill_and_resume("dice-eval");
}

#[test]
fn killed_training_goes_on_to_the_same_weights() {
    kill_and_resume("dice-train");
}

#[test]
fn a_signal_leaves_what_can_be_gone_on_with() {
    for (name, code) in [("INT", 130), ("TERM", 143)] {
        for tool in ["dice-gen", "dice-score", "dice-eval", "dice-train"] {
            let world = World::new();
            let (straight, _) = world.undisturbed(tool);
            let watched = if tool == "dice-train" {
                "out.log"
            } else {
                "out.part"
            };
            // No checkpoint but the one that the signal causes.
            let run = match tool {
                "dice-train" => world.train("out", 1_000_000),
                _ => world.tool(tool, "out"),
            };
            let mut child = run.stdout_to(world.path("out.log")).start();
            Moment::Bytes(world.path(watched), 1).wait(&mut child);
            signal(&child, name);
            let stopped = Finished::new(tool, child.wait_with_output().unwrap());
            assert_eq!(stopped.code, Some(code), "{tool}: {}", stopped.stderr);
            stopped.note(&format!("stopped by SIG{name}"));
            assert!(!world.path("out").exists());
            assert!(check_left(&world, &straight), "{tool} keeps nothing");
            let done = world
                .tool(tool, "out")
                .args(["--resume"])
                .stdout_to(world.path("out.log"))
                .run()
                .ok();
            done.note("kept from before");
            Made::read(&world, "out").assert_same(&straight);
        }
    }
}

/// A program at its work whose input stays open, and which has begun to read it.
fn waiting_for_input(world: &World) -> Child {
    let args = [
        "--model",
        &world.arg("pi"),
        "--k",
        "1",
        "--output",
        &world.arg("out"),
        "--resume",
    ];
    let mut child = Command::new(dice_tests::bin_folder().join("dice-gen"))
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    Moment::Bytes(world.path("out.part.run.json"), 1).wait(&mut child);
    child
}

/// A program hears a signal also while it waits for its neighbour's next row,
#[test]
fn a_signal_ends_the_wait_for_input() {
    let world = World::new();
    let mut child = waiting_for_input(&world);
    let stdin = child.stdin.take();
    signal(&child, "TERM");
    let stopped = Finished::new("dice-gen", child.wait_with_output().unwrap());
    assert_eq!(stopped.code, Some(143), "{}", stopped.stderr);
    drop(stdin);
    world.check_no_part_left();
}

/// and while a judge that is a command of its own takes its time.
#[test]
fn a_signal_ends_the_wait_for_a_judge() {
    let world = World::new();
    let begun = world.path("begun");
    let command = format!("echo > {}; exec sleep 600", text(&begun));
    let [a, b] = ["a.jsonl", "samples.jsonl"].map(|name| world.arg(name));
    let judge = ["judge", "--a", &a, "--b", &b, "--command", &command];
    let mut child = Tool::new("dice-eval", judge)
        .args(["--output", &world.arg("out")])
        .start();
    Moment::Bytes(begun, 1).wait(&mut child);
    signal(&child, "TERM");
    let stopped = Finished::new("dice-eval", child.wait_with_output().unwrap());
    assert_eq!(stopped.code, Some(143), "{}", stopped.stderr);

    // A server that never answers.
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/v1", server.local_addr().unwrap());
    let judge = [
        "judge",
        "--a",
        &a,
        "--b",
        &b,
        "--endpoint",
        &url,
        "--judge",
        "j",
    ];
    let child = Tool::new("dice-eval", judge)
        .args(["--output", &world.arg("asked")])
        .start();
    let asked = server.accept().unwrap();
    signal(&child, "TERM");
    let stopped = Finished::new("dice-eval", child.wait_with_output().unwrap());
    assert_eq!(stopped.code, Some(143), "{}", stopped.stderr);
    drop(asked);
}

#[test]
fn torn_rows_are_cut_and_made_again() {
    for tool in ROW_TOOLS {
        let world = World::new();
        let (straight, _) = world.undisturbed(tool);
        let whole = &straight.files[""];
        let ends: Vec<usize> = (0..whole.len()).filter(|&i| whole[i] == b'\n').collect();
        for cut in [
            3,
            ends[0],
            ends[0] + 1,
            ends[4] + 1,
            ends[5] + 9,
            ends[ends.len() - 1],
            whole.len(),
        ] {
            fs::write(world.path("out.part"), &whole[..cut]).unwrap();
            world
                .tool(tool, "out")
                .args(["--resume"])
                .stdout_to(world.path("out.log"))
                .run()
                .ok();
            Made::read(&world, "out").assert_same(&straight);
            fs::remove_file(world.path("out")).unwrap();
        }
        // A power cut may leave a last line of zeros.
        fs::write(
            world.path("out.part"),
            [&whole[..=ends[2]], b"\0\0\0\0\n"].concat(),
        )
        .unwrap();
        world
            .tool(tool, "out")
            .args(["--resume"])
            .stdout_to(world.path("out.log"))
            .run()
            .ok();
        Made::read(&world, "out").assert_same(&straight);
        fs::remove_file(world.path("out")).unwrap();
        // In the middle, it is no leftover of ours.
        fs::write(
            world.path("out.part"),
            [b"torn\n", &whole[..=ends[2]]].concat(),
        )
        .unwrap();
        let refused = world.tool(tool, "out").args(["--resume"]).run();
        assert!(
            refused.error_line().contains("out.part:1: not JSON"),
            "{}",
            refused.stderr
        );
    }
}

#[test]
fn input_from_a_pipe_is_gone_on_with_too() {
    let world = World::new();
    for (tool, input, args) in [
        (
            "dice-gen",
            "prompts.jsonl",
            ["--model", "pi", "--k", "4", "--max-tokens", "24"].as_slice(),
        ),
        (
            "dice-score",
            "samples.jsonl",
            &["--policy", "pi", "--ref", "ref"],
        ),
        ("dice-pairs", "scored.jsonl", &["--min-samples", "2"]),
    ] {
        let args = args.iter().map(|arg| {
            if ["pi", "ref"].contains(arg) {
                world.arg(arg)
            } else {
                (*arg).to_owned()
            }
        });
        let rows = fs::read(world.path(input)).unwrap();
        let run = |more: &[&str]| {
            Tool::new(tool, args.clone())
                .args(more)
                .stdin(rows.clone())
                .run()
                .ok()
        };
        let straight = run(&[]).stdout;
        let half = straight.len() / 2;
        fs::write(world.path("out.part"), &straight[..half]).unwrap();
        run(&["--output", &world.arg("out"), "--resume"]);
        assert!(
            fs::read_to_string(world.path("out")).unwrap() == straight,
            "{tool}: rows were lost"
        );
        fs::remove_file(world.path("out")).unwrap();
    }
}

#[test]
fn work_is_neither_overwritten_nor_done_twice() {
    for tool in TOOLS {
        let world = World::new();
        let first = world.tool(tool, "out").run().ok();
        let refused = world.tool(tool, "out").run();
        assert!(
            refused.error_line().contains("out is already there"),
            "{}",
            refused.stderr
        );
        let (before, missing) = (
            world.path("out").metadata().unwrap().modified().unwrap(),
            world.path("pi"),
        );
        fs::rename(missing, world.path("gone")).unwrap();
        let done = world.tool(tool, "out").args(["--resume"]).run().ok();
        assert!(
            done.stderr.contains("out is already there, nothing to do"),
            "{}",
            done.stderr
        );
        // Steps are said again, so that `dice-train --resume > steps.jsonl` loses none.
        assert_eq!(done.stdout, first.stdout, "{tool}");
        assert_eq!(
            world.path("out").metadata().unwrap().modified().unwrap(),
            before
        );
        fs::rename(world.path("gone"), world.path("pi")).unwrap();
        if tool != "dice-pairs" {
            // Where it is there, it is the one that made the file.
            fs::rename(world.path("pi"), world.path("gone")).unwrap();
            copy_folder(&world.path("ref"), &world.path("pi"));
            let other = world.tool(tool, "out").args(["--resume"]).run();
            let line = other.error_line();
            assert!(
                line.contains("the run that made it was another one"),
                "{line}"
            );
            fs::remove_dir_all(world.path("pi")).unwrap();
            fs::rename(world.path("gone"), world.path("pi")).unwrap();
        }
        let others: &[&str] = match tool {
            "dice-gen" => &["--split test", "--dtype bf16"],
            "dice-train" => &[
                "--split test",
                "--epochs 3",
                "--max-length 64",
                "--dtype bf16",
                "--lora-rank 2 --merge",
            ],
            _ => &[],
        };
        for other in others {
            let run = world.tool(tool, "out").args(["--resume"]);
            let run = run.args(other.split(' ')).run();
            let line = run.error_line();
            assert!(
                line.contains("the run that made it was another one"),
                "{tool} {other}: {line}"
            );
        }
        let input = World::input(tool);
        let rows = fs::read_to_string(world.path(input)).unwrap();
        fs::write(world.path(input), format!("\n{rows}")).unwrap();
        let other = world.tool(tool, "out").args(["--resume"]).run();
        let line = other.error_line();
        assert!(line.contains("it was made of other files"), "{line}");
        fs::write(world.path(input), rows).unwrap();

        let started = world.path("next.part");
        if tool == "dice-train" {
            fs::create_dir_all(started.join("checkpoint-2")).unwrap();
        } else {
            fs::write(&started, "{}\n").unwrap();
        }
        let refused = world.tool(tool, "next").run();
        let line = refused.error_line();
        assert!(
            line.contains("next.part is there from an interrupted run: pass --resume"),
            "{line}"
        );
    }
}

/// Stops a tool in the middle; what it leaves is for `--resume` of the same command only.
fn interrupted(world: &World, tool: &str) {
    let log = world.path("out.log");
    let watched = if tool == "dice-train" {
        log.clone()
    } else {
        world.path("out.part")
    };
    let mut child = world.tool(tool, "out").stdout_to(log).start();
    Moment::Bytes(watched, 1).wait(&mut child);
    signal(&child, "TERM");
    assert_eq!(
        child.wait_with_output().unwrap().status.code(),
        Some(143),
        "{tool} was stopped"
    );
}

#[test]
fn another_run_is_not_gone_on_with() {
    let world = World::new();
    let mut first = prompts();
    first[0]["prompt"] = json!("Something else");
    fs::write(world.path("other.jsonl"), lines(&first)).unwrap();
    let mut first = samples();
    first[0]["response"] = json!("Something else");
    fs::write(world.path("other-samples.jsonl"), lines(&first)).unwrap();
    let mut first = pairs();
    first[0]["chosen"] = json!("Something else");
    fs::write(world.path("other-pairs.jsonl"), lines(&first)).unwrap();
    let (pi, reference, input) = (
        world.arg("pi"),
        world.arg("ref"),
        world.arg("prompts.jsonl"),
    );
    let (samples, pairs) = (world.arg("samples.jsonl"), world.arg("pairs.jsonl"));
    let gen_args = |more: &[&str], model: &str, input: &str| {
        let base = ["--model", model, "--k", "4", "--max-tokens", "24", input].map(str::to_owned);
        Tool::new("dice-gen", base)
            .args(more)
            .args(["--output", &world.arg("out"), "--resume"])
    };
    interrupted(&world, "dice-gen");
    // The same id, another text.
    let part = fs::read_to_string(world.path("out.part")).unwrap();
    let mut edited = prompts();
    edited[0]["id"] = parse_rows(part.lines().next().unwrap())[0]["id"].clone();
    edited[0]["prompt"] = json!("Something else");
    fs::write(world.path("edited.jsonl"), lines(&edited)).unwrap();
    for (tool, difference) in [
        (gen_args(&["--seed", "5"], &pi, &input), "seed: 0, now 5"),
        (
            gen_args(&["--temperature", "0.5"], &pi, &input),
            "temperature: ",
        ),
        (
            gen_args(&["--system", "Be brief."], &pi, &input),
            "system: null, now \"Be brief.\"",
        ),
        (gen_args(&[], &reference, &input), "model: "),
        (
            gen_args(&[], &pi, &world.arg("other.jsonl")),
            "out.part:1: ",
        ),
        (
            gen_args(&[], &pi, &world.arg("edited.jsonl")),
            "out.part:1: ",
        ),
    ] {
        let run = tool.run();
        let line = run.error_line();
        assert!(
            line.contains(difference) && line.contains("remove"),
            "{line}"
        );
    }
    fs::remove_file(world.path("out.part")).unwrap();

    interrupted(&world, "dice-score");
    let score = |more: &[&str], policy: &str, input: &str| {
        let base = ["--policy", policy, "--ref", &reference, input].map(str::to_owned);
        Tool::new("dice-score", base)
            .args(more)
            .args(["--output", &world.arg("out"), "--resume"])
    };
    for (tool, difference) in [
        (
            score(&["--beta", "0.2"], &pi, &samples),
            "beta: 0.1, now 0.2",
        ),
        (
            score(&["--dtype", "bf16"], &pi, &samples),
            "dtype: \"f32\", now \"bf16\"",
        ),
        (score(&[], &reference, &samples), "policy: "),
        (
            score(&[], &pi, &world.arg("other-samples.jsonl")),
            "out.part:1: ",
        ),
    ] {
        let run = tool.run();
        let line = run.error_line();
        assert!(
            line.contains(difference) && line.contains("remove"),
            "{line}"
        );
    }
    fs::remove_file(world.path("out.part")).unwrap();

    interrupted(&world, "dice-train");
    let train = |more: &[&str], model: &str, input: &str| {
        let base = ["--model", model, "--batch-size", "2", input].map(str::to_owned);
        Tool::new("dice-train", base)
            .args(more)
            .args(["--output", &world.arg("out"), "--resume"])
    };
    let same = ["--learning-rate", "1e-3"];
    for (tool, difference) in [
        (
            train(&[], &pi, &pairs),
            "settings.learning_rate: 0.001, now 5e-7",
        ),
        (
            train(&["--learning-rate", "1e-3", "--seed", "2"], &pi, &pairs),
            "settings.seed: 0, now 2",
        ),
        (
            train(
                &["--learning-rate", "1e-3", "--lora-rank", "2"],
                &pi,
                &pairs,
            ),
            "settings.lora: null, now ",
        ),
        (
            train(
                &["--learning-rate", "1e-3", "--ref", &reference],
                &pi,
                &pairs,
            ),
            "ref: ",
        ),
        (train(&same, &reference, &pairs), "model: "),
        (
            train(&same, &pi, &world.arg("other-pairs.jsonl")),
            "pairs: ",
        ),
    ] {
        let run = tool.run();
        let line = run.error_line();
        assert!(
            line.contains(difference) && line.contains("remove"),
            "{line}"
        );
    }
}

#[test]
fn one_file_has_one_writer() {
    let world = World::new();
    let first = waiting_for_input(&world);
    let args = [
        "--model",
        &world.arg("pi"),
        "--output",
        &world.arg("out"),
        "--resume",
    ];
    let second = Tool::new("dice-gen", args).run();
    let line = second.error_line();
    assert!(
        line.contains("out.part is being written by another program"),
        "{line}"
    );
    // Closes its input.
    Finished::new("dice-gen", first.wait_with_output().unwrap()).ok();
    assert_eq!(fs::read(world.path("out")).unwrap(), b"");

    // So has one folder.
    let args = ["--model", &world.arg("pi"), "--output", &world.arg("next")];
    let train = || {
        let mut command = Command::new(dice_tests::bin_folder().join("dice-train"));
        command.args(args).stdin(Stdio::piped());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().unwrap()
    };
    let mut first = train();
    let mut come = || world.path("next.part").is_dir() || first.try_wait().unwrap().is_some();
    while !come() {
        std::thread::sleep(Duration::from_millis(1));
    }
    let second = Finished::new("dice-train", train().wait_with_output().unwrap());
    let line = second.error_line();
    assert!(
        line.contains("next.part is being written by another program"),
        "{line}"
    );
    let first = Finished::new("dice-train", first.wait_with_output().unwrap());
    assert!(first.error_line().contains("no pairs to train on"));
    assert!(!world.path("next.part").exists());
}
