//! Checkpoints in the layout that transformers and vLLM load: `config.json` and float32 safetensors.

use super::safetensors::{INDEX, SINGLE};
use super::{Config, Weights};
use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};
use std::borrow::Cow;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

/// Bytes of tensors in one file, transformers' `max_shard_size` of 5 GB.
const SHARD: usize = 5_000_000_000;

/// A tensor's Hugging Face name and its shape.
pub(super) type Named = (String, Vec<usize>);
/// A tensor, or why it is not there.
pub type Given<'a> = Result<(String, Vec<usize>, Cow<'a, [f32]>)>;

/// Writes `config.json` (with the fields that `original` had besides ours) and the weights into the folder `dir`, which exists.
/// `tensors` must come in the order of [`Config::parameters`] and is drained one by one, so memory
/// holds one tensor at a time. Syncing the folder and making it appear whole is the caller's business.
///
/// # Errors
/// A tensor out of order, of another shape, missing or too many; the disk's own.
pub fn save<'a>(
    dir: &Path,
    config: &Config,
    original: Option<&Weights>,
    tensors: impl Iterator<Item = Given<'a>>,
) -> Result<()> {
    save_sharded(dir, config, original, tensors, SHARD)
}

pub(super) fn save_sharded<'a>(
    dir: &Path,
    config: &Config,
    original: Option<&Weights>,
    tensors: impl Iterator<Item = Given<'a>>,
    limit: usize,
) -> Result<()> {
    let mut tensors = config.stored(tensors).map(|given| {
        let (name, shape, mut values) = given?;
        let short = config.stored_short_of(&name);
        if short != 0.0 {
            values.to_mut().iter_mut().for_each(|v| *v -= short);
        }
        Ok((name, shape, values))
    });
    let json = config.to_json(original.map(|weights| &weights.original));
    write_json(&dir.join("config.json"), &json)?;
    let shards = shards(config.stored_parameters(), limit);
    let mut map = Map::new();
    for (number, shard) in shards.iter().enumerate() {
        let file = match shards.len() {
            1 => SINGLE.to_owned(),
            count => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
        };
        for (name, _) in shard {
            map.insert(name.clone(), json!(file));
        }
        write_safetensors(&dir.join(file), shard, &mut tensors)?;
    }
    ensure!(
        tensors.next().is_none(),
        "more tensors were given than the config has"
    );
    if shards.len() > 1 {
        let total: usize = shards.iter().flatten().map(|(_, shape)| bytes(shape)).sum();
        let index = json!({"metadata": {"total_size": total}, "weight_map": map});
        write_json(&dir.join(INDEX), &index)?;
    }
    Ok(())
}

fn bytes(shape: &[usize]) -> usize {
    4 * shape.iter().product::<usize>()
}

/// Fills each file up to `limit` bytes before the next begins.
fn shards(parameters: Vec<Named>, limit: usize) -> Vec<Vec<Named>> {
    let mut shards = vec![Vec::new()];
    let mut filled = 0;
    for (name, shape) in parameters {
        let size = bytes(&shape);
        if filled > 0 && filled + size > limit {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += size;
        shards
            .last_mut()
            .expect("there is always one")
            .push((name, shape));
    }
    shards
}

/// Writes one safetensors file: the header first, as every size is known, then the tensors as they come.
pub(super) fn write_safetensors<'a>(
    path: &Path,
    layout: &[Named],
    tensors: &mut impl Iterator<Item = Given<'a>>,
) -> Result<()> {
    let format = json!({"format": "pt"});
    let mut file = Writer::create(path, layout, Some(format))?;
    for (name, shape) in layout {
        let (given, given_shape, values) = tensors
            .next()
            .with_context(|| format!("the tensor {name:?} was not given"))??;
        ensure!(
            given == *name
                && given_shape == *shape
                && values.len() == shape.iter().product::<usize>(),
            "the tensor {given:?} {given_shape:?} was given where {name:?} {shape:?} belongs"
        );
        file.write(&values)?;
    }
    file.finish()
}

/// Writes vectors, given by their names and lengths, into one safetensors file: `each` is asked for vector after vector
/// by number, and hands over the runs that it is made of, so that none need exist as a whole.
///
/// # Errors
/// Those of `each`; a vector of another length; the disk's own.
pub fn save_vectors(
    path: &Path,
    vectors: &[(&str, usize)],
    mut each: impl FnMut(usize, &mut dyn FnMut(&[f32]) -> Result<()>) -> Result<()>,
) -> Result<()> {
    let layout: Vec<Named> = (vectors.iter())
        .map(|&(name, len)| (name.to_owned(), vec![len]))
        .collect();
    let mut file = Writer::create(path, &layout, None)?;
    for (i, &(name, len)) in vectors.iter().enumerate() {
        let mut written = 0;
        each(i, &mut |run| {
            written += run.len();
            file.write(run)
        })?;
        ensure!(
            written == len,
            "{written} numbers were given where {name:?} has {len}"
        );
    }
    file.finish()
}

/// A safetensors file on its way.
struct Writer {
    file: BufWriter<File>,
    path: PathBuf,
}

impl Writer {
    fn create(path: &Path, layout: &[Named], metadata: Option<Value>) -> Result<Self> {
        let mut writer = Self {
            file: BufWriter::with_capacity(
                1 << 20,
                File::create(path).with_context(|| path.display().to_string())?,
            ),
            path: path.to_owned(),
        };
        writer.bytes(&header(layout, metadata))?;
        Ok(writer)
    }

    fn write(&mut self, values: &[f32]) -> Result<()> {
        for values in values.chunks(1 << 16) {
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            self.bytes(&bytes)?;
        }
        Ok(())
    }

    fn bytes(&mut self, bytes: &[u8]) -> Result<()> {
        let written = self.file.write_all(bytes);
        written.with_context(|| self.path.display().to_string())
    }

    fn finish(mut self) -> Result<()> {
        let written = self.file.flush();
        written.with_context(|| self.path.display().to_string())
    }
}

/// Length, JSON, and spaces up to a multiple of 8, so that the tensors are aligned.
fn header(layout: &[Named], metadata: Option<Value>) -> Vec<u8> {
    let mut fields = Map::new();
    fields.extend(metadata.map(|m| ("__metadata__".to_owned(), m)));
    let mut offset = 0;
    for (name, shape) in layout {
        let end = offset + bytes(shape);
        let entry = json!({"dtype": "F32", "shape": shape, "data_offsets": [offset, end]});
        fields.insert(name.clone(), entry);
        offset = end;
    }
    let mut json = Value::Object(fields).to_string().into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.extend(json);
    header
}

pub(super) fn write_json(path: &Path, value: &Value) -> Result<()> {
    std::fs::write(path, format!("{value:#}\n")).with_context(|| path.display().to_string())
}
