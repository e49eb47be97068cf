//! From a MODEL argument to a config and float32 tensors by their Hugging Face names, and back to a folder.

mod adapter;
mod config;
mod config_json;
mod family;
mod fp8;
mod gguf;
mod gguf_config;
mod gguf_delta;
mod gguf_experts;
mod gguf_uneven;
mod hub;
mod layout;
mod mxfp4;
mod quantised;
mod rope;
mod safetensors;
mod save;
mod text_part;

pub use adapter::{LoraModule, save_adapter};
pub(crate) use config::{APART_NORMS, FACTORS, LAYER_SCALE, SELECTION, SINKS};
pub use config::{Config, Experts, Fused, Norms, QkNorm, Recurrence, Scores, Shared};
pub use family::families;
pub use rope::{QueryGrowth, Rope, RopeScaling};
pub use save::{Given, save, save_vectors};

use crate::run;
use ::safetensors::tensor::Dtype;
use adapter::Adapter;
use anyhow::{Context, Result, bail, ensure};
use gguf::Gguf;
use hub::{Hub, HubId};
use quantised::Quantised;
use rayon::prelude::*;
use safetensors::Shards;
use serde_json::{Value, json};
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// A file of a data set on the Hugging Face hub (`org/name`, main branch), by way of its cache.
///
/// # Errors
/// A file that is not in the cache and cannot be fetched; the line says why.
pub fn dataset_file(name: &str, file: &str) -> Result<PathBuf> {
    Hub::from_env().dataset_file(name, file)
}

/// A model's config and its tensors, mapped from disk and read one by one.
pub struct Weights {
    pub config: Config,
    path: PathBuf,
    /// `config.json` as it was (of the base, for an adapter; of the text part), or the token ids of a GGUF.
    original: Value,
    source: Source,
    fingerprint: OnceLock<String>,
}

enum Source {
    Safetensors(Shards),
    Gguf(Gguf),
    Adapted {
        base: Box<Weights>,
        adapter: Adapter,
    },
}

impl Weights {
    /// Opens MODEL: a Hugging Face folder, a PEFT adapter's folder (merged into its base as it is read), a
    /// `.gguf` file, or a hub id `org/name[@revision]`. The header of every file, and the presence, shape
    /// and dtype of every tensor of the config, are checked here; no tensor is read yet.
    pub fn open(model: &str) -> Result<Self> {
        let path = locate(model)?;
        match is_adapter(&path) {
            true => Self::open_adapter(&path),
            false => Self::open_plain(&path),
        }
    }

    fn open_plain(path: &Path) -> Result<Self> {
        match path.is_file() {
            true => Self::open_gguf(path),
            false => Self::open_folder(path),
        }
    }

    fn open_adapter(folder: &Path) -> Result<Self> {
        let path = folder.join(adapter::CONFIG);
        let settings = read_json(&path)?;
        let at = || format!("{}: base_model_name_or_path", path.display());
        let base = locate(&adapter::base_of(&settings, &path)?).with_context(at)?;
        ensure!(
            !is_adapter(&base),
            "{}: {} is an adapter itself, not a model",
            at(),
            base.display()
        );
        let base = Self::open_plain(&base).with_context(at)?;
        let adapter = Adapter::open(folder, &settings, &base)?;
        let has_tokenizer = folder.join("tokenizer.json").is_file();
        let (config, original) = (base.config.clone(), base.original.clone());
        let path = match has_tokenizer {
            true => folder.to_owned(),
            false => base.path.clone(),
        };
        let base = Box::new(base);
        let source = Source::Adapted { base, adapter };
        Ok(Self::new(config, &path, original, source))
    }

    fn open_folder(folder: &Path) -> Result<Self> {
        // transformers puts the adapter on the model, which may be the merged one.
        ensure!(
            !folder.join(adapter::WEIGHTS).is_file(),
            "{}: holds a model and an adapter ({}): which of them is meant? Move the other elsewhere",
            folder.display(),
            adapter::WEIGHTS
        );
        let path = folder.join("config.json");
        let mut original = text_part::config_of(read_json(&path)?);
        let mut config = Config::from_json(&original, &path)?;
        let quantised = Quantised::of(original.get("quantization_config"))?;
        let shards = Shards::open_folder(folder, quantised)?;
        let shape = [config.vocab, config.hidden];
        // Configs of a whole and its part do not agree on it, so the tensors say: a head that is not there is the embedding,
        // and one that is another is not, as transformers 5 has it.
        if shards.is_text_part() {
            let untied = shards.has_another_head(&shape);
            if untied || !shards.has("lm_head.weight") {
                original["tie_word_embeddings"] = json!(!untied);
                config = Config::from_json(&original, &path)?;
            }
        }
        for (name, shape) in config.parameters() {
            shards.check(&shards.place(&config, &name, &shape))?;
        }
        if config.tied {
            shards
                .check_tied(&shape)
                .with_context(|| path.display().to_string())?;
        }
        let source = Source::Safetensors(shards);
        Ok(Self::new(config, folder, original, source))
    }

    fn open_gguf(path: &Path) -> Result<Self> {
        let gguf = Gguf::open(path)?;
        let config = Config::from_gguf(&gguf)?;
        let original = gguf_config::token_ids(&gguf);
        let mut known = HashSet::new();
        for (name, shape) in config.parameters() {
            let place = gguf.place(&config, &name, &shape)?;
            gguf.check(&place)?;
            known.insert(place.name);
        }
        // Its config is partly read off its tensors, so one that has no place would be computed wrongly.
        let ahead = gguf_config::ahead(&gguf, config.layers);
        let is_known = |name: &str| {
            gguf_config::SCALINGS.contains(&name)
                || known.contains(name)
                || gguf_uneven::is_unheard(&config, name)
                || ahead.iter().any(|layer| name.starts_with(layer))
        };
        if let Some(name) = gguf.names().filter(|name| !is_known(name)).min() {
            bail!(
                "{}: the tensor {name:?} has no place in the architecture {:?}",
                path.display(),
                config.model_type
            )
        }
        Ok(Self::new(config, path, original, Source::Gguf(gguf)))
    }

    fn new(config: Config, path: &Path, original: Value, source: Source) -> Self {
        Self {
            config,
            path: path.to_owned(),
            original,
            source,
            fingerprint: OnceLock::new(),
        }
    }

    /// Reads a tensor by its Hugging Face name, widened or dequantised to float32, row-major.
    ///
    /// # Errors
    /// No such tensor, or another shape than `shape`.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let values = match &self.source {
            Source::Safetensors(shards) => {
                let mut values = shards.read(&shards.place(&self.config, name, shape))?;
                let short = self.config.stored_short_of(name);
                if short != 0.0 {
                    values.iter_mut().for_each(|v| *v += short);
                }
                values
            }
            Source::Adapted { base, adapter } => {
                let mut values = base.tensor(name, shape)?;
                adapter.merge(&self.config, name, shape, &mut values)?;
                return Ok(values);
            }
            Source::Gguf(gguf) => {
                let values = gguf.read(&gguf.place(&self.config, name, shape)?)?;
                gguf_delta::restored(&self.config, name, values)
            }
        };
        Ok(match self.order(name) {
            Some(order) => layout::in_order(&values, &order, layout::row_of(name, shape)),
            None => values,
        })
    }

    /// Hands over a tensor as [`Self::tensor`] reads it, part after part where that saves memory.
    ///
    /// # Errors
    /// As there, and what `take` fails with.
    pub fn tensor_parts(
        &self,
        name: &str,
        shape: &[usize],
        take: &mut dyn FnMut(&[f32]) -> Result<()>,
    ) -> Result<()> {
        match self.as_stored(name) {
            Some(shards) => shards.read_parts(&shards.place(&self.config, name, shape), take),
            None => take(&self.tensor(name, shape)?),
        }
    }

    /// The bytes of a tensor that is stored as the bfloat16 numbers it stands for; None where it has to be read.
    ///
    /// # Errors
    /// As [`Self::tensor`].
    pub fn bfloat16_bytes(&self, name: &str, shape: &[usize]) -> Result<Option<&[u8]>> {
        match self.as_stored(name) {
            Some(shards) => shards.bytes_in(Dtype::BF16, &shards.place(&self.config, name, shape)),
            None => Ok(None),
        }
    }

    /// Whether a tensor is stored in a format of which all numbers are bfloat16's, too.
    ///
    /// # Errors
    /// As [`Self::tensor`].
    pub fn is_bfloat16(&self, name: &str, shape: &[usize]) -> Result<bool> {
        if self.config.stored_short_of(name) != 0.0 {
            return Ok(false);
        }
        match &self.source {
            Source::Safetensors(shards) => {
                shards.is_bfloat16(&shards.place(&self.config, name, shape))
            }
            Source::Gguf(gguf) => gguf.is_bfloat16(&gguf.place(&self.config, name, shape)?),
            Source::Adapted { .. } => Ok(false),
        }
    }

    /// The shards, if a tensor is in them as it is.
    fn as_stored(&self, name: &str) -> Option<&Shards> {
        let same = self.config.stored_short_of(name) == 0.0 && self.order(name).is_none();
        match &self.source {
            Source::Safetensors(shards) if same => Some(shards),
            _ => None,
        }
    }

    /// For each row of a tensor's heads, where the file has it in the head; None where it is in its place. Some architectures
    /// of llama.cpp turn neighbouring rows.
    fn order(&self, name: &str) -> Option<Vec<usize>> {
        let permuted = || family::of(&self.config.model_type).is_some_and(|f| f.permuted);
        match &self.source {
            Source::Gguf(_) if layout::is_turned(name) && permuted() => {
                let head = self.config.head_dim;
                Some(layout::order_of_rows(head, head, true))
            }
            _ => self.config.order(name),
        }
    }

    /// Whether it is the text part of a model that reads images, too.
    fn is_text_part(&self) -> bool {
        match &self.source {
            Source::Safetensors(shards) => shards.is_text_part(),
            Source::Gguf(_) => false,
            Source::Adapted { base, .. } => base.is_text_part(),
        }
    }

    /// Why adapters that are saved by themselves cannot name it as what they belong to, where they cannot: what it is.
    pub fn no_base_for_adapters(&self) -> Option<&'static str> {
        match &self.source {
            Source::Adapted { .. } => {
                Some("an adapter itself, and other programs take no adapters of an adapter")
            }
            _ if self.is_text_part() => Some(
                "the text part of a model that reads images, in which other programs would not find the adapters",
            ),
            _ => None,
        }
    }

    /// The folder or `.gguf` file where the tokenizer is: that of the weights, or the base's for an adapter without one.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// 16 hex digits that stand for the model's function: BLAKE3 over the float32 values of every
    /// tensor in order and the parts of the config that the arithmetic uses. Paths, sharding, dates and
    /// the storage dtype do not count, so a GGUF, its conversion to a folder and that folder saved again in
    /// float32 share it. Reads every tensor on the first call; remembered after.
    pub fn fingerprint(&self) -> Result<&str> {
        if let Some(known) = self.fingerprint.get() {
            return Ok(known);
        }
        let mut hash = blake3::Hasher::new();
        hash.update(self.config.arithmetic().as_bytes());
        let mut bytes = vec![];
        for (name, shape) in self.config.parameters() {
            hash.update(format!("{name} {shape:?}\n").as_bytes());
            if let Some(shards) = self.as_stored(&name)
                && let Some(bytes) =
                    shards.bytes_in(Dtype::F32, &shards.place(&self.config, &name, &shape))?
            {
                hash.update_rayon(bytes);
                continue;
            }
            self.tensor_parts(&name, &shape, &mut |values| {
                little_endian(values, &mut bytes);
                hash.update_rayon(&bytes);
                Ok(())
            })?;
        }
        let digits = hash.finalize().to_hex()[..16].to_owned();
        run::has_opened(&self.path.display().to_string(), &digits);
        Ok(self.fingerprint.get_or_init(|| digits))
    }

    /// Fails unless both models have as many tokens: a policy and its reference must share their vocabulary.
    pub fn check_same_vocabulary(&self, other: &Self) -> Result<()> {
        ensure!(
            self.config.vocab == other.config.vocab,
            "{} has a vocabulary of {} tokens, {} one of {}: they must be the same for their log-probs to be comparable",
            self.path.display(),
            self.config.vocab,
            other.path.display(),
            other.config.vocab
        );
        Ok(())
    }

    /// Fails if the tokenizer has ids that the embedding has no row for. (Fewer are usual: embeddings are padded.)
    pub fn check_tokenizer(&self, tokens: usize) -> Result<()> {
        ensure!(
            tokens <= self.config.vocab,
            "{}: the tokenizer has {tokens} tokens, the weights only {}: they do not belong together",
            self.path.display(),
            self.config.vocab
        );
        Ok(())
    }
}

/// The same bytes on every machine.
fn little_endian(values: &[f32], bytes: &mut Vec<u8>) {
    const CHUNK: usize = 1 << 16;
    bytes.resize(size_of_val(values), 0);
    let (places, _) = bytes.as_chunks_mut();
    (places.par_chunks_mut(CHUNK).zip(values.par_chunks(CHUNK))).for_each(|(places, values)| {
        for (place, value) in places.iter_mut().zip(values) {
            *place = value.to_le_bytes();
        }
    });
}

/// A MODEL argument as a local path.
fn locate(model: &str) -> Result<PathBuf> {
    let path = Path::new(model);
    if path.exists() {
        return Ok(path.to_owned());
    }
    let id = HubId::parse(model).with_context(|| {
        format!(
            "{model}: no such folder or file (nor a hub id, which would be org/name or org/name@revision)"
        )
    })?;
    Hub::from_env().locate(&id)
}

/// Whether a folder is a PEFT adapter's rather than a model's.
fn is_adapter(path: &Path) -> bool {
    path.join(adapter::CONFIG).is_file() && !path.join("config.json").is_file()
}

fn read_json(path: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    serde_json::from_str(&text).with_context(|| format!("{}: not valid JSON", path.display()))
}

#[cfg(test)]
mod fixtures;
#[cfg(test)]
mod tests;
