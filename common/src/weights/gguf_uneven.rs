//! Gemma 4 in a GGUF: what its metadata and tensors say of layers that differ, and the names of what they read beside the
//! residual stream.

use super::config::{Config, FACTORS, LAYER_SCALE, WideHeads};
use super::gguf_config::Metadata;
use super::layout::Place;
use super::rope::RopeScaling;
use crate::gguf::Value;
use anyhow::{Context, Result, ensure};

/// What a file says beyond others.
pub(super) struct Uneven {
    /// Of layers with a window: key heads, and the width of heads.
    pub kv: usize,
    pub dim: usize,
    pub wide: Option<WideHeads>,
    pub sharing: usize,
    pub ffn: usize,
    pub sharing_ffn: usize,
    pub layer_inputs: Option<usize>,
}

/// Reads it; `windows` are the layers'.
pub(super) fn read(fields: &Metadata, windows: &[Option<usize>]) -> Result<Uneven> {
    let layers = windows.len();
    let kv = of_layers(fields, "attention.head_count_kv", layers)?;
    let ffn = of_layers(fields, "feed_forward_length", layers)?;
    let full = windows.iter().rposition(Option::is_none);
    let full = full.context("attention.sliding_window_pattern: no layer sees all of the past")?;
    let narrow = windows.iter().position(Option::is_some).unwrap_or(full);
    let has = |layer: usize, what: &str| {
        let name = format!("blk.{layer}.attn_{what}.weight");
        fields.gguf.shape(&name).is_some()
    };
    // Those that attend to an earlier layer's keys have neither.
    let mut fulls = (0..layers).filter(|&layer| windows[layer].is_none());
    let own = fulls.find(|&layer| has(layer, "k"));
    let dim = fields.whole("attention.key_length_swa")?;
    let wide = WideHeads {
        kv: kv[full],
        dim: fields.size("attention.key_length")?,
        keys_are_values: own.is_some_and(|layer| !has(layer, "v")),
    };
    let (kv, dim) = (kv[narrow], dim.unwrap_or(wide.dim));
    let alike = wide.kv == kv && wide.dim == dim && !wide.keys_are_values;
    let inputs = fields.whole("embedding_length_per_layer_input")?;
    Ok(Uneven {
        kv,
        dim,
        wide: (!alike).then_some(wide),
        sharing: fields.whole("attention.shared_kv_layers")?.unwrap_or(0),
        ffn: ffn[0],
        sharing_ffn: ffn[layers - 1],
        layer_inputs: inputs.filter(|&width| width != 0),
    })
}

/// A size of each layer, where a file has one for all, too.
fn of_layers(fields: &Metadata, key: &str, layers: usize) -> Result<Vec<usize>> {
    let Some(Value::Wholes(all)) = fields.get(key) else {
        return Ok(vec![fields.size(key)?; layers]);
    };
    ensure!(
        all.len() == layers,
        "{key}: has {} entries for {layers} layers",
        all.len()
    );
    let size = |&size: &i128| {
        let size = usize::try_from(size).ok().filter(|&size| size > 0);
        size.with_context(|| format!("{key}: entries must be above 0"))
    };
    all.iter().map(size).collect()
}

/// The scaling that turns some pairs alone: their divisors are 1, the others' so large that nothing turns.
pub(super) fn proportional(divisors: &[f32]) -> Result<RopeScaling> {
    const STILL: f32 = 1e20;
    let turning = divisors.iter().take_while(|&&by| by == 1.0).count();
    ensure!(
        divisors[turning..].iter().all(|&by| by > STILL),
        "rope_freqs.weight: its divisors are not 1 for some pairs and without end for the rest; use the Hugging Face folder of this model"
    );
    let all = divisors.len() as f32;
    let part = turning as f32 / all;
    Ok(RopeScaling::Proportional {
        // Rounded so that as many pairs turn.
        part: if part * all < turning as f32 {
            part.next_up()
        } else {
            part
        },
        factor: 1.0,
    })
}

/// Where a GGUF has a tensor that only such models have; None for any other.
pub(super) fn place(name: &str, shape: &[usize]) -> Option<Place> {
    let name = name.strip_prefix("model.")?;
    let found = match name.strip_prefix("layers.") {
        None => match name {
            "embed_tokens_per_layer.weight" => "per_layer_token_embd.weight".to_owned(),
            "per_layer_model_projection.weight" => "per_layer_model_proj.weight".to_owned(),
            "per_layer_projection_norm.weight" => "per_layer_proj_norm.weight".to_owned(),
            _ => return None,
        },
        Some(rest) => {
            let (layer, rest) = rest.split_once('.')?;
            let what = match rest {
                LAYER_SCALE => "layer_output_scale.weight",
                FACTORS => "ffn_down_exps.scale",
                "router.scale" => "ffn_gate_inp.scale",
                "pre_feedforward_layernorm_2.weight" => "pre_ffw_norm_2.weight",
                "post_feedforward_layernorm_1.weight" => "post_ffw_norm_1.weight",
                "post_feedforward_layernorm_2.weight" => "post_ffw_norm_2.weight",
                "per_layer_input_gate.weight" => "inp_gate.weight",
                "per_layer_projection.weight" => "proj.weight",
                "post_per_layer_input_norm.weight" => "post_norm.weight",
                _ => return None,
            };
            format!("blk.{layer}.{what}")
        }
    };
    Some(Place::whole(&found, shape))
}

/// Whether a tensor is one that files may have and nobody reads: keys and values of a layer that attends to an earlier one's.
pub(super) fn is_unheard(config: &Config, name: &str) -> bool {
    let layers = config.layers - config.sharing..config.layers;
    let parts = ["k", "v", "k_norm"];
    let mut unheard = layers.flat_map(|i| parts.map(|part| format!("blk.{i}.attn_{part}.weight")));
    unheard.any(|other| other == name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::Rope;

    #[test]
    fn as_many_pairs_turn_as_in_the_file() {
        for pairs in 1..=256 {
            for turning in 0..=pairs {
                let mut divisors = vec![1e30; pairs];
                divisors[..turning].fill(1.0);
                let scaling = proportional(&divisors).unwrap();
                let rope = Rope {
                    theta: 10_000.0,
                    scaling,
                };
                let turned = rope
                    .inv_freq(2 * pairs)
                    .iter()
                    .filter(|&&f| f > 0.0)
                    .count();
                assert_eq!(turned, turning, "of {pairs}");
            }
        }
        assert!(proportional(&[1.0, 2.0, 1e30]).is_err());
    }
}
