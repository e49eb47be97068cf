//! A folder with the inputs of every tool, the tools at work on them, and what they made.

use crate::{Family, Tiny, Tool, edit_json, lines, text};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

/// All tools.
pub const TOOLS: [&str; 5] = [
    "dice-gen",
    "dice-score",
    "dice-pairs",
    "dice-eval",
    "dice-train",
];
/// Those whose output is a file of rows.
pub const ROW_TOOLS: [&str; 4] = ["dice-gen", "dice-score", "dice-pairs", "dice-eval"];

/// A model large enough for its work to take a while.
const MODEL: Tiny = Tiny {
    hidden: 64,
    layers: 3,
    vocab: 264,
    context: 512,
    family: Family::Llama,
};

/// The models `pi` and `ref`, and the inputs of every tool.
pub struct World {
    pub folder: tempfile::TempDir,
}

impl Default for World {
    fn default() -> Self {
        Self::new()
    }
}

impl World {
    pub fn new() -> Self {
        let world = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        MODEL.write(&world.path("pi"), 1);
        MODEL.write(&world.path("ref"), 2);
        for (name, rows) in [
            ("prompts.jsonl", prompts()),
            ("samples.jsonl", samples()),
            ("scored.jsonl", scored()),
            ("pairs.jsonl", pairs()),
            ("a.jsonl", outputs("a")),
            ("b.jsonl", outputs("b")),
        ] {
            fs::write(world.path(name), lines(&rows)).unwrap();
        }
        world
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn arg(&self, name: &str) -> String {
        text(&self.path(name))
    }

    /// The file that a tool reads at its work.
    pub fn input(tool: &str) -> &'static str {
        match tool {
            "dice-gen" => "prompts.jsonl",
            "dice-score" => "samples.jsonl",
            "dice-pairs" => "scored.jsonl",
            "dice-eval" => "b.jsonl",
            _ => "pairs.jsonl",
        }
    }

    /// A tool at its work, which it writes to `output`.
    pub fn tool(&self, name: &str, output: &str) -> Tool {
        self.tool_on(name, Self::input(name), output)
    }

    /// The same with another input.
    pub fn tool_on(&self, name: &str, input: &str, output: &str) -> Tool {
        let [pi, reference, input] = ["pi", "ref", input].map(|name| self.arg(name));
        let args: Vec<&str> = match name {
            "dice-gen" => vec![
                "--model",
                &pi,
                "--k",
                "4",
                "--max-tokens",
                "24",
                "--batch-size",
                "16",
                &input,
            ],
            "dice-score" => vec!["--policy", &pi, "--ref", &reference, &input],
            "dice-pairs" => vec!["--min-samples", "2", &input],
            "dice-eval" => vec!["judge", "--policy", &pi, "--ref", &reference, "--b", &input],
            "dice-train" => return self.train_on(&input, output, 2),
            _ => unreachable!(),
        };
        let baseline = match name {
            "dice-eval" => vec!["--a".to_owned(), self.arg("a.jsonl")],
            _ => vec![],
        };
        Tool::new(name, args)
            .args(baseline)
            .args(["--output", &self.arg(output)])
    }

    /// dice-train at its work, with a checkpoint every so many steps.
    pub fn train(&self, output: &str, save_steps: u64) -> Tool {
        self.train_on(&self.arg("pairs.jsonl"), output, save_steps)
    }

    fn train_on(&self, input: &str, output: &str, save_steps: u64) -> Tool {
        let [pi, output, every] = [self.arg("pi"), self.arg(output), save_steps.to_string()];
        let args = [
            "--model",
            &pi,
            "--output",
            &output,
            "--save-steps",
            &every,
            input,
        ];
        let how = ["--batch-size", "2", "--learning-rate", "1e-3"];
        Tool::new("dice-train", args).args(how)
    }

    /// What a tool makes undisturbed, and how long that takes.
    pub fn undisturbed(&self, tool: &str) -> (Made, Duration) {
        let started = Instant::now();
        self.run(tool, "straight", &[]);
        (Made::read(self, "straight"), started.elapsed())
    }

    /// Runs a tool to its good end, its stdout to `OUTPUT.log`.
    #[track_caller]
    pub fn run(&self, tool: &str, output: &str, more: &[&str]) {
        self.tool(tool, output)
            .args(more)
            .stdout_to(self.path(&format!("{output}.log")))
            .run()
            .ok();
    }

    /// Nothing begun and not finished is left.
    #[track_caller]
    pub fn check_no_part_left(&self) {
        let names = fs::read_dir(self.folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name());
        let left: Vec<_> = names
            .filter(|name| name.to_str().unwrap().contains(".part"))
            .collect();
        assert!(left.is_empty(), "{left:?} is left");
    }

    /// Removes what a tool made.
    pub fn remove(&self, output: &str) {
        let path = self.path(output);
        match path.is_dir() {
            true => fs::remove_dir_all(path).unwrap(),
            false => fs::remove_file(path).unwrap(),
        }
    }
}

pub fn prompts() -> Vec<Value> {
    (0..150)
        .map(|i| json!({"prompt": format!("Say {i}")}))
        .collect()
}

pub fn samples() -> Vec<Value> {
    let sample = |i: usize| json!({"prompt": format!("Question {}", i / 4), "response": format!("Answer {i}. {}", "So be it. ".repeat(i % 5))});
    (0..1000).map(sample).collect()
}

fn scored() -> Vec<Value> {
    let sample = |i: usize| {
        let (prompt, sample) = (i / 4, i % 4);
        json!({"prompt": format!("Question {prompt}"), "response": "y".repeat(5 + (prompt * 7 + sample * 3) % 40) + &sample.to_string(),
            "reward": ((i * 31) % 17) as f64 / 8.0, "filler": "z".repeat(600)})
    };
    (0..20_000).map(sample).collect()
}

pub fn pairs() -> Vec<Value> {
    (0..60).map(|i| json!({"prompt": format!("Say {i}"), "chosen": format!("Yes, {i}."), "rejected": "No."})).collect()
}

fn outputs(of: &str) -> Vec<Value> {
    let row = |i: usize| json!({"prompt": format!("Question {i}"), "response": format!("{of} says {}", i * i), "generator": of});
    (0..600).map(row).collect()
}

/// What a run made: the bytes of its output (every file of a folder), and its stdout.
#[derive(PartialEq)]
pub struct Made {
    pub files: BTreeMap<String, Vec<u8>>,
    pub log: Vec<u8>,
}

impl Made {
    pub fn read(world: &World, output: &str) -> Self {
        Self {
            files: Self::files(&world.path(output)),
            log: fs::read(world.path(&format!("{output}.log"))).unwrap(),
        }
    }

    /// The output's files. Of a manifest, whose command names the output, what must be the same: tool, version and settings.
    pub fn files(path: &Path) -> BTreeMap<String, Vec<u8>> {
        let mut files = BTreeMap::new();
        if path.is_dir() {
            for entry in fs::read_dir(path).unwrap() {
                let entry = entry.unwrap();
                let name = entry.file_name().into_string().unwrap();
                files.insert(name, fs::read(entry.path()).unwrap());
            }
        } else {
            let manifest = text(path) + ".run.json";
            files.insert(String::new(), fs::read(path).unwrap());
            files.insert("run.json".into(), fs::read(manifest).unwrap());
        }
        let manifest = files.get_mut("run.json").expect("every output has one");
        let whole: Value = serde_json::from_slice(manifest).unwrap();
        let same = ["tool", "version", "settings"].map(|field| whole[field].clone());
        *manifest = Value::from_iter(same).to_string().into_bytes();
        files
    }

    #[track_caller]
    pub fn assert_same(&self, other: &Self) {
        let names = |made: &Self| made.files.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(self), names(other));
        for (name, bytes) in &self.files {
            assert!(*bytes == other.files[name], "the output differs: {name}");
        }
        assert!(self.log == other.log, "stdout differs");
    }
}

/// When to strike.
#[derive(Debug)]
pub enum Moment {
    /// So long after the start.
    Time(Duration),
    /// When a file has so many bytes.
    Bytes(PathBuf, u64),
}

impl Moment {
    /// Waits for it, or for the program's end.
    pub fn wait(&self, child: &mut Child) {
        let started = Instant::now();
        let come = || match self {
            Self::Time(after) => started.elapsed() >= *after,
            Self::Bytes(file, bytes) => file.metadata().is_ok_and(|meta| meta.len() >= *bytes),
        };
        while !come() && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}

/// Sends a signal to a program.
pub fn signal(child: &Child, name: &str) {
    let sent = Command::new("bash")
        .args(["-c", &format!("kill -{name} {}", child.id())])
        .status();
    assert!(sent.unwrap().success());
}

/// The newest whole checkpoint of an interrupted training, which opens as a model does.
pub fn newest_checkpoint(part: &Path) -> Option<u64> {
    let steps = |entry: fs::DirEntry| {
        entry
            .file_name()
            .to_str()?
            .strip_prefix("checkpoint-")?
            .parse()
            .ok()
    };
    let newest = fs::read_dir(part)
        .unwrap()
        .filter_map(|entry| steps(entry.unwrap()))
        .max()?;
    let bytes = fs::read(part.join(format!("checkpoint-{newest}/model.safetensors"))).unwrap();
    safetensors::SafeTensors::deserialize(&bytes).expect("a checkpoint under its name is whole");
    Some(newest)
}

/// Gives a checkpoint another chat template.
pub fn set_template(folder: &Path, template: &str) {
    edit_json(&folder.join("tokenizer_config.json"), |config| {
        config["chat_template"] = json!(template);
    });
}
