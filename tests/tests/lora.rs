//! Low-rank adapters: a PEFT folder that every tool takes as a model, equal to its merged form, resumed exactly.

use dice_tests::world::Made;
use dice_tests::{Family, Fields, Tiny, Tool, lines, number, text};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

struct World {
    folder: tempfile::TempDir,
}

const PAIRS: usize = 60;

impl World {
    fn new() -> Self {
        Self::of(Family::Llama)
    }

    fn of(family: Family) -> Self {
        let world = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        Tiny {
            hidden: 64,
            family,
            ..Tiny::default()
        }
        .write(&world.path("pi"), 1);
        world
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn arg(&self, name: &str) -> String {
        text(&self.path(name))
    }

    fn train(&self, model: &str, output: &str, more: &[&str]) -> Tool {
        let pairs: Vec<Value> = (0..PAIRS)
            .map(|i| json!({"prompt": format!("Say {i}"), "chosen": format!("Yes, {i}."), "rejected": "No."}))
            .collect();
        let args = [
            "--model",
            &self.arg(model),
            "--output",
            &self.arg(output),
            "--batch-size",
            "2",
            "--learning-rate",
            "1e-2",
        ];
        Tool::new("dice-train", args)
            .args(more)
            .stdin(lines(&pairs))
    }

    /// log π of some responses, as `dice-score --policy` gives them.
    fn logps(&self, policy: &str) -> Vec<f64> {
        let rows: Vec<Value> = (0..20)
            .map(|i| json!({"prompt": format!("Say {i}"), "response": format!("Yes, {}!", i * i)}))
            .collect();
        let args = ["--policy", &self.arg(policy), "--ref", &self.arg("pi")];
        let scored = Tool::new("dice-score", args)
            .stdin(lines(&rows))
            .run()
            .ok()
            .rows();
        scored
            .iter()
            .map(|row| number(row, "policy_logps"))
            .collect()
    }

    /// The tensors in a file of a folder.
    fn names(&self, folder: &str, file: &str) -> Vec<String> {
        let files = self.files(folder);
        let tensors = safetensors::SafeTensors::deserialize(&files[file]).unwrap();
        let mut names: Vec<_> = tensors.names().into_iter().map(str::to_owned).collect();
        names.sort();
        names
    }

    fn files(&self, folder: &str) -> BTreeMap<String, Vec<u8>> {
        let entries = fs::read_dir(self.path(folder))
            .unwrap()
            .map(|entry| entry.unwrap());
        entries
            .map(|entry| {
                (
                    entry.file_name().into_string().unwrap(),
                    fs::read(entry.path()).unwrap(),
                )
            })
            .collect()
    }
}

fn apart(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f64::max)
}

#[test]
fn an_adapter_is_a_model_and_equals_its_merged_form() {
    let world = World::new();
    let lora = ["--lora-rank", "4", "--lora-alpha", "8"];
    let steps = world.train("pi", "adapter", &lora).run().ok().rows();
    let merged_steps = world
        .train("pi", "merged", &[&lora[..], &["--merge"]].concat())
        .run()
        .ok()
        .rows();
    assert_eq!(steps, merged_steps);
    let loss = |step: &Fields| number(step, "loss");
    assert!(loss(steps.last().unwrap()) < 0.6, "{:?}", steps.last());

    let config: Value =
        serde_json::from_slice(&world.files("adapter")["adapter_config.json"]).unwrap();
    assert_eq!(config["peft_type"], "LORA");
    assert_eq!(
        (&config["r"], config["lora_alpha"].as_f64()),
        (&json!(4), Some(8.0))
    );
    assert_eq!(config["base_model_name_or_path"], json!(world.arg("pi")));
    let bytes = &world.files("adapter")["adapter_model.safetensors"];
    let tensors = safetensors::SafeTensors::deserialize(bytes).unwrap();
    // Seven projections of two layers, two factors each.
    assert_eq!(tensors.len(), 28);
    let a = tensors
        .tensor("base_model.model.model.layers.1.mlp.down_proj.lora_A.weight")
        .unwrap();
    let b = tensors
        .tensor("base_model.model.model.layers.1.mlp.down_proj.lora_B.weight")
        .unwrap();
    assert_eq!((a.shape(), b.shape()), (&[4, 128][..], &[64, 4][..]));
    assert!(!world.files("adapter").contains_key("model.safetensors"));
    assert!(!world.files("merged").contains_key("adapter_config.json"));

    let (base, adapter, merged) = (
        world.logps("pi"),
        world.logps("adapter"),
        world.logps("merged"),
    );
    assert!(apart(&adapter, &base) > 0.1, "training changed nothing");
    assert!(
        apart(&adapter, &merged) < 1e-4,
        "{}",
        apart(&adapter, &merged)
    );
}

/// What files have as one matrix is three projections, or two, to the trainer.
#[test]
fn so_is_an_adapter_of_fused_projections() {
    let world = World::of(Family::Phi3);
    let lora = ["--lora-rank", "4"];
    let merge = ["--lora-rank", "4", "--merge"];
    for (output, flags) in [("adapter", &lora[..]), ("merged", &merge), ("full", &[])] {
        world.train("pi", output, flags).run().ok();
    }
    // Four matrices of two layers, two factors each.
    assert_eq!(
        world.names("adapter", "adapter_model.safetensors").len(),
        16
    );
    for folder in ["merged", "full"] {
        let saved = world.names(folder, "model.safetensors");
        assert_eq!(saved, world.names("pi", "model.safetensors"));
    }
    let adapter = world.logps("adapter");
    assert!(apart(&adapter, &world.logps("pi")) > 0.1);
    assert!(apart(&adapter, &world.logps("merged")) < 1e-4);
}

/// Experts and their router stay as they are.
#[test]
fn adapters_of_a_mixture_of_experts_are_attentions() {
    let world = World::of(Family::Mixture);
    let lora = ["--lora-rank", "4"];
    world.train("pi", "adapter", &lora).run().ok();
    let merge = ["--lora-rank", "4", "--merge"];
    world.train("pi", "merged", &merge).run().ok();
    let names = world.names("adapter", "adapter_model.safetensors");
    // Four projections of two layers, two factors each.
    assert_eq!(names.len(), 16);
    assert!(names.iter().all(|name| name.contains(".self_attn.")));
    let changed = |name: &str| {
        let of = |folder: &str| {
            let files = world.files(folder);
            let tensors =
                safetensors::SafeTensors::deserialize(&files["model.safetensors"]).unwrap();
            tensors.tensor(name).unwrap().data().to_vec()
        };
        of("pi") != of("merged")
    };
    for name in world.names("pi", "model.safetensors") {
        assert_eq!(
            changed(&name),
            name.contains("_proj") && name.contains("self_attn"),
            "{name}"
        );
    }
    let adapter = world.logps("adapter");
    assert!(apart(&adapter, &world.logps("pi")) > 0.1);
    assert!(apart(&adapter, &world.logps("merged")) < 1e-4);
}

#[test]
fn an_adapter_serves_the_next_round() {
    let world = World::new();
    world
        .train("pi", "adapter", &["--lora-rank", "4"])
        .run()
        .ok();
    let prompts = lines(&[json!({"prompt": "Say 1"}), json!({"prompt": "Say 2"})]);
    let args = [
        "--model",
        &world.arg("adapter"),
        "--k",
        "2",
        "--max-tokens",
        "8",
    ];
    let samples = Tool::new("dice-gen", args).stdin(prompts).run().ok().rows();
    assert_eq!(samples.len(), 4);
    // Trained further, its own state is the reference.
    let steps = world
        .train("adapter", "next", &["--max-steps", "1"])
        .run()
        .ok()
        .rows();
    assert!((number(&steps[0], "loss") - 2f64.ln()).abs() < 1e-5);
}

#[test]
fn adapters_of_an_adapter_are_refused_unless_merged() {
    let world = World::new();
    let rank = ["--lora-rank", "4", "--max-steps", "1"];
    world.train("pi", "adapter", &rank).run().ok();
    let run = world.train("adapter", "next", &rank).run();
    let line = run.error_line();
    assert!(line.contains("is an adapter itself"), "{line}");
    assert!(line.ends_with("; add --merge"), "{line}");
    assert!(!world.path("next").exists() && !world.path("next.part").exists());
    world
        .train("adapter", "next", &rank)
        .args(["--merge"])
        .run()
        .ok();
    assert!(world.path("next").join("config.json").is_file());
}

#[test]
fn training_of_adapters_resumes_exactly() {
    let world = World::new();
    let lora = ["--lora-rank", "4", "--save-steps", "3"];
    let straight = world.train("pi", "straight", &lora).run().ok();
    let child = world.train("pi", "out", &lora).start();
    // As soon as there is a checkpoint.
    let is_checkpoint = |entry: std::fs::DirEntry| {
        let name = entry.file_name();
        name.to_string_lossy().starts_with("checkpoint-")
    };
    let saved = || {
        std::fs::read_dir(world.path("out.part"))
            .is_ok_and(|mut found| found.any(|e| e.is_ok_and(is_checkpoint)))
    };
    while !saved() {
        std::thread::sleep(std::time::Duration::from_micros(200));
    }
    let kill = format!("kill -TERM {}", child.id());
    assert!(
        Command::new("bash")
            .args(["-c", &kill])
            .status()
            .unwrap()
            .success()
    );
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(143));
    assert!(!world.path("out").exists());
    let resumed = world
        .train("pi", "out", &lora)
        .args(["--resume"])
        .run()
        .ok();
    resumed.note("kept from before");
    assert_eq!(resumed.stdout, straight.stdout);
    let files = |name: &str| Made::files(&world.path(name));
    assert!(files("out") == files("straight"), "resumed adapters differ");
}
