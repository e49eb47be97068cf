//! Gemma 4: layers whose heads, keys and MLPs differ, and what they read beside the residual stream.

use super::super::config::{Config, WideHeads};
use super::fields::Fields;
use super::write::Set;
use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};

/// What such a config says beyond others.
pub struct Uneven {
    pub wide: Option<WideHeads>,
    pub sharing: usize,
    pub sharing_ffn: usize,
    pub layer_inputs: Option<usize>,
}

/// From fields; `kv` and `dim` are key heads and width of heads in layers with a window, of which `windows` are the layers'.
/// `inputs`: layers may have embeddings of their own, which are so wide where the file has nothing.
pub fn read(
    fields: &Fields,
    (kv, dim): (usize, usize),
    windows: &[Option<usize>],
    ffn: usize,
    inputs: Option<usize>,
) -> Result<Uneven> {
    ensure!(
        windows.last().is_some_and(Option::is_none),
        "layer_types: the last layer must be full_attention"
    );
    let keys_are_values = fields.flag("attention_k_eq_v")?.unwrap_or(false);
    let (wide_kv, wide_dim) = match fields.present("per_layer_config") {
        Some(layers) => of_full_layers(layers, windows)?,
        None => {
            let key = "num_global_key_value_heads";
            let asked = fields.present(key).filter(|_| keys_are_values);
            let kv = asked.map(|_| fields.size(key)).transpose()?;
            (kv, Some(fields.size_or("global_head_dim", 512)?))
        }
    };
    let wide = WideHeads {
        kv: wide_kv.unwrap_or(kv),
        dim: wide_dim.unwrap_or(dim),
        keys_are_values,
    };
    let alike = wide.kv == kv && wide.dim == dim && !keys_are_values;
    let twice = fields.flag("use_double_wide_mlp")?.unwrap_or(false);
    Ok(Uneven {
        wide: (!alike).then_some(wide),
        sharing: match fields.present("num_kv_shared_layers") {
            None => 0,
            Some(_) => fields.count("num_kv_shared_layers")?,
        },
        sharing_ffn: if twice { 2 * ffn } else { ffn },
        layer_inputs: layer_inputs(fields, inputs)?,
    })
}

fn layer_inputs(fields: &Fields, unsaid: Option<usize>) -> Result<Option<usize>> {
    let Some(unsaid) = unsaid else {
        return Ok(None);
    };
    let key = "hidden_size_per_layer_input";
    let width = match fields.present(key) {
        None => unsaid,
        Some(_) => fields.count(key)?,
    };
    let (rows, key) = (fields.size("vocab_size")?, "vocab_size_per_layer_input");
    let own = fields.size_or(key, 262_144)?;
    ensure!(
        width == 0 || own == rows,
        "{key}: {own} is another number of tokens than the vocabulary's {rows}"
    );
    Ok((width != 0).then_some(width))
}

/// Key heads and width of heads of the layers without a window, where `per_layer_config` has others for them than the config:
/// transformers takes any, the decoder what Gemma 4 has.
fn of_full_layers(
    layers: &Value,
    windows: &[Option<usize>],
) -> Result<(Option<usize>, Option<usize>)> {
    const KEY: &str = "per_layer_config";
    let layers = layers
        .as_object()
        .with_context(|| format!("{KEY}: must be an object"))?;
    let none = Map::new();
    let of = |layer: usize| match layers.get(&layer.to_string()) {
        None => Ok(&none),
        Some(own) => (own.as_object()).with_context(|| format!("{KEY}: {own} is not an object")),
    };
    let last = of(windows.len() - 1)?;
    for (layer, window) in windows.iter().enumerate() {
        let expected = if window.is_none() { last } else { &none };
        ensure!(
            of(layer)? == expected,
            "{KEY}: layers of full_attention must be alike, and those of sliding_attention as the config has them"
        );
    }
    let known = ["head_dim", "num_key_value_heads"];
    for key in last.keys() {
        ensure!(
            known.contains(&key.as_str()),
            "{KEY}: {key} is not supported; known: {}",
            known.join(", ")
        );
    }
    let last = Fields(last);
    let size = |key: &str| last.present(key).map(|_| last.size(key)).transpose();
    Ok((size(known[1])?, size(known[0])?))
}

/// Writes what [`read`] reads, under the names that all versions of transformers read.
pub fn write(config: &Config, inputs: bool, set: &mut Set) {
    let wide = config.wide;
    set(
        "global_head_dim",
        json!(wide.map_or(config.head_dim, |wide| wide.dim)),
    );
    let keys_are_values = wide.is_some_and(|wide| wide.keys_are_values);
    set("attention_k_eq_v", json!(keys_are_values));
    set(
        "num_global_key_value_heads",
        json!(wide.filter(|_| keys_are_values).map(|wide| wide.kv)),
    );
    set("num_kv_shared_layers", json!(config.sharing));
    set(
        "use_double_wide_mlp",
        json!(config.sharing_ffn != config.ffn),
    );
    if inputs {
        set(
            "hidden_size_per_layer_input",
            json!(config.layer_inputs.unwrap_or(0)),
        );
        set("vocab_size_per_layer_input", json!(config.vocab));
    }
}
