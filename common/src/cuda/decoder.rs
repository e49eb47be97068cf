//! A model's weights on the device. What is done with them is in `pass` and `backward`.

use super::batch::Rotation;
use super::delta;
use super::device::{Address, Buffer, Device, Precision, bytes_of};
use super::experts::{self, Mixture};
use super::inputs::{Inputs, LayerInput};
use super::launches::{self, AttentionLaunches, Kernels};
use super::lora::LowRank;
use super::pass::Widths;
use super::recurrent::Recurrent;
use crate::kernels::layout::Heads;
use crate::model::{LayerNorms, LayerParams, Matrix, MlpParams, Params, Source, Span};
use crate::weights::{Config, Fused, QkNorm};
use anyhow::{Result, ensure};
use std::sync::{Arc, Mutex};

/// A model on a device.
pub struct Decoder {
    /// Its shape.
    pub config: Config,
    /// The number format of weights, activations and the products' operands.
    pub precision: Precision,
    /// Where it is.
    pub device: Device,
    /// How many it has, adapters not counted.
    pub(super) parameters: usize,
    pub(super) embedding: Buffer,
    head: Option<Buffer>,
    /// What makes embeddings that layers have of their own.
    pub(super) inputs: Option<Inputs>,
    pub(super) layers: Vec<Layer>,
    pub(super) norm: Buffer,
    pub(super) rotary: Mutex<Option<Arc<Rotation>>>,
    pub(super) kernels: Kernels,
}

pub(super) struct Layer {
    pub heads: Heads,
    pub norms: LayerNorms<Buffer>,
    pub qkv: Linear,
    /// What a row of that is,
    pub fused: Fused,
    /// and whose keys and values are attended to.
    pub keys_of: usize,
    pub q_norm: Option<Buffer>,
    pub k_norm: Option<Buffer>,
    /// What it has in the place of attention.
    pub recurrent: Option<Recurrent>,
    /// What stands beside the scores of each query head, float32.
    pub sinks: Option<Buffer>,
    pub output: Linear,
    pub mlp: Mlp,
    /// How it takes in an embedding of its own.
    pub input: Option<LayerInput>,
    /// What the residual stream is multiplied by after it.
    pub scale: Option<f32>,
}

/// What a layer has after attention.
pub(super) enum Mlp {
    One(OneMlp),
    Experts(Box<Mixture>),
}

/// An MLP, alone or beside experts, or the expert that all tokens go to.
pub(super) struct OneMlp {
    /// `[gate | up]`.
    pub gate_up: Linear,
    /// Its output projection.
    pub down: Linear,
}

impl OneMlp {
    pub fn new(p: &MlpParams, linear: impl Fn(&Matrix) -> Result<Linear>) -> Result<Self> {
        Ok(Self {
            gate_up: linear(&p.gate_up)?,
            down: linear(&p.down)?,
        })
    }
}

impl Layer {
    /// The weights of its norms of each query head, and of each key head, for the kernels of the rotation; 0: there is none.
    pub fn head_norms(&self, how: Option<QkNorm>) -> [Address; 2] {
        let by_heads = how.is_some_and(QkNorm::by_heads);
        let norms = [&self.q_norm, &self.k_norm];
        norms.map(|norm| {
            let norm = norm.as_ref().filter(|_| by_heads);
            norm.map_or(0, Buffer::address)
        })
    }

    /// The weights of its norms of queries and of keys.
    pub fn qk_norms(&self) -> impl Iterator<Item = Option<&Buffer>> {
        [self.q_norm.as_ref(), self.k_norm.as_ref()].into_iter()
    }

    /// The linear maps that adapters may be for, in the order of the forward pass: [`LayerParams::adapted`] has the first of them,
    /// or all.
    pub fn adapted(&self) -> Vec<&Linear> {
        let attention = [&self.qkv, &self.output];
        match &self.mlp {
            Mlp::One(mlp) => [attention, [&mlp.gate_up, &mlp.down]].concat(),
            Mlp::Experts(_) => attention.to_vec(),
        }
    }

    /// The same, to be changed.
    pub fn adapted_mut(&mut self) -> Vec<&mut Linear> {
        let mut all = vec![&mut self.qkv, &mut self.output];
        if let Mlp::One(mlp) = &mut self.mlp {
            all.extend([&mut mlp.gate_up, &mut mlp.down]);
        }
        all
    }
}

/// y = x·Wᵀ + b; W `[rows, cols]` in the decoder's format, b float32.
pub(super) struct Linear {
    pub weight: Buffer,
    pub bias: Option<Buffer>,
    pub rows: usize,
    pub cols: usize,
    /// Low-rank adapters in training.
    pub adapters: Vec<LowRank>,
}

impl Decoder {
    /// Fails for models that there are no kernels for.
    ///
    /// # Errors
    /// Heads that are too wide; experts that are too many, or of odd sizes; linear attention with keys that are too long.
    pub fn check(config: &Config) -> Result<()> {
        launches::check(config)?;
        delta::check(config)?;
        experts::check(config)
    }

    /// Copies a model's weights to the device, tensor by tensor; the host never holds more than one.
    ///
    /// # Errors
    /// A tensor that is missing or of another shape; a device that has no room; heads that no kernel takes.
    pub fn new(
        device: &Device,
        config: &Config,
        source: &(impl Source + ?Sized),
        precision: Precision,
    ) -> Result<Self> {
        let put = |span: &Span, format| match source.bfloat16(span)? {
            Some(parts) if format == Precision::Bf16 => device.buffer_of_parts(&parts),
            _ => {
                let buffer = device.allocate(span.range.len() * bytes_of(format))?;
                for part in span.parts() {
                    let first = part.range.start - span.range.start;
                    buffer.write_in(first, &source.get(&part)?, format)?;
                }
                Ok(buffer)
            }
        };
        Self::build(device, config, precision, put)
    }

    /// A decoder over parameters that are on the device, flat as [`Params`] lays them out: it is what they become.
    /// `masters` are float32, `working` the same in `precision`.
    ///
    /// # Errors
    /// Heads or experts that no kernel takes; sizes so odd that parameters do not begin where kernels can read them.
    pub fn over(
        device: &Device,
        config: &Config,
        precision: Precision,
        masters: &Buffer,
        working: &Buffer,
    ) -> Result<Self> {
        Self::build(device, config, precision, |span, format| {
            // Products of experts read 16 bytes; what else is read in vectors, the embedding, begins everything. (What only chooses
            // experts is read one by one.)
            let (_, shape) = &span.tensors[0];
            let wants = config.mixture().is_some() && shape.len() > 1;
            ensure!(
                !wants || span.range.start.is_multiple_of(8),
                "{:?} does not begin at a multiple of 8 elements, as training experts on a GPU wants it: use --device cpu",
                span.tensors[0].0
            );
            let flat = match format {
                Precision::F32 => masters,
                Precision::Bf16 | Precision::F16 => working,
            };
            Ok(flat.part(span.range.start, span.range.len(), bytes_of(format)))
        })
    }

    /// `put` gives the place of a span in a format.
    fn build(
        device: &Device,
        config: &Config,
        precision: Precision,
        put: impl Fn(&Span, Precision) -> Result<Buffer>,
    ) -> Result<Self> {
        Self::check(config)?;
        let params = Params::new(config);
        let kernels = Kernels::new(precision);
        let in_format = |span: &Span| put(span, precision);
        let vector = |span: &Span| put(span, Precision::F32);
        let linear = |m: &Matrix| -> Result<Linear> {
            Ok(Linear {
                weight: in_format(&m.weight)?,
                bias: m.bias.as_ref().map(vector).transpose()?,
                rows: m.rows,
                cols: m.cols,
                adapters: vec![],
            })
        };
        let layer = |(i, p): (usize, &LayerParams)| -> Result<Layer> {
            Ok(Layer {
                heads: config.heads_of(i),
                norms: p.norms.try_map(vector)?,
                qkv: linear(&p.qkv)?,
                fused: config.fused(i),
                keys_of: config.keys_of(i),
                q_norm: p.q_norm.as_ref().map(vector).transpose()?,
                k_norm: p.k_norm.as_ref().map(vector).transpose()?,
                recurrent: (p.recurrent.as_ref())
                    .map(|p| Recurrent::new(p, vector))
                    .transpose()?,
                sinks: p.sinks.as_ref().map(vector).transpose()?,
                output: linear(&p.output)?,
                mlp: match config.experts[i] {
                    Some(how) => {
                        let mixture = Mixture::new((how, p), in_format, linear, vector)?;
                        Mlp::Experts(Box::new(mixture))
                    }
                    None => Mlp::One(OneMlp::new(p.mlp(), linear)?),
                },
                input: (p.input.as_ref())
                    .map(|p| LayerInput::new(p, linear, vector))
                    .transpose()?,
                scale: (p.scale.as_ref())
                    .map(|span| anyhow::Ok(vector(span)?.read::<f32>(0, 1)?[0]))
                    .transpose()?,
            })
        };
        Ok(Self {
            parameters: params.len,
            embedding: in_format(&params.embedding)?,
            head: params.head.as_ref().map(in_format).transpose()?,
            inputs: (params.inputs.as_ref())
                .map(|p| Inputs::new(p, in_format, linear, vector))
                .transpose()?,
            layers: params
                .layers
                .iter()
                .enumerate()
                .map(layer)
                .collect::<Result<_>>()?,
            norm: vector(&params.norm)?,
            rotary: Mutex::new(None),
            config: config.clone(),
            precision,
            device: device.clone(),
            kernels,
        })
    }

    /// The bytes that the weights of such a model take on a device.
    pub fn weight_bytes(config: &Config, precision: Precision) -> usize {
        Params::new(config).len * bytes_of(precision)
    }

    /// Bytes of a number of weights and activations.
    pub fn size(&self) -> usize {
        bytes_of(self.precision)
    }

    /// The widths of what its layers have on their way.
    pub(super) fn widths(&self) -> Widths {
        Widths::new(&self.config)
    }

    /// The largest rank of its adapters; 0 where it has none.
    pub(super) fn rank(&self) -> usize {
        let linears = self.layers.iter().flat_map(Layer::adapted);
        let adapters = linears.flat_map(|linear| &linear.adapters);
        adapters.map(|adapter| adapter.rank).max().unwrap_or(0)
    }

    /// The LM head, `[vocab, hidden]`.
    pub fn head(&self) -> &Buffer {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    /// How the heads of layer `i` are laid out.
    pub fn heads(&self, i: usize) -> Heads {
        self.layers[i].heads
    }

    /// Rows of a tile of attention.
    pub(super) fn tile_rows(&self) -> usize {
        launches::tile_rows(self.precision)
    }

    /// How attention of layer `i` is launched.
    pub(super) fn attention_launches(&self, i: usize) -> AttentionLaunches {
        AttentionLaunches::new(self.precision, self.heads(i))
    }
}
