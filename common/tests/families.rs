//! Every family of models against transformers: log-probs and DPO gradients of tiny checkpoints, in float64 there
//! (tests/golden/make_families.py).

use common::dpo::{LossType, Objective, Pair, Scheduler, Settings, Trainer};
use common::kernels::gemm::Precision;
use common::logprob::{Group, score};
use common::model::Decoder;
use common::weights::Weights;
use serde_json::Value;
use std::path::{Path, PathBuf};

const FAMILIES: [&str; 10] = [
    "llama",
    "llama3",
    "llama-linear",
    "llama-bias",
    "llama-bf16-sharded",
    "smollm",
    "mistral",
    "qwen2",
    "qwen2-sliding",
    "qwen3",
];

fn golden(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/golden")
        .join(file)
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|x| x.as_u64().unwrap() as u32)
        .collect()
}

fn open(family: &str) -> (Weights, Value) {
    let folder = golden("families").join(family);
    (
        Weights::open(folder.to_str().unwrap()).unwrap(),
        json(&folder.join("figures.json")),
    )
}

fn pair(value: &Value, suffix: &str) -> Pair {
    let field = |name: &str| ids(&value[format!("{name}{suffix}")]);
    Pair {
        prompt: field("prompt"),
        chosen: field("chosen"),
        rejected: field("rejected"),
        reference: (0.0, 0.0),
    }
}

fn settings(objective: Objective, learning_rate: f64) -> Settings {
    Settings {
        objective,
        learning_rate,
        scheduler: Scheduler::Constant,
        warmup_steps: 0,
        total_steps: 100,
        batch_size: 2,
        max_grad_norm: 1.0,
        weight_decay: 0.0,
        seed: 0,
        shuffle: false,
        lora: None,
    }
}

const STATE_BYTES: usize = 1 << 30;

#[test]
fn log_probs_are_transformers() {
    for family in FAMILIES {
        let (weights, figures) = open(family);
        let decoder = Decoder::new(&weights.config, &weights, Precision::F32).unwrap();
        for sequence in figures["sequences"].as_array().unwrap() {
            let ids = ids(&sequence["ids"]);
            let (prompt, response) =
                ids.split_at(sequence["prompt_len"].as_u64().unwrap() as usize);
            // Every prefix of the response, so that each position's log-prob counts on its own.
            let responses: Vec<_> = (1..=response.len())
                .map(|n| response[..n].to_vec())
                .collect();
            let scores = score(
                &decoder,
                &[Group {
                    prompt: prompt.to_vec(),
                    responses,
                }],
            );
            let mut exact = 0.0;
            for (ours, logp) in scores.iter().zip(sequence["logps"].as_array().unwrap()) {
                exact += logp.as_f64().unwrap();
                assert!((ours - exact).abs() < 1e-4, "{family}: {ours}, not {exact}");
            }
        }
    }
}

#[test]
fn dpo_gradients_are_pytorchs() {
    for family in FAMILIES {
        let (weights, figures) = open(family);
        let dpo = &figures["dpo"];
        let number = |field: &str| dpo[field].as_f64().unwrap();
        let reference = (number("ref_chosen_logps"), number("ref_rejected_logps"));
        let pair = Pair {
            reference,
            ..pair(dpo, "")
        };
        let objective = Objective {
            loss_type: LossType::Sigmoid,
            beta: number("beta"),
            label_smoothing: 0.0,
            rpo_alpha: 0.0,
        };
        let trainer = Trainer::new(
            &weights,
            settings(objective, 1e-3),
            Precision::F32,
            STATE_BYTES,
        )
        .unwrap();
        let (sums, gradient) = trainer.gradient(&[&pair]);
        assert!(
            (sums.loss - number("loss")).abs() < 1e-5,
            "{family}: loss {}",
            sums.loss
        );
        let mut tensors = 0;
        for (name, _, range) in trainer.params().tensors() {
            let expected = &dpo["grads"][name];
            let ours = &gradient[range];
            let norm = ours.iter().map(|&g| (g as f64).powi(2)).sum::<f64>().sqrt();
            let exact = expected["norm"]
                .as_f64()
                .unwrap_or_else(|| panic!("{family}: no figures of {name}"));
            assert!(
                (norm - exact).abs() < 1e-4 * exact.max(1e-3),
                "{family}: |{name}| {norm}, not {exact}"
            );
            for entry in expected["entries"].as_array().unwrap() {
                let (at, value) = (
                    entry[0].as_u64().unwrap() as usize,
                    entry[1].as_f64().unwrap(),
                );
                assert!(
                    (ours[at] as f64 - value).abs() < 1e-4 * exact.max(1e-3),
                    "{family}: {name}[{at}] {}",
                    ours[at]
                );
            }
            tensors += 1;
        }
        assert_eq!(
            tensors,
            dpo["grads"].as_object().unwrap().len(),
            "{family}: a tensor is missing"
        );
    }
}

/// Two steps of every loss on the tiny llama, in float64 there (tests/golden/make_tiny_dpo.py).
#[test]
fn every_loss_trains_as_in_pytorch() {
    let golden = json(&golden("tiny_dpo.json"));
    let (weights, _) = open("llama");
    let decoder = Decoder::new(&weights.config, &weights, Precision::F32).unwrap();
    let mut pairs: Vec<Pair> = golden["pairs"]
        .as_array()
        .unwrap()
        .iter()
        .map(|p| pair(p, "_ids"))
        .collect();
    for pair in &mut pairs {
        let logps = score(&decoder, &[pair.group()]);
        pair.reference = (logps[0], logps[1]);
    }
    for run in golden["runs"].as_array().unwrap() {
        let given = &run["settings"];
        let number = |field: &str| given[field].as_f64().unwrap_or(0.0);
        let objective = Objective {
            loss_type: serde_json::from_value(given["loss_type"].clone()).unwrap(),
            beta: number("beta"),
            label_smoothing: number("label_smoothing"),
            rpo_alpha: number("rpo_alpha"),
        };
        let settings = Settings {
            scheduler: serde_json::from_value(given["scheduler"].clone()).unwrap(),
            warmup_steps: number("warmup_steps") as u64,
            total_steps: run["steps"].as_array().unwrap().len() as u64,
            max_grad_norm: number("max_grad_norm"),
            weight_decay: number("weight_decay"),
            ..settings(objective, number("learning_rate"))
        };
        let mut trainer = Trainer::new(&weights, settings, Precision::F32, STATE_BYTES).unwrap();
        let batch_size = number("batch_size") as usize;
        for (batch, step) in pairs
            .chunks(batch_size)
            .zip(run["steps"].as_array().unwrap())
        {
            let found = trainer
                .step(&batch.iter().collect::<Vec<_>>(), 0.0)
                .unwrap();
            let found = serde_json::to_value(found).unwrap();
            for (field, exact) in step.as_object().unwrap() {
                let (ours, exact) = (found[field].as_f64().unwrap(), exact.as_f64().unwrap());
                assert!(
                    (ours - exact).abs() < 1e-3 * exact.abs().max(0.05),
                    "{given}: {field} {ours}, not {exact}"
                );
            }
        }
    }
}
