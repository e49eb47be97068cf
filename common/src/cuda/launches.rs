//! How kernels are called: their names in a format and a head size, and the sizes of their launches, as `common/cuda/kernels.h`
//! has them.

use super::device::{Plain, Precision};
use crate::kernels::layout::Heads;
use anyhow::{Result, ensure};

/// The head sizes that attention is compiled for; a size between two runs as the larger.
const HEAD_SIZES: [usize; 6] = [16, 32, 64, 96, 128, 256];

/// Threads of a block in kernels that work row by row.
pub(super) const THREADS: usize = 256;

/// Rows up to so wide are normed by a warp each (`NORM_NARROW` of `common/cuda/kernels.h`).
const NORM_NARROW: usize = 1024;

/// Rows that a block of `rms_norm` works on at a time.
pub(super) fn norm_rows(width: usize) -> usize {
    match width <= NORM_NARROW {
        true => THREADS / 32,
        false => 1,
    }
}

/// Lanes that kernels of the rotation give a head.
pub(super) fn head_lanes(dim: usize) -> usize {
    let each = if dim.is_multiple_of(8) { 8 } else { 2 };
    dim.div_ceil(each).next_power_of_two().min(32)
}

/// The kernels' names in a decoder's format and head size.
pub(super) struct Kernels {
    pub embed: String,
    pub rms_norm: String,
    pub add_bias: String,
    pub activation: String,
    pub qkv_rope: String,
    pub attention: String,
    pub decode_attention: String,
    pub decode_merge: String,
    /// What names of kernels end in.
    format: &'static str,
    /// The head size that attention is compiled for.
    pub head_size: usize,
}

impl Kernels {
    pub fn new(precision: Precision, head_dim: usize) -> Result<Self> {
        let head_size = HEAD_SIZES.into_iter().find(|&size| size >= head_dim);
        ensure!(
            head_size.is_some(),
            "heads of {head_dim} are more than the GPU's attention takes (256): use --device cpu"
        );
        let head_size = head_size.expect("checked");
        let format = precision.name();
        let name = |stem: &str| format!("{stem}_{format}");
        Ok(Self {
            embed: name("embed"),
            rms_norm: name("rms_norm"),
            add_bias: name("add_bias"),
            activation: name("activation"),
            qkv_rope: name("qkv_rope"),
            attention: format!("attention_{format}_{head_size}"),
            decode_attention: format!("decode_attention_{format}_{head_size}"),
            decode_merge: name("decode_merge"),
            format,
            head_size,
        })
    }

    /// A kernel that is made for the format.
    pub fn of_format(&self, stem: &str) -> String {
        format!("{stem}_{}", self.format)
    }

    /// A kernel that is made for the format and the head size.
    pub fn of_heads(&self, stem: &str) -> String {
        format!("{stem}_{}_{}", self.format, self.head_size)
    }
}

/// What attention kernels take into shared memory at once (`common/cuda/kernels.h`).
#[derive(Clone, Copy)]
pub struct AttentionTiles {
    /// Rows of a tile.
    pub rows: usize,
    /// Threads of a block.
    pub threads: usize,
    /// Bytes of a row.
    pub pitch: usize,
    /// Bytes for scores, in float32 only.
    pub extra: usize,
}

/// How products of queries and keys become scores, as kernels declare it.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(super) struct Scores {
    scale: f32,
    share: f32,
    unit: f32,
}

// SAFETY: three numbers of four bytes, no padding.
unsafe impl Plain for Scores {}

impl Scores {
    /// Those of a layer.
    pub fn of(heads: Heads) -> Self {
        Self {
            scale: heads.scale,
            share: heads.cap.map_or(0.0, |cap| heads.scale / cap),
            unit: heads.cap.unwrap_or(heads.scale) * std::f32::consts::LOG2_E,
        }
    }
}
