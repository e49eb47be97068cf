//! What files say of each family, and what is refused.

use super::super::config::WideHeads;
use super::super::fixtures::config_json;
use super::super::{Experts, Fused, Norms, QkNorm, Recurrence, Rope, RopeScaling, Scores};
use super::*;
use crate::kernels::activation::Activation;

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

/// Of so many layers each one's window, and whether it rotates.
fn layers_of(model_type: &str, count: usize, mut changes: Value) -> Vec<(Option<usize>, bool)> {
    changes["num_hidden_layers"] = json!(count);
    let config = read(&with(model_type, changes)).unwrap();
    let rotates = config.ropes.iter().map(Option::is_some);
    config.windows.iter().copied().zip(rotates).collect()
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
    assert_eq!(flags(&of("glm4")), (true, false, false, false));
    assert_eq!(flags(&of("ernie4_5")), (false, false, false, false));
    assert_eq!(of("hunyuan_v1_dense").qk_norm, Some(QkNorm::Turned));
    assert_eq!(
        (of("glm4").norms, of("glm").norms),
        (Norms::Around, Norms::Before)
    );
    assert_eq!(flags(&of("exaone4")), (false, false, false, true));
    assert_eq!(flags(&of("seed_oss")), (true, false, false, false));
    let biases = json!({"attention_bias": false, "attention_out_bias": true, "mlp_bias": true});
    let other = read(&with("seed_oss", biases)).unwrap();
    assert_eq!(flags(&other), (false, true, true, false));
    assert_eq!(flags(&of("gpt_oss")), (true, true, false, false));
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
    for cohere in ["cohere", "cohere2"] {
        let scaled = json!({"logit_scale": 0.25, "use_qk_norm": cohere == "cohere2"});
        let c = read(&with(cohere, scaled)).unwrap();
        assert_eq!(flags(&c), (false, false, false, false));
        assert_eq!((c.norms, c.norms_centred), (Norms::Once, true));
        assert_eq!((c.logit_scale, c.attention_scale), (0.25, plain.4));
        assert_eq!(c.layer_norms().into_iter().flatten().count(), 1);
    }
    assert_eq!(of("cohere").qk_norm, Some(QkNorm::Apart));
    assert!(!of("llama").norms_centred);
    let biased = json!({"attention_bias": true, "mlp_bias": true, "use_bias": true});
    let of = |model_type: &str| read(&with(model_type, biased.clone())).unwrap();
    assert_eq!(flags(&of("glm4")), (true, false, false, false));
    assert_eq!(flags(&of("ernie4_5")), (true, true, true, false));
    assert_eq!(flags(&of("hunyuan_v1_dense")), (true, true, false, true));
    assert_eq!(flags(&of("llama")), (true, true, true, false));
    assert_eq!(flags(&of("cohere")), (true, true, false, true));
    assert_eq!(flags(&of("cohere2")), (true, true, false, false));
    assert_eq!(flags(&of("mistral")), (false, false, false, false));
    assert_eq!(flags(&of("qwen2")), (true, false, false, false));
    assert_eq!(flags(&of("qwen3")), (true, true, false, true));
    assert_eq!(flags(&of("smollm3")), (true, true, true, false));
    // GLM-4-32B has none; 9B has them.
    let unbiased = read(&with("glm4", json!({"attention_bias": false}))).unwrap();
    assert_eq!(flags(&unbiased), (false, false, false, false));
}

/// As Hunyuan's files have it: transformers gives base · alpha^(dim / (dim − 2)), whatever the context.
#[test]
fn an_alpha_stretches_the_base() {
    let scaling = json!({"type": "dynamic", "alpha": 1000.0, "factor": 1.0, "beta_fast": 32, "beta_slow": 1,
        "mscale": 1.0, "mscale_all_dim": 1.0});
    let mut changes = json!({"head_dim": 128, "rope_scaling": scaling});
    let rope = |changes: &Value| {
        read(&with("hunyuan_v1_dense", changes.clone()))
            .unwrap()
            .ropes[0]
            .clone()
    };
    let stretched = Some(Rope {
        theta: 11_158_840.0,
        scaling: RopeScaling::Default,
    });
    assert_eq!(rope(&changes), stretched);
    changes["rope_scaling"]["rope_theta"] = json!(10_000.0);
    changes["rope_parameters"] = changes["rope_scaling"].take();
    changes["rope_theta"] = Value::Null;
    assert_eq!(rope(&changes), stretched);
    changes["rope_parameters"]["type"] = json!("default");
    assert_eq!(rope(&changes).unwrap().theta, 10_000.0);
}

#[test]
fn absent_fields_get_transformers_defaults() {
    let of = |model_type: &str, key: &str| read(&without(model_type, key)).unwrap();
    assert_eq!(of("llama", "num_key_value_heads").kv_heads, 4);
    assert_eq!(of("llama", "head_dim").head_dim, 8);
    assert_eq!(of("qwen3", "head_dim").head_dim, 128);
    assert_eq!(of("qwen2", "rms_norm_eps").norm_eps, 1e-6);
    let rotated = |c: Config| (c.rotary_dim, c.head_dim);
    assert_eq!(rotated(of("glm4", "head_dim")), (64, 128));
    assert_eq!(of("glm", "rms_norm_eps").norm_eps, 1.5625e-7);
    let mut inner = json!({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}});
    assert_eq!(rotated(read(&with("glm4", inner.clone())).unwrap()), (2, 8));
    // The older object is heard in the place of the newer, not beside it.
    inner["rope_scaling"] = json!({"type": "linear", "factor": 3});
    assert_eq!(rotated(read(&with("glm4", inner)).unwrap()), (4, 8));
    let theta = |c: Config| c.ropes[0].as_ref().unwrap().theta;
    assert_eq!(theta(of("ernie4_5", "rope_theta")), 500_000.0);
    assert!(of("ernie4_5", "tie_word_embeddings").tied);
    for (cohere, base) in [("cohere", 500_000.0), ("cohere2", 10_000.0)] {
        let c = of(cohere, "rope_theta");
        assert_eq!((theta(c.clone()), c.logit_scale), (base, 0.0625));
        // (RMS norms' is not heard.)
        let c = of(cohere, "layer_norm_eps");
        assert_eq!((c.norm_eps, c.kv_heads), (1e-5, 2));
        assert_eq!(of(cohere, "num_key_value_heads").kv_heads, 4);
        assert_eq!(of(cohere, "head_dim").head_dim, 8);
        assert!(of(cohere, "tie_word_embeddings").tied);
        assert_eq!(of(cohere, "use_qk_norm").qk_norm, None);
    }
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
    let types =
        json!({"sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"]});
    for mistral in ["mistral", "ministral"] {
        assert_eq!(windows(mistral, types.clone()), [None, Some(16)]);
    }
    for qwen in ["qwen2", "qwen3"] {
        assert_eq!(
            windows(qwen, json!({"sliding_window": 16, "max_window_layers": 0})),
            [None, None]
        );
        let on = json!({"use_sliding_window": true, "sliding_window": 16, "max_window_layers": 1});
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
    let yarn = json!({"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16});
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
fn where_exaones_layers_may_have_a_window_only_those_that_do_rotate() {
    let layers = |changes: Value| layers_of("exaone4", 4, changes);
    let (local, global, old) = ((Some(16), true), (None, false), (None, true));
    // EXAONE 4.0 32B: the pattern is spelt out, and layer_types is what counts.
    let kinds = ["sliding_attention", "full_attention"].map(Value::from);
    let types: Vec<_> = [0, 0, 0, 1].map(|kind| kinds[kind].clone()).into();
    assert_eq!(
        layers(
            json!({"sliding_window": 16, "sliding_window_pattern": "LLLG", "layer_types": types})
        ),
        [local, local, local, global]
    );
    assert_eq!(
        layers(json!({"sliding_window": 16, "sliding_window_pattern": 2})),
        [local, global, local, global]
    );
    let full = vec![kinds[1].clone(); 4];
    assert_eq!(
        layers(json!({"sliding_window": 16, "layer_types": full})),
        [global; 4]
    );
    // The one of 1.2B.
    assert_eq!(
        layers(
            json!({"sliding_window": null, "sliding_window_pattern": null, "layer_types": full})
        ),
        [old; 4]
    );
    let spelt = with("exaone4", json!({"sliding_window_pattern": "LLLG"}));
    assert!(error(&spelt).contains("sliding_window_pattern: must be a whole number"));
}

/// As Command R7B's file has it, which says a pattern, or in newer ones each layer's type.
#[test]
fn only_layers_of_cohere2_that_have_a_window_rotate() {
    let layers = |changes: Value| layers_of("cohere2", 5, changes);
    let [local, wide] = [16, 4096].map(|window| (Some(window), true));
    let global = (None, false);
    assert_eq!(layers(json!({})), [wide, wide, wide, global, wide]);
    assert_eq!(
        layers(json!({"sliding_window": 16, "sliding_window_pattern": 2})),
        [local, global, local, global, local]
    );
    let full = json!({"sliding_window": 16, "layer_types": vec!["full_attention"; 5]});
    assert_eq!(layers(full), [global; 5]);
    let line = error(&with("cohere2", json!({"sliding_window": null})));
    assert!(line.contains("sliding_window: cohere2 must have a window"));
}

/// As Ministral 3 8B and Devstral Small 2 have it (`original_max_position_embeddings` beside the scaling).
#[test]
fn queries_grow_where_a_family_has_it_and_its_file_says_so() {
    let config = read(&config_json("ministral3")).unwrap();
    let growth = config.query_growth.unwrap();
    assert_eq!((growth.beta, growth.context), (0.1, 16));
    assert_eq!(config.ropes[0].as_ref().unwrap().growth(), 1.0);
    assert!(config.arithmetic().contains("QueryGrowth"));
    // Devstral 2: there is nothing that they grow by.
    let mut none = config_json("ministral3");
    none["rope_parameters"]["llama_4_scaling_beta"] = json!(0.0);
    assert!(read(&none).unwrap().query_growth.is_none());
    assert_eq!(
        error(&without("ministral3", "rope_parameters")),
        "x/config.json: rope_parameters is missing"
    );
    let mut mistral = config_json("ministral3");
    mistral["model_type"] = json!("mistral");
    assert!(read(&mistral).unwrap().query_growth.is_none());
}

#[test]
fn experts_are_read_as_each_family_has_them() {
    let of = |model_type: &str, changes: Value| read(&with(model_type, changes)).unwrap();
    let [olmoe, qwen, mixtral] =
        ["olmoe", "qwen3_moe", "mixtral"].map(|family| of(family, json!({"num_experts": null})));
    assert_eq!((olmoe.ffn, qwen.ffn), (64, 24));
    let experts = |normed: bool, ffn| Experts {
        count: 3,
        used: 2,
        ffn,
        logit_scale: 1.0,
        scores: Scores::Softmax,
        biased: false,
        normed: normed.then_some(0.0),
        plus: 0.0,
        scale: 1.0,
        shared: None,
        apart: false,
        biases: false,
    };
    assert_eq!(olmoe.mixture(), Some(experts(false, 64)));
    assert_eq!(qwen.mixture(), Some(experts(true, 24)));
    assert_eq!(mixtral.mixture(), Some(experts(true, 64)));
    let silent = of("qwen3_moe", json!({"norm_topk_prob": null}));
    assert_eq!(silent.mixture(), Some(experts(false, 24)));
    // Where they are asked for, and with the MLP beside them.
    let asked = json!({"enable_moe_block": true, "num_experts": 3, "top_k_experts": 2,
        "moe_intermediate_size": 24});
    let gemma = of("gemma4_text", asked);
    let apart = Experts {
        logit_scale: 32f32.sqrt().recip(),
        apart: true,
        ..experts(true, 24)
    };
    assert_eq!(gemma.experts, [Some(apart); 3]);
    let widths = [0, 1, 2].map(|layer| gemma.inner_width(layer));
    assert_eq!(widths, [64 + 48, 64 + 48, 2 * 64 + 48]);
    assert_eq!(of("gemma4_text", json!({"num_experts": 3})).mixture(), None);
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

/// The fields of openai/gpt-oss-20b that mean something, and what stands for those that are absent.
#[test]
fn gpt_oss_is_read_as_it_was_published() {
    let types = ["sliding_attention", "full_attention"];
    let published = json!({
        "architectures": ["GptOssForCausalLM"], "attention_bias": true, "eos_token_id": 200_002, "experts_per_token": 4,
        "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096,
        "intermediate_size": 2880, "layer_types": types.repeat(12), "max_position_embeddings": 131_072,
        "model_type": "gpt_oss", "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24,
        "num_key_value_heads": 8, "num_local_experts": 32, "output_router_logits": false, "pad_token_id": 199_999,
        "quantization_config": {"modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router",
            "model.embed_tokens", "lm_head"], "quant_method": "mxfp4"},
        "rms_norm_eps": 1e-5, "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
            "original_max_position_embeddings": 4096, "rope_type": "yarn", "truncate": false},
        "rope_theta": 150_000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
        "tie_word_embeddings": false, "use_cache": true, "vocab_size": 201_088,
    });
    let config = read(&published).unwrap();
    let rope = Rope {
        theta: 150_000.0,
        scaling: RopeScaling::Yarn {
            factor: 32.0,
            original_context: 4096.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: (0.1 * 32f64.ln() + 1.0) as f32,
            truncate: false,
        },
    };
    assert_eq!(config.ropes, vec![Some(rope); 24]);
    assert_eq!(config.windows, [Some(128), None].repeat(12));
    let activation = Activation::Clamped {
        alpha: 1.702,
        limit: 7.0,
    };
    assert_eq!(config.activation, activation);
    assert_eq!(
        (config.qkv_bias, config.o_bias, config.mlp_bias),
        (true, true, false)
    );
    assert!(config.sinks && !config.tied);
    assert_eq!(
        (config.norms, config.qk_norm, config.attention_scale),
        (Norms::Before, None, 0.125)
    );
    let experts = config.mixture().unwrap();
    assert_eq!((experts.count, experts.used, experts.ffn), (32, 4, 2880));
    // Of those that a token goes to, scores are a soft-max.
    assert_eq!(
        (experts.scores, experts.normed),
        (Scores::Softmax, Some(0.0))
    );
    assert!(experts.biases && !experts.biased && experts.shared.is_none());
    let numbers: usize = (config.parameters().iter())
        .map(|(_, shape)| shape.iter().product::<usize>())
        .sum();
    assert_eq!(numbers, 20_914_757_184);
    // What is absent is as it was published.
    for key in [
        "attention_bias",
        "head_dim",
        "layer_types",
        "num_key_value_heads",
        "rms_norm_eps",
        "rope_scaling",
        "rope_theta",
        "sliding_window",
        "swiglu_limit",
        "tie_word_embeddings",
    ] {
        let mut silent = published.clone();
        silent.as_object_mut().unwrap().shift_remove(key);
        assert_eq!(read(&silent).unwrap(), config, "{key}");
    }
    assert_eq!(read(&config.to_json(Some(&published))).unwrap(), config);
    assert_eq!(
        config.to_json(Some(&published)).get("quantization_config"),
        None
    );
    // Without a scaling that is the family's own, and with other numbers.
    let plain = json!({"rope_scaling": {"rope_type": "default"}, "swiglu_limit": 2.5, "swiglu_alpha": 1.5,
        "attention_bias": false});
    let plain = read(&with("gpt_oss", plain)).unwrap();
    let rope = plain.ropes[0].as_ref().unwrap();
    assert_eq!(rope.scaling, RopeScaling::Default);
    let activation = Activation::Clamped {
        alpha: 1.5,
        limit: 2.5,
    };
    assert_eq!(plain.activation, activation);
    assert!(!plain.qkv_bias && !plain.o_bias);
    assert_eq!(read(&plain.to_json(None)).unwrap(), plain);
}

/// Beside experts: which layers have them, what the best of them are chosen by and count, and who all tokens go to.
#[test]
fn mixtures_differ_as_transformers_has_them() {
    let of = |model_type: &str, changes: Value| read(&with(model_type, changes)).unwrap();
    let sparse = |config: &Config| -> Vec<usize> {
        let numbered = config.experts.iter().enumerate();
        let sparse = numbered.filter(|(_, experts)| experts.is_some());
        sparse.map(|(layer, _)| layer).collect()
    };
    let four = |model_type: &str, mut changes: Value| {
        changes["num_hidden_layers"] = json!(4);
        sparse(&of(model_type, changes))
    };
    for qwen in ["qwen2_moe", "qwen3_moe"] {
        let steps = |step: usize, dense: Value| {
            four(
                qwen,
                json!({"decoder_sparse_step": step, "mlp_only_layers": dense}),
            )
        };
        assert_eq!(steps(1, Value::Null), [0, 1, 2, 3]);
        assert_eq!(steps(2, json!([])), [1, 3]);
        assert_eq!(steps(2, json!([3, 9])), [1]);
        assert!(steps(5, json!([])).is_empty());
    }
    assert_eq!(four("glm4_moe", json!({})), [1, 2, 3]);
    assert_eq!(four("glm4_moe", json!({"first_k_dense_replace": 3})), [3]);
    assert_eq!(four("ernie4_5_moe", json!({})), [1, 2, 3]);
    let span =
        json!({"moe_layer_start_index": 0, "moe_layer_end_index": 2, "moe_layer_interval": 2});
    assert_eq!(four("ernie4_5_moe", span), [1]);
    // One MLP is as wide as the file says of those; where there is none, it says nothing.
    let qwen = of("qwen2_moe", json!({}));
    assert_eq!(
        (qwen.ffn, qwen.inner_width(0), qwen.inner_width(1)),
        (64, 2 * 24 + 40, 64)
    );
    assert_eq!(
        of("qwen3_5_moe_text", json!({"intermediate_size": null})).ffn,
        24
    );

    let shared = |config: Config| {
        let shared = config.mixture().unwrap().shared;
        shared.map(|shared| (shared.ffn, shared.gated))
    };
    assert_eq!(shared(qwen), Some((40, true)));
    assert_eq!(shared(of("qwen3_5_moe_text", json!({}))), Some((40, true)));
    assert_eq!(shared(of("granitemoeshared", json!({}))), Some((40, false)));
    let none = json!({"shared_intermediate_size": 0});
    assert_eq!(shared(of("granitemoeshared", none)), None);
    assert_eq!(shared(of("hunyuan_v1_moe", json!({}))), Some((64, false)));
    assert_eq!(shared(of("glm4_moe", json!({}))), Some((24, false)));
    assert_eq!(
        shared(of("glm4_moe", json!({"n_shared_experts": 2}))),
        Some((48, false))
    );
    assert_eq!(shared(of("ernie4_5_moe", json!({}))), Some((48, false)));
    assert_eq!(
        shared(of("ernie4_5_moe", json!({"moe_num_shared_experts": 0}))),
        None
    );

    let weights = |config: Config| {
        let experts = config.mixture().unwrap();
        (
            experts.scores,
            experts.biased,
            experts.normed,
            experts.scale,
        )
    };
    let glm = json!({"norm_topk_prob": null});
    let (soft_max, sigmoid) = (Scores::Softmax, Scores::Sigmoid);
    assert_eq!(
        weights(of("glm4_moe", glm)),
        (sigmoid, true, Some(1e-20), 2.5)
    );
    let plain = json!({"norm_topk_prob": false, "routed_scaling_factor": null});
    assert_eq!(weights(of("glm4_moe", plain)), (sigmoid, true, None, 1.0));
    let lfm = of("lfm2_moe", json!({}));
    assert_eq!(lfm.mixture().unwrap().plus, 1e-6);
    assert_eq!((lfm.ffn, lfm.experts[0]), (64, None));
    assert_eq!(weights(lfm), (sigmoid, true, Some(0.0), 2.5));
    let unsaid = of(
        "lfm2_moe",
        json!({"num_dense_layers": null, "num_hidden_layers": 3, "layer_types": null}),
    );
    assert_eq!(unsaid.experts.iter().flatten().count(), 1);
    let ernie = json!({"moe_norm_min": 0.25});
    assert_eq!(
        weights(of("ernie4_5_moe", ernie)),
        (soft_max, true, Some(0.25), 1.0)
    );
    for (family, normed) in [("hunyuan_v1_moe", true), ("qwen2_moe", false)] {
        let normed = normed.then_some(0.0);
        assert_eq!(
            weights(of(family, json!({}))),
            (soft_max, false, normed, 1.0)
        );
    }
    let layerwise = json!({"moe_topk": [1, 1], "num_experts_per_tok": null});
    assert_eq!(of("hunyuan_v1_moe", layerwise).mixture().unwrap().used, 1);
    // Some of GLM's have norms of heads.
    assert_eq!(of("glm4_moe", json!({})).qk_norm, None);
    let normed = of("glm4_moe", json!({"use_qk_norm": true}));
    assert_eq!(normed.qk_norm, Some(QkNorm::Heads));
    assert_eq!((normed.rotary_dim, normed.head_dim), (4, 8));
}

/// The sizes and layers of Qwen3.5 where its file is silent are those of transformers' config.
#[test]
fn linear_attention_is_read_as_its_layers_have_it() {
    let bare = |layers: usize| {
        let mut json = config_json("qwen3_5_text");
        let fields = json.as_object_mut().unwrap();
        fields.retain(|key, _| key != "layer_types" && !key.starts_with("linear_"));
        json["num_hidden_layers"] = json!(layers);
        json
    };
    let config = read(&bare(8)).unwrap();
    let linear: Vec<bool> = config.recurrences.iter().map(Option::is_some).collect();
    assert_eq!(linear, [true, true, true, false, true, true, true, false]);
    let shape = config.deltas().next().unwrap();
    assert_eq!((shape.key_heads, shape.value_heads), (16, 32));
    assert_eq!(
        (shape.key_dim, shape.value_dim, shape.kernel),
        (128, 128, 4)
    );
    assert_eq!((config.head_dim, config.rotary_dim), (8, 2));
    assert!(config.attention_gate);
    let mut every_second = bare(4);
    every_second["full_attention_interval"] = json!(2);
    let config = read(&every_second).unwrap();
    assert!(config.recurrences[0].is_some() && config.recurrences[1].is_none());
    for (changes, part) in [
        (
            json!({"attn_output_gate": false}),
            "attn_output_gate: only true",
        ),
        (
            json!({"layer_types": ["mamba", "full_attention"]}),
            "\"mamba\" is not supported",
        ),
        (
            json!({"linear_num_value_heads": 3, "linear_num_key_heads": 2}),
            "cannot share 2 key heads",
        ),
        (
            json!({"linear_key_head_dim": 5}),
            "linear_key_head_dim: 5 is odd",
        ),
    ] {
        let line = error(&with("qwen3_5_text", changes));
        assert!(line.contains(part), "{line}");
    }
    let of_another = read(&with(
        "llama",
        json!({"layer_types": ["linear_attention", "full_attention"]}),
    ));
    assert!(of_another.unwrap().recurrences.iter().all(Option::is_none)); // transformers' Llama does not heed it
}

/// LFM2's, as `Lfm2Config` and `Lfm2MLP` of transformers have it.
#[test]
fn convolutions_are_read_as_their_layers_have_them() {
    let mut json = config_json("lfm2");
    let fields = json.as_object_mut().unwrap();
    fields.retain(|key, _| !["layer_types", "block_multiple_of", "norm_eps"].contains(&&key[..]));
    let with = |changes: Value| {
        let mut json = json.clone();
        let fields = json.as_object_mut().unwrap();
        fields.extend(changes.as_object().unwrap().clone());
        json
    };
    let convs = |config: &Config| -> Vec<usize> {
        let each = config
            .recurrences
            .iter()
            .map(|recurrence| match recurrence {
                Some(Recurrence::Conv(shape)) => shape.kernel,
                _ => 0,
            });
        each.collect()
    };
    // Silent: attention everywhere; two thirds of 64, up to 256.
    let config = read(&with(json!({"rms_norm_eps": 0.5}))).unwrap();
    assert_eq!((convs(&config), config.ffn), (vec![0, 0], 256));
    assert_eq!(config.norm_eps, 1e-5);
    let config = read(&with(json!({"full_attn_idxs": [1], "conv_L_cache": 5}))).unwrap();
    assert_eq!(convs(&config), [5, 0]);
    // Names that only LFM2 has count before the usual ones, or in their place.
    let said =
        json!({"norm_eps": 1e-3, "rms_norm_eps": 0.5, "block_ff_dim": 96, "tie_embedding": true});
    let config = read(&with(said)).unwrap();
    assert_eq!(
        (config.norm_eps, config.ffn, config.tied),
        (1e-3, 256, true)
    );
    for (changes, ffn) in [
        (json!({"block_auto_adjust_ff_dim": false}), 64),
        (json!({"block_multiple_of": 8}), 48),
        (
            json!({"block_multiple_of": 2, "block_ffn_dim_multiplier": 1.3}),
            54,
        ),
        (
            json!({"block_ff_dim": 12288, "block_ffn_dim_multiplier": 1.0}),
            8192,
        ),
    ] {
        assert_eq!(read(&with(changes)).unwrap().ffn, ffn);
    }
    for (changes, part) in [
        (json!({"conv_bias": true}), "conv_bias: only false"),
        (
            json!({"conv_L_cache": 65, "full_attn_idxs": []}),
            "conv_L_cache is 65",
        ),
        (
            json!({"full_attn_idxs": ["1"]}),
            "full_attn_idxs: \"1\" is no number",
        ),
        (
            json!({"layer_types": ["mamba", "conv"]}),
            "\"mamba\" is not supported; known: full_attention, conv",
        ),
    ] {
        let line = error(&with(changes));
        assert!(line.contains(part), "{line}");
    }
}

#[test]
fn layers_may_differ_as_gemma4s_do() {
    let config = read(&config_json("gemma4_text")).unwrap();
    let wide = WideHeads {
        kv: 1,
        dim: 12,
        keys_are_values: true,
    };
    assert_eq!((config.wide, config.sharing), (Some(wide), 1));
    assert_eq!((config.ffn, config.sharing_ffn), (64, 128));
    assert_eq!(config.layer_inputs, Some(6));
    assert_eq!([0, 1, 2].map(|i| config.keys_of(i)), [0, 1, 1]);
    assert_eq!(
        [0, 1, 2].map(|i| config.lends_keys(i)),
        [false, true, false]
    );
    let fused = [Fused::All, Fused::QueriesAndKeys, Fused::Queries];
    assert_eq!([0, 1, 2].map(|i| config.fused(i)), fused);
    // As transformers writes it, which is said of each layer; images do not matter.
    let mut each = without("gemma4_text", "global_head_dim");
    let own = json!({"head_dim": 12, "num_key_value_heads": 1});
    each["per_layer_config"] = json!({"1": own, "2": own});
    each["use_bidirectional_attention"] = json!("vision");
    assert_eq!(read(&each).unwrap(), config);
    // Without keys as values, `num_global_key_value_heads` is not heard.
    let changes = json!({"attention_k_eq_v": false, "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": null});
    let plain = read(&with("gemma4_text", changes)).unwrap();
    let wide = WideHeads {
        kv: 2,
        keys_are_values: false,
        ..wide
    };
    assert_eq!((plain.wide, plain.sharing), (Some(wide), 0));
    assert_eq!(plain.layer_inputs, None);
    let unified = read(&config_json("gemma4_unified_text")).unwrap();
    assert_eq!(unified.layer_inputs, None);
    let windows = [&config, &unified].map(|config| config.windows[0]);
    assert_eq!(windows, [Some(512), Some(1024)]);
    for (changes, line) in [
        (
            json!({"layer_types": ["full_attention", "full_attention", "sliding_attention"]}),
            "the last layer must be full_attention",
        ),
        (
            json!({"per_layer_config": {"1": own}}),
            "layers of full_attention must be alike",
        ),
        (
            json!({"per_layer_config": {"1": {"intermediate_size": 3}, "2": {"intermediate_size": 3}}}),
            "intermediate_size is not supported",
        ),
        (
            json!({"vocab_size_per_layer_input": 39}),
            "39 is another number of tokens than the vocabulary's 40",
        ),
        (
            json!({"num_kv_shared_layers": 2}),
            "no layer before them sees as far",
        ),
        (
            json!({"use_bidirectional_attention": "all"}),
            "not a causal language model",
        ),
    ] {
        let found = error(&with("gemma4_text", changes));
        assert!(found.contains(line), "{found}");
    }
}

#[test]
fn what_cannot_be_run_is_named_with_its_file() {
    for (changes, wanted) in [
        (
            json!({"model_type": "gpt2"}),
            "the architecture \"gpt2\" is not supported; known: llama, mistral, qwen2, qwen3, smollm3, olmo2, olmo3, gemma, gemma2, gemma3_text, phi3, granite, granitemoehybrid",
        ),
        (json!({"model_type": null}), "\"model_type\" is missing"),
        (
            json!({"partial_rotary_factor": 0.5}),
            "partial_rotary_factor: 0.5 is not supported for llama",
        ),
        (
            json!({"model_type": "ernie4_5", "partial_rotary_factor": 0.5}),
            "partial_rotary_factor: 0.5 is not supported for ernie4_5",
        ),
        (
            json!({"rope_scaling": {"type": "dynamic", "alpha": 1000, "factor": 1}}),
            "rope type \"dynamic\" is not supported",
        ),
        (
            json!({"model_type": "hunyuan_v1_dense", "rope_scaling": {"type": "dynamic", "factor": 2}}),
            "rope type \"dynamic\" is not supported",
        ),
        (
            json!({"model_type": "hunyuan_v1_dense", "rope_scaling": {"type": "dynamic", "alpha": 0}}),
            "rope_theta stretched by alpha: must be a positive number, not 0",
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
            json!({"model_type": "gemma", "hidden_act": "relu"}),
            "hidden_act: the activation \"relu\" is not supported; known for gemma: gelu_pytorch_tanh, gelu",
        ),
        (
            json!({"attn_logit_softcapping": 50.0}),
            "attn_logit_softcapping: llama has none",
        ),
        (
            json!({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}),
            "attn_logit_softcapping: gemma3_text has none",
        ),
        (
            json!({"per_layer_config": {"0": {"intermediate_size": 48}}}),
            "per_layer_config: layers of different shapes",
        ),
        (
            json!({"model_type": "cohere2", "logit_scale": 0}),
            "logit_scale: must be a positive number, not 0",
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
            json!({"model_type": "gemma4_text", "enable_moe_block": true, "num_experts": 4,
                "moe_intermediate_size": 24}),
            "\"top_k_experts\" is missing",
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
            json!({"model_type": "glm4_moe", "n_group": 4}),
            "n_group: 4 is not supported for mixtures of experts, only 1",
        ),
        (
            json!({"model_type": "ernie4_5_moe", "use_bias": true}),
            "use_bias: true is not supported for mixtures of experts, only false",
        ),
        (
            json!({"model_type": "qwen2_moe", "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2,
                "shared_expert_intermediate_size": 40, "mlp_only_layers": 1}),
            "mlp_only_layers: must be a list",
        ),
        (
            json!({"model_type": "hunyuan_v1_moe", "num_experts": 4, "moe_topk": [2, 1]}),
            "moe_topk: layers of different numbers are not supported",
        ),
        (
            json!({"quantization_config": {"bits": 4}}),
            "quantization_config",
        ),
        (
            json!({"model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2, "swiglu_limit": 0}),
            "swiglu_limit: must be a positive number, not 0",
        ),
        (
            json!({"model_type": "gpt_oss", "hidden_act": "gelu"}),
            "hidden_act: the activation \"gelu\" is not supported; known for gpt_oss: silu",
        ),
        (
            json!({"is_causal": false}),
            "is_causal: this is not a causal language model",
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
    let mut linear = config_json("qwen3_5_text");
    linear["layer_types"] = json!(["full_attention", "linear_attention"]);
    assert_eq!(
        layer(names(&linear))[..10],
        [
            "linear_attn.dt_bias",
            "linear_attn.A_log",
            "linear_attn.conv1d.weight",
            "linear_attn.norm.weight",
            "linear_attn.out_proj.weight",
            "linear_attn.in_proj_qkv.weight",
            "linear_attn.in_proj_z.weight",
            "linear_attn.in_proj_b.weight",
            "linear_attn.in_proj_a.weight",
            "mlp.gate_proj.weight",
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
    let windows = json!({"use_sliding_window": true, "sliding_window": 16, "max_window_layers": 1});
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
        (
            "qwen3_5_text",
            json!({"partial_rotary_factor": 0.5, "linear_conv_kernel_dim": 3}),
        ),
        (
            "lfm2",
            json!({"conv_L_cache": 4, "block_multiple_of": 8, "tie_embedding": true}),
        ),
        (
            "gemma4_text",
            json!({"enable_moe_block": true, "num_experts": 3, "top_k_experts": 2,
                "moe_intermediate_size": 24, "sliding_window": 16}),
        ),
        ("gemma4_text", json!({"sliding_window": 16})),
        ("gpt_oss", json!({})),
        (
            "gpt_oss",
            json!({"sliding_window": 16, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ),
        ("glm4", json!({"attention_bias": false})),
        ("glm", json!({"partial_rotary_factor": 0.75})),
        ("ernie4_5", json!({"use_bias": true})),
        (
            "hunyuan_v1_dense",
            json!({"rope_scaling": {"type": "dynamic", "alpha": 1000.0}}),
        ),
        (
            "cohere",
            json!({"attention_bias": true, "logit_scale": 0.8}),
        ),
        ("cohere2", json!({"sliding_window": 16})),
    ] {
        let config = read(&with(family, changes)).unwrap();
        let written = config.to_json(None);
        assert_eq!(read(&written).unwrap(), config);
        assert_eq!(written["torch_dtype"], "float32");
        let field = match family {
            "lfm2" => "norm_eps",
            "cohere" | "cohere2" => "layer_norm_eps",
            _ => "rms_norm_eps",
        };
        assert_eq!(written[field], json!(1e-5));
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
