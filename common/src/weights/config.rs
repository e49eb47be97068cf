//! What a decoder needs to know of a model family: read from `config.json`, kept as data, written back.

use super::rope::Rope;
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value, json};
use std::path::Path;

/// The families that one decoder serves; `model_type` in `config.json`.
pub const FAMILIES: [&str; 5] = ["llama", "mistral", "qwen2", "qwen3", "smollm3"];

/// The nonlinearity of the gated MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// x·sigmoid(x)
    Silu,
}

/// A decoder's shape. Differences between families are data here, not branches in the forward pass.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// One of [`FAMILIES`].
    pub model_type: String,
    /// Rows of the embedding (and of the LM head), tokens.
    pub vocab: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head, even; `heads * head_dim` need not be `hidden`.
    pub head_dim: usize,
    /// Inner width of the MLP.
    pub ffn: usize,
    /// Epsilon of every RMS norm.
    pub norm_eps: f32,
    /// Longest sequence, tokens (`max_position_embeddings`).
    pub context: usize,
    /// The LM head is the embedding.
    pub tied: bool,
    /// Biases on the query, key and value projections.
    pub qkv_bias: bool,
    /// Bias on the attention's output projection.
    pub o_bias: bool,
    /// Biases on the three projections of the MLP.
    pub mlp_bias: bool,
    /// RMS norm of each query and key head before the rotation (Qwen3).
    pub qk_norm: bool,
    pub activation: Activation,
    /// Per layer: the attention's window in tokens, the query itself included (a query at position i
    /// sees keys j with i − window < j ≤ i), or None for all of the past.
    pub windows: Vec<Option<usize>>,
    /// Per layer: whether queries and keys are rotated to their positions (SmolLM3 leaves out some layers, arXiv 2501.18795).
    pub rotates: Vec<bool>,
    pub rope: Rope,
}

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

    /// Every tensor of the model by its Hugging Face name, with its shape (row-major, `[out, in]`
    /// for projections), in the order of transformers' state dict. `lm_head.weight` only if untied.
    pub fn parameters(&self) -> Vec<(String, Vec<usize>)> {
        let mut all = vec![(
            "model.embed_tokens.weight".to_owned(),
            vec![self.vocab, self.hidden],
        )];
        for layer in 0..self.layers {
            self.layer_parameters(layer, &mut all);
        }
        all.push(("model.norm.weight".to_owned(), vec![self.hidden]));
        if !self.tied {
            all.push(("lm_head.weight".to_owned(), vec![self.vocab, self.hidden]));
        }
        all
    }

    fn layer_parameters(&self, layer: usize, all: &mut Vec<(String, Vec<usize>)>) {
        let (hidden, ffn) = (self.hidden, self.ffn);
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let projections = [
            ("self_attn.q_proj", q, hidden, self.qkv_bias),
            ("self_attn.k_proj", kv, hidden, self.qkv_bias),
            ("self_attn.v_proj", kv, hidden, self.qkv_bias),
            ("self_attn.o_proj", hidden, q, self.o_bias),
            ("mlp.gate_proj", ffn, hidden, self.mlp_bias),
            ("mlp.up_proj", ffn, hidden, self.mlp_bias),
            ("mlp.down_proj", hidden, ffn, self.mlp_bias),
        ];
        let mut push = |name: &str, shape: Vec<usize>| {
            all.push((format!("model.layers.{layer}.{name}"), shape));
        };
        for (module, out, input, bias) in projections {
            if module == "mlp.gate_proj" && self.qk_norm {
                push("self_attn.q_norm.weight", vec![self.head_dim]);
                push("self_attn.k_norm.weight", vec![self.head_dim]);
            }
            push(&format!("{module}.weight"), vec![out, input]);
            if bias {
                push(&format!("{module}.bias"), vec![out]);
            }
        }
        push("input_layernorm.weight", vec![hidden]);
        push("post_attention_layernorm.weight", vec![hidden]);
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
        // The layout of `use_sliding_window`, `max_window_layers` and `layer_types` is Qwen's and SmolLM3's; Mistral has one window.
        let window = self.windows.iter().flatten().next();
        let layer_types: Vec<_> = self
            .windows
            .iter()
            .map(|window| match window {
                Some(_) => "sliding_attention",
                None => "full_attention",
            })
            .collect();
        let class = match self.model_type.as_str() {
            "mistral" => "Mistral",
            "qwen2" => "Qwen2",
            "qwen3" => "Qwen3",
            "smollm3" => "SmolLM3",
            _ => "Llama",
        };
        let mut set = |key: &str, value: Value| fields.insert(key.to_owned(), value);
        set("architectures", json!([format!("{class}ForCausalLM")]));
        set("model_type", json!(self.model_type));
        set("vocab_size", json!(self.vocab));
        set("hidden_size", json!(self.hidden));
        set("intermediate_size", json!(self.ffn));
        set("num_hidden_layers", json!(self.layers));
        set("num_attention_heads", json!(self.heads));
        set("num_key_value_heads", json!(self.kv_heads));
        set("head_dim", json!(self.head_dim));
        set("hidden_act", json!("silu"));
        set("max_position_embeddings", json!(self.context));
        set("rms_norm_eps", shortest(self.norm_eps));
        set("tie_word_embeddings", json!(self.tied));
        set("rope_theta", shortest(self.rope.theta));
        set("rope_scaling", self.rope.scaling_json());
        if ["llama", "qwen3", "smollm3"].contains(&&*self.model_type) {
            set("attention_bias", json!(self.qkv_bias));
        }
        if ["llama", "smollm3"].contains(&&*self.model_type) {
            set("mlp_bias", json!(self.mlp_bias));
        }
        if self.model_type == "smollm3" {
            let rotates: Vec<_> = self.rotates.iter().map(|&r| u8::from(r)).collect();
            set("no_rope_layers", json!(rotates));
        }
        if self.model_type == "mistral" {
            set("sliding_window", json!(window));
        }
        if self.model_type.starts_with("qwen") || self.model_type == "smollm3" {
            set("use_sliding_window", json!(window.is_some()));
            set("sliding_window", json!(window));
            set("layer_types", json!(layer_types));
        }
    }
}

/// A float32 as the shortest decimal that reads back the same (1e-5, not 9.999999747378752e-6).
pub(super) fn shortest(value: f32) -> Value {
    json!(value.to_string().parse::<f64>().unwrap_or(f64::from(value)))
}

fn read(fields: &Fields) -> Result<Config> {
    let model_type = fields
        .text("model_type")?
        .context("\"model_type\" is missing: which architecture is this?")?;
    ensure!(
        FAMILIES.contains(&model_type),
        "model_type: the architecture {model_type:?} is not supported; known: {}",
        FAMILIES.join(", ")
    );
    refuse_what_would_be_read_wrongly(fields)?;
    let qwen = model_type.starts_with("qwen");
    let smollm3 = model_type == "smollm3";
    let (hidden, heads) = (
        fields.size("hidden_size")?,
        fields.size("num_attention_heads")?,
    );
    let kv_heads = match fields.present("num_key_value_heads") {
        None if model_type == "mistral" && !fields.0.contains_key("num_key_value_heads") => 8,
        None if smollm3 && !fields.0.contains_key("num_key_value_heads") => 4,
        None => heads,
        Some(_) => fields.size("num_key_value_heads")?,
    };
    let head_dim = match (fields.present("head_dim"), model_type) {
        (Some(_), _) => fields.size("head_dim")?,
        (None, "qwen3") => 128,
        (None, _) => {
            ensure!(
                hidden.is_multiple_of(heads),
                "hidden_size {hidden} is not a multiple of num_attention_heads {heads}"
            );
            hidden / heads
        }
    };
    let attention_bias = match model_type {
        "llama" | "qwen3" | "smollm3" => fields.flag("attention_bias")?.unwrap_or(false),
        _ => false,
    };
    let layers = bounded_layers(fields.size("num_hidden_layers")?)?;
    let context = fields.size("max_position_embeddings")?;
    let rotates = match smollm3 {
        true => smollm3_rotates(fields, layers)?,
        false => vec![true; layers],
    };
    Config {
        model_type: model_type.to_owned(),
        vocab: fields.size("vocab_size")?,
        hidden,
        layers,
        heads,
        kv_heads,
        head_dim,
        ffn: fields.size("intermediate_size")?,
        norm_eps: fields.number("rms_norm_eps")?.unwrap_or(1e-6) as f32,
        context,
        tied: fields.flag("tie_word_embeddings")?.unwrap_or(smollm3),
        qkv_bias: attention_bias || model_type == "qwen2",
        o_bias: attention_bias,
        mlp_bias: (model_type == "llama" || smollm3) && fields.flag("mlp_bias")?.unwrap_or(false),
        qk_norm: model_type == "qwen3",
        activation: Activation::Silu,
        windows: match model_type {
            "mistral" => vec![mistral_window(fields)?; layers],
            _ if qwen => qwen_windows(fields, layers)?,
            _ if smollm3 => smollm3_windows(fields, &rotates)?,
            _ => vec![None; layers],
        },
        rotates,
        rope: Rope::from_json(fields.0, context)?,
    }
    .checked()
}

impl Config {
    /// What of the config changes the numbers beyond the tensors' own shapes, as text for the fingerprint.
    pub(super) fn arithmetic(&self) -> String {
        let rotates = match self.rotates.contains(&false) {
            true => format!(" rotates {:?}", self.rotates),
            false => String::new(),
        };
        format!(
            "heads {} kv_heads {} head_dim {} eps {:?} tied {} activation {:?} windows {:?} rope {:?}{rotates}\n",
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.norm_eps,
            self.tied,
            self.activation,
            self.windows,
            self.rope,
        )
    }

    /// The bounds that the arithmetic relies on; also the guard of sizes against overflow and absurd allocations.
    pub(super) fn checked(self) -> Result<Self> {
        let sizes = [
            ("vocabulary", self.vocab, 1 << 24),
            ("hidden size", self.hidden, 1 << 20),
            ("number of attention heads", self.heads, 1 << 12),
            ("number of key/value heads", self.kv_heads, 1 << 12),
            ("head dimension", self.head_dim, 1 << 12),
            ("MLP size", self.ffn, 1 << 22),
            ("context", self.context, 1 << 30),
        ];
        for (what, size, most) in sizes {
            ensure!(
                (1..=most).contains(&size),
                "the {what} is {size}, outside 1 to {most}"
            );
        }
        ensure!(
            self.heads.is_multiple_of(self.kv_heads),
            "{} attention heads cannot share {} key/value heads evenly",
            self.heads,
            self.kv_heads
        );
        ensure!(
            self.head_dim.is_multiple_of(2),
            "the head dimension {} is odd: rotary positions need pairs",
            self.head_dim
        );
        ensure!(
            self.norm_eps.is_finite() && self.norm_eps > 0.0,
            "the norm's epsilon {} is not a positive number",
            self.norm_eps
        );
        Ok(self)
    }
}

/// The number of layers is held to a bound before anything is allocated for each.
pub(super) fn bounded_layers(layers: usize) -> Result<usize> {
    ensure!(
        (1..=4096).contains(&layers),
        "the number of layers is {layers}, outside 1 to 4096"
    );
    Ok(layers)
}

/// Options under which the same tensors mean something else than this decoder would compute.
fn refuse_what_would_be_read_wrongly(fields: &Fields) -> Result<()> {
    if let Some(activation) = fields.text("hidden_act")? {
        ensure!(
            ["silu", "swish"].contains(&activation),
            "hidden_act: the activation {activation:?} is not supported; known: silu"
        );
    }
    ensure!(
        fields.present("quantization_config").is_none(),
        "quantization_config: quantised safetensors are not supported; use the float checkpoint, or a GGUF"
    );
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

fn mistral_window(fields: &Fields) -> Result<Option<usize>> {
    Ok(match fields.0.get("sliding_window") {
        None => Some(4096),
        Some(Value::Null) => None,
        Some(_) => Some(fields.size("sliding_window")?),
    })
}

/// SmolLM3Config.__post_init__ of transformers 5: a list that is there, or all but every fourth layer.
fn smollm3_rotates(fields: &Fields, layers: usize) -> Result<Vec<bool>> {
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

/// The same: with `use_sliding_window`, a window on the layers that do not rotate, unless `layer_types` says which.
fn smollm3_windows(fields: &Fields, rotates: &[bool]) -> Result<Vec<Option<usize>>> {
    let window = match fields.flag("use_sliding_window")?.unwrap_or(false) {
        true if fields.present("sliding_window").is_some() => Some(fields.size("sliding_window")?),
        _ => None,
    };
    match fields.present("layer_types") {
        Some(types) => typed_windows(types, window, rotates.len()),
        None => Ok(rotates.iter().map(|&r| window.filter(|_| !r)).collect()),
    }
}

/// Qwen2Config/Qwen3Config.__post_init__ of transformers 5: a window only with `use_sliding_window`, on the
/// layers from `max_window_layers` on, unless `layer_types` says which.
fn qwen_windows(fields: &Fields, layers: usize) -> Result<Vec<Option<usize>>> {
    let window = match fields.flag("use_sliding_window")?.unwrap_or(false) {
        true => mistral_window(fields)?,
        false => None,
    };
    let Some(types) = fields.present("layer_types") else {
        let first = match fields.present("max_window_layers") {
            None => 28,
            Some(_) => fields.count("max_window_layers")?,
        };
        return Ok((0..layers)
            .map(|layer| window.filter(|_| layer >= first))
            .collect());
    };
    typed_windows(types, window, layers)
}

/// A window on the layers of which `layer_types` says so.
fn typed_windows(
    types: &Value,
    window: Option<usize>,
    layers: usize,
) -> Result<Vec<Option<usize>>> {
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
        let flags = |c: &Config| (c.qkv_bias, c.o_bias, c.mlp_bias, c.qk_norm);
        assert_eq!(flags(&of("llama")), (false, false, false, false));
        assert_eq!(flags(&of("mistral")), (false, false, false, false));
        assert_eq!(flags(&of("qwen2")), (true, false, false, false));
        assert_eq!(flags(&of("qwen3")), (false, false, false, true));
        assert_eq!(flags(&of("smollm3")), (false, false, false, false));
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
            (found.rotates, found.windows)
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
    fn what_cannot_be_run_is_named_with_its_file() {
        for (changes, wanted) in [
            (
                json!({"model_type": "gemma2"}),
                "the architecture \"gemma2\" is not supported; known: llama, mistral, qwen2, qwen3, smollm3",
            ),
            (json!({"model_type": null}), "\"model_type\" is missing"),
            (json!({"hidden_act": "gelu"}), "the activation \"gelu\""),
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
        ] {
            let config = read(&with(family, changes)).unwrap();
            let written = config.to_json(None);
            assert_eq!(read(&written).unwrap(), config);
            assert_eq!(written["torch_dtype"], "float32");
            assert_eq!(written["rms_norm_eps"], json!(1e-5));
        }
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
