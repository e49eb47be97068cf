//! Linear attention on the device, as `kernels/delta`: a block for each segment and some columns of each head's memory. A root
//! leaves its memory behind for its branches, which go on from it in a launch of their own.

use super::args;
use super::batch;
use super::decoder::Decoder;
use super::device::{Address, Arg, Buffer, Launch, Plain};
use super::launches::THREADS;
use super::pass::Pass;
use super::slots::Slots;
use super::walks::{DeltaSpan, MOST_MEMORIES, Walks};
use crate::kernels::delta::Shape;
use crate::kernels::layout::Layout;
use crate::model::{DeltaParams, Span};
use crate::weights::Config;
use anyhow::{Result, ensure};
use std::ops::Range;

/// The lengths of keys that the walks are compiled for; one between two runs as the larger.
const KEY_DIMS: [usize; 3] = [32, 64, 128];

/// Threads of a block that scans, and the columns of a memory that it has.
const SCAN_THREADS: usize = 128;
const SCAN_COLUMNS: usize = 64;

/// Fails for heads that there are no kernels for.
pub(super) fn check(config: &Config) -> Result<()> {
    let most = KEY_DIMS[KEY_DIMS.len() - 1];
    for shape in config.deltas() {
        ensure!(
            shape.key_dim <= most,
            "linear attention's keys of {} are more than the GPU's kernels take ({most}): use --device cpu",
            shape.key_dim
        );
    }
    Ok(())
}

/// The length of keys that a layer's walks are compiled for.
pub(super) fn key_size(shape: Shape) -> usize {
    let fits = KEY_DIMS.into_iter().find(|&size| size >= shape.key_dim);
    fits.expect("it was checked")
}

/// The linear attention of a layer, beside its projections.
pub(super) struct Delta {
    pub shape: Shape,
    /// `[qkv_width, kernel]`, as files have it.
    pub conv: Buffer,
    pub dt_bias: Buffer,
    pub a_log: Buffer,
    pub norm: Buffer,
}

impl Delta {
    /// `put` gives the place of a span.
    pub fn new(params: &DeltaParams, put: impl Fn(&Span) -> Result<Buffer>) -> Result<Self> {
        Ok(Self {
            shape: params.shape,
            conv: put(&params.conv)?,
            dt_bias: put(&params.dt_bias)?,
            a_log: put(&params.a_log)?,
            norm: put(&params.norm)?,
        })
    }
}

/// What a layer has of sequences that are carried on token by token; each has a number.
pub(super) struct Memories {
    /// `[numbers, value_heads, key_dim, value_dim]`, float32.
    heads: Buffer,
    /// The last rows before the convolution, `[numbers, kernel − 1, qkv_width]`.
    past: Buffer,
}

impl Memories {
    /// Room for so many.
    pub fn new(decoder: &Decoder, shape: Shape, count: usize) -> Result<Self> {
        let room = |bytes: usize| decoder.device.allocate(count * bytes);
        Ok(Self {
            heads: room(memory_bytes(shape))?,
            past: room(past_bytes(shape, decoder.size()))?,
        })
    }

    /// The bytes of a number, in a format of so many bytes.
    pub fn bytes(shape: Shape, size: usize) -> usize {
        memory_bytes(shape) + past_bytes(shape, size)
    }
}

fn past_bytes(shape: Shape, size: usize) -> usize {
    (shape.kernel - 1) * shape.qkv_width() * size
}

/// The heads of a layer, as kernels declare them.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct DeltaHeads {
    key_heads: i32,
    value_heads: i32,
    key_dim: i32,
    value_dim: i32,
    kernel: i32,
}

// SAFETY: five 32-bit numbers without padding.
unsafe impl Plain for DeltaHeads {}

/// The heads of a layer as an argument.
pub(super) fn heads_of(shape: Shape) -> Arg {
    Arg::plain(DeltaHeads {
        key_heads: shape.key_heads as i32,
        value_heads: shape.value_heads as i32,
        key_dim: shape.key_dim as i32,
        value_dim: shape.value_dim as i32,
        kernel: shape.kernel as i32,
    })
}

/// The bytes of a memory of all heads of a layer.
pub(super) fn memory_bytes(shape: Shape) -> usize {
    shape.value_width() * shape.key_dim * size_of::<f32>()
}

/// The bytes of the largest memory of a layer.
pub(super) fn largest_memory(config: &Config) -> usize {
    config.deltas().map(memory_bytes).max().unwrap_or(0)
}

/// The bytes of the memories that the roots of a batch leave behind for their branches, at most.
pub(super) fn memories_bytes(config: &Config) -> usize {
    largest_memory(config) * MOST_MEMORIES
}

impl Decoder {
    /// The walks over a batch, where something stands in the place of attention.
    pub(super) fn walks(&self, layout: &Layout) -> Result<Option<Walks>> {
        let any = self.config.recurrences.iter().any(Option::is_some);
        let some = || Walks::new(&self.device, layout, largest_memory(&self.config));
        any.then(some).transpose()
    }

    /// The name of a walk over a layer's tokens.
    pub(super) fn walk(&self, stem: &str, shape: Shape) -> String {
        format!("{}_{}", self.kernels.of_format(stem), key_size(shape))
    }

    /// Linear attention: from `pass.qkv_raw` to `pass.attention`.
    pub(super) fn attend_linearly(
        &self,
        delta: &Delta,
        batch: &batch::Shape,
        pass: &Pass,
        kept: Option<(&Memories, &Buffer)>,
    ) -> Result<()> {
        let walks = batch.walks.as_ref().expect("made for such models");
        self.delta_inputs(delta, batch.tokens, walks, pass)?;
        if let Some((memories, spans)) = kept {
            let count = spans.bytes() / size_of::<DeltaSpan>();
            self.scan(delta, (spans.address(), count), &memories.heads, pass)?;
            self.keep_past(delta, (spans, count), &memories.past, pass)?;
            return self.gated_norm(delta, batch.tokens, pass);
        }
        for part in &walks.parts {
            for Range { start, end } in [part.roots.clone(), part.branches.clone()] {
                let first = walks.spans.element(start, size_of::<DeltaSpan>());
                self.scan(delta, (first, end - start), &walks.memories, pass)?;
            }
        }
        self.gated_norm(delta, batch.tokens, pass)
    }

    /// The same of one token of each slot that is not finished: it goes on from the memories of its row of logits, and leaves
    /// its own.
    pub(super) fn step_linearly(
        &self,
        delta: &Delta,
        slots: &Slots,
        memories: &Memories,
        count: usize,
    ) -> Result<()> {
        let (shape, heads, pass) = (delta.shape, heads_of(delta.shape), &slots.pass);
        let (from, finished) = (&slots.logit_rows, &slots.finished);
        self.device.launch(
            &self.kernels.of_format("delta_step_inputs"),
            inputs_launch(shape, count),
            args![
                pass.qkv_raw.as_ref(),
                &memories.past,
                from,
                finished,
                &delta.conv,
                &pass.qkv,
                count as i32,
                heads,
            ],
        )?;
        self.delta_gates(delta, count, pass)?;
        self.device.launch(
            &self.walk("delta_step", shape),
            scan_launch(shape, count),
            args![
                &pass.qkv,
                pass.gates.as_ref(),
                from,
                finished,
                &memories.heads,
                pass.read.as_ref(),
                heads,
            ],
        )?;
        self.gated_norm(delta, count, pass)
    }

    /// The rows that convolutions of later tokens will see.
    fn keep_past(
        &self,
        delta: &Delta,
        (spans, count): (&Buffer, usize),
        past: &Buffer,
        pass: &Pass,
    ) -> Result<()> {
        self.device.launch(
            &self.kernels.of_format("delta_keep"),
            Launch::plane(delta.shape.qkv_width().div_ceil(THREADS), count, THREADS),
            args![pass.qkv_raw.as_ref(), spans, past, heads_of(delta.shape)],
        )
    }

    /// What the rule reads: `pass.qkv` and `pass.gates`.
    fn delta_inputs(&self, delta: &Delta, count: usize, walks: &Walks, pass: &Pass) -> Result<()> {
        let shape = delta.shape;
        self.device.launch(
            &self.kernels.of_format("delta_inputs"),
            inputs_launch(shape, count),
            args![
                pass.qkv_raw.as_ref(),
                &walks.segment_of,
                &walks.segments,
                &delta.conv,
                &pass.qkv,
                count as i32,
                heads_of(shape),
            ],
        )?;
        self.delta_gates(delta, count, pass)
    }

    /// Decays and rates.
    pub(super) fn delta_gates(&self, delta: &Delta, count: usize, pass: &Pass) -> Result<()> {
        self.device.launch(
            &self.kernels.of_format("delta_gates"),
            Launch::row((count * delta.shape.value_heads).div_ceil(THREADS), THREADS),
            args![
                pass.qkv_raw.as_ref(),
                &delta.dt_bias,
                &delta.a_log,
                pass.gates.as_ref(),
                count as i32,
                heads_of(delta.shape),
            ],
        )
    }

    /// What the tokens of some spans find in the heads' memories: `pass.read`.
    fn scan(
        &self,
        delta: &Delta,
        (spans, count): (Address, usize),
        memories: &Buffer,
        pass: &Pass,
    ) -> Result<()> {
        self.device.launch(
            &self.walk("delta_scan", delta.shape),
            scan_launch(delta.shape, count),
            args![
                &pass.qkv,
                pass.gates.as_ref(),
                spans,
                memories,
                pass.read.as_ref(),
                heads_of(delta.shape),
            ],
        )
    }

    /// What the heads read, normed and gated: from `pass.read` to `pass.attention`.
    pub(super) fn gated_norm(&self, delta: &Delta, count: usize, pass: &Pass) -> Result<()> {
        let (shape, raw) = (delta.shape, pass.qkv_raw.as_ref().expect("it is kept"));
        self.device.launch(
            &self.kernels.of_format("gated_norm"),
            Launch::row((count * shape.value_heads).div_ceil(8), THREADS),
            args![
                pass.read.as_ref(),
                raw.element(shape.qkv_width(), self.size()),
                &delta.norm,
                self.config.norm_eps,
                &pass.attention,
                count as i32,
                shape.value_heads as i32,
                shape.value_dim as i32,
                shape.input_width() as i32,
            ],
        )
    }
}

/// A warp for each head of `[q | k | v]` of so many rows.
pub(super) fn inputs_launch(shape: Shape, count: usize) -> Launch {
    let units = count * (2 * shape.key_heads + shape.value_heads);
    Launch::row(units.div_ceil(8), THREADS)
}

/// So many spans with all heads of each.
fn scan_launch(shape: Shape, spans: usize) -> Launch {
    let strips = shape.value_dim.div_ceil(SCAN_COLUMNS);
    Launch::plane(shape.value_heads * strips, spans, SCAN_THREADS)
        .shared(stage_bytes(shape, SCAN_COLUMNS))
}

/// The shared memory of a walk by blocks of so many columns: see `DeltaStage` in `common/cuda/delta.h`.
pub(super) fn stage_bytes(shape: Shape, columns: usize) -> usize {
    64 * (2 * key_size(shape) + 2 * columns + 4)
}
