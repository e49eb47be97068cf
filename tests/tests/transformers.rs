//! What `dice-train` writes loads in transformers and gives our log-probs there. Needs `DICE_PYTHON`: a Python with
//! torch and transformers.

use dice_tests::{
    Family, Fields, Finished, Tiny, Tool, golden, lines, read_rows, real_model, text,
};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::process::Command;

/// The Python with transformers, or none, which is said.
fn python() -> Option<String> {
    let python = std::env::var("DICE_PYTHON").ok();
    if python.is_none() {
        eprintln!("skipped: DICE_PYTHON names no Python that has torch and transformers");
    }
    python
}

/// The checker's verdict on a checkpoint and on the log-probs of its rows.
fn check(python: &str, checkpoint: &Path, rows: &Path) -> Finished {
    let mut command = Command::new(python);
    command
        .args([&golden("check_checkpoint.py"), checkpoint, rows])
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("HF_HUB_OFFLINE", "1");
    Tool::of("python", command).run()
}

/// One step of DPO from a model, then rows scored with the result.
fn trained_and_scored(model: &str, folder: &Path, rows: &[Fields]) {
    let pair = json!({"prompt": "What is the capital of France?", "chosen": "It is Paris.", "rejected": "I do not know, ask somebody else."});
    let next = text(&folder.join("next"));
    let args = [
        "--model",
        model,
        "--output",
        &next,
        "--learning-rate",
        "1e-5",
    ];
    Tool::new("dice-train", args)
        .stdin(lines(&[pair]))
        .run()
        .ok();
    let rows: Vec<Value> = rows.iter().cloned().map(Value::from).collect();
    let args = ["--policy", &next, "--ref", model];
    let scored = Tool::new("dice-score", args).stdin(lines(&rows)).run().ok();
    fs::write(folder.join("scored.jsonl"), scored.stdout).unwrap();
}

#[test]
fn a_trained_tiny_checkpoint_loads_in_transformers() {
    let Some(python) = python() else { return };
    let rows = [
        json!({"prompt": "Say the thé 🦊", "response": "the end"}),
        json!({"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}], "response": "Hi.", "finish_reason": "length"}),
    ];
    let rows = dice_tests::parse_rows(&lines(&rows));
    let trained = |family| {
        let folder = tempfile::tempdir().unwrap();
        let tiny = Tiny {
            family,
            ..Tiny::default()
        };
        tiny.write(&folder.path().join("pi"), 1);
        trained_and_scored(&text(&folder.path().join("pi")), folder.path(), &rows);
        let scored = folder.path().join("scored.jsonl");
        let verdict = check(&python, &folder.path().join("next"), &scored).ok();
        assert_eq!(verdict.rows().len(), rows.len(), "{family:?}");
        folder
    };
    for family in [Family::Phi3, Family::Mixture] {
        trained(family);
    }
    let folder = trained(Family::Llama);
    let (folder, scored) = (folder.path(), folder.path().join("scored.jsonl"));

    // The checker can tell.
    let mut wrong = read_rows(&scored);
    wrong[1]["policy_logps"] = json!(dice_tests::number(&wrong[1], "policy_logps") + 0.01);
    let wrong: Vec<Value> = wrong.into_iter().map(Value::from).collect();
    fs::write(&scored, lines(&wrong)).unwrap();
    let verdict = check(&python, &folder.join("next"), &scored);
    assert_eq!(verdict.code, Some(1), "{}", verdict.stderr);
    verdict.note("scored.jsonl:2: policy_logps is");
}

#[test]
fn a_trained_real_checkpoint_loads_in_transformers() {
    let (Some(python), Some(model)) = (python(), real_model()) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let rows: Vec<Fields> = read_rows(&golden("smollm2_logps.jsonl"))
        .into_iter()
        .step_by(9)
        .collect();
    trained_and_scored(&model, folder, &rows);
    let verdict = check(&python, &folder.join("next"), &folder.join("scored.jsonl")).ok();
    assert_eq!(verdict.rows().len(), rows.len());
    // The step was one: the trained model is another.
    let moved = verdict.rows().iter().zip(&rows).any(|(row, golden)| {
        (dice_tests::number(row, "logp") - dice_tests::number(golden, "logp64")).abs() > 5e-3
    });
    assert!(moved, "training changed nothing");
}
