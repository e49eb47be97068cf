//! From fields to a config, as transformers 5 understands them; what the decoder would get wrong is refused.

use super::super::config::{Config, Multipliers, bounded_layers, plain_scale};
use super::super::family::{self, Family, Scales, families};
use super::super::quantised::Quantised;
use super::super::rope::{QueryGrowth, positive, rotated_part};
use super::fields::Fields;
use super::positions::positions;
use super::{CAPS, SWIGLU};
use super::{experts, recurrences, uneven};
use crate::kernels::activation::Activation;
use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};
use std::borrow::Cow;

/// A config of what a file says.
///
/// # Errors
/// See [`Config::from_json`].
pub fn read(fields: &Fields) -> Result<Config> {
    let model_type = fields
        .text("model_type")?
        .context("\"model_type\" is missing: which architecture is this?")?;
    let family = family::of(model_type).with_context(|| {
        format!(
            "model_type: the architecture {model_type:?} is not supported; known: {}",
            families().collect::<Vec<_>>().join(", ")
        )
    })?;
    let usual = usual(fields, family);
    let fields = &Fields(&usual);
    refuse_what_would_be_read_wrongly(fields, family)?;
    let (hidden, heads) = (
        fields.size("hidden_size")?,
        fields.size("num_attention_heads")?,
    );
    let kv_heads = match (fields.0.get("num_key_value_heads"), family.kv_heads) {
        (None, Some(kv_heads)) => kv_heads,
        (None | Some(Value::Null), _) => heads,
        _ => fields.size("num_key_value_heads")?,
    };
    let head_dim = match (fields.present("head_dim"), family.head_dim) {
        (Some(_), _) => fields.size("head_dim")?,
        (None, Some(head_dim)) => head_dim,
        (None, None) => {
            ensure!(
                hidden.is_multiple_of(heads),
                "hidden_size {hidden} is not a multiple of num_attention_heads {heads}"
            );
            hidden / heads
        }
    };
    let said = |key: Option<&str>| match key {
        Some(key) => fields.flag(key),
        None => Ok(None),
    };
    let [qkv_bias, output_bias, mlp_bias] = family.biases;
    let layers = bounded_layers(fields.size("num_hidden_layers")?)?;
    let context = fields.size("max_position_embeddings")?;
    let (windows, ropes) = positions(fields, family, layers, head_dim, context)?;
    let [attention_cap, logit_cap] = caps(fields, family)?;
    let experts = match &family.mixture {
        Some(mixture) => experts::read(fields, mixture, (layers, hidden))?,
        None => vec![None; layers],
    };
    let ffn = match (experts.iter().flatten().next(), family.hybrid) {
        (Some(of_each), _) if !experts.contains(&None) && !of_each.apart => of_each.ffn,
        (_, true) => fields.size("shared_intermediate_size")?,
        (_, false) => fields.size("intermediate_size")?,
    };
    let ffn = adjusted(fields, family, ffn)?;
    let uneven = match family.uneven {
        Some(inputs) => uneven::read(fields, (kv_heads, head_dim), &windows, ffn, inputs)?,
        None => uneven::Uneven {
            wide: None,
            sharing: 0,
            sharing_ffn: ffn,
            layer_inputs: None,
        },
    };
    let has_qk_norm = match family.qk_norm_asked {
        Some(key) => fields.flag(key)?.unwrap_or(false),
        None => true,
    };
    let config = Config {
        model_type: model_type.to_owned(),
        vocab: fields.size("vocab_size")?,
        hidden,
        layers,
        heads,
        kv_heads,
        head_dim,
        rotary_dim: rotary_dim(fields, family, head_dim)?,
        wide: uneven.wide,
        sharing: uneven.sharing,
        ffn,
        sharing_ffn: uneven.sharing_ffn,
        experts,
        norm_eps: fields
            .number(family.norm_eps_field)?
            .unwrap_or(family.norm_eps) as f32,
        norms_centred: family.norms_centred,
        context,
        tied: fields.flag("tie_word_embeddings")?.unwrap_or(family.tied),
        embed_scale: family.embed_scale(hidden),
        qkv_bias: said(qkv_bias)?.unwrap_or(family.qkv_bias),
        o_bias: said(output_bias)?.unwrap_or(false),
        mlp_bias: said(mlp_bias)?.unwrap_or(false),
        attention_gate: family.attention_gate,
        sinks: family.sinks,
        recurrences: recurrences::read(fields, family, layers, hidden)?,
        norms: family.norms,
        qk_norm: family.qk_norm.filter(|_| has_qk_norm),
        values_normed: family.uneven.is_some(),
        layer_inputs: uneven.layer_inputs,
        layer_scales: family.uneven.is_some(),
        attention_scale: match family.scales {
            Scales::Roots => attention_scale(fields)?,
            Scales::Unscaled => 1.0,
            Scales::Plain | Scales::Logits | Scales::Embeddings | Scales::Multipliers => {
                plain_scale(head_dim)
            }
        },
        attention_cap,
        logit_cap,
        logit_scale: logit_scale(fields, family)?,
        activation: activation(fields, family)?,
        windows,
        ropes,
        query_growth: match family.query_growth {
            true => QueryGrowth::from_json(fields, context)?,
            false => None,
        },
    };
    match family.scales {
        Scales::Multipliers => config.multiplied(multipliers(fields)?),
        _ => config,
    }
    .checked()
}

/// The fields by their usual names, and some that the file lacks.
fn usual<'a>(fields: &Fields<'a>, family: &Family) -> Cow<'a, Map<String, Value>> {
    let mut usual = Cow::Borrowed(fields.0);
    for (key, value) in family.unsaid {
        if fields.present(key).is_none() {
            let value = serde_json::from_str(value).expect("it is JSON");
            usual.to_mut().insert((*key).to_owned(), value);
        }
    }
    for (theirs, name) in family.spelled {
        if let Some(value) = fields.present(theirs) {
            usual.to_mut().insert((*name).to_owned(), value.clone());
        }
    }
    usual
}

/// The family's activation, with the numbers of the file where that is heard.
fn activation(fields: &Fields, family: &Family) -> Result<Activation> {
    let number = |key: &str, unsaid: f32| match fields.number(key)? {
        Some(value) => positive(key, value),
        None => Ok(unsaid),
    };
    Ok(match family.activation {
        Activation::Clamped { alpha, limit } => Activation::Clamped {
            alpha: number(SWIGLU[0], alpha)?,
            limit: number(SWIGLU[1], limit)?,
        },
        other => other,
    })
}

/// The MLP's width, which LFM2 makes of what the file says: two thirds of it, scaled and rounded up.
fn adjusted(fields: &Fields, family: &Family, said: usize) -> Result<usize> {
    if !family.ffn_adjusted || !fields.flag("block_auto_adjust_ff_dim")?.unwrap_or(true) {
        return Ok(said);
    }
    let scale = fields.number("block_ffn_dim_multiplier")?.unwrap_or(1.0);
    let multiple = fields.size_or("block_multiple_of", 256)?;
    let two_thirds = (2.0 * said as f64 / 3.0).floor();
    Ok(((two_thirds * scale) as usize).next_multiple_of(multiple))
}

/// What Cohere's logits are multiplied by.
fn logit_scale(fields: &Fields, family: &Family) -> Result<f32> {
    match family.scales {
        Scales::Logits => {
            let key = "logit_scale";
            positive(key, fields.number(key)?.unwrap_or(0.0625))
        }
        _ => Ok(1.0),
    }
}

/// Granite's, each 1 where the file has none.
fn multipliers(fields: &Fields) -> Result<Multipliers> {
    let number = |key: &str| positive(key, fields.number(key)?.unwrap_or(1.0));
    Ok(Multipliers {
        embedding: number("embedding_multiplier")?,
        attention: number("attention_multiplier")?,
        residual: number("residual_multiplier")?,
        logits: number("logits_scaling")?,
    })
}

/// How much of a head is rotated.
fn rotary_dim(fields: &Fields, family: &Family, head_dim: usize) -> Result<usize> {
    if family.uneven.is_some() {
        return Ok(head_dim); // what does not turn there is the scaling's
    }
    let part = rotated_part(fields, family.rotated_part)?;
    ensure!(
        part == 1.0 || family.partial,
        "partial_rotary_factor: {part} is not supported for {}, only 1 (the whole head is rotated)",
        family.model_type
    );
    Ok((head_dim as f64 * part) as usize)
}

/// Gemma's scores are divided by the root of `query_pre_attn_scalar`, 256 where it says nothing.
fn attention_scale(fields: &Fields) -> Result<f32> {
    let scalar = fields.number("query_pre_attn_scalar")?.unwrap_or(256.0);
    ensure!(
        scalar.is_finite() && scalar > 0.0,
        "query_pre_attn_scalar: must be a positive number, not {scalar}"
    );
    Ok(scalar.powf(-0.5) as f32)
}

/// The soft caps of scores and of logits. A family that has them has its own where the file is silent; null means none.
fn caps(fields: &Fields, family: &Family) -> Result<[Option<f32>; 2]> {
    let cap = |i: usize| {
        let (key, asked) = (CAPS[i], fields.number(CAPS[i])?);
        let cap = match (family.caps[i], fields.0.contains_key(key)) {
            (Some(_), true) => asked,
            (Some(own), false) => own,
            (None, _) => {
                ensure!(
                    asked.is_none(),
                    "{key}: {} has none in transformers",
                    family.model_type
                );
                None
            }
        };
        cap.map(|cap| positive(key, cap)).transpose()
    };
    Ok([cap(0)?, cap(1)?])
}

/// Options under which the same tensors mean something else than this decoder would compute.
fn refuse_what_would_be_read_wrongly(fields: &Fields, family: &Family) -> Result<()> {
    for (key, names) in family.activation_names {
        if let Some(activation) = fields.text(key)? {
            ensure!(
                names.contains(&activation),
                "{key}: the activation {activation:?} is not supported; known for {}: {}",
                family.model_type,
                names.join(", ")
            );
        }
    }
    Quantised::of(fields.present("quantization_config"))?;
    let per_layer = fields.present("per_layer_config");
    ensure!(
        family.uneven.is_some() || per_layer.is_none_or(|layers| *layers == json!({})),
        "per_layer_config: layers of different shapes are not supported"
    );
    for (key, causal) in [("use_bidirectional_attention", false), ("is_causal", true)] {
        // (Gemma 4's pieces of images see each other.)
        let seen = fields.present(key).filter(|&value| value != "vision");
        ensure!(
            seen.is_none_or(|value| *value == causal),
            "{key}: this is not a causal language model"
        );
    }
    if family.hybrid {
        refuse_other_hybrids(fields)?;
    }
    if let Some(kind) = family.recurrence {
        recurrences::refuse_others(fields, kind)?;
    }
    if family.mixture.is_some() {
        experts::refuse_others(fields)?;
    }
    if let Some(Value::Array(architectures)) = fields.present("architectures") {
        let causal = |a: &Value| a.as_str().is_some_and(|name| name.ends_with("ForCausalLM"));
        ensure!(
            architectures.is_empty() || architectures.iter().any(causal),
            "architectures: {} is not a causal language model",
            Value::Array(architectures.clone())
        );
    }
    Ok(())
}

/// Those with experts, state spaces or no positions.
fn refuse_other_hybrids(fields: &Fields) -> Result<()> {
    ensure!(
        fields.present("num_local_experts") == Some(&json!(0)),
        "num_local_experts: mixtures of experts are not supported, only 0"
    );
    let attends = |kind: &Value| {
        ["attention", "full_attention"]
            .map(Value::from)
            .contains(kind)
    };
    let types = fields.present("layer_types").and_then(Value::as_array);
    ensure!(
        types.is_some_and(|types| types.iter().all(attends)),
        "layer_types: only models with attention in every layer are supported"
    );
    ensure!(
        fields.text("position_embedding_type")? == Some("rope"),
        "position_embedding_type: only \"rope\" is supported"
    );
    Ok(())
}
