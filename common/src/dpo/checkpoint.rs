//! Training checkpoints: a folder that transformers loads, with the optimiser's state and the trainer's beside it.
//!
//! While training to DIR, the newest whole checkpoint is `DIR.part/checkpoint-N`; it appears by a rename, and the one
//! before it goes only then. DIR itself, the result, has no optimiser's state: nobody goes on from there, and the next
//! round starts with fresh moments.

use super::trainer::{Kept, Progress, Settings, State, StepMetrics, Take, Train};
use crate::chat::Chat;
use crate::files::{part_path, publish, write_aside};
use crate::mapped::Mapped;
use crate::model::Params;
use crate::run::{IN_FOLDER, Manifest, settings};
use crate::weights::{Config, Weights, save_vectors};
use anyhow::{Context, Result, ensure};
use safetensors::tensor::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::fs;
use std::path::{Path, PathBuf};

/// What a run is: it may be resumed only as what it was. The settings of its manifest, and the head of
/// `trainer_state.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// Of the tool that trains.
    pub version: String,
    /// Fingerprint of the starting policy.
    pub model: String,
    /// Fingerprint of the reference.
    #[serde(rename = "ref")]
    pub reference: String,
    /// A hash of the encoded pairs in their order.
    pub pairs: String,
    /// Number format of the products.
    pub dtype: String,
    /// The day that the chat template writes into prompts, if it writes one.
    #[serde(default)]
    pub date: Option<String>,
    /// What the pairs were taken by, for how many epochs, and whether adapters are folded in: what the command says beside the
    /// trainer's settings.
    #[serde(default)]
    pub asked: Map<String, Value>,
    /// All settings.
    pub settings: Settings,
}

/// `trainer_state.json`; the names are transformers'.
#[derive(Serialize, Deserialize)]
struct Record {
    #[serde(flatten)]
    run: Run,
    #[serde(flatten)]
    progress: Progress,
    log_history: Vec<StepMetrics>,
}

const STATE: &str = "trainer_state.json";
const OPTIMIZER: &str = "optimizer.safetensors";

/// What a checkpoint is written with besides the trainer's numbers.
pub struct Writer<'a> {
    /// The result's folder.
    pub output: &'a Path,
    /// What the run is.
    pub run: &'a Run,
    /// The starting policy's weights.
    pub start: &'a Weights,
    /// Its tokenizer.
    pub chat: &'a Chat,
    /// What an adapter's config names as its base: MODEL as given.
    pub base: &'a str,
}

impl Writer<'_> {
    /// Writes `DIR.part/checkpoint-N` and removes the checkpoint before it.
    pub fn save(&self, trainer: &dyn Train, log: &[StepMetrics]) -> Result<()> {
        let folder = part_path(self.output);
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let path = folder.join(format!("checkpoint-{}", trainer.steps()));
        if !path.is_dir() {
            let adapters = trainer.settings().lora.is_some();
            write_aside(&path, |part| {
                self.write(part, trainer, log, adapters)?;
                write_optimizer(part, trainer, &self.start.config)
            })?;
        }
        for (step, older) in checkpoints(&folder) {
            if step < trainer.steps() {
                fs::remove_dir_all(&older)
                    .with_context(|| format!("cannot remove {}", older.display()))?;
            }
        }
        Ok(())
    }

    /// Makes DIR of the trainer's last state, with adapters folded into the weights if `merge`.
    pub fn finish(&self, trainer: &dyn Train, log: &[StepMetrics], merge: bool) -> Result<()> {
        let folder = part_path(self.output);
        let last = folder.join("last");
        if last.is_dir() {
            fs::remove_dir_all(&last)
                .with_context(|| format!("cannot remove {}", last.display()))?;
        }
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let adapters = trainer.settings().lora.is_some() && !merge;
        self.write(&last, trainer, log, adapters)?;
        publish(&last, self.output)?;
        fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))
    }

    fn write(
        &self,
        dir: &Path,
        trainer: &dyn Train,
        log: &[StepMetrics],
        adapters: bool,
    ) -> Result<()> {
        fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        if adapters {
            trainer.save_adapter(dir, self.base)?;
        } else {
            trainer.save_model(dir, self.start)?;
        }
        self.chat.save(dir)?;
        let state = Record {
            run: self.run.clone(),
            progress: trainer.progress(),
            log_history: log.to_vec(),
        };
        let file = dir.join(STATE);
        fs::write(&file, serde_json::to_vec_pretty(&state)?)
            .with_context(|| format!("cannot write {}", file.display()))?;
        Manifest::new(settings(self.run)).write(&dir.join(IN_FOLDER))
    }
}

/// What a training that goes on needs besides the model.
fn write_optimizer(dir: &Path, trainer: &dyn Train, config: &Config) -> Result<()> {
    let mut kept = vec![Kept::FirstMoment, Kept::SecondMoment];
    let mut exact = vec![];
    match trainer.settings().lora {
        Some(_) => kept.push(Kept::Trained),
        None => exact = rounded_weights(trainer, config)?, // the model's file has the others as they are
    }
    let flat = kept.iter().map(|kept| (kept.name(), trainer.trained()));
    let weights = (exact.iter()).map(|(name, values)| (name.as_str(), values.len()));
    let vectors: Vec<_> = flat.chain(weights).collect();
    save_vectors(&dir.join(OPTIMIZER), &vectors, |i, take| {
        match kept.get(i) {
            Some(&kept) => trainer.runs(kept, take),
            None => take(&exact[i - kept.len()].1),
        }
    })
}

/// The weights that the model's file has rounded, by their names: norms, so there are few numbers.
fn rounded_weights(trainer: &dyn Train, config: &Config) -> Result<Vec<(String, Vec<f32>)>> {
    let params = Params::new(config);
    let tensors = params.tensors().into_iter();
    let (places, mut found): (Vec<_>, Vec<_>) = tensors
        .filter(|(name, ..)| config.is_rounded(name))
        .map(|(name, _, place)| (place, (name.to_owned(), vec![])))
        .unzip();
    if found.is_empty() {
        return Ok(found);
    }
    let mut at = 0;
    trainer.runs(Kept::Trained, &mut |run| {
        for (place, (_, values)) in places.iter().zip(&mut found) {
            let part = place.start.max(at)..place.end.min(at + run.len());
            if !part.is_empty() {
                values.extend_from_slice(&run[part.start - at..part.end - at]);
            }
        }
        at += run.len();
        Ok(())
    })?;
    Ok(found)
}

/// Brings the trainer to the newest checkpoint of an interrupted run to `output`, if there is one; gives its log.
///
/// # Errors
/// The run was another one, or the checkpoint cannot be read.
pub fn resume(output: &Path, run: &Run, trainer: &mut dyn Train) -> Result<Vec<StepMetrics>> {
    let Some((_, path)) = checkpoints(&part_path(output)).into_iter().max() else {
        return Ok(vec![]);
    };
    if let Some(begun) = Manifest::read(&path.join(IN_FOLDER))? {
        begun.check_same(&settings(run), &path)?;
    }
    let state = state(&path)?;
    let saved = Saved::open(&path, trainer.settings().lora.is_none())?;
    trainer.restore(&saved, state.progress)?;
    Ok(state.log_history)
}

/// The log of a finished run to `output`; empty where it has none. Clears away what a kill in the last moment left.
///
/// # Errors
/// It is no checkpoint; the run had other settings than those known of ours, or other `inputs`; the log is there but cannot
/// be read, or the leftover cannot be removed.
pub fn finished(
    output: &Path,
    ours: &Map<String, Value>,
    inputs: &[&Path],
) -> Result<Vec<StepMetrics>> {
    let holds = |name: &str| output.join(name).is_file();
    ensure!(
        holds("config.json") || holds("adapter_config.json"),
        "{} is there, but it is no checkpoint: name another --output",
        output.display()
    );
    if let Some(made) = Manifest::read(&output.join(IN_FOLDER))? {
        made.check_same(ours, output)?;
        made.check_inputs(inputs, output)?;
    }
    let part = part_path(output);
    if part.is_dir() {
        fs::remove_dir_all(&part).with_context(|| format!("cannot remove {}", part.display()))?;
    }
    match output.join(STATE).is_file() {
        true => Ok(state(output)?.log_history),
        false => Ok(vec![]),
    }
}

/// What a checkpoint says of its run.
fn state(checkpoint: &Path) -> Result<Record> {
    let file = checkpoint.join(STATE);
    let text = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("{} is not a state", file.display()))
}

/// The numbers of a checkpoint.
struct Saved {
    optimizer: Mapped,
    /// All weights, where all were trained.
    weights: Option<Weights>,
}

impl Saved {
    fn open(path: &Path, all_trained: bool) -> Result<Self> {
        let weights = || Weights::open(path.to_str().context("the path is not UTF-8")?);
        Ok(Self {
            optimizer: Mapped::open(&path.join(OPTIMIZER))?,
            weights: all_trained.then(weights).transpose()?,
        })
    }
}

impl State for Saved {
    fn runs(&self, kept: Kept, take: &mut Take) -> Result<()> {
        let at = || self.optimizer.path.display().to_string();
        let tensors = SafeTensors::deserialize(&self.optimizer.bytes).with_context(at)?;
        let vector = |name: &str, take: &mut Take| {
            let tensor = tensors.tensor(name).with_context(at)?;
            ensure!(
                tensor.dtype() == Dtype::F32,
                "{}: {name} is not float32",
                at()
            );
            for run in tensor.data().chunks(RUN) {
                let floats = run.chunks_exact(4);
                let floats: Vec<f32> = floats
                    .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                    .collect();
                take(&floats)?;
            }
            Ok(())
        };
        let (Kept::Trained, Some(weights)) = (kept, &self.weights) else {
            return vector(kept.name(), take);
        };
        for (name, shape, _) in Params::new(&weights.config).tensors() {
            match tensors.tensor(name) {
                Ok(_) => vector(name, take)?,
                Err(_) => take(&weights.tensor(name, shape)?)?,
            }
        }
        Ok(())
    }
}

/// Bytes that are read at a time.
const RUN: usize = 16 << 20;

/// The whole checkpoints in a folder, with their steps.
fn checkpoints(folder: &Path) -> Vec<(u64, PathBuf)> {
    let step = |path: &Path| {
        path.file_name()?
            .to_str()?
            .strip_prefix("checkpoint-")?
            .parse()
            .ok()
    };
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| Some((step(&entry.path())?, entry.path())))
        .collect()
}
