//! Low-rank adapters (LoRA, arXiv 2106.09685): W' = W + (α/r)·B·A on chosen projections, the rest frozen.
//!
//! The forward pass runs on the merged weights W', made again after every step; only the gradients differ:
//! dB = (α/r)·dyᵀ·(x·Aᵀ), dA = (α/r)·(dy·B)ᵀ·x, both through `[T, r]`, never through a full dW.

use super::params::{Matrix, Params, Source};
use crate::kernels::gemm::{Left, Mat, Packed, Precision, Threads, Write, matmul};
use crate::weights::{Config, LoraModule, save_adapter};
use anyhow::Result;
use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

/// The adapter of one projection. A is `[rank, cols]`, B `[rows, rank]`.
#[derive(Clone, Debug)]
pub struct Adapter {
    /// The projection's name without `.weight`.
    pub module: String,
    /// The projection's weight in the model's flat buffer.
    pub weight: Range<usize>,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// A in the adapters' flat buffer.
    pub a: Range<usize>,
    /// B in the adapters' flat buffer.
    pub b: Range<usize>,
    /// The projection's first column in the fused output.
    pub column: usize,
}

/// All adapters of a model, in one flat buffer of their own.
#[derive(Clone, Debug)]
pub struct Lora {
    /// r.
    pub rank: usize,
    /// α.
    pub alpha: f32,
    /// In the order of the layers and of their projections in the forward pass (see `LayerParams::adapted`).
    pub adapters: Vec<Adapter>,
    /// The length of the flat buffer.
    pub len: usize,
    /// The adapters of a fused matrix, by the start of its weight.
    by_matrix: HashMap<usize, Range<usize>>,
}

impl Lora {
    /// Lays out adapters for every projection.
    pub fn new(params: &Params, rank: usize, alpha: f32) -> Self {
        let mut lora = Self {
            rank,
            alpha,
            adapters: vec![],
            len: 0,
            by_matrix: HashMap::new(),
        };
        for matrix in params.layers.iter().flat_map(|layer| layer.adapted()) {
            let first = lora.adapters.len();
            let (mut at, mut column) = (matrix.weight.range.start, 0);
            for (name, shape) in &matrix.weight.tensors {
                let (rows, cols) = (shape[0], shape[1]);
                let a = lora.len..lora.len + rank * cols;
                let b = a.end..a.end + rows * rank;
                lora.len = b.end;
                let module = name.trim_end_matches(".weight").to_owned();
                lora.adapters.push(Adapter {
                    module,
                    weight: at..at + rows * cols,
                    rows,
                    cols,
                    a,
                    b,
                    column,
                });
                at += rows * cols;
                column += rows;
            }
            lora.by_matrix
                .insert(matrix.weight.range.start, first..lora.adapters.len());
        }
        lora
    }

    /// α/r.
    pub fn scale(&self) -> f32 {
        self.alpha / self.rank as f32
    }

    /// PEFT's start: A uniform in ±1/√cols (Kaiming with a = √5), B zero. `uniform` gives numbers in [0, 1).
    pub fn initial(&self, mut uniform: impl FnMut() -> f32) -> Vec<f32> {
        let mut flat = vec![0.0; self.len];
        for adapter in &self.adapters {
            let bound = 1.0 / (adapter.cols as f32).sqrt();
            flat[adapter.a.clone()]
                .iter_mut()
                .for_each(|x| *x = (2.0 * uniform() - 1.0) * bound);
        }
        flat
    }

    /// The weights that adapters are added to, one for each matrix that has some, as [`super::Decoder::merge`] wants them.
    ///
    /// # Errors
    /// A tensor that cannot be read.
    pub fn base(params: &Params, source: &(impl Source + ?Sized)) -> Result<Vec<Packed>> {
        let matrices = params.layers.iter().flat_map(|layer| layer.adapted());
        matrices
            .map(|matrix| {
                let weight = source.get(&matrix.weight)?;
                let weight = Mat::new(&weight, matrix.rows, matrix.cols);
                Ok(Packed::of_weights(weight, Precision::F32))
            })
            .collect()
    }

    /// A model's tensor of this name with its adapter, if it has one, added.
    pub fn add_to(&self, name: &str, values: &[f32], weight: &mut [f32]) {
        let module = name.strip_suffix(".weight");
        let adapter = self.adapters.iter().find(|a| Some(&*a.module) == module);
        if let Some(adapter) = adapter {
            self.add(adapter, values, weight);
        }
    }

    /// Adds (α/r)·B·A of one adapter to its projection's weight.
    pub fn add(&self, adapter: &Adapter, adapters: &[f32], weight: &mut [f32]) {
        let b = adapters[adapter.b.clone()].iter();
        let scaled: Vec<f32> = b.map(|b| b * self.scale()).collect();
        let a = Packed::from_columns(
            Mat::new(&adapters[adapter.a.clone()], self.rank, adapter.cols),
            Precision::F32,
        );
        let b = Left::Rows(Mat::new(&scaled, adapter.rows, self.rank));
        matmul(
            b,
            a.panels(),
            weight,
            adapter.cols,
            Write::Add,
            Threads::All,
        );
    }

    /// The adapters of a fused matrix; none of one that is not adapted.
    pub fn of(&self, matrix: &Matrix) -> &[Adapter] {
        let range = self.by_matrix.get(&matrix.weight.range.start);
        range.map_or(&[], |range| &self.adapters[range.clone()])
    }

    /// Writes adapters into the folder `dir` as PEFT reads them; `base` is what they belong to.
    pub fn save(&self, values: &[f32], config: &Config, dir: &Path, base: &str) -> Result<()> {
        let modules: Vec<_> = (self.adapters.iter())
            .map(|x| LoraModule {
                name: x.module.clone(),
                input: x.cols,
                output: x.rows,
                a: Cow::Borrowed(&values[x.a.clone()]),
                b: Cow::Borrowed(&values[x.b.clone()]),
            })
            .collect();
        save_adapter(dir, base, config, self.rank, self.alpha, modules)
    }

    /// Adds the gradients of the adapters of one fused matrix, for its input `x` `[T, in]` (its columns packed, too) and
    /// the gradient of its output, `dy` `[T, out]`. `values` are the adapters, `flat` their gradients.
    pub(super) fn add_gradient(
        &self,
        values: &[f32],
        flat: &mut [f32],
        matrix: &Matrix,
        (x, x_columns): (&[f32], &Packed),
        dy: &[f32],
    ) {
        let precision = x_columns.precision();
        let adapters = self.of(matrix);
        let (tokens, rank) = (x.len() / matrix.cols, self.rank);
        for adapter in adapters {
            let dy = Mat::strided(&dy[adapter.column..], tokens, adapter.rows, matrix.rows);
            let product = |left: Mat, right: Packed| {
                let mut out = vec![0.0; tokens * rank];
                matmul(
                    Left::Rows(left),
                    right.panels(),
                    &mut out,
                    rank,
                    Write::Set,
                    Threads::All,
                );
                out.iter_mut().for_each(|v| *v *= self.scale());
                out
            };
            let a = Packed::from_rows(
                Mat::new(&values[adapter.a.clone()], rank, adapter.cols),
                precision,
            );
            let b = Packed::from_columns(
                Mat::new(&values[adapter.b.clone()], adapter.rows, rank),
                precision,
            );
            let x_a = product(Mat::new(x, tokens, matrix.cols), a); // [T, r]
            let dy_b = product(dy, b); // [T, r]
            let x_a = Packed::from_columns(Mat::new(&x_a, tokens, rank), precision);
            matmul(
                Left::Columns(dy),
                x_a.panels(),
                &mut flat[adapter.b.clone()],
                rank,
                Write::Add,
                Threads::All,
            );
            let dy_b = Left::Columns(Mat::new(&dy_b, tokens, rank));
            matmul(
                dy_b,
                x_columns.panels(),
                &mut flat[adapter.a.clone()],
                adapter.cols,
                Write::Add,
                Threads::All,
            );
        }
    }
}
