//! GGUF files: the header (scalars and the tensor table), and tensors dequantised under their Hugging Face names.
//!
//! Format: ggml's `docs/gguf.md`. The header is read here rather than with candle's reader because that
//! one keeps every token string as a value and divides by an alignment of 0; the ggml blocks are candle's.

use super::mapped::Mapped;
use anyhow::{Context, Result, bail, ensure};
use candle_core::CpuStorage;
use candle_core::quantized::GgmlDType;
use rayon::prelude::*;
use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;

/// Elements dequantised by one task: a multiple of every block size.
const CHUNK: usize = 1 << 16;

/// A metadata value. Arrays (vocabularies, merges) are the tokenizer's business and skipped.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Scalar {
    Whole(i128),
    Real(f64),
    Flag(bool),
    Text(String),
}

/// A mapped GGUF file with its checked header.
pub(super) struct Gguf {
    mapped: Mapped,
    pub(super) metadata: HashMap<String, Scalar>,
    tensors: HashMap<String, Entry>,
}

/// Where a tensor lies, and as what.
struct Entry {
    dtype: GgmlDType,
    shape: Vec<usize>,
    /// Byte range in the file.
    bytes: std::ops::Range<usize>,
}

impl Gguf {
    /// Reads the header; every count and offset is checked against the file's length first.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let mapped = Mapped::open(path)?;
        let (metadata, tensors) = Header::read(&mapped.bytes).with_context(|| {
            format!(
                "{}: not a whole GGUF file; fetch or write it again",
                path.display()
            )
        })?;
        Ok(Self {
            mapped,
            metadata,
            tensors,
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.mapped.path
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Shape of a tensor by its GGUF name, row-major.
    pub(super) fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|entry| entry.shape.as_slice())
    }

    pub(super) fn check(&self, name: &str, shape: &[usize]) -> Result<()> {
        self.find(name, shape).map(|_| ())
    }

    fn find(&self, name: &str, shape: &[usize]) -> Result<&Entry> {
        let path = self.mapped.path.display();
        let entry = self
            .tensors
            .get(name)
            .with_context(|| format!("{path}: the tensor {name:?} is missing"))?;
        ensure!(
            entry.shape == shape,
            "{path}: the tensor {name:?} has shape {:?}, but the metadata asks for {shape:?}",
            entry.shape
        );
        Ok(entry)
    }

    /// Reads a tensor by its GGUF name, dequantised to float32.
    pub(super) fn read(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let entry = self.find(name, shape)?;
        let bytes = &self.mapped.bytes[entry.bytes.clone()];
        let (block, size) = (entry.dtype.block_size(), entry.dtype.type_size());
        let mut values = vec![0.0; shape.iter().product()];
        values
            .par_chunks_mut(CHUNK)
            .zip(bytes.par_chunks(CHUNK / block * size))
            .try_for_each(|(out, blocks)| {
                let storage = entry.dtype.from_data(Cow::Borrowed(blocks));
                match storage.dequantize(out.len())? {
                    CpuStorage::F32(floats) => out.copy_from_slice(&floats),
                    _ => bail!("dequantisation gave no float32"),
                }
                Ok(())
            })
            .with_context(|| format!("{}: the tensor {name:?}", self.mapped.path.display()))?;
        Ok(values)
    }
}

/// The GGUF name of a Hugging Face tensor name.
pub(super) fn gguf_name(name: &str) -> Option<String> {
    let whole = match name {
        "model.embed_tokens.weight" => Some("token_embd.weight"),
        "model.norm.weight" => Some("output_norm.weight"),
        "lm_head.weight" => Some("output.weight"),
        _ => None,
    };
    if let Some(whole) = whole {
        return Some(whole.to_owned());
    }
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (module, kind) = rest.rsplit_once('.')?;
    let module = match module {
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.o_proj" => "attn_output",
        "self_attn.q_norm" => "attn_q_norm",
        "self_attn.k_norm" => "attn_k_norm",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        "input_layernorm" => "attn_norm",
        "post_attention_layernorm" => "ffn_norm",
        _ => return None,
    };
    Some(format!("blk.{layer}.{module}.{kind}"))
}

/// Undoes llama.cpp's permutation of query and key rows for its interleaved rotation (arch `llama`):
/// row `2i + j` of a head becomes row `j·head_dim/2 + i`. `row` is the row's length (1 for a bias).
pub(super) fn unpermute(values: &[f32], head_dim: usize, row: usize) -> Vec<f32> {
    let mut restored = vec![0.0; values.len()];
    restored
        .par_chunks_mut(head_dim * row)
        .zip(values.par_chunks(head_dim * row))
        .for_each(|(to, from)| {
            for (r, to) in to.chunks_mut(row).enumerate() {
                let (j, i) = (r / (head_dim / 2), r % (head_dim / 2));
                to.copy_from_slice(&from[(2 * i + j) * row..][..row]);
            }
        });
    restored
}

/// A cursor over the header's bytes.
struct Header<'a> {
    bytes: &'a [u8],
    at: usize,
    /// Version 1 has 32-bit lengths.
    wide: bool,
}

impl<'a> Header<'a> {
    fn read(bytes: &'a [u8]) -> Result<(HashMap<String, Scalar>, HashMap<String, Entry>)> {
        let mut header = Self {
            bytes,
            at: 0,
            wide: true,
        };
        ensure!(
            header.take(4)? == b"GGUF",
            "it does not begin with the magic GGUF"
        );
        let version = header.u32()?;
        ensure!(
            (1..=3).contains(&version),
            "version {version} is not supported; known: 1 to 3, little-endian"
        );
        header.wide = version > 1;
        let (tensors, entries) = (header.length()?, header.length()?);
        // The smallest an entry can be bounds what the counts may claim.
        header.fits(tensors, 24, "tensors")?;
        header.fits(entries, 9, "metadata entries")?;
        let mut metadata = HashMap::new();
        for _ in 0..entries {
            let key = header.string()?;
            let kind = header.u32()?;
            if let Some(value) = header
                .value(kind, 0)
                .with_context(|| format!("metadata {key:?}"))?
            {
                metadata.insert(key, value);
            }
        }
        let table = (0..tensors)
            .map(|_| header.tensor())
            .collect::<Result<Vec<_>>>()?;
        let alignment = match metadata.get("general.alignment") {
            None => 32,
            Some(Scalar::Whole(n)) if *n > 0 && n % 8 == 0 && *n <= 1 << 20 => *n as usize,
            Some(other) => bail!("general.alignment: {other:?} is not a multiple of 8"),
        };
        let data = header.at.next_multiple_of(alignment);
        let tensors = table
            .into_iter()
            .map(|raw| raw.locate(data, alignment, bytes.len()))
            .collect::<Result<_>>()?;
        Ok((metadata, tensors))
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        let end = self
            .at
            .checked_add(count)
            .filter(|end| *end <= self.bytes.len());
        let end = end
            .with_context(|| format!("it ends at byte {}, inside the header", self.bytes.len()))?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn length(&mut self) -> Result<usize> {
        let length = match self.wide {
            true => u64::from_le_bytes(self.array()?),
            false => u64::from(self.u32()?),
        };
        usize::try_from(length).with_context(|| format!("it claims a length of {length}"))
    }

    /// Whether `count` items of at least `size` bytes can still follow.
    fn fits(&self, count: usize, size: usize, what: &str) -> Result<()> {
        let left = self.bytes.len() - self.at;
        ensure!(
            count.checked_mul(size).is_some_and(|bytes| bytes <= left),
            "it claims {count} {what}, more than its {left} remaining bytes can hold"
        );
        Ok(())
    }

    fn string(&mut self) -> Result<String> {
        let length = self.length()?;
        Ok(String::from_utf8_lossy(self.take(length)?).into_owned())
    }

    /// A value of the numbered type; None for an array, which is stepped over.
    fn value(&mut self, kind: u32, depth: usize) -> Result<Option<Scalar>> {
        Ok(Some(match kind {
            0 => Scalar::Whole(i128::from(self.array::<1>()?[0])),
            1 => Scalar::Whole(i128::from(i8::from_le_bytes(self.array()?))),
            2 => Scalar::Whole(i128::from(u16::from_le_bytes(self.array()?))),
            3 => Scalar::Whole(i128::from(i16::from_le_bytes(self.array()?))),
            4 => Scalar::Whole(i128::from(self.u32()?)),
            5 => Scalar::Whole(i128::from(i32::from_le_bytes(self.array()?))),
            6 => Scalar::Real(f64::from(f32::from_le_bytes(self.array()?))),
            7 => Scalar::Flag(self.array::<1>()?[0] != 0),
            8 => Scalar::Text(self.string()?),
            9 => {
                self.skip_array(depth)?;
                return Ok(None);
            }
            10 => Scalar::Whole(i128::from(u64::from_le_bytes(self.array()?))),
            11 => Scalar::Whole(i128::from(i64::from_le_bytes(self.array()?))),
            12 => Scalar::Real(f64::from_le_bytes(self.array()?)),
            _ => bail!("unknown value type {kind}"),
        }))
    }

    fn skip_array(&mut self, depth: usize) -> Result<()> {
        ensure!(depth < 8, "arrays nested too deep");
        let kind = self.u32()?;
        let count = self.length()?;
        let size = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            10..=12 => 8,
            8 | 9 => {
                self.fits(count, 4, "array elements")?;
                for _ in 0..count {
                    if kind == 8 {
                        let length = self.length()?;
                        self.take(length)?;
                    } else {
                        self.skip_array(depth + 1)?;
                    }
                }
                return Ok(());
            }
            _ => bail!("unknown value type {kind}"),
        };
        self.fits(count, size, "array elements")?;
        self.take(count * size).map(|_| ())
    }

    fn tensor(&mut self) -> Result<RawEntry> {
        let name = self.string()?;
        let rank = self.u32()?;
        ensure!(
            (1..=4).contains(&rank),
            "the tensor {name:?} claims {rank} dimensions"
        );
        let mut shape = (0..rank)
            .map(|_| self.length())
            .collect::<Result<Vec<_>>>()?;
        shape.reverse(); // GGUF counts dimensions from the innermost
        let kind = self.u32()?;
        let dtype = ggml_dtype(kind).with_context(|| {
            format!("the tensor {name:?} has ggml type {kind}, which is not supported; known: F32, F16, BF16, Q4_0 to Q8_1, Q2_K to Q8_K")
        })?;
        let offset = u64::from_le_bytes(self.array()?);
        Ok(RawEntry {
            name,
            shape,
            dtype,
            offset,
        })
    }
}

/// A row of the tensor table, before its place in the file is checked.
struct RawEntry {
    name: String,
    shape: Vec<usize>,
    dtype: GgmlDType,
    offset: u64,
}

impl RawEntry {
    fn locate(self, data: usize, alignment: usize, length: usize) -> Result<(String, Entry)> {
        let Self {
            name,
            shape,
            dtype,
            offset,
        } = self;
        let place = || {
            let elements = shape
                .iter()
                .try_fold(1usize, |product, &dim| product.checked_mul(dim))?;
            let size = (elements / dtype.block_size()).checked_mul(dtype.type_size())?;
            let start = data.checked_add(usize::try_from(offset).ok()?)?;
            let end = start.checked_add(size).filter(|end| *end <= length)?;
            Some(start..end)
        };
        let bytes = place().with_context(|| {
            format!("the tensor {name:?} {shape:?} reaches beyond the file's {length} bytes")
        })?;
        let row = *shape.last().expect("the rank is at least 1");
        ensure!(
            row.is_multiple_of(dtype.block_size()),
            "the tensor {name:?} has rows of {row}, not whole blocks of {}",
            dtype.block_size()
        );
        // Blocks are read in place, so their alignment (4 at most) must hold.
        ensure!(
            bytes.start.is_multiple_of(alignment),
            "the tensor {name:?} is not aligned to {alignment} bytes"
        );
        Ok((
            name,
            Entry {
                dtype,
                shape,
                bytes,
            },
        ))
    }
}

/// The numbers of `enum ggml_type` that candle has blocks for.
fn ggml_dtype(kind: u32) -> Option<GgmlDType> {
    Some(match kind {
        0 => GgmlDType::F32,
        1 => GgmlDType::F16,
        2 => GgmlDType::Q4_0,
        3 => GgmlDType::Q4_1,
        6 => GgmlDType::Q5_0,
        7 => GgmlDType::Q5_1,
        8 => GgmlDType::Q8_0,
        9 => GgmlDType::Q8_1,
        10 => GgmlDType::Q2K,
        11 => GgmlDType::Q3K,
        12 => GgmlDType::Q4K,
        13 => GgmlDType::Q5K,
        14 => GgmlDType::Q6K,
        15 => GgmlDType::Q8K,
        30 => GgmlDType::BF16,
        _ => return None,
    })
}
