//! The header of a GGUF file: metadata and the tensor table, every count and offset checked against the file's length.
//!
//! Format: ggml's `docs/gguf.md`. candle has a reader too, but that one allocates what a length claims before it has
//! read it, divides by an alignment of 0, and takes arrays of any depth.

use crate::mapped::Mapped;
use anyhow::{Context, Result, bail, ensure};
use candle_core::quantized::GgmlDType;
use std::collections::HashMap;

/// A metadata value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Whole(i128),
    Real(f64),
    Flag(bool),
    Text(String),
    Texts(Vec<String>),
    Wholes(Vec<i128>),
    Reals(Vec<f64>),
}

/// Whether arrays (vocabularies, merges) are read or stepped over; those of numbers for each layer are always read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrays {
    Read,
    Skip,
}

/// Where a tensor lies, and as what.
pub struct Entry {
    pub blocks: Blocks,
    /// Row-major.
    pub shape: Vec<usize>,
    /// Byte range in the file.
    pub bytes: std::ops::Range<usize>,
}

/// What blocks a tensor's rows are of.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Blocks {
    /// Some that candle has, too.
    Candles(GgmlDType),
    /// 32 numbers of four bits and their scale.
    Mxfp4,
}

impl Blocks {
    /// The numbers of a block.
    pub fn numbers(self) -> usize {
        match self {
            Self::Candles(dtype) => dtype.block_size(),
            Self::Mxfp4 => 32,
        }
    }

    /// The bytes of a block.
    pub fn bytes(self) -> usize {
        match self {
            Self::Candles(dtype) => dtype.type_size(),
            Self::Mxfp4 => 17,
        }
    }

    /// Those of a number of `enum ggml_type`.
    fn of(kind: u32) -> Option<Self> {
        match kind {
            39 => Some(Self::Mxfp4),
            _ => ggml_dtype(kind).map(Self::Candles),
        }
    }
}

/// What a file says before its tensors.
pub struct Header {
    pub metadata: HashMap<String, Value>,
    pub tensors: HashMap<String, Entry>,
}

impl Header {
    /// Reads the header of a file.
    ///
    /// # Errors
    /// Anything that does not fit the format or the file's length, in one line that names the file.
    pub fn of_file(file: &Mapped, arrays: Arrays) -> Result<Self> {
        let mut cursor = Cursor {
            bytes: &file.bytes,
            at: 0,
            wide: true,
            arrays,
        };
        cursor.header().with_context(|| {
            format!(
                "{}: not a whole GGUF file; fetch or write it again",
                file.path.display()
            )
        })
    }
}

/// A place in the header's bytes.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
    /// Version 1 has 32-bit lengths.
    wide: bool,
    arrays: Arrays,
}

impl<'a> Cursor<'a> {
    fn header(&mut self) -> Result<Header> {
        ensure!(
            self.take(4)? == b"GGUF",
            "it does not begin with the magic GGUF"
        );
        let version = self.u32()?;
        ensure!(
            (1..=3).contains(&version),
            "version {version} is not supported; known: 1 to 3, little-endian"
        );
        self.wide = version > 1;
        let (tensors, entries) = (self.length()?, self.length()?);
        // The smallest an entry can be bounds what the counts may claim.
        self.fits(tensors, 24, "tensors")?;
        self.fits(entries, 9, "metadata entries")?;
        let mut metadata = HashMap::new();
        for _ in 0..entries {
            let key = self.string()?;
            let kind = self.u32()?;
            if let Some(value) = self
                .value(kind)
                .with_context(|| format!("metadata {key:?}"))?
            {
                metadata.insert(key, value);
            }
        }
        let table = (0..tensors)
            .map(|_| self.tensor())
            .collect::<Result<Vec<_>>>()?;
        let alignment = match metadata.get("general.alignment") {
            None => 32,
            Some(Value::Whole(n)) if *n > 0 && n % 8 == 0 && *n <= 1 << 20 => *n as usize,
            Some(other) => bail!("general.alignment: {other:?} is not a multiple of 8"),
        };
        let data = self.at.next_multiple_of(alignment);
        let tensors = table
            .into_iter()
            .map(|raw| raw.locate(data, alignment, self.bytes.len()))
            .collect::<Result<_>>()?;
        Ok(Header { metadata, tensors })
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

    /// A value of the numbered type; None for an array that is stepped over.
    fn value(&mut self, kind: u32) -> Result<Option<Value>> {
        Ok(Some(match kind {
            6 | 12 => Value::Real(self.real(kind)?),
            FLAG => Value::Flag(self.whole(kind)? != 0),
            8 => Value::Text(self.string()?),
            9 => return self.values(),
            _ => Value::Whole(self.whole(kind)?),
        }))
    }

    fn whole(&mut self, kind: u32) -> Result<i128> {
        Ok(match kind {
            0 | FLAG => i128::from(self.array::<1>()?[0]),
            1 => i128::from(i8::from_le_bytes(self.array()?)),
            2 => i128::from(u16::from_le_bytes(self.array()?)),
            3 => i128::from(i16::from_le_bytes(self.array()?)),
            4 => i128::from(self.u32()?),
            5 => i128::from(i32::from_le_bytes(self.array()?)),
            10 => i128::from(u64::from_le_bytes(self.array()?)),
            11 => i128::from(i64::from_le_bytes(self.array()?)),
            _ => bail!("unknown value type {kind}"),
        })
    }

    fn real(&mut self, kind: u32) -> Result<f64> {
        Ok(match kind {
            6 => f64::from(f32::from_le_bytes(self.array()?)),
            _ => f64::from_le_bytes(self.array()?),
        })
    }

    /// An array. One of arrays is always stepped over: nothing has a use for it.
    fn values(&mut self) -> Result<Option<Value>> {
        let (kind, count) = (self.u32()?, self.length()?);
        let of_layers = kind != 8 && count <= MOST_LAYERS;
        if (self.arrays == Arrays::Skip && !of_layers) || kind == 9 {
            return self.skip(kind, count, 0).map(|()| None);
        }
        self.fits(count, smallest(kind)?, "array elements")?;
        let count = 0..count;
        Ok(Some(match kind {
            8 => Value::Texts(count.map(|_| self.string()).collect::<Result<_>>()?),
            6 | 12 => Value::Reals(count.map(|_| self.real(kind)).collect::<Result<_>>()?),
            _ => Value::Wholes(count.map(|_| self.whole(kind)).collect::<Result<_>>()?),
        }))
    }

    fn skip(&mut self, kind: u32, count: usize, depth: usize) -> Result<()> {
        ensure!(depth < 8, "arrays nested too deep");
        let size = smallest(kind)?;
        self.fits(count, size, "array elements")?;
        match kind {
            8 => (0..count).try_for_each(|_| {
                let length = self.length()?;
                self.take(length).map(|_| ())
            }),
            9 => (0..count).try_for_each(|_| {
                let (kind, count) = (self.u32()?, self.length()?);
                self.skip(kind, count, depth + 1)
            }),
            _ => self.take(count * size).map(|_| ()),
        }
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
        let blocks = Blocks::of(kind).with_context(|| {
            format!("the tensor {name:?} has ggml type {kind}, which is not supported; known: F32, F16, BF16, Q4_0 to Q8_1, Q2_K to Q8_K, MXFP4")
        })?;
        let offset = u64::from_le_bytes(self.array()?);
        Ok(RawEntry {
            name,
            shape,
            blocks,
            offset,
        })
    }
}

/// The number of the type of truth values.
const FLAG: u32 = 7;

/// The most layers of a model: an array with a number for each is no longer.
pub const MOST_LAYERS: usize = 4096;

/// The fewest bytes that a value of a type takes.
fn smallest(kind: u32) -> Result<usize> {
    Ok(match kind {
        0 | 1 | FLAG => 1,
        2 | 3 => 2,
        4..=6 | 8 | 9 => 4,
        10..=12 => 8,
        _ => bail!("unknown value type {kind}"),
    })
}

/// A row of the tensor table, before its place in the file is checked.
struct RawEntry {
    name: String,
    shape: Vec<usize>,
    blocks: Blocks,
    offset: u64,
}

impl RawEntry {
    fn locate(self, data: usize, alignment: usize, length: usize) -> Result<(String, Entry)> {
        let Self {
            name,
            shape,
            blocks,
            offset,
        } = self;
        let place = || {
            let elements = shape
                .iter()
                .try_fold(1usize, |product, &dim| product.checked_mul(dim))?;
            let size = (elements / blocks.numbers()).checked_mul(blocks.bytes())?;
            let start = data.checked_add(usize::try_from(offset).ok()?)?;
            let end = start.checked_add(size).filter(|end| *end <= length)?;
            Some(start..end)
        };
        let bytes = place().with_context(|| {
            format!("the tensor {name:?} {shape:?} reaches beyond the file's {length} bytes")
        })?;
        let row = *shape.last().expect("the rank is at least 1");
        ensure!(
            row.is_multiple_of(blocks.numbers()),
            "the tensor {name:?} has rows of {row}, not whole blocks of {}",
            blocks.numbers()
        );
        // Blocks are read in place, so their alignment (4 at most) must hold.
        ensure!(
            bytes.start.is_multiple_of(alignment),
            "the tensor {name:?} is not aligned to {alignment} bytes"
        );
        Ok((
            name,
            Entry {
                blocks,
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
