//! What a run is: its manifest, `FILE.run.json` beside a file and `run.json` in a folder, which says what made the output
//! and of what; and that an interrupted run is gone on with only as what it was.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::files::{is_stream, write_aside};
use crate::program;

/// Where an output came from. `b3sum` of an input gives its `blake3`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    pub tool: String,
    pub version: String,
    /// The program's arguments, itself included.
    pub command: Vec<String>,
    /// The fingerprint of each model, by the name that it was given.
    pub models: BTreeMap<String, String>,
    /// What was read to its end, in that order.
    pub inputs: Vec<Input>,
    /// What the output depends on besides the inputs; the same for every part of an interrupted run.
    pub settings: Map<String, Value>,
}

/// A file, or stdin, as it was read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Input {
    pub file: String,
    pub bytes: u64,
    pub lines: u64,
    pub blake3: String,
}

/// What this process has read and opened so far.
static READ: Mutex<(Vec<Input>, BTreeMap<String, String>)> =
    Mutex::new((Vec::new(), BTreeMap::new()));

/// Notes an input that was read to its end.
pub fn has_read(input: Input) {
    let mut read = READ.lock().unwrap_or_else(|e| e.into_inner());
    if !read.0.contains(&input) {
        read.0.push(input);
    }
}

/// Notes a model's fingerprint.
pub fn has_opened(model: &str, fingerprint: &str) {
    let mut read = READ.lock().unwrap_or_else(|e| e.into_inner());
    read.1.insert(model.to_owned(), fingerprint.to_owned());
}

impl Manifest {
    /// That of this process, with all that it has read so far.
    pub fn new(settings: Map<String, Value>) -> Self {
        let (inputs, models) = READ.lock().unwrap_or_else(|e| e.into_inner()).clone();
        let command = std::env::args_os();
        Self {
            tool: program::name().to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            command: command.map(|a| a.to_string_lossy().into_owned()).collect(),
            models,
            inputs,
            settings,
        }
    }

    /// Reads the manifest at a path; none where there is none.
    pub fn read(path: &Path) -> Result<Option<Self>> {
        if !path.is_file() {
            return Ok(None);
        }
        let text =
            std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        let found = serde_json::from_slice(&text);
        found
            .map(Some)
            .with_context(|| format!("{} is not a manifest", path.display()))
    }

    /// Writes it; an older one is replaced.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)? + "\n";
        write_aside(path, |part| {
            std::fs::write(part, text).with_context(|| format!("cannot write {}", part.display()))
        })
    }

    /// Fails where `files`, in the order in which they are read, are not what was read for the work at `place`. What is no
    /// file, such as stdin, is not looked at.
    pub fn check_inputs(&self, files: &[&Path], place: &Path) -> Result<()> {
        let mut read = self.inputs.iter();
        let mut seen = vec![];
        for path in files.iter().filter(|path| path.is_file()) {
            let file = File::open(path);
            let hash =
                file.and_then(|file| Ok(blake3::Hasher::new().update_reader(file)?.finalize()));
            let hash = hash.with_context(|| format!("cannot read {}", path.display()))?;
            // What was read twice was noted once.
            if seen.contains(&(path, hash)) {
                continue;
            }
            ensure!(
                read.any(|input| input.blake3 == hash.to_string()),
                "{}: it was made of other files than {} as it is now, or of these in another order: remove it, or name another --output",
                place.display(),
                path.display()
            );
            seen.push((path, hash));
        }
        Ok(())
    }

    /// Fails where one of our `settings` differs from what it was in this run, whose work is at `place`; the error names
    /// each that does. Settings that are not known yet (a model's fingerprint before it is opened) may be left out.
    pub fn check_same(&self, settings: &Map<String, Value>, place: &Path) -> Result<()> {
        let mut different = vec![];
        let version = env!("CARGO_PKG_VERSION");
        if self.version != version {
            different.push(format!("version: {:?}, now {version:?}", self.version));
        }
        compare("", &self.settings, settings, &mut different);
        ensure!(
            different.is_empty(),
            "{}: the run that made it was another one ({}): run the same command, or remove what it left",
            place.display(),
            different.join(", ")
        );
        Ok(())
    }
}

/// Writes a file in one piece, with the manifest of this process beside it; an older one is replaced. A device or a named
/// pipe gets none; no file, or `-`, is stdout.
pub fn write_whole(file: Option<&Path>, content: &[u8]) -> Result<()> {
    let Some(file) = file.filter(|file| *file != Path::new("-")) else {
        let mut stdout = std::io::stdout().lock();
        let written = stdout.write_all(content).and_then(|()| stdout.flush());
        return written.context("cannot write to stdout");
    };
    if !is_stream(file) {
        Manifest::new(Map::new()).write(&beside(file))?;
    }
    write_aside(file, |part| {
        std::fs::write(part, content).with_context(|| format!("cannot write {}", part.display()))
    })
}

/// Where the manifest of a file lies.
pub fn beside(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(".run.json");
    name.into()
}

/// The manifest's name in a folder.
pub const IN_FOLDER: &str = "run.json";

/// An object of settings, from `json!({…})` or anything that serialises to an object.
///
/// # Panics
/// On what is no object.
pub fn settings(of: impl Serialize) -> Map<String, Value> {
    match serde_json::to_value(of) {
        Ok(Value::Object(fields)) => fields,
        other => panic!("settings are an object, not {other:?}"),
    }
}

/// Collects the settings of ours that differ, as `name: begun, now ours`.
fn compare(
    outer: &str,
    begun: &Map<String, Value>,
    ours: &Map<String, Value>,
    out: &mut Vec<String>,
) {
    for (key, value) in ours {
        let was = begun.get(key).unwrap_or(&Value::Null);
        let name = match outer {
            "" => key.clone(),
            _ => format!("{outer}.{key}"),
        };
        match (was.as_object(), value.as_object()) {
            (Some(was), Some(value)) => compare(&name, was, value, out),
            _ if was != value => out.push(format!("{name}: {was}, now {value}")),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn every_difference_is_named() {
        let of = |value| Manifest::new(settings(value));
        let begun = of(json!({"model": "a", "settings": {"seed": 0, "k": 4}, "more": true}));
        let check = |now: Value| begun.check_same(&settings(now), Path::new("x.part"));
        assert!(
            check(json!({"model": "a", "settings": {"seed": 0, "k": 4}, "more": true})).is_ok()
        );
        // What is not known yet is not compared.
        assert!(check(json!({"settings": {"k": 4}})).is_ok());
        let now = json!({"model": "b", "settings": {"seed": 0, "k": 5}, "new": 1});
        assert_eq!(
            check(now).unwrap_err().to_string(),
            "x.part: the run that made it was another one (model: \"a\", now \"b\", settings.k: 4, now 5, \
             new: null, now 1): run the same command, or remove what it left"
        );
        let older = Manifest {
            version: "0.0.1".into(),
            ..begun.clone()
        };
        let refused = older.check_same(&Map::new(), Path::new("x")).unwrap_err();
        assert!(refused.to_string().contains("version: \"0.0.1\", now "));
    }

    #[test]
    fn inputs_are_the_files_that_were_read_in_their_order() {
        let folder = tempfile::tempdir().unwrap();
        let [a, b] = ["a", "b"].map(|name| folder.path().join(name));
        let of = |text: &str| Input {
            file: String::new(),
            bytes: 1,
            lines: 1,
            blake3: blake3::hash(text.as_bytes()).to_string(),
        };
        let made = Manifest {
            inputs: vec![of("stdin"), of("a"), of("b")],
            ..Manifest::new(Map::new())
        };
        std::fs::write(&a, "a").unwrap();
        std::fs::write(&b, "b").unwrap();
        let check = |files: &[&Path]| made.check_inputs(files, Path::new("out"));
        let stdin = Path::new("-");
        assert!(check(&[stdin, &a, &b, &a]).is_ok() && check(&[&b]).is_ok());
        assert!(check(&[&b, &a]).is_err());
        std::fs::write(&b, "c").unwrap();
        let line = check(&[&a, &b]).unwrap_err().to_string();
        assert!(
            line.starts_with("out: it was made of other files"),
            "{line}"
        );
    }

    #[test]
    fn a_manifest_says_what_was_read_and_comes_back_from_its_file() {
        let input = Input {
            file: "a manifest's input".into(),
            bytes: 3,
            lines: 1,
            blake3: "00".into(),
        };
        has_read(input.clone());
        has_read(input.clone());
        has_opened("a manifest's model", "0123");
        let manifest = Manifest::new(settings(json!({"seed": 1})));
        assert_eq!(manifest.inputs.iter().filter(|i| **i == input).count(), 1);
        assert_eq!(manifest.models["a manifest's model"], "0123");
        assert!(!manifest.command.is_empty());

        let folder = tempfile::tempdir().unwrap();
        let path = beside(&folder.path().join("out.jsonl"));
        assert!(path.ends_with("out.jsonl.run.json"));
        assert_eq!(Manifest::read(&path).unwrap(), None);
        manifest.write(&path).unwrap();
        assert_eq!(Manifest::read(&path).unwrap(), Some(manifest));
        std::fs::write(&path, "{}").unwrap();
        let torn = Manifest::read(&path).unwrap_err().to_string();
        assert!(torn.ends_with("is not a manifest"), "{torn}");
    }
}
