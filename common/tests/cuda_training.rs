//! Training on the GPU, run with its own kernels on the CPU (feature `cuda-emulated`) and held to the CPU's trainer and to
//! PyTorch; on a real GPU, too, where there is one.

mod shared;

use common::chat::Chat;
use common::cuda::{self, Device, Footprint};
use common::dpo::checkpoint::{Writer, resume};
use common::dpo::{
    CudaTrainer, Kept, LoraSettings, Moments, NotFinite, Pair, Progress, Settings, State, Take,
    Train, Trainer, resident_bytes,
};
use common::kernels::gemm::Precision;
use common::model::{Lora, Params};
use common::weights::{Config, Weights};
use safetensors::SafeTensors;
use serde_json::json;
use shared::{
    APART, CONV, DELTA, PARALLEL, STATE_BYTES, UNEVEN, assert_trains_as_in_pytorch, device, golden,
    objective, on_gpus, open, run, settings, tiny_pairs,
};
use std::collections::BTreeMap;
use std::path::Path;

/// Pairs of all sorts for a vocabulary: long and short, one-token responses, shared beginnings.
fn pairs(vocab: usize) -> Vec<Pair> {
    let ids = |seed: u32, n: u32| {
        let token = |i: u32| {
            (seed + 1)
                .wrapping_mul(2_654_435_761)
                .wrapping_add(i * 7919)
        };
        (0..n).map(|i| token(i) % vocab as u32).collect()
    };
    [
        (1, 5, 9),
        (40, 37, 3),
        (6, 1, 1),
        (33, 12, 40),
        (24, 20, 20),
    ]
    .into_iter()
    .zip(0..)
    .map(|((prompt, chosen, rejected), seed)| Pair {
        prompt: ids(3 * seed, prompt),
        chosen: ids(3 * seed + 1, chosen),
        rejected: ids(3 * seed + 2, rejected),
        reference: (-3.0 * f64::from(chosen), -3.2 * f64::from(rejected)),
    })
    .collect()
}

fn adapted(settings: Settings) -> Settings {
    let lora = LoraSettings {
        rank: 4,
        alpha: 6.0,
    };
    Settings {
        lora: Some(lora),
        ..settings
    }
}

fn usual() -> Settings {
    Settings {
        weight_decay: 0.1,
        ..settings(objective(0.1), 1e-3)
    }
}

fn cpu(weights: &Weights, settings: &Settings, precision: Precision) -> Trainer {
    Trainer::new(weights, settings.clone(), precision, STATE_BYTES).unwrap()
}

fn gpu(
    device: &Device,
    weights: &Weights,
    settings: &Settings,
    precision: Precision,
) -> CudaTrainer {
    CudaTrainer::new(device, weights, settings.clone(), precision).unwrap()
}

/// Numbers to go on from.
struct Numbers([Vec<f32>; 3]);

impl Numbers {
    fn of(state: &dyn State) -> Self {
        Self(
            [Kept::Trained, Kept::FirstMoment, Kept::SecondMoment].map(|kept| {
                let mut all = vec![];
                let mut take = |run: &[f32]| {
                    all.extend_from_slice(run);
                    Ok(())
                };
                state.runs(kept, &mut take).unwrap();
                all
            }),
        )
    }

    /// Adapters both of whose factors are at work.
    fn of_adapters(len: usize) -> Self {
        let noise = (0..len as u32).map(|i| i.wrapping_mul(2_654_435_761) >> 8);
        let values = noise.map(|x| (x as f32 / (1 << 24) as f32 - 0.5) * 0.4);
        Self([values.collect(), vec![0.0; len], vec![0.0; len]])
    }
}

impl State for Numbers {
    fn runs(&self, kept: Kept, take: &mut Take) -> anyhow::Result<()> {
        // In two runs, as a checkpoint may give them.
        let all = &self.0[kept as usize];
        let (first, second) = all.split_at(all.len() / 3);
        take(first)?;
        take(second)
    }
}

fn refs(pairs: &[Pair]) -> Vec<&Pair> {
    pairs.iter().collect()
}

/// |a − b| / |b|.
fn off(a: &[f32], b: &[f32]) -> f64 {
    let squares = |x: f64| x * x;
    let apart: f64 = (a.iter().zip(b))
        .map(|(&a, &b)| squares(a as f64 - b as f64))
        .sum();
    let size: f64 = b.iter().map(|&b| squares(b as f64)).sum();
    (apart / size.max(1e-30)).sqrt()
}

#[test]
fn gradients_of_every_parameter_are_the_cpus() {
    let device = device();
    for family in on_gpus() {
        let (weights, _) = open(family);
        let pairs = pairs(weights.config.vocab);
        let batch = refs(&pairs);
        let cpu = cpu(&weights, &usual(), Precision::F32);
        let (their_sums, theirs) = cpu.gradient(&batch);
        let exact = gpu(&device, &weights, &usual(), Precision::F32);
        let (sums, ours) = exact.gradient(&batch).unwrap();
        assert!((sums.loss - their_sums.loss).abs() < 1e-5, "{family}");
        assert_eq!(sums.tokens, their_sums.tokens);
        let rounded = gpu(&device, &weights, &usual(), Precision::Bf16);
        let (sums, roughly) = rounded.gradient(&batch).unwrap();
        assert!(
            (sums.loss - their_sums.loss).abs() < 0.05 * their_sums.loss,
            "{family}: {} {}",
            sums.loss,
            their_sums.loss
        );
        for (name, _, range) in cpu.params().tensors() {
            let off_by = |ours: &[f32]| off(&ours[range.clone()], &theirs[range.clone()]);
            let apart = off_by(&ours);
            // What decays gain is little of what its sum is made of.
            let decays = ["dt_bias", "A_log"].iter().any(|part| name.ends_with(part));
            let tolerance = if decays { 1e-4 } else { 3e-5 };
            assert!(apart < tolerance, "{family}: {name} is off by {apart}");
            let apart = off_by(&roughly);
            assert!(
                apart < 0.2,
                "{family} in bfloat16: {name} is off by {apart}"
            );
        }
        let apart = off(&roughly, &theirs);
        assert!(apart < 0.1, "{family} in bfloat16: off by {apart}");
    }
}

#[test]
fn gradients_of_adapters_are_the_cpus() {
    let device = device();
    for family in [
        "llama-bias",
        "qwen3",
        "smollm",
        "olmoe",
        "qwen2-moe",
        "glm4-moe",
        DELTA,
        CONV,
        UNEVEN,
        "gemma4-keys",
        APART,
        PARALLEL,
        "cohere-heads",
    ] {
        let (weights, _) = open(family);
        let pairs = pairs(weights.config.vocab);
        let batch = refs(&pairs);
        let mut cpu = cpu(&weights, &adapted(usual()), Precision::F32);
        let state = Numbers::of_adapters(cpu.trained());
        cpu.restore(&state, cpu.progress()).unwrap();
        let (their_sums, theirs) = cpu.gradient(&batch);
        for (precision, tolerance) in [(Precision::F32, 3e-5), (Precision::Bf16, 0.1)] {
            let mut gpu = gpu(&device, &weights, &adapted(usual()), precision);
            gpu.restore(&state, gpu.progress()).unwrap();
            let (sums, ours) = gpu.gradient(&batch).unwrap();
            let apart = off(&ours, &theirs);
            assert!(
                apart < tolerance,
                "{family} in {precision:?}: off by {apart}"
            );
            let loss = (sums.loss - their_sums.loss).abs();
            assert!(loss < tolerance * their_sums.loss, "{family}: {loss}");
            let lora = Lora::new(gpu.params(), 4, 6.0);
            for adapter in &lora.adapters {
                for factor in [adapter.a.clone(), adapter.b.clone()] {
                    let apart = off(&ours[factor.clone()], &theirs[factor]);
                    assert!(
                        apart < 3.0 * tolerance,
                        "{family} in {precision:?}: {} is off by {apart}",
                        adapter.module
                    );
                }
            }
        }
    }
}

#[test]
fn every_loss_trains_as_in_pytorch() {
    let device = device();
    let (weights, _) = open("llama");
    let start = gpu(&device, &weights, &usual(), Precision::F32);
    let pairs = tiny_pairs(|pair| {
        let logps = start.score(&[pair.group()]).unwrap();
        (logps[0][0], logps[0][1])
    });
    assert_trains_as_in_pytorch(&pairs, |settings| {
        Box::new(gpu(&device, &weights, &settings, Precision::F32))
    });
}

/// Steps over all pairs.
fn steps(trainer: &mut dyn Train, pairs: &[Pair], count: usize) -> Vec<f64> {
    let step = |_| trainer.step(&refs(pairs), 0.0).unwrap();
    (0..count)
        .map(step)
        .flat_map(|m| [m.loss, m.grad_norm, m.rewards_margins])
        .collect()
}

fn assert_near(ours: &[f64], theirs: &[f64], tolerance: f64, what: &str) {
    for (ours, theirs) in ours.iter().zip(theirs) {
        assert!(
            (ours - theirs).abs() < tolerance * theirs.abs().max(0.1),
            "{what}: {ours}, not {theirs}"
        );
    }
}

#[test]
fn steps_are_the_cpus() {
    let device = device();
    // (Its gradients are large: the margin would pass zero in a step.)
    let slower = Settings {
        learning_rate: 2e-4,
        ..usual()
    };
    for (family, settings) in [
        ("llama-bias", usual()),
        ("qwen3", adapted(usual())),
        (DELTA, slower),
        (CONV, usual()),
        (UNEVEN, usual()),
        (PARALLEL, usual()),
    ] {
        let (weights, _) = open(family);
        let pairs = pairs(weights.config.vocab);
        let mut exact = cpu(&weights, &settings, Precision::F32);
        let theirs = steps(&mut exact, &pairs, 4);
        let mut ours = gpu(&device, &weights, &settings, Precision::F32);
        let found = steps(&mut ours, &pairs, 4);
        assert_near(&found, &theirs, 2e-3, family);
        let Numbers([ours, m, v]) = Numbers::of(&ours);
        let Numbers([trained, their_m, their_v]) = Numbers::of(&exact);
        for (ours, theirs) in [(ours, trained), (m, their_m), (v, their_v)] {
            assert!(off(&ours, &theirs) < 1e-3, "{}", off(&ours, &theirs));
        }
        // Rounded products and moments: the same way, roughly.
        let settings = Settings {
            moments: Moments::Bf16,
            ..settings
        };
        let mut rough = gpu(&device, &weights, &settings, Precision::Bf16);
        let found = steps(&mut rough, &pairs, 4);
        assert_near(&found, &theirs, 0.15, family);
    }
}

#[test]
fn moments_in_bfloat16_are_for_gpus() {
    let (weights, _) = open("llama");
    let settings = Settings {
        moments: Moments::Bf16,
        ..usual()
    };
    assert!(Trainer::new(&weights, settings, Precision::F32, STATE_BYTES).is_err());
}

#[test]
fn a_loss_that_is_not_a_number_stops_training() {
    let (weights, _) = open("llama");
    let mut trainer = gpu(&cuda::emulated(1 << 30), &weights, &usual(), Precision::F32);
    let before = Numbers::of(&trainer).0;
    let mut pairs = pairs(weights.config.vocab);
    pairs[1].reference.0 = f64::NAN;
    let broken = trainer.step(&refs(&pairs), 0.0).unwrap_err();
    let broken = broken.downcast_ref::<NotFinite>().unwrap();
    assert_eq!((broken.step, broken.pair), (1, Some(1)));
    assert_eq!(Numbers::of(&trainer).0, before);
    // Nothing of that batch is left in the gradient.
    trainer.skip();
    pairs[1].reference.0 = -1.0;
    let mut fresh = gpu(&cuda::emulated(1 << 30), &weights, &usual(), Precision::F32);
    fresh.skip();
    let [after, expected] = [&mut trainer, &mut fresh].map(|t| t.step(&refs(&pairs), 0.0).unwrap());
    assert_eq!(after, expected);
}

/// How the trainers of a run differ: all weights, adapters, rounded moments.
fn kinds() -> [(Settings, Precision); 4] {
    let rounded = Settings {
        moments: Moments::Bf16,
        ..usual()
    };
    [
        (usual(), Precision::F32),
        (rounded, Precision::Bf16),
        (adapted(usual()), Precision::F32),
        (adapted(usual()), Precision::Bf16),
    ]
}

#[test]
fn a_checkpoint_goes_on_to_the_same_bits() {
    let device = cuda::emulated(1 << 30);
    let (weights, _) = open("llama");
    let chat = Chat::open(&golden("tiny_chat")).unwrap();
    let pairs = &pairs(weights.config.vocab)[..3];
    for (settings, precision) in kinds() {
        let folder = tempfile::tempdir().unwrap();
        let output = folder.path().join("next");
        let run = run(&settings);
        let writer = Writer {
            output: &output,
            run: &run,
            start: &weights,
            chat: &chat,
            base: "base",
        };
        let mut straight = gpu(&device, &weights, &settings, precision);
        let mut log = vec![];
        for _ in 0..2 {
            log.push(straight.step(&refs(pairs), 0.0).unwrap());
        }
        writer.save(&straight, &log).unwrap();
        // Streamed, and yet what the crate writes.
        let state = folder
            .path()
            .join("next.part/checkpoint-2/optimizer.safetensors");
        let state = std::fs::read(state).unwrap();
        let tensors = SafeTensors::deserialize(&state).unwrap();
        assert!(safetensors::serialize(tensors.tensors(), None).unwrap() == state);
        let mut resumed = gpu(&device, &weights, &settings, precision);
        assert_eq!(resume(&output, &run, &mut resumed).unwrap(), log);
        assert_eq!(resumed.steps(), 2);
        let metrics = straight.step(&refs(pairs), 0.5).unwrap();
        assert_eq!(resumed.step(&refs(pairs), 0.5).unwrap(), metrics);
        assert_eq!(Numbers::of(&resumed).0, Numbers::of(&straight).0);
        // The other machine goes on from it, too.
        if settings.moments == Moments::F32 {
            let mut other = cpu(&weights, &settings, precision);
            resume(&output, &run, &mut other).unwrap();
            let mut back = gpu(&device, &weights, &settings, precision);
            back.restore(&other, other.progress()).unwrap();
            assert_eq!(Numbers::of(&back).0, Numbers::of(&other).0);
        }
    }
}

/// The files of a folder.
fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap());
    entries
        .map(|entry| {
            let name = entry.file_name().into_string().unwrap();
            (name, std::fs::read(entry.path()).unwrap())
        })
        .collect()
}

/// What decides in which order a batch is summed is the run's, not the memory's that there is when it goes on.
#[test]
fn a_run_goes_on_in_parts_of_the_size_that_it_began_with() {
    let (weights, _) = open("llama");
    let pairs = pairs(weights.config.vocab);
    let on = |tokens: usize| {
        let bytes = needs(&weights, &usual(), Precision::F32, tokens, 0);
        let device = cuda::emulated(bytes + 100_000);
        CudaTrainer::new(&device, &weights, usual(), Precision::F32).unwrap()
    };
    let (mut small, mut large) = (on(100), on(4000));
    assert!(small.progress().part_tokens < large.progress().part_tokens);
    let apart = [&small, &large].map(|trainer| trainer.gradient(&refs(&pairs)).unwrap().1);
    assert_ne!(apart[0], apart[1], "it does decide");
    large
        .restore(&Numbers::of(&small), small.progress())
        .unwrap();
    assert_eq!(large.gradient(&refs(&pairs)).unwrap().1, apart[0]);
    let back = Progress {
        part_tokens: 4000,
        ..large.progress()
    };
    let line = small.restore(&Numbers::of(&large), back).unwrap_err();
    assert!(line.to_string().contains("parts of 4000 tokens"), "{line}");
}

#[test]
fn the_same_state_is_saved_as_the_same_files() {
    let device = cuda::emulated(1 << 30);
    for family in ["llama-bias", "qwen3"] {
        let (weights, _) = open(family);
        let pairs = pairs(weights.config.vocab);
        for settings in [usual(), adapted(usual())] {
            let mut cpu = cpu(&weights, &settings, Precision::F32);
            steps(&mut cpu, &pairs, 2);
            let mut gpu = gpu(&device, &weights, &settings, Precision::Bf16);
            gpu.restore(&cpu, cpu.progress()).unwrap();
            let folder = tempfile::tempdir().unwrap();
            let saved = |name: &str, trainer: &dyn Train| {
                let model = folder.path().join(name);
                std::fs::create_dir(&model).unwrap();
                trainer.save_model(&model, &weights).unwrap();
                if settings.lora.is_some() {
                    trainer.save_adapter(&model, "base").unwrap();
                } else {
                    assert!(trainer.save_adapter(&model, "base").is_err());
                }
                files(&model)
            };
            let theirs = saved("cpu", &cpu);
            assert!(theirs.len() > 1);
            assert!(saved("gpu", &gpu) == theirs, "{family}");
        }
    }
}

/// What a device needs for a part of so many tokens, with some layers' activations kept.
fn needs(
    weights: &Weights,
    settings: &Settings,
    precision: Precision,
    tokens: usize,
    whole: usize,
) -> usize {
    let footprint = Footprint {
        config: &weights.config,
        precision: precision.into(),
        rank: settings.lora.map_or(0, |s| s.rank),
    };
    resident_bytes(&weights.config, settings, precision)
        + footprint.part(tokens, tokens, whole) * 100 / 95
}

#[test]
fn less_memory_changes_no_bit_and_is_counted_right() {
    // What is not worth counting: bookkeeping of the optimiser, tables of positions.
    let little = 100_000;
    // A part is at least that large, or a pair.
    let least = 256;
    // Biases, norms of heads; norms of rows, and after what is added to the stream; experts; linear attention; convolutions;
    // what layers take in beside the stream; what attention and the MLP both read.
    let families = [
        "llama-bias",
        "qwen3",
        "olmo3",
        "gemma2",
        "olmoe",
        DELTA,
        CONV,
        UNEVEN,
        PARALLEL,
    ];
    // Each kind of settings with three of them.
    let kinds = kinds().into_iter().flat_map(|kind| vec![kind; 3]);
    for (family, (settings, precision)) in families.into_iter().cycle().zip(kinds) {
        let (weights, _) = open(family);
        let pairs = pairs(weights.config.vocab);
        let tokens: usize = pairs.iter().map(Pair::tokens).sum();
        assert!((least * 9 / 10..=least).contains(&tokens), "{tokens}");
        let gradient = |bytes: usize| {
            let device = cuda::emulated(bytes);
            let trainer = CudaTrainer::new(&device, &weights, settings.clone(), precision)?;
            Ok(trainer.gradient(&refs(&pairs))?.1)
        };
        let exact: anyhow::Result<_> = gradient(1 << 30);
        let exact = exact.unwrap();
        for whole in 0..=weights.config.layers {
            let bytes = needs(&weights, &settings, precision, least, whole);
            let found = gradient(bytes + little).unwrap();
            assert!(
                found == exact,
                "{family} in {precision:?}, {whole} layers kept"
            );
        }
        // The longest pair has 85.
        let refused = gradient(needs(&weights, &settings, precision, 50, 0));
        let line = format!("{:#}", refused.unwrap_err());
        let told = ["--max-length", "--lora-rank", "no room"];
        assert!(told.iter().any(|part| line.contains(part)), "{line}");
    }
}

fn llama3_8b() -> Config {
    let json = json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128_256, "hidden_size": 4096,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14_336,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "rope_theta": 500_000.0, "tie_word_embeddings": false,
        "hidden_act": "silu"
    });
    Config::from_json(&json, Path::new("config.json")).unwrap()
}

/// An 8B at 2 × 2048 tokens a pair, by the count that the trainer itself goes by.
#[test]
fn an_8b_fits_one_gpu() {
    let config = llama3_8b();
    assert_eq!(Params::new(&config).len, 8_030_261_248);
    let taken = |settings: &Settings| {
        let footprint = Footprint {
            config: &config,
            precision: Precision::Bf16.into(),
            rank: settings.lora.map_or(0, |s| s.rank),
        };
        let least = footprint.part(4096, 4096, 0);
        (
            resident_bytes(&config, settings, Precision::Bf16),
            least,
            footprint,
        )
    };
    // All weights: with moments in bfloat16, and then no activation need be made again.
    let rounded = Settings {
        moments: Moments::Bf16,
        ..usual()
    };
    let (resident, least, footprint) = taken(&rounded);
    assert_eq!(resident, 8_030_261_248 * 14);
    assert!(resident + least < 141_000_000_000);
    let free = (141_000_000_000 - resident) / 100 * 95;
    assert_eq!(footprint.whole_layers(4096, 4096, free), 32);
    assert!(footprint.tokens_at_once(free) >= 4096);
    // Float32 moments take 16 GB more than there is.
    let (resident, _, _) = taken(&usual());
    assert_eq!(resident, 8_030_261_248 * 18);
    assert!(resident > 141_000_000_000);
    // Adapters inside 24 GB.
    let lora = LoraSettings {
        rank: 16,
        alpha: 16.0,
    };
    let adapted = Settings {
        lora: Some(lora),
        ..usual()
    };
    let (resident, least, _) = taken(&adapted);
    assert!(
        resident + least * 100 / 95 < 24_000_000_000,
        "{resident} + {least}"
    );
}
