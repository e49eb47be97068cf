//! The LM head of a step: logits, and of each few hundred of them the sums that a draw needs, made while they are near.

use crate::kernels::gemm::{Left, Mat, PackedLeft, Threads, Write, multiply};
use crate::kernels::{cap, fit, softmax, team};
use crate::model::Decoder;

/// Words of a tile, which a core makes and sums up alone.
const TILE: usize = 2048;

/// Words of a chunk; chunks do not cross tiles.
pub(super) const CHUNK: usize = 512;

/// Logits of some rows.
#[derive(Default)]
pub(super) struct Logits {
    rows: usize,
    vocab: usize,
    /// `[tile][row][word]`
    values: Vec<f32>,
    /// `[tile][row][chunk]`
    chunks: Vec<Chunk>,
    normed: Vec<f32>,
    left: PackedLeft,
}

/// What a draw needs to know of a run of logits.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Chunk {
    /// The largest.
    pub max: f32,
    /// Σ exp(l − max).
    pub sum: f32,
    /// Σ exp((l − max)·scale), with the scale of the draw.
    pub scaled: f32,
}

impl Chunk {
    /// Of these logits.
    pub fn of(logits: &[f32], scale: f32) -> Self {
        let max = softmax::max(logits);
        if max == f32::NEG_INFINITY {
            let sum = if logits.iter().any(|l| l.is_nan()) {
                f32::NAN
            } else {
                0.0
            };
            return Self {
                max,
                sum,
                scaled: sum,
            };
        }
        let sum = softmax::sum_exp(logits, max, 1.0);
        let scaled = match scale {
            1.0 => sum,
            _ => softmax::sum_exp(logits, max, scale),
        };
        Self { max, sum, scaled }
    }
}

impl Logits {
    /// Makes the logits of rows of the residual stream, `x` `[rows, hidden]`, for draws with this scale.
    pub fn set(&mut self, decoder: &Decoder, x: &[f32], scale: f32) {
        let (width, vocab) = (decoder.config.hidden, decoder.config.vocab);
        let rows = x.len() / width;
        (self.rows, self.vocab) = (rows, vocab);
        decoder.final_norm(x, &mut self.normed);
        let normed = Left::Rows(Mat::new(&self.normed, rows, width));
        self.left.set(normed, decoder.precision, Threads::All);
        fit(&mut self.values, rows * vocab);
        self.chunks
            .resize(rows * vocab.div_ceil(CHUNK), Chunk::default());
        let (left, head) = (&self.left, decoder.head());
        let tiles =
            (self.values.chunks_mut(rows * TILE)).zip(self.chunks.chunks_mut(rows * TILE / CHUNK));
        team::items(tiles.collect(), |i, (values, chunks)| {
            let n = values.len() / rows;
            let panels = head.panel_range(i * TILE, n);
            multiply(left, panels, values, n, Write::Set, Threads::One);
            cap::bound(values, decoder.config.logit_cap);
            for (row, chunks) in
                (values.chunks_exact(n)).zip(chunks.chunks_exact_mut(n.div_ceil(CHUNK)))
            {
                for (part, chunk) in row.chunks(CHUNK).zip(chunks) {
                    *chunk = Chunk::of(part, scale);
                }
            }
        });
    }

    /// One row that is there already.
    #[cfg(test)]
    pub fn of_row(values: &[f32], scale: f32) -> Self {
        Self {
            rows: 1,
            vocab: values.len(),
            values: values.to_vec(),
            chunks: values
                .chunks(CHUNK)
                .map(|part| Chunk::of(part, scale))
                .collect(),
            ..Self::default()
        }
    }

    /// The logits of one row.
    pub fn row(&self, row: usize) -> Row<'_> {
        Row { logits: self, row }
    }
}

/// One row's logits.
#[derive(Clone, Copy)]
pub(super) struct Row<'a> {
    logits: &'a Logits,
    row: usize,
}

impl<'a> Row<'a> {
    /// The tiles, in order.
    fn tiles(self) -> impl Iterator<Item = (&'a [f32], &'a [Chunk])> {
        let Logits {
            rows,
            values,
            chunks,
            ..
        } = self.logits;
        let tiles = values
            .chunks(rows * TILE)
            .zip(chunks.chunks(rows * TILE / CHUNK));
        tiles.map(move |(values, chunks)| {
            let (n, c) = (values.len() / rows, chunks.len() / rows);
            (&values[self.row * n..][..n], &chunks[self.row * c..][..c])
        })
    }

    /// The logit of one word.
    pub fn value(self, word: usize) -> f32 {
        self.chunk(word / CHUNK).0[word % CHUNK]
    }

    /// The logits of all words, copied.
    pub fn values(self) -> Vec<f32> {
        let mut all = Vec::with_capacity(self.logits.vocab);
        self.tiles().for_each(|(values, _)| all.extend(values));
        all
    }

    /// All chunks, in the order of the words.
    pub fn chunks(self) -> impl Iterator<Item = &'a Chunk> {
        self.tiles().flat_map(|(_, chunks)| chunks)
    }

    /// The logits of the i-th chunk, and the number of its first word.
    pub fn chunk(self, i: usize) -> (&'a [f32], usize) {
        let first = i * CHUNK;
        let (tile, _) = self.tiles().nth(first / TILE).expect("a chunk of the row");
        let values = &tile[first % TILE..];
        (&values[..values.len().min(CHUNK)], first)
    }
}
