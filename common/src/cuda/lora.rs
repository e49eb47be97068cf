//! Low-rank adapters beside the linear maps of a decoder on the device: y = x·Wᵀ + (α/r)·(x·Aᵀ)·Bᵀ. The weights stay as
//! they were read, in the decoder's format, once; everything of the adapters goes through `[T, r]`.

use super::decoder::Decoder;
use super::device::{Buffer, Device, Form, Operand, Precision, Product, bytes_of};
use crate::model::{Adapter, Lora, Params};
use anyhow::Result;

/// The adapter of one projection of a linear map.
pub(super) struct LowRank {
    /// r.
    pub rank: usize,
    /// α/r.
    scale: f32,
    /// Where it is: its shape, its first column in the map's output, its factors' places in the flat buffers.
    at: Adapter,
    /// `[rank, cols]`.
    a: Operand,
    /// `[rows, rank]`.
    b: Operand,
    /// What holds both.
    _factors: Buffer,
}

impl Decoder {
    /// Puts adapters beside the linear maps: `working` has their factors, flat as `lora` lays them out, in the decoder's
    /// format.
    pub fn adapt(&mut self, lora: &Lora, params: &Params, working: &Buffer) {
        let precision = self.precision;
        for (layer, places) in self.layers.iter_mut().zip(&params.layers) {
            for (linear, matrix) in layer.adapted_mut().into_iter().zip(places.adapted()) {
                let adapters = lora.of(matrix).iter();
                linear.adapters = adapters
                    .map(|adapter| LowRank::new(adapter, lora, precision, working))
                    .collect();
            }
        }
    }
}

impl LowRank {
    fn new(adapter: &Adapter, lora: &Lora, precision: Precision, working: &Buffer) -> Self {
        let factor = |first: usize, cols: usize| Operand {
            at: working.element(first, bytes_of(precision)),
            precision,
            stride: cols,
        };
        Self {
            rank: lora.rank,
            scale: lora.scale(),
            a: factor(adapter.a.start, adapter.cols),
            b: factor(adapter.b.start, lora.rank),
            at: adapter.clone(),
            _factors: working.clone(),
        }
    }

    /// y += (α/r)·(x·Aᵀ)·Bᵀ for `count` rows; `between` is storage of `[count, rank]`.
    pub fn add(
        &self,
        device: &Device,
        x: Operand,
        y: Operand,
        count: usize,
        between: &Buffer,
    ) -> Result<()> {
        let between = self.down(device, x, count, between)?;
        device.multiply(Product {
            form: Form::RowsByRows,
            m: count,
            n: self.at.rows,
            k: self.rank,
            a: between,
            b: self.b,
            c: self.columns(y),
            scale: self.scale,
            keep: 1.0,
        })
    }

    /// dx += (α/r)·(dy·B)·A.
    pub fn add_input_gradient(
        &self,
        device: &Device,
        dy: Operand,
        dx: Operand,
        count: usize,
        between: &Buffer,
    ) -> Result<()> {
        let between = self.up(device, dy, count, between)?;
        device.multiply(Product {
            form: Form::RowsByColumns,
            m: count,
            n: self.at.cols,
            k: self.rank,
            a: between,
            b: self.a,
            c: dx,
            scale: self.scale,
            keep: 1.0,
        })
    }

    /// dB += (α/r)·dyᵀ·(x·Aᵀ) and dA += (α/r)·(dy·B)ᵀ·x in `flat`, float32.
    pub fn add_gradient(
        &self,
        device: &Device,
        x: Operand,
        dy: Operand,
        flat: &Buffer,
        count: usize,
        between: &Buffer,
    ) -> Result<()> {
        let product = |a, b, (m, n): (usize, usize), first| {
            device.multiply(Product {
                form: Form::ColumnsByColumns,
                m,
                n,
                k: count,
                a,
                b,
                c: Operand {
                    at: flat.element(first, size_of::<f32>()),
                    precision: Precision::F32,
                    stride: n,
                },
                scale: self.scale,
                keep: 1.0,
            })
        };
        let down = self.down(device, x, count, between)?;
        let of_b = (self.at.rows, self.rank);
        product(self.columns(dy), down, of_b, self.at.b.start)?;
        let up = self.up(device, dy, count, between)?;
        product(up, x, (self.rank, self.at.cols), self.at.a.start)
    }

    /// x·Aᵀ `[count, rank]`.
    fn down(&self, device: &Device, x: Operand, count: usize, to: &Buffer) -> Result<Operand> {
        let to = to.rows(0, self.rank, self.a.precision);
        device.multiply(Product {
            form: Form::RowsByRows,
            m: count,
            n: self.rank,
            k: self.at.cols,
            a: x,
            b: self.a,
            c: to,
            scale: 1.0,
            keep: 0.0,
        })?;
        Ok(to)
    }

    /// dy·B `[count, rank]`.
    fn up(&self, device: &Device, dy: Operand, count: usize, to: &Buffer) -> Result<Operand> {
        let to = to.rows(0, self.rank, self.a.precision);
        device.multiply(Product {
            form: Form::RowsByColumns,
            m: count,
            n: self.rank,
            k: self.at.rows,
            a: self.columns(dy),
            b: self.b,
            c: to,
            scale: 1.0,
            keep: 0.0,
        })?;
        Ok(to)
    }

    /// Its projection's columns of the map's output.
    fn columns(&self, y: Operand) -> Operand {
        Operand {
            at: y.at + (self.at.column * bytes_of(y.precision)) as u64,
            ..y
        }
    }
}
