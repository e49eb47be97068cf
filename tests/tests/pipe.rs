//! The tools in pipes, as the README shows them, on tiny checkpoints.

use dice_tests::world::set_template;
use dice_tests::{
    Family, Fields, Finished, Tiny, Tool, bin_folder, lines, names, number, parse_rows, pipe,
    read_rows, text,
};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, PipeReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A folder with two policies of one tokenizer, prompts and offline pairs.
struct World {
    folder: tempfile::TempDir,
}

const PROMPTS: usize = 12;
const K: usize = 6;

impl World {
    fn new() -> Self {
        Self::of(Family::Llama)
    }

    fn of(family: Family) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let world = Self { folder };
        let model = Tiny {
            family,
            ..Tiny::default()
        };
        model.write(&world.path("pi"), 1);
        model.write(&world.path("ref"), 2);
        fs::write(world.path("prompts.jsonl"), lines(&prompts())).unwrap();
        fs::write(world.path("offline.jsonl"), lines(&offline())).unwrap();
        world
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn arg(&self, name: &str) -> String {
        text(&self.path(name))
    }

    /// A script in the world's folder.
    fn pipe(&self, script: &str) -> Tool {
        pipe(&format!("cd '{}'\n{script}", self.arg("")))
    }

    fn rows(&self, name: &str) -> Vec<Fields> {
        read_rows(&self.path(name))
    }

    fn generate(&self, more: &[&str]) -> Tool {
        let args =
            ["--model", &self.arg("pi"), "--k", "2", "--max-tokens", "24"].map(str::to_owned);
        Tool::new("dice-gen", args).args(more)
    }
}

/// Prompts of every form: text and messages, with and without id, with fields that nobody knows.
fn prompts() -> Vec<Value> {
    let prompt = |i: usize| match i % 3 {
        0 => json!({"prompt": format!("Say {i}")}),
        1 => {
            json!({"id": format!("id-{i}"), "topic": "zoë 🦊", "prompt": format!("Say {i}\nplease"), "nested": {"b": [1, null], "a": 0.1}})
        }
        _ => {
            json!({"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": format!("Say {i}")}], "n": i})
        }
    };
    (0..PROMPTS).map(prompt).collect()
}

fn offline() -> Vec<Value> {
    let pair = |i: usize| json!({"prompt": format!("Offline {i}"), "chosen": "yes, gladly", "rejected": "no", "origin": {"line": i}});
    (0..20).map(pair).collect()
}

const ROUND: &str = "
    dice-gen --model pi --k 6 --max-tokens 24 prompts.jsonl | tee samples.jsonl \
        | dice-score --policy pi --ref ref | tee scored.jsonl \
        | dice-pairs --replay offline.jsonl --gamma 0.5 --min-samples 2 | tee pairs.jsonl \
        | dice-train --model pi --output next/ --batch-size 4 --learning-rate 1e-3 > steps.jsonl";

#[test]
fn a_round_as_a_pipe() {
    let world = World::new();
    let round = world.pipe(ROUND).run().ok();
    assert_eq!(round.stdout, "");
    for tool in ["dice-gen: ", "dice-score: ", "dice-pairs: ", "dice-train: "] {
        let summaries = round
            .stderr
            .lines()
            .filter(|line| line.starts_with(tool) && line.contains(" done; "));
        assert!(summaries.count() >= 1, "{tool}: {}", round.stderr);
    }
    let prompts = prompts();
    check_samples(&world.rows("samples.jsonl"), &prompts);
    check_scored(&world.rows("scored.jsonl"), &world.rows("samples.jsonl"));
    let generated = check_pairs(&world.rows("pairs.jsonl"), &world.rows("scored.jsonl"));
    assert!(
        generated >= PROMPTS / 2,
        "{generated} of {PROMPTS} prompts gave a pair"
    );

    // What dice-score computed is not computed again; offline pairs have nothing to take.
    let pairs = 2 * generated;
    let reading = round.note("with reference log-probs");
    assert!(reading.contains(&format!("{pairs} rows read")), "{reading}");
    assert!(
        reading.contains(&format!("; {generated} with reference log-probs")),
        "{reading}"
    );
    check_steps(&world.rows("steps.jsonl"), pairs);

    check_checkpoint(&world.path("next"));
    assert!(!world.path("next.part").exists());

    // The result is the next round's policy, and its reference the last one.
    let again = "dice-gen --model next --k 2 --max-tokens 8 prompts.jsonl | dice-score --policy next --ref pi";
    let scored = world.pipe(again).run().ok().rows();
    assert_eq!(scored.len(), 2 * PROMPTS);
    assert!(
        scored.iter().any(|row| number(row, "reward").abs() > 1e-6),
        "training changed nothing"
    );
}

#[test]
fn a_round_of_a_mixture_of_experts() {
    let world = World::of(Family::Mixture);
    world.pipe(ROUND).run().ok();
    check_samples(&world.rows("samples.jsonl"), &prompts());
    check_scored(&world.rows("scored.jsonl"), &world.rows("samples.jsonl"));
    let tensors = |folder: &str| {
        let bytes = fs::read(world.path(folder).join("model.safetensors")).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let data =
            |(name, view): (String, safetensors::tensor::TensorView)| (name, view.data().to_vec());
        file.tensors()
            .into_iter()
            .map(data)
            .collect::<HashMap<_, _>>()
    };
    let (before, after) = (tensors("pi"), tensors("next"));
    assert_eq!(after.len(), before.len());
    for (name, values) in before {
        assert_ne!(after[&name], values, "{name} was not trained");
    }
    let again = "dice-gen --model next --k 2 --max-tokens 8 prompts.jsonl | dice-score --policy next --ref pi";
    assert_eq!(world.pipe(again).run().ok().rows().len(), 2 * PROMPTS);
}

/// The prompts of preference pairs are as good as any: what is sampled for them is scored and paired, not those pairs again.
#[test]
fn pairs_are_prompts_too() {
    let world = World::new();
    let answer = |text: &str| json!({"role": "assistant", "content": text});
    let pair = |i: usize| {
        let question = json!({"role": "user", "content": format!("Offline {i}")});
        match i % 2 {
            0 => {
                json!({"prompt": format!("Offline {i}"), "chosen": "yes", "rejected": "no", "chosen_token_ids": [1],
                "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0, "ref": "another", "chosen_by": "hand"})
            }
            _ => json!({"chosen": [question, answer("yes")], "rejected": [question, answer("no")]}),
        }
    };
    fs::write(
        world.path("own.jsonl"),
        lines(&(0..6).map(pair).collect::<Vec<_>>()),
    )
    .unwrap();
    let script = "dice-gen --model pi --k 4 --max-tokens 24 own.jsonl | tee samples.jsonl \
        | sed 's/\"token_ids\":[^]]*],\"logp\":[^,]*,//' | dice-score --policy pi --ref ref | tee scored.jsonl \
        | dice-pairs --min-samples 2 --keep-truncated";
    let pairs = world.pipe(script).run().ok().rows();
    let scored = world.rows("scored.jsonl");
    assert_eq!(scored.len(), 24);
    assert!(
        scored
            .iter()
            .all(|row| row.contains_key("prompt") && row.contains_key("reward"))
    );
    assert_eq!(pairs.len(), 6);
    for pair in &pairs {
        let of_prompt = |row: &&Fields| row["prompt"] == pair["prompt"];
        for side in ["chosen", "rejected"] {
            let own = |row: &Fields| row["response"] == pair[side];
            let found = scored.iter().filter(of_prompt).find(|row| own(row));
            let found = found.expect("a sample of this prompt");
            assert_eq!(pair[&format!("ref_{side}_logps")], found["policy_logps"]);
            assert!(!pair.contains_key(&format!("{side}_token_ids")), "{pair:?}");
        }
        assert_ne!(pair["ref"], "another");
    }
    assert_eq!(pairs[0]["chosen_by"], "hand");
}

/// So are those of samples: what is known of another response to them does not come along.
#[test]
fn samples_are_prompts_too() {
    let world = World::new();
    let row = json!({"id": null, "prompt": "Why?", "response": "So.", "reward": 7, "policy_logps": -1, "ref_logps": -2,
        "policy": "p", "ref": "r", "logp": -1, "topic": "x"});
    fs::write(world.path("own.jsonl"), lines(&[row])).unwrap();
    let script = "dice-gen --model pi --k 2 --max-tokens 8 --stop e --system Be --output out.jsonl own.jsonl";
    world.pipe(script).run().ok();
    let made = world.rows("out.jsonl");
    assert_eq!(made.len(), 2);
    for row in &made {
        let old = ["reward", "policy_logps", "ref_logps", "policy", "ref"];
        assert!(old.iter().all(|field| !row.contains_key(*field)), "{row:?}");
        assert_ne!(row.get("logp"), Some(&json!(-1)));
        assert_eq!(row["topic"], "x");
        // The input's own, without the system turn: a run that was killed is recognised by it.
        assert!(row["id"].is_string());
    }
    fs::rename(world.path("out.jsonl"), world.path("out.jsonl.part")).unwrap();
    world.pipe(&format!("{script} --resume")).run().ok();
    assert_eq!(world.rows("out.jsonl"), made);
}

/// An answer as text follows the prompt for an answer; where the template would put a thought between them, it is said.
#[test]
fn answers_as_text_on_templates_that_open_them_are_spoken_of() {
    let world = World::new();
    let pair = json!({"prompt": "Why?", "chosen": "So.<|im_end|>", "rejected": "No."});
    let said = |output: &str| {
        let args = ["--model", &world.arg("pi"), "--output", &world.arg(output)];
        let run = Tool::new("dice-train", args).stdin(lines(std::slice::from_ref(&pair)));
        run.run().ok().stderr
    };
    let stderr = said("a");
    assert!(!stderr.contains("opens an answer"), "{stderr}");
    let ends = "stdin:1: field \"chosen\" ends with \"<|im_end|>\" written out";
    assert!(stderr.contains(ends), "{stderr}");
    let template = "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}<think></think>{% endif %}\
        {{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}";
    set_template(&world.path("pi"), template);
    let stderr = said("b");
    assert_eq!(stderr.matches("opens an answer").count(), 1, "{stderr}");
    // As messages they are opened.
    let answer = |text: &str| json!([{"role": "assistant", "content": text}]);
    let pair = json!({"prompt": "Why?", "chosen": answer("So."), "rejected": answer("No.")});
    let args = ["--model", &world.arg("pi"), "--output", &world.arg("c")];
    let run = Tool::new("dice-train", args)
        .stdin(lines(&[pair]))
        .run()
        .ok();
    assert!(!run.stderr.contains("opens an answer"), "{}", run.stderr);
    let tokens = |steps: &str| -> i64 {
        let step: Value = serde_json::from_str(steps.lines().next().unwrap()).unwrap();
        step["num_tokens"].as_i64().unwrap()
    };
    let plain = json!({"prompt": "Why?", "chosen": "So.", "rejected": "No."});
    let args = ["--model", &world.arg("pi"), "--output", &world.arg("d")];
    let text = Tool::new("dice-train", args)
        .stdin(lines(&[plain]))
        .run()
        .ok();
    assert!(tokens(&run.stdout) > tokens(&text.stdout));
}

/// What a row gives the template besides its prompt decides what is sampled, scored and trained.
#[test]
fn templates_get_the_rows_variables() {
    let world = World::new();
    let template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if not enable_thinking %} at once{% endif %}\
                    {% for tool in tools or [] %} {{ tool.name }}{% endfor %}:";
    for model in ["pi", "ref"] {
        set_template(&world.path(model), template);
    }
    let row = |more: Value| {
        let mut row =
            json!({"prompt": "Why?", "response": "So.", "chosen": "So.", "rejected": "No."});
        row.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        row
    };
    let rows = [
        row(json!({})),
        row(json!({"chat_template_kwargs": {"enable_thinking": true}})),
        row(json!({"tools": [{"name": "clock"}]})),
        row(json!({"tools": "[{\"name\": \"clock\"}]"})),
        row(json!({"chat_template_kwargs": null, "tools": null})),
    ];
    let args = ["--policy", &world.arg("pi"), "--ref", &world.arg("ref")].map(str::to_owned);
    let scored = Tool::new("dice-score", &args)
        .stdin(lines(&rows))
        .run()
        .ok()
        .rows();
    let logps = |i: usize| number(&scored[i], "policy_logps");
    assert_eq!(logps(0), logps(4));
    assert_eq!(logps(2), logps(3));
    assert!(logps(0) != logps(1) && logps(0) != logps(2) && logps(1) != logps(2));
    let wrong = [row(json!({"tools": "clock"}))];
    let refused = Tool::new("dice-score", &args).stdin(lines(&wrong)).run();
    assert!(
        refused
            .error_line()
            .contains("stdin:1: field \"tools\" must be a list")
    );
    // One pair of each kind a step: what the reference says of it is what the policy says before it has moved.
    let (pi, next) = (world.arg("pi"), world.arg("next"));
    let how = [
        "--model",
        &pi,
        "--output",
        &next,
        "--batch-size",
        "1",
        "--no-shuffle",
        "--learning-rate",
        "0",
    ];
    let steps = Tool::new("dice-train", how)
        .stdin(lines(&rows))
        .run()
        .ok()
        .rows();
    for (i, step) in steps.iter().enumerate() {
        assert!(
            (number(step, "logps/chosen") - logps(i)).abs() < 1e-4,
            "{step:?}"
        );
    }
}

fn check_samples(samples: &[Fields], prompts: &[Value]) {
    assert_eq!(samples.len(), PROMPTS * K);
    for (i, row) in samples.iter().enumerate() {
        let prompt = prompts[i / K].as_object().unwrap();
        for (field, value) in prompt {
            assert_eq!(
                row.get(field),
                Some(value),
                "row {i}: {field} passes through"
            );
        }
        let own = [
            "prompt_hash",
            "sample",
            "response",
            "finish_reason",
            "token_ids",
            "logp",
            "model",
            "dtype",
        ];
        let expected = prompt.len() + usize::from(!prompt.contains_key("id")) + own.len();
        assert_eq!(names(row).len(), expected, "row {i}: {:?}", names(row));
        assert_eq!(row["sample"], json!(i % K), "in order");
        let ids = row["token_ids"].as_array().unwrap();
        let ended = ids.last().is_some_and(|id| id == 2 || id == 0);
        match row["finish_reason"].as_str() {
            Some("stop") => assert!(ended && ids.len() <= 24),
            Some("length") => assert!(!ended && ids.len() == 24),
            other => panic!("row {i}: finish_reason {other:?}"),
        }
        assert!(row["response"].is_string());
        assert!(number(row, "logp") < 0.0);
        assert_eq!(row["model"].as_str().unwrap().len(), 16);
    }
    let ids: Vec<_> = samples
        .iter()
        .step_by(K)
        .map(|row| row["id"].clone())
        .collect();
    assert!(ids.iter().all(Value::is_string));
    assert_eq!(ids[1], "id-1");
    let mut distinct = ids.clone();
    distinct.sort_by_key(Value::to_string);
    distinct.dedup();
    assert_eq!(distinct.len(), PROMPTS);
}

fn check_scored(scored: &[Fields], samples: &[Fields]) {
    assert_eq!(scored.len(), samples.len());
    for (row, sample) in scored.iter().zip(samples) {
        let mut expected = names(sample);
        expected.extend(["policy_logps", "ref_logps", "reward", "policy", "ref"]);
        assert_eq!(names(row), expected);
        assert!(
            sample.iter().all(|(field, value)| row[field] == *value),
            "dice-score changed a field"
        );
        let (policy, reference) = (number(row, "policy_logps"), number(row, "ref_logps"));
        assert!((number(row, "reward") - 0.1 * (policy - reference)).abs() < 1e-9);
        // The sampler's own log-prob and the scorer's are two ways to one number.
        let sampled = number(sample, "logp");
        assert!(
            (policy - sampled).abs() < 0.02 * sampled.abs().max(1.0),
            "{policy} and {sampled}"
        );
        assert_eq!(row["policy"], sample["model"]);
        assert_ne!(row["policy"], row["ref"]);
    }
}

/// Gives the number of generated pairs.
fn check_pairs(pairs: &[Fields], scored: &[Fields]) -> usize {
    let (generated, replayed): (Vec<_>, Vec<_>) =
        pairs.iter().partition(|row| row["source"] == "generated");
    assert_eq!(generated.len(), replayed.len(), "gamma is 0.5");
    assert!(
        pairs[..generated.len()]
            .iter()
            .all(|row| row["source"] == "generated")
    );
    let mut samples: HashMap<String, Vec<&Fields>> = HashMap::new();
    for row in scored {
        samples
            .entry(row["id"].as_str().unwrap().to_owned())
            .or_default()
            .push(row);
    }
    for pair in &generated {
        let samples = &samples[pair["id"].as_str().unwrap()];
        let find = |side: &str| {
            let same =
                |row: &&&Fields| row["response"] == pair[side] && row["finish_reason"] == "stop";
            let sample = samples
                .iter()
                .find(same)
                .unwrap_or_else(|| panic!("{side} is none of the samples"));
            assert_eq!(pair[&format!("{side}_token_ids")], sample["token_ids"]);
            assert_eq!(pair[&format!("{side}_finish_reason")], "stop");
            assert_eq!(
                pair[&format!("ref_{side}_logps")],
                sample["policy_logps"],
                "the policy is the next reference"
            );
            assert_eq!(pair["ref"], sample["policy"]);
            assert_eq!(pair["prompt"], sample["prompt"]);
            for unknown in ["topic", "nested", "n"] {
                assert_eq!(pair.get(unknown), sample.get(unknown));
            }
        };
        find("chosen");
        find("rejected");
        assert!(number(pair, "score_chosen") > number(pair, "score_rejected"));
    }
    for pair in replayed {
        let line = pair["origin"]["line"].as_u64().unwrap();
        assert_eq!(pair["prompt"], json!(format!("Offline {line}")));
        assert_eq!(pair["chosen"], "yes, gladly");
    }
    generated.len()
}

fn check_steps(steps: &[Fields], pairs: usize) {
    assert_eq!(steps.len(), pairs.div_ceil(4));
    let fields = [
        "step",
        "epoch",
        "loss",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
        "grad_norm",
        "learning_rate",
        "num_tokens",
    ];
    for (i, step) in steps.iter().enumerate() {
        assert_eq!(names(step), fields);
        assert_eq!(step["step"], json!(i + 1));
        assert!(number(step, "loss").is_finite() && number(step, "grad_norm") > 0.0);
    }
    let first = &steps[0];
    assert!(
        (number(first, "loss") - 2f64.ln()).abs() < 1e-4,
        "policy and reference begin equal: {first:?}"
    );
    assert!(number(first, "rewards/margins").abs() < 1e-4);
    let last = steps.last().unwrap();
    assert!((number(last, "epoch") - 1.0).abs() < 1e-9);
    assert!(number(last, "num_tokens") > number(first, "num_tokens"));
}

fn check_checkpoint(folder: &Path) {
    let json = |name: &str| -> Value {
        let bytes = fs::read(folder.join(name)).unwrap_or_else(|err| panic!("{name}: {err}"));
        serde_json::from_slice(&bytes).unwrap()
    };
    let config = json("config.json");
    assert_eq!(config["model_type"], "llama");
    assert_eq!(config["vocab_size"], Tiny::default().vocab);
    assert_eq!(
        json("generation_config.json")["eos_token_id"],
        json!([2, 0])
    );
    assert!(
        json("tokenizer_config.json")["chat_template"]
            .as_str()
            .unwrap()
            .contains("im_start")
    );
    assert!(json("tokenizer.json")["model"]["vocab"].is_object());
    let bytes = fs::read(folder.join("model.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(tensors.len(), 3 + 9 * Tiny::default().layers);
    let head = tensors.tensor("lm_head.weight").unwrap();
    assert_eq!(
        head.shape(),
        [Tiny::default().vocab, Tiny::default().hidden]
    );
}

/// That training takes the rows' log-probs, rather than reads past them, shows in the rewards.
#[test]
fn training_takes_the_reference_from_the_rows_of_its_own_model_only() {
    let world = World::new();
    world
        .pipe(&ROUND.replace("| dice-train", "> /dev/null #"))
        .run()
        .ok();
    let mut rows = world.rows("pairs.jsonl");
    rows.retain(|row| row["source"] == "generated");
    let train = |rows: &[Fields], output: &str| {
        let input: String = rows
            .iter()
            .map(|row| Value::from(row.clone()).to_string() + "\n")
            .collect();
        let args = [
            "--model",
            &world.arg("pi"),
            "--output",
            &world.arg(output),
            "--max-steps",
            "1",
        ];
        let run = Tool::new("dice-train", args).stdin(input).run().ok();
        (number(&run.rows()[0], "rewards/chosen"), run.stderr)
    };
    assert!(train(&rows, "a").0.abs() < 1e-4);
    for row in &mut rows {
        let shifted = number(row, "ref_chosen_logps") - 2.0;
        row["ref_chosen_logps"] = json!(shifted);
    }
    let (reward, _) = train(&rows, "b");
    assert!((reward - 0.2).abs() < 1e-4, "{reward} is not beta * 2");
    // Of another model, or of a prompt that a template wrote otherwise.
    for (field, output) in [("ref", "c"), ("prompt_hash", "d")] {
        let mut rows = rows.clone();
        for row in &mut rows {
            row[field] = json!("0123456789abcdef");
        }
        let (reward, stderr) = train(&rows, output);
        assert!(
            reward.abs() < 1e-4,
            "{field}: foreign log-probs were taken: {reward}"
        );
        assert!(stderr.contains("; 0 with reference log-probs"), "{stderr}");
    }
}

/// The sampler's log-probs are the policy's only of the tokens that it drew, of its own weights and number format.
#[test]
fn the_samplers_log_probs_are_taken_only_where_they_hold() {
    let world = World::new();
    let samples = world.generate(&["--dtype", "f32", &world.arg("prompts.jsonl")]);
    let samples = samples.run().ok().rows();
    let cut = |row: &Fields| row["finish_reason"] == "length";
    assert!(samples.iter().any(cut) && !samples.iter().all(cut));
    let score = |edit: &dyn Fn(&mut Fields)| {
        let mut rows = samples.clone();
        rows.iter_mut().for_each(edit);
        let rows: Vec<Value> = rows.into_iter().map(Value::from).collect();
        let args = ["--policy", &world.arg("pi"), "--ref", &world.arg("ref")];
        let run = Tool::new("dice-score", args).stdin(lines(&rows)).run().ok();
        let logps = run
            .rows()
            .iter()
            .map(|row| number(row, "policy_logps"))
            .collect::<Vec<_>>();
        (logps, run.stderr)
    };
    let drop_fields = |fields: &'static [&str]| {
        move |row: &mut Fields| row.retain(|field, _| !fields.contains(&field.as_str()))
    };
    let close = |a: &[f64], b: &[f64]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-4);

    let (taken, said) = score(&|_| {});
    assert!(said.contains("24 with the sampler's log-probs"), "{said}");
    let (computed, said) = score(&drop_fields(&["logp"]));
    assert!(!said.contains("sampler"), "{said}");
    assert!(close(&taken, &computed));
    // Called finished, a cut response has one more token to score.
    let (finished, _) = score(&drop_fields(&["finish_reason"]));
    let (anew, _) = score(&drop_fields(&["finish_reason", "logp"]));
    assert!(
        close(&finished, &anew),
        "log-probs of other tokens were taken"
    );
    assert!(!close(&finished, &computed));
    for (field, value) in [
        ("dtype", json!("bf16")),
        ("dtype", json!("f32+kv-int8")),
        ("model", json!("0123456789abcdef")),
        ("prompt_hash", json!("0123456789abcdef")),
    ] {
        let (anew, said) = score(&|row: &mut Fields| {
            row[field] = value.clone();
            row["logp"] = json!(-1.0);
        });
        assert!(
            close(&anew, &computed) && !said.contains("sampler"),
            "{field}: {said}"
        );
    }
}

#[test]
fn a_closed_pipe_ends_quietly() {
    let world = World::new();
    // More than a pipe holds, so that the writers meet its end.
    let filler = "x".repeat(2000);
    let scored: Vec<Value> = (0..4000)
        .map(|i| json!({"prompt": format!("p{}", i / 2), "response": format!("r{i}"), "reward": i % 2, "filler": filler}))
        .collect();
    fs::write(world.path("scored.jsonl"), lines(&scored)).unwrap();
    let mut prompts = prompts();
    for prompt in &mut prompts {
        prompt["filler"] = json!("y".repeat(60_000));
    }
    fs::write(world.path("wide.jsonl"), lines(&prompts)).unwrap();
    let samples: Vec<Value> = (0..3000)
        .map(|i| json!({"prompt": format!("p{}", i / 4), "response": format!("r{i}"), "filler": filler}))
        .collect();
    fs::write(world.path("samples.jsonl"), lines(&samples)).unwrap();
    for script in [
        "dice-gen --model pi --k 4 --max-tokens 4 wide.jsonl | head -n 1",
        "dice-score --policy pi --ref ref samples.jsonl | head -n 1",
        "dice-pairs --min-samples 2 --min-chars 1 scored.jsonl | head -n 1",
    ] {
        let run = world.pipe(script).run().ok();
        assert_eq!(run.rows().len(), 1, "{script}");
        let quiet = ["roken pipe", "cannot", "error", "panic"]
            .iter()
            .all(|word| !run.stderr.contains(word));
        assert!(quiet, "{script}: {}", run.stderr);
        assert!(
            !run.stderr.contains(" done; "),
            "{script} met no closed pipe: {}",
            run.stderr
        );
    }
}

/// A prompt is answered while the program before it in the pipe still thinks about the next one.
#[test]
fn responses_do_not_wait_for_later_prompts() {
    let world = World::new();
    let mut child = Command::new(bin_folder().join("dice-gen"))
        .args(["--model", &world.arg("pi"), "--k", "2", "--max-tokens", "8"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let mut answers = BufReader::new(child.stdout.take().unwrap()).lines();
    for prompt in prompts() {
        writeln!(stdin, "{prompt}").unwrap();
        for sample in 0..2 {
            let row = parse_rows(&answers.next().unwrap().unwrap());
            assert_eq!(
                (&row[0]["prompt"], &row[0]["sample"]),
                (&prompt["prompt"], &json!(sample))
            );
        }
    }
    drop(stdin);
    assert!(answers.next().is_none());
    assert!(child.wait().unwrap().success());
}

/// Its result is a folder: who reads only the first steps still gets it.
#[test]
fn training_outlives_its_reader() {
    let world = World::new();
    let train = |output: &str| {
        format!(
            "dice-train --model pi --output {output} --batch-size 1 --learning-rate 1e-3 offline.jsonl"
        )
    };
    let whole = world.pipe(&train("a")).run().ok();
    assert_eq!(whole.rows().len(), offline().len());
    let cut = world.pipe(&(train("b") + " | head -n 1")).run().ok();
    assert_eq!(
        cut.stdout,
        whole.stdout.lines().next().unwrap().to_owned() + "\n"
    );
    let weights = |folder: &str| fs::read(world.path(folder).join("model.safetensors")).unwrap();
    assert_eq!(weights("a"), weights("b"));
}

#[test]
fn help_and_wrong_usage() {
    for tool in ["dice-gen", "dice-score", "dice-pairs", "dice-train"] {
        let help = Tool::new(tool, ["--help"]).run().ok();
        assert!(
            help.stdout.contains("Usage: ") && help.stdout.contains("Example"),
            "{tool} --help teaches"
        );
        let machine = help.stdout.split("\nMachine:").nth(1).unwrap_or_default();
        let machine = machine.split("\nExample").next().unwrap();
        assert!(!machine.contains("--output") && !machine.contains("[FILE]"));
        assert_eq!(help.stderr, "");
        let version = Tool::new(tool, ["--version"]).run().ok();
        assert!(version.stdout.starts_with(tool));
        for wrong in [
            &["--no-such-flag"][..],
            &["--resume"],
            &["--seed", "x", "--beta", "y"],
        ] {
            let run = Tool::new(tool, wrong).run();
            assert_eq!(run.code, Some(2), "{tool} {wrong:?}: {}", run.stderr);
            assert_eq!(run.rows_before_failure().len(), 0);
        }
    }
}

/// A prompt that comes twice without an id of its own has the same responses twice, which is said.
#[test]
fn repeated_prompts_are_said() {
    let world = World::new();
    let rows = [json!({"prompt": "Say 1"}), json!({"prompt": "Say 1"})];
    let run = world.generate(&[]).stdin(lines(&rows)).run().ok();
    run.note("1 prompts with the id of one before");
    let rows = run.rows();
    let (first, second) = rows.split_at(rows.len() / 2);
    assert_eq!(first, second);
    let other = ["a", "b"].map(|id| json!({"prompt": "Say 1", "id": id}));
    let run = world.generate(&[]).stdin(lines(&other)).run().ok();
    assert!(!run.stderr.contains("id of one before"));
}

#[test]
fn stdin_and_several_files_are_one_input() {
    let world = World::new();
    let prompts = prompts();
    fs::write(world.path("a.jsonl"), lines(&prompts[..5])).unwrap();
    fs::write(world.path("c.jsonl"), lines(&prompts[8..])).unwrap();
    let straight = world.generate(&[&world.arg("prompts.jsonl")]).run().ok();
    assert_eq!(straight.rows().len(), 2 * PROMPTS);
    let all = lines(&prompts);
    assert_eq!(
        world.generate(&[]).stdin(all.clone()).run().ok().stdout,
        straight.stdout
    );
    assert_eq!(
        world.generate(&["-"]).stdin(all).run().ok().stdout,
        straight.stdout
    );
    let parts = [&world.arg("a.jsonl")[..], "-", &world.arg("c.jsonl")];
    let parts = world
        .generate(&parts)
        .stdin(lines(&prompts[5..8]))
        .run()
        .ok();
    assert_eq!(parts.stdout, straight.stdout);

    // So is each part by itself.
    let shards = [&prompts[..5], &prompts[5..8], &prompts[8..]];
    let shard = |rows: &[Value]| world.generate(&[]).stdin(lines(rows)).run().ok().stdout;
    assert_eq!(shards.map(shard).concat(), straight.stdout);

    // A file is what stdout is.
    let output = world.arg("samples.jsonl");
    let to_file = world
        .generate(&["--output", &output, &world.arg("prompts.jsonl")])
        .run()
        .ok();
    assert_eq!(to_file.stdout, "");
    assert_eq!(fs::read_to_string(&output).unwrap(), straight.stdout);
}

#[test]
fn no_input_is_no_output() {
    let world = World::new();
    assert_eq!(world.generate(&[]).run().ok().stdout, "");
    let score = ["--policy", &world.arg("pi"), "--ref", &world.arg("ref")];
    assert_eq!(Tool::new("dice-score", score).run().ok().stdout, "");
    let pairs = Tool::new("dice-pairs", [""; 0]).run().ok();
    assert_eq!(pairs.stdout, "");
    assert!(pairs.stderr.contains("no pair is left"), "{}", pairs.stderr);
    // No input is not the wish to train on offline pairs alone, which has a flag.
    let replay =
        |gamma| ["--replay", &world.arg("offline.jsonl"), "--gamma", gamma].map(str::to_owned);
    let mixed = Tool::new("dice-pairs", replay("0.5")).run();
    assert!(mixed.error_line().contains("the input has no rows"));
    let same = json!({"prompt": "p", "response": "same", "reward": 1});
    fs::write(world.path("same.jsonl"), lines(&[same])).unwrap();
    let mixed = Tool::new("dice-pairs", replay("0.5"))
        .args([world.arg("same.jsonl")])
        .run();
    assert!(mixed.error_line().contains("no prompt gave a pair"));
    let replayed = Tool::new("dice-pairs", replay("1")).run().ok();
    assert_eq!(replayed.stdout.lines().count(), offline().len());
    let train = Tool::new(
        "dice-train",
        ["--model", &world.arg("pi"), "--output", &world.arg("next")],
    )
    .run();
    assert!(train.error_line().contains("no pairs to train on"));
    // All of them left out, it says why.
    let world = World::new();
    let args = ["--model", &world.arg("pi"), "--output", &world.arg("next")];
    let train = Tool::new("dice-train", args)
        .args(["--max-length", "5", &world.arg("offline.jsonl")])
        .run();
    assert!(train.error_line().contains("no pairs to train on"));
    train.note("longer than --max-length 20");
    assert!(!world.path("next").exists() && !world.path("next.part").exists());
}

/// Whether a stage cannot start or fails on the way: no checkpoint is made of half the data, nor of replayed pairs alone.
#[test]
fn a_pipe_fails_with_any_of_its_stages_and_makes_no_checkpoint() {
    let world = World::new();
    fs::write(
        world.path("bad-prompts.jsonl"),
        lines(&prompts()) + "{\"prompt\":7}\n",
    )
    .unwrap();
    fs::write(world.path("bad-offline.jsonl"), lines(&offline()) + "[]\n").unwrap();
    let bad_samples = "{ head -n 40 samples.jsonl; echo '{\"prompt\":\"x\"}'; }";
    world
        .pipe(&ROUND.replace("| dice-train", "> /dev/null #"))
        .run()
        .ok();
    for (right, wrong, cause) in [
        ("dice-gen --model pi", "dice-gen --model missing", "missing"),
        ("--k 6", "--k 0", "at least 1"),
        ("--k 6", "--k six", "invalid value"),
        ("--ref ref", "--ref missing", "missing"),
        ("--gamma 0.5", "--gamma 2", "from 0 to 1"),
        ("offline.jsonl", "missing.jsonl", "missing"),
        ("offline.jsonl", "bad-offline.jsonl", "bad-offline.jsonl:21"),
        (
            "dice-train --model pi",
            "dice-train --model missing",
            "missing",
        ),
        (" prompts.jsonl", " missing.jsonl", "missing"),
        (
            " prompts.jsonl",
            " bad-prompts.jsonl",
            "bad-prompts.jsonl:13",
        ),
        (
            "dice-gen --model pi --k 6 --max-tokens 24 prompts.jsonl | tee samples.jsonl",
            bad_samples,
            "stdin:41",
        ),
    ] {
        let script = ROUND.replace(right, wrong);
        assert_ne!(script, ROUND);
        let run = world.pipe(&script).run();
        assert!(matches!(run.code, Some(1 | 2)), "{wrong}: {}", run.stderr);
        assert!(run.stderr.contains(cause), "{wrong}: {}", run.stderr);
        assert!(
            !world.path("next").exists() && !world.path("next.part").exists(),
            "{wrong}: {}",
            run.stderr
        );
    }
}

/// The first rows of a scorer that is killed (by the memory's guard, say) while it waits for its next row, in a pipe.
fn cut_short(world: &World) -> PipeReader {
    let (mut reader, writer) = std::io::pipe().unwrap();
    let args = ["--policy", &world.arg("pi"), "--ref", &world.arg("ref")];
    let mut scorer = Command::new(bin_folder().join("dice-score"))
        .args(args)
        .stdin(Stdio::piped())
        .stdout(writer)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut stdin = scorer.stdin.take().unwrap();
    // More than it gathers for a forward pass.
    let row = |i: usize| json!({"prompt": format!("Say {i}"), "response": "x".repeat(100), "chosen": "Yes.", "rejected": "No."});
    let rows: Vec<Value> = (0..20).map(row).collect();
    stdin.write_all(lines(&rows).as_bytes()).unwrap();
    // Its rows are on their way, the first character is here: the rest is for the next program.
    let mut first = [0];
    reader.read_exact(&mut first).unwrap();
    assert_eq!(&first, b"{");
    scorer.kill().unwrap();
    scorer.wait().unwrap();
    reader
}

/// A killed writer looks to its reader as one that is done; it is told from it all the same.
#[test]
fn the_rows_of_a_killed_program_are_not_taken_for_all() {
    let world = World::new();
    let (pi, reference, next) = (world.arg("pi"), world.arg("ref"), world.arg("next"));
    for (tool, args) in [
        ("dice-gen", vec!["--model", &pi, "--max-tokens", "4"]),
        ("dice-score", vec!["--policy", &pi, "--ref", &reference]),
        ("dice-pairs", vec!["--min-samples", "1", "--min-chars", "0"]),
        ("dice-train", vec!["--model", &pi, "--output", &next]),
    ] {
        // What the test took off the pipe is given back before the rest.
        let mut rest = cut_short(&world);
        let (reader, mut writer) = std::io::pipe().unwrap();
        let child = Command::new(bin_folder().join(tool))
            .args(&args)
            .stdin(reader)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        writer.write_all(b"{").unwrap();
        std::io::copy(&mut rest, &mut writer).unwrap();
        drop(writer);
        let foreign = Finished::new(tool, child.wait_with_output().unwrap());
        // A program in between that knows nothing of the mark hands on what it got: those rows count as whole.
        foreign.ok();
        drop(fs::remove_dir_all(&next));

        let child = Command::new(bin_folder().join(tool))
            .args(&args)
            .stdin(after_first_row(cut_short(&world)))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let run = Finished::new(tool, child.wait_with_output().unwrap());
        let line = run.error_line();
        assert!(
            line.contains("stdin: the program that wrote this pipe was killed: rows are missing"),
            "{line}"
        );
        assert!(!world.path("next").exists() && !world.path("next.part").exists());
    }
}

/// A pipe without its first, begun row.
fn after_first_row(mut pipe: PipeReader) -> PipeReader {
    let mut byte = [0];
    while byte != *b"\n" {
        pipe.read_exact(&mut byte).unwrap();
    }
    pipe
}

/// The mark on a pipe goes with its writer's end, and comes again with the next writer's start.
#[test]
fn writers_may_take_turns() {
    let world = World::new();
    let turn = "dice-gen --model pi --k 1 --max-tokens 4 prompts.jsonl";
    let both = format!("{{ {turn}; {turn}; }} | dice-score --policy pi --ref ref");
    assert_eq!(world.pipe(&both).run().ok().rows().len(), 2 * PROMPTS);
    let killed = "dice-gen --model pi < <(sleep 9) 2> said &
        until [ -s said ]; do sleep 0.01; done; kill -9 $!; wait $! || true";
    let both = format!("{{ {killed}; {turn}; }} | dice-score --policy pi --ref ref");
    let run = world.pipe(&both).run();
    assert_eq!(run.code, Some(1), "{}", run.stderr);
    run.note("rows are missing");
}

/// Preference pairs are scored too, so that replayed ones bring their reference.
#[test]
fn scored_replay_pairs_need_no_reference() {
    let world = World::new();
    let scored = world
        .pipe("dice-score --policy pi --ref ref offline.jsonl")
        .run()
        .ok()
        .rows();
    assert_eq!(scored.len(), offline().len());
    for (row, pair) in scored.iter().zip(offline()) {
        let mut expected = names(pair.as_object().unwrap());
        expected.extend([
            "prompt_hash",
            "policy_chosen_logps",
            "ref_chosen_logps",
            "reward_chosen",
            "policy_rejected_logps",
            "ref_rejected_logps",
            "reward_rejected",
            "policy",
            "ref",
        ]);
        assert_eq!(names(row), expected);
        let gap = number(row, "policy_chosen_logps") - number(row, "ref_chosen_logps");
        assert!((number(row, "reward_chosen") - 0.1 * gap).abs() < 1e-9);
    }
    let train =
        "dice-score --policy pi --ref ref offline.jsonl | dice-train --model pi --output next";
    let run = world.pipe(train).run().ok();
    run.note("; 20 with reference log-probs");
    assert_eq!(parse_rows(&run.stdout).len(), 1);
    // In 16 bits they are others than those that training in float32 begins with.
    let script = train.replace("dice-score", "dice-score --dtype bf16");
    let rounded = world.pipe(&script.replace("next", "rounded")).run().ok();
    rounded.note("; 0 with reference log-probs");
    let first = &parse_rows(&rounded.stdout)[0];
    assert!(number(first, "rewards/chosen").abs() < 1e-6);
}

/// Where memory holds one of the two models at a time, they take turns, to the same rewards.
#[test]
fn models_take_turns_where_memory_is_short() {
    let world = World::new();
    let wide = Tiny {
        hidden: 768,
        layers: 3,
        ..Tiny::default()
    };
    for (name, seed) in [("wide-pi", 1), ("wide-ref", 2)] {
        wide.write(&world.path(name), seed);
    }
    let rows = (0..8).map(|i| json!({"prompt": format!("Say {i}"), "response": "so"}));
    let rows = lines(&rows.collect::<Vec<_>>());
    let score = |budget: &str| {
        let (policy, reference) = (world.arg("wide-pi"), world.arg("wide-ref"));
        let models = ["--policy", &policy, "--ref", &reference];
        let tool = Tool::new("dice-score", models).args(["--memory-budget", budget]);
        tool.stdin(rows.as_str()).run().ok()
    };
    let both = score("2G");
    let weights = fs::metadata(world.path("wide-pi/model.safetensors")).unwrap();
    let turns = score(&(weights.len() / 2 * 3).to_string());
    assert!(!both.stderr.contains("take turns"), "{}", both.stderr);
    assert!(turns.stderr.contains("they take turns"), "{}", turns.stderr);
    assert!(both.rows() == turns.rows() && both.rows().len() == 8);
}

#[test]
fn conversational_pairs_are_read_by_every_tool() {
    let world = World::new();
    let turn = |role: &str, content: &str| json!({"role": role, "content": content});
    let talk = |i: usize, answer: &str| {
        json!([turn("user", &format!("Say {i}")), turn("assistant", answer)])
    };
    let chosen = |i: usize| format!("yes, {i}");
    let forms: [&dyn Fn(usize) -> Value; 3] = [
        &|i| json!({"prompt": format!("Say {i}"), "chosen": chosen(i), "rejected": "no"}),
        &|i| {
            let answer = |text: &str| [turn("assistant", text)];
            json!({"prompt": [turn("user", &format!("Say {i}"))], "chosen": answer(&chosen(i)), "rejected": answer("no")})
        },
        &|i| json!({"chosen": talk(i, &chosen(i)), "rejected": talk(i, "no")}),
    ];
    let mut made = vec![];
    for form in forms {
        let rows = lines(&(0..6).map(form).collect::<Vec<_>>());
        let models = ["--policy", &world.arg("pi"), "--ref", &world.arg("ref")];
        let run = |tool: &str, args: &[&str]| Tool::new(tool, args).stdin(rows.clone()).run().ok();
        let scored = run("dice-score", &models).rows();
        let next = world.arg(&format!("next-{}", made.len()));
        let trained = run(
            "dice-train",
            &[
                "--model",
                &world.arg("pi"),
                "--split",
                "train",
                "--output",
                &next,
            ],
        );
        let implicit = run("dice-eval", &[&["reward"], &models[..]].concat());
        let length = run("dice-eval", &["reward", "--score", "length"]);
        let rewards = ["reward_chosen", "reward_rejected"].map(|side| {
            scored
                .iter()
                .map(|row| number(row, side))
                .collect::<Vec<_>>()
        });
        made.push((rewards, trained.stdout, implicit.stdout, length.stdout));
    }
    assert!(made[0] == made[1] && made[1] == made[2], "{made:#?}");
}
