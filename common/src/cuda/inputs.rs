//! What layers take in beside the residual stream, on the device: embeddings of their own (see `model/layer_inputs.rs`), and
//! keys and values of an earlier layer.

use super::args;
use super::backward::{Backward, NORM_BLOCKS};
use super::decoder::{Decoder, Linear};
use super::device::{Buffer, Launch, Precision};
use super::launches::{THREADS, norm_kind, norm_rows};
use super::optimizer::elements;
use super::pass::Pass;
use super::training::Order;
use crate::kernels::norm;
use crate::model::{InputParams, InputTables, Matrix, Span, making_norm, taking_norm};
use crate::weights::{Config, Fused};
use anyhow::Result;
use std::collections::BTreeMap;

/// What makes the embeddings of all layers.
pub(super) struct Inputs {
    table: Buffer,
    projection: Linear,
    norm: Buffer,
}

/// How a layer takes in its own.
pub(super) struct LayerInput {
    gate: Linear,
    projection: Linear,
    norm: Buffer,
}

impl Inputs {
    pub fn new(
        p: &InputTables,
        table: impl Fn(&Span) -> Result<Buffer>,
        linear: impl Fn(&Matrix) -> Result<Linear>,
        vector: impl Fn(&Span) -> Result<Buffer>,
    ) -> Result<Self> {
        Ok(Self {
            table: table(&p.table)?,
            projection: linear(&p.projection)?,
            norm: vector(&p.norm)?,
        })
    }
}

impl LayerInput {
    pub fn new(
        p: &InputParams,
        linear: impl Fn(&Matrix) -> Result<Linear>,
        vector: impl Fn(&Span) -> Result<Buffer>,
    ) -> Result<Self> {
        Ok(Self {
            gate: linear(&p.gate)?,
            projection: linear(&p.projection)?,
            norm: vector(&p.norm)?,
        })
    }
}

/// What the layers of a pass have in common beside the residual stream.
#[derive(Clone, Default)]
pub struct Aside {
    /// Of each token the embeddings of all layers, `[T, layers · width]`, float32,
    inputs: Option<Buffer>,
    /// and what is made of the model's own on the way there.
    made: Option<Buffer>,
    /// Keys and values that later layers attend to, too, by the layer that made them: `[T, 2 · kv_width]`.
    lent: BTreeMap<usize, Buffer>,
}

impl Aside {
    /// Its bytes for each token, in a format of so many bytes.
    pub fn bytes(c: &Config, size: usize) -> usize {
        let inputs = c.layers * c.layer_inputs.unwrap_or(0);
        2 * inputs * size_of::<f32>() + lent_width(c) * size
    }
}

/// Elements of all keys and values that are lent.
fn lent_width(c: &Config) -> usize {
    let lending = (0..c.layers).filter(|&i| c.lends_keys(i));
    lending.map(|i| 2 * c.heads_of(i).kv_width()).sum()
}

/// What a backward pass has of the gradients of that.
pub(super) struct AsideGradients {
    inputs: Option<Buffer>,
    /// Float32, as wide as what is lent.
    lent: BTreeMap<usize, Buffer>,
}

impl AsideGradients {
    pub fn new(decoder: &Decoder, tokens: usize) -> Result<Self> {
        let (c, float) = (&decoder.config, size_of::<f32>());
        let lending = (0..c.layers).filter(|&i| c.lends_keys(i));
        let lent = lending.map(|i| {
            let width = 2 * c.heads_of(i).kv_width();
            Ok((i, decoder.device.zeroed(tokens * width * float)?))
        });
        Ok(Self {
            inputs: (decoder.room_for_inputs(tokens))?,
            lent: lent.collect::<Result<_>>()?,
        })
    }

    /// Its bytes for each token; the gradient of what is made, on the way out, included.
    pub fn bytes(c: &Config, size: usize) -> usize {
        let inputs = c.layers * c.layer_inputs.unwrap_or(0);
        inputs * (size_of::<f32>() + size) + lent_width(c) * size_of::<f32>()
    }

    /// Elements of partial sums over so many tokens.
    pub fn partial_elements(c: &Config, tokens: usize) -> usize {
        let width = c.layer_inputs.unwrap_or(0);
        (tokens * c.layers).min(NORM_BLOCKS) * width
    }
}

/// Elements from row to row of what layers have of their own.
fn stride(c: &Config) -> usize {
    c.layers * c.layer_inputs.unwrap_or(0)
}

impl Decoder {
    fn room_for_inputs(&self, tokens: usize) -> Result<Option<Buffer>> {
        let bytes = tokens * stride(&self.config) * size_of::<f32>();
        (bytes > 0).then(|| self.device.allocate(bytes)).transpose()
    }

    /// Room for what the layers of a pass over so many tokens have in common.
    pub(super) fn aside(&self, tokens: usize) -> Result<Aside> {
        let c = &self.config;
        let lending = (0..c.layers).filter(|&i| c.lends_keys(i));
        let lent = lending.map(|i| {
            let bytes = tokens * 2 * c.heads_of(i).kv_width() * self.size();
            Ok((i, self.device.allocate(bytes)?))
        });
        Ok(Aside {
            inputs: self.room_for_inputs(tokens)?,
            made: self.room_for_inputs(tokens)?,
            lent: lent.collect::<Result<_>>()?,
        })
    }

    /// Where a pass begins: the embeddings of `tokens` (int32), `count` of them, as the residual stream `x`, and those that
    /// layers have of their own.
    pub(super) fn begin(
        &self,
        tokens: &Buffer,
        count: usize,
        x: &Buffer,
        pass: &Pass,
    ) -> Result<()> {
        self.embed(tokens, count, x)?;
        let (Some(inputs), Some(to)) = (&self.inputs, &pass.aside.inputs) else {
            return Ok(());
        };
        let (c, all) = (&self.config, stride(&self.config));
        let scale = (c.layer_inputs.unwrap_or(0) as f32).sqrt();
        self.device.launch(
            &self.kernels.embed,
            Launch::row(count, THREADS),
            args![&inputs.table, tokens, scale, to, all as i32],
        )?;
        let made = self.make_inputs(inputs, count, x, pass)?;
        self.norm_add(
            (&inputs.norm, making_norm(c)),
            made,
            to,
            (count * c.layers, all / c.layers),
        )
    }

    /// What the model's own embeddings `x` become before they are normed, for all layers.
    fn make_inputs<'p>(
        &self,
        inputs: &Inputs,
        count: usize,
        x: &Buffer,
        pass: &'p Pass,
    ) -> Result<&'p Buffer> {
        let made = pass.aside.made.as_ref().expect("made with the inputs");
        self.read(x, None, count, &pass.normed)?;
        let y = made.rows(0, inputs.projection.rows, Precision::F32);
        self.multiply(&inputs.projection, (&pass.normed, 1.0), y, count, 0.0, pass)?;
        Ok(made)
    }

    /// The residual stream `x` takes in what layer `i` has of the tokens, where it has, and is multiplied by the layer's number.
    pub(super) fn take_input(&self, i: usize, count: usize, pass: &Pass, x: &Buffer) -> Result<()> {
        let layer = &self.layers[i];
        if let (Some(input), Some(given)) = (&layer.input, &pass.given_input) {
            if let Some(last) = &pass.last {
                last.copy_from(x, last.bytes())?;
            }
            self.give_input(i, count, pass, x)?;
            let sizes = (count, self.config.hidden);
            let norm = (&input.norm, taking_norm(&self.config));
            self.norm_add(norm, given, x, sizes)?;
        }
        match layer.scale {
            Some(scale) => self.scale(x, count * self.config.hidden, scale),
            None => Ok(()),
        }
    }

    /// What it gives to the stream `x`, before its norm: `pass.given_input`.
    pub(super) fn give_input(&self, i: usize, count: usize, pass: &Pass, x: &Buffer) -> Result<()> {
        let (Some(input), Some(gates)) = (&self.layers[i].input, &pass.input_gates) else {
            return Ok(());
        };
        self.read(x, None, count, &pass.normed)?;
        self.product(&input.gate, &pass.normed, gates, count, pass)?;
        let (scale, width) = (self.inner_scale(), input.gate.rows);
        self.device.launch(
            &self.kernels.of_format("layer_input"),
            Launch::row(count, THREADS),
            args![
                gates,
                self.input_at(i, pass.aside.inputs.as_ref()),
                &pass.inner,
                width as i32,
                stride(&self.config) as i32,
                self.curve(),
                scale,
            ],
        )?;
        let read = (&pass.inner, 1.0 / scale);
        let given = pass.given_input.as_ref();
        self.give(&input.projection, read, given, x, count, pass)
    }

    /// Where the rows of all layers' inputs, or of their gradients, have layer `i`'s.
    fn input_at(&self, i: usize, inputs: Option<&Buffer>) -> u64 {
        let width = self.config.layer_inputs.unwrap_or(0);
        inputs.map_or(0, |inputs| inputs.element(i * width, size_of::<f32>()))
    }

    /// `stream` gains the norm of what was `given`, both `[rows, width]`, float32.
    pub(super) fn norm_add(
        &self,
        (norm, kind): (&Buffer, norm::Kind),
        given: &Buffer,
        stream: &Buffer,
        (rows, width): (usize, usize),
    ) -> Result<()> {
        self.device.launch(
            "rms_norm_add",
            Launch::row(rows.div_ceil(norm_rows(width)), THREADS),
            args![
                given,
                norm,
                norm_kind(kind),
                stream,
                rows as i32,
                width as i32
            ],
        )
    }

    /// `n` float32 numbers are multiplied by one.
    pub(super) fn scale(&self, x: &Buffer, n: usize, by: f32) -> Result<()> {
        self.device
            .launch("scale_f32", elements(n), args![x, n as u64, by])
    }

    /// Keys and values of layer `i` in `pass.qkv` become those that are lent to it, or are left for those that they are lent to.
    pub(super) fn lend(&self, i: usize, count: usize, pass: &Pass) -> Result<()> {
        let (layer, heads) = (&self.layers[i], self.heads(i));
        let Some(lent) = pass.aside.lent.get(&layer.keys_of) else {
            return Ok(());
        };
        let (own, width) = (heads.qkv_width(), 2 * heads.kv_width());
        let keys = pass.qkv.element(heads.q_width(), self.size());
        match layer.fused {
            Fused::Queries => self.copy_columns((lent.address(), width), (keys, own), width, count),
            _ => self.copy_columns((keys, own), (lent.address(), width), width, count),
        }
    }

    /// Copies columns of rows that begin so many elements apart.
    pub(super) fn copy_columns(
        &self,
        (from, from_stride): (u64, usize),
        (to, to_stride): (u64, usize),
        width: usize,
        rows: usize,
    ) -> Result<()> {
        self.device.launch(
            &self.kernels.of_format("copy_columns"),
            Launch::row(rows, THREADS),
            args![from, to, width as i32, from_stride as i32, to_stride as i32],
        )
    }
}

impl Backward<'_> {
    /// Back through what layer `i` takes in, and the number that the stream is multiplied by.
    pub(super) fn input(&self, i: usize, pass: &Pass) -> Result<()> {
        let (decoder, count) = (self.decoder, self.shape.tokens);
        let (layer, places) = (&decoder.layers[i], &self.gradients.params.layers[i]);
        if let Some(scale) = layer.scale {
            decoder.scale(&self.dx, count * decoder.config.hidden, scale)?;
        }
        let (Some(input), Some(p), Some(gates), Some(last)) =
            (&layer.input, &places.input, &pass.input_gates, &pass.last)
        else {
            return Ok(());
        };
        let norm = (Some(&input.norm), Some(&p.norm));
        let dy = self.given(
            norm,
            taking_norm(&decoder.config),
            pass.given_input.as_ref(),
        )?;
        self.input_gradient(&input.projection, dy, &pass.inner, pass)?;
        let width = input.gate.rows;
        decoder.device.launch(
            &decoder.kernels.of_format("layer_input_backward"),
            Launch::row(count, THREADS),
            args![
                gates,
                decoder.input_at(i, pass.aside.inputs.as_ref()),
                &pass.inner,
                decoder.input_at(i, self.aside.inputs.as_ref()),
                width as i32,
                stride(&decoder.config) as i32,
                decoder.curve(),
            ],
        )?;
        self.weight_gradient(&input.projection, &p.projection, &pass.inner, dy, pass)?;
        let d_gates = self.operand(gates, width);
        let reader = (&input.gate, &p.gate, d_gates);
        self.read(&[reader], (&None, &None), last, pass)
    }

    /// Adds the gradients of what made the layers' inputs; to `dx` what the model's own embeddings gain. `pass.x` is lost.
    pub(super) fn inputs(&self, tokens: &Buffer, order: &Order, pass: &Pass) -> Result<()> {
        let (decoder, count) = (self.decoder, self.shape.tokens);
        let (Some(inputs), Some(p), Some(d)) = (
            &decoder.inputs,
            &self.gradients.params.inputs,
            &self.aside.inputs,
        ) else {
            return Ok(());
        };
        let Some(to_table) = self.gradients.span(&p.table) else {
            return Ok(()); // they are not trained
        };
        let (c, all) = (&decoder.config, stride(&decoder.config));
        let (rows, width) = (count * c.layers, all / c.layers);
        decoder.embed(tokens, count, &pass.x)?;
        let made = decoder.make_inputs(inputs, count, &pass.x, pass)?;
        let d_made = decoder.device.allocate(count * all * decoder.size())?;
        let to = self.operand(&d_made, width);
        self.norm_given((&inputs.norm, &p.norm), making_norm(c), (made, d), to, rows)?;
        let dy = self.operand(&d_made, all);
        let projection = &inputs.projection;
        self.weight_gradient(projection, &p.projection, &pass.normed, dy, pass)?;
        let dx = self.dx.rows(0, c.hidden, Precision::F32);
        self.add_input_gradient(projection, dy, dx, 1.0, pass)?;
        decoder.scale(d, count * all, (width as f32).sqrt())?;
        order.add(decoder, d, all, to_table)
    }

    /// Gradients of keys and values that were lent to layer `i` are gathered; where it lent its own, they gain those.
    pub(super) fn lend(&self, i: usize) -> Result<()> {
        let (decoder, layer) = (self.decoder, &self.decoder.layers[i]);
        let (heads, size) = (decoder.heads(i), decoder.size());
        let Some(lent) = self.aside.lent.get(&layer.keys_of) else {
            return Ok(());
        };
        decoder.device.launch(
            &decoder.kernels.of_format("lent_gradient"),
            Launch::row(self.shape.tokens, THREADS),
            args![
                self.d_qkv.element(heads.q_width(), size),
                lent,
                2 * heads.kv_width() as i32,
                heads.qkv_width() as i32,
                i32::from(layer.fused == Fused::Queries),
            ],
        )
    }
}
