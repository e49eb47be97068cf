//! Tiny random models that the tests write themselves.

use super::{Config, Given, Recurrence, RopeScaling, Weights, save};
use candle_core::quantized::{GgmlDType, QTensor, gguf_file};
use candle_core::{Device, Tensor};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde_json::{Value, json};
use std::borrow::Cow;
use std::path::{Path, PathBuf};

pub(super) type Tensors = Vec<(String, Vec<usize>, Vec<f32>)>;

/// The fields that every family's `config.json` has, and some that only a few heed: 2 layers, 4 heads of 8 over 2
/// key/value heads.
pub(super) fn config_json(model_type: &str) -> Value {
    let mut json = json!({
        "architectures": [format!("{}{}ForCausalLM", model_type[..1].to_uppercase(), &model_type[1..])],
        "model_type": model_type, "vocab_size": 40, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "hidden_act": "silu", "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": false, "rope_theta": 10000.0, "torch_dtype": "bfloat16", "bos_token_id": 1,
        "eos_token_id": 2, "query_pre_attn_scalar": 8, "embedding_multiplier": 6, "attention_multiplier": 0.3,
        "residual_multiplier": 0.5, "logits_scaling": 6,
    });
    if model_type.contains("moe") || ["mixtral", "gpt_oss"].contains(&model_type) {
        json["num_experts"] = json!(3);
        json["num_local_experts"] = json!(3);
        json["n_routed_experts"] = json!(3);
        json["num_experts_per_tok"] = json!(2);
        json["moe_intermediate_size"] = json!(24);
        json["norm_topk_prob"] = json!(["qwen3_moe", "glm4_moe", "lfm2_moe"].contains(&model_type));
        json["routed_scaling_factor"] = json!(2.5);
        json["shared_expert_intermediate_size"] = json!(40);
        json["shared_intermediate_size"] = json!(40);
    }
    if model_type == "qwen2_moe" {
        json["mlp_only_layers"] = json!([1]);
    }
    if model_type.starts_with("qwen3_5") {
        json["layer_types"] = json!(["linear_attention", "full_attention"]);
        json["linear_num_key_heads"] = json!(1);
        json["linear_num_value_heads"] = json!(2);
        json["linear_key_head_dim"] = json!(4);
        json["linear_value_head_dim"] = json!(6);
    }
    if model_type.starts_with("lfm2") {
        json["layer_types"] = json!(["conv", "full_attention"]);
        json["block_multiple_of"] = json!(16);
        json["num_dense_layers"] = json!(1);
        json["norm_eps"] = json!(1e-5);
    }
    if model_type == "ministral3" {
        json["rope_parameters"] = json!({
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
            "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
        });
    }
    if model_type == "granitemoehybrid" {
        json["shared_intermediate_size"] = json!(64);
        json["num_local_experts"] = json!(0);
        json["layer_types"] = json!(["attention", "full_attention"]);
        json["position_embedding_type"] = json!("rope");
    }
    if model_type.starts_with("gemma4") {
        json["num_hidden_layers"] = json!(3);
        json["layer_types"] = json!(["sliding_attention", "full_attention", "full_attention"]);
        json["global_head_dim"] = json!(12);
        json["attention_k_eq_v"] = json!(true);
        json["num_global_key_value_heads"] = json!(1);
        json["num_kv_shared_layers"] = json!(1);
        json["use_double_wide_mlp"] = json!(true);
        json["hidden_size_per_layer_input"] = json!(6);
        json["vocab_size_per_layer_input"] = json!(40);
        json["rope_parameters"] = json!({
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "proportional", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        });
    }
    if model_type == "cohere" {
        json["use_qk_norm"] = json!(true);
    }
    if model_type == "cohere2" {
        json["num_hidden_layers"] = json!(5);
    }
    if model_type == "gemma" {
        json["hidden_act"] = json!("gelu");
    }
    json
}

pub(super) fn config(model_type: &str) -> Config {
    Config::from_json(&config_json(model_type), Path::new("config.json")).unwrap()
}

/// Values that bfloat16 and float16 both hold exactly: quarters in −8 to 8.
pub(super) fn random_tensors(config: &Config, seed: u64) -> Tensors {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut value = move || (rng.next_u32() % 65) as f32 / 4.0 - 8.0;
    let fill = |(name, shape): (String, Vec<usize>)| {
        let values = (0..shape.iter().product()).map(|_| value()).collect();
        (name, shape, values)
    };
    config.parameters().into_iter().map(fill).collect()
}

pub(super) fn borrowed(tensors: &Tensors) -> impl Iterator<Item = Given<'_>> {
    tensors
        .iter()
        .map(|(name, shape, values)| Ok((name.clone(), shape.clone(), Cow::Borrowed(&values[..]))))
}

/// A saved checkpoint in a fresh folder, with its tensors.
pub(super) fn checkpoint(model_type: &str) -> (tempfile::TempDir, Config, Tensors) {
    let folder = tempfile::tempdir().unwrap();
    let config = config(model_type);
    let tensors = random_tensors(&config, 7);
    save(folder.path(), &config, None, borrowed(&tensors)).unwrap();
    (folder, config, tensors)
}

/// A family's checkpoint that transformers wrote.
pub(super) fn golden(family: &str) -> PathBuf {
    let families = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/families");
    families.join(family)
}

/// All of a model's tensors.
pub(super) fn all_tensors(weights: &Weights) -> Tensors {
    (weights.config.parameters().into_iter())
        .map(|(name, shape)| {
            let values = weights.tensor(&name, &shape).unwrap();
            (name, shape, values)
        })
        .collect()
}

pub(super) fn open(path: &Path) -> anyhow::Result<Weights> {
    Weights::open(path.to_str().unwrap())
}

/// The whole chain of an error in one line, as the programs print it.
pub(super) fn error(path: &Path) -> String {
    match open(path) {
        Ok(_) => panic!("{} opened, but should not", path.display()),
        Err(error) => format!("{error:#}"),
    }
}

pub(super) fn assert_holds(weights: &Weights, tensors: &Tensors) {
    for (name, shape, values) in tensors {
        assert_eq!(&weights.tensor(name, shape).unwrap(), values, "{name}");
    }
}

/// llama.cpp's permutation of query and key rows, from `LlamaModel.permute` of its converter.
pub(super) fn permute(values: &[f32], heads: usize, row: usize) -> Vec<f32> {
    let half = values.len() / row / heads / 2;
    let mut out = Vec::new();
    for head in 0..heads {
        for i in 0..half {
            for j in 0..2 {
                let from = (head * 2 * half + j * half + i) * row;
                out.extend_from_slice(&values[from..from + row]);
            }
        }
    }
    out
}

/// Metadata of a GGUF with the shape of `config`.
pub(super) fn gguf_metadata(config: &Config, arch: &str) -> Vec<(String, gguf_file::Value)> {
    use gguf_file::Value::{Array, F32, String, U32};
    let key = |name: &str| format!("{arch}.{name}");
    let number = |n: usize| U32(n as u32);
    let mut metadata = vec![
        ("general.architecture".into(), String(arch.into())),
        (key("block_count"), number(config.layers)),
        (key("context_length"), number(config.context)),
        (key("embedding_length"), number(config.hidden)),
        (key("feed_forward_length"), number(config.ffn)),
        (key("attention.head_count"), number(config.heads)),
        (key("attention.head_count_kv"), number(config.kv_heads)),
        (key("attention.key_length"), number(config.head_dim)),
        (
            key(match config.norms_centred {
                true => "attention.layer_norm_epsilon",
                false => "attention.layer_norm_rms_epsilon",
            }),
            F32(config.norm_eps),
        ),
        (
            key("rope.freq_base"),
            F32(config.ropes.iter().flatten().next_back().unwrap().theta),
        ),
        ("tokenizer.ggml.eos_token_id".into(), U32(2)),
        (
            "tokenizer.ggml.tokens".into(),
            Array(vec![String("a".into()), String("b".into())]),
        ),
    ];
    if let Some(window) = config.windows[0] {
        metadata.push((key("attention.sliding_window"), number(window)));
    }
    if config.rotary_dim < config.head_dim {
        metadata.push((key("rope.dimension_count"), number(config.rotary_dim)));
    }
    if config.is_parallel() {
        metadata.push((key("logit_scale"), F32(config.logit_scale)));
    }
    if let Some(experts) = config.mixture() {
        metadata.extend([
            (key("expert_count"), number(experts.count)),
            (key("expert_used_count"), number(experts.used)),
        ]);
    }
    if ["glm4moe", "lfm2moe"].contains(&arch) {
        let scale = config.mixture().unwrap().scale;
        metadata.extend([
            (key("expert_gating_func"), number(2)),
            (key("expert_weights_norm"), gguf_file::Value::Bool(true)),
            (key("expert_weights_scale"), F32(scale)),
        ]);
    }
    let scaling = config.ropes[0].as_ref().map(|rope| &rope.scaling);
    if let Some(&RopeScaling::Yarn {
        factor,
        original_context,
        ..
    }) = scaling
    {
        metadata.extend([
            (key("rope.scaling.type"), String("yarn".into())),
            (key("rope.scaling.factor"), F32(factor)),
            (
                key("rope.scaling.original_context_length"),
                U32(original_context as u32),
            ),
        ]);
    }
    if let Some(growth) = config.query_growth {
        metadata.extend([
            (key("attention.temperature_scale"), F32(growth.beta)),
            (key("rope.scaling.yarn_log_multiplier"), F32(1.0)),
        ]);
    }
    if arch.starts_with("granite") {
        metadata.extend([
            (key("embedding_scale"), F32(config.embed_scale)),
            (key("attention.scale"), F32(config.attention_scale)),
            (key("logit_scale"), F32(1.0 / config.logit_scale)),
        ]);
    }
    metadata
}

/// What a GGUF of Gemma 4 says beyond others, and its tensor of divisors.
pub(super) fn uneven(
    config: &Config,
    metadata: &mut Vec<(String, gguf_file::Value)>,
    stored: &mut Tensors,
) {
    use gguf_file::Value::{Array, Bool, F32, U32};
    let key = |name: &str| format!("gemma4.{name}");
    let layers = 0..config.layers;
    let number = |n: usize| U32(n as u32);
    let kv = layers.clone().map(|i| number(config.heads_of(i).kv));
    let ffn = layers.map(|i| number(config.mlp_projections(i)[0].1));
    let sliding = config.windows.iter().map(|window| Bool(window.is_some()));
    let local = config.ropes[0].as_ref().unwrap().theta;
    let said = [
        ("attention.head_count_kv", Array(kv.collect())),
        ("feed_forward_length", Array(ffn.collect())),
        ("attention.sliding_window_pattern", Array(sliding.collect())),
        ("attention.key_length", number(config.wide.unwrap().dim)),
        ("attention.key_length_swa", number(config.head_dim)),
        ("attention.shared_kv_layers", number(config.sharing)),
        ("rope.freq_base_swa", F32(local)),
        (
            "embedding_length_per_layer_input",
            number(config.layer_inputs.unwrap()),
        ),
    ];
    metadata.retain(|(name, _)| !said.iter().any(|(other, _)| *name == key(other)));
    metadata.extend(said.map(|(name, value)| (key(name), value)));
    let divisors = vec![1.0, 1.0, 1.0, 1e30, 1e30, 1e30];
    stored.push(("rope_freqs.weight".into(), vec![6], divisors));
    // As published files have it, though nobody reads it.
    stored.push((
        "blk.2.attn_k.weight".into(),
        vec![12, 32],
        vec![0.5; 12 * 32],
    ));
}

/// Writes `tensors` (Hugging Face names and order) as a GGUF of the given block type.
pub(super) fn write_gguf(
    path: &Path,
    metadata: &[(String, gguf_file::Value)],
    tensors: &[(String, Vec<usize>, Vec<f32>)],
    dtype: GgmlDType,
) {
    let quantised: Vec<_> = tensors
        .iter()
        .map(|(name, shape, values)| {
            let dtype = if shape.len() == 1 {
                GgmlDType::F32
            } else {
                dtype
            };
            // The converter leaves out dimensions of 1.
            let mut said: Vec<_> = shape.iter().copied().filter(|&n| n != 1).collect();
            if said.is_empty() {
                said.push(1);
            }
            let tensor = Tensor::from_slice(values, said, &Device::Cpu).unwrap();
            (name.clone(), QTensor::quantize(&tensor, dtype).unwrap())
        })
        .collect();
    let metadata: Vec<_> = metadata.iter().map(|(k, v)| (k.as_str(), v)).collect();
    let tensors: Vec<_> = quantised.iter().map(|(k, v)| (k.as_str(), v)).collect();
    let mut file = std::fs::File::create(path).unwrap();
    gguf_file::write(&mut file, &metadata, &tensors).unwrap();
}

/// Tensors as a GGUF has them, query and key rows permuted where llama.cpp rotates neighbours.
pub(super) fn as_gguf(config: &Config, arch: &str, tensors: &Tensors) -> Tensors {
    let permuted = ["llama", "mistral3", "smollm3", "granite", "granitemoe"].contains(&arch);
    let mut stored: Tensors = vec![];
    for (name, shape, values) in tensors {
        let heads = match name {
            name if name.contains("q_proj") => config.heads,
            name if name.contains("k_proj") => config.kv_heads,
            _ => 0,
        };
        let row = shape[1..].iter().product();
        let values = match permuted && heads > 0 {
            true => permute(values, heads, row),
            false => config.stored_rows(name, shape, values.into()).into_owned(),
        };
        let place = super::gguf::place(config, name, shape).unwrap();
        let at = stored.iter().position(|(name, ..)| *name == place.name);
        let at = at.unwrap_or_else(|| {
            let len = place.shape.iter().product();
            stored.push((place.name.clone(), place.shape.clone(), vec![f32::NAN; len]));
            stored.len() - 1
        });
        stored[at].2[place.rows.start * row..place.rows.end * row].copy_from_slice(&values);
    }
    stored
}

/// A GGUF of a tiny random model; the config and tensors are what it should open as.
pub(super) fn gguf(
    folder: &Path,
    model_type: &str,
    dtype: GgmlDType,
) -> (PathBuf, Config, Tensors) {
    gguf_of(folder, config(model_type), dtype)
}

/// The same of this config.
pub(super) fn gguf_of(
    folder: &Path,
    config: Config,
    dtype: GgmlDType,
) -> (PathBuf, Config, Tensors) {
    let tensors = random_tensors(&config, 11);
    let path = folder.join("tiny.gguf");
    let arch = match config.model_type.as_str() {
        "olmo3" => "olmo2",
        "gemma3_text" => "gemma3",
        "gemma4_text" => "gemma4",
        "cohere" => "command-r",
        "qwen2_moe" => "qwen2moe",
        "qwen3_moe" => "qwen3moe",
        "granitemoeshared" => "granitemoe",
        "glm4_moe" => "glm4moe",
        "lfm2_moe" => "lfm2moe",
        "ernie4_5_moe" => "ernie4_5-moe",
        "hunyuan_v1_moe" => "hunyuan-moe",
        "mixtral" => "llama",
        "glm" => "chatglm",
        "hunyuan_v1_dense" => "hunyuan-dense",
        "ministral3" => "mistral3",
        "gpt_oss" => "gpt-oss",
        model_type => model_type,
    };
    let mut stored = as_gguf(&config, arch, &tensors);
    let mut metadata = gguf_metadata(&config, arch);
    if config.layer_scales {
        uneven(&config, &mut metadata, &mut stored);
    }
    if let Some(Recurrence::Conv(shape)) = config.recurrences[0] {
        metadata.retain(|(key, _)| !key.ends_with(".head_count_kv"));
        let kernel = gguf_file::Value::U32(shape.kernel as u32);
        metadata.push((format!("{arch}.shortconv.l_cache"), kernel));
        let heads = |recurrence: &Option<_>| match recurrence {
            Some(_) => gguf_file::Value::I32(0),
            None => gguf_file::Value::I32(config.kv_heads as i32),
        };
        let heads = config.recurrences.iter().map(heads).collect();
        let heads = gguf_file::Value::Array(heads);
        metadata.push((format!("{arch}.attention.head_count_kv"), heads));
    }
    write_gguf(&path, &metadata, &stored, dtype);
    (path, config, tensors)
}
