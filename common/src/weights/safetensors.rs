//! Float tensors of a Hugging Face folder: one safetensors file, or shards named by an index.

use super::config::Config;
use super::fp8::{E4M3, Scaling};
use super::layout::Place;
use super::mxfp4;
use super::quantised::Quantised;
use super::text_part::Names;
use crate::mapped::Mapped;
use anyhow::{Context, Result, bail, ensure};
use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::tensor::{Dtype, Metadata, SafeTensors};
use serde_json::Value;
use std::collections::HashMap;
use std::path::{Component, Path, PathBuf};

/// The file a folder's weights are in when they fit one.
pub(super) const SINGLE: &str = "model.safetensors";
/// The file that says which shard holds which tensor when they do not.
pub(super) const INDEX: &str = "model.safetensors.index.json";

/// Elements widened by one task.
const CHUNK: usize = 1 << 16;

/// The safetensors files of one checkpoint, mapped.
pub(super) struct Shards {
    files: Vec<File>,
    /// Tensor name to the file that the index names; empty for a single file.
    index: HashMap<String, usize>,
    names: Names,
    /// How weights may be quantised.
    quantised: Option<Quantised>,
}

/// One mapped safetensors file with its checked header.
struct File {
    mapped: Mapped,
    metadata: Metadata,
    /// Where the tensors' bytes begin.
    data: usize,
}

impl Shards {
    /// Opens `model.safetensors`, else the shards of `model.safetensors.index.json`. Tensors of a text part are found by the
    /// names that they have in a model of text alone.
    pub(super) fn open_folder(folder: &Path, quantised: Option<Quantised>) -> Result<Self> {
        let mut shards = Self::open_files(folder)?;
        shards.quantised = quantised;
        shards.names = Names::of(|name| shards.shape(name).is_some());
        Ok(shards)
    }

    fn open_files(folder: &Path) -> Result<Self> {
        let single = folder.join(SINGLE);
        if single.is_file() {
            return Self::open_file(&single);
        }
        let index = folder.join(INDEX);
        if index.is_file() {
            return Self::open_index(folder, &index);
        }
        let pickled = std::fs::read_dir(folder)
            .with_context(|| folder.display().to_string())?
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .find(|name| {
                [".bin", ".pt", ".pth"]
                    .iter()
                    .any(|end| name.ends_with(end))
            });
        match pickled {
            Some(name) => bail!(
                "{}: only pickled weights ({name}), which are never opened because they can run code; convert them with transformers: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)",
                folder.display()
            ),
            None => bail!(
                "{}: neither {SINGLE} nor {INDEX} is there",
                folder.display()
            ),
        }
    }

    /// Opens one file, checking that its header fits its length.
    pub(super) fn open_file(path: &Path) -> Result<Self> {
        Ok(Self {
            files: vec![File::open(path)?],
            index: HashMap::new(),
            names: Names::Plain,
            quantised: None,
        })
    }

    fn open_index(folder: &Path, path: &Path) -> Result<Self> {
        let (mut files, mut index) = (Vec::new(), HashMap::new());
        let mut opened: HashMap<String, usize> = HashMap::new();
        for (tensor, shard) in read_index(path)? {
            let file = match opened.get(&shard) {
                Some(&file) => file,
                None => {
                    files.push(File::open(&folder.join(&shard))?);
                    opened.insert(shard, files.len() - 1);
                    files.len() - 1
                }
            };
            index.insert(tensor, file);
        }
        Ok(Self {
            files,
            index,
            names: Names::Plain,
            quantised: None,
        })
    }

    /// Whether the tensors are named as those of a text part.
    pub(super) fn is_text_part(&self) -> bool {
        self.names != Names::Plain
    }

    /// Whether there is a tensor, which is called so in a model of text alone.
    pub(super) fn has(&self, name: &str) -> bool {
        self.shape(&self.names.stored(name)).is_some()
    }

    /// Where a tensor of the decoder's is.
    pub(super) fn place(&self, config: &Config, name: &str, shape: &[usize]) -> Place {
        let usual = config.place(name, shape);
        if self.has(&usual.name) {
            return usual;
        }
        let other = config.place_as_in_memory(name, shape);
        other.filter(|other| self.has(&other.name)).unwrap_or(usual)
    }

    fn file_of(&self, name: &str) -> Option<&File> {
        let file = match self.index.is_empty() {
            true => 0,
            false => *self.index.get(name)?,
        };
        Some(&self.files[file])
    }

    /// Every tensor's name, in no particular order.
    pub(super) fn names(&self) -> Vec<String> {
        match self.index.is_empty() {
            true => self.files[0].metadata.offset_keys(),
            false => self.index.keys().cloned().collect(),
        }
    }

    /// The shape of a tensor; None if there is none of that name.
    pub(super) fn shape(&self, name: &str) -> Option<&[usize]> {
        Some(&self.file_of(name)?.metadata.info(name)?.shape)
    }

    /// Fails unless the tensor is there with this shape and a float dtype that can be widened.
    pub(super) fn check(&self, place: &Place) -> Result<()> {
        if self.packed(place)?.is_some() {
            return Ok(());
        }
        match self.find(place)?.0 {
            Dtype::F8_E4M3 => self.scales(place).map(|_| ()),
            _ => Ok(()),
        }
    }

    /// Whether a head lies beside the embedding as another matrix, or in another format.
    pub(super) fn has_another_head(&self, shape: &[usize]) -> bool {
        let find = |name| self.find(&Place::whole(name, shape));
        match (find("lm_head.weight"), find("model.embed_tokens.weight")) {
            (Ok(head), Ok(embedding)) => head != embedding,
            _ => false,
        }
    }

    /// Fails where a head that should be the embedding is not: transformers would take that one.
    pub(super) fn check_tied(&self, shape: &[usize]) -> Result<()> {
        ensure!(
            !self.has_another_head(shape),
            "tie_word_embeddings says that the embedding is the LM head, but lm_head.weight is there and another matrix, or \
             in another format: set it to false"
        );
        Ok(())
    }

    /// The bytes of the rows of a tensor of floats, and of those that take turns with them.
    fn find(&self, place: &Place) -> Result<(Dtype, &[u8])> {
        let floats = [Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::F8_E4M3];
        self.find_in(&floats, place)
    }

    /// The same of a tensor in one of these formats.
    fn find_in(&self, formats: &[Dtype], place: &Place) -> Result<(Dtype, &[u8])> {
        let name = &*self.names.stored(&place.name);
        let file = self.file_of(name).with_context(|| {
            format!(
                "{}: names no file for the tensor {name:?}",
                self.files[0].mapped.path.with_file_name(INDEX).display()
            )
        })?;
        let path = file.mapped.path.display();
        let info = file
            .metadata
            .info(name)
            .with_context(|| format!("{path}: the tensor {name:?} is missing"))?;
        ensure!(
            info.shape == place.shape,
            "{path}: the tensor {name:?} has shape {:?}, but the config asks for {:?}",
            info.shape,
            place.shape
        );
        ensure!(
            formats.contains(&info.dtype),
            "{path}: the tensor {name:?} has dtype {:?}; known: {}",
            info.dtype,
            formats
                .iter()
                .map(|f| format!("{f:?}"))
                .collect::<Vec<_>>()
                .join(", ")
        );
        let (from, to) = info.data_offsets;
        let bytes = &file.mapped.bytes[file.data + from..file.data + to];
        Ok((info.dtype, place.bytes_of(bytes)))
    }

    /// The format and the bytes of the scales of a tensor in FP8, and how it shares them.
    fn scales(&self, place: &Place) -> Result<(Scaling, Dtype, &[u8])> {
        let at = || {
            let file = self.file_of(&self.names.stored(&place.name));
            let path = &file.unwrap_or(&self.files[0]).mapped.path;
            format!("{}: the tensor {:?}", path.display(), place.name)
        };
        let Some(Quantised::Fp8(scaling)) = self.quantised else {
            bail!(
                "{} is in FP8, but the config has no quantization_config that says so",
                at()
            );
        };
        let name = format!("{}_scale_inv", place.name);
        let mut shape = scaling.grid(&place.shape).with_context(at)?;
        if self.shape(&self.names.stored(&name)) == Some(&[1]) && shape.is_empty() {
            shape.push(1);
        }
        let scales = Place::whole(&name, &shape);
        let (dtype, bytes) = self.find(&scales)?;
        ensure!(
            dtype != Dtype::F8_E4M3,
            "{}: its scales are in FP8, too",
            at()
        );
        Ok((scaling, dtype, bytes))
    }

    /// The bytes and the scales of a tensor in MXFP4; None where it is not.
    fn packed(&self, place: &Place) -> Result<Option<[&[u8]; 2]>> {
        let has = |end: &str| self.has(&format!("{}{end}", place.name));
        if self.quantised != Some(Quantised::Mxfp4) || has("") || !has("_blocks") {
            return Ok(None);
        }
        let [blocks, scales] = mxfp4::places(place)?;
        let bytes = |place| anyhow::Ok(self.find_in(&[Dtype::U8], place)?.1);
        Ok(Some([bytes(&blocks)?, bytes(&scales)?]))
    }

    /// Reads a tensor, widened to float32.
    pub(super) fn read(&self, place: &Place) -> Result<Vec<f32>> {
        if let Some([bytes, scales]) = self.packed(place)? {
            return Ok(mxfp4::widen_place(place, bytes, scales));
        }
        let (dtype, bytes) = self.find(place)?;
        let mut values = vec![0.0; place.turns * place.len()];
        widen(dtype, bytes, &mut values);
        if dtype == Dtype::F8_E4M3 {
            let (scaling, dtype, bytes) = self.scales(place)?;
            let cols = place.shape[1];
            let mut scales = vec![0.0; scaling.grid(&place.shape)?.iter().product()];
            widen(dtype, bytes, &mut scales);
            scaling.apply(&scales, (place.rows.start, cols), &mut values);
        }
        Ok(place.taken(values))
    }

    /// Hands over a tensor widened to float32, part after part where it is as it is: a big one is never there as a whole.
    pub(super) fn read_parts(
        &self,
        place: &Place,
        take: &mut dyn FnMut(&[f32]) -> Result<()>,
    ) -> Result<()> {
        const PART: usize = 64 * CHUNK;
        if !place.is_as_it_is() || self.packed(place)?.is_some() {
            return take(&self.read(place)?);
        }
        let (dtype, bytes) = self.find(place)?;
        if dtype == Dtype::F8_E4M3 {
            return take(&self.read(place)?);
        }
        let size = bytes.len() / place.len().max(1);
        let mut values = vec![];
        for bytes in bytes.chunks((PART * size).max(1)) {
            values.resize(bytes.len() / size, 0.0);
            widen(dtype, bytes, &mut values);
            take(&values)?;
        }
        Ok(())
    }

    /// Whether a tensor is stored in a format of which all numbers are bfloat16's.
    pub(super) fn is_bfloat16(&self, place: &Place) -> Result<bool> {
        Ok(self.packed(place)?.is_some() || self.find(place)?.0 == Dtype::BF16)
    }

    /// The little-endian bytes of a tensor that is stored in this format as it is; None if it is in another.
    pub(super) fn bytes_in(&self, format: Dtype, place: &Place) -> Result<Option<&[u8]>> {
        if !place.is_as_it_is() || self.packed(place)?.is_some() {
            return Ok(None);
        }
        let (dtype, bytes) = self.find(place)?;
        Ok((dtype == format).then_some(bytes))
    }
}

impl File {
    fn open(path: &Path) -> Result<Self> {
        let mapped = Mapped::open(path)?;
        // The crate bounds the header and checks that every offset fits the file's length.
        let (header, metadata) = SafeTensors::read_metadata(&mapped.bytes).map_err(|error| {
            anyhow::anyhow!(
                "{}: not a whole safetensors file ({error}); fetch or write it again",
                path.display()
            )
        })?;
        Ok(Self {
            mapped,
            metadata,
            data: 8 + header,
        })
    }
}

/// Pairs of tensor and shard file name; the names must stay in the index's own folder.
pub(super) fn read_index(path: &Path) -> Result<Vec<(String, String)>> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let value: Value = serde_json::from_str(&text)
        .with_context(|| format!("{}: not valid JSON", path.display()))?;
    let map = value
        .get("weight_map")
        .and_then(Value::as_object)
        .filter(|map| !map.is_empty())
        .with_context(|| format!("{}: weight_map: missing or empty", path.display()))?;
    map.iter()
        .map(|(tensor, shard)| {
            let shard = shard.as_str().filter(|shard| is_plain_file_name(shard));
            let shard = shard.with_context(|| {
                format!(
                    "{}: weight_map: the file of {tensor:?} must be a plain .safetensors file name in the same folder",
                    path.display()
                )
            })?;
            Ok((tensor.clone(), shard.to_owned()))
        })
        .collect()
}

fn is_plain_file_name(name: &str) -> bool {
    let mut components = PathBuf::from(name)
        .components()
        .map(|c| matches!(c, Component::Normal(_)))
        .collect::<Vec<_>>();
    components.pop() == Some(true)
        && components.is_empty()
        && !name.contains(['/', '\\'])
        && name.ends_with(".safetensors")
}

/// Widens little-endian floats; `bytes` holds exactly `out.len()` of them, at any alignment.
fn widen(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    fn each<const N: usize>(bytes: &[u8], out: &mut [f32], read: impl Fn([u8; N]) -> f32 + Sync) {
        let (values, _) = bytes.as_chunks::<N>();
        out.par_chunks_mut(CHUNK)
            .zip(values.par_chunks(CHUNK))
            .for_each(|(out, values)| {
                for (out, value) in out.iter_mut().zip(values) {
                    *out = read(*value);
                }
            });
    }
    match dtype {
        Dtype::F16 => each(bytes, out, |b| f16::from_le_bytes(b).to_f32()),
        Dtype::F8_E4M3 => each(bytes, out, |[b]| E4M3[usize::from(b)]),
        Dtype::BF16 => each(bytes, out, |b| bf16::from_le_bytes(b).to_f32()),
        _ => each(bytes, out, f32::from_le_bytes),
    }
}
