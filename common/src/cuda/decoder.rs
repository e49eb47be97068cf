//! The decoder on the device: weights, and the forward pass of a packed, prefix-shared batch, layer by layer.

use super::args;
use super::device::{
    Address, Arg, Buffer, Device, Form, Launch, Operand, Plain, Precision, Product, bytes_of,
};
use super::experts::{self, Mixture, Routes, rows_each};
use super::lora::LowRank;
use super::optimizer::elements;
use crate::kernels::layout::{Heads, Layout};
use crate::model::{LayerNorms, LayerParams, Matrix, Params, Rotations, Source, Span};
use crate::weights::{Config, Norms, QkNorm};
use anyhow::{Result, ensure};
use std::sync::{Arc, Mutex};

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
    embedding: Buffer,
    head: Option<Buffer>,
    pub(super) layers: Vec<Layer>,
    pub(super) norm: Buffer,
    rotary: Mutex<Option<Arc<Rotation>>>,
    pub(super) kernels: Kernels,
}

pub(super) struct Layer {
    pub heads: Heads,
    pub norms: LayerNorms<Buffer>,
    pub qkv: Linear,
    pub qk_norms: Option<(Buffer, Buffer)>,
    pub output: Linear,
    pub mlp: Mlp,
}

/// What a layer has after attention.
pub(super) enum Mlp {
    One { gate_up: Linear, down: Linear },
    Experts(Mixture),
}

impl Layer {
    /// The linear maps that adapters are for, in the order of the forward pass (see [`LayerParams::adapted`]).
    pub fn adapted(&self) -> Vec<&Linear> {
        let attention = [&self.qkv, &self.output];
        match &self.mlp {
            Mlp::One { gate_up, down } => [attention, [gate_up, down]].concat(),
            Mlp::Experts(_) => attention.to_vec(),
        }
    }

    /// The same, to be changed.
    pub fn adapted_mut(&mut self) -> Vec<&mut Linear> {
        let mut all = vec![&mut self.qkv, &mut self.output];
        if let Mlp::One { gate_up, down } = &mut self.mlp {
            all.extend([gate_up, down]);
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

/// cos and sin of every position that was needed so far, `[positions, head_dim / 2]` each, for each kind of rotation.
pub(super) struct Rotation {
    tables: Vec<(Buffer, Buffer)>,
    rotations: Rotations,
}

impl Rotation {
    /// The tables of a layer that rotates, and none of one that does not.
    pub fn of(&self, layer: usize) -> (Option<&Buffer>, Option<&Buffer>) {
        let table = self.rotations.number(layer).map(|n| &self.tables[n]);
        (table.map(|t| &t.0), table.map(|t| &t.1))
    }
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
    head_size: usize,
}

impl Kernels {
    fn new(precision: Precision, head_dim: usize) -> Result<Self> {
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
}

impl Kernels {
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

/// A tile of a batch, as kernels declare it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
struct AttentionTile {
    first: i32,
    rows: i32,
    start: i32,
    prefix: i32,
    prefix_len: i32,
    end: i32,
}
// SAFETY: six 32-bit numbers without padding.
unsafe impl Plain for AttentionTile {}

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

/// A batch's shape on the device.
pub struct Shape {
    /// Rows of the batch.
    pub tokens: usize,
    /// The position of each row, int32.
    pub positions: Buffer,
    /// The tiles of attention.
    pub tiles: Buffer,
    /// How many.
    pub tile_count: usize,
    pub(super) rotary: Arc<Rotation>,
}

/// Activations of a layer on its way, `[T, …]`, in the decoder's format unless it is said otherwise.
#[derive(Clone)]
pub struct Pass {
    /// The residual stream, float32.
    pub x: Buffer,
    /// A norm's output.
    pub normed: Buffer,
    /// The fused projection before its norms and rotation, where it is to be kept; else `qkv` has it meanwhile.
    pub qkv_raw: Option<Buffer>,
    /// `[q | k | v]` after bias, norms and rotation.
    pub qkv: Buffer,
    /// Attention's result.
    pub attention: Buffer,
    /// Log-sum-exp of the scores, `[T, heads]`, float32.
    pub lse: Buffer,
    /// What attention's output projection gives, float32, where there is a norm after it.
    pub output: Option<Buffer>,
    /// `[gate | up]`; of experts `[rows, …]`, a row being a token at one of its experts.
    pub gate_up: Buffer,
    /// The MLP's inner activation, of as many rows.
    pub inner: Buffer,
    /// Which experts the tokens went to, where there are several.
    pub routes: Option<Routes>,
    /// What the MLP's output projection gives, float32, where there is a norm after it.
    pub down: Option<Buffer>,
    /// What adapters have between their factors, `[T, rank]`; none without adapters.
    pub low_rank: Option<Buffer>,
}

/// Where keys and values go beside the batch: a layer's cache, and the row of it that each row of the batch has, int32.
#[derive(Clone, Copy)]
pub(super) struct CacheRows<'a> {
    pub cache: Address,
    pub rows: &'a Buffer,
}

impl Decoder {
    /// Fails for models that there are no kernels for.
    ///
    /// # Errors
    /// Experts that are too many, or of odd sizes.
    pub fn check(config: &Config) -> Result<()> {
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
            // Products of experts read 16 bytes, others four elements.
            let whole = if config.experts.is_some() { 8 } else { 4 };
            ensure!(
                span.range.start.is_multiple_of(whole),
                "{:?} does not begin at a multiple of {whole} elements, as training on a GPU wants it: use --device cpu",
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
        let kernels = Kernels::new(precision, config.head_dim)?;
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
                qk_norms: p
                    .qk_norms
                    .as_ref()
                    .map(|(q, k)| anyhow::Ok((vector(q)?, vector(k)?)))
                    .transpose()?,
                output: linear(&p.output)?,
                mlp: match (config.experts, &p.router) {
                    (Some(how), Some(router)) => {
                        let weights = in_format(&experts::all_experts(p))?;
                        Mlp::Experts(Mixture::new(how, linear(router)?, weights, p))
                    }
                    _ => Mlp::One {
                        gate_up: linear(&p.mlp().gate_up)?,
                        down: linear(&p.mlp().down)?,
                    },
                },
            })
        };
        Ok(Self {
            parameters: params.len,
            embedding: in_format(&params.embedding)?,
            head: params.head.as_ref().map(in_format).transpose()?,
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

    /// The bytes that a pass of such a model takes for each token.
    pub fn pass_bytes(c: &Config, precision: Precision) -> usize {
        let (q, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let in_format = c.hidden + (q + 2 * kv) + q + 3 * c.ffn * rows_each(c);
        let streams = if c.norms == Norms::Before { 1 } else { 2 };
        let (routes, given) = Routes::bytes(c, precision);
        in_format * bytes_of(precision)
            + (streams * c.hidden + c.heads) * size_of::<f32>()
            + routes
            + given
    }

    /// Room for the activations of so many tokens.
    pub fn pass(&self, tokens: usize) -> Result<Pass> {
        let (c, heads) = (&self.config, self.heads(0));
        let rows = |width: usize, size: usize| self.device.allocate(tokens * width * size);
        // Both sublayers are done with it before the next begins.
        let given = self.room_for_given(tokens)?;
        Ok(Pass {
            x: rows(c.hidden, size_of::<f32>())?,
            normed: rows(c.hidden, self.size())?,
            qkv_raw: None,
            qkv: rows(heads.qkv_width(), self.size())?,
            attention: rows(heads.q_width(), self.size())?,
            lse: rows(heads.query, size_of::<f32>())?,
            output: given.clone(),
            gate_up: rows(2 * c.ffn * rows_each(c), self.size())?,
            inner: rows(c.ffn * rows_each(c), self.size())?,
            routes: Routes::new(self, tokens, None)?,
            down: given,
            low_rank: match self.rank() {
                0 => None,
                rank => Some(rows(rank, self.size())?),
            },
        })
    }

    /// Room for what a sublayer gives, where there is a norm after it.
    pub(super) fn room_for_given(&self, tokens: usize) -> Result<Option<Buffer>> {
        let bytes = tokens * self.config.hidden * size_of::<f32>();
        match self.config.norms {
            Norms::Before => Ok(None),
            Norms::After | Norms::Around => self.device.allocate(bytes).map(Some),
        }
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

    /// Sizes of the attention kernels.
    pub fn attention_tiles(&self) -> AttentionTiles {
        let rows = match self.precision {
            Precision::Bf16 | Precision::F16 => 64,
            Precision::F32 => 32,
        };
        let size = self.size();
        AttentionTiles {
            rows,
            threads: 2 * rows,
            pitch: (self.kernels.head_size + 16 / size) * size,
            extra: match self.precision {
                Precision::Bf16 | Precision::F16 => 0,
                Precision::F32 => rows * (rows + 4) * 4,
            },
        }
    }

    /// The head size that attention is compiled for.
    pub(super) fn head_size(&self) -> usize {
        self.kernels.head_size
    }

    /// The rotation of at least so many positions.
    pub(super) fn rotation(&self, positions: usize) -> Result<Arc<Rotation>> {
        let mut rotary = self.rotary.lock().expect("no thread panics with the lock");
        if let Some(table) = &*rotary
            && table.rotations.positions() >= positions
        {
            return Ok(table.clone());
        }
        let rotations = Rotations::new(&self.config, positions.next_power_of_two());
        let tables = rotations.tables().iter().map(|rotary| {
            let (cos, sin) = rotary.tables();
            Ok((self.device.buffer_of(cos)?, self.device.buffer_of(sin)?))
        });
        let table = Arc::new(Rotation {
            tables: tables.collect::<Result<_>>()?,
            rotations,
        });
        *rotary = Some(table.clone());
        Ok(table)
    }

    /// Copies a batch's shape to the device.
    pub fn shape(&self, layout: &Layout) -> Result<Shape> {
        let positions: Vec<i32> = layout.positions().map(|p| p as i32).collect();
        let tiles = tiles(layout, self.attention_tiles().rows);
        Ok(Shape {
            tokens: layout.tokens(),
            positions: self.device.buffer_of(&positions)?,
            tile_count: tiles.len(),
            tiles: self.device.buffer_of(&tiles)?,
            rotary: self.rotation(layout.longest())?,
        })
    }

    /// The rows of the embedding of `tokens` (int32), `count` of them, into the residual stream.
    pub(super) fn embed(&self, tokens: &Buffer, count: usize, x: &Buffer) -> Result<()> {
        let width = self.config.hidden as i32;
        self.device.launch(
            &self.kernels.embed,
            Launch::row(count, THREADS),
            args![&self.embedding, tokens, self.config.embed_scale, x, width],
        )
    }

    /// The residual stream after the last layer is left in `pass.x`. `cache` says where a layer's keys and values go
    /// beside the pass.
    pub(super) fn forward<'c>(
        &self,
        shape: &Shape,
        tokens: &[u32],
        pass: &Pass,
        cache: impl Fn(usize) -> Option<CacheRows<'c>>,
    ) -> Result<()> {
        assert_eq!(shape.tokens, tokens.len());
        let tokens = self.device.buffer_of(tokens)?;
        self.embed(&tokens, shape.tokens, &pass.x)?;
        for i in 0..self.layers.len() {
            self.project(i, shape, pass, cache(i))?;
            self.attend(i, shape, pass)?;
            self.finish(i, shape.tokens, pass)?;
        }
        Ok(())
    }

    pub(super) fn project(
        &self,
        i: usize,
        shape: &Shape,
        pass: &Pass,
        cache: Option<CacheRows>,
    ) -> Result<()> {
        self.project_rows(
            i,
            shape.tokens,
            &shape.positions,
            &shape.rotary,
            pass,
            cache,
        )
    }

    /// The part of layer `i` before attention: from `pass.x` to `pass.qkv`, each row at its position.
    pub(super) fn project_rows(
        &self,
        i: usize,
        count: usize,
        positions: &Buffer,
        rotary: &Rotation,
        pass: &Pass,
        cache: Option<CacheRows>,
    ) -> Result<()> {
        let (layer, heads, eps) = (&self.layers[i], self.heads(i), self.config.norm_eps);
        let norm = layer.norms.before_attention.as_ref();
        self.read(&pass.x, norm, count, &pass.normed)?;
        let raw = match self.config.qk_norm {
            Some(QkNorm::Rows) => &pass.qkv,
            _ => pass.qkv_raw.as_ref().unwrap_or(&pass.qkv),
        };
        self.product(&layer.qkv, &pass.normed, raw, count, pass)?;
        let mut bias = layer.qkv.bias.as_ref();
        let (q_norm, k_norm) = match (&layer.qk_norms, self.config.qk_norm) {
            (Some((q, k)), Some(QkNorm::Heads)) => (q.address(), k.address()),
            (Some(norms), Some(QkNorm::Rows)) => {
                self.norm_queries_and_keys(i, norms, bias.take(), count, pass)?;
                (0, 0)
            }
            _ => (0, 0),
        };
        let (cos, sin) = rotary.of(i);
        let (cache, cache_rows) = cache.map_or((0, 0), |c| (c.cache, c.rows.address()));
        self.device.launch(
            &self.kernels.qkv_rope,
            Launch::row(
                (count * (heads.query + 2 * heads.kv) * head_lanes(heads.dim)).div_ceil(THREADS),
                THREADS,
            ),
            args![
                raw,
                &pass.qkv,
                bias,
                q_norm,
                k_norm,
                eps,
                cos,
                sin,
                positions,
                cache,
                cache_rows,
                count as i32,
                heads.query as i32,
                heads.kv as i32,
                heads.dim as i32,
            ],
        )
    }

    /// All queries of a token normed as one row in `pass.qkv`, and all keys; `pass.qkv_raw` keeps them as they were before.
    fn norm_queries_and_keys(
        &self,
        i: usize,
        (q, k): &(Buffer, Buffer),
        bias: Option<&Buffer>,
        count: usize,
        pass: &Pass,
    ) -> Result<()> {
        let (heads, stride) = (self.heads(i), self.heads(i).qkv_width());
        if let Some(bias) = bias {
            self.bias(&self.kernels.add_bias, &pass.qkv, bias, count, stride)?;
        }
        if let Some(raw) = &pass.qkv_raw {
            raw.copy_from(&pass.qkv, raw.bytes())?;
        }
        for (first, width, weight) in [
            (0, heads.q_width(), q),
            (heads.q_width(), heads.kv_width(), k),
        ] {
            self.device.launch(
                &self.kernels.of_format("rms_norm_part"),
                Launch::row(count.div_ceil(norm_rows(width)), THREADS),
                args![
                    pass.qkv.element(first, self.size()),
                    weight,
                    self.config.norm_eps,
                    count as i32,
                    width as i32,
                    stride as i32,
                ],
            )?;
        }
        Ok(())
    }

    /// Attention of layer `i`: from `pass.qkv` to `pass.attention` and `pass.lse`.
    pub fn attend(&self, i: usize, shape: &Shape, pass: &Pass) -> Result<()> {
        let (heads, tiles) = (self.heads(i), self.attention_tiles());
        let launch = Launch::plane(heads.query, shape.tile_count, tiles.threads)
            .shared(3 * tiles.rows * tiles.pitch + tiles.extra);
        self.device.launch(
            &self.kernels.attention,
            launch,
            args![
                &pass.qkv,
                &pass.attention,
                &pass.lse,
                &shape.tiles,
                heads.query as i32,
                heads.kv as i32,
                heads.dim as i32,
                heads.window.unwrap_or(0) as i32,
                Arg::plain(Scores::of(heads)),
            ],
        )
    }

    /// The part of layer `i` after attention: `pass.x` gains the output projection and the MLP.
    pub(super) fn finish(&self, i: usize, count: usize, pass: &Pass) -> Result<()> {
        self.widen(i, count, pass)?;
        self.narrow(i, count, pass, &pass.x)
    }

    /// `pass.x` gains attention's output projection; from it to `pass.gate_up`.
    pub(super) fn widen(&self, i: usize, count: usize, pass: &Pass) -> Result<()> {
        let layer = &self.layers[i];
        self.give(
            &layer.output,
            (&pass.attention, 1.0),
            pass.output.as_ref(),
            &pass.x,
            count,
            pass,
        )?;
        self.gain(
            &layer.norms.after_attention,
            pass.output.as_ref(),
            &pass.x,
            count,
        )?;
        self.read(
            &pass.x,
            layer.norms.before_mlp.as_ref(),
            count,
            &pass.normed,
        )?;
        let gate_up = match &layer.mlp {
            Mlp::One { gate_up, .. } => gate_up,
            Mlp::Experts(mixture) => return self.send_to_experts(mixture, count, pass),
        };
        self.product(gate_up, &pass.normed, &pass.gate_up, count, pass)?;
        match &gate_up.bias {
            Some(bias) => {
                let width = 2 * self.config.ffn;
                self.bias(&self.kernels.add_bias, &pass.gate_up, bias, count, width)
            }
            None => Ok(()),
        }
    }

    /// The residual stream `x` gains the MLP of `pass.gate_up`.
    pub(super) fn narrow(&self, i: usize, count: usize, pass: &Pass, x: &Buffer) -> Result<()> {
        let given = pass.down.as_ref();
        self.give_mlp(i, count, pass, x)?;
        self.gain(&self.layers[i].norms.after_mlp, given, x, count)
    }

    /// What the MLP's inner activation is stored times: in half precision its largest numbers would not be far from the end of
    /// the range (3,000 of 65,504 in SmolLM2).
    fn inner_scale(&self) -> f32 {
        match self.precision {
            Precision::F32 | Precision::Bf16 => 1.0,
            Precision::F16 => 1.0 / 64.0,
        }
    }

    /// The MLP of `pass.gate_up`: `pass.down`, where there is a norm after it; else the residual stream `x` gains it.
    pub(super) fn give_mlp(&self, i: usize, count: usize, pass: &Pass, x: &Buffer) -> Result<()> {
        let (ffn, [c, a]) = (self.config.ffn, self.config.activation.curve());
        let rows = count * rows_each(&self.config);
        self.device.launch(
            &self.kernels.activation,
            Launch::plane(rows, ffn.div_ceil(1024), THREADS),
            args![
                &pass.gate_up,
                &pass.inner,
                ffn as i32,
                c,
                a,
                self.inner_scale()
            ],
        )?;
        let scale = 1.0 / self.inner_scale();
        let down = match &self.layers[i].mlp {
            Mlp::One { down, .. } => down,
            Mlp::Experts(mixture) => return self.mix_experts(mixture, count, pass, (x, scale)),
        };
        self.give(
            down,
            (&pass.inner, scale),
            pass.down.as_ref(),
            x,
            count,
            pass,
        )
    }

    /// The last norm, of those rows of the residual stream that `rows` (int32) names, or of the first `count`.
    pub fn final_norm(
        &self,
        x: &Buffer,
        rows: Option<&Buffer>,
        count: usize,
        out: &Buffer,
    ) -> Result<()> {
        self.norm(x, rows, &self.norm, count, out)
    }

    /// Logits of rows after the last norm for words `first …` of the vocabulary: `logits` `[count, words]`, float32, without
    /// gaps.
    pub fn logits(
        &self,
        normed: Operand,
        count: usize,
        (first, words): (usize, usize),
        logits: Operand,
    ) -> Result<()> {
        let hidden = self.config.hidden;
        self.device.multiply(Product {
            form: Form::RowsByRows,
            m: count,
            n: words,
            k: hidden,
            a: normed,
            b: self.head().rows(first, hidden, self.precision),
            c: logits,
            scale: self.config.logit_scale,
            keep: 0.0,
        })?;
        let Some(cap) = self.config.logit_cap else {
            return Ok(());
        };
        debug_assert_eq!(logits.stride, words);
        let n = count * words;
        (self.device).launch("soft_cap", elements(n), args![logits.at, n as u64, cap])
    }

    /// What a linear map reads of the residual stream: normed, or, where there is no norm, as it is, in the decoder's format.
    pub(super) fn read(
        &self,
        x: &Buffer,
        norm: Option<&Buffer>,
        count: usize,
        out: &Buffer,
    ) -> Result<()> {
        let n = count * self.config.hidden;
        match (norm, self.precision) {
            (Some(norm), _) => self.norm(x, None, norm, count, out),
            (None, Precision::F32) => out.copy_from(x, n * size_of::<f32>()),
            (None, Precision::Bf16) => {
                let args = args![x, out, n as u64, 0u64, 0];
                self.device.launch("round_bf16", elements(n), args)
            }
            (None, Precision::F16) => {
                let args = args![x, out, n as u64];
                self.device.launch("round_f16", elements(n), args)
            }
        }
    }

    pub(super) fn norm(
        &self,
        x: &Buffer,
        rows: Option<&Buffer>,
        weight: &Buffer,
        count: usize,
        out: &Buffer,
    ) -> Result<()> {
        let (eps, width) = (self.config.norm_eps, self.config.hidden as i32);
        self.device.launch(
            &self.kernels.rms_norm,
            Launch::row(count.div_ceil(norm_rows(self.config.hidden)), THREADS),
            args![x, rows, weight, eps, out, count as i32, width],
        )
    }

    /// y = x·Wᵀ; the bias is left to whoever comes next.
    fn product(
        &self,
        linear: &Linear,
        x: &Buffer,
        y: &Buffer,
        count: usize,
        pass: &Pass,
    ) -> Result<()> {
        let y = y.rows(0, linear.rows, self.precision);
        self.multiply(linear, (x, 1.0), y, count, 0.0, pass)
    }

    /// `given` is scale·x·Wᵀ + b; without such room, the residual stream gains it.
    fn give(
        &self,
        linear: &Linear,
        (x, scale): (&Buffer, f32),
        given: Option<&Buffer>,
        stream: &Buffer,
        count: usize,
        pass: &Pass,
    ) -> Result<()> {
        let (y, keep) = match given {
            Some(given) => (given, 0.0),
            None => (stream, 1.0),
        };
        let rows = y.rows(0, linear.rows, Precision::F32);
        self.multiply(linear, (x, scale), rows, count, keep, pass)?;
        match &linear.bias {
            Some(bias) => self.bias("add_bias_f32", y, bias, count, linear.rows),
            None => Ok(()),
        }
    }

    /// The residual stream gains what was given, normed; nothing more where there is no norm.
    fn gain(
        &self,
        norm: &Option<Buffer>,
        given: Option<&Buffer>,
        stream: &Buffer,
        count: usize,
    ) -> Result<()> {
        let (Some(norm), Some(given)) = (norm, given) else {
            return Ok(());
        };
        let (eps, width) = (self.config.norm_eps, self.config.hidden);
        self.device.launch(
            "rms_norm_add",
            Launch::row(count.div_ceil(norm_rows(width)), THREADS),
            args![given, norm, eps, stream, count as i32, width as i32],
        )
    }

    pub(super) fn multiply(
        &self,
        linear: &Linear,
        (x, scale): (&Buffer, f32),
        y: Operand,
        count: usize,
        keep: f32,
        pass: &Pass,
    ) -> Result<()> {
        let x = x.rows(0, linear.cols, self.precision);
        self.device.multiply(Product {
            form: Form::RowsByRows,
            m: count,
            n: linear.rows,
            k: linear.cols,
            a: x,
            b: linear.weight.rows(0, linear.cols, self.precision),
            c: y,
            scale,
            keep,
        })?;
        for adapter in &linear.adapters {
            let between = pass.low_rank.as_ref().expect("made with the adapters");
            adapter.add(&self.device, x, y, count, between)?;
        }
        Ok(())
    }

    fn bias(
        &self,
        kernel: &str,
        x: &Buffer,
        bias: &Buffer,
        count: usize,
        width: usize,
    ) -> Result<()> {
        let launch = Launch::row(count, THREADS);
        self.device
            .launch(kernel, launch, args![x, bias, width as i32])
    }
}

/// Cuts the segments of a batch into tiles of at most `most` rows. Those that see most come first: they take longest.
fn tiles(layout: &Layout, most: usize) -> Vec<AttentionTile> {
    let mut tiles = vec![];
    let segments = layout.segments();
    for (i, segment) in segments.iter().enumerate() {
        // A root is seen by its branches up to the last.
        let seen_by = match segment.prefix {
            Some(_) => &segments[i..=i],
            None => {
                let branches = segments[i + 1..].iter().take_while(|s| s.prefix.is_some());
                &segments[i..=i + branches.count()]
            }
        };
        let end = seen_by.last().expect("itself at least").tokens.end;
        let prefix = segment.prefix.clone().unwrap_or(0..0);
        for first in segment.tokens.clone().step_by(most) {
            tiles.push(AttentionTile {
                first: first as i32,
                rows: (segment.tokens.end - first).min(most) as i32,
                start: segment.tokens.start as i32,
                prefix: prefix.start as i32,
                prefix_len: prefix.len() as i32,
                end: end as i32,
            });
        }
    }
    tiles.sort_by_key(|t| std::cmp::Reverse(t.prefix_len + t.first + t.rows - t.start));
    tiles
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_every_row_once_and_know_who_sees_them() {
        let mut layout = Layout::default();
        layout.push(70, &[3, 0, 40]);
        layout.push(5, &[]);
        let tiles = tiles(&layout, 32);
        let mut rows = vec![0; layout.tokens()];
        for tile in &tiles {
            (tile.first..tile.first + tile.rows).for_each(|r| rows[r as usize] += 1);
        }
        assert!(rows.iter().all(|&n| n == 1), "{rows:?}");
        let at = |first: i32| *tiles.iter().find(|t| t.first == first).unwrap();
        assert_eq!(
            at(64),
            AttentionTile {
                first: 64,
                rows: 6,
                start: 0,
                prefix: 0,
                prefix_len: 0,
                end: 113
            }
        );
        assert_eq!(
            at(73),
            AttentionTile {
                first: 73,
                rows: 32,
                start: 73,
                prefix: 0,
                prefix_len: 70,
                end: 113
            }
        );
        assert_eq!(
            at(113),
            AttentionTile {
                first: 113,
                rows: 5,
                start: 113,
                prefix: 0,
                prefix_len: 0,
                end: 118
            }
        );
        assert_eq!(tiles[0].first, 105, "the tile that sees most");
    }
}
