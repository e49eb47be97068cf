//! From pairs to gradients: forward over packed pairs, the loss, and back through LM head and layers.

use crate::logprob::{Batch, TargetLogps, target_logps_backward};
use crate::model::{Decoder, Gradients, LayerState, Params, backward};

/// The backward pass of a batch, given ∂L/∂(log p) of every target: LM head, last norm, layers, embedding.
#[allow(clippy::too_many_arguments)]
pub fn head_and_layers_backward(
    decoder: &Decoder,
    params: &Params,
    batch: &Batch,
    gathered: &[f32],
    normed: &[f32],
    found: &TargetLogps,
    d_logps: &[f32],
    states: Vec<LayerState>,
    gradients: &mut Gradients,
) {
    let width = decoder.config.hidden;
    let mut d_normed = vec![0.0; normed.len()];
    target_logps_backward(decoder, normed, &batch.targets, &found.lse, d_logps, &mut d_normed, gradients.head());
    let mut d_gathered = vec![0.0; normed.len()];
    decoder.final_norm_backward(gathered, &d_normed, &mut d_gathered, gradients.vector(&params.norm));
    let mut dx = vec![0.0; batch.tokens.len() * width];
    batch.scatter(&d_gathered, width, &mut dx);
    backward(decoder, params, &batch.layout, &batch.tokens, states, dx, gradients);
}
