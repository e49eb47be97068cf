//! `config.json`: read as each family means it, written as transformers 4 and 5 and vLLM all read it.

use super::config::{Config, Experts, Multipliers, bounded_layers, plain_scale};
use super::family::{self, Family, Mixture, Rotated, Scales, Windows, families};
use super::rope::{Rope, RopeScaling, positive, rotated_part};
use crate::kernels::activation::Activation;
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value, json};
use std::path::Path;

impl Config {
    /// Reads a `config.json` as transformers 5 and older wrote it; `path` is for the error lines.
    /// What is absent gets transformers' default, except the sizes, which must be there.
    ///
    /// # Errors
    /// An unknown architecture, rope type or option that the decoder would silently get wrong; a missing or absurd size.
    pub fn from_json(value: &Value, path: &Path) -> Result<Self> {
        let fields = Fields(
            value
                .as_object()
                .with_context(|| format!("{}: must be a JSON object", path.display()))?,
        );
        read(&fields).with_context(|| path.display().to_string())
    }

    /// The `config.json` of a saved checkpoint. A folder's own file is kept as it was but for the
    /// dtype, float32; otherwise (GGUF) the fields are written with the names that transformers 4 and 5
    /// and vLLM all read, over whatever `original` holds (token ids).
    pub fn to_json(&self, original: Option<&Value>) -> Value {
        let mut fields = original
            .and_then(Value::as_object)
            .cloned()
            .unwrap_or_default();
        let unchanged = read(&Fields(&fields)).is_ok_and(|config| config == *self);
        if !unchanged {
            self.write(&mut fields);
        }
        let dtype = ["dtype", "torch_dtype"]
            .into_iter()
            .find(|key| fields.contains_key(*key))
            .unwrap_or("torch_dtype");
        fields.insert(dtype.to_owned(), json!("float32"));
        Value::Object(fields)
    }

    fn write(&self, fields: &mut Map<String, Value>) {
        let family = family::of(&self.model_type).expect("a config is of a family");
        let window = self.windows.iter().flatten().next();
        let mut set = |key: &str, value: Value| fields.insert(key.to_owned(), value);
        set("architectures", json!([family.architecture()]));
        set("model_type", json!(self.model_type));
        set("vocab_size", json!(self.vocab));
        set("hidden_size", json!(self.hidden));
        set("intermediate_size", json!(self.ffn));
        if let (Some(mixture), Some(experts)) = (&family.mixture, self.experts) {
            set(mixture.width, json!(self.ffn));
            set(mixture.count, json!(experts.count));
            set("num_experts_per_tok", json!(experts.used));
            if mixture.asked {
                set("norm_topk_prob", json!(experts.normed));
            }
        }
        if family.hybrid {
            set("shared_intermediate_size", json!(self.ffn));
            set("num_local_experts", json!(0));
            set("num_experts_per_tok", json!(0));
            set("position_embedding_type", json!("rope"));
            set("layer_types", json!(vec!["attention"; self.layers]));
        }
        set("num_hidden_layers", json!(self.layers));
        set("num_attention_heads", json!(self.heads));
        set("num_key_value_heads", json!(self.kv_heads));
        set("head_dim", json!(self.head_dim));
        if family.partial {
            let part = self.rotary_dim as f64 / self.head_dim as f64;
            set("partial_rotary_factor", json!(part));
        }
        let (key, activation) = spelling(family.activation);
        set(key, json!(activation));
        set("max_position_embeddings", json!(self.context));
        set("rms_norm_eps", shortest(self.norm_eps));
        set("tie_word_embeddings", json!(self.tied));
        // Layers that see everything have the rope that scaling is for; those with a window another, where it has one.
        let rope_of = |windowed: bool| {
            let layers = self.windows.iter().zip(&self.ropes);
            let mut found = layers.filter(|(window, _)| window.is_some() == windowed);
            found.find_map(|(_, rope)| rope.as_ref())
        };
        if let Some(rope) = rope_of(false).or(rope_of(true)) {
            set("rope_theta", shortest(rope.theta));
            set("rope_scaling", rope.scaling_json());
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
        if family.attention_bias {
            set("attention_bias", json!(self.qkv_bias));
        }
        if family.mlp_bias {
            set("mlp_bias", json!(self.mlp_bias));
        }
        match family.scales {
            Scales::Plain | Scales::Embeddings => {}
            Scales::Roots => {
                let scalar = f64::from(self.attention_scale).powi(-2).round();
                set("query_pre_attn_scalar", json!(scalar as u64));
            }
            Scales::Multipliers => {
                // What the residual stream gains is multiplied by nothing: see [`Config::multiplied`].
                set("embedding_multiplier", shortest(self.embed_scale));
                set("attention_multiplier", shortest(self.attention_scale));
                set("residual_multiplier", json!(1.0));
                set("logits_scaling", shortest(1.0 / self.logit_scale));
            }
        }
        if family.caps.is_some() {
            for (key, cap) in CAPS.into_iter().zip([self.attention_cap, self.logit_cap]) {
                set(key, cap.map_or(Value::Null, shortest));
            }
        }
        match family.windows {
            Windows::None => return,
            Windows::All(_) => {}
            Windows::Last => {
                set("use_sliding_window", json!(window.is_some()));
            }
            Windows::Unrotated => {
                set("use_sliding_window", json!(window.is_some()));
                let rotates = self.ropes.iter().map(|rope| u8::from(rope.is_some()));
                set("no_rope_layers", rotates.collect());
            }
            Windows::AllBut(_, rotated) => {
                if let (Rotated::By(_), Some(rope)) = (rotated, rope_of(true)) {
                    set("rope_local_base_freq", shortest(rope.theta));
                }
            }
        }
        set("sliding_window", json!(window));
        if !matches!(family.windows, Windows::All(_)) {
            let kind = |window: &Option<usize>| match window {
                Some(_) => "sliding_attention",
                None => "full_attention",
            };
            set("layer_types", self.windows.iter().map(kind).collect());
        }
    }
}

/// A float32 as the shortest decimal that reads back the same (1e-5, not 9.999999747378752e-6).
pub(super) fn shortest(value: f32) -> Value {
    json!(value.to_string().parse::<f64>().unwrap_or(f64::from(value)))
}

/// The field that names an activation, and its name there.
fn spelling(activation: Activation) -> (&'static str, &'static str) {
    match activation {
        Activation::Silu => ("hidden_act", "silu"),
        Activation::GeluTanh => ("hidden_activation", "gelu_pytorch_tanh"),
    }
}

/// The fields of soft caps: of scores, and of logits.
pub(super) const CAPS: [&str; 2] = ["attn_logit_softcapping", "final_logit_softcapping"];

fn read(fields: &Fields) -> Result<Config> {
    let model_type = fields
        .text("model_type")?
        .context("\"model_type\" is missing: which architecture is this?")?;
    let family = family::of(model_type).with_context(|| {
        format!(
            "model_type: the architecture {model_type:?} is not supported; known: {}",
            families().collect::<Vec<_>>().join(", ")
        )
    })?;
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
    let asked = |heard: bool, key: &str| Ok(heard && fields.flag(key)?.unwrap_or(false));
    let attention_bias: Result<bool> = asked(family.attention_bias, "attention_bias");
    let attention_bias = attention_bias?;
    let layers = bounded_layers(fields.size("num_hidden_layers")?)?;
    let context = fields.size("max_position_embeddings")?;
    let (windows, ropes) = positions(fields, family, layers, context)?;
    let [attention_cap, logit_cap] = caps(fields, family)?;
    let ffn = match (family.hybrid, &family.mixture) {
        (true, _) => "shared_intermediate_size",
        (false, Some(mixture)) => mixture.width,
        (false, None) => "intermediate_size",
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
        ffn: fields.size(ffn)?,
        experts: (family.mixture.as_ref())
            .map(|mixture| experts(fields, mixture))
            .transpose()?,
        norm_eps: fields.number("rms_norm_eps")?.unwrap_or(family.norm_eps) as f32,
        context,
        tied: fields.flag("tie_word_embeddings")?.unwrap_or(family.tied),
        embed_scale: family.embed_scale(hidden),
        qkv_bias: attention_bias || family.qkv_bias,
        o_bias: attention_bias,
        mlp_bias: asked(family.mlp_bias, "mlp_bias")?,
        norms: family.norms,
        qk_norm: family.qk_norm,
        attention_scale: match family.scales {
            Scales::Roots => attention_scale(fields)?,
            Scales::Plain | Scales::Embeddings | Scales::Multipliers => plain_scale(head_dim),
        },
        attention_cap,
        logit_cap,
        logit_scale: 1.0,
        activation: family.activation,
        windows,
        ropes,
    };
    match family.scales {
        Scales::Plain | Scales::Embeddings | Scales::Roots => config,
        Scales::Multipliers => config.multiplied(multipliers(fields)?),
    }
    .checked()
}

/// The names of the number of experts: transformers saves some under the other than they were published with.
const EXPERTS: [&str; 2] = ["num_experts", "num_local_experts"];

fn experts(fields: &Fields, mixture: &Mixture) -> Result<Experts> {
    Ok(Experts {
        count: match EXPERTS
            .into_iter()
            .find(|key| fields.present(key).is_some())
        {
            Some(key) => fields.size(key)?,
            None => fields.size(mixture.count)?,
        },
        used: fields.size("num_experts_per_tok")?,
        normed: match mixture.asked {
            true => fields.flag("norm_topk_prob")?.unwrap_or(false),
            false => true,
        },
    })
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
    let part = rotated_part(fields)?;
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
        let cap = match (family.caps, fields.0.contains_key(key)) {
            (Some(_), true) => asked,
            (Some(own), false) => own[i],
            (None, _) => {
                ensure!(
                    asked.is_none(),
                    "{key}: {} has no soft caps in transformers",
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
    let (key, known) = spelling(family.activation);
    if let Some(activation) = fields.text(key)? {
        ensure!(
            activation == known || (known == "silu" && activation == "swish"),
            "{key}: the activation {activation:?} is not supported; known for {}: {known}",
            family.model_type
        );
    }
    ensure!(
        fields.present("quantization_config").is_none(),
        "quantization_config: quantised safetensors are not supported; use the float checkpoint, or a GGUF"
    );
    ensure!(
        !fields.flag("use_bidirectional_attention")?.unwrap_or(false),
        "use_bidirectional_attention: this is not a causal language model"
    );
    if family.hybrid {
        refuse_other_hybrids(fields)?;
    }
    if family.mixture.is_some() {
        refuse_other_mixtures(fields)?;
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

/// Those whose layers are mixtures in part, and options that no published one has set.
fn refuse_other_mixtures(fields: &Fields) -> Result<()> {
    for (key, only) in [
        ("decoder_sparse_step", json!(1)),
        ("mlp_only_layers", json!([])),
        ("use_sliding_window", json!(false)),
        ("clip_qkv", Value::Null),
    ] {
        let found = fields.present(key).unwrap_or(&only);
        ensure!(
            *found == only,
            "{key}: {found} is not supported for mixtures of experts, only {only}"
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

/// Per layer: a window or none.
type LayerWindows = Vec<Option<usize>>;
/// Per layer: a rotation or none.
type LayerRopes = Vec<Option<Rope>>;

/// How far each layer sees and how it rotates, as the `__post_init__` of each family's config in transformers 5 has it:
/// `layer_types`, where it is there, says which layers have the window.
fn positions(
    fields: &Fields,
    family: &Family,
    layers: usize,
    context: usize,
) -> Result<(LayerWindows, LayerRopes)> {
    let everywhere = || -> Result<LayerRopes> {
        Ok(vec![
            Some(Rope::from_json(fields, family.theta, context)?);
            layers
        ])
    };
    let asked = || fields.flag("use_sliding_window");
    match family.windows {
        Windows::None => Ok((vec![None; layers], everywhere()?)),
        Windows::All(unsaid) => {
            let window = sliding_window(fields, unsaid)?;
            Ok((vec![window; layers], everywhere()?))
        }
        Windows::Last => {
            let window = match asked()?.unwrap_or(false) {
                true => sliding_window(fields, Some(4096))?,
                false => None,
            };
            let first = match fields.present("max_window_layers") {
                None => 28,
                Some(_) => fields.count("max_window_layers")?,
            };
            let windows = typed_windows(fields, window, layers, |layer| layer >= first)?;
            Ok((windows, everywhere()?))
        }
        Windows::Unrotated => {
            let window = match asked()?.unwrap_or(false) {
                true if fields.present("sliding_window").is_some() => {
                    sliding_window(fields, Some(4096))?
                }
                _ => None,
            };
            let rotates = rotating_layers(fields, layers)?;
            let windows = typed_windows(fields, window, layers, |layer| !rotates[layer])?;
            let ropes = everywhere()?.into_iter().zip(&rotates);
            Ok((
                windows,
                ropes.map(|(rope, &on)| rope.filter(|_| on)).collect(),
            ))
        }
        Windows::AllBut(period, rotated) => {
            let window = sliding_window(fields, Some(4096))?;
            let period = match fields.present("sliding_window_pattern") {
                None => period,
                Some(_) => fields.size("sliding_window_pattern")?,
            };
            let sliding = |layer: usize| !(layer + 1).is_multiple_of(period);
            let windows = typed_windows(fields, window, layers, sliding)?;
            let local = match rotated {
                Rotated::Alike => return Ok((windows, everywhere()?)),
                Rotated::Unscaled => None,
                Rotated::By(base) => Some(base),
            };
            let (full, local) = Rope::by_layer_type(fields, family.theta, local, context)?;
            let rope = |window: &Option<usize>| match window {
                Some(_) => Some(local.clone()),
                None => Some(full.clone()),
            };
            let ropes = windows.iter().map(rope).collect();
            Ok((windows, ropes))
        }
    }
}

/// The window: `unsaid` where the config has no such field, none where it is null.
fn sliding_window(fields: &Fields, unsaid: Option<usize>) -> Result<Option<usize>> {
    Ok(match fields.0.get("sliding_window") {
        None => unsaid,
        Some(Value::Null) => None,
        Some(_) => Some(fields.size("sliding_window")?),
    })
}

/// SmolLM3: a list that is there, or all but every fourth layer.
fn rotating_layers(fields: &Fields, layers: usize) -> Result<Vec<bool>> {
    let Some(list) = fields.present("no_rope_layers") else {
        let interval = match fields.present("no_rope_layer_interval") {
            None => 4,
            Some(_) => fields.size("no_rope_layer_interval")?,
        };
        return Ok((1..=layers).map(|layer| layer % interval != 0).collect());
    };
    let list = list.as_array().context("no_rope_layers: must be a list")?;
    ensure!(
        list.len() >= layers,
        "no_rope_layers: has {} entries for {layers} layers",
        list.len()
    );
    let flag = |entry: &Value| match entry.as_u64() {
        Some(0) => Ok(false),
        Some(1) => Ok(true),
        _ => bail!("no_rope_layers: entries must be 0 or 1, not {entry}"),
    };
    list[..layers].iter().map(flag).collect()
}

/// A window on the layers of which `layer_types` says so; where it says nothing, on those that `unsaid` names.
fn typed_windows(
    fields: &Fields,
    window: Option<usize>,
    layers: usize,
    unsaid: impl Fn(usize) -> bool,
) -> Result<LayerWindows> {
    let Some(types) = fields.present("layer_types") else {
        return Ok((0..layers)
            .map(|layer| window.filter(|_| unsaid(layer)))
            .collect());
    };
    let types = types.as_array().context("layer_types: must be a list")?;
    ensure!(
        types.len() == layers,
        "layer_types: has {} entries for {layers} layers",
        types.len()
    );
    let of_type = |kind: &Value| match kind.as_str() {
        Some("full_attention") => Ok(None),
        Some("sliding_attention") if window.is_some() => Ok(window),
        Some("sliding_attention") => bail!(
            "layer_types: asks for sliding_attention, but use_sliding_window and sliding_window give no window"
        ),
        _ => {
            bail!("layer_types: {kind} is not supported; known: full_attention, sliding_attention")
        }
    };
    types.iter().map(of_type).collect()
}

/// Typed reading of a JSON object's fields; null counts as absent, as in Python's configs.
pub(super) struct Fields<'a>(pub(super) &'a Map<String, Value>);

impl<'a> Fields<'a> {
    pub(super) fn present(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    fn count(&self, key: &str) -> Result<usize> {
        let value = self
            .present(key)
            .with_context(|| format!("{key:?} is missing"))?;
        value
            .as_u64()
            .and_then(|count| usize::try_from(count).ok())
            .with_context(|| format!("{key}: must be a whole number, not {value}"))
    }

    pub(super) fn size(&self, key: &str) -> Result<usize> {
        let size = self.count(key)?;
        ensure!(size > 0, "{key}: must be above 0");
        Ok(size)
    }

    pub(super) fn number(&self, key: &str) -> Result<Option<f64>> {
        self.present(key)
            .map(|value| {
                value
                    .as_f64()
                    .with_context(|| format!("{key}: must be a number, not {value}"))
            })
            .transpose()
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.present(key)
            .map(|value| {
                value
                    .as_bool()
                    .with_context(|| format!("{key}: must be true or false, not {value}"))
            })
            .transpose()
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>> {
        self.present(key)
            .map(|value| {
                value
                    .as_str()
                    .with_context(|| format!("{key}: must be a string, not {value}"))
            })
            .transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::config_json;
    use super::super::{Norms, QkNorm, RopeScaling};
    use super::*;

    fn read(value: &Value) -> Result<Config> {
        Config::from_json(value, Path::new("x/config.json"))
    }

    fn error(value: &Value) -> String {
        format!("{:#}", read(value).unwrap_err())
    }

    /// The base config of a family with some fields changed; null removes nothing, it is set.
    fn with(model_type: &str, changes: Value) -> Value {
        let mut json = config_json(model_type);
        for (key, value) in changes.as_object().unwrap() {
            json[key] = value.clone();
        }
        json
    }

    fn without(model_type: &str, key: &str) -> Value {
        let mut json = config_json(model_type);
        json.as_object_mut().unwrap().shift_remove(key);
        json
    }

    #[test]
    fn families_differ_as_transformers_has_them() {
        let of = |model_type: &str| read(&config_json(model_type)).unwrap();
        let flags = |c: &Config| (c.qkv_bias, c.o_bias, c.mlp_bias, c.qk_norm.is_some());
        assert_eq!(flags(&of("llama")), (false, false, false, false));
        assert_eq!(flags(&of("mistral")), (false, false, false, false));
        assert_eq!(flags(&of("qwen2")), (true, false, false, false));
        assert_eq!(flags(&of("qwen3")), (false, false, false, true));
        assert_eq!(flags(&of("smollm3")), (false, false, false, false));
        assert_eq!(flags(&of("olmo2")), (false, false, false, true));
        assert_eq!(flags(&of("gemma3_text")), (false, false, false, true));
        let around = |c: Config| {
            (
                c.norms,
                c.qk_norm,
                c.activation,
                c.embed_scale,
                c.attention_scale,
            )
        };
        let plain = (
            Norms::Before,
            None,
            Activation::Silu,
            1.0,
            1.0 / 8f32.sqrt(),
        );
        assert_eq!(around(of("llama")), plain);
        let olmo = (
            Norms::After,
            Some(QkNorm::Rows),
            Activation::Silu,
            1.0,
            plain.4,
        );
        assert_eq!(around(of("olmo2")), olmo);
        assert_eq!(around(of("olmo3")), olmo);
        let heads = Some(QkNorm::Heads);
        let gemma = (
            Norms::Around,
            heads,
            Activation::GeluTanh,
            32f32.sqrt(),
            0.25,
        );
        let scores = json!({"query_pre_attn_scalar": 16});
        let three = around(read(&with("gemma3_text", scores.clone())).unwrap());
        assert_eq!(three, gemma);
        let two = around(read(&with("gemma2", scores)).unwrap());
        assert_eq!(two, (gemma.0, None, gemma.2, gemma.3, gemma.4));
        // What layers add is halved there: here the residual stream is twice as large, and squares are four times as large.
        for granite in ["granite", "granitemoehybrid"] {
            let c = of(granite);
            let scales = (c.embed_scale, c.attention_scale, c.logit_scale);
            assert_eq!(scales, (12.0, 0.3, 1.0 / 6.0));
            assert_eq!((c.norm_eps, c.ffn), (4e-5, 64));
        }
        let biased = json!({"attention_bias": true, "mlp_bias": true});
        let of = |model_type: &str| read(&with(model_type, biased.clone())).unwrap();
        assert_eq!(flags(&of("llama")), (true, true, true, false));
        assert_eq!(flags(&of("mistral")), (false, false, false, false));
        assert_eq!(flags(&of("qwen2")), (true, false, false, false));
        assert_eq!(flags(&of("qwen3")), (true, true, false, true));
        assert_eq!(flags(&of("smollm3")), (true, true, true, false));
    }

    #[test]
    fn absent_fields_get_transformers_defaults() {
        let of = |model_type: &str, key: &str| read(&without(model_type, key)).unwrap();
        assert_eq!(of("llama", "num_key_value_heads").kv_heads, 4);
        assert_eq!(of("llama", "head_dim").head_dim, 8);
        assert_eq!(of("qwen3", "head_dim").head_dim, 128);
        assert_eq!(of("qwen2", "rms_norm_eps").norm_eps, 1e-6);
        assert!(!of("llama", "tie_word_embeddings").tied);
        assert!(of("smollm3", "tie_word_embeddings").tied);
        assert_eq!(of("smollm3", "num_key_value_heads").kv_heads, 4);
        let null = with(
            "mistral",
            json!({"num_key_value_heads": null, "head_dim": null}),
        );
        assert_eq!(read(&null).unwrap().kv_heads, 4);
        let eight = with(
            "mistral",
            json!({"num_attention_heads": 8, "hidden_size": 64}),
        );
        let mut eight = eight;
        eight
            .as_object_mut()
            .unwrap()
            .shift_remove("num_key_value_heads");
        assert_eq!(read(&eight).unwrap().kv_heads, 8);
    }

    #[test]
    fn windows_follow_each_familys_rules() {
        let windows =
            |model_type: &str, changes: Value| read(&with(model_type, changes)).unwrap().windows;
        assert_eq!(
            windows("llama", json!({"sliding_window": 16})),
            [None, None]
        );
        assert_eq!(windows("mistral", json!({})), [Some(4096), Some(4096)]);
        assert_eq!(
            windows("mistral", json!({"sliding_window": 16})),
            [Some(16), Some(16)]
        );
        assert_eq!(
            windows("mistral", json!({"sliding_window": null})),
            [None, None]
        );
        for qwen in ["qwen2", "qwen3"] {
            assert_eq!(
                windows(qwen, json!({"sliding_window": 16, "max_window_layers": 0})),
                [None, None]
            );
            let on =
                json!({"use_sliding_window": true, "sliding_window": 16, "max_window_layers": 1});
            assert_eq!(windows(qwen, on), [None, Some(16)]);
            let far = json!({"use_sliding_window": true, "sliding_window": 16});
            assert_eq!(
                windows(qwen, far),
                [None, None],
                "max_window_layers is 28 when absent"
            );
            let types = json!({"use_sliding_window": true, "sliding_window": 16, "max_window_layers": 9,
                "layer_types": ["sliding_attention", "full_attention"]});
            assert_eq!(windows(qwen, types), [Some(16), None]);
        }
        // SmolLM3's defaults: of two layers, both rotate; a window is for those that do not.
        let smollm3 = |changes: Value| {
            let found = read(&with("smollm3", changes)).unwrap();
            let rotates: Vec<_> = found.ropes.iter().map(Option::is_some).collect();
            (rotates, found.windows)
        };
        let none = vec![None, None];
        assert_eq!(smollm3(json!({})), (vec![true, true], none.clone()));
        let window =
            json!({"use_sliding_window": true, "sliding_window": 16, "no_rope_layer_interval": 2});
        assert_eq!(smollm3(window), (vec![true, false], vec![None, Some(16)]));
        assert_eq!(
            smollm3(json!({"no_rope_layers": [0, 1, 1], "sliding_window": 16})),
            (vec![false, true], none)
        );
        // OLMo 3's and Gemma 3's: all but every fourth and sixth.
        for (family, full) in [("olmo3", [3, 7]), ("gemma3_text", [5, 11])] {
            let found = windows(
                family,
                json!({"num_hidden_layers": 12, "sliding_window": 16}),
            );
            for (layer, window) in found.into_iter().enumerate().take(full[1] + 1) {
                assert_eq!(
                    window,
                    Some(16).filter(|_| !full.contains(&layer)),
                    "{family} {layer}"
                );
            }
        }
        let types =
            json!({"sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"]});
        assert_eq!(windows("olmo3", types), [None, Some(16)]);
        assert_eq!(
            windows("gemma3_text", json!({"sliding_window_pattern": 2})),
            [Some(4096), None]
        );
        for (list, wanted) in [
            (json!([1]), "has 1 entries for 2 layers"),
            (json!([1, 2]), "must be 0 or 1, not 2"),
        ] {
            let line = error(&with("smollm3", json!({"no_rope_layers": list})));
            assert!(line.contains(wanted), "{line}");
        }
        for (layer_types, wanted) in [
            (json!(["full_attention"]), "has 1 entries for 2 layers"),
            (
                json!(["full_attention", "linear_attention"]),
                "\"linear_attention\" is not supported",
            ),
            (
                json!(["full_attention", "sliding_attention"]),
                "give no window",
            ),
        ] {
            let line = error(&with("qwen2", json!({"layer_types": layer_types})));
            assert!(line.contains(wanted), "{line}");
        }
    }

    #[test]
    fn layers_with_a_window_may_rotate_otherwise() {
        let plain = |theta| Rope {
            theta,
            scaling: RopeScaling::Default,
        };
        // Of two layers the second sees everything.
        let of = |family: &str, mut changes: Value| {
            changes["layer_types"] = json!(["sliding_attention", "full_attention"]);
            let ropes = read(&with(family, changes)).unwrap().ropes;
            (ropes[0].clone().unwrap(), ropes[1].clone().unwrap())
        };
        let yarn =
            json!({"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16});
        let scaling = json!({"rope_theta": 5e5, "rope_scaling": yarn.clone()});
        let (local, full) = of("olmo3", scaling);
        assert_eq!(local, plain(5e5));
        assert_eq!(full.theta, 5e5);
        assert!(matches!(
            full.scaling,
            RopeScaling::Yarn {
                factor: 8.0,
                original_context: 16.0,
                ..
            }
        ));

        let linear = json!({"rope_type": "linear", "factor": 8.0});
        let old = json!({"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": linear});
        let both = (
            plain(1e4),
            Rope {
                theta: 1e6,
                scaling: RopeScaling::Linear { factor: 8.0 },
            },
        );
        assert_eq!(of("gemma3_text", old.clone()), both);
        let new = json!({"rope_theta": null, "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}});
        assert_eq!(of("gemma3_text", new), both);
        let bare = json!({"rope_theta": 1e6, "rope_parameters": {
            "sliding_attention": {"rope_type": "default"},
            "full_attention": {"rope_type": "linear", "factor": 8.0}}});
        assert_eq!(of("gemma3_text", bare), both);
        let silent = of("gemma3_text", json!({"rope_theta": null}));
        assert_eq!((silent.0.theta, silent.1.theta), (1e4, 1e6));
    }

    #[test]
    fn experts_are_read_as_each_family_has_them() {
        let of = |model_type: &str, changes: Value| read(&with(model_type, changes)).unwrap();
        let [olmoe, qwen, mixtral] = ["olmoe", "qwen3_moe", "mixtral"]
            .map(|family| of(family, json!({"num_experts": null})));
        assert_eq!((olmoe.ffn, qwen.ffn), (64, 24));
        let experts = |normed| Experts {
            count: 3,
            used: 2,
            normed,
        };
        assert_eq!(olmoe.experts, Some(experts(false)));
        assert_eq!(qwen.experts, Some(experts(true)));
        assert_eq!(mixtral.experts, Some(experts(true)));
        let silent = of("qwen3_moe", json!({"norm_topk_prob": null}));
        assert_eq!(silent.experts, Some(experts(false)));
        let names: Vec<_> = qwen
            .parameters()
            .into_iter()
            .map(|(name, _)| name)
            .collect();
        let at = |name: &str| names.iter().position(|n| n.ends_with(name)).unwrap();
        assert!(at("0.mlp.gate.weight") < at("0.mlp.experts.0.gate_proj.weight"));
        assert!(at("0.mlp.experts.2.up_proj.weight") < at("0.mlp.experts.0.down_proj.weight"));
        assert_eq!(names.len(), 2 * (6 + 1 + 3 * 3 + 2) + 3);
    }

    #[test]
    fn what_cannot_be_run_is_named_with_its_file() {
        for (changes, wanted) in [
            (
                json!({"model_type": "glm4"}),
                "the architecture \"glm4\" is not supported; known: llama, mistral, qwen2, qwen3, smollm3, olmo2, olmo3, gemma, gemma2, gemma3_text, phi3, granite, granitemoehybrid",
            ),
            (json!({"model_type": null}), "\"model_type\" is missing"),
            (
                json!({"partial_rotary_factor": 0.5}),
                "partial_rotary_factor: 0.5 is not supported for llama",
            ),
            (
                json!({"model_type": "olmo3", "rope_parameters": {"full_attention": {"partial_rotary_factor": 0.25}}}),
                "partial_rotary_factor: 0.25",
            ),
            (
                json!({"model_type": "phi3", "partial_rotary_factor": 0.4}),
                "3 of 8 dimensions of a head",
            ),
            (
                json!({"model_type": "phi3", "rope_scaling": long_rope(3),
                    "original_max_position_embeddings": 16}),
                "short_factor: has 3 entries for 4 pairs",
            ),
            (json!({"hidden_act": "gelu"}), "the activation \"gelu\""),
            (
                json!({"attn_logit_softcapping": 50.0}),
                "llama has no soft caps",
            ),
            (
                json!({"model_type": "granite", "residual_multiplier": 0}),
                "residual_multiplier: must be a positive number, not 0",
            ),
            (
                json!({"model_type": "granitemoehybrid"}),
                "num_local_experts: mixtures of experts",
            ),
            (
                json!({"model_type": "granitemoehybrid", "num_local_experts": 0}),
                "layer_types: only models with attention in every layer",
            ),
            (
                json!({"model_type": "granitemoehybrid", "num_local_experts": 0, "layer_types": ["attention", "mamba"]}),
                "layer_types: only models with attention in every layer",
            ),
            (
                json!({"model_type": "granitemoehybrid", "num_local_experts": 0, "layer_types": ["attention", "attention"]}),
                "position_embedding_type: only \"rope\"",
            ),
            (
                json!({"model_type": "olmoe", "num_experts": 4}),
                "\"num_experts_per_tok\" is missing",
            ),
            (
                json!({"model_type": "olmoe", "num_experts": 4, "num_experts_per_tok": 5}),
                "5 of 4 experts for a token",
            ),
            (
                json!({"model_type": "olmoe", "num_experts": 40_000, "num_experts_per_tok": 2}),
                "40000 experts in each of 2 layers are more than 65536",
            ),
            (
                json!({"model_type": "olmoe", "num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 8.0}),
                "clip_qkv: 8.0 is not supported for mixtures of experts, only null",
            ),
            (
                json!({"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 2}),
                "decoder_sparse_step: 2 is not supported",
            ),
            (
                json!({"quantization_config": {"bits": 4}}),
                "quantization_config",
            ),
            (
                json!({"architectures": ["LlamaForSequenceClassification"]}),
                "LlamaForSequenceClassification",
            ),
            (
                json!({"hidden_size": "32"}),
                "hidden_size: must be a whole number, not \"32\"",
            ),
            (
                json!({"hidden_size": -1}),
                "hidden_size: must be a whole number",
            ),
            (json!({"hidden_size": 0}), "hidden_size: must be above 0"),
            (json!({"vocab_size": null}), "\"vocab_size\" is missing"),
            (json!({"vocab_size": 1u64 << 60}), "outside 1 to"),
            (
                json!({"num_hidden_layers": 1u64 << 40}),
                "the number of layers",
            ),
            (json!({"num_key_value_heads": 3}), "evenly"),
            (json!({"head_dim": 7}), "is odd"),
            (
                json!({"head_dim": null, "hidden_size": 30}),
                "not a multiple",
            ),
            (json!({"rms_norm_eps": 0}), "epsilon"),
            (
                json!({"tie_word_embeddings": "yes"}),
                "must be true or false",
            ),
        ] {
            let line = error(&with("llama", changes.clone()));
            assert!(
                line.contains(wanted) && line.starts_with("x/config.json"),
                "{changes}: {line}"
            );
        }
        assert!(error(&json!([])).contains("must be a JSON object"));
    }

    #[test]
    fn parameters_are_those_of_transformers_in_its_order() {
        let names = |json: &Value| -> Vec<String> {
            let config = read(json).unwrap();
            config
                .parameters()
                .into_iter()
                .map(|(name, _)| name)
                .collect()
        };
        let layer = |names: Vec<String>| -> Vec<String> {
            let own = names
                .iter()
                .filter_map(|n| n.strip_prefix("model.layers.1."));
            own.map(str::to_owned).collect()
        };
        assert_eq!(
            layer(names(&config_json("qwen3"))),
            [
                "self_attn.q_proj.weight",
                "self_attn.k_proj.weight",
                "self_attn.v_proj.weight",
                "self_attn.o_proj.weight",
                "self_attn.q_norm.weight",
                "self_attn.k_norm.weight",
                "mlp.gate_proj.weight",
                "mlp.up_proj.weight",
                "mlp.down_proj.weight",
                "input_layernorm.weight",
                "post_attention_layernorm.weight",
            ]
        );
        assert!(layer(names(&config_json("qwen2"))).contains(&"self_attn.k_proj.bias".to_owned()));
        assert_eq!(
            layer(names(&config_json("olmo2")))[4..],
            [
                "self_attn.q_norm.weight",
                "self_attn.k_norm.weight",
                "mlp.gate_proj.weight",
                "mlp.up_proj.weight",
                "mlp.down_proj.weight",
                "post_attention_layernorm.weight",
                "post_feedforward_layernorm.weight",
            ]
        );
        assert_eq!(
            layer(names(&config_json("gemma3_text")))[9..],
            [
                "input_layernorm.weight",
                "post_attention_layernorm.weight",
                "pre_feedforward_layernorm.weight",
                "post_feedforward_layernorm.weight",
            ]
        );
        let tied = names(&with("llama", json!({"tie_word_embeddings": true})));
        assert_eq!(tied.first().unwrap(), "model.embed_tokens.weight");
        assert_eq!(tied.last().unwrap(), "model.norm.weight");
        assert_eq!(
            names(&config_json("llama")).last().unwrap(),
            "lm_head.weight"
        );
        let wide = read(&with("llama", json!({"head_dim": 16}))).unwrap();
        let shape = |name: &str| {
            let all = wide.parameters();
            all.into_iter().find(|(n, _)| n.ends_with(name)).unwrap().1
        };
        assert_eq!(shape("q_proj.weight"), [64, 32]);
        assert_eq!(shape("k_proj.weight"), [32, 32]);
        assert_eq!(shape("o_proj.weight"), [32, 64]);
    }

    fn long_rope(pairs: usize) -> Value {
        let factors = |step: f64| {
            (0..pairs)
                .map(|pair| 1.0 + step * pair as f64)
                .collect::<Value>()
        };
        json!({"type": "longrope", "short_factor": factors(0.25), "long_factor": factors(2.0)})
    }

    /// As Phi-4-mini's file has them.
    #[test]
    fn a_context_ends_where_the_short_divisors_do() {
        let changes = json!({"partial_rotary_factor": 0.75, "rope_scaling": long_rope(3),
            "original_max_position_embeddings": 16});
        let config = read(&with("phi3", changes.clone())).unwrap();
        assert_eq!((config.context, config.rotary_dim), (16, 6));
        let rope = config.ropes[0].as_ref().unwrap();
        let plain = Rope {
            scaling: RopeScaling::Default,
            ..rope.clone()
        };
        let frequencies = rope.inv_freq(6).into_iter().zip(plain.inv_freq(6));
        for ((found, plain), divisor) in frequencies.zip([1.0, 1.25, 1.5]) {
            assert!((found * divisor / plain - 1.0).abs() < 1e-6);
        }
        let grown = (1.0 + 4f64.ln() / 16f64.ln()).sqrt() as f32;
        assert_eq!(rope.growth(), grown);
        let mut older = changes;
        older["rope_scaling"]["type"] = json!("su");
        assert_eq!(read(&with("phi3", older.clone())).unwrap(), config);
        let written = config.to_json(None);
        assert_eq!(written["max_position_embeddings"], 64);
        assert_eq!(written["rope_scaling"].as_object().unwrap().len(), 3);
        older["rope_scaling"]["attention_factor"] = json!(1.25);
        let grown = read(&with("phi3", older)).unwrap();
        assert_eq!(grown.ropes[0].as_ref().unwrap().growth(), 1.25);
        assert_eq!(read(&grown.to_json(None)).unwrap(), grown);
    }

    #[test]
    fn a_written_config_reads_back_the_same() {
        let windows =
            json!({"use_sliding_window": true, "sliding_window": 16, "max_window_layers": 1});
        let scaled = json!({"attention_bias": true, "rope_scaling": {"rope_type": "llama3", "factor": 8.0,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}});
        for (family, changes) in [
            ("llama", scaled),
            ("mistral", json!({"sliding_window": 16})),
            ("mistral", json!({"sliding_window": null})),
            ("qwen2", windows.clone()),
            ("qwen3", windows),
            ("smollm3", json!({"no_rope_layers": [0, 1]})),
            ("olmo2", json!({"attention_bias": true})),
            (
                "olmo3",
                json!({"layer_types": ["sliding_attention", "full_attention"], "rope_theta": 5e5,
                "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}}),
            ),
            ("phi3", json!({"sliding_window": null})),
            (
                "phi3",
                json!({"sliding_window": 16, "rope_scaling": long_rope(2), "partial_rotary_factor": 0.5,
                "original_max_position_embeddings": 32}),
            ),
            (
                "gemma2",
                json!({"sliding_window": 16, "attn_logit_softcapping": 20.0,
                "final_logit_softcapping": null}),
            ),
            (
                "gemma3_text",
                json!({"sliding_window": 16, "rope_theta": 1e6, "query_pre_attn_scalar": 168}),
            ),
            (
                "granite",
                json!({"attention_bias": true, "residual_multiplier": 1}),
            ),
            ("granitemoehybrid", json!({"residual_multiplier": 1})),
        ] {
            let config = read(&with(family, changes)).unwrap();
            let written = config.to_json(None);
            assert_eq!(read(&written).unwrap(), config);
            assert_eq!(written["torch_dtype"], "float32");
            assert_eq!(written["rms_norm_eps"], json!(1e-5));
        }
        // An odd factor of what layers add is in the others.
        let config = read(&with("granite", json!({"residual_multiplier": 0.22}))).unwrap();
        assert_eq!(read(&config.to_json(None)).unwrap(), config);
        // A file of transformers 5 keeps its own fields.
        let mut new = config_json("llama");
        new.as_object_mut().unwrap().shift_remove("torch_dtype");
        new["dtype"] = json!("bfloat16");
        let config = read(&new).unwrap();
        let written = config.to_json(Some(&new));
        new["dtype"] = json!("float32");
        assert_eq!(written, new);
    }
}
