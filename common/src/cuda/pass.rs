//! The forward pass of a packed, prefix-shared batch, layer by layer.

use super::args;
use super::batch::{Rotation, Shape};
use super::decoder::{Decoder, Linear, Mlp};
use super::device::{Address, Arg, Buffer, Form, Launch, Operand, Precision, Product, bytes_of};
use super::experts::{Apart, Routes};
use super::inputs::Aside;
use super::launches::{Scores, THREADS, head_lanes, norm_kind, norm_rows, values_of};
use super::optimizer::elements;
use super::recurrent::Memories;
use crate::kernels::norm;
use crate::weights::{Config, Fused, QkNorm, Recurrence};
use anyhow::Result;

/// Activations of a layer on its way, `[T, …]`, in the decoder's format unless it is said otherwise.
#[derive(Clone)]
pub struct Pass {
    /// The residual stream, float32.
    pub x: Buffer,
    /// A norm's output.
    pub normed: Buffer,
    /// The fused projection before its norms and rotation, where it is to be kept or has gates; else `qkv` has it meanwhile.
    pub qkv_raw: Option<Buffer>,
    /// `[q | k | v]` after bias, norms and rotation; of linear attention as its rule reads them.
    pub qkv: Buffer,
    /// Of linear attention, decays and rates, float32.
    pub gates: Option<Buffer>,
    /// What attention, or what stands in its place, gives before it is gated, where it is.
    pub read: Option<Buffer>,
    /// What the output projection of attention, or of what stands in its place, reads.
    pub attention: Buffer,
    /// Log-sum-exp of the scores, `[T, heads]`, float32.
    pub lse: Buffer,
    /// What attention's output projection gives, float32, where there is a norm after it.
    pub output: Option<Buffer>,
    /// `[gate | up]`; of experts `[rows, …]`, a row being a token at one of its experts, those at the one for all tokens last.
    pub gate_up: Buffer,
    /// The MLP's inner activation, of as many rows.
    pub inner: Buffer,
    /// Which experts the tokens went to, where there are several.
    pub routes: Option<Routes>,
    /// What the MLP's output projection gives, float32, where there is a norm after it.
    pub down: Option<Buffer>,
    /// Where an MLP is beside experts: what each gives.
    pub apart: Option<Apart>,
    /// Where layers have embeddings of their own: the gates of this one's,
    pub input_gates: Option<Buffer>,
    /// what it gives to the stream, float32, before its norm,
    pub given_input: Option<Buffer>,
    /// and the stream before it, float32, where a backward pass wants it.
    pub last: Option<Buffer>,
    /// What layers have in common.
    pub(super) aside: Aside,
    /// What adapters have between their factors, `[T, rank]`; none without adapters.
    pub low_rank: Option<Buffer>,
}

/// Where keys and values go beside the batch: a layer's cache, and the row of it that each row of the batch has, int32.
#[derive(Clone, Copy)]
pub(super) struct CacheRows<'a> {
    pub cache: Address,
    pub rows: &'a Buffer,
}

/// Columns of a row, from the first on, of which each so many are normed by themselves.
pub(super) struct NormedParts {
    pub first: usize,
    pub parts: usize,
    pub width: usize,
}

/// The widths of what layers have on their way, of whichever it is widest in.
#[derive(Clone, Copy, Default)]
pub(super) struct Widths {
    /// The fused projection, where that of some layer is not `[q | k | v]`; else 0.
    pub gated: usize,
    /// `[q | k | v]`.
    pub qkv: usize,
    /// What is read by the output projection,
    pub attention: usize,
    /// and that before it is gated, where some layer has it first.
    pub read: usize,
    /// Decays and rates of linear attention.
    pub gates: usize,
}

impl Widths {
    pub fn new(c: &Config) -> Self {
        let mut widths = Self::default();
        let attends = |i: &usize| c.recurrences[*i].is_none();
        let mut attending = (0..c.layers).filter(attends);
        let apart = attending.any(|i| c.fused(i) != Fused::All);
        for (i, recurrence) in c.recurrences.iter().enumerate() {
            let heads = c.heads_of(i);
            let own = match *recurrence {
                Some(Recurrence::Delta(shape)) => Self {
                    gated: shape.input_width(),
                    qkv: shape.qkv_width(),
                    attention: shape.value_width(),
                    read: shape.value_width(),
                    gates: 2 * shape.value_heads,
                },
                Some(Recurrence::Conv(shape)) => Self {
                    gated: shape.input_width(),
                    attention: shape.channels,
                    ..Self::default()
                },
                None => {
                    let (q, qkv) = (heads.q_width(), heads.qkv_width());
                    let raw = match c.fused(i) {
                        Fused::All => qkv,
                        Fused::Gated => qkv + q,
                        Fused::QueriesAndKeys => q + heads.kv_width(),
                        Fused::Queries => q,
                    };
                    Self {
                        gated: if apart { raw } else { 0 },
                        qkv,
                        attention: q,
                        read: if c.attention_gate { q } else { 0 },
                        gates: 0,
                    }
                }
            };
            widths = Self {
                gated: widths.gated.max(own.gated),
                qkv: widths.qkv.max(own.qkv),
                attention: widths.attention.max(own.attention),
                read: widths.read.max(own.read),
                gates: widths.gates.max(own.gates),
            };
        }
        widths
    }

    /// The fused projection, where it is kept for the way back: norms want it, too.
    pub fn raw(&self, c: &Config) -> usize {
        match c.qk_norm {
            Some(_) => self.gated.max(self.qkv),
            None => self.gated,
        }
    }
}

/// What a layer leaves of a pass for those that come later.
pub(super) enum Kept<'a> {
    /// Keys and values.
    Keys(CacheRows<'a>),
    /// The memories that spans (of the device) end with.
    Memories(&'a Memories, &'a Buffer),
}

impl Decoder {
    /// The bytes that a pass of such a model takes for each token.
    pub fn pass_bytes(c: &Config, precision: Precision) -> usize {
        let widths = Widths::new(c);
        let mixed = widths.gated + widths.qkv + widths.attention;
        let in_format = c.hidden + mixed + 3 * c.widest_mlp();
        let streams = if c.norms.after() { 2 } else { 1 };
        let (routes, given) = Routes::bytes(c, precision);
        in_format * bytes_of(precision)
            + (streams * c.hidden + c.heads + widths.gates) * size_of::<f32>()
            + routes
            + given
            + Apart::bytes(c) / 2
            + c.layer_inputs.unwrap_or(0) * bytes_of(precision)
            + Aside::bytes(c, bytes_of(precision))
    }

    /// The width of the MLPs' inner activation, and of a layer's input, which has the same place.
    pub(super) fn inner_width(c: &Config) -> usize {
        c.widest_mlp().max(c.layer_inputs.unwrap_or(0))
    }

    /// Room for the activations of so many tokens.
    pub fn pass(&self, tokens: usize) -> Result<Pass> {
        let (c, widths) = (&self.config, self.widths());
        let rows = |width: usize, size: usize| self.device.allocate(tokens * width * size);
        let some = |width: usize, size: usize| (width > 0).then(|| rows(width, size)).transpose();
        // Both sublayers are done with it before the next begins.
        let given = self.room_for_given(tokens)?;
        let attention = rows(widths.attention, self.size())?;
        Ok(Pass {
            x: rows(c.hidden, size_of::<f32>())?,
            normed: rows(c.hidden, self.size())?,
            qkv_raw: some(widths.gated, self.size())?,
            qkv: rows(widths.qkv, self.size())?,
            gates: some(widths.gates, size_of::<f32>())?,
            read: (widths.read > 0).then(|| attention.clone()), // it is gated where it is
            attention,
            lse: rows(c.heads, size_of::<f32>())?,
            output: given.clone(),
            gate_up: rows(2 * c.widest_mlp(), self.size())?,
            inner: rows(Self::inner_width(c), self.size())?,
            routes: Routes::new(self, tokens, None)?,
            apart: Apart::new(self, tokens, false)?,
            input_gates: some(c.layer_inputs.unwrap_or(0), self.size())?,
            given_input: given.clone(),
            last: None,
            aside: self.aside(tokens)?,
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
        (self.config.norms.after())
            .then(|| self.device.allocate(bytes))
            .transpose()
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

    /// The residual stream after the last layer is left in `pass.x`. `kept` says what a layer leaves beside the pass.
    pub(super) fn forward<'k>(
        &self,
        shape: &Shape,
        tokens: &[u32],
        pass: &Pass,
        kept: impl Fn(usize) -> Option<Kept<'k>>,
    ) -> Result<()> {
        assert_eq!(shape.tokens, tokens.len());
        let tokens = self.device.buffer_of(tokens)?;
        self.begin(&tokens, shape.tokens, &pass.x, pass)?;
        for i in 0..self.layers.len() {
            self.mix(i, shape, pass, kept(i))?;
            self.finish(i, shape.tokens, pass)?;
        }
        Ok(())
    }

    /// Attention of layer `i`, or what stands in its place: from `pass.x` to `pass.attention`.
    pub(super) fn mix(
        &self,
        i: usize,
        shape: &Shape,
        pass: &Pass,
        kept: Option<Kept>,
    ) -> Result<()> {
        let count = shape.tokens;
        if let Some(recurrent) = &self.layers[i].recurrent {
            self.project_raw(i, count, pass)?;
            return self.recur(recurrent, shape, pass, kept);
        }
        let cache = match kept {
            Some(Kept::Keys(cache)) => Some(cache),
            _ => None,
        };
        self.project_rows(i, count, &shape.positions, &shape.rotary, pass, cache)?;
        self.lend(i, count, pass)?;
        self.attend(i, shape, pass)
    }

    /// The fused projection of layer `i`, of which `pass.x` is the input, its bias left out: where that is to be kept or has
    /// gates, else in the place of `pass.qkv`.
    pub(super) fn project_raw<'p>(
        &self,
        i: usize,
        count: usize,
        pass: &'p Pass,
    ) -> Result<&'p Buffer> {
        let layer = &self.layers[i];
        let norm = layer.norms.before_attention.as_ref();
        self.read(&pass.x, norm, count, &pass.normed)?;
        let raw = match self.config.qk_norm {
            Some(QkNorm::Rows | QkNorm::Apart) => &pass.qkv,
            _ => pass.qkv_raw.as_ref().unwrap_or(&pass.qkv),
        };
        self.product(&layer.qkv, &pass.normed, raw, count, pass)?;
        Ok(raw)
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
        let raw = self.project_raw(i, count, pass)?;
        let mut bias = layer.qkv.bias.as_ref();
        if self.config.attention_gate
            && let Some(bias) = bias.take()
        {
            self.bias(&self.kernels.add_bias, raw, bias, count, layer.qkv.rows)?; // gates have one, too
        }
        let norms = layer.head_norms(self.config.qk_norm);
        if let Some(QkNorm::Rows | QkNorm::Apart) = self.config.qk_norm {
            self.norm_queries_and_keys(i, bias.take(), count, pass)?;
        }
        let (cos, sin, queries) = rotary.of(i);
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
                norms[0],
                norms[1],
                eps,
                cos,
                sin,
                queries,
                i32::from(self.config.qk_norm == Some(QkNorm::Turned)),
                values_of(layer.fused, self.config.values_normed),
                positions,
                cache,
                cache_rows,
                count as i32,
                heads.query as i32,
                heads.kv as i32,
                heads.dim as i32,
                self.gates_between(i) as i32,
            ],
        )
    }

    /// Elements of gates between the queries and the keys of layer `i`.
    pub(super) fn gates_between(&self, i: usize) -> usize {
        match self.config.attention_gate {
            true => self.heads(i).q_width(),
            false => 0,
        }
    }

    /// The parts of a row of layer `i` that are normed before the rotation, queries' and keys', and how.
    pub(super) fn normed_parts(&self, i: usize) -> ([NormedParts; 2], norm::Kind) {
        let (c, heads) = (&self.config, self.heads(i));
        let (q, kv) = (heads.q_width(), heads.kv_width());
        let ([query, key], kind) = match c.qk_norm {
            Some(QkNorm::Apart) => ([(heads.query, heads.dim), (heads.kv, heads.dim)], c.norm()),
            _ => ([(1, q), (1, kv)], c.rms_norm()),
        };
        let part = |first, (parts, width)| NormedParts {
            first,
            parts,
            width,
        };
        ([part(0, query), part(q, key)], kind)
    }

    /// All queries of a token normed as one row in `pass.qkv`, or each head, and all keys; `pass.qkv_raw` keeps them as they were
    /// before.
    fn norm_queries_and_keys(
        &self,
        i: usize,
        bias: Option<&Buffer>,
        count: usize,
        pass: &Pass,
    ) -> Result<()> {
        let stride = self.heads(i).qkv_width();
        if let Some(bias) = bias {
            self.bias(&self.kernels.add_bias, &pass.qkv, bias, count, stride)?;
        }
        if let Some(raw) = &pass.qkv_raw {
            raw.copy_from(&pass.qkv, raw.bytes())?;
        }
        let (parts, kind) = self.normed_parts(i);
        for (part, weight) in parts.into_iter().zip(self.layers[i].qk_norms()) {
            let NormedParts {
                first,
                parts,
                width,
            } = part;
            self.device.launch(
                &self.kernels.of_format("rms_norm_part"),
                Launch::plane(count.div_ceil(norm_rows(width)), parts, THREADS),
                args![
                    pass.qkv.element(first, self.size()),
                    weight,
                    norm_kind(kind),
                    count as i32,
                    width as i32,
                    stride as i32,
                ],
            )?;
        }
        Ok(())
    }

    /// Attention of layer `i`: from `pass.qkv` to `pass.attention` and `pass.lse`, its gates from `pass.qkv_raw`.
    pub fn attend(&self, i: usize, shape: &Shape, pass: &Pass) -> Result<()> {
        let heads = self.heads(i);
        self.device.launch(
            &self.kernels.of_heads("attention", heads),
            self.attention_launches(i).forward(shape.tile_count),
            args![
                &pass.qkv,
                pass.read.as_ref().unwrap_or(&pass.attention),
                &pass.lse,
                &shape.tiles,
                self.layers[i].sinks.as_ref(),
                heads.query as i32,
                heads.kv as i32,
                heads.dim as i32,
                heads.window.unwrap_or(0) as i32,
                Arg::plain(Scores::of(heads)),
            ],
        )?;
        self.gate(i, shape.tokens, pass)
    }

    /// Gated attention: from `pass.read` to `pass.attention`. Nothing where layer `i` has no gates.
    pub(super) fn gate(&self, i: usize, count: usize, pass: &Pass) -> Result<()> {
        let (Some(raw), Some(read), true) = (&pass.qkv_raw, &pass.read, self.config.attention_gate)
        else {
            return Ok(());
        };
        let (width, stride) = (self.heads(i).q_width(), self.layers[i].qkv.rows);
        self.device.launch(
            &self.kernels.of_format("gate"),
            Launch::plane(count, width.div_ceil(1024), THREADS),
            args![
                read,
                raw.element(width, self.size()),
                &pass.attention,
                width as i32,
                stride as i32,
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
        let norms = &layer.norms;
        let gate_up = match &layer.mlp {
            Mlp::One(mlp) => &mlp.gate_up,
            Mlp::Experts(mixture) => return self.send_to_experts(norms, mixture, count, pass),
        };
        if !self.config.is_parallel() {
            // (Else that is what attention read, and there still.)
            self.read(&pass.x, norms.before_mlp.as_ref(), count, &pass.normed)?;
        }
        self.product(gate_up, &pass.normed, &pass.gate_up, count, pass)?;
        match &gate_up.bias {
            Some(bias) => {
                let rows = &pass.gate_up;
                self.bias(&self.kernels.add_bias, rows, bias, count, gate_up.rows)
            }
            None => Ok(()),
        }
    }

    /// The residual stream `x` gains the MLP of `pass.gate_up`.
    pub(super) fn narrow(&self, i: usize, count: usize, pass: &Pass, x: &Buffer) -> Result<()> {
        let given = pass.down.as_ref();
        self.give_mlp(i, count, pass, x)?;
        self.gain(&self.layers[i].norms.after_mlp, given, x, count)?;
        self.take_input(i, count, pass, x)
    }

    /// What the MLP's inner activation is stored times: in half precision its largest numbers would not be far from the end of
    /// the range (3,000 of 65,504 in SmolLM2).
    pub(super) fn inner_scale(&self) -> f32 {
        match self.precision {
            Precision::F32 | Precision::Bf16 => 1.0,
            Precision::F16 => 1.0 / 64.0,
        }
    }

    /// The MLP of `pass.gate_up`: `pass.down`, where there is a norm after it; else the residual stream `x` gains it.
    pub(super) fn give_mlp(&self, i: usize, count: usize, pass: &Pass, x: &Buffer) -> Result<()> {
        let scale = 1.0 / self.inner_scale();
        let layer = &self.layers[i];
        let down = match &layer.mlp {
            Mlp::One(mlp) => &mlp.down,
            Mlp::Experts(mixture) => {
                self.experts_inner(mixture, count, pass)?;
                return self.mix_experts(&layer.norms, mixture, count, pass, (x, scale));
            }
        };
        self.inner((&pass.gate_up, &pass.inner), count, down.cols)?;
        self.give(
            down,
            (&pass.inner, scale),
            pass.down.as_ref(),
            x,
            count,
            pass,
        )
    }

    /// The inner activation of so many rows of an MLP of such a width.
    pub(super) fn inner(
        &self,
        (gate_up, inner): (&Buffer, &Buffer),
        rows: usize,
        ffn: usize,
    ) -> Result<()> {
        self.device.launch(
            &self.kernels.activation,
            Launch::plane(rows, ffn.div_ceil(1024), THREADS),
            args![gate_up, inner, ffn as i32, self.curve(), self.inner_scale()],
        )
    }

    /// The activation, as kernels take it.
    pub(super) fn curve(&self) -> Arg {
        Arg::plain(self.config.activation.curve())
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
        self.norm_by(&self.kernels.rms_norm, (x, rows), weight, count, out)
    }

    /// The same by the kernel of some format, which `out` is in.
    pub(super) fn norm_by(
        &self,
        kernel: &str,
        (x, rows): (&Buffer, Option<&Buffer>),
        weight: &Buffer,
        count: usize,
        out: &Buffer,
    ) -> Result<()> {
        let (kind, width) = (norm_kind(self.config.norm()), self.config.hidden as i32);
        self.device.launch(
            kernel,
            Launch::row(count.div_ceil(norm_rows(self.config.hidden)), THREADS),
            args![x, rows, weight, kind, out, count as i32, width],
        )
    }

    /// y = x·Wᵀ; the bias is left to whoever comes next.
    pub(super) fn product(
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
    pub(super) fn give(
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
    pub(super) fn gain(
        &self,
        norm: &Option<Buffer>,
        given: Option<&Buffer>,
        stream: &Buffer,
        count: usize,
    ) -> Result<()> {
        let (Some(norm), Some(given)) = (norm, given) else {
            return Ok(());
        };
        let sizes = (count, self.config.hidden);
        self.norm_add((norm, self.config.norm()), given, stream, sizes)
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

    pub(super) fn bias(
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
