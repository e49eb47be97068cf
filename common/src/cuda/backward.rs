//! The backward pass through the layers on the device: as `model/backward.rs`, kernel by kernel.

use super::args;
use super::batch::Shape;
use super::decoder::{Decoder, Linear, Mlp, OneMlp};
use super::delta_backward::DeltaRoom;
use super::device::{Address, Arg, Buffer, Form, Launch, Operand, Precision, Product};
use super::experts::OnTheWay;
use super::inputs::AsideGradients;
use super::launches::{Scores, THREADS, head_lanes, norm_kind, norm_rows, values_of};
use super::pass::{NormedParts, Pass, Widths};
use super::recurrent;
use crate::kernels::norm;
use crate::model::{Matrix, MlpParams, Params, Span};
use crate::weights::{Config, Fused, QkNorm};
use anyhow::Result;

/// Where a backward pass adds gradients.
#[derive(Clone, Copy)]
pub struct Gradients<'a> {
    /// The flat buffer, float32.
    pub flat: &'a Buffer,
    /// Where the model's parameters lie.
    pub params: &'a Params,
    /// Whether the buffer is of the adapters alone; else it is of all parameters.
    pub adapters: bool,
}

impl Gradients<'_> {
    /// The place of a span, or none where it is not trained.
    pub fn span(&self, span: &Span) -> Option<Address> {
        let at = || self.flat.element(span.range.start, size_of::<f32>());
        (!self.adapters).then(at)
    }
}

/// What a layer left behind on its way forward.
pub struct LayerState {
    /// Its input, the residual stream.
    pub x: Buffer,
    /// All of its activations (the stream in them is that after attention), or none: then they are made again.
    pub pass: Option<Pass>,
}

/// The most blocks of `rms_norm_backward` and of `qkv_rope_backward`, each with its part of the weights' gradients.
pub(super) const NORM_BLOCKS: usize = 264;
const HEAD_NORM_BLOCKS: usize = 1056;
/// Rows of a part of a bias's gradient.
const BIAS_ROWS: usize = 64;

/// A backward pass on its way.
pub(super) struct Backward<'a> {
    pub decoder: &'a Decoder,
    pub gradients: Gradients<'a>,
    pub shape: &'a Shape,
    /// The gradient of the residual stream, `[T, hidden]`, float32.
    pub dx: Buffer,
    /// The same in bfloat16, where that is multiplied.
    pub dx_copy: Option<Buffer>,
    /// The gradient of what a sublayer gave, where there is a norm after it.
    pub d_given: Option<Buffer>,
    pub d_qkv: Buffer,
    /// That of the fused projection, where it has gates; else `d_qkv` is.
    pub d_raw: Option<Buffer>,
    pub d_attention: Buffer,
    /// What each query head adds to the gradients of its key and value, `[T, heads, 2, dim]`, float32.
    d_heads: Buffer,
    /// Σ dO∘O of each row and head.
    delta: Buffer,
    /// Parts of sums.
    pub partial: Buffer,
    /// What the way through linear attention needs.
    pub delta_room: Option<DeltaRoom>,
    /// What the way through a mixture of experts needs.
    pub experts: Option<OnTheWay>,
    /// Of what layers take in beside the stream.
    pub aside: AsideGradients,
}

/// A linear map of what is read of the residual stream, its place among the parameters, and the gradient of what it gives.
pub(super) type Reader<'a> = (&'a Linear, &'a Matrix, Operand);

/// A norm whose gradient is wanted.
pub(super) struct Norm<'a> {
    pub x: &'a Buffer,
    /// Those of its rows that were normed, in this order; none for all.
    pub rows: Option<&'a Buffer>,
    pub count: usize,
    pub weight: &'a Buffer,
    pub span: &'a Span,
    pub dy: &'a Buffer,
}

impl<'a> Backward<'a> {
    /// `targets` may be more than the rows of the batch: a prompt's last row predicts once for each response.
    pub fn new(
        decoder: &'a Decoder,
        gradients: Gradients<'a>,
        shape: &'a Shape,
        targets: usize,
    ) -> Result<Self> {
        let (count, widths) = (shape.tokens, decoder.widths());
        let (size, hidden) = (decoder.size(), decoder.config.hidden);
        let rows = |width: usize, size: usize| decoder.device.allocate(count * width * size);
        let dx = rows(hidden, size_of::<f32>())?;
        dx.clear()?;
        Ok(Self {
            dx,
            dx_copy: match (decoder.precision, decoder.config.norms.after()) {
                (Precision::Bf16, false) => Some(rows(hidden, size)?),
                _ => None,
            },
            d_given: (decoder.config.norms.after())
                .then(|| rows(hidden, size))
                .transpose()?,
            d_qkv: rows(widths.qkv, size)?,
            d_raw: match widths.gated {
                0 => None,
                width => Some(rows(width, size)?),
            },
            d_attention: rows(widths.attention, size)?,
            d_heads: rows(
                2 * decoder.config.heads * decoder.config.widest_head(),
                size_of::<f32>(),
            )?,
            delta: rows(decoder.config.heads, size_of::<f32>())?,
            partial: (decoder.device)
                .allocate(partial_bytes(&decoder.config, count.max(targets)))?,
            delta_room: DeltaRoom::new(decoder, count, shape.walks.as_ref())?,
            experts: OnTheWay::new(decoder, count)?,
            aside: AsideGradients::new(decoder, count)?,
            decoder,
            gradients,
            shape,
        })
    }

    /// Through layer `i`, whose activations `pass` has: turns the gradient of its output in `dx` into that of its input.
    pub fn layer(&self, i: usize, x: &Buffer, pass: &Pass) -> Result<()> {
        self.input(i, pass)?;
        self.mlp(i, pass)?;
        self.attention(i, x, pass)
    }

    /// next = middle + norm(down(act(gate_up(norm(middle))))). `pass.gate_up` becomes its gradient.
    fn mlp(&self, i: usize, pass: &Pass) -> Result<()> {
        let (layer, places) = (&self.decoder.layers[i], &self.gradients.params.layers[i]);
        let mlp = match &layer.mlp {
            Mlp::One(mlp) => (mlp, places.mlp()),
            Mlp::Experts(mixture) => return self.mixture(i, mixture, pass),
        };
        let (weight, span) = (&layer.norms.after_mlp, &places.norms.after_mlp);
        let norm = (weight.as_ref(), span.as_ref());
        let kind = self.decoder.config.norm();
        let dy = self.given(norm, kind, pass.down.as_ref())?;
        self.one_mlp(i, mlp, (&pass.gate_up, &pass.inner), dy, pass)
    }

    /// An MLP of layer `i` alone, given the gradient of what it gave. `gate_up` becomes its gradient. (That of what attention read,
    /// too, is left to [`Self::attention`].)
    pub(super) fn one_mlp(
        &self,
        i: usize,
        (OneMlp { gate_up, down }, places): (&OneMlp, &MlpParams),
        (made, inner): (&Buffer, &Buffer),
        dy: Operand,
        pass: &Pass,
    ) -> Result<()> {
        let (decoder, ffn) = (self.decoder, down.cols);
        self.input_gradient(down, dy, inner, pass)?;
        decoder.device.launch(
            &decoder.kernels.of_format("activation_backward"),
            Launch::plane(self.shape.tokens, ffn.div_ceil(1024), THREADS),
            args![made, inner, inner, ffn as i32, decoder.curve()],
        )?;
        self.weight_gradient(down, &places.down, inner, dy, pass)?;
        self.given_bias_gradient(&places.down)?;
        self.bias_gradient(&places.gate_up, made, decoder.precision)?;
        if decoder.config.is_parallel() {
            return Ok(());
        }
        let norms = &self.gradients.params.layers[i].norms;
        self.read(
            &[(gate_up, &places.gate_up, self.operand(made, 2 * ffn))],
            (&decoder.layers[i].norms.before_mlp, &norms.before_mlp),
            &pass.x,
            pass,
        )
    }

    /// middle = x + norm(output(attention(rotate(qkv(norm(x)))))), or what stands in its place. The MLP's part of the gradient of `x`
    /// is made here where it read the same.
    fn attention(&self, i: usize, x: &Buffer, pass: &Pass) -> Result<()> {
        let (layer, places) = (&self.decoder.layers[i], &self.gradients.params.layers[i]);
        let (weight, span) = (&layer.norms.after_attention, &places.norms.after_attention);
        let norm = (weight.as_ref(), span.as_ref());
        let kind = self.decoder.config.norm();
        let dy = self.given(norm, kind, pass.output.as_ref())?;
        self.input_gradient(&layer.output, dy, &self.d_attention, pass)?;
        self.weight_gradient(&layer.output, &places.output, &pass.attention, dy, pass)?;
        self.given_bias_gradient(&places.output)?;
        match (&layer.recurrent, &places.recurrent) {
            (Some(recurrent), Some(places)) => self.recur(recurrent, places, pass)?,
            _ => {
                self.gate(i, pass)?;
                self.attend(i, pass)?;
                self.lend(i)?;
                self.rotate(i, pass)?;
                self.norm_queries_and_keys(i, pass)?;
                self.spread(i)?;
            }
        }
        let d_raw = self.d_raw.as_ref().unwrap_or(&self.d_qkv);
        let dy = self.operand(d_raw, layer.qkv.rows);
        let mut readers = vec![(&layer.qkv, &places.qkv, dy)];
        if let (Mlp::One(mlp), true) = (&layer.mlp, self.decoder.config.is_parallel()) {
            let dy = self.operand(&pass.gate_up, mlp.gate_up.rows);
            readers.push((&mlp.gate_up, &places.mlp().gate_up, dy));
        }
        self.read(
            &readers,
            (
                &layer.norms.before_attention,
                &places.norms.before_attention,
            ),
            x,
            pass,
        )?;
        self.bias_gradient(&places.qkv, d_raw, self.decoder.precision)
    }

    /// Back through the gates of attention, where there are some: `d_attention` becomes the gradient of what it gave, and `d_raw`
    /// gets theirs.
    fn gate(&self, i: usize, pass: &Pass) -> Result<()> {
        let (decoder, count) = (self.decoder, self.shape.tokens);
        let (Some(raw), Some(read), Some(d_raw), true) = (
            &pass.qkv_raw,
            &pass.read,
            &self.d_raw,
            decoder.config.attention_gate,
        ) else {
            return Ok(());
        };
        let (width, stride) = (decoder.heads(i).q_width(), decoder.layers[i].qkv.rows);
        decoder.device.launch(
            &decoder.kernels.of_format("gate_backward"),
            Launch::plane(count, width.div_ceil(1024), THREADS),
            args![
                read,
                raw.element(width, decoder.size()),
                &self.d_attention,
                d_raw.element(width, decoder.size()),
                width as i32,
                stride as i32,
            ],
        )
    }

    /// The gradients of queries, keys and values go to `d_raw`, as far as the fused projection has them, around those of gates.
    fn spread(&self, i: usize) -> Result<()> {
        let Some(d_raw) = &self.d_raw else {
            return Ok(());
        };
        let (decoder, heads) = (self.decoder, self.decoder.heads(i));
        let layer = &decoder.layers[i];
        if layer.fused != Fused::Gated {
            let (from, to) = (self.d_qkv.address(), d_raw.address());
            let (stride, width) = (heads.qkv_width(), layer.qkv.rows);
            return decoder.copy_columns((from, stride), (to, width), width, self.shape.tokens);
        }
        decoder.device.launch(
            &decoder.kernels.of_format("spread_qkv"),
            Launch::plane(self.shape.tokens, heads.qkv_width().div_ceil(1024), THREADS),
            args![
                &self.d_qkv,
                d_raw,
                heads.q_width() as i32,
                heads.qkv_width() as i32,
                decoder.gates_between(i) as i32,
            ],
        )
    }

    /// The gradient of what a sublayer gave, as it is multiplied: that of the residual stream, or, where there is a norm after
    /// it, what that makes of it.
    pub(super) fn given(
        &self,
        (weight, span): (Option<&Buffer>, Option<&Span>),
        kind: norm::Kind,
        given: Option<&Buffer>,
    ) -> Result<Operand> {
        let (Some(weight), Some(span), Some(given), Some(d_given)) =
            (weight, span, given, &self.d_given)
        else {
            return Ok(self.dy());
        };
        let to = self.operand(d_given, self.decoder.config.hidden);
        let rows = self.shape.tokens;
        self.norm_given((weight, span), kind, (given, &self.dx), to, rows)?;
        Ok(to)
    }

    /// The gradient of what was `given`, so many rows, given that of what gained its norm, `dy`, float32.
    pub(super) fn norm_given(
        &self,
        (weight, span): (&Buffer, &Span),
        kind: norm::Kind,
        (given, dy): (&Buffer, &Buffer),
        to: Operand,
        count: usize,
    ) -> Result<()> {
        let width = to.stride;
        let blocks = count.min(NORM_BLOCKS);
        let wanted = self.gradients.span(span);
        self.decoder.device.launch(
            &format!("rms_norm_add_backward_{}", to.precision.name()),
            norm_launch((blocks, 1), width),
            args![
                given,
                weight,
                norm_kind(kind),
                dy,
                to.at,
                wanted.map(|_| &self.partial),
                count as i32,
                width as i32,
            ],
        )?;
        match wanted {
            Some(to) => self.add_partial(blocks, width, to),
            None => Ok(()),
        }
    }

    /// That of the bias of what [`Self::given`] was last asked about.
    fn given_bias_gradient(&self, matrix: &Matrix) -> Result<()> {
        match &self.d_given {
            Some(d_given) => self.bias_gradient(matrix, d_given, self.decoder.precision),
            None => self.bias_gradient(matrix, &self.dx, Precision::F32),
        }
    }

    /// From the gradient of attention's result to `d_qkv`, that of what it read.
    fn attend(&self, i: usize, pass: &Pass) -> Result<()> {
        let (device, kernels) = (&self.decoder.device, &self.decoder.kernels);
        let (heads, launches) = (self.decoder.heads(i), self.decoder.attention_launches(i));
        let (query, kv, dim) = (heads.query as i32, heads.kv as i32, heads.dim as i32);
        let window = heads.window.unwrap_or(0) as i32;
        device.launch(
            &kernels.of_heads("attention_backward_q", heads),
            launches.to_queries(self.shape.tile_count),
            args![
                &pass.qkv,
                pass.read.as_ref().unwrap_or(&pass.attention),
                &pass.lse,
                &self.d_attention,
                &self.delta,
                &self.d_qkv,
                &self.shape.tiles,
                query,
                kv,
                dim,
                window,
                Arg::plain(Scores::of(heads)),
            ],
        )?;
        self.sinks(i, pass)?;
        device.launch(
            &kernels.of_heads("attention_backward_kv", heads),
            launches.to_keys(self.shape.tile_count),
            args![
                &pass.qkv,
                &pass.lse,
                &self.d_attention,
                &self.delta,
                &self.shape.positions,
                &self.d_heads,
                &self.shape.tiles,
                query,
                kv,
                dim,
                window,
                Arg::plain(Scores::of(heads)),
            ],
        )?;
        let count = self.shape.tokens;
        device.launch(
            &kernels.of_format("sum_heads"),
            Launch::row((count * heads.kv_width()).div_ceil(THREADS), THREADS),
            args![&self.d_heads, &self.d_qkv, count as i32, query, kv, dim],
        )
    }

    /// The gradient of what stands beside scores in layer `i`, where something does, given `delta`.
    fn sinks(&self, i: usize, pass: &Pass) -> Result<()> {
        let (layer, places) = (&self.decoder.layers[i], &self.gradients.params.layers[i]);
        let wanted = places
            .sinks
            .as_ref()
            .and_then(|span| self.gradients.span(span));
        let (Some(sinks), Some(to)) = (&layer.sinks, wanted) else {
            return Ok(());
        };
        let (count, query) = (self.shape.tokens as i32, layer.heads.query);
        self.decoder.device.launch(
            "sink_gradient",
            Launch::row(query, THREADS),
            args![sinks, &pass.lse, &self.delta, to, count, query as i32],
        )
    }

    /// Back through rotation and head norms: `d_qkv` becomes the gradient of what they were made of.
    fn rotate(&self, i: usize, pass: &Pass) -> Result<()> {
        let (layer, places) = (&self.decoder.layers[i], &self.gradients.params.layers[i]);
        let (heads, count) = (self.decoder.heads(i), self.shape.tokens);
        let blocks = count.min(HEAD_NORM_BLOCKS);
        let qk_norm = self.decoder.config.qk_norm;
        let by_heads = qk_norm.is_some_and(QkNorm::by_heads);
        let norms = layer.head_norms(qk_norm);
        let shared = match norms {
            [0, 0] => 0,
            _ => 512 / head_lanes(heads.dim) * heads.dim * size_of::<f32>(),
        };
        // Both lie side by side, as the kernel sums them.
        let wanted = places.q_norm.as_ref().filter(|_| by_heads);
        let wanted = wanted.and_then(|q| self.gradients.span(q));
        let partial = wanted.map(|_| &self.partial);
        let (cos, sin, queries) = self.shape.rotary.of(i);
        let gated = self.decoder.config.attention_gate; // then the bias is in what is kept
        self.decoder.device.launch(
            &self.decoder.kernels.of_format("qkv_rope_backward"),
            Launch::row(blocks, THREADS).shared(shared),
            args![
                pass.qkv_raw.as_ref().unwrap_or(&pass.qkv),
                &self.d_qkv,
                layer.qkv.bias.as_ref().filter(|_| !gated),
                norms[0],
                norms[1],
                self.decoder.config.norm_eps,
                cos,
                sin,
                queries,
                i32::from(qk_norm == Some(QkNorm::Turned)),
                values_of(layer.fused, self.decoder.config.values_normed),
                &self.shape.positions,
                partial,
                count as i32,
                heads.query as i32,
                heads.kv as i32,
                heads.dim as i32,
                self.decoder.gates_between(i) as i32,
            ],
        )?;
        match wanted {
            Some(to) => {
                let each = norms.iter().filter(|&&norm| norm != 0).count();
                self.add_partial(blocks, each * heads.dim, to)
            }
            None => Ok(()),
        }
    }

    /// Back through the norms of all queries of a token and of all its keys, or of each head, where the family has those.
    fn norm_queries_and_keys(&self, i: usize, pass: &Pass) -> Result<()> {
        let (layer, places) = (&self.decoder.layers[i], &self.gradients.params.layers[i]);
        let (stride, count) = (self.decoder.heads(i).qkv_width(), self.shape.tokens);
        let how = self.decoder.config.qk_norm;
        let (Some(raw), Some(QkNorm::Rows | QkNorm::Apart)) = (&pass.qkv_raw, how) else {
            return Ok(());
        };
        let (size, blocks) = (self.decoder.size(), count.min(NORM_BLOCKS));
        let (parts, kind) = self.decoder.normed_parts(i);
        let norms = layer.qk_norms().zip([&places.q_norm, &places.k_norm]);
        for (part, (weight, span)) in parts.into_iter().zip(norms) {
            let NormedParts {
                first,
                parts,
                width,
            } = part;
            let wanted = span.as_ref().and_then(|span| self.gradients.span(span));
            self.decoder.device.launch(
                &self.decoder.kernels.of_format("rms_norm_part_backward"),
                norm_launch((blocks, parts), width),
                args![
                    raw.element(first, size),
                    weight,
                    norm_kind(kind),
                    self.d_qkv.element(first, size),
                    wanted.map(|_| &self.partial),
                    count as i32,
                    width as i32,
                    stride as i32,
                ],
            )?;
            if let Some(to) = wanted {
                self.add_partial(blocks, parts * width, to)?;
            }
        }
        Ok(())
    }

    /// y = linear(norm(x)) of each of these maps, the norm where there is one: adds the gradients of all, and to `dx` what x gains.
    pub(super) fn read(
        &self,
        readers: &[Reader],
        (weight, span): (&Option<Buffer>, &Option<Span>),
        x: &Buffer,
        pass: &Pass,
    ) -> Result<()> {
        let (count, hidden) = (self.shape.tokens, self.decoder.config.hidden);
        self.decoder.read(x, weight.as_ref(), count, &pass.normed)?;
        for &(linear, matrix, dy) in readers {
            self.weight_gradient(linear, matrix, &pass.normed, dy, pass)?;
        }
        let (to, mut keep) = match weight {
            Some(_) => (self.operand(&pass.normed, hidden), 0.0),
            None => (self.dx.rows(0, hidden, Precision::F32), 1.0),
        };
        for &(linear, _, dy) in readers {
            self.add_input_gradient(linear, dy, to, keep, pass)?;
            keep = 1.0;
        }
        let (Some(weight), Some(span)) = (weight, span) else {
            return Ok(());
        };
        let norm = Norm {
            x,
            rows: None,
            count,
            weight,
            span,
            dy: &pass.normed,
        };
        self.norm(&norm, &self.dx, self.dx_copy.as_ref(), true)
    }

    /// Adds to (or sets) `dx` what a norm's input gains, and leaves a copy of it in the decoder's format, where wanted.
    pub fn norm(&self, norm: &Norm, dx: &Buffer, copy: Option<&Buffer>, add: bool) -> Result<()> {
        let width = self.decoder.config.hidden;
        let blocks = norm.count.min(NORM_BLOCKS);
        let wanted = self.gradients.span(norm.span);
        self.decoder.device.launch(
            &self.decoder.kernels.of_format("rms_norm_backward"),
            norm_launch((blocks, 1), width),
            args![
                norm.x,
                norm.rows,
                norm.weight,
                norm_kind(self.decoder.config.norm()),
                norm.dy,
                dx,
                copy,
                wanted.map(|_| &self.partial),
                norm.count as i32,
                width as i32,
                i32::from(add),
            ],
        )?;
        match wanted {
            Some(to) => self.add_partial(blocks, width, to),
            None => Ok(()),
        }
    }

    /// The copy of `dx` that is multiplied, made anew: after `dx` was set from outside.
    pub fn copy_dx(&self) -> Result<()> {
        let Some(copy) = &self.dx_copy else {
            return Ok(());
        };
        let n = self.shape.tokens * self.decoder.config.hidden;
        self.decoder.device.launch(
            "round_bf16",
            super::optimizer::elements(n),
            args![&self.dx, copy, n as u64, 0u64, 0],
        )
    }

    /// The gradient of the residual stream as it is multiplied.
    fn dy(&self) -> Operand {
        let dx = self.dx_copy.as_ref().unwrap_or(&self.dx);
        self.operand(dx, self.decoder.config.hidden)
    }

    pub fn operand(&self, buffer: &Buffer, cols: usize) -> Operand {
        buffer.rows(0, cols, self.decoder.precision)
    }

    /// For y = x·Wᵀ: sets `dx` `[T, in]` to dy·W.
    pub fn input_gradient(
        &self,
        linear: &Linear,
        dy: Operand,
        dx: &Buffer,
        pass: &Pass,
    ) -> Result<()> {
        let dx = self.operand(dx, linear.cols);
        self.add_input_gradient(linear, dy, dx, 0.0, pass)
    }

    /// dx = `keep`·dx + dy·W.
    pub fn add_input_gradient(
        &self,
        linear: &Linear,
        dy: Operand,
        dx: Operand,
        keep: f32,
        pass: &Pass,
    ) -> Result<()> {
        let (device, count) = (&self.decoder.device, self.shape.tokens);
        device.multiply(Product {
            form: Form::RowsByColumns,
            m: count,
            n: linear.cols,
            k: linear.rows,
            a: dy,
            b: self.operand(&linear.weight, linear.cols),
            c: dx,
            scale: 1.0,
            keep,
        })?;
        for adapter in &linear.adapters {
            let between = pass.low_rank.as_ref().expect("made with the adapters");
            adapter.add_input_gradient(device, dy, dx, count, between)?;
        }
        Ok(())
    }

    /// For y = x·Wᵀ: adds dyᵀ·x to the weight's gradient, or the like to the adapters'.
    pub fn weight_gradient(
        &self,
        linear: &Linear,
        matrix: &Matrix,
        x: &Buffer,
        dy: Operand,
        pass: &Pass,
    ) -> Result<()> {
        let (device, count) = (&self.decoder.device, self.shape.tokens);
        let x = self.operand(x, linear.cols);
        for adapter in &linear.adapters {
            let between = pass.low_rank.as_ref().expect("made with the adapters");
            adapter.add_gradient(device, x, dy, self.gradients.flat, count, between)?;
        }
        let Some(at) = self.gradients.span(&matrix.weight) else {
            return Ok(());
        };
        device.multiply(Product {
            form: Form::ColumnsByColumns,
            m: linear.rows,
            n: linear.cols,
            k: count,
            a: dy,
            b: x,
            c: Operand {
                at,
                precision: Precision::F32,
                stride: linear.cols,
            },
            scale: 1.0,
            keep: 1.0,
        })
    }

    /// For y = x·Wᵀ + b: adds Σ dy to the bias's gradient, where there is one.
    pub(super) fn bias_gradient(
        &self,
        matrix: &Matrix,
        dy: &Buffer,
        format: Precision,
    ) -> Result<()> {
        let wanted = matrix.bias.as_ref().and_then(|b| self.gradients.span(b));
        let Some(to) = wanted else {
            return Ok(());
        };
        let (count, width) = (self.shape.tokens, matrix.rows);
        let parts = count.div_ceil(BIAS_ROWS);
        self.decoder.device.launch(
            &format!("sum_columns_{}", format.name()),
            Launch::plane(width.div_ceil(32), parts, THREADS),
            args![dy, &self.partial, count as i32, width as i32, 0],
        )?;
        self.add_partial(parts, width, to)
    }

    /// Adds the sum of partial results to a gradient.
    pub fn add_partial(&self, parts: usize, width: usize, to: Address) -> Result<()> {
        self.decoder.device.launch(
            "sum_columns_f32",
            Launch::row(width.div_ceil(32), THREADS),
            args![&self.partial, to, parts as i32, width as i32, 1],
        )
    }
}

/// A norm that is there, and its place among the parameters.
pub(super) fn norm_at<'a>(
    weight: &'a Option<Buffer>,
    span: &'a Option<Span>,
) -> (&'a Buffer, &'a Span) {
    let norm = weight.as_ref().zip(span.as_ref());
    norm.expect("the layer has the norm")
}

/// The gradient of a norm over so many parts of rows, of such a width, each by so many blocks.
fn norm_launch((blocks, parts): (usize, usize), width: usize) -> Launch {
    Launch::plane(blocks, parts, THREADS).shared(norm_rows(width) * width * size_of::<f32>())
}

/// What partial sums over at most so many rows take, whichever needs most.
pub(super) fn partial_bytes(config: &Config, count: usize) -> usize {
    let mut most = count.min(NORM_BLOCKS) * config.hidden;
    match config.qk_norm {
        None => {}
        Some(QkNorm::Heads | QkNorm::Turned) => {
            most = most.max(count.min(HEAD_NORM_BLOCKS) * 2 * config.widest_head());
        }
        Some(QkNorm::Rows | QkNorm::Apart) => {
            most = most.max(count.min(NORM_BLOCKS) * config.heads * config.widest_head());
        }
    }
    most = most.max(AsideGradients::partial_elements(config, count));
    most = most.max(recurrent::partial_elements(config, count));
    let widths = Widths::new(config);
    let qkv = widths.gated.max(widths.qkv);
    for (has, width) in [
        (config.qkv_bias, qkv),
        (config.o_bias, config.hidden),
        (config.mlp_bias, (2 * config.ffn).max(config.hidden)),
    ] {
        if has {
            most = most.max(count.div_ceil(BIAS_ROWS) * width);
        }
    }
    most * size_of::<f32>()
}
