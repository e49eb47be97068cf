//! Every family of models against transformers: log-probs and DPO gradients of tiny checkpoints, in float64 there
//! (tests/golden/make_families.py).

mod shared;

use common::chat::Chat;
use common::dpo::checkpoint::{Writer, resume};
use common::dpo::{Kept, Pair, Settings, State, StateBytes, Train, Trainer};
use common::generate::{Generate, Generator, Limits, Request, Sampling};
use common::kernels::gemm::Precision;
use common::logprob::{Group, score};
use common::model::Decoder;
use shared::{
    FAMILIES, MIXTURES, STATE_BYTES, assert_trains_as_in_pytorch, golden, ids, objective, open,
    pair, run, settings, tiny_pairs,
};

#[test]
fn log_probs_are_transformers() {
    for family in FAMILIES.into_iter().chain(MIXTURES) {
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

/// What is sampled has the log-probs that scoring finds, token after token out of caches.
#[test]
fn samples_know_their_log_probs() {
    for family in FAMILIES.into_iter().chain(MIXTURES) {
        let (weights, figures) = open(family);
        let decoder = Decoder::new(&weights.config, &weights, Precision::F32).unwrap();
        let prompt = ids(&figures["sequences"][0]["ids"])[..5].to_vec();
        let how = Sampling {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            max_tokens: 40,
            seed: 7,
        };
        let limits = Limits {
            sequences: 3,
            bytes: usize::MAX,
        };
        let mut generator = Generator::new(&decoder, how, &[], limits);
        generator.push(Request {
            key: family.into(),
            prompt: prompt.clone(),
            k: 4,
        });
        let mut found = vec![];
        while !generator.is_idle() {
            generator.step(&|_| false).unwrap();
            found.extend(generator.finished());
        }
        let [(_, samples)] = &found[..] else {
            panic!("{family}: {} prompts are done", found.len());
        };
        let responses = samples.iter().map(|s| s.token_ids.clone()).collect();
        let scores = score(&decoder, &[Group { prompt, responses }]);
        for (sample, score) in samples.iter().zip(scores) {
            assert_eq!(sample.token_ids.len(), 40);
            let found = sample.logp;
            assert!(
                (found - score).abs() < 1e-3,
                "{family}: {found}, not {score}"
            );
        }
    }
}

#[test]
fn dpo_gradients_are_pytorchs() {
    for family in FAMILIES.into_iter().chain(MIXTURES) {
        let (weights, figures) = open(family);
        let dpo = &figures["dpo"];
        let number = |field: &str| dpo[field].as_f64().unwrap();
        let reference = (number("ref_chosen_logps"), number("ref_rejected_logps"));
        let pair = Pair {
            reference,
            ..pair(dpo, "")
        };
        let settings = settings(objective(number("beta")), 1e-3);
        let gradient = |states| {
            let trainer = Trainer::new(&weights, settings.clone(), Precision::F32, states);
            trainer.unwrap().gradient(&[&pair])
        };
        let (sums, gradient_again) = gradient(StateBytes { part: 1, long: 1 });
        assert!(sums.loss.is_finite());
        let trainer = Trainer::new(&weights, settings.clone(), Precision::F32, STATE_BYTES);
        let trainer = trainer.unwrap();
        let (sums, gradient) = trainer.gradient(&[&pair]);
        assert!(gradient == gradient_again, "{family}: layers made again");
        assert!(
            (sums.loss - number("loss")).abs() < 1e-5,
            "{family}: loss {}",
            sums.loss
        );
        let mut tensors = 0;
        // As a folder has the tensors: that is how transformers does.
        let places = trainer.params().places();
        let ours = |(name, shape): (String, Vec<usize>)| {
            let values = gradient[places[name.as_str()].clone()].into();
            Ok((name, shape, values))
        };
        let config = &weights.config;
        let gradients = config.stored(config.parameters().into_iter().map(ours));
        for (name, _, ours) in gradients.map(Result::unwrap) {
            let expected = &dpo["grads"][&name];
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

/// In steps so large that norms go to where a file that has them less 1 rounds them.
#[test]
fn a_checkpoint_has_every_bit_of_the_weights() {
    let chat = Chat::open(&golden("tiny_chat")).unwrap();
    for family in FAMILIES.into_iter().chain(MIXTURES) {
        let (weights, figures) = open(family);
        let settings = settings(objective(0.1), 0.3);
        let new = || Trainer::new(&weights, settings.clone(), Precision::F32, STATE_BYTES).unwrap();
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
        let mut trainer = new();
        let mut log = vec![];
        for _ in 0..3 {
            log.push(trainer.step(&[&pair(&figures["dpo"], "")], 0.0).unwrap());
        }
        writer.save(&trainer, &log).unwrap();
        let mut resumed = new();
        assert_eq!(resume(&output, &run, &mut resumed).unwrap(), log);
        let bits = |trainer: &Trainer| {
            let mut bits = vec![];
            let mut take = |run: &[f32]| {
                bits.extend(run.iter().map(|x| x.to_bits()));
                Ok(())
            };
            trainer.runs(Kept::Trained, &mut take).unwrap();
            bits
        };
        assert!(bits(&resumed) == bits(&trainer), "{family}");
    }
}

#[test]
fn what_only_chooses_experts_is_left_as_it_is() {
    for family in ["ernie4-5-moe", "glm4-moe"] {
        let (weights, figures) = open(family);
        let settings = Settings {
            weight_decay: 0.1,
            ..settings(objective(0.1), 0.3)
        };
        let mut trainer = Trainer::new(&weights, settings, Precision::F32, STATE_BYTES).unwrap();
        for _ in 0..2 {
            trainer.step(&[&pair(&figures["dpo"], "")], 0.0).unwrap();
        }
        let mut flat = vec![];
        let mut take = |run: &[f32]| {
            flat.extend_from_slice(run);
            Ok(())
        };
        trainer.runs(Kept::Trained, &mut take).unwrap();
        let mut found = 0;
        for (name, shape, range) in trainer.params().tensors() {
            let chooses = name.ends_with("e_score_correction_bias");
            let same = flat[range] == weights.tensor(name, shape).unwrap();
            assert_eq!(same, chooses, "{family}: {name}");
            found += usize::from(chooses);
        }
        assert_eq!(found, 1, "{family}");
    }
}

#[test]
fn every_loss_trains_as_in_pytorch() {
    let (weights, _) = open("llama");
    let decoder = Decoder::new(&weights.config, &weights, Precision::F32).unwrap();
    let pairs = tiny_pairs(|pair| {
        let logps = score(&decoder, &[pair.group()]);
        (logps[0], logps[1])
    });
    assert_trains_as_in_pytorch(&pairs, |settings| {
        Box::new(Trainer::new(&weights, settings, Precision::F32, STATE_BYTES).unwrap())
    });
}
