//! What tests of whole models share: the families' tiny checkpoints and figures, and training that PyTorch did before.

#![allow(dead_code)] // each test takes some of it

#[cfg(feature = "cuda-emulated")]
use common::cuda::{self, Device};
use common::dpo::checkpoint::Run;
use common::dpo::{LossType, Moments, Objective, Pair, Scheduler, Settings, StateBytes, Train};
use common::weights::Weights;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Every family without experts.
pub const FAMILIES: [&str; 46] = [
    "llama",
    "llama3",
    "llama-linear",
    "llama-bias",
    "llama-bf16-sharded",
    "smollm",
    "mistral",
    "ministral",
    "qwen2",
    "qwen2-sliding",
    "qwen3",
    "smollm3",
    "olmo2",
    "olmo3",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3-images",
    "phi3",
    "phi3-long",
    "granite",
    "granite4",
    DELTA,
    "glm4",
    "glm",
    "ernie4-5",
    "hunyuan",
    "exaone4",
    "exaone4-global",
    "seed-oss",
    "seed-oss-bias",
    "ministral3",
    "ministral3-images",
    "mistral-images",
    CONV,
    "lfm2-untied",
    "llama-fp8",
    "ministral3-fp8",
    UNEVEN,
    "gemma4-keys",
    "gemma4-unified",
    "cohere",
    "cohere-bias",
    "cohere-heads",
    PARALLEL,
    "cohere2-types",
];

/// The one among them with linear attention.
pub const DELTA: &str = "qwen3.5";

/// One of those with short convolutions.
pub const CONV: &str = "lfm2";

/// One of those whose layers differ in their heads.
pub const UNEVEN: &str = "gemma4";

/// One of those whose attention and MLP read the same.
pub const PARALLEL: &str = "cohere2";

/// Mixtures of experts.
pub const MIXTURES: [&str; 16] = [
    "olmoe",
    "mixtral",
    "granite-moe",
    ODD_MIXTURE,
    "qwen3-moe-steps",
    "qwen2-moe",
    "qwen3.5-moe",
    "granite-moe-shared",
    "hunyuan-moe",
    "ernie4-5-moe",
    "glm4-moe",
    "glm4-moe-plain",
    "lfm2-moe",
    APART,
    "gpt-oss",
    "gpt-oss-mxfp4",
];

/// The one among them whose experts are of a size that the GPU's kernels do not take.
pub const ODD_MIXTURE: &str = "qwen3-moe";

/// The one among them with an MLP beside its experts.
pub const APART: &str = "gemma4-moe";

/// Every family that GPUs run.
#[cfg(feature = "cuda-emulated")]
pub fn on_gpus() -> impl Iterator<Item = &'static str> {
    let all = FAMILIES.into_iter().chain(MIXTURES);
    all.filter(|family| *family != ODD_MIXTURE)
}

/// A file of golden figures.
pub fn golden(file: &str) -> PathBuf {
    // As it is when the test runs, which may be on another machine than it was built on.
    let here = std::env::var_os("CARGO_MANIFEST_DIR");
    let here = here.map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    here.join("../tests/golden").join(file)
}

/// A JSON file.
pub fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Token ids.
pub fn ids(value: &Value) -> Vec<u32> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|x| x.as_u64().unwrap() as u32)
        .collect()
}

/// A family's tiny checkpoint and its figures.
pub fn open(family: &str) -> (Weights, Value) {
    let folder = golden("families").join(family);
    (
        Weights::open(folder.to_str().unwrap()).unwrap(),
        json(&folder.join("figures.json")),
    )
}

/// A pair, from fields whose names end in `suffix`.
pub fn pair(value: &Value, suffix: &str) -> Pair {
    let field = |name: &str| ids(&value[format!("{name}{suffix}")]);
    Pair {
        prompt: field("prompt"),
        chosen: field("chosen"),
        rejected: field("rejected"),
        reference: (0.0, 0.0),
    }
}

/// Settings that leave most to their defaults.
pub fn settings(objective: Objective, learning_rate: f64) -> Settings {
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
        moments: Moments::F32,
    }
}

/// A run that checkpoints are of.
pub fn run(settings: &Settings) -> Run {
    Run {
        version: "0".into(),
        model: "start".into(),
        reference: "start".into(),
        pairs: "pairs".into(),
        dtype: "f32".into(),
        asked: Default::default(),
        settings: settings.clone(),
        date: None,
    }
}

/// What layer states may take.
pub const STATE_BYTES: StateBytes = StateBytes {
    part: 1 << 30,
    long: 1 << 30,
};

/// Plain DPO.
pub fn objective(beta: f64) -> Objective {
    Objective {
        loss_type: LossType::Sigmoid,
        beta,
        label_smoothing: 0.0,
        rpo_alpha: 0.0,
    }
}

/// The pairs of tests/golden/tiny_dpo.json with the reference's log-probs, which `score` gives of a pair.
pub fn tiny_pairs(score: impl Fn(&Pair) -> (f64, f64)) -> Vec<Pair> {
    let golden = json(&golden("tiny_dpo.json"));
    let pairs = golden["pairs"].as_array().unwrap().iter();
    pairs
        .map(|p| pair(p, "_ids"))
        .map(|pair| Pair {
            reference: score(&pair),
            ..pair
        })
        .collect()
}

/// Two steps of every loss on the tiny llama, in float64 there (tests/golden/make_tiny_dpo.py).
pub fn assert_trains_as_in_pytorch(
    pairs: &[Pair],
    mut trainer: impl FnMut(Settings) -> Box<dyn Train>,
) {
    for run in json(&golden("tiny_dpo.json"))["runs"].as_array().unwrap() {
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
        let mut trainer = trainer(settings);
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

/// The first GPU, where there is one; else the emulated one.
#[cfg(feature = "cuda-emulated")]
pub fn device() -> Device {
    if cuda::count() > 0 {
        return cuda::open(0).unwrap();
    }
    eprintln!("skipped on a real GPU: there is none, or the feature `cuda` is off");
    cuda::emulated(1 << 30)
}
