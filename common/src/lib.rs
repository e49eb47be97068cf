//! The substance of DICE, in flow order: each module uses only those above it (a test below holds that).
//! (Blank lines keep rustfmt from sorting the list.)

// Floor 1: rows.

// whether the rows in a pipe are all there
pub mod pipe;

// how every tool starts and ends
pub mod program;

// what a tool says of its work: a bar, and a line at the end
pub mod progress;

// what a number in a flag may be
pub mod flags;

// files and folders that appear whole or not at all
pub mod files;

// what made an output and of what: its manifest; resumed only as what it was
pub mod run;

// prompts and their ids
pub mod records;

// rows in and out: line-numbered errors, whole-or-.part outputs, resume
pub mod jsonl;

// Floor 2: arithmetic, text and weights.

// how much memory batches may take
pub mod budget;

// huge pages for big buffers
#[cfg(feature = "model")]
pub mod memory;

// GEMM, norms, rotary, attention on the CPU
#[cfg(feature = "model")]
pub mod kernels;

// read-only maps of a model's files
#[cfg(feature = "model")]
pub mod mapped;

// the header of a GGUF file
#[cfg(feature = "model")]
pub mod gguf;

// chat templates, tokenisation of prompt and response
#[cfg(feature = "model")]
pub mod chat;

// config and tensors from a folder, the hub or GGUF; writing checkpoints
#[cfg(feature = "model")]
pub mod weights;

// Floor 3: the language model.

// the one decoder: forward and backward over packed, prefix-shared batches
#[cfg(feature = "model")]
pub mod model;

// log p(y|x)
#[cfg(feature = "model")]
pub mod logprob;

// sampling K responses of a prompt
#[cfg(feature = "model")]
pub mod generate;

// the model on a GPU: decoder, log-probs, sampling, training
#[cfg(feature = "model")]
pub mod cuda;

// weights, chat and decoder together; rows to token ids
#[cfg(feature = "model")]
pub mod policy;

// Floor 4: the method.

// implicit reward, length shaping, α*
pub mod reward;

// best against worst, replay
pub mod pairs;

// loss, optimiser, trainer
#[cfg(feature = "model")]
pub mod dpo;

// accuracy, lengths, distinctness
pub mod metrics;

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::{Path, PathBuf};

    fn sources(path: &Path) -> Vec<PathBuf> {
        if path.is_file() {
            return vec![path.to_owned()];
        }
        fs::read_dir(path)
            .into_iter()
            .flatten()
            .flat_map(|entry| sources(&entry.unwrap().path()))
            .collect()
    }

    /// What follows `crate::` in code, by itself or in a list, which may hold others.
    fn used_modules(code: &str) -> impl Iterator<Item = &str> {
        code.split("crate::").skip(1).flat_map(|after| {
            let mut depth = 0;
            let mut starts = vec![0];
            for (at, c) in after.char_indices() {
                match c {
                    '{' => depth += 1,
                    '}' => depth -= 1,
                    _ => {}
                }
                if depth == 1 && (c == '{' && at == 0 || c == ',') {
                    starts.push(at + 1);
                }
                if depth <= 0 {
                    break;
                }
            }
            let ends = |c: char| !c.is_alphanumeric() && c != '_';
            let named = move |at: usize| after[at..].trim_start().split(ends).next().unwrap();
            starts.into_iter().map(named)
        })
    }

    #[test]
    fn every_way_to_use_a_module_is_seen() {
        let code =
            "use crate::a;\nuse crate::{b, c::{D, E}, i};\nlet x = crate::f::g(crate::h, j);";
        let used: Vec<&str> = used_modules(code).collect();
        assert!(!used.contains(&"j") && !used.contains(&"E"));
        for module in ["a", "b", "c", "f", "h", "i"] {
            assert!(used.contains(&module), "{module} in {used:?}");
        }
    }

    #[test]
    fn modules_use_only_those_above_them() {
        let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let lib = fs::read_to_string(src.join("lib.rs")).unwrap();
        let order: Vec<&str> = lib
            .lines()
            .filter_map(|l| l.strip_prefix("pub mod "))
            .map(|l| l.trim_end_matches(';'))
            .collect();
        for (at, module) in order.iter().enumerate() {
            let files = [
                sources(&src.join(format!("{module}.rs"))),
                sources(&src.join(module)),
            ]
            .concat();
            assert!(!files.is_empty(), "{module} has no source");
            for file in files {
                // Tests may look down: they hold a module to what is built on it.
                let text = fs::read_to_string(&file).unwrap();
                let code = text.split("#[cfg(test)]\nmod ").next().unwrap();
                let below = &order[at + 1..];
                if let Some(used) = used_modules(code).find(|used| below.contains(used)) {
                    panic!("{} uses {used}, which is below {module}", file.display());
                }
            }
        }
    }
}
