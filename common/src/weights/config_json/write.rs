//! From a config to fields under the names that transformers 4 and 5 and vLLM all read.

use super::super::config::Config;
use super::super::family::{self, Family, Rotated, Scales, Windows};
use super::super::rope::{Rope, RopeScaling};
use super::{CAPS, SWIGLU, experts, recurrences, shortest, uneven};
use crate::kernels::activation::Activation;
use serde_json::{Map, Value, json};

/// Writes what is known over what there is.
pub fn write(config: &Config, fields: &mut Map<String, Value>) {
    let family = family::of(&config.model_type).expect("a config is of a family");
    let mut set = |key: &str, value: Value| {
        fields.insert(key.to_owned(), value);
    };
    shape(config, family, &mut set);
    layers(config, family, &mut set);
    rotation(config, family, &mut set);
    scales(config, family, &mut set);
    windows(config, family, &mut set);
    for (theirs, name) in family.spelled {
        if let Some(value) = fields.get(*name).cloned() {
            fields.insert((*theirs).to_owned(), value);
        }
    }
}

/// Takes a field.
pub type Set<'a> = dyn FnMut(&str, Value) + 'a;

fn shape(config: &Config, family: &Family, set: &mut Set) {
    set("architectures", json!([family.architecture()]));
    set("model_type", json!(config.model_type));
    set("vocab_size", json!(config.vocab));
    set("hidden_size", json!(config.hidden));
    set("intermediate_size", json!(config.ffn));
    set("num_hidden_layers", json!(config.layers));
    set("num_attention_heads", json!(config.heads));
    set("num_key_value_heads", json!(config.kv_heads));
    set("head_dim", json!(config.head_dim));
    set("max_position_embeddings", json!(config.context));
    set(family.norm_eps_field, shortest(config.norm_eps));
    set("tie_word_embeddings", json!(config.tied));
}

/// What the layers are made of: experts, activation, biases.
fn layers(config: &Config, family: &Family, set: &mut Set) {
    if let Some(mixture) = &family.mixture {
        experts::write(config, mixture, set);
    }
    if let Some(key) = family.qk_norm_asked {
        set(key, json!(config.qk_norm.is_some()));
    }
    if family.hybrid {
        set("shared_intermediate_size", json!(config.ffn));
        set("num_local_experts", json!(0));
        set("num_experts_per_tok", json!(0));
        set("position_embedding_type", json!("rope"));
        set("layer_types", json!(vec!["attention"; config.layers]));
    }
    if let Some(kind) = family.recurrence {
        recurrences::write(config, kind, set);
    }
    if let Some(inputs) = family.uneven {
        uneven::write(config, inputs.is_some(), set);
    }
    if family.ffn_adjusted {
        set("block_auto_adjust_ff_dim", json!(false));
    }
    let (key, names) = family.activation_names[0];
    set(key, json!(names[0]));
    if let Activation::Clamped { alpha, limit } = config.activation {
        let each = SWIGLU.into_iter().zip([alpha, limit]);
        each.for_each(|(key, value)| set(key, shortest(value)));
    }
    // Where one field is for both, that of the queries counts.
    let biases = [config.mlp_bias, config.o_bias, config.qkv_bias];
    for (key, bias) in family.biases.into_iter().rev().zip(biases) {
        if let Some(key) = key {
            set(key, json!(bias));
        }
    }
}

/// The rope of the layers that have a window, or of those that have none.
fn rope_of(config: &Config, windowed: bool) -> Option<&Rope> {
    let layers = config.windows.iter().zip(&config.ropes);
    let mut found = layers.filter(|(window, _)| window.is_some() == windowed);
    found.find_map(|(_, rope)| rope.as_ref())
}

/// Layers that see everything have the rope that scaling is for; those with a window another, where it has one.
fn rotation(config: &Config, family: &Family, set: &mut Set) {
    if family.partial {
        let part = config.rotary_dim as f64 / config.head_dim as f64;
        set("partial_rotary_factor", json!(part));
    }
    let Some(rope) = rope_of(config, false).or(rope_of(config, true)) else {
        return;
    };
    if family.uneven.is_some() {
        let local = rope_of(config, true).unwrap_or(rope);
        let types = [("full_attention", rope), ("sliding_attention", local)];
        let types: Map<_, _> = types
            .map(|(kind, rope)| (kind.to_owned(), rope.parameters_json()))
            .into_iter()
            .collect();
        return set("rope_parameters", types.into());
    }
    set("rope_theta", shortest(rope.theta));
    let mut scaling = rope.scaling_json();
    let has_own = |(key, _): &(&str, &str)| *key == "rope_parameters";
    if scaling.is_null() && family.unsaid.iter().any(has_own) {
        scaling = json!({"rope_type": "default"}); // unsaid it would be the family's
    }
    if let Some(growth) = config.query_growth {
        scaling["llama_4_scaling_beta"] = shortest(growth.beta);
        scaling["original_max_position_embeddings"] = json!(growth.context);
    }
    set("rope_scaling", scaling);
    if let RopeScaling::LongRope {
        original_context,
        context,
        ..
    } = rope.scaling
    {
        set("original_max_position_embeddings", json!(original_context));
        set("max_position_embeddings", json!(context));
    }
}

fn scales(config: &Config, family: &Family, set: &mut Set) {
    match family.scales {
        Scales::Plain | Scales::Embeddings | Scales::Unscaled => {}
        Scales::Roots => {
            let scalar = f64::from(config.attention_scale).powi(-2).round();
            set("query_pre_attn_scalar", json!(scalar as u64));
        }
        Scales::Logits => set("logit_scale", shortest(config.logit_scale)),
        Scales::Multipliers => {
            // What the residual stream gains is multiplied by nothing: see [`Config::multiplied`].
            set("embedding_multiplier", shortest(config.embed_scale));
            set("attention_multiplier", shortest(config.attention_scale));
            set("residual_multiplier", json!(1.0));
            set("logits_scaling", shortest(1.0 / config.logit_scale));
        }
    }
    let caps = [config.attention_cap, config.logit_cap];
    for ((key, cap), heard) in CAPS.into_iter().zip(caps).zip(family.caps) {
        if heard.is_some() {
            set(key, cap.map_or(Value::Null, shortest));
        }
    }
}

fn windows(config: &Config, family: &Family, set: &mut Set) {
    let window = config.windows.iter().flatten().next();
    match family.windows {
        Windows::None => return,
        Windows::All | Windows::Typed => {}
        Windows::Last => set("use_sliding_window", json!(window.is_some())),
        Windows::Unrotated => {
            set("use_sliding_window", json!(window.is_some()));
            let rotates = config.ropes.iter().map(|rope| u8::from(rope.is_some()));
            set("no_rope_layers", rotates.collect());
        }
        Windows::AllBut(_, rotated) => {
            let local = rope_of(config, true).filter(|_| family.uneven.is_none());
            if let (Rotated::By(_), Some(rope)) = (rotated, local) {
                set("rope_local_base_freq", shortest(rope.theta));
            }
        }
    }
    set("sliding_window", json!(window));
    let by_type = match family.windows {
        Windows::All => false,
        // With `layer_types` transformers takes it for another model.
        Windows::Typed => config.windows.iter().any(|w| w.as_ref() != window),
        _ => true,
    };
    if by_type {
        let kind = |window: &Option<usize>| match window {
            Some(_) => "sliding_attention",
            None => "full_attention",
        };
        set("layer_types", config.windows.iter().map(kind).collect());
    }
}
