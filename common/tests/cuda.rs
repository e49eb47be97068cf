//! The GPU's decoder, scoring and sampling, run with its own kernels on the CPU (feature `cuda-emulated`) and held to
//! transformers' figures and to the CPU's decoder; on a real GPU, too, where there is one.

mod shared;

use common::cuda::{self, Device, Precision};
use common::generate::{Generate, Generator, Limits, Request, Sample, Sampling, Stopped};
use common::kernels::gemm;
use common::logprob::{self, Group};
use common::model::{Decoder, Params};
use common::weights::{Recurrence, Weights};
use serde_json::Value;
use shared::{APART, CONV, DELTA, ODD_MIXTURE, PARALLEL, UNEVEN, device, ids, on_gpus, open};

fn on(device: &Device, weights: &Weights, precision: Precision) -> cuda::Decoder {
    cuda::Decoder::new(device, &weights.config, weights, precision).unwrap()
}

/// The sequences of a family's figures as groups whose responses are every prefix, and Σ log p of each in float64.
fn groups(figures: &Value) -> (Vec<Group>, Vec<f64>) {
    let (mut groups, mut exact) = (vec![], vec![]);
    for sequence in figures["sequences"].as_array().unwrap() {
        let ids = ids(&sequence["ids"]);
        let (prompt, response) = ids.split_at(sequence["prompt_len"].as_u64().unwrap() as usize);
        groups.push(Group {
            prompt: prompt.to_vec(),
            responses: (1..=response.len())
                .map(|n| response[..n].to_vec())
                .collect(),
        });
        let mut sum = 0.0;
        for logp in sequence["logps"].as_array().unwrap() {
            sum += logp.as_f64().unwrap();
            exact.push(sum);
        }
    }
    (groups, exact)
}

#[test]
fn log_probs_are_transformers() {
    let device = device();
    for family in on_gpus() {
        let (weights, figures) = open(family);
        let (groups, exact) = groups(&figures);
        for (precision, tolerance) in [
            (Precision::F32, 1e-4),
            (Precision::F16, 4e-3),
            (Precision::Bf16, 1e-2),
        ] {
            let decoder = on(&device, &weights, precision);
            let scores = cuda::score(&decoder, &groups).unwrap();
            assert_eq!(scores.len(), exact.len());
            for (ours, exact) in scores.iter().zip(&exact) {
                assert!(
                    (ours - exact).abs() < tolerance * exact.abs().max(1.0),
                    "{family} in {precision:?}: {ours}, not {exact}"
                );
            }
        }
    }
}

#[test]
fn experts_of_odd_sizes_are_refused() {
    let (weights, _) = open(ODD_MIXTURE);
    let Err(error) = cuda::Decoder::new(&device(), &weights.config, &weights, Precision::F32)
    else {
        panic!("they were taken");
    };
    let line = error.to_string();
    assert!(
        line.contains("32 x 12") && line.contains("use --device cpu"),
        "{line}"
    );
}

#[test]
fn keys_of_linear_attention_that_are_too_long_are_refused() {
    let (weights, _) = open(DELTA);
    let mut config = weights.config.clone();
    for recurrence in config.recurrences.iter_mut().flatten() {
        if let Recurrence::Delta(shape) = recurrence {
            shape.key_dim = 130;
        }
    }
    let line = cuda::Decoder::check(&config).unwrap_err().to_string();
    assert!(
        line.contains("130") && line.contains("use --device cpu"),
        "{line}"
    );
}

fn how() -> Sampling {
    Sampling {
        temperature: 0.9,
        top_p: 1.0,
        top_k: 0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        max_tokens: 12,
        seed: 7,
    }
}

fn requests(vocab: u32) -> Vec<Request> {
    let request = |key: &str, prompt: Vec<u32>, k| Request {
        key: key.into(),
        prompt: prompt.into_iter().map(|t| t % vocab).collect(),
        k,
    };
    vec![
        request("a", vec![1, 2, 3], 3),
        request("b", vec![9], 2),
        request("c", (0..29).map(|i| i * 7 + 3).collect(), 4),
        request("d", vec![30, 31], 1),
    ]
}

fn run(generator: Box<dyn Generate + '_>, requests: Vec<Request>) -> Vec<(String, Vec<Sample>)> {
    run_until(generator, requests, &|ids| ids.ends_with(&[5]))
}

fn run_until(
    mut generator: Box<dyn Generate + '_>,
    requests: Vec<Request>,
    stop: Stopped,
) -> Vec<(String, Vec<Sample>)> {
    let mut waiting = requests.into_iter();
    let mut out = vec![];
    loop {
        while generator.wants_prompt() {
            let Some(request) = waiting.next() else { break };
            generator.push(request);
        }
        if generator.is_idle() {
            return out;
        }
        generator.step(stop).unwrap();
        out.extend(generator.finished().into_iter().map(|(r, s)| (r.key, s)));
    }
}

fn on_cpu<'a>(decoder: &'a Decoder, how: Sampling, ends: &[u32]) -> Box<dyn Generate + 'a> {
    let limits = Limits {
        sequences: 4,
        bytes: usize::MAX,
    };
    Box::new(Generator::new(decoder, how, ends, limits))
}

fn assert_same(ours: &[(String, Vec<Sample>)], theirs: &[(String, Vec<Sample>)], what: &str) {
    assert_eq!(ours.len(), theirs.len());
    for ((key, ours), (other, theirs)) in ours.iter().zip(theirs) {
        assert_eq!(key, other);
        for (ours, theirs) in ours.iter().zip(theirs) {
            assert_eq!(ours.token_ids, theirs.token_ids, "{what}, prompt {key}");
            assert_eq!(ours.finish, theirs.finish, "{what}, prompt {key}");
            let off = (ours.logp - theirs.logp).abs();
            assert!(off < 1e-3, "{what}, prompt {key}: log p off by {off}");
        }
    }
}

#[test]
fn samples_are_the_cpus() {
    let device = device();
    for family in [
        "llama3",
        "llama-bias",
        "mistral",
        "qwen3",
        "olmo3",
        "gemma2",
        "phi3-long",
        "granite",
        "olmoe",
        "granite-moe",
        DELTA,
        CONV,
        "lfm2-untied",
        UNEVEN,
        "gemma4-keys",
        APART,
        PARALLEL,
        "cohere-heads",
    ] {
        let (weights, _) = open(family);
        let vocab = weights.config.vocab as u32;
        let cpu = Decoder::new(&weights.config, &weights, gemm::Precision::F32).unwrap();
        let gpu = on(&device, &weights, Precision::F32);
        let ends = [0, 7];
        let theirs = run(on_cpu(&cpu, how(), &ends), requests(vocab));
        for slots in [3, 16] {
            let ours = cuda::Generator::new(&gpu, how(), &ends, Some(slots)).unwrap();
            assert_eq!(ours.slots(), slots);
            let ours = run(Box::new(ours), requests(vocab));
            assert_same(&ours, &theirs, &format!("{family}, {slots} slots"));
        }
    }
}

/// No family here has heads of which two blocks make the results.
#[test]
fn wide_heads_are_the_cpus() {
    let device = device();
    for dim in [320, 512] {
        let (weights, figures) = open("qwen3");
        let mut config = weights.config;
        (config.head_dim, config.rotary_dim) = (dim, dim);
        config.attention_scale = 1.0 / (dim as f32).sqrt();
        let noise = |i: usize| (i as u32).wrapping_mul(2_654_435_761) as f32 / 2f32.powi(32) - 0.5;
        let values: Vec<f32> = (0..Params::new(&config).len).map(noise).collect();
        let cpu = Decoder::new(&config, &values[..], gemm::Precision::F32).unwrap();
        let gpu = cuda::Decoder::new(&device, &config, &values[..], Precision::F32).unwrap();
        let (groups, _) = groups(&figures);
        let theirs = logprob::score(&cpu, &groups);
        let ours = cuda::score_all(&gpu, &groups, 100).unwrap();
        for (ours, theirs) in ours.iter().flatten().zip(&theirs) {
            assert!((ours - theirs).abs() < 1e-3, "{ours}, not {theirs}");
        }
        let (vocab, ends) = (config.vocab as u32, [0, 7]);
        let theirs = run(on_cpu(&cpu, how(), &ends), requests(vocab));
        let ours = cuda::Generator::new(&gpu, how(), &ends, Some(3)).unwrap();
        let ours = run(Box::new(ours), requests(vocab));
        assert_same(&ours, &theirs, &format!("heads of {dim}"));
    }
}

#[test]
fn heads_that_are_too_wide_are_refused() {
    let (weights, _) = open("qwen3");
    let mut config = weights.config;
    config.head_dim = 514;
    let line = cuda::Decoder::check(&config).unwrap_err().to_string();
    assert!(
        line.contains("514") && line.contains("use --device cpu"),
        "{line}"
    );
}

#[test]
fn every_way_to_draw_is_the_cpus() {
    let device = device();
    let (weights, _) = open("llama");
    let cpu = Decoder::new(&weights.config, &weights, gemm::Precision::F32).unwrap();
    let gpu = on(&device, &weights, Precision::F32);
    let ways = [
        Sampling {
            temperature: 0.0,
            ..how()
        },
        Sampling {
            temperature: 1.7,
            ..how()
        },
        Sampling { top_k: 5, ..how() },
        Sampling {
            top_p: 0.7,
            ..how()
        },
        Sampling {
            min_p: 0.1,
            ..how()
        },
        Sampling {
            repetition_penalty: 1.3,
            ..how()
        },
        Sampling {
            top_k: 12,
            top_p: 0.8,
            min_p: 0.05,
            repetition_penalty: 0.8,
            ..how()
        },
        Sampling {
            max_tokens: 1,
            ..how()
        },
        Sampling {
            max_tokens: 1000,
            ..how()
        },
    ];
    for way in ways {
        let theirs = run(on_cpu(&cpu, way.clone(), &[2]), requests(64));
        let ours = cuda::Generator::new(&gpu, way.clone(), &[2], Some(4)).unwrap();
        assert_same(
            &run(Box::new(ours), requests(64)),
            &theirs,
            &format!("{way:?}"),
        );
    }
}

#[test]
fn bfloat16_samples_know_their_log_probs() {
    let device = device();
    for family in ["qwen3", DELTA, CONV] {
        let (weights, _) = open(family);
        let gpu = on(&device, &weights, Precision::Bf16);
        let generator = cuda::Generator::new(&gpu, how(), &[0, 7], Some(8)).unwrap();
        let requests = requests(weights.config.vocab as u32);
        let found = run(Box::new(generator), requests.clone());
        for ((_, samples), request) in found.iter().zip(requests) {
            let group = Group {
                prompt: request.prompt,
                responses: samples.iter().map(|s| s.token_ids.clone()).collect(),
            };
            let scores = cuda::score(&gpu, &[group]).unwrap();
            for (sample, score) in samples.iter().zip(scores) {
                let off = (sample.logp - score).abs();
                assert!(
                    off < 1e-2 * score.abs().max(1.0),
                    "{family}: {} but {score}",
                    sample.logp
                );
            }
        }
    }
}

/// More prompts than a pass over prompts takes, some too long to share one. In another order they run beside others.
#[test]
fn neighbours_change_nothing() {
    let device = device();
    let how = Sampling {
        max_tokens: 20,
        ..how()
    };
    // Prompts whose keys are read in one, two or three parts, beside one or two parts of the responses' own.
    let length = |i: u32| match i {
        11 => 530,
        12 => 270,
        13 => 400,
        14 => 800,
        _ => 5 + 7 * i,
    };
    let requests: Vec<Request> = (0..20u32)
        .map(|i| Request {
            key: i.to_string(),
            prompt: (0..length(i)).map(|t| (t * t + i) % 64).collect(),
            k: 1 + i as usize % 2,
        })
        .collect();
    for (family, precision) in [
        ("llama", Precision::F32),
        ("llama", Precision::Bf16),
        (DELTA, Precision::Bf16),
        (CONV, Precision::F32),
        (UNEVEN, Precision::F32),
    ] {
        let (mut weights, _) = open(family);
        weights.config.context = 1024;
        let gpu = on(&device, &weights, precision);
        let samples = |order: &dyn Fn(usize) -> usize| {
            let mut requests: Vec<_> = requests.iter().cloned().enumerate().collect();
            requests.sort_by_key(|(i, _)| order(*i));
            let requests = requests.into_iter().map(|(_, request)| request).collect();
            let generator = cuda::Generator::new(&gpu, how.clone(), &[7], Some(3)).unwrap();
            let mut found = run(Box::new(generator), requests);
            found.sort_by_key(|(key, _)| key.clone());
            found
        };
        let one = samples(&|i| i);
        assert_eq!(one, samples(&|i| 20 - i));
        assert_eq!(one, samples(&|i| i * 7 % 20));
    }
}

#[test]
fn memory_decides_how_many_run() {
    let (weights, _) = open("llama");
    let cpu = Decoder::new(&weights.config, &weights, gemm::Precision::F32).unwrap();
    let vocab = weights.config.vocab as u32;
    let theirs = run(on_cpu(&cpu, how(), &[0]), requests(vocab));
    let mut seen = vec![];
    for kilobytes in [50, 200, 400, 800, 1600] {
        let device = cuda::emulated(1 << 30);
        device.limit_memory(kilobytes << 10);
        let Ok(gpu) = cuda::Decoder::new(&device, &weights.config, &weights, Precision::F32) else {
            seen.push(None);
            continue;
        };
        match cuda::Generator::new(&gpu, how(), &[0], Some(8)) {
            Ok(generator) => {
                seen.push(Some(generator.slots()));
                assert_same(
                    &run(Box::new(generator), requests(vocab)),
                    &theirs,
                    "little memory",
                );
            }
            Err(err) => {
                assert!(format!("{err:#}").contains("lower --max-tokens"), "{err:#}");
                seen.push(Some(0));
            }
        }
    }
    assert!(seen.windows(2).all(|w| w[0] <= w[1]), "{seen:?}");
    assert!(
        seen.contains(&None) && seen.contains(&Some(0)) && seen.last() > Some(&Some(1)),
        "{seen:?}"
    );
}

/// Responses of seven pages each, where there are not as many for all sequences that are let in.
#[test]
fn sequences_that_had_to_give_way_are_the_same() {
    let how = Sampling {
        max_tokens: 440,
        ..how()
    };
    let requests: Vec<Request> = (0..6u32)
        .map(|i| Request {
            key: i.to_string(),
            prompt: (0..3 + 7 * i).map(|t| (t * t + i) % 64).collect(),
            k: 1 + i as usize / 5,
        })
        .collect();
    for (family, kilobytes) in [("llama", 1300), (DELTA, 2100)] {
        let (mut weights, _) = open(family);
        weights.config.context = 512;
        let cpu = Decoder::new(&weights.config, &weights, gemm::Precision::F32).unwrap();
        let theirs = run_until(on_cpu(&cpu, how.clone(), &[]), requests.clone(), &|_| false);
        let device = cuda::emulated(1 << 30);
        device.limit_memory(kilobytes << 10);
        let gpu = on(&device, &weights, Precision::F32);
        let generator = cuda::Generator::new(&gpu, how.clone(), &[], None).unwrap();
        assert_eq!(generator.slots(), 5, "{family}");
        let ours = run_until(Box::new(generator), requests.clone(), &|_| false);
        assert_same(&ours, &theirs, &format!("{family}, five of 35 pages"));
    }
}

#[test]
fn rewards_and_choices_are_the_methods() {
    use common::reward::{Point, best_and_worst, implicit_reward};
    let prompts: Vec<Vec<(f64, f64, u64)>> = vec![
        vec![(-30.0, -31.5, 120), (-20.0, -19.0, 40), (-25.0, -26.0, 80)],
        vec![],
        vec![(-1.0, -1.0, 5), (-1.0, -1.0, 5), (-1.0, -1.0, 9)],
        (0..70)
            .map(|i| (-f64::from(i * 37 % 71), -35.25, i as u64 * 13 % 50))
            .collect(),
    ];
    let device = device();
    for alpha in [0.0, 0.001, 0.02, 1.0] {
        let found = cuda::rewards(&device, &prompts, 0.1, alpha).unwrap();
        for (found, prompt) in found.iter().zip(&prompts) {
            let points: Vec<Point> = prompt
                .iter()
                .map(|&(policy, reference, length)| Point {
                    reward: implicit_reward(0.1, policy, reference),
                    length,
                })
                .collect();
            let rewards: Vec<f64> = points.iter().map(|p| p.reward).collect();
            assert_eq!(found.rewards, rewards);
            assert_eq!(
                found.best_and_worst,
                best_and_worst(&points, alpha),
                "alpha {alpha}"
            );
        }
    }
}

#[test]
fn scores_are_the_cpus_on_ragged_batches() {
    let device = device();
    let (weights, _) = open("qwen2-sliding");
    let vocab = weights.config.vocab as u32;
    let token = |i: u32| i.wrapping_mul(2_654_435_761) % vocab;
    let groups: Vec<Group> = (0..7u32)
        .map(|g| Group {
            prompt: (0..1 + g * 6).map(|i| token(i + g)).collect(),
            responses: (0..g % 4 + 1)
                .map(|r| (0..(r * 11 + g) % 21).map(|i| token(i + r * 99)).collect())
                .collect(),
        })
        .collect();
    let cpu = Decoder::new(&weights.config, &weights, gemm::Precision::F32).unwrap();
    let gpu = on(&device, &weights, Precision::F32);
    let theirs = logprob::score(&cpu, &groups);
    let ours = cuda::score_all(&gpu, &groups, 100).unwrap();
    for (ours, theirs) in ours.iter().flatten().zip(&theirs) {
        assert!((ours - theirs).abs() < 1e-3, "{ours}, not {theirs}");
    }
}
