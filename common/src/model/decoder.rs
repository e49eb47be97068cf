//! The forward pass: attention with rotary positions and a gated MLP on a residual stream, with norms where the family has
//! them.

use super::experts::Routes;
use super::layer_inputs::{Inputs, LayerInput};
use super::lora::Lora;
use super::params::{LayerNorms, LayerParams, Matrix, MlpParams, Params, Source, Span};
use super::recurrent::Recurrent;
use super::rotations::Rotations;
use crate::kernels::attention;
use crate::kernels::gemm::{Left, Mat, Packed, Precision, Threads, Write, matmul, matmul_made};
use crate::kernels::layout::{Heads, Layout};
use crate::kernels::{activation, copy, fit, norm, rows, scale};
use crate::weights::{Config, Fused};
use anyhow::Result;
use std::collections::BTreeMap;

/// A model ready to run: its weights packed for the matrix products.
pub struct Decoder {
    /// Its shape.
    pub config: Config,
    /// The number format of the products' operands.
    pub precision: Precision,
    embedding: Packed,
    head: Option<Packed>,
    pub(super) layers: Vec<Layer>,
    pub(super) norm: Vec<f32>,
    pub(super) inputs: Option<Inputs>,
}

/// What layers take in beside what the layer before gives.
#[derive(Default)]
pub struct Aside {
    /// Of each token, the embeddings that layers have of their own: see [`super::layer_inputs`].
    pub(super) inputs: Vec<f32>,
    /// Keys and values that later layers attend to, too, by the layer that made them: `[T, 2 · kv_width]`.
    pub(super) keys: BTreeMap<usize, Vec<f32>>,
}

pub(super) struct Layer {
    pub heads: Heads,
    pub norms: LayerNorms<Vec<f32>>,
    pub qkv: Linear,
    /// What a row of that is,
    pub fused: Fused,
    /// and whose keys and values are attended to.
    pub keys_of: usize,
    /// Other layers attend to those of this one.
    pub lends_keys: bool,
    pub q_norm: Option<Vec<f32>>,
    pub k_norm: Option<Vec<f32>>,
    /// Of ones.
    pub v_norm: Option<Vec<f32>>,
    /// What it has in the place of attention.
    pub recurrent: Option<Recurrent>,
    /// What stands beside the scores of each query head.
    pub sinks: Option<Vec<f32>>,
    pub output: Linear,
    /// What says which experts a token goes to, where there are several, and what the one for all tokens counts.
    pub router: Option<Linear>,
    /// What is added to scores where the best are chosen.
    pub selection: Option<Vec<f32>>,
    /// What experts' worth to a token is multiplied by.
    pub factors: Option<Vec<f32>>,
    /// The MLP, or the experts, that for all tokens last.
    pub mlps: Vec<Mlp>,
    /// The MLP beside experts.
    pub beside: Option<Mlp>,
    /// How it takes in an embedding of its own, where it does.
    pub input: Option<LayerInput>,
    /// What the residual stream is multiplied by after it.
    pub scale: Option<f32>,
}

pub(super) struct Mlp {
    pub gate_up: Linear,
    pub down: Linear,
}

impl Layer {
    /// Its linear maps, in the order of [`LayerParams::matrices`].
    fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        let mlps = self.mlps.iter_mut().chain(&mut self.beside);
        let mlps = mlps.flat_map(|mlp| [&mut mlp.gate_up, &mut mlp.down]);
        let attention = [&mut self.qkv, &mut self.output].into_iter();
        let input = self.input.iter_mut();
        let input = input.flat_map(|input| [&mut input.gate, &mut input.projection]);
        attention.chain(&mut self.router).chain(mlps).chain(input)
    }
}

/// y = x·Wᵀ + b.
pub(super) struct Linear {
    pub weight: Packed,
    pub bias: Option<Vec<f32>>,
}

impl Linear {
    fn new(source: &(impl Source + ?Sized), matrix: &Matrix, precision: Precision) -> Result<Self> {
        let weight = source.get(&matrix.weight)?;
        Ok(Self {
            weight: Packed::of_weights(Mat::new(&weight, matrix.rows, matrix.cols), precision),
            bias: matrix
                .bias
                .as_ref()
                .map(|b| source.get(b).map(|b| b.into_owned()))
                .transpose()?,
        })
    }

    /// Packs the weight that `base` is with its adapters added; `room` is for it unpacked.
    fn merge(
        &mut self,
        base: &Packed,
        (lora, values): (&Lora, &[f32]),
        matrix: &Matrix,
        room: &mut Vec<f32>,
    ) {
        let (rows, cols, first) = (matrix.rows, matrix.cols, matrix.weight.range.start);
        fit(room, rows * cols);
        base.read(room);
        for adapter in lora.of(matrix) {
            let part = adapter.weight.start - first..adapter.weight.end - first;
            lora.add(adapter, values, &mut room[part]);
        }
        self.weight
            .set_rows(Mat::new(room, rows, cols).dithered(first));
    }

    /// Packs changed weights into the storage that is there.
    pub fn update(&mut self, flat: &[f32], matrix: &Matrix) {
        self.weight.set_rows(matrix.of(flat));
        if let (Some(bias), Some(span)) = (&mut self.bias, &matrix.bias) {
            bias.copy_from_slice(&flat[span.range.clone()]);
        }
    }

    /// `y` `[T, out]` is set to, or gains, x·Wᵀ + b, for `x` `[T, in]`.
    pub fn forward(&self, x: &[f32], y: &mut [f32], write: Write) {
        let (n, k) = (self.weight.n(), self.weight.k());
        matmul(
            Left::Rows(Mat::new(x, x.len() / k, k)),
            self.weight.panels(),
            y,
            n,
            write,
            Threads::All,
        );
        self.add_bias(y, None);
    }

    /// The same with row r of `x` written by `make(r, row)`.
    pub fn forward_made(
        &self,
        make: impl Fn(usize, &mut [f32]) + Sync,
        y: &mut [f32],
        write: Write,
    ) {
        self.product_made(make, y, write);
        self.add_bias(y, None);
    }

    fn product_made(&self, make: impl Fn(usize, &mut [f32]) + Sync, y: &mut [f32], write: Write) {
        let n = self.weight.n();
        matmul_made(y.len() / n, make, self.weight.panels(), y, n, write);
    }

    /// Row r gains the bias, `weights[r]` times.
    fn add_bias(&self, y: &mut [f32], weights: Option<&[f32]>) {
        let n = self.weight.n();
        if let Some(bias) = &self.bias {
            rows(y, n, |first, y| {
                for (row, r) in y.chunks_exact_mut(n).zip(first..) {
                    let weight = weights.map_or(1.0, |weights| weights[r]);
                    row.iter_mut().zip(bias).for_each(|(y, b)| *y += weight * b);
                }
            });
        }
    }
}

impl Mlp {
    /// Its inner width.
    pub fn ffn(&self) -> usize {
        self.down.weight.k()
    }

    /// `y` `[T, hidden]` is set to, or gains, the MLP of `gate_up` `[T, 2·ffn]`. Row r counts `weights[r]` times.
    pub fn narrow(
        &self,
        c: &Config,
        gate_up: &[f32],
        weights: Option<&[f32]>,
        y: &mut [f32],
        write: Write,
    ) {
        let (curve, ffn) = (c.activation.curve(), self.ffn());
        let inner = |r: usize, row: &mut [f32]| {
            let (gate, up) = gate_up[r * 2 * ffn..][..2 * ffn].split_at(ffn);
            activation::forward_row(curve, gate, up, row);
            if let Some(weights) = weights {
                row.iter_mut().for_each(|x| *x *= weights[r]);
            }
        };
        self.down.product_made(inner, y, write);
        self.down.add_bias(y, weights);
    }
}

/// What a layer computes on its way, as far as its backward pass wants it. All are `[T, …]`.
#[derive(Default)]
pub struct LayerState {
    /// The layer's input, the residual stream.
    pub x: Vec<f32>,
    /// The fused projection before its norms and rotation, kept only where there are norms or gates in it; what stands in
    /// the place of attention reads it as it is.
    pub qkv_raw: Vec<f32>,
    /// `[q | k | v]` after norms and rotation; of linear attention as its rule reads them.
    pub qkv: Vec<f32>,
    /// Of linear attention, decays and rates,
    pub gates: Vec<f32>,
    /// and what is read before its norm.
    pub read: Vec<f32>,
    /// What attention, or what stands in its place, gives, before its output projection and gates.
    pub attention: Vec<f32>,
    /// Log-sum-exp of the scores, `[T, heads]`.
    pub lse: Vec<f32>,
    /// What attention's output projection gives, kept only where there is a norm after it.
    pub output: Vec<f32>,
    /// The residual stream after attention.
    pub middle: Vec<f32>,
    /// Which experts the tokens went to, where there are several.
    pub routes: Routes,
    /// `[gate | up]`; of experts a row for each token that one got, as the routes have them, expert after expert.
    pub gate_up: Vec<f32>,
    /// What the MLP's output projection gives, kept only where there is a norm after it.
    pub down: Vec<f32>,
    /// Where an MLP is beside experts, its `[gate | up]`,
    pub beside_gate_up: Vec<f32>,
    /// what it gives before its norm,
    pub given_beside: Vec<f32>,
    /// and what they do.
    pub given_by_experts: Vec<f32>,
    /// Where the layer has an embedding of its own: the residual stream before it takes that in,
    pub last: Vec<f32>,
    /// the gates,
    pub input_gates: Vec<f32>,
    /// and what it gives to the stream, before its norm.
    pub given_input: Vec<f32>,
}

impl Decoder {
    /// Packs a model's weights, from a checkpoint or from the flat buffer.
    ///
    /// # Errors
    /// A tensor that is missing or of another shape.
    pub fn new(
        config: &Config,
        source: &(impl Source + ?Sized),
        precision: Precision,
    ) -> Result<Self> {
        let params = Params::new(config);
        let table = |span: &Span| -> Result<Packed> {
            let values = source.get(span)?;
            let cols = values.len() / config.vocab;
            Ok(Packed::of_weights(
                Mat::new(&values, config.vocab, cols),
                precision,
            ))
        };
        let vector = |span: &Span| source.get(span).map(|v| v.into_owned());
        let linear = |matrix: &Matrix| Linear::new(source, matrix, precision);
        let mlp = |p: &MlpParams| -> Result<Mlp> {
            Ok(Mlp {
                gate_up: linear(&p.gate_up)?,
                down: linear(&p.down)?,
            })
        };
        let layer = |(i, p): (usize, &LayerParams)| -> Result<Layer> {
            let heads = config.heads_of(i);
            Ok(Layer {
                heads,
                norms: p.norms.try_map(vector)?,
                qkv: linear(&p.qkv)?,
                fused: config.fused(i),
                keys_of: config.keys_of(i),
                lends_keys: config.lends_keys(i),
                q_norm: p.q_norm.as_ref().map(vector).transpose()?,
                k_norm: p.k_norm.as_ref().map(vector).transpose()?,
                v_norm: config.values_normed.then(|| vec![1.0; heads.dim]),
                recurrent: (p.recurrent.as_ref())
                    .map(|p| Recurrent::new(p, config.norm_eps, |span| source.get(span)))
                    .transpose()?,
                sinks: p.sinks.as_ref().map(vector).transpose()?,
                output: linear(&p.output)?,
                router: p.router.as_ref().map(linear).transpose()?,
                selection: p.selection.as_ref().map(vector).transpose()?,
                factors: p.factors.as_ref().map(vector).transpose()?,
                mlps: p.mlps.iter().map(mlp).collect::<Result<_>>()?,
                beside: p.beside.as_ref().map(mlp).transpose()?,
                input: (p.input.as_ref())
                    .map(|p| {
                        anyhow::Ok(LayerInput {
                            gate: linear(&p.gate)?,
                            projection: linear(&p.projection)?,
                            norm: vector(&p.norm)?,
                        })
                    })
                    .transpose()?,
                scale: (p.scale.as_ref())
                    .map(|span| anyhow::Ok(source.get(span)?[0]))
                    .transpose()?,
            })
        };
        Ok(Self {
            config: config.clone(),
            precision,
            embedding: table(&params.embedding)?,
            head: params.head.as_ref().map(table).transpose()?,
            layers: params
                .layers
                .iter()
                .enumerate()
                .map(layer)
                .collect::<Result<_>>()?,
            norm: vector(&params.norm)?,
            inputs: (params.inputs.as_ref())
                .map(|p| Inputs::new(p, table, linear, vector))
                .transpose()?,
        })
    }

    /// Takes over the parameters of a training from its flat buffer; bfloat16 rounds them with [`Mat::dithered`].
    pub fn update(&mut self, flat: &[f32], params: &Params) {
        let table = |packed: &mut Packed, span: &Span, config: &Config| {
            packed.set_rows(span.rows(flat, 0..config.vocab, config.hidden));
        };
        let vector =
            |target: &mut Vec<f32>, span: &Span| target.copy_from_slice(&flat[span.range.clone()]);
        table(&mut self.embedding, &params.embedding, &self.config);
        if let (Some(head), Some(span)) = (&mut self.head, &params.head) {
            table(head, span, &self.config);
        }
        for (layer, p) in self.layers.iter_mut().zip(&params.layers) {
            for (norm, span) in layer.norms.each_mut().zip(p.norms.each()) {
                vector(norm, span);
            }
            let head_norms = layer.q_norm.iter_mut().chain(&mut layer.k_norm);
            for (norm, span) in head_norms.zip(p.q_norm.iter().chain(&p.k_norm)) {
                vector(norm, span);
            }
            for (numbers, span) in [
                (&mut layer.selection, &p.selection),
                (&mut layer.factors, &p.factors),
                (&mut layer.sinks, &p.sinks),
            ] {
                numbers
                    .iter_mut()
                    .zip(span)
                    .for_each(|(numbers, span)| vector(numbers, span));
            }
            if let (Some(recurrent), Some(p)) = (&mut layer.recurrent, &p.recurrent) {
                let values = |span: &Span| Ok(flat[span.range.clone()].into());
                *recurrent =
                    Recurrent::new(p, self.config.norm_eps, values).expect("the values are there");
            }
            if let (Some(input), Some(p)) = (&mut layer.input, &p.input) {
                vector(&mut input.norm, &p.norm);
            }
            for (linear, matrix) in layer.linears_mut().zip(p.matrices()) {
                linear.update(flat, matrix);
            }
        }
        if let (Some(inputs), Some(p)) = (&mut self.inputs, &params.inputs) {
            inputs.update(flat, p);
        }
        vector(&mut self.norm, &params.norm);
    }

    /// The linear maps that are adapted become those of `base` with adapters added, as [`Self::update`] rounds them.
    pub fn merge(&mut self, base: &[Packed], adapters: (&Lora, &[f32]), params: &Params) {
        let linears = self.layers.iter_mut().flat_map(Layer::linears_mut);
        let matrices = params.layers.iter().flat_map(LayerParams::matrices);
        let adapted = (linears.zip(matrices)).filter(|(_, m)| !adapters.0.of(m).is_empty());
        let mut room = vec![];
        for ((linear, matrix), base) in adapted.zip(base) {
            linear.merge(base, adapters, matrix, &mut room);
        }
    }

    /// The bytes that a model's weights take when they are packed: two each in bfloat16, or where the checkpoint has them in it.
    ///
    /// # Errors
    /// As [`Source::is_bfloat16`].
    pub fn weight_bytes(
        config: &Config,
        source: &(impl Source + ?Sized),
        precision: Precision,
    ) -> Result<usize> {
        let params = Params::new(config);
        let inputs = params.inputs.as_ref().map(|inputs| &inputs.table);
        let tables = [Some(&params.embedding), params.head.as_ref(), inputs];
        let spans = (params.matrices())
            .map(|m| &m.weight)
            .chain(tables.into_iter().flatten());
        let mut bytes = 0;
        for span in spans {
            let halved = precision == Precision::Bf16 || source.is_bfloat16(span)?;
            bytes += span.range.len() * if halved { 2 } else { 4 };
        }
        Ok(bytes)
    }

    /// The bytes that the states of all layers take for so many tokens.
    pub fn state_bytes(c: &Config, tokens: usize) -> usize {
        let mixed = |i: usize| match c.recurrences[i] {
            None => {
                let heads = c.heads_of(i);
                let qkv = heads.qkv_width() * if c.qk_norm.is_some() { 2 } else { 1 };
                let gates = if c.attention_gate { heads.q_width() } else { 0 };
                qkv + gates + heads.q_width() + c.heads
            }
            Some(recurrence) => Recurrent::state_words(recurrence),
        };
        let mixed: usize = (0..c.layers).map(mixed).sum();
        let own = c.layer_inputs.map_or(0, |width| width + 2 * c.hidden);
        let streams = if c.norms.after() { 4 } else { 2 };
        let routes = c.experts.iter().flatten();
        let routes: usize = routes.map(|e| 3 * e.each() + e.outputs()).sum();
        let inner: usize = (0..c.layers).map(|i| 2 * c.inner_width(i)).sum();
        let apart = c.experts.iter().flatten().filter(|e| e.apart).count();
        let given = apart * 2 * c.hidden;
        let rows = (streams * c.hidden + own) * c.layers + inner + routes + given + mixed;
        tokens * rows * size_of::<f32>()
    }

    /// The bytes that a forward pass over so many tokens takes at its height, no state kept.
    pub fn forward_bytes(c: &Config, tokens: usize) -> usize {
        let layer = Self::state_bytes(c, tokens) / c.layers.max(1);
        // Beside one layer's state: its output; the rows that meet the LM head, gathered and normed; what experts give.
        let given = c.mixture().map_or(0, |experts| experts.each());
        let rows = (3 + given) * c.hidden + Self::input_words(c) + Self::lent_words(c);
        layer + tokens * rows * size_of::<f32>()
    }

    /// Words that keys and values for later layers take for each token of a pass.
    fn lent_words(c: &Config) -> usize {
        let lending = (0..c.layers).filter(|&i| c.lends_keys(i));
        lending.map(|i| 2 * c.heads_of(i).kv_width()).sum()
    }

    /// The LM head, `[vocab, hidden]`.
    pub fn head(&self) -> &Packed {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    /// How the heads of layer `i` are laid out.
    pub fn heads(&self, i: usize) -> Heads {
        self.layers[i].heads
    }

    /// What layer `i` has in the place of attention, where it has.
    pub fn recurrent(&self, i: usize) -> Option<&Recurrent> {
        self.layers[i].recurrent.as_ref()
    }

    /// What stands beside the scores of each query head of layer `i`, where something does.
    pub fn sinks(&self, i: usize) -> Option<&[f32]> {
        self.layers[i].sinks.as_deref()
    }

    /// Whose keys and values layer `i` attends to: mostly its own.
    pub fn keys_of(&self, i: usize) -> usize {
        self.layers[i].keys_of
    }

    /// The rotations of all layers for so many positions.
    pub fn rotations(&self, positions: usize) -> Rotations {
        Rotations::new(&self.config, positions)
    }

    /// Where the residual stream begins: the rows of the embedding of `tokens`, `[T, hidden]`.
    pub fn embed(&self, tokens: &[u32], out: &mut Vec<f32>) {
        let width = self.config.hidden;
        fit(out, tokens.len() * width);
        for (row, &token) in out.chunks_exact_mut(width).zip(tokens) {
            self.embedding.read_row(token as usize, row);
        }
        scale(out, self.config.embed_scale);
    }

    /// Where a pass begins: the residual stream, and what layers have of the tokens beside it.
    pub fn begin(&self, tokens: &[u32], aside: &mut Aside, x: &mut Vec<f32>) {
        self.embed(tokens, x);
        if let Some(inputs) = &self.inputs {
            inputs.make(&self.config, tokens, x, &mut aside.inputs);
        }
    }

    /// The last norm, row by row, scaled as logits are to be.
    pub fn final_norm(&self, x: &[f32], out: &mut Vec<f32>) {
        fit(out, x.len());
        norm::forward(x, &self.norm, self.config.norm(), out);
        scale(out, self.config.logit_scale);
    }

    /// The gradient of the last norm: adds to `dx`, and to the norm's own where it is wanted. `dy` is scaled.
    pub fn final_norm_backward(
        &self,
        x: &[f32],
        dy: &mut [f32],
        dx: &mut [f32],
        d_weight: Option<&mut [f32]>,
    ) {
        let mut unused = vec![];
        let d_weight = d_weight.unwrap_or_else(|| {
            unused.resize(self.norm.len(), 0.0);
            &mut unused
        });
        scale(dy, self.config.logit_scale);
        norm::backward(x, &self.norm, self.config.norm(), dy, dx, d_weight);
    }

    /// The residual stream after the last layer, `[T, hidden]`, before the last norm. `seen` is shown each layer's
    /// state right after it ran, and may take it and leave other storage. `aside` is left as the backward pass wants it.
    pub fn forward(
        &self,
        layout: &Layout,
        tokens: &[u32],
        aside: &mut Aside,
        mut seen: impl FnMut(usize, &mut LayerState),
    ) -> Vec<f32> {
        assert_eq!(layout.tokens(), tokens.len());
        let rotations = self.rotations(layout.longest());
        let (mut state, mut next) = (LayerState::default(), vec![]);
        self.begin(tokens, aside, &mut state.x);
        for i in 0..self.layers.len() {
            self.mix(i, layout, &rotations, aside, &mut state);
            self.finish(i, aside, &mut state, &mut next);
            seen(i, &mut state);
            std::mem::swap(&mut state.x, &mut next);
        }
        state.x
    }

    /// Runs layer `i` again on `state.x`, filling the rest of the state as far as its backward pass wants it: what it gives
    /// only where a norm comes after that. `next` is storage.
    pub(super) fn run_again(
        &self,
        i: usize,
        (layout, rotations): (&Layout, &Rotations),
        aside: &mut Aside,
        state: &mut LayerState,
        next: &mut Vec<f32>,
    ) {
        self.mix(i, layout, rotations, aside, state);
        self.widen(i, state);
        if self.layers[i].norms.after_mlp.is_some() || self.layers[i].input.is_some() {
            self.narrow(i, aside, state, next);
        }
    }

    /// Attention of layer `i`, or what stands in its place: from `state.x` to `state.attention`.
    fn mix(
        &self,
        i: usize,
        layout: &Layout,
        rotations: &Rotations,
        aside: &mut Aside,
        state: &mut LayerState,
    ) {
        let heads = self.layers[i].heads;
        let tokens = layout.tokens();
        let positions: Vec<usize> = layout.positions().collect();
        self.project(i, &positions, rotations, aside, state);
        if let Some(recurrent) = &self.layers[i].recurrent {
            return recurrent.forward(layout, state);
        }
        fit(&mut state.attention, tokens * heads.q_width());
        fit(&mut state.lse, tokens * heads.query);
        attention::forward(
            layout,
            heads,
            self.precision,
            (&state.qkv, self.sinks(i)),
            &mut state.attention,
            &mut state.lse,
        );
    }

    /// Where layer `i` has gated attention: the gates of a token, in its row of the fused projection.
    pub(super) fn gates_of<'s>(
        &self,
        i: usize,
        qkv_raw: &'s [f32],
    ) -> Option<impl Fn(usize) -> &'s [f32] + Sync + use<'s>> {
        let layer = &self.layers[i];
        let q = layer.heads.q_width();
        let width = q + layer.heads.qkv_width();
        let gated = layer.fused == Fused::Gated && layer.recurrent.is_none();
        gated.then_some(move |token: usize| &qkv_raw[token * width + q..][..q])
    }

    /// The part of layer `i` after attention: from `state.x` and `state.attention` to `next`.
    pub fn finish(&self, i: usize, aside: &Aside, state: &mut LayerState, next: &mut Vec<f32>) {
        self.widen(i, state);
        self.narrow(i, aside, state, next);
    }

    /// `state.middle` is what the residual stream becomes by attention; from it, or from what attention read, to the `gate_up`s.
    fn widen(&self, i: usize, state: &mut LayerState) {
        let (c, layer) = (&self.config, &self.layers[i]);
        let kind = c.norm();
        copy(&state.x, &mut state.middle);
        let (norm, attention) = (&layer.norms.after_attention, &state.attention);
        let gates = self.gates_of(i, &state.qkv_raw);
        gain(
            &mut state.middle,
            norm,
            kind,
            &mut state.output,
            |y, write| match gates {
                None => layer.output.forward(attention, y, write),
                Some(gates) => {
                    let read = |token: usize, row: &mut [f32]| {
                        let at = token * row.len();
                        activation::gate_row(gates(token), &attention[at..][..row.len()], row);
                    };
                    layer.output.forward_made(read, y, write);
                }
            },
        );
        let (middle, norms) = (&state.middle, &layer.norms);
        let (x, norm) = match c.is_parallel() {
            true => (&state.x, &norms.before_attention),
            false => (middle, &norms.before_mlp),
        };
        let one = |mlp: &Mlp, gate_up: &mut Vec<f32>| {
            fit(gate_up, x.len() / c.hidden * 2 * mlp.ffn());
            let read = norm::rows_of(x, c.hidden, norm.as_deref(), kind);
            mlp.gate_up.forward_made(read, gate_up, Write::Set);
        };
        match c.experts[i] {
            None => one(&layer.mlps[0], &mut state.gate_up),
            Some(how) => (state.routes).widen(layer, (c, how), middle, &mut state.gate_up),
        }
        if let Some(mlp) = &layer.beside {
            one(mlp, &mut state.beside_gate_up);
        }
    }

    /// `next` is what the residual stream becomes by the rest of layer `i`.
    fn narrow(&self, i: usize, aside: &Aside, state: &mut LayerState, next: &mut Vec<f32>) {
        let layer = &self.layers[i];
        copy(&state.middle, next);
        let mut down = std::mem::take(&mut state.down);
        let norm = &layer.norms.after_mlp;
        gain(next, norm, self.config.norm(), &mut down, |y, write| {
            self.mlp(i, state, y, write)
        });
        state.down = down;
        if let Some(input) = &layer.input {
            input.forward((&self.config, i), &aside.inputs, state, next);
        }
        if let Some(by) = layer.scale {
            scale(next, by);
        }
    }

    /// `y` is set to, or gains, what layer `i` makes of the `gate_up`s: its MLP, its experts, or both, each normed.
    fn mlp(&self, i: usize, state: &mut LayerState, y: &mut [f32], write: Write) {
        let (c, layer) = (&self.config, &self.layers[i]);
        let (norms, kind, gate_up) = (&layer.norms, c.norm(), &state.gate_up);
        let Some(how) = c.experts[i] else {
            return layer.mlps[0].narrow(c, gate_up, None, y, write);
        };
        let routes = &state.routes;
        let experts = |y: &mut [f32], write| routes.narrow(layer, (c, how), gate_up, y, write);
        let Some(beside) = &layer.beside else {
            return experts(y, write);
        };
        y.fill(0.0);
        let (given, gate_up) = (&mut state.given_beside, &state.beside_gate_up);
        gain(y, &norms.after_one, kind, given, |y, write| {
            beside.narrow(c, gate_up, None, y, write)
        });
        let given = &mut state.given_by_experts;
        gain(y, &norms.after_experts, kind, given, experts);
    }

    /// An MLP's inner activation.
    pub(super) fn mlp_inner(&self, mlp: &Mlp, gate_up: &[f32], out: &mut Vec<f32>) {
        fit(out, gate_up.len() / 2);
        activation::forward(self.config.activation, gate_up, mlp.ffn(), out);
    }
}

/// The residual stream gains what `product` gives, or, where there is a norm after it, that normed; then it is left in
/// `given`, too, as it was before.
fn gain(
    stream: &mut [f32],
    norm: &Option<Vec<f32>>,
    kind: norm::Kind,
    given: &mut Vec<f32>,
    product: impl FnOnce(&mut [f32], Write),
) {
    let Some(weight) = norm else {
        return product(stream, Write::Add);
    };
    fit(given, stream.len());
    product(given, Write::Set);
    norm::forward_add(given, weight, kind, stream);
}
