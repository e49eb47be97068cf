//! The config that a GGUF file's metadata and tensor table imply.

use super::config::{Config, Multipliers, Recurrence, bounded_layers, plain_scale};
use super::config_json::CAPS;
use super::family::{self, Family, RecurrenceKind, Rotated, Scales, Windows};
use super::gguf::Gguf;
use super::layout::Place;
use super::rope::{QueryGrowth, Rope, RopeScaling, longrope_growth, positive, yarn_growth};
use super::{gguf_delta, gguf_experts, gguf_uneven};
use crate::gguf;
use crate::kernels::gated_conv;
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value, json};

impl Config {
    /// Reads the metadata of a GGUF file; sizes that it leaves out (vocabulary, tied head, biases) come from its tensors.
    pub(super) fn from_gguf(gguf: &Gguf) -> Result<Self> {
        read(gguf).with_context(|| gguf.path().display().to_string())
    }
}

/// The token ids that a Hugging Face `config.json` would hold beside the shape.
pub(super) fn token_ids(gguf: &Gguf) -> Value {
    let ids = ["bos", "eos", "padding"].into_iter().filter_map(|which| {
        let Some(gguf::Value::Whole(id)) = gguf
            .metadata
            .get(&format!("tokenizer.ggml.{which}_token_id"))
        else {
            return None;
        };
        let field = if which == "padding" { "pad" } else { which };
        Some((format!("{field}_token_id"), json!(u64::try_from(*id).ok()?)))
    });
    Value::Object(Map::from_iter(ids))
}

fn read(gguf: &Gguf) -> Result<Config> {
    let architecture = match gguf.metadata.get("general.architecture") {
        Some(gguf::Value::Text(architecture)) => architecture.as_str(),
        _ => bail!("general.architecture is missing: which architecture is this?"),
    };
    let fields = Metadata { gguf, architecture };
    let window = fields.whole("attention.sliding_window")?.filter(|&w| w > 0);
    // One is none: so have Hunyuan's files it.
    let experts = fields.whole("expert_count")?.filter(|&count| count > 1);
    let experts = experts.unwrap_or(0);
    let shared = gguf
        .names()
        .any(|name| name.ends_with(".ffn_up_shexp.weight"));
    let query_growth = query_growth(&fields)?;
    // Mistral's models have one name, whether or not their queries grow; those of them that do not are Llamas.
    let named = match (architecture, query_growth) {
        ("mistral3", None) => "llama",
        _ => architecture,
    };
    let family =
        family::of_gguf(named, window.is_some(), experts > 0, shared).with_context(|| {
            format!(
                "general.architecture: {architecture:?} with {experts} experts is not supported; known: {}",
                family::architectures().join(", ")
            )
        })?;
    // With it the rows of heads are in another order (GLM-4's text part of a model that reads images), but for Qwen3.5.
    let sections = "rope.dimension_sections";
    ensure!(
        family.recurrence == Some(RecurrenceKind::Delta) || fields.get(sections).is_none(),
        "{sections}: positions of more than one kind are not supported"
    );
    let split = fields.whole_of("split.count")?.unwrap_or(1);
    ensure!(
        split <= 1,
        "split.count: the model is split over {split} files; merge them with llama-gguf-split --merge"
    );
    let embedding = gguf
        .shape("token_embd.weight")
        .context("the tensor \"token_embd.weight\" is missing")?;
    let (hidden, heads) = (
        fields.size("embedding_length")?,
        fields.size("attention.head_count")?,
    );
    let layers = bounded_layers(layers(&fields)?)?;
    let context = fields.size("context_length")?;
    let has = |name: &str| gguf.shape(name).is_some();
    let windows = windows(&fields, family, window, layers)?;
    let uneven = match family.uneven {
        Some(_) => Some(gguf_uneven::read(&fields, &windows)?),
        None => None,
    };
    let (kv_heads, head_dim) = match &uneven {
        Some(uneven) => (uneven.kv, uneven.dim),
        None => (
            kv_heads(&fields)?.unwrap_or(heads),
            head_dim(&fields, hidden, heads)?,
        ),
    };
    let rotary_dim = match uneven {
        Some(_) => head_dim, // what does not turn is the scaling's
        None => rotary_dim(&fields, family, head_dim)?,
    };
    let wide = uneven.as_ref().and_then(|uneven| uneven.wide);
    let widest = wide.map_or(rotary_dim, |wide| wide.dim);
    let [attention_cap, logit_cap] = caps(&fields, family)?;
    let [qkv_bias, output_bias, mlp_bias] = family.biases;
    let experts = match &family.mixture {
        Some(mixture) if experts > 0 => gguf_experts::mixtures(&fields, mixture, experts, layers)?,
        _ => vec![None; layers],
    };
    let ffn = match (experts.iter().flatten().next(), &uneven) {
        (_, Some(uneven)) => uneven.ffn,
        (Some(of_each), None) if !experts.contains(&None) => of_each.ffn,
        (_, None) => fields.size("feed_forward_length")?,
    };
    let config = Config {
        model_type: family.model_type.to_owned(),
        vocab: embedding[0],
        hidden,
        layers,
        heads,
        kv_heads,
        head_dim,
        rotary_dim,
        wide,
        sharing: uneven.as_ref().map_or(0, |uneven| uneven.sharing),
        ffn,
        sharing_ffn: uneven.as_ref().map_or(ffn, |uneven| uneven.sharing_ffn),
        experts,
        norm_eps: norm_eps(&fields, family)?,
        norms_centred: family.norms_centred,
        context,
        tied: !has("output.weight"),
        embed_scale: family.embed_scale(hidden),
        // Those that the family cannot have stay tensors without a place.
        qkv_bias: (family.qkv_bias || qkv_bias.is_some())
            && (has("blk.0.attn_q.bias") || has("blk.0.attn_qkv.bias")),
        o_bias: output_bias.is_some() && has("blk.0.attn_output.bias"),
        mlp_bias: mlp_bias.is_some() && has("blk.0.ffn_up.bias"),
        norms: family.norms,
        qk_norm: (family.qk_norm)
            .filter(|_| family.qk_norm_asked.is_none() || has("blk.0.attn_q_norm.weight")),
        values_normed: family.uneven.is_some(),
        layer_inputs: uneven.and_then(|uneven| uneven.layer_inputs),
        layer_scales: family.uneven.is_some(),
        attention_scale: match family.scales {
            Scales::Unscaled => 1.0,
            _ if family.gguf_apart == Some(layers) => plain_scale(hidden / heads),
            _ => plain_scale(head_dim),
        },
        attention_cap,
        logit_cap,
        logit_scale: match family.scales {
            Scales::Logits => positive("logit_scale", fields.real("logit_scale")?.unwrap_or(1.0))?,
            _ => 1.0,
        },
        activation: family.activation,
        attention_gate: family.attention_gate,
        sinks: family.sinks,
        recurrences: match family.recurrence {
            Some(RecurrenceKind::Delta) => gguf_delta::deltas(&fields, layers)?,
            Some(RecurrenceKind::Conv) => convolutions(&fields, layers, hidden)?,
            None => vec![None; layers],
        },
        ropes: ropes(&fields, family, &windows, widest, context)?,
        windows,
        query_growth,
    };
    match family.scales {
        Scales::Multipliers => config.multiplied(multipliers(&fields, head_dim)?),
        _ => config,
    }
    .checked()
}

/// The norms' epsilon.
fn norm_eps(fields: &Metadata, family: &Family) -> Result<f32> {
    let key = match family.norms_centred {
        true => "attention.layer_norm_epsilon",
        false => "attention.layer_norm_rms_epsilon",
    };
    let eps = fields.real(key)?;
    Ok(eps.with_context(|| format!("{key} is missing"))? as f32)
}

/// Key and value heads: of those layers that have some, where a file has a list.
fn kv_heads(fields: &Metadata) -> Result<Option<usize>> {
    match fields.get(KV_HEADS) {
        Some(gguf::Value::Wholes(all)) => {
            let some = all.iter().copied().filter(|&heads| heads != 0).collect();
            whole(KV_HEADS, Some(&gguf::Value::Wholes(some)))
        }
        other => whole(KV_HEADS, other),
    }
}

/// LFM2's: layers without key and value heads have a convolution in the place of attention.
fn convolutions(
    fields: &Metadata,
    layers: usize,
    hidden: usize,
) -> Result<Vec<Option<Recurrence>>> {
    let conv = Recurrence::Conv(gated_conv::Shape {
        channels: hidden,
        kernel: fields.size("shortconv.l_cache")?,
    });
    let Some(gguf::Value::Wholes(heads)) = fields.get(KV_HEADS) else {
        return Ok(vec![None; layers]);
    };
    ensure!(
        heads.len() == layers,
        "{KV_HEADS}: has {} entries for {layers} layers",
        heads.len()
    );
    let conv = |&heads: &i128| (heads == 0).then_some(conv);
    Ok(heads.iter().map(conv).collect())
}

const KV_HEADS: &str = "attention.head_count_kv";

/// What the names of tensors begin with that are of layers which predict further ahead than the next token: after the others.
pub(super) fn ahead(gguf: &Gguf, layers: usize) -> Vec<String> {
    let count = gguf.metadata.iter().find_map(|(key, value)| match value {
        gguf::Value::Whole(count) if key.ends_with(".nextn_predict_layers") => Some(*count),
        _ => None,
    });
    let count = count.map_or(0, |count| count.clamp(0, 16) as usize);
    let ahead = layers..layers + count;
    ahead.map(|layer| format!("blk.{layer}.")).collect()
}

/// The layers that make the next token.
fn layers(fields: &Metadata) -> Result<usize> {
    let ahead = fields.whole("nextn_predict_layers")?.unwrap_or(0);
    Ok(fields.size("block_count")?.saturating_sub(ahead))
}

/// Granite's; where one is left out, it does nothing.
fn multipliers(fields: &Metadata, head_dim: usize) -> Result<Multipliers> {
    let real = |key: &str, unsaid: f64| positive(key, fields.real(key)?.unwrap_or(unsaid));
    Ok(Multipliers {
        embedding: real("embedding_scale", 1.0)?,
        attention: real("attention.scale", plain_scale(head_dim).into())?,
        residual: real("residual_scale", 1.0)?,
        logits: real("logit_scale", 1.0)?,
    })
}

/// The soft caps of scores and of logits: the family's own where the file is silent.
fn caps(fields: &Metadata, family: &Family) -> Result<[Option<f32>; 2]> {
    let cap = |i: usize| {
        let Some(own) = family.caps[i] else {
            return Ok(None);
        };
        let cap = fields.real(CAPS[i])?.or(own);
        cap.map(|cap| positive(CAPS[i], cap)).transpose()
    };
    Ok([cap(0)?, cap(1)?])
}

/// Per layer, its window: `attention.sliding_window_pattern` says which have one, by a period or a flag for each layer;
/// else llama.cpp knows the family's.
fn windows(
    fields: &Metadata,
    family: &Family,
    mut window: Option<usize>,
    layers: usize,
) -> Result<Vec<Option<usize>>> {
    let key = "attention.sliding_window_pattern";
    let period = match (fields.get(key), family.windows) {
        (Some(gguf::Value::Wholes(flags)), _) => {
            ensure!(
                flags.len() == layers,
                "{key}: has {} entries for {layers} layers",
                flags.len()
            );
            let sliding = flags.iter().map(|&flag| window.filter(|_| flag != 0));
            return Ok(sliding.collect());
        }
        (Some(_), _) => fields.size(key)?,
        (None, Windows::AllBut(period, Rotated::Alone)) => period,
        (None, Windows::AllBut(period, Rotated::Only)) => {
            ensure!(window.is_some(), "attention.sliding_window is missing");
            period
        }
        (None, Windows::AllBut(period, _)) => {
            window.get_or_insert(4096); // which the first Gemma 2 files leave to the reader
            period
        }
        (None, _) => return Ok(vec![window; layers]),
    };
    let sliding = |layer: usize| window.filter(|_| !layer.is_multiple_of(period));
    Ok((1..=layers).map(sliding).collect())
}

/// Per layer, its rotation, as llama.cpp does it where the file does not say.
fn ropes(
    fields: &Metadata,
    family: &Family,
    windows: &[Option<usize>],
    rotary_dim: usize,
    context: usize,
) -> Result<Vec<Option<Rope>>> {
    let base = |key: &str| Ok::<_, anyhow::Error>(fields.real(key)?.map(|base| base as f32));
    let theta = base("rope.freq_base")?.unwrap_or(10_000.0);
    let full = Rope {
        theta,
        scaling: match family.uneven {
            Some(_) if fields.gguf.shape(SCALINGS[0]).is_some() => {
                let divisors = Place::whole(SCALINGS[0], &[rotary_dim / 2]);
                gguf_uneven::proportional(&fields.gguf.read(&divisors)?)?
            }
            _ => scaling(fields, family.gguf_truncates, rotary_dim, context)?,
        },
    };
    let unscaled = |theta| {
        anyhow::Ok(Rope {
            theta: base("rope.freq_base_swa")?.unwrap_or(theta),
            scaling: RopeScaling::Default,
        })
    };
    let local = match family.windows {
        Windows::AllBut(_, Rotated::Unscaled) => unscaled(theta)?,
        Windows::AllBut(_, Rotated::By(base)) => unscaled(base as f32)?,
        _ => full.clone(),
    };
    let windowed = windows.iter().any(Option::is_some);
    let rope = |(layer, window): (usize, &Option<usize>)| match (family.windows, window) {
        (Windows::Unrotated, _) if (layer + 1).is_multiple_of(4) => None,
        (Windows::AllBut(_, Rotated::Only), None) => None,
        (Windows::AllBut(_, Rotated::Alone), None) if windowed => None,
        (_, Some(_)) => Some(local.clone()),
        (_, None) => Some(full.clone()),
    };
    Ok(windows.iter().enumerate().map(rope).collect())
}

/// How queries grow with their positions.
fn query_growth(fields: &Metadata) -> Result<Option<QueryGrowth>> {
    let key = "attention.temperature_scale";
    let Some(beta) = fields.real(key)?.filter(|&beta| beta != 0.0) else {
        return Ok(None);
    };
    Ok(Some(QueryGrowth {
        beta: positive(key, beta)?,
        context: fields.size("rope.scaling.original_context_length")?,
    }))
}

fn head_dim(fields: &Metadata, hidden: usize, heads: usize) -> Result<usize> {
    let head_dim = match fields.whole("attention.key_length")? {
        Some(head_dim) => head_dim,
        None => {
            ensure!(
                hidden.is_multiple_of(heads),
                "embedding_length {hidden} is not a multiple of attention.head_count {heads}"
            );
            hidden / heads
        }
    };
    let key = "attention.value_length";
    let values = fields.whole(key)?.unwrap_or(head_dim);
    ensure!(
        values == head_dim,
        "{key}: values over {values} of {head_dim} dimensions of a head are not supported"
    );
    Ok(head_dim)
}

/// How much of a head is rotated.
fn rotary_dim(fields: &Metadata, family: &Family, head_dim: usize) -> Result<usize> {
    let key = "rope.dimension_count";
    let rotated = fields.whole(key)?.unwrap_or(head_dim);
    ensure!(
        rotated == head_dim || family.partial,
        "{key}: rotation over {rotated} of {head_dim} dimensions of a head are not supported"
    );
    Ok(rotated)
}

/// Tensors that a scaling comes as.
pub(super) const SCALINGS: [&str; 3] = [
    "rope_freqs.weight",
    "rope_factors_short.weight",
    "rope_factors_long.weight",
];

/// Linear scaling is in the metadata; Llama 3's comes as a tensor of divisors, LongRoPE's as two.
fn scaling(fields: &Metadata, truncate: bool, dims: usize, context: usize) -> Result<RopeScaling> {
    let [divisors, short, long] = SCALINGS;
    let pairs = |name: &str| fields.gguf.read(&Place::whole(name, &[dims / 2]));
    if fields.gguf.shape(divisors).is_some() {
        let theta = fields.real("rope.freq_base")?.unwrap_or(10_000.0) as f32;
        return llama3_from_divisors(&pairs(divisors)?, theta, dims);
    }
    if fields.gguf.shape(short).is_some() {
        let original_context = fields.size("rope.scaling.original_context_length")?;
        let factor = context as f64 / original_context as f64;
        let key = "rope.scaling.attn_factor";
        return Ok(RopeScaling::LongRope {
            short: pairs(short)?,
            long: pairs(long)?,
            original_context,
            context,
            attention_factor: match fields.real(key)? {
                Some(factor) => positive(key, factor)?,
                None => longrope_growth(factor, original_context),
            },
        });
    }
    let kind = match fields.text("rope.scaling.type")? {
        Some(kind) => kind,
        None if fields.real("rope.scale_linear")?.is_some() => "linear",
        None => "none",
    };
    match kind {
        "none" => Ok(RopeScaling::Default),
        "linear" => {
            let factor = match fields.real("rope.scaling.factor")? {
                Some(factor) => factor,
                None => fields.real("rope.scale_linear")?.unwrap_or(1.0),
            };
            Ok(RopeScaling::Linear {
                factor: positive("rope.scaling.factor", factor)?,
            })
        }
        "yarn" => {
            let key = "rope.scaling.factor";
            let factor = positive(key, fields.real(key)?.unwrap_or(1.0))?;
            let original = "rope.scaling.original_context_length";
            for key in ["yarn_ext_factor", "attn_factor"] {
                let value = fields.real(&format!("rope.scaling.{key}"))?.unwrap_or(1.0);
                ensure!(
                    value == 1.0,
                    "rope.scaling.{key}: {value} is not supported, only 1"
                );
            }
            // The config's `attention_factor`, as llama.cpp's converter writes it; its reader has the usual one in any case.
            let key = "rope.scaling.yarn_attn_factor";
            let attention_factor = match fields.real(key)?.filter(|&factor| factor != 1.0) {
                Some(factor) => positive(key, factor)?,
                None => {
                    let over = fields.real("rope.scaling.yarn_log_multiplier")?;
                    yarn_growth(factor, (1.0, over.unwrap_or(0.0)))
                }
            };
            let beta = |key: &str| fields.real(&format!("rope.scaling.yarn_{key}"));
            Ok(RopeScaling::Yarn {
                factor,
                original_context: fields.size(original)? as f32,
                beta_fast: beta("beta_fast")?.unwrap_or(32.0) as f32,
                beta_slow: beta("beta_slow")?.unwrap_or(1.0) as f32,
                attention_factor,
                truncate,
            })
        }
        _ => bail!(
            "rope.scaling.type: {kind:?} is not supported; known: none, linear, yarn, and Llama 3's rope_freqs.weight, LongRoPE's rope_factors_short.weight"
        ),
    }
}

/// Recognises Llama 3.1's scaling in its divisors: the converter drops the parameters, of which all
/// published models share low_freq_factor 1, high_freq_factor 4 and an original context of 8192.
fn llama3_from_divisors(divisors: &[f32], theta: f32, dims: usize) -> Result<RopeScaling> {
    let scaling = RopeScaling::Llama3 {
        factor: divisors.iter().copied().fold(1.0, f32::max),
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context: 8192.0,
    };
    let plain = Rope {
        theta,
        scaling: RopeScaling::Default,
    };
    let scaled = Rope {
        theta,
        scaling: scaling.clone(),
    };
    let recognised = plain
        .inv_freq(dims)
        .iter()
        .zip(scaled.inv_freq(dims))
        .zip(divisors)
        .all(|((plain, scaled), divisor)| (plain / scaled / divisor - 1.0).abs() < 1e-4);
    ensure!(
        recognised,
        "rope_freqs.weight: its rope scaling is not Llama 3.1's (low 1, high 4, original context 8192); use the Hugging Face folder of this model"
    );
    Ok(scaling)
}

/// Typed reading of `{architecture}.KEY`.
pub(super) struct Metadata<'a> {
    pub gguf: &'a Gguf,
    pub architecture: &'a str,
}

impl Metadata<'_> {
    pub(super) fn get(&self, key: &str) -> Option<&gguf::Value> {
        self.gguf
            .metadata
            .get(&format!("{}.{key}", self.architecture))
    }

    fn whole_of(&self, key: &str) -> Result<Option<usize>> {
        whole(key, self.gguf.metadata.get(key))
    }

    pub(super) fn whole(&self, key: &str) -> Result<Option<usize>> {
        whole(key, self.get(key))
    }

    pub(super) fn size(&self, key: &str) -> Result<usize> {
        let size = self
            .whole(key)?
            .with_context(|| format!("{}.{key} is missing", self.architecture))?;
        ensure!(size > 0, "{key}: must be above 0");
        Ok(size)
    }

    pub(super) fn real(&self, key: &str) -> Result<Option<f64>> {
        match self.get(key) {
            None => Ok(None),
            Some(gguf::Value::Real(value)) => Ok(Some(*value)),
            Some(gguf::Value::Whole(value)) => Ok(Some(*value as f64)),
            Some(other) => bail!("{key}: must be a number, not {other:?}"),
        }
    }

    fn text(&self, key: &str) -> Result<Option<&str>> {
        match self.get(key) {
            None => Ok(None),
            Some(gguf::Value::Text(text)) => Ok(Some(text)),
            Some(other) => bail!("{key}: must be a string, not {other:?}"),
        }
    }
}

fn whole(key: &str, value: Option<&gguf::Value>) -> Result<Option<usize>> {
    match value {
        None => Ok(None),
        Some(gguf::Value::Whole(value)) => usize::try_from(*value)
            .map(Some)
            .with_context(|| format!("{key}: {value} is out of range")),
        // One for each layer: Granite 4's key/value heads.
        Some(gguf::Value::Wholes(all)) if all.iter().all(|other| *other == all[0]) => {
            whole(key, all.first().copied().map(gguf::Value::Whole).as_ref())
        }
        Some(other) => bail!("{key}: must be a whole number, not {other:?}"),
    }
}
