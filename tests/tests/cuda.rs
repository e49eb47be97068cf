//! The tools with `--device cuda`, beside themselves on the CPU: on a GPU where there is one, else on the emulated one of
//! a build with `--features common/cuda-emulated`, else skipped.

use dice_tests::{Family, Fields, Tiny, Tool, lines, number, text};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Two models, if the tools have a GPU to run on.
fn world() -> Option<TempDir> {
    world_of(Tiny::default())
}

fn world_of(models: Tiny) -> Option<TempDir> {
    let run = Tool::new("dice-gen", ["--device", "cuda", "--model", "nowhere"]).run();
    let line = run.error_line();
    if !line.contains("nowhere") {
        eprintln!("skipped: {line}");
        return None;
    }
    let folder = tempfile::tempdir().unwrap();
    for (name, seed) in [("pi", 1), ("ref", 2)] {
        models.write(&folder.path().join(name), seed);
    }
    Some(folder)
}

fn prompts() -> String {
    let prompt = |i: usize| json!({"prompt": "Say it. ".repeat(i + 1), "id": format!("p{i}")});
    lines(&(0..4).map(prompt).collect::<Vec<Value>>())
}

fn generate(folder: &TempDir, more: &[&str]) -> Vec<Fields> {
    let model = text(&folder.path().join("pi"));
    let args = [
        "--model",
        &model,
        "--k",
        "3",
        "--max-tokens",
        "16",
        "--batch-size",
        "5",
        "--seed",
        "3",
    ];
    let run = Tool::new("dice-gen", args).args(more).stdin(prompts());
    run.run().ok().rows()
}

fn score(folder: &TempDir, rows: &[Fields], more: &[&str]) -> Vec<Fields> {
    let [pi, reference] = ["pi", "ref"].map(|name| text(&folder.path().join(name)));
    let rows: Vec<Value> = rows.iter().cloned().map(Value::from).collect();
    let run = Tool::new("dice-score", ["--policy", &pi, "--ref", &reference]).args(more);
    run.stdin(lines(&rows)).run().ok().rows()
}

fn assert_near(ours: &[Fields], theirs: &[Fields], field: &str, relative: f64) {
    assert_eq!(ours.len(), theirs.len());
    for (ours, theirs) in ours.iter().zip(theirs) {
        let (ours, theirs) = (number(ours, field), number(theirs, field));
        let off = (ours - theirs).abs();
        assert!(
            off <= relative * theirs.abs().max(1.0),
            "{field}: {ours}, not {theirs}"
        );
    }
}

#[test]
fn samples_and_rewards_are_the_cpus() {
    let Some(folder) = world() else { return };
    assert_samples_and_rewards_are_the_cpus(&folder);
}

#[test]
fn a_round_of_a_mixture_of_experts() {
    let mixture = Tiny {
        family: Family::Mixture,
        ..Tiny::default()
    };
    let Some(folder) = world_of(mixture) else {
        return;
    };
    assert_samples_and_rewards_are_the_cpus(&folder);
    let pair = json!({"prompt": "Say it.", "chosen": "It.", "rejected": "No, never."});
    let steps = |device: &str| {
        let [pi, next] = ["pi", device].map(|name| text(&folder.path().join(name)));
        let args = ["--model", &pi, "--output", &next, "--learning-rate", "1e-3"];
        let run = Tool::new("dice-train", args).args(["--device", device, "--max-steps", "3"]);
        run.args(["--epochs", "3"])
            .stdin(lines(std::slice::from_ref(&pair)))
            .run()
            .ok()
            .rows()
    };
    let (gpu, cpu) = (steps("cuda"), steps("cpu"));
    assert_eq!(gpu.len(), 3);
    for field in ["loss", "grad_norm", "rewards/margins"] {
        assert_near(&gpu, &cpu, field, 1e-4);
    }
}

fn assert_samples_and_rewards_are_the_cpus(folder: &TempDir) {
    for more in [
        &[][..],
        &["--top-k", "9", "--repetition-penalty", "1.2"],
        &["--stop", "e"],
    ] {
        let on = |device| {
            let more = [&["--device", device, "--dtype", "f32"], more].concat();
            generate(folder, &more)
        };
        let (gpu, cpu) = (on("cuda"), on("cpu"));
        assert_eq!(gpu.len(), 12);
        for (ours, theirs) in gpu.iter().zip(&cpu) {
            for field in [
                "id",
                "sample",
                "response",
                "token_ids",
                "finish_reason",
                "model",
            ] {
                assert_eq!(ours[field], theirs[field], "{field}, {more:?}");
            }
        }
        if more.is_empty() {
            assert_near(&gpu, &cpu, "logp", 1e-4);
        }
    }
    let mut rows = generate(folder, &["--device", "cpu", "--dtype", "f32"]);
    for row in &mut rows {
        row.shift_remove("logp"); // or the policy would not be run
    }
    let cpu = score(folder, &rows, &["--device", "cpu", "--dtype", "f32"]);
    // Log-probs of a dozen tokens of random weights: bfloat16 shows more than in real models' (the CPU's is 0.7% off).
    for (dtype, relative) in [("f32", 1e-4), ("f16", 4e-3), ("bf16", 3e-2)] {
        let gpu = score(folder, &rows, &["--device", "cuda", "--dtype", dtype]);
        for field in ["policy_logps", "ref_logps"] {
            assert_near(&gpu, &cpu, field, relative);
        }
    }
}

/// As on a CPU (`numbers.rs`): a row that the memory is too small for is left out, and the others are done.
#[test]
fn a_row_too_long_for_the_gpu_is_left_out() {
    let Some(folder) = world() else { return };
    let wide = Tiny {
        context: 4096,
        ..Tiny::default()
    };
    let [pi, reference, next] = ["wide", "other", "next"].map(|n| text(&folder.path().join(n)));
    wide.write(pi.as_ref(), 1);
    wide.write(reference.as_ref(), 2);
    let row = |tokens: usize| json!({"prompt": "8".repeat(tokens), "response": "nine", "chosen": "ten", "rejected": "eleven"});
    let rows = [row(100), row(3900), row(120)];
    for (tool, args, budget) in [
        (
            "dice-gen",
            &[
                "--model",
                &pi,
                "--k",
                "2",
                "--max-tokens",
                "4",
                "--batch-size",
                "2",
            ][..],
            "6M",
        ),
        ("dice-score", &["--policy", &pi, "--ref", &reference], "8M"),
        ("dice-train", &["--model", &pi, "--output", &next], "8M"),
    ] {
        let mut rows = rows.clone();
        if tool != "dice-train" {
            rows.iter_mut()
                .for_each(|row| drop(row.as_object_mut().unwrap().remove("rejected")));
        }
        let run = Tool::new(tool, args)
            .args([
                "--device",
                "cuda",
                "--dtype",
                "f32",
                "--memory-budget",
                budget,
            ])
            .stdin(lines(&rows))
            .run()
            .ok();
        let said = run.note("; left out");
        assert!(
            said.contains("stdin:2: ") && said.contains("memory"),
            "{tool}: {said}"
        );
        let done = match tool {
            "dice-gen" => 4,
            "dice-score" => 2,
            _ => 1,
        };
        assert_eq!(run.rows().len(), done, "{tool}");
    }
}

#[test]
fn half_precision_is_for_scoring_on_a_gpu() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    Tiny::default().write(&model, 1);
    let model = text(&model);
    let next = text(&folder.path().join("next"));
    for (tool, args) in [
        (
            "dice-score",
            &["--device", "cpu", "--policy", &model, "--ref", &model][..],
        ),
        ("dice-gen", &["--model", &model]),
        ("dice-train", &["--model", &model, "--output", &next]),
    ] {
        let tool_run = Tool::new(tool, args).args(["--dtype", "f16"]);
        let run = tool_run.stdin(prompts()).run();
        let line = run.error_line();
        assert!(
            line.contains("--dtype f16 is for scoring on a GPU"),
            "{tool}: {line}"
        );
    }
}

#[test]
fn a_gpu_that_is_not_there_is_one_clear_line() {
    for tool in ["dice-gen", "dice-score"] {
        let models: &[&str] = match tool {
            "dice-gen" => &["--model", "nowhere"],
            _ => &["--policy", "nowhere", "--ref", "nowhere"],
        };
        let run = Tool::new(tool, models).args(["--device", "cuda:99"]).run();
        let line = run.error_line();
        assert!(
            line.contains("--device cuda:99") && !line.contains("panicked"),
            "{line}"
        );
    }
}
