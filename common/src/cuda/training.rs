//! A forward pass that keeps what its backward pass needs, and the way back: LM head, last norm, layers, embedding.
//!
//! Logits and their gradient exist a tile at a time, never `[T, vocab]`. Each layer's input is kept; of the last layers
//! all activations as far as there is room, those of the others are made again.

use super::args;
use super::backward::{Backward, Gradients, LayerState, Norm, partial_bytes};
use super::batch::Shape;
use super::decoder::Decoder;
use super::delta_backward::DeltaRoom;
use super::device::{Buffer, Form, Launch, Operand, Precision, Product, bytes_of};
use super::experts::{Apart, OnTheWay, Routes};
use super::inputs::{Aside, AsideGradients};
use super::launches::THREADS;
use super::optimizer::elements;
use super::pass::{Pass, Widths};
use super::scoring::{Predicting, TargetLogps, tile};
use crate::kernels::cap;
use crate::logprob::Batch;
use crate::weights::Config;
use anyhow::Result;

/// Rows of a launch over rows and columns, at most: a grid has no more in y.
const MOST_ROWS: usize = 65_535;

/// A forward pass with what its backward pass needs.
pub struct Forward<'a> {
    decoder: &'a Decoder,
    batch: &'a Batch,
    shape: Shape,
    states: Vec<LayerState>,
    /// Activations of whichever layer is at it; its `normed`, `inner` and `low_rank` serve all.
    scratch: Pass,
    /// The residual stream after the last layer.
    x: Buffer,
    predicting: Predicting,
    found: TargetLogps,
}

impl<'a> Forward<'a> {
    /// Runs the batch, keeping all activations of the last `whole` layers.
    ///
    /// # Errors
    /// A device without room.
    pub fn new(decoder: &'a Decoder, batch: &'a Batch, whole: usize) -> Result<Self> {
        let device = &decoder.device;
        let (tokens, layers) = (batch.tokens.len(), decoder.layers.len());
        let shape = decoder.shape(&batch.layout)?;
        let scratch = decoder.training_pass(tokens, None)?;
        let stream = || device.allocate(tokens * decoder.config.hidden * size_of::<f32>());
        let mut x = stream()?;
        decoder.begin(&device.buffer_of(&batch.tokens)?, tokens, &x, &scratch)?;
        let mut states = vec![];
        for i in 0..layers {
            let kept = (i + whole >= layers)
                .then(|| decoder.training_pass(tokens, Some(&scratch)))
                .transpose()?;
            let pass = kept.as_ref().unwrap_or(&scratch);
            decoder.activations(i, &shape, &x, pass)?;
            let next = stream()?;
            next.copy_from(&pass.x, next.bytes())?;
            decoder.narrow(i, tokens, pass, &next)?;
            states.push(LayerState {
                x: std::mem::replace(&mut x, next),
                pass: kept,
            });
        }
        let predicting = Predicting::new(decoder, batch, &x)?;
        Ok(Self {
            decoder,
            batch,
            shape,
            states,
            scratch,
            x,
            found: predicting.target_logps(decoder)?,
            predicting,
        })
    }

    /// Σ log p of each response, nats.
    pub fn sums(&self) -> Result<Vec<f64>> {
        (self.predicting).sums(&self.decoder.device, &self.found.logps)
    }

    /// Adds the gradients, given ∂L/∂(Σ log p) of each response.
    pub fn backward(mut self, slopes: &[f32], gradients: Gradients) -> Result<()> {
        let (decoder, tokens) = (self.decoder, self.batch.tokens.len());
        let backward = Backward::new(decoder, gradients, &self.shape, self.predicting.count)?;
        self.head(&backward, slopes, gradients)?;
        backward.copy_dx()?;
        for (i, state) in std::mem::take(&mut self.states)
            .into_iter()
            .enumerate()
            .rev()
        {
            if state.pass.is_none() {
                decoder.activations(i, &self.shape, &state.x, &self.scratch)?;
                decoder.give_mlp_again(i, tokens, &self.scratch)?;
            }
            let pass = state.pass.as_ref().unwrap_or(&self.scratch);
            backward.layer(i, &state.x, pass)?;
        }
        let Some(table) = gradients.span(&gradients.params.embedding) else {
            return Ok(());
        };
        let order = Order::new(self.batch.tokens.iter().map(|&t| t as i32));
        debug_assert_eq!(order.order.len(), tokens);
        let ids = decoder.device.buffer_of(&self.batch.tokens)?;
        backward.inputs(&ids, &order, &self.scratch)?;
        let (dx, width) = (&backward.dx, decoder.config.hidden);
        if decoder.config.embed_scale != 1.0 {
            decoder.scale(dx, tokens * width, decoder.config.embed_scale)?;
        }
        order.add(decoder, dx, width, table)
    }

    /// From the log-probs back to the residual stream after the last layer, tile by tile of the logits.
    fn head(&self, backward: &Backward, slopes: &[f32], gradients: Gradients) -> Result<()> {
        let (decoder, device) = (self.decoder, &self.decoder.device);
        let (vocab, width) = (decoder.config.vocab, decoder.config.hidden);
        let (count, params) = (self.predicting.count, gradients.params);
        let floats = |n: usize| device.allocate(n * size_of::<f32>());
        // Zero for rows that belong to nobody (see [`Decoder::pack`]).
        let d_logps = device.zeroed(count * size_of::<f32>())?;
        device.launch(
            "spread",
            Launch::row(self.predicting.responses.div_ceil(8), THREADS),
            args![
                &device.buffer_of(slopes)?,
                &self.predicting.offsets,
                &d_logps,
                slopes.len() as i32,
            ],
        )?;
        let (rows_at_once, words_at_once) = tile(count, vocab);
        let rows_at_once = rows_at_once.min(MOST_ROWS);
        let logits = floats(rows_at_once * words_at_once)?;
        // In float32 the gradient takes the logits' place.
        let d_logits = match decoder.precision {
            Precision::F32 => logits.clone(),
            rounded => device.allocate(rows_at_once * words_at_once * bytes_of(rounded))?,
        };
        let d_normed = floats(count * width)?;
        let head = params.head.as_ref().unwrap_or(&params.embedding);
        let d_head = gradients.span(head);
        for first in (0..count).step_by(rows_at_once) {
            let rows = (count - first).min(rows_at_once);
            let normed = self.predicting.normed.rows(first, width, decoder.precision);
            for word in (0..vocab).step_by(words_at_once) {
                let words = (vocab - word).min(words_at_once);
                let tile = logits.rows(0, words, Precision::F32);
                decoder.logits(normed, rows, (word, words), tile)?;
                device.launch(
                    &decoder.kernels.of_format("logprob_backward"),
                    Launch::plane(words.div_ceil(1024), rows, THREADS),
                    args![
                        &logits,
                        self.predicting.targets.element(first, 4),
                        self.found.lse.element(first, 4),
                        d_logps.element(first, 4),
                        &d_logits,
                        words as i32,
                        word as i32,
                        cap::inverse(decoder.config.logit_cap),
                    ],
                )?;
                let d_tile = d_logits.rows(0, words, decoder.precision);
                device.multiply(Product {
                    form: Form::RowsByColumns,
                    m: rows,
                    n: width,
                    k: words,
                    a: d_tile,
                    b: decoder.head().rows(word, width, decoder.precision),
                    c: d_normed.rows(first, width, Precision::F32),
                    scale: decoder.config.logit_scale,
                    keep: if word == 0 { 0.0 } else { 1.0 },
                })?;
                if let Some(at) = d_head {
                    device.multiply(Product {
                        form: Form::ColumnsByColumns,
                        m: words,
                        n: width,
                        k: rows,
                        a: d_tile,
                        b: normed,
                        c: Operand {
                            at: at + (word * width * size_of::<f32>()) as u64,
                            precision: Precision::F32,
                            stride: width,
                        },
                        scale: decoder.config.logit_scale,
                        keep: 1.0,
                    })?;
                }
            }
        }
        let dy = match decoder.precision {
            Precision::F32 => d_normed.clone(),
            Precision::F16 => unreachable!("it is for scoring alone"),
            Precision::Bf16 => {
                let rounded = device.allocate(count * width * decoder.size())?;
                let n = count * width;
                let args = args![&d_normed, &rounded, n as u64, 0u64, 0];
                device.launch("round_bf16", elements(n), args)?;
                rounded
            }
        };
        let norm = Norm {
            x: &self.x,
            rows: Some(&self.predicting.rows),
            count,
            weight: &decoder.norm,
            span: &params.norm,
            dy: &dy,
        };
        // Each row reads its own of `dy` and has no more use of the sum that was rounded to it.
        let d_gathered = floats(count * width)?;
        backward.norm(&norm, &d_gathered, None, false)?;
        let rows = Order::new(self.batch.rows.iter().map(|&r| r as i32));
        rows.add(decoder, &d_gathered, width, backward.dx.address())
    }
}

impl Decoder {
    /// Room for the activations that a layer's backward pass reads. With `shared`, `normed`, `inner`, `low_rank` and what experts
    /// give, which it makes again, are that pass's.
    fn training_pass(&self, tokens: usize, shared: Option<&Pass>) -> Result<Pass> {
        let (c, widths) = (&self.config, self.widths());
        let rows = |width: usize, size: usize| self.device.allocate(tokens * width * size);
        let some = |width: usize, size: usize| (width > 0).then(|| rows(width, size)).transpose();
        let (float, size) = (size_of::<f32>(), self.size());
        let own = c.layer_inputs.map_or(0, |_| c.hidden);
        Ok(Pass {
            x: rows(c.hidden, float)?,
            qkv_raw: some(widths.raw(c), size)?,
            qkv: rows(widths.qkv, size)?,
            gates: some(widths.gates, float)?,
            read: some(widths.read, size)?,
            attention: rows(widths.attention, size)?,
            lse: rows(c.heads, float)?,
            output: self.room_for_given(tokens)?,
            down: self.room_for_given(tokens)?,
            input_gates: some(c.layer_inputs.unwrap_or(0), size)?,
            given_input: some(own, float)?,
            last: some(own, float)?,
            aside: match shared {
                Some(pass) => pass.aside.clone(),
                None => self.aside(tokens)?,
            },
            gate_up: rows(2 * c.widest_mlp(), size)?,
            routes: Routes::new(self, tokens, shared.and_then(|pass| pass.routes.as_ref()))?,
            apart: Apart::new(self, tokens, true)?,
            normed: match shared {
                Some(pass) => pass.normed.clone(),
                None => rows(c.hidden, size)?,
            },
            inner: match shared {
                Some(pass) => pass.inner.clone(),
                None => rows(Self::inner_width(c), size)?,
            },
            low_rank: match (shared, self.rank()) {
                (Some(pass), _) => pass.low_rank.clone(),
                (None, 0) => None,
                (None, rank) => Some(rows(rank, size)?),
            },
        })
    }

    /// Layer `i` from its input `x` as far as its backward pass needs it; `pass.x` is the stream after attention.
    fn activations(&self, i: usize, shape: &Shape, x: &Buffer, pass: &Pass) -> Result<()> {
        pass.x.copy_from(x, x.bytes())?;
        self.mix(i, shape, pass, None)?;
        self.widen(i, shape.tokens, pass)
    }

    /// What the MLP of layer `i` gave, and what its own input did, where its backward pass needs that: norms come after them.
    fn give_mlp_again(&self, i: usize, count: usize, pass: &Pass) -> Result<()> {
        let Some(given) = &pass.down else {
            return Ok(());
        };
        self.give_mlp(i, count, pass, &pass.x)?;
        let Some(last) = &pass.last else {
            return Ok(());
        };
        last.copy_from(&pass.x, last.bytes())?;
        self.gain(&self.layers[i].norms.after_mlp, Some(given), last, count)?;
        self.give_input(i, count, pass, last)
    }
}

/// Which rows are added to which row of a table, each table row once.
pub(super) struct Order {
    rows: Vec<i32>,
    starts: Vec<i32>,
    order: Vec<i32>,
}

impl Order {
    /// `targets` has the table row of every row.
    fn new(targets: impl Iterator<Item = i32>) -> Self {
        let mut sorted: Vec<(i32, i32)> = targets.zip(0..).collect();
        sorted.sort_unstable();
        let mut found = Self {
            rows: vec![],
            starts: vec![],
            order: sorted.iter().map(|&(_, i)| i).collect(),
        };
        for (at, &(target, _)) in sorted.iter().enumerate() {
            if found.rows.last() != Some(&target) {
                found.rows.push(target);
                found.starts.push(at as i32);
            }
        }
        found.starts.push(sorted.len() as i32);
        found
    }

    /// Adds the rows of `x` to the table; both are as wide.
    pub fn add(&self, decoder: &Decoder, x: &Buffer, width: usize, table: u64) -> Result<()> {
        let device = &decoder.device;
        device.launch(
            "add_rows",
            Launch::row(self.rows.len(), THREADS),
            args![
                x,
                &device.buffer_of(&self.rows)?,
                &device.buffer_of(&self.starts)?,
                &device.buffer_of(&self.order)?,
                table,
                width as i32,
            ],
        )
    }
}

/// What training takes on a device beside the parameters: bytes, from a model's shape alone.
#[derive(Clone, Copy, Debug)]
pub struct Footprint<'a> {
    /// The model's shape.
    pub config: &'a Config,
    /// What is multiplied.
    pub precision: Precision,
    /// Of the adapters; 0 without.
    pub rank: usize,
}

impl Footprint<'_> {
    /// All of a part of so many tokens that predicts so many targets, with the activations of `whole` layers kept.
    pub fn part(&self, tokens: usize, targets: usize, whole: usize) -> usize {
        let c = self.config;
        let (float, size) = (size_of::<f32>(), bytes_of(self.precision));
        let rounded = match self.precision {
            Precision::F32 => 0,
            Precision::Bf16 | Precision::F16 => size,
        };
        let (q, widths) = (c.heads * c.widest_head(), Widths::new(c));
        // The gradient of the stream as it is multiplied, or of what a sublayer gave to it.
        let copied = if c.norms.after() { size } else { rounded };
        // The streams between layers, the activations that all layers share, and the gradients on their way.
        let streams = (c.layers + 1) * c.hidden * float;
        let (_, given) = Routes::bytes(c, self.precision);
        let shared = (c.hidden + Decoder::inner_width(c) + self.rank) * size + given;
        let aside = Aside::bytes(c, size) + AsideGradients::bytes(c, size);
        let (of_deltas, memories) = DeltaRoom::bytes(c);
        let gradients = (c.hidden + c.heads + 2 * q) * float
            + c.hidden * copied
            + (widths.qkv + widths.gated + widths.attention) * size
            + OnTheWay::bytes(c, self.precision)
            + of_deltas;
        let numbers = 5 * float; // tokens, positions, segments, the order of rows
        let of_tokens = tokens * (streams + shared + aside + gradients + numbers);
        // Hidden states that predict, their gradient as a sum, rounded and after the norm; eight numbers each.
        let of_targets =
            targets * (c.hidden * (size + 2 * float + rounded) + 3 * float + 8 * float);
        let (rows, words) = tile(targets, c.vocab);
        let logits = rows * words * (float + rounded);
        let layers = (whole + 1) * tokens * self.layer();
        let partial = partial_bytes(c, tokens.max(targets));
        of_tokens + of_targets + logits + layers + partial + memories
    }

    /// The activations of a layer for each token.
    fn layer(&self) -> usize {
        let (c, widths) = (self.config, Widths::new(self.config));
        let (float, size) = (size_of::<f32>(), bytes_of(self.precision));
        let mixed = widths.raw(c) + widths.qkv + widths.read + widths.attention;
        let streams = if c.norms.after() { 3 } else { 1 };
        let (routes, _) = Routes::bytes(c, self.precision);
        let in_format = mixed + 2 * c.widest_mlp() + c.layer_inputs.unwrap_or(0);
        let own = c.layer_inputs.map_or(0, |_| 2);
        ((streams + own) * c.hidden + c.heads + widths.gates) * float
            + in_format * size
            + routes
            + Apart::bytes(c)
    }

    /// The most tokens that a part may have in `free` bytes, all of them targets and all activations made again.
    pub fn longest(&self, free: usize) -> usize {
        let fits = |tokens: usize| self.part(tokens, tokens, 0) <= free;
        let (mut fit, mut too_many) = (0, free);
        while too_many - fit > 1 {
            let middle = fit.midpoint(too_many);
            match fits(middle) {
                true => fit = middle,
                false => too_many = middle,
            }
        }
        fit
    }

    /// How many layers' activations fit into `free` bytes beside the rest of such a part.
    pub fn whole_layers(&self, tokens: usize, targets: usize, free: usize) -> usize {
        let left = free.saturating_sub(self.part(tokens, targets, 0));
        (left / (tokens * self.layer()).max(1)).min(self.config.layers)
    }

    /// Tokens of a part of which all activations can be kept in `free` bytes; where that is too few to be worth it, of one
    /// whose activations are made again. In round numbers: a little more or less free memory does not change how a batch
    /// is cut, and with that the order of sums.
    pub fn tokens_at_once(&self, free: usize) -> usize {
        let largest = |shift: usize, (least, most): (usize, usize), whole: usize| {
            let mut sizes = (least >> shift..=most >> shift).rev().map(|n| n << shift);
            sizes.find(|&tokens| self.part(tokens, tokens, whole) <= free)
        };
        largest(10, (LEAST_TOKENS, MOST_TOKENS), self.config.layers)
            .or_else(|| largest(8, (1 << 8, LEAST_TOKENS), 0))
            .unwrap_or(1)
    }
}

/// Below these a GPU idles; above, nothing is gained.
const LEAST_TOKENS: usize = 2 << 10;
const MOST_TOKENS: usize = 16 << 10;
