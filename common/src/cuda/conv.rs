//! Short convolutions between gates on the device, forward, backward and token by token: see `common/cuda/conv.cu`.

use super::args;
use super::backward::Backward;
use super::batch;
use super::decoder::Decoder;
use super::device::{Buffer, Launch};
use super::launches::THREADS;
use super::pass::Pass;
use super::slots::Slots;
use super::walks::DeltaSpan;
use crate::kernels::gated_conv::Shape;
use crate::model::{ConvParams, Span};
use anyhow::Result;

/// The convolution of a layer, beside its projections.
pub(super) struct Conv {
    shape: Shape,
    /// `[channels, kernel]`, as files have it.
    weight: Buffer,
}

impl Conv {
    /// `put` gives the place of a span.
    pub fn new(params: &ConvParams, put: impl Fn(&Span) -> Result<Buffer>) -> Result<Self> {
        Ok(Self {
            shape: params.shape,
            weight: put(&params.weight)?,
        })
    }

    /// A thread for each channel of so many rows.
    fn launch(&self, rows: usize) -> Launch {
        Launch::plane(rows, self.shape.channels.div_ceil(THREADS), THREADS)
    }

    /// A thread for each channel of so many parts or spans.
    fn channels_launch(&self, parts: usize) -> Launch {
        Launch::plane(self.shape.channels.div_ceil(THREADS), parts, THREADS)
    }
}

/// The bytes that a sequence leaves behind in a layer: b ∘ x of its last tokens, float32.
pub(super) fn past_bytes(shape: Shape) -> usize {
    (shape.kernel - 1) * shape.channels * size_of::<f32>()
}

impl Decoder {
    /// From `pass.qkv_raw` to `pass.attention`; what `spans` leave goes to `past`, where they are to.
    pub(super) fn convolve(
        &self,
        conv: &Conv,
        batch: &batch::Shape,
        pass: &Pass,
        kept: Option<(&Buffer, &Buffer)>,
    ) -> Result<()> {
        let walks = batch.walks.as_ref().expect("made for such models");
        let Shape { channels, kernel } = conv.shape;
        self.device.launch(
            &self.kernels.of_format("gated_conv"),
            conv.launch(batch.tokens),
            args![
                pass.qkv_raw.as_ref(),
                &walks.segment_of,
                &walks.segments,
                &conv.weight,
                &pass.attention,
                channels as i32,
                kernel as i32,
            ],
        )?;
        let Some((past, spans)) = kept else {
            return Ok(());
        };
        self.device.launch(
            &self.kernels.of_format("gated_conv_keep"),
            conv.channels_launch(spans.bytes() / size_of::<DeltaSpan>()),
            args![
                pass.qkv_raw.as_ref(),
                spans,
                past,
                channels as i32,
                kernel as i32
            ],
        )
    }

    /// The same of one token of each slot that is not finished: it goes on from what its row of logits left, and leaves its own.
    pub(super) fn step_convolution(
        &self,
        conv: &Conv,
        slots: &Slots,
        past: &Buffer,
        count: usize,
    ) -> Result<()> {
        let Shape { channels, kernel } = conv.shape;
        self.device.launch(
            &self.kernels.of_format("gated_conv_step"),
            conv.launch(count),
            args![
                slots.pass.qkv_raw.as_ref(),
                past,
                &slots.logit_rows,
                &slots.finished,
                &conv.weight,
                &slots.pass.attention,
                channels as i32,
                kernel as i32,
            ],
        )
    }
}

impl Backward<'_> {
    /// From `d_attention`, the gradient of what the convolution gave, to `d_raw`, that of the fused projection.
    pub(super) fn convolve(&self, conv: &Conv, places: &ConvParams, pass: &Pass) -> Result<()> {
        let walks = self.shape.walks.as_ref().expect("made for such models");
        let (count, Shape { channels, kernel }) = (self.shape.tokens, conv.shape);
        let (device, kernels) = (&self.decoder.device, &self.decoder.kernels);
        device.launch(
            &kernels.of_format("gated_conv_backward"),
            conv.launch(count),
            args![
                pass.qkv_raw.as_ref(),
                &walks.segment_of,
                &walks.segments,
                &conv.weight,
                &self.d_attention,
                self.d_raw.as_ref(),
                channels as i32,
                kernel as i32,
            ],
        )?;
        let Some(to) = self.gradients.span(&places.weight) else {
            return Ok(());
        };
        let parts = weight_parts(count);
        device.launch(
            &kernels.of_format("gated_conv_gradient"),
            conv.channels_launch(parts),
            args![
                pass.qkv_raw.as_ref(),
                &walks.segment_of,
                &walks.segments,
                &self.d_attention,
                &self.partial,
                count as i32,
                channels as i32,
                kernel as i32,
            ],
        )?;
        self.add_partial(parts, channels * kernel, to)
    }
}

/// The most parts of the gradient of a convolution's weights, and the rows of one, at least.
const WEIGHT_PARTS: usize = 64;
const WEIGHT_ROWS: usize = 64;

/// Elements of the largest partial sums.
pub(super) fn partial_elements(shape: Shape, count: usize) -> usize {
    weight_parts(count) * shape.channels * shape.kernel
}

/// Parts of that gradient.
pub(super) fn weight_parts(count: usize) -> usize {
    count.div_ceil(WEIGHT_ROWS).min(WEIGHT_PARTS)
}
