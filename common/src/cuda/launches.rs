//! How kernels are called: their names in a format and a head size, and the sizes of their launches, as `common/cuda/kernels.h`
//! has them.

use super::device::{Arg, Launch, Plain, Precision, bytes_of};
use crate::kernels::activation::Curve;
use crate::kernels::layout::Heads;
use crate::kernels::norm;
use crate::weights::{Config, Fused};
use anyhow::{Result, ensure};

/// The head sizes that attention is compiled for; a size between two runs as the larger.
const HEAD_SIZES: [usize; 7] = [16, 32, 64, 96, 128, 256, 512];

/// The one for heads of `dim`.
fn head_size(dim: usize) -> Option<usize> {
    HEAD_SIZES.into_iter().find(|&size| size >= dim)
}

/// Fails for heads that attention is not compiled for.
///
/// # Errors
/// Heads that are too wide.
pub(super) fn check(config: &Config) -> Result<()> {
    let widest = config.widest_head();
    ensure!(
        head_size(widest).is_some(),
        "heads of {widest} are more than the GPU's attention takes (512): use --device cpu"
    );
    Ok(())
}

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

/// The kernels' names in a decoder's format.
pub(super) struct Kernels {
    pub embed: String,
    pub rms_norm: String,
    pub add_bias: String,
    pub activation: String,
    pub qkv_rope: String,
    pub decode_merge: String,
    /// What names of kernels end in.
    format: &'static str,
}

impl Kernels {
    pub fn new(precision: Precision) -> Self {
        let format = precision.name();
        let name = |stem: &str| format!("{stem}_{format}");
        Self {
            embed: name("embed"),
            rms_norm: name("rms_norm"),
            add_bias: name("add_bias"),
            activation: name("activation"),
            qkv_rope: name("qkv_rope"),
            decode_merge: name("decode_merge"),
            format,
        }
    }

    /// A kernel that is made for the format.
    pub fn of_format(&self, stem: &str) -> String {
        format!("{stem}_{}", self.format)
    }

    /// A kernel that is made for the format and for heads of some size.
    pub fn of_heads(&self, stem: &str, heads: Heads) -> String {
        let size = head_size(heads.dim).expect("checked");
        format!("{stem}_{}_{size}", self.format)
    }
}

/// Rows of a tile of attention, which a block has: a warp for 16 rows.
pub(super) fn tile_rows(precision: Precision) -> usize {
    match precision {
        Precision::Bf16 | Precision::F16 => 64,
        Precision::F32 => 32,
    }
}

/// Columns of a head's result that a block of attention makes, and of both gradients that a block of keys makes.
const RESULT_COLUMNS: usize = 256;
const GRADIENT_COLUMNS: usize = 128;

/// How attention over a layer's heads is launched.
pub(super) struct AttentionLaunches {
    heads: Heads,
    precision: Precision,
    /// Of a tile.
    rows: usize,
    /// Rows that a tile meets at a time, forward and backward.
    steps: [usize; 2],
}

impl AttentionLaunches {
    pub fn new(precision: Precision, heads: Heads) -> Self {
        let rows = tile_rows(precision);
        let steps = match (head_size(heads.dim), precision) {
            (Some(512), Precision::Bf16 | Precision::F16) => [64, 16],
            (Some(512), Precision::F32) => [16, 8],
            _ => [rows, rows],
        };
        Self {
            heads,
            precision,
            rows,
            steps,
        }
    }

    /// Over so many tiles.
    pub fn forward(&self, tiles: usize) -> Launch {
        self.plane(tiles, RESULT_COLUMNS)
            .shared(self.forward_shared())
    }

    /// The gradient of queries.
    pub fn to_queries(&self, tiles: usize) -> Launch {
        self.plane(tiles, RESULT_COLUMNS)
            .shared(self.backward_shared())
    }

    /// The gradients of keys and values.
    pub fn to_keys(&self, tiles: usize) -> Launch {
        let of_queries = 3 * self.steps[1] * size_of::<f32>();
        self.plane(tiles, GRADIENT_COLUMNS)
            .shared(self.backward_shared() + of_queries)
    }

    /// A token of each of some sequences: over so many tiles of prompts, and so many parts of sequences' own keys for each key
    /// head.
    pub fn decode(&self, tiles: usize, parts: usize) -> Launch {
        let warps = parts * self.heads.kv * self.heads.group().div_ceil(16);
        let blocks = tiles * self.heads.kv + warps.div_ceil(self.rows / 16);
        let columns = self.heads.dim.div_ceil(RESULT_COLUMNS);
        Launch::row(columns * blocks, 2 * self.rows).shared(self.forward_shared())
    }

    fn plane(&self, tiles: usize, columns: usize) -> Launch {
        Launch::plane(self.heads.query, tiles, 2 * self.rows).deep(self.heads.dim.div_ceil(columns))
    }

    /// A tile of queries and, of the rows that it meets, keys and those columns of values that become results.
    fn forward_shared(&self) -> usize {
        let met = self.steps[0];
        let columns = self.head_size().min(RESULT_COLUMNS);
        (self.rows + met) * self.pitch(self.head_size())
            + met * self.pitch(columns)
            + self.scores(met)
    }

    /// Queries and their result's gradient, keys and values, one pair of them a tile.
    fn backward_shared(&self) -> usize {
        let met = self.steps[1];
        2 * (self.rows + met) * self.pitch(self.head_size()) + self.scores(met)
    }

    fn head_size(&self) -> usize {
        head_size(self.heads.dim).expect("checked")
    }

    /// Bytes from row to row.
    fn pitch(&self, columns: usize) -> usize {
        columns * bytes_of(self.precision) + 16
    }

    /// Bytes for scores, in float32 only.
    fn scores(&self, met: usize) -> usize {
        match self.precision {
            Precision::Bf16 | Precision::F16 => 0,
            Precision::F32 => self.rows * (met + 4) * size_of::<f32>(),
        }
    }
}

/// What a row of the fused projection has after its queries, and whether values are normed, as kernels number it (`Values`).
pub(super) fn values_of(fused: Fused, normed: bool) -> i32 {
    match (fused, normed) {
        (Fused::All | Fused::Gated, false) => 0,
        (Fused::All | Fused::Gated, true) => 1,
        (Fused::QueriesAndKeys, _) => 2,
        (Fused::Queries, _) => 3,
    }
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

// SAFETY: four numbers of four bytes, no padding.
unsafe impl Plain for Curve {}

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

/// [`norm::Kind`] as kernels declare it.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct NormKind {
    eps: f32,
    centred: i32,
}

// SAFETY: two numbers of four bytes, no padding.
unsafe impl Plain for NormKind {}

/// How rows of a residual stream are normed.
pub(super) fn norm_kind(kind: norm::Kind) -> Arg {
    Arg::plain(NormKind {
        eps: kind.eps,
        centred: kind.centred.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_widest_heads_fit_a_block_of_an_a100() {
        for precision in [Precision::F32, Precision::Bf16, Precision::F16] {
            let launches = AttentionLaunches::new(precision, Heads::new(2, 1, 512));
            for launch in [
                launches.forward(1),
                launches.to_queries(1),
                launches.to_keys(1),
                launches.decode(1, 1),
            ] {
                assert!(launch.shared <= 163 << 10, "{precision:?}: {launch:?}");
            }
        }
    }
}
