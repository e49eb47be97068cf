//! Bad input: one clear line (file, line, field, what to do), exit code 1, and nothing lost that came before it.

use dice_tests::{Finished, Tiny, Tool, copy_folder, edit_json, lines, real_model, text};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};

struct World {
    folder: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let world = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        Tiny::default().write(&world.path("pi"), 1);
        Tiny::default().write(&world.path("ref"), 2);
        world
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn arg(&self, name: &str) -> String {
        text(&self.path(name))
    }

    /// A tool on a file, with the model `pi`.
    fn tool(&self, name: &str, input: &str) -> Tool {
        self.tool_with(name, "pi", input)
    }

    fn tool_with(&self, name: &str, model: &str, input: &str) -> Tool {
        let (model, reference) = (self.arg(model), self.arg("ref"));
        let args: Vec<&str> = match name {
            "dice-gen" => vec!["--model", &model, "--k", "2", "--max-tokens", "8"],
            "dice-score" => vec!["--policy", &model, "--ref", &reference],
            "dice-pairs" => vec!["--min-samples", "1"],
            "dice-train" => vec!["--model", &model, "--output", "unused"],
            _ => unreachable!(),
        };
        let mut args: Vec<String> = args.into_iter().map(str::to_owned).collect();
        if let Some(output) = args.iter_mut().find(|arg| *arg == "unused") {
            *output = self.arg("trained");
        }
        Tool::new(name, args).args([self.arg(input)])
    }

    /// A copy of the model `pi`, spoiled.
    fn spoiled(&self, name: &str, spoil: impl FnOnce(&Path)) -> String {
        copy_folder(&self.path("pi"), &self.path(name));
        spoil(&self.path(name));
        self.arg(name)
    }
}

const TOOLS: [&str; 4] = ["dice-gen", "dice-score", "dice-pairs", "dice-train"];

/// A row that every tool can work with, number `i`.
fn good(i: usize) -> Value {
    json!({"prompt": format!("Say {i}"), "response": format!("It is {i}."), "reward": i, "chosen": "Yes, well.", "rejected": "No."})
}

/// How many rows a tool has written for `n` good ones before a bad one. (Pairs and training need all input first.)
fn written(tool: &str, n: usize) -> usize {
    match tool {
        "dice-gen" => 2 * n,
        "dice-score" => n,
        _ => 0,
    }
}

#[track_caller]
fn check(run: &Finished, expected: &[&str]) {
    let line = run.error_line();
    for part in expected {
        assert!(line.contains(part), "{part:?} is not in: {line}");
    }
}

/// Two good rows, then a bad line.
fn check_line(world: &World, tool: &str, bad: &[u8], expected: &[&str]) {
    let input = [lines(&[good(1), good(2)]).as_bytes(), bad, b"\n"].concat();
    fs::write(world.path("rows.jsonl"), input).unwrap();
    let run = world.tool(tool, "rows.jsonl").run();
    let place = format!("{}:3: ", world.arg("rows.jsonl"));
    check(&run, &[&[place.as_str()], expected].concat());
    assert_eq!(
        run.rows_before_failure().len(),
        written(tool, 2),
        "{tool}: what came before is there"
    );
    if written(tool, 2) > 0 {
        let to_file = world
            .tool(tool, "rows.jsonl")
            .args(["--output", &world.arg("out")])
            .run();
        to_file.note("is kept: --resume");
        assert!(!world.path("out").exists());
        let kept = fs::read_to_string(world.path("out.part")).unwrap();
        assert_eq!(kept.lines().count(), written(tool, 2));
        // The line mended, the rest is done.
        let mended = lines(&[good(1), good(2), good(3)]);
        fs::write(world.path("rows.jsonl"), mended).unwrap();
        world
            .tool(tool, "rows.jsonl")
            .args(["--output", &world.arg("out"), "--resume"])
            .run()
            .ok();
        let whole = fs::read_to_string(world.path("out")).unwrap();
        assert!(whole.starts_with(&kept));
        assert_eq!(whole.lines().count(), written(tool, 3));
        fs::remove_file(world.path("out")).unwrap();
    }
    assert!(!world.path("trained").exists() && !world.path("trained.part").exists());
}

#[test]
fn lines_that_are_no_rows() {
    let world = World::new();
    for tool in TOOLS {
        check_line(&world, tool, b"{\"prompt\": \"x\"", &["not JSON", "column"]);
        check_line(&world, tool, b"Say something", &["not JSON"]);
        check_line(&world, tool, b"[1, 2]", &["not a JSON object"]);
        check_line(&world, tool, b"{\"prompt\": NaN}", &["not JSON"]);
        check_line(
            &world,
            tool,
            b"{\"prompt\": \"\xff\xfe\"}",
            &["not valid UTF-8 at byte 13"],
        );
    }
}

#[test]
fn missing_and_mistyped_fields() {
    let world = World::new();
    let with = |field: &str, value: Value| {
        let mut row = good(3);
        row[field] = value;
        row.to_string()
    };
    let without = |field: &str| {
        let mut row = good(3);
        let fields = row.as_object_mut().unwrap();
        fields.remove(field);
        if field == "response" {
            fields.remove("chosen"); // a pair would be scored
        }
        row.to_string()
    };
    for tool in TOOLS {
        let prompt = "field \"prompt\"";
        check_line(
            &world,
            tool,
            without("prompt").as_bytes(),
            &[prompt, "is missing"],
        );
        for wrong in [
            json!(7),
            json!(null),
            json!({"role": "user"}),
            json!(""),
            json!([]),
            json!([{"content": "x"}]),
            json!(["x"]),
        ] {
            check_line(&world, tool, with("prompt", wrong).as_bytes(), &[prompt]);
        }
        check_line(
            &world,
            tool,
            with("prompt", json!("")).as_bytes(),
            &[prompt, "empty"],
        );
        // Training does not ask for it.
        if tool == "dice-train" {
            continue;
        }
        check_line(
            &world,
            tool,
            with("id", json!([1])).as_bytes(),
            &["field \"id\"", "must be"],
        );
    }
    for (tool, field) in [
        ("dice-score", "response"),
        ("dice-pairs", "response"),
        ("dice-pairs", "reward"),
        ("dice-train", "chosen"),
        ("dice-train", "rejected"),
    ] {
        let named = format!("field \"{field}\"");
        check_line(
            &world,
            tool,
            without(field).as_bytes(),
            &[&named, "is missing"],
        );
        check_line(
            &world,
            tool,
            with(field, json!(["x"])).as_bytes(),
            &[&named, "must be"],
        );
    }
    for (tool, field, value, message) in [
        (
            "dice-score",
            "finish_reason",
            json!("abort"),
            "must be \"stop\" or \"length\"",
        ),
        (
            "dice-score",
            "token_ids",
            json!([1, -2]),
            "must be a list of token ids",
        ),
        (
            "dice-score",
            "token_ids",
            json!([5, 264]),
            "holds the token 264, but the model has 264 tokens",
        ),
        (
            "dice-pairs",
            "reward",
            json!("high"),
            "must be a finite number",
        ),
        ("dice-pairs", "finish_reason", json!(3), "must be"),
        (
            "dice-train",
            "chosen_token_ids",
            json!("1 2"),
            "must be a list of token ids",
        ),
        (
            "dice-train",
            "rejected_token_ids",
            json!([999]),
            "holds the token 999",
        ),
        (
            "dice-train",
            "rejected_finish_reason",
            json!("tool"),
            "must be \"stop\" or \"length\"",
        ),
    ] {
        let named = format!("field \"{field}\"");
        check_line(
            &world,
            tool,
            with(field, value).as_bytes(),
            &[&named, message],
        );
    }
}

#[test]
fn input_files_that_cannot_be_read() {
    let world = World::new();
    fs::write(world.path("rows.jsonl"), lines(&[good(1)])).unwrap();
    for tool in TOOLS {
        let run = world
            .tool(tool, "rows.jsonl")
            .args([world.arg("absent.jsonl")])
            .run();
        check(&run, &["absent.jsonl", "No such file"]);
        assert_eq!(
            run.rows_before_failure().len(),
            0,
            "names are looked at before any work"
        );
        check(
            &world.tool(tool, "pi").run(),
            &["pi is a folder, not a file of rows"],
        );
    }
    for tool in ["dice-gen", "dice-score", "dice-pairs"] {
        let run = world
            .tool(tool, "rows.jsonl")
            .args(["--output", &world.arg("absent/out.jsonl")])
            .run();
        check(&run, &["absent", "is not there"]);
    }
}

/// Every tool says of a bad model what is wrong with which file.
fn check_model(world: &World, model: &str, expected: &[&str]) {
    let row = json!({"prompt": "Say 1", "response": "It is 1."});
    fs::write(world.path("one.jsonl"), lines(&[row])).unwrap();
    fs::write(world.path("pair.jsonl"), lines(&[good(1)])).unwrap();
    for (tool, input) in [
        ("dice-gen", "one.jsonl"),
        ("dice-score", "one.jsonl"),
        ("dice-train", "pair.jsonl"),
    ] {
        let run = world.tool_with(tool, model, input).run();
        check(&run, expected);
        assert_eq!(run.rows_before_failure().len(), 0);
        assert!(!world.path("trained").exists() && !world.path("trained.part").exists());
    }
    let args = [
        "--policy",
        &world.arg("pi"),
        "--ref",
        &world.arg(model),
        &world.arg("one.jsonl"),
    ];
    let line = Tool::new("dice-score", args).run();
    check(
        &line,
        &[&[&*format!("--ref {}", world.arg(model))], expected].concat(),
    );
}

#[test]
fn models_that_are_none() {
    let world = World::new();
    check_model(&world, "absent", &["absent: no such folder or file"]);
    fs::create_dir(world.path("empty")).unwrap();
    check_model(&world, "empty", &["empty/config.json", "No such file"]);
    world.spoiled("strange", |dir| {
        edit_json(&dir.join("config.json"), |config| {
            config["model_type"] = json!("mamba");
            config["architectures"] = json!(["MambaForCausalLM"]);
        });
    });
    check_model(&world, "strange", &["strange/config.json", "amba", "llama"]);
    world.spoiled("torn-config", |dir| {
        fs::write(dir.join("config.json"), "{\"model_type\": ").unwrap()
    });
    check_model(
        &world,
        "torn-config",
        &["torn-config/config.json", "not valid JSON"],
    );
    world.spoiled("wordless", |dir| {
        fs::remove_file(dir.join("tokenizer.json")).unwrap()
    });
    check_model(&world, "wordless", &["wordless: no tokenizer.json"]);
    world.spoiled("weightless", |dir| {
        fs::remove_file(dir.join("model.safetensors")).unwrap()
    });
    check_model(&world, "weightless", &["weightless", "model.safetensors"]);
}

#[test]
fn a_hub_id_that_is_not_to_be_had() {
    let world = World::new();
    for (model, expected) in [
        (
            "some-org/some-model",
            "some-org/some-model@main: no such folder or file, not in the Hugging Face cache",
        ),
        ("../some/model", "../some/model: no such folder or file"),
        ("org/..@main", "org/..@main: no such folder or file"),
    ] {
        let run = Tool::new("dice-gen", ["--model", model])
            .env("HF_HUB_OFFLINE", "1")
            .env("HF_HOME", &world.arg("hub"))
            .run();
        check(&run, &[expected]);
    }
}

#[test]
fn a_full_disk_is_said() {
    let world = World::new();
    for tool in TOOLS {
        fs::write(world.path("rows.jsonl"), lines(&[good(1), good(2)])).unwrap();
        // Two samples of one prompt, to make a pair of.
        if tool == "dice-pairs" {
            let samples = [1, 2]
                .map(|i| json!({"prompt": "x", "response": format!("It is {i}."), "reward": i}));
            fs::write(world.path("rows.jsonl"), lines(&samples)).unwrap();
        }
        let run = world
            .tool(tool, "rows.jsonl")
            .stdout_to("/dev/full".into())
            .run();
        check(&run, &["cannot write to stdout", "No space left"]);
        assert!(!world.path("trained").exists());
    }
}

#[test]
fn truncated_weights() {
    let world = World::new();
    let whole = fs::read(world.path("pi/model.safetensors")).unwrap();
    for (i, kept) in [0, 5, 200, whole.len() / 2, whole.len() - 1]
        .into_iter()
        .enumerate()
    {
        let name = format!("cut-{i}");
        world.spoiled(&name, |dir| {
            fs::write(dir.join("model.safetensors"), &whole[..kept]).unwrap()
        });
        check_model(&world, &name, &[&format!("{name}/model.safetensors")]);
    }
    // A length that would be allocated if it were believed.
    let lie = [&u64::MAX.to_le_bytes(), &whole[8..]].concat();
    world.spoiled("lie", |dir| {
        fs::write(dir.join("model.safetensors"), lie).unwrap()
    });
    check_model(&world, "lie", &["lie/model.safetensors"]);
}

#[test]
fn truncated_gguf() {
    let Some(model) = real_model() else { return };
    let world = World::new();
    let whole = fs::read(model).unwrap();
    for (i, kept) in [0, 3, 20, 5_000, 1_000_000, whole.len() / 2, whole.len() - 1]
        .into_iter()
        .enumerate()
    {
        let name = format!("cut-{i}.gguf");
        fs::write(world.path(&name), &whole[..kept]).unwrap();
        check_model(&world, &name, &[&name]);
    }
}

#[test]
fn a_tokenizer_that_does_not_fit_the_weights() {
    let world = World::new();
    Tiny {
        vocab: 256,
        ..Tiny::default()
    }
    .write(&world.path("narrow"), 1);
    check_model(
        &world,
        "narrow",
        &[
            "narrow",
            "the tokenizer has 261 tokens, the weights only 256",
        ],
    );
}

/// As Gemma 3's of text alone has one for images: what is no text of a row needs no weights.
#[test]
fn tokens_added_behind_the_vocabulary_need_no_weights() {
    let world = World::new();
    let tiny = Tiny {
        vocab: 261,
        ..Tiny::default()
    };
    tiny.write(&world.path("narrow"), 1);
    edit_json(&world.path("narrow/tokenizer.json"), |tokenizer| {
        let added = |id: u32, special: bool| {
            json!({"id": id, "content": format!("<{id}>"), "special": special, "single_word": false,
                "lstrip": false, "rstrip": false, "normalized": false})
        };
        let tokens = tokenizer["added_tokens"].as_array_mut().unwrap();
        tokens.extend([added(261, true), added(262, false)]);
    });
    let score = |response: &str| {
        let row = json!({"prompt": "Why?", "response": response});
        let model = world.arg("narrow");
        let run = Tool::new("dice-score", ["--policy", &model, "--ref", &model]);
        run.stdin(lines(&[row])).run()
    };
    assert_eq!(score("So <261>.").ok().rows().len(), 1);
    let run = score("So <262>.");
    let line = run.error_line();
    let wanted = "field \"response\" holds the token 262, but the model has 261 tokens";
    assert!(line.contains(wanted), "{line}");
}

#[test]
fn two_checkpoints_with_different_vocabularies() {
    let world = World::new();
    Tiny {
        vocab: 272,
        ..Tiny::default()
    }
    .write(&world.path("wide"), 1);
    fs::write(world.path("rows.jsonl"), lines(&[good(1)])).unwrap();
    let expected = ["wide", "272", "264", "must be the same"];
    let wide = world.tool_with("dice-score", "wide", "rows.jsonl").run();
    check(&wide, &expected);
    let train = world
        .tool("dice-train", "rows.jsonl")
        .args(["--ref", &world.arg("wide")])
        .run();
    check(&train, &expected);
    assert!(!world.path("trained").exists());
}

/// As many tokens, but not the same; a template that was lost on the way. Neither need be wrong, so both are said.
#[test]
fn odd_tokenizers_are_said() {
    let world = World::new();
    let swapped = |dir: &Path| {
        let path = dir.join("tokenizer.json");
        let text = fs::read_to_string(&path).unwrap();
        let mut tokenizer: Value = serde_json::from_str(&text).unwrap();
        let vocab = &mut tokenizer["model"]["vocab"];
        (vocab["#"], vocab["$"]) = (vocab["$"].clone(), vocab["#"].clone());
        fs::write(path, tokenizer.to_string()).unwrap();
    };
    world.spoiled("swapped", swapped);
    fs::write(world.path("rows.jsonl"), lines(&[good(1)])).unwrap();
    let rows = world.arg("rows.jsonl");
    let said = |policy: &str, reference: &str| {
        let [policy, reference] = [policy, reference].map(|name| world.arg(name));
        let args = ["--policy", &policy, "--ref", &reference, &rows];
        Tool::new("dice-score", args).run().ok().stderr
    };
    let same = said("pi", "pi");
    assert!(
        !same.contains("different tokens") && !same.contains("chat template"),
        "{same}"
    );
    let apart = said("pi", "swapped");
    assert!(
        apart.contains("have different tokens, such as \"#\" and \"$\" for 5"),
        "{apart}"
    );
    world.spoiled("base", |dir| {
        let config = json!({"eos_token": "<|endoftext|>"});
        fs::write(dir.join("tokenizer_config.json"), config.to_string()).unwrap();
    });
    let base = said("base", "pi");
    assert!(base.contains("base: it has no chat template"), "{base}");
}

/// A template comes with a model and sees every prompt, so what it does wrong is said of the row.
#[test]
fn templates_that_fail_or_never_end() {
    let world = World::new();
    let looping = "{% for a in range(100000) %}{% for b in range(100000) %}{% for c in range(100000) %}{% endfor %}{% endfor %}{% endfor %}";
    let flooding = "{% for a in range(100000) %}{{ 'x' * 100000 }}{% endfor %}";
    let choosy = "{% if messages[0]['content'] == 'Say 3' %}{{ raise_exception('no threes\\nplease') }}{% endif %}{{ messages[0]['content'] }}";
    let set = |template: &str| {
        let template = template.to_owned();
        move |dir: &Path| {
            edit_json(&dir.join("tokenizer_config.json"), |config| {
                config["chat_template"] = json!(template)
            })
        }
    };
    for (name, template, expected) in [
        ("looping", looping, "does not end"),
        ("flooding", flooding, "the chat template"),
        (
            "failing",
            "{{ messages[0].content.nothing() }}",
            "the chat template fails",
        ),
        (
            "raising",
            "{{ raise_exception('only cats') }}",
            "refuses the prompt: only cats",
        ),
        ("silent", "", "has no token"),
    ] {
        world.spoiled(name, set(template));
        for (tool, input) in [
            ("dice-gen", "rows.jsonl"),
            ("dice-score", "rows.jsonl"),
            ("dice-train", "rows.jsonl"),
        ] {
            fs::write(world.path(input), lines(&[good(1)])).unwrap();
            let run = world.tool_with(tool, name, input).run();
            check(&run, &["rows.jsonl:1: field \"prompt\"", expected]);
        }
    }
    world.spoiled("broken", set("{% if %}"));
    check_model(
        &world,
        "broken",
        &["broken", "the chat template does not compile"],
    );

    world.spoiled("choosy", set(choosy));
    fs::write(
        world.path("rows.jsonl"),
        lines(&[good(1), good(2), good(3), good(4)]),
    )
    .unwrap();
    let run = world.tool_with("dice-gen", "choosy", "rows.jsonl").run();
    check(
        &run,
        &[
            "rows.jsonl:3: field \"prompt\"",
            "refuses the prompt: no threes please",
        ],
    );
    assert_eq!(run.rows_before_failure().len(), 4);
}

#[test]
fn settings_that_make_no_sense() {
    let world = World::new();
    fs::write(world.path("rows.jsonl"), lines(&[good(1)])).unwrap();
    let run = |tool: &str, flag: &str, value: &str| {
        let run = world
            .tool(tool, "rows.jsonl")
            .args([format!("{flag}={value}")])
            .run();
        assert!(!world.path("trained").exists() && !world.path("trained.part").exists());
        run
    };
    for (tool, flag, values) in [
        ("dice-gen", "--k", &["0", "-1"][..]),
        ("dice-gen", "--batch-size", &["0"]),
        ("dice-gen", "--max-tokens", &["0"]),
        ("dice-gen", "--temperature", &["-1", "nan", "inf", "1e-40"]),
        ("dice-gen", "--top-p", &["0", "1.1", "nan"]),
        ("dice-gen", "--min-p", &["2", "nan"]),
        ("dice-gen", "--repetition-penalty", &["0", "nan", "inf"]),
        ("dice-gen", "--stop", &[""]),
        ("dice-score", "--beta", &["0", "nan", "inf"]),
        ("dice-pairs", "--alpha", &["-1", "nan"]),
        ("dice-train", "--batch-size", &["0"]),
        ("dice-train", "--beta", &["0", "nan", "inf"]),
        ("dice-train", "--learning-rate", &["-1", "nan", "inf"]),
        ("dice-train", "--label-smoothing", &["0.7", "nan"]),
        ("dice-train", "--rpo-alpha", &["-1", "nan"]),
        ("dice-train", "--max-grad-norm", &["-1", "nan"]),
        ("dice-train", "--weight-decay", &["-1", "nan", "inf"]),
        ("dice-train", "--lora-rank", &["0"]),
        ("dice-train", "--lora-alpha", &["0", "nan"]),
    ] {
        for value in values {
            let run = run(tool, flag, value);
            assert_eq!(run.code, Some(2), "{tool} {flag}={value}: {}", run.stderr);
            run.note(flag);
        }
    }
    for (tool, flag, value) in [
        ("dice-score", "--device", "cuda:99"),
        ("dice-train", "--device", "cuda:99"),
        ("dice-train", "--optimizer", "adamw-bf16"),
    ] {
        let run = run(tool, flag, value);
        check(&run, &[flag]);
        assert_eq!(run.rows_before_failure().len(), 0);
    }
}
