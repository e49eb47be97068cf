//! The way back through linear attention on the device: see `common/cuda/delta_backward.cu`.

use super::args;
use super::backward::{Backward, NORM_BLOCKS};
use super::conv::weight_parts;
use super::decoder::Decoder;
use super::delta::{
    Delta, heads_of, inputs_launch, key_size, largest_memory, memories_bytes, stage_bytes,
};
use super::device::{Address, Buffer, Launch};
use super::launches::THREADS;
use super::pass::Pass;
use super::walks::{DeltaSpan, Walks};
use crate::kernels::delta::Shape;
use crate::model::DeltaParams;
use crate::weights::Config;
use anyhow::Result;
use std::ops::Range;

/// Columns of a memory that a block walks back with (`DELTA_STRIP` of `common/cuda/kernels.h`).
const STRIP: usize = 128;

/// What the way back through linear attention needs, `[T, …]`, float32.
pub(super) struct DeltaRoom {
    /// Of roots, and gradients of what branches began with.
    memories: Buffer,
    /// What memories lack of tokens, and the gradient of what they learn: as values.
    lack: Buffer,
    d_learnt: Buffer,
    /// For each value head, and each strip of its columns.
    d_query: Buffer,
    d_key: Buffer,
    /// What sums to the gradients of decays; those and the rates'.
    terms: Buffer,
    d_gates: Buffer,
}

/// Their widths, of the layers that they are widest in: values, keys of all strips, heads.
fn widths(config: &Config) -> [usize; 3] {
    let most = |width: fn(Shape) -> usize| config.deltas().map(width).max().unwrap_or(0);
    [
        most(|shape| shape.value_width()),
        most(|shape| shape.value_heads * strips(shape) * shape.key_dim),
        most(|shape| shape.value_heads),
    ]
}

fn strips(shape: Shape) -> usize {
    shape.value_dim.div_ceil(STRIP)
}

impl DeltaRoom {
    /// For a batch; none where there is no linear attention.
    pub fn new(decoder: &Decoder, count: usize, walks: Option<&Walks>) -> Result<Option<Self>> {
        let memory = largest_memory(&decoder.config);
        let Some(walks) = walks.filter(|_| memory > 0) else {
            return Ok(None);
        };
        let [values, keys, heads] = widths(&decoder.config);
        let rows = |width: usize| decoder.device.allocate(count * width * size_of::<f32>());
        Ok(Some(Self {
            memories: decoder.device.allocate(walks.most * memory)?,
            lack: rows(values)?,
            d_learnt: rows(values)?,
            d_query: rows(keys)?,
            d_key: rows(keys)?,
            terms: rows(heads)?,
            d_gates: rows(2 * heads)?,
        }))
    }

    /// The bytes that it takes for each token, and those of memories on both ways.
    pub fn bytes(config: &Config) -> (usize, usize) {
        let [values, keys, heads] = widths(config);
        let each = (2 * values + 2 * keys + 3 * heads) * size_of::<f32>();
        (each, 2 * memories_bytes(config))
    }
}

/// Elements of the largest partial sums.
pub(super) fn partial_elements(shape: Shape, count: usize) -> usize {
    let conv = weight_parts(count) * shape.qkv_width() * shape.kernel;
    let rows = shape.value_dim.max(2 * shape.value_heads);
    conv.max(count.min(NORM_BLOCKS) * rows)
}

impl Backward<'_> {
    /// From `d_attention`, the gradient of what linear attention gave, to `d_raw`, that of the fused projection.
    pub(super) fn attend_linearly(
        &self,
        delta: &Delta,
        places: &DeltaParams,
        pass: &Pass,
    ) -> Result<()> {
        let (Some(room), Some(walks), Some(d_raw)) =
            (&self.delta_room, &self.shape.walks, &self.d_raw)
        else {
            unreachable!("made for such models");
        };
        self.gated_norm(delta, places, d_raw, pass)?;
        for part in &walks.parts {
            for spans in [&part.roots, &part.branches] {
                self.trace(delta, walks, room, spans, pass)?;
            }
            for spans in [&part.branches, &part.roots] {
                self.walk_back(delta, walks, room, spans, pass)?;
            }
            self.walk_again(
                delta,
                walks,
                room,
                &(part.roots.start..part.branches.end),
                pass,
            )?;
        }
        self.bring_together(delta, walks, room, pass)?;
        self.delta_inputs(delta, places, walks, d_raw, pass)?;
        self.delta_gates(delta, places, room, d_raw, pass)
    }

    /// Back through norm and gates: `d_attention` becomes the gradient of what was read.
    fn gated_norm(
        &self,
        delta: &Delta,
        places: &DeltaParams,
        d_raw: &Buffer,
        pass: &Pass,
    ) -> Result<()> {
        let (shape, count, size) = (delta.shape, self.shape.tokens, self.decoder.size());
        let raw = pass.qkv_raw.as_ref().expect("it is kept");
        let blocks = count.min(NORM_BLOCKS);
        let wanted = self.gradients.span(&places.norm);
        let launch = Launch::row(blocks, THREADS).shared(8 * shape.value_dim * size_of::<f32>());
        self.decoder.device.launch(
            &self.decoder.kernels.of_format("gated_norm_backward"),
            launch,
            args![
                pass.read.as_ref(),
                raw.element(shape.qkv_width(), size),
                &delta.norm,
                self.decoder.config.norm_eps,
                &self.d_attention,
                d_raw.element(shape.qkv_width(), size),
                wanted.map(|_| &self.partial),
                count as i32,
                shape.value_heads as i32,
                shape.value_dim as i32,
                shape.input_width() as i32,
            ],
        )?;
        self.add_wanted(blocks, shape.value_dim, wanted)
    }

    fn add_wanted(&self, parts: usize, width: usize, wanted: Option<Address>) -> Result<()> {
        match wanted {
            Some(to) => self.add_partial(parts, width, to),
            None => Ok(()),
        }
    }

    fn walk_launch(&self, shape: Shape, spans: &Range<usize>) -> Launch {
        let blocks = shape.value_heads * strips(shape);
        let sums = 256 * key_size(shape);
        Launch::plane(blocks, spans.len(), THREADS).shared(stage_bytes(shape, STRIP) + sums)
    }

    /// Forth: what memories lacked, and the gradients of queries.
    fn trace(
        &self,
        delta: &Delta,
        walks: &Walks,
        room: &DeltaRoom,
        spans: &Range<usize>,
        pass: &Pass,
    ) -> Result<()> {
        self.decoder.device.launch(
            &self.decoder.walk("delta_trace", delta.shape),
            self.walk_launch(delta.shape, spans),
            args![
                &pass.qkv,
                pass.gates.as_ref(),
                &self.d_attention,
                walks.spans.element(spans.start, size_of::<DeltaSpan>()),
                &room.memories,
                &room.lack,
                &room.d_query,
                heads_of(delta.shape),
            ],
        )
    }

    /// Back: the gradients of what memories learnt, and of keys in part.
    fn walk_back(
        &self,
        delta: &Delta,
        walks: &Walks,
        room: &DeltaRoom,
        spans: &Range<usize>,
        pass: &Pass,
    ) -> Result<()> {
        self.decoder.device.launch(
            &self.decoder.walk("delta_back", delta.shape),
            self.walk_launch(delta.shape, spans),
            args![
                &pass.qkv,
                pass.gates.as_ref(),
                &self.d_attention,
                &room.lack,
                walks.back.element(spans.start, size_of::<DeltaSpan>()),
                &room.memories,
                &room.d_learnt,
                &room.d_key,
                heads_of(delta.shape),
            ],
        )
    }

    /// Forth again: the other part of the keys'.
    fn walk_again(
        &self,
        delta: &Delta,
        walks: &Walks,
        room: &DeltaRoom,
        spans: &Range<usize>,
        pass: &Pass,
    ) -> Result<()> {
        self.decoder.device.launch(
            &self.decoder.walk("delta_again", delta.shape),
            self.walk_launch(delta.shape, spans),
            args![
                &pass.qkv,
                pass.gates.as_ref(),
                &room.lack,
                &room.d_learnt,
                walks.spans.element(spans.start, size_of::<DeltaSpan>()),
                &room.memories,
                &room.d_key,
                heads_of(delta.shape),
            ],
        )
    }

    /// The gradients of what the rule read: `d_qkv`, and those of decays and rates.
    fn bring_together(
        &self,
        delta: &Delta,
        walks: &Walks,
        room: &DeltaRoom,
        pass: &Pass,
    ) -> Result<()> {
        let (shape, count) = (delta.shape, self.shape.tokens);
        let device = &self.decoder.device;
        device.launch(
            &self.decoder.kernels.of_format("delta_gradients"),
            Launch::row((count * shape.key_heads).div_ceil(8), THREADS),
            args![
                &pass.qkv,
                pass.gates.as_ref(),
                &room.lack,
                &room.d_learnt,
                &room.d_query,
                &room.d_key,
                &self.d_qkv,
                &room.terms,
                &room.d_gates,
                count as i32,
                heads_of(shape),
            ],
        )?;
        device.launch(
            "delta_decays",
            Launch::plane(shape.value_heads, walks.segment_count, THREADS),
            args![
                &room.terms,
                &walks.segments,
                &room.d_gates,
                shape.value_heads as i32,
            ],
        )
    }

    /// Back through lengths, activation and convolution; `d_qkv` is lost.
    fn delta_inputs(
        &self,
        delta: &Delta,
        places: &DeltaParams,
        walks: &Walks,
        d_raw: &Buffer,
        pass: &Pass,
    ) -> Result<()> {
        let (shape, count) = (delta.shape, self.shape.tokens);
        let (device, kernels) = (&self.decoder.device, &self.decoder.kernels);
        let (raw, heads) = (pass.qkv_raw.as_ref(), heads_of(shape));
        let (segment_of, segments) = (&walks.segment_of, &walks.segments);
        device.launch(
            &kernels.of_format("delta_inputs_backward"),
            inputs_launch(shape, count),
            args![
                raw,
                segment_of,
                segments,
                &delta.conv,
                &self.d_qkv,
                count as i32,
                heads,
            ],
        )?;
        device.launch(
            &kernels.of_format("delta_conv_backward"),
            Launch::row(count, THREADS),
            args![&self.d_qkv, segment_of, segments, &delta.conv, d_raw, heads,],
        )?;
        let Some(to) = self.gradients.span(&places.conv) else {
            return Ok(());
        };
        let parts = weight_parts(count);
        device.launch(
            &kernels.of_format("delta_conv_gradient"),
            Launch::plane(shape.qkv_width().div_ceil(THREADS), parts, THREADS),
            args![
                raw,
                &self.d_qkv,
                segment_of,
                segments,
                &self.partial,
                count as i32,
                heads,
            ],
        )?;
        self.add_partial(parts, shape.qkv_width() * shape.kernel, to)
    }

    /// Back through decays and rates.
    fn delta_gates(
        &self,
        delta: &Delta,
        places: &DeltaParams,
        room: &DeltaRoom,
        d_raw: &Buffer,
        pass: &Pass,
    ) -> Result<()> {
        let count = self.shape.tokens;
        let blocks = count.min(NORM_BLOCKS);
        // Both lie side by side, as the kernel sums them.
        debug_assert_eq!(places.dt_bias.range.end, places.a_log.range.start);
        let wanted = self.gradients.span(&places.dt_bias);
        self.decoder.device.launch(
            &self.decoder.kernels.of_format("delta_gates_backward"),
            Launch::row(blocks, THREADS),
            args![
                pass.qkv_raw.as_ref(),
                &delta.dt_bias,
                &delta.a_log,
                &room.d_gates,
                d_raw,
                wanted.map(|_| &self.partial),
                count as i32,
                heads_of(delta.shape),
            ],
        )?;
        self.add_wanted(blocks, 2 * delta.shape.value_heads, wanted)
    }
}
