//! What a MODEL argument opens as, and what is said when it cannot be opened.

use super::fixtures::*;
use super::*;
use candle_core::quantized::{GgmlDType, gguf_file};
use half::{bf16, f16};
use proptest::prelude::*;
use serde_json::json;
use std::fs;

#[test]
fn what_is_saved_is_what_opens() {
    for family in families() {
        let (folder, config, tensors) = checkpoint(family);
        let weights = open(folder.path()).unwrap();
        assert_eq!(weights.config, config, "{family}");
        assert_holds(&weights, &tensors);
        assert_eq!(weights.path(), folder.path());
    }
}

#[test]
fn a_saved_folder_keeps_its_own_config_fields() {
    let (folder, config, tensors) = checkpoint("qwen3");
    let mut json = config_json("qwen3");
    json["transformers_version"] = json!("4.51.0");
    fs::write(folder.path().join("config.json"), json.to_string()).unwrap();
    let weights = open(folder.path()).unwrap();
    let next = tempfile::tempdir().unwrap();
    save(next.path(), &config, Some(&weights), borrowed(&tensors)).unwrap();
    json["torch_dtype"] = json!("float32");
    assert_eq!(read_json(&next.path().join("config.json")).unwrap(), json);
}

#[test]
fn shards_open_as_one_and_share_the_fingerprint() {
    let (folder, config, tensors) = checkpoint("llama");
    let sharded = tempfile::tempdir().unwrap();
    save::save_sharded(sharded.path(), &config, None, borrowed(&tensors), 9000).unwrap();
    let files = fs::read_dir(sharded.path()).unwrap().count();
    assert!(files > 5, "only {files} files: not sharded");
    let (one, many) = (open(folder.path()).unwrap(), open(sharded.path()).unwrap());
    assert_holds(&many, &tensors);
    assert_eq!(one.fingerprint().unwrap(), many.fingerprint().unwrap());
}

#[test]
fn saving_refuses_tensors_that_do_not_belong() {
    let (config, folder) = (config("llama"), tempfile::tempdir().unwrap());
    let tensors = random_tensors(&config, 1);
    let fails = |tensors: &Tensors| {
        let error = save(folder.path(), &config, None, borrowed(tensors)).unwrap_err();
        format!("{error:#}")
    };
    let mut swapped = tensors.clone();
    swapped.swap(0, 1);
    assert!(fails(&swapped).contains("where \"model.embed_tokens.weight\" [40, 32] belongs"));
    let mut short = tensors.clone();
    short.pop();
    assert!(fails(&short).contains("\"lm_head.weight\" was not given"));
    let mut long = tensors;
    long.push(long[0].clone());
    assert!(fails(&long).contains("more tensors"));
}

/// A safetensors file with every tensor in a 16-bit dtype, written by the safetensors crate.
fn save_half(folder: &std::path::Path, tensors: &Tensors, dtype: ::safetensors::Dtype) {
    use ::safetensors::{Dtype, tensor::TensorView};
    let bytes: Vec<Vec<u8>> = tensors
        .iter()
        .map(|(_, _, values)| {
            let narrow = |v: &f32| match dtype {
                Dtype::F16 => f16::from_f32(*v).to_le_bytes(),
                _ => bf16::from_f32(*v).to_le_bytes(),
            };
            values.iter().flat_map(narrow).collect()
        })
        .collect();
    let views = tensors.iter().zip(&bytes).map(|((name, shape, _), bytes)| {
        (
            name.clone(),
            TensorView::new(dtype, shape.clone(), bytes).unwrap(),
        )
    });
    ::safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
}

#[test]
fn sixteen_bit_floats_are_widened_exactly_and_do_not_change_the_fingerprint() {
    let (folder, _, tensors) = checkpoint("mistral");
    let wide = open(folder.path())
        .unwrap()
        .fingerprint()
        .unwrap()
        .to_owned();
    for dtype in [::safetensors::Dtype::F16, ::safetensors::Dtype::BF16] {
        save_half(folder.path(), &tensors, dtype);
        let weights = open(folder.path()).unwrap();
        assert_holds(&weights, &tensors);
        assert_eq!(weights.fingerprint().unwrap(), wide);
    }
}

/// (`families` holds its numbers to transformers'.)
#[test]
fn what_was_quantised_is_saved_in_float32_and_says_so() {
    for family in ["llama-fp8", "gpt-oss-mxfp4"] {
        let weights = open(&golden(family)).unwrap();
        let tensors = all_tensors(&weights);
        let next = tempfile::tempdir().unwrap();
        save(
            next.path(),
            &weights.config,
            Some(&weights),
            borrowed(&tensors),
        )
        .unwrap();
        let again = open(next.path()).unwrap();
        assert_holds(&again, &tensors);
        assert_eq!(again.fingerprint().unwrap(), weights.fingerprint().unwrap());
        let mut config = read_json(&golden(family).join("config.json")).unwrap();
        let fields = config.as_object_mut().unwrap();
        fields.remove("quantization_config");
        fields.insert("dtype".into(), json!("float32"));
        let saved = read_json(&next.path().join("config.json")).unwrap();
        assert_eq!(saved, config);
    }
}

#[test]
fn fp8_without_what_says_how_to_read_it_is_refused() {
    let golden = golden("llama-fp8");
    let next = tempfile::tempdir().unwrap();
    let mut config = read_json(&golden.join("config.json")).unwrap();
    let fields = config.as_object_mut().unwrap();
    fields.remove("quantization_config");
    fs::write(next.path().join("config.json"), config.to_string()).unwrap();
    let model = fs::read(golden.join("model.safetensors")).unwrap();
    fs::write(next.path().join("model.safetensors"), &model).unwrap();
    let line = error(next.path());
    assert!(
        line.contains("in FP8, but the config has no quantization_config"),
        "{line}"
    );
    config["quantization_config"] = json!({"quant_method": "fp8", "weight_block_size": [16, 16]});
    fs::write(next.path().join("config.json"), config.to_string()).unwrap();
    let line = error(next.path());
    assert!(line.contains("_scale_inv\" has shape"), "{line}");
    let nameless = String::from_utf8_lossy(&model[..])
        .find("scale_inv")
        .unwrap();
    let mut model = model;
    model[nameless..][..9].copy_from_slice(b"scale_vni");
    fs::write(next.path().join("model.safetensors"), &model).unwrap();
    fs::copy(golden.join("config.json"), next.path().join("config.json")).unwrap();
    let line = error(next.path());
    assert!(line.contains("_scale_inv\" is missing"), "{line}");
}

#[test]
fn the_fingerprint_follows_values_and_arithmetic_only() {
    let (folder, config, mut tensors) = checkpoint("llama");
    let fingerprint = |config: &Config, tensors: &Tensors| {
        let folder = tempfile::tempdir().unwrap();
        save(folder.path(), config, None, borrowed(tensors)).unwrap();
        open(folder.path())
            .unwrap()
            .fingerprint()
            .unwrap()
            .to_owned()
    };
    let first = open(folder.path())
        .unwrap()
        .fingerprint()
        .unwrap()
        .to_owned();
    assert_eq!(first.len(), 16);
    assert_eq!(first, fingerprint(&config, &tensors));
    let longer = Config {
        context: 128,
        ..config.clone()
    };
    assert_eq!(first, fingerprint(&longer, &tensors));
    let other = Config {
        norm_eps: 1e-6,
        ..config.clone()
    };
    assert_ne!(first, fingerprint(&other, &tensors));
    tensors[5].2[3] += 0.25;
    assert_ne!(first, fingerprint(&config, &tensors));
}

#[test]
fn a_bad_folder_is_one_clear_line() {
    let (folder, ..) = checkpoint("llama");
    let file = folder.path().join("model.safetensors");
    let whole = fs::read(&file).unwrap();

    fs::write(&file, &whole[..whole.len() - 1]).unwrap();
    let line = error(folder.path());
    assert!(
        line.contains("model.safetensors: not a whole safetensors file"),
        "{line}"
    );
    for bytes in [&b""[..], b"abc", &[255; 64], &whole[..100]] {
        fs::write(&file, bytes).unwrap();
        assert!(error(folder.path()).contains("model.safetensors"));
    }

    fs::remove_file(&file).unwrap();
    let line = error(folder.path());
    assert!(line.contains("neither model.safetensors nor"), "{line}");
    fs::write(folder.path().join("pytorch_model.bin"), "x").unwrap();
    let line = error(folder.path());
    assert!(
        line.contains("pickled weights (pytorch_model.bin)"),
        "{line}"
    );

    fs::write(folder.path().join("config.json"), "{").unwrap();
    let line = error(folder.path());
    assert!(line.contains("config.json: not valid JSON"), "{line}");
    assert!(error(&folder.path().join("nowhere")).contains("no such folder or file"));
}

#[test]
fn a_tensor_that_does_not_fit_the_config_is_named_with_both_shapes() {
    let (folder, ..) = checkpoint("llama");
    let path = folder.path().join("config.json");
    let mut json = read_json(&path).unwrap();
    json["intermediate_size"] = json!(96);
    fs::write(&path, json.to_string()).unwrap();
    let line = error(folder.path());
    let wanted = "\"model.layers.0.mlp.gate_proj.weight\" has shape [64, 32], but the config asks for [96, 32]";
    assert!(line.contains(wanted), "{line}");
    json["intermediate_size"] = json!(64);
    json["num_hidden_layers"] = json!(3);
    fs::write(&path, json.to_string()).unwrap();
    let line = error(folder.path());
    assert!(
        line.contains("\"model.layers.2.self_attn.q_proj.weight\" is missing"),
        "{line}"
    );
}

#[test]
fn shard_names_stay_in_their_folder() {
    let (folder, ..) = checkpoint("llama");
    fs::rename(
        folder.path().join("model.safetensors"),
        folder.path().join("part.safetensors"),
    )
    .unwrap();
    let index = folder.path().join("model.safetensors.index.json");
    for bad in [
        "../part.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "..",
        "",
        "x.bin",
    ] {
        let json = json!({"weight_map": {"model.norm.weight": bad}});
        fs::write(&index, json.to_string()).unwrap();
        let line = error(folder.path());
        assert!(
            line.contains("must be a plain .safetensors file name"),
            "{bad}: {line}"
        );
    }
    for bad in [
        json!({}),
        json!({"weight_map": {}}),
        json!({"weight_map": {"a": 3}}),
    ] {
        fs::write(&index, bad.to_string()).unwrap();
        assert!(error(folder.path()).contains("weight_map"));
    }
}

#[test]
fn gguf_opens_under_hugging_face_names_with_rows_in_their_order() {
    let folder = tempfile::tempdir().unwrap();
    // These have no name of their own there, or more in their files than is written here.
    let others = [
        "mistral",
        "ministral",
        "granitemoehybrid",
        "gemma4_unified_text",
    ];
    let known = |family: &&str| !others.contains(family) && !family.starts_with("qwen3_5");
    for family in families().filter(known) {
        for dtype in [GgmlDType::F32, GgmlDType::F16, GgmlDType::BF16] {
            let (path, config, tensors) = gguf(folder.path(), family, dtype);
            let weights = open(&path).unwrap();
            assert_eq!(weights.config, config, "{family}");
            assert_holds(&weights, &tensors);
            let saved = tempfile::tempdir().unwrap();
            save(saved.path(), &config, Some(&weights), borrowed(&tensors)).unwrap();
            let again = open(saved.path()).unwrap();
            assert_eq!(again.config, config);
            assert_eq!(again.original["eos_token_id"], json!(2));
            assert_eq!(again.fingerprint().unwrap(), weights.fingerprint().unwrap());
        }
    }
}

#[test]
fn a_gguf_has_gates_and_ups_of_gemma4s_experts_as_one_tensor_or_as_two() {
    let folder = tempfile::tempdir().unwrap();
    let mut json = config_json("gemma4_text");
    json["enable_moe_block"] = json!(true);
    json["num_experts"] = json!(3);
    json["top_k_experts"] = json!(2);
    json["moe_intermediate_size"] = json!(24);
    let config = Config::from_json(&json, Path::new("config.json")).unwrap();
    let (path, config, tensors) = gguf_of(folder.path(), config, GgmlDType::F32);
    let one = open(&path).unwrap();
    assert_eq!(one.config, config);
    assert_holds(&one, &tensors);
    let mut metadata = gguf_metadata(&config, "gemma4");
    let mut stored = as_gguf(&config, "gemma4", &tensors);
    uneven(&config, &mut metadata, &mut stored);
    let both: Tensors = stored
        .extract_if(.., |(name, ..)| name.contains("gate_up_exps"))
        .collect();
    assert_eq!(both.len(), config.layers);
    for (name, shape, values) in both {
        let (experts, rows, row) = (shape[0], shape[1] / 2, shape[2]);
        for (part, first) in [("gate", 0), ("up", 1)] {
            let of_each = values.chunks_exact(rows * row).skip(first).step_by(2);
            let name = name.replace("gate_up", part);
            stored.push((
                name,
                vec![experts, rows, row],
                of_each.flatten().copied().collect(),
            ));
        }
    }
    write_gguf(&path, &metadata, &stored, GgmlDType::F32);
    let two = open(&path).unwrap();
    assert_eq!(two.config, config);
    assert_holds(&two, &tensors);
}

/// As llama.cpp's converter writes them where it is asked to, and the first GLM-4s in any case.
#[test]
fn a_gguf_may_have_queries_keys_and_values_as_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    for (family, arch) in [("qwen2", "qwen2"), ("llama", "llama"), ("glm", "chatglm")] {
        let config = config(family);
        let tensors = random_tensors(&config, 5);
        let mut stored: Tensors = vec![];
        for (name, shape, values) in as_gguf(&config, arch, &tensors) {
            let part = ["attn_q.", "attn_k.", "attn_v."];
            let part = part.into_iter().find(|part| name.contains(part));
            let name = part.map_or(name.clone(), |part| name.replace(part, "attn_qkv."));
            match stored.iter_mut().find(|other| other.0 == name) {
                Some((_, rows, all)) => {
                    rows[0] += shape[0];
                    all.extend(values);
                }
                None => stored.push((name, shape, values)),
            }
        }
        let metadata = gguf_metadata(&config, arch);
        write_gguf(&path, &metadata, &stored, GgmlDType::F32);
        let weights = open(&path).unwrap();
        assert_eq!(weights.config, config);
        assert_holds(&weights, &tensors);
    }
}

#[test]
fn every_block_type_dequantises_as_candle_does() {
    use GgmlDType::*;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    // Rows of 256 for the K types; more than one task's worth of elements.
    let config = Config {
        hidden: 256,
        vocab: 300,
        ffn: 256,
        ..config("qwen2")
    };
    let tensors = random_tensors(&config, 3);
    let stored = as_gguf(&config, "qwen2", &tensors);
    // o_proj's rows are 32 wide: left in float32.
    let (narrow, stored): (Vec<_>, Vec<_>) = stored
        .into_iter()
        .partition(|(_, shape, _)| shape.last() != Some(&256));
    for dtype in [Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2K, Q3K, Q4K, Q5K, Q6K, Q8K] {
        write_mixed(&path, &config, &stored, &narrow, dtype);
        let weights = open(&path).unwrap();
        let mut file = fs::File::open(&path).unwrap();
        let content = gguf_file::Content::read(&mut file).unwrap();
        let device = candle_core::Device::Cpu;
        for (name, shape) in config.parameters() {
            let stored = gguf::place(&config, &name, &shape).unwrap().name;
            let Ok(tensor) = content.tensor(&mut file, &stored, &device) else {
                assert_eq!(dtype, Q8K, "candle's own reader lacks only Q8K");
                continue;
            };
            let expected = tensor.dequantize(&device).unwrap();
            let expected: Vec<f32> = expected.flatten_all().unwrap().to_vec1().unwrap();
            assert_eq!(
                weights.tensor(&name, &shape).unwrap(),
                expected,
                "{name} {dtype:?}"
            );
        }
        let (name, shape, values) = &tensors[0];
        let error: f32 = weights
            .tensor(name, shape)
            .unwrap()
            .iter()
            .zip(values)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max);
        assert!(
            error < 4.0,
            "{dtype:?}: values of 8 at most are off by {error}"
        );
    }
}

fn write_mixed(
    path: &std::path::Path,
    config: &Config,
    wide: &[(String, Vec<usize>, Vec<f32>)],
    narrow: &[(String, Vec<usize>, Vec<f32>)],
    dtype: GgmlDType,
) {
    use candle_core::{Device, Tensor, quantized::QTensor};
    let quantise = |list: &[(String, Vec<usize>, Vec<f32>)], dtype: GgmlDType| {
        list.iter()
            .map(|(name, shape, values)| {
                let dtype = if shape.len() == 1 {
                    GgmlDType::F32
                } else {
                    dtype
                };
                let tensor = Tensor::from_slice(values, shape.clone(), &Device::Cpu).unwrap();
                (name.clone(), QTensor::quantize(&tensor, dtype).unwrap())
            })
            .collect::<Vec<_>>()
    };
    let all = [quantise(wide, dtype), quantise(narrow, GgmlDType::F32)];
    let tensors: Vec<_> = all.iter().flatten().map(|(k, v)| (k.as_str(), v)).collect();
    let metadata = gguf_metadata(config, "qwen2");
    let metadata: Vec<_> = metadata.iter().map(|(k, v)| (k.as_str(), v)).collect();
    gguf_file::write(&mut fs::File::create(path).unwrap(), &metadata, &tensors).unwrap();
}

/// A GGUF whose metadata is changed by `edit`; its error line.
fn gguf_error(edit: impl Fn(&mut Vec<(String, gguf_file::Value)>, &mut Tensors)) -> String {
    let folder = tempfile::tempdir().unwrap();
    let config = config("llama");
    let mut metadata = gguf_metadata(&config, "llama");
    let mut tensors = as_gguf(&config, "llama", &random_tensors(&config, 5));
    edit(&mut metadata, &mut tensors);
    let path = folder.path().join("tiny.gguf");
    write_gguf(&path, &metadata, &tensors, GgmlDType::F32);
    error(&path)
}

#[test]
fn gguf_that_this_decoder_would_get_wrong_is_refused() {
    use gguf_file::Value::{F32, String, U32};
    let with = |key: &str, value: gguf_file::Value| {
        gguf_error(|metadata, _| {
            metadata.retain(|(k, _)| k != key);
            metadata.push((key.to_owned(), value.clone()));
        })
    };
    for (key, value, wanted) in [
        (
            "general.architecture",
            String("deepseek2".into()),
            "known: llama, qwen2, qwen3",
        ),
        (
            "llama.rope.scaling.type",
            String("longrope".into()),
            "\"longrope\" is not supported",
        ),
        (
            "llama.rope.scaling.type",
            String("yarn".into()),
            "original_context_length is missing",
        ),
        ("llama.rope.dimension_count", U32(4), "rotation over 4 of 8"),
        (
            "llama.rope.dimension_sections",
            gguf_file::Value::Array(vec![U32(2), U32(1)]),
            "rope.dimension_sections: positions of more than one kind",
        ),
        ("llama.expert_count", U32(8), "expert_used_count is missing"),
        ("split.count", U32(3), "split over 3 files"),
        ("general.alignment", U32(0), "general.alignment"),
        ("llama.block_count", U32(0), "block_count: must be above 0"),
        ("llama.block_count", F32(2.0), "must be a whole number"),
        (
            "llama.block_count",
            U32(4_000_000_000),
            "the number of layers is 4000000000",
        ),
        ("llama.attention.head_count_kv", U32(3), "evenly"),
        (
            "llama.feed_forward_length",
            U32(50),
            "has shape [64, 32], but the metadata asks for [50, 32]",
        ),
    ] {
        let line = with(key, value);
        assert!(
            line.contains(wanted) && line.contains("tiny.gguf"),
            "{key}: {line}"
        );
    }
    let line = gguf_error(|metadata, _| metadata.retain(|(k, _)| k != "llama.block_count"));
    assert!(line.contains("llama.block_count is missing"), "{line}");
    let line = gguf_error(|_, tensors| {
        tensors.push(("blk.0.attn_qkv.weight".into(), vec![4], vec![0.0; 4]));
    });
    assert!(
        line.contains("\"blk.0.attn_qkv.weight\" has no place"),
        "{line}"
    );
    let line = gguf_error(|_, tensors| {
        tensors.push((
            "rope_freqs.weight".into(),
            vec![4],
            vec![1.0, 2.0, 3.0, 4.0],
        ));
    });
    assert!(line.contains("rope_freqs.weight"), "{line}");
}

#[test]
fn a_gguf_says_which_layers_have_a_window_and_how_others_rotate() {
    use gguf_file::Value::{Array, Bool, F32, String, U32};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    let of = |types: [&str; 2]| {
        let mut json = config_json("olmo3");
        json["layer_types"] = json!(types);
        json["sliding_window"] = json!(16);
        json["rope_scaling"] =
            json!({"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32});
        Config::from_json(&json, Path::new("config.json")).unwrap()
    };
    let first_full = of(["full_attention", "sliding_attention"]);
    let tensors = as_gguf(&first_full, "olmo2", &random_tensors(&first_full, 5));
    // As the converter writes the config's attention_factor, here the usual one.
    let growth = F32(1.0 + 0.1 * 8f32.ln());
    let write = |pattern| {
        let mut metadata = gguf_metadata(&first_full, "olmo2");
        for (key, value) in [
            ("attention.sliding_window", U32(16)),
            ("attention.sliding_window_pattern", pattern),
            ("rope.scaling.type", String("yarn".into())),
            ("rope.scaling.factor", F32(8.0)),
            ("rope.scaling.original_context_length", U32(32)),
            ("rope.scaling.yarn_attn_factor", growth.clone()),
        ] {
            metadata.push((format!("olmo2.{key}"), value));
        }
        write_gguf(&path, &metadata, &tensors, GgmlDType::F32);
    };
    write(Array(vec![Bool(false), Bool(true)]));
    assert_eq!(open(&path).unwrap().config, first_full);
    write(U32(2));
    let last_full = of(["sliding_attention", "full_attention"]);
    assert_eq!(open(&path).unwrap().config, last_full);
    write(Array(vec![Bool(true)]));
    assert!(error(&path).contains("has 1 entries for 2 layers"));
}

/// Soft caps are in the file, or are the family's; that the scores of the one of 46 layers are over √(hidden / heads) is
/// nowhere.
#[test]
fn a_gemma_2_gguf_is_read_as_llama_cpp_knows_it() {
    use gguf_file::Value::{F32, U32};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    for (layers, scalar, caps) in [(2, 16, Some([20.0, 10.0])), (46, 8, None)] {
        let mut json = config_json("gemma2");
        json["num_hidden_layers"] = json!(layers);
        json["head_dim"] = json!(16);
        json["query_pre_attn_scalar"] = json!(scalar);
        json["tie_word_embeddings"] = json!(true);
        let mut config = Config::from_json(&json, Path::new("config.json")).unwrap();
        assert_eq!(config.windows[..2], [Some(4096), None]);
        let mut metadata = gguf_metadata(&config, "gemma2");
        if let Some([scores, logits]) = caps {
            (config.attention_cap, config.logit_cap) = (Some(scores), Some(logits));
            for (key, value) in [
                ("attn_logit_softcapping", F32(scores)),
                ("final_logit_softcapping", F32(logits)),
                ("attention.sliding_window", U32(4096)),
            ] {
                metadata.push((format!("gemma2.{key}"), value));
            }
        }
        let tensors = as_gguf(&config, "gemma2", &random_tensors(&config, 5));
        write_gguf(&path, &metadata, &tensors, GgmlDType::F32);
        assert_eq!(open(&path).unwrap().config, config);
    }
}

/// As llama.cpp's converter writes Granite 4: a number of key/value heads for each layer, and the MLP's width as that of an
/// expert for all tokens, although there are none.
#[test]
fn a_granite_gguf_has_its_multipliers() {
    use gguf_file::Value::{Array, F32, U32};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    let config = config("granite");
    let tensors = as_gguf(&config, "granite", &random_tensors(&config, 5));
    let mut metadata = gguf_metadata(&config, "granite");
    let replaced = ["_scale", ".scale", "head_count_kv", "rms_epsilon"];
    metadata.retain(|(key, _)| !replaced.iter().any(|end| key.ends_with(end)));
    for (key, value) in [
        ("attention.head_count_kv", Array(vec![U32(2), U32(2)])),
        ("attention.layer_norm_rms_epsilon", F32(1e-5)),
        ("embedding_scale", F32(6.0)),
        ("attention.scale", F32(0.3)),
        ("residual_scale", F32(0.5)),
        ("logit_scale", F32(6.0)),
        ("expert_shared_feed_forward_length", U32(64)),
    ] {
        metadata.push((format!("granite.{key}"), value));
    }
    write_gguf(&path, &metadata, &tensors, GgmlDType::F32);
    assert_eq!(open(&path).unwrap().config, config);
    for (key, value) in &mut metadata {
        if key.ends_with("head_count_kv") {
            *value = Array(vec![U32(2), U32(1)]);
        }
    }
    write_gguf(&path, &metadata, &tensors, GgmlDType::F32);
    assert!(error(&path).contains("attention.head_count_kv: must be a whole number"));
}

/// llama.cpp knows that only layers with a window rotate, and that the norms are no RMS norms; that there are norms of heads is
/// told by their tensors.
#[test]
fn a_cohere_gguf_is_read_as_llama_cpp_knows_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    let write = |config: &Config, arch: &str, without: &str| {
        let tensors = as_gguf(config, arch, &random_tensors(config, 5));
        let mut metadata = gguf_metadata(config, arch);
        metadata.retain(|(key, _)| !key.ends_with(without));
        write_gguf(&path, &metadata, &tensors, GgmlDType::F32);
    };
    write(&config("cohere2"), "cohere2", "sliding_window");
    assert!(error(&path).contains("attention.sliding_window is missing"));
    write(&config("cohere"), "command-r", "norm_epsilon");
    assert!(error(&path).contains("attention.layer_norm_epsilon is missing"));
    let mut json = config_json("cohere");
    json["use_qk_norm"] = json!(false);
    let plain = Config::from_json(&json, Path::new("config.json")).unwrap();
    write(&plain, "command-r", "-");
    assert_eq!(open(&path).unwrap().config, plain);
    assert_ne!(plain, config("cohere"));
}

/// As llama.cpp's converter writes Phi-4-mini: part of a head rotated, LongRoPE's divisors as two tensors.
#[test]
fn a_phi_3_gguf_has_its_divisors_as_tensors() {
    use gguf_file::Value::{F32, U32};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    let mut json = config_json("phi3");
    json["partial_rotary_factor"] = json!(0.5);
    json["original_max_position_embeddings"] = json!(16);
    json["rope_scaling"] =
        json!({"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [1.0, 8.0]});
    let config = Config::from_json(&json, Path::new("config.json")).unwrap();
    let values = random_tensors(&config, 5);
    let mut tensors = as_gguf(&config, "phi3", &values);
    for (name, divisors) in [("short", [1.0, 1.5]), ("long", [1.0, 8.0])] {
        let name = format!("rope_factors_{name}.weight");
        tensors.push((name, vec![2], divisors.to_vec()));
    }
    let mut metadata = gguf_metadata(&config, "phi3");
    metadata.retain(|(key, _)| key != "phi3.context_length");
    for (key, value) in [
        ("context_length", U32(64)),
        ("rope.dimension_count", U32(4)),
        ("rope.scaling.original_context_length", U32(16)),
    ] {
        metadata.push((format!("phi3.{key}"), value));
    }
    for factor in [None, Some(config.ropes[0].as_ref().unwrap().growth())] {
        let key = || "phi3.rope.scaling.attn_factor".to_owned();
        metadata.extend(factor.map(|factor| (key(), F32(factor))));
        write_gguf(&path, &metadata, &tensors, GgmlDType::F32);
        let weights = open(&path).unwrap();
        assert_eq!(weights.config, config);
        assert_holds(&weights, &values);
        let saved = tempfile::tempdir().unwrap();
        let given = borrowed(&values);
        save(saved.path(), &config, Some(&weights), given).unwrap();
        let again = open(saved.path()).unwrap();
        assert_eq!(again.config, config);
        assert_eq!(again.fingerprint().unwrap(), weights.fingerprint().unwrap());
    }
}

/// As llama.cpp's converter writes Mistral Small 3.1, and Devstral 2, whose queries grow by nothing.
#[test]
fn a_mistral_3_gguf_whose_queries_do_not_grow_is_a_llama() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    let config = config("llama");
    let tensors = as_gguf(&config, "mistral3", &random_tensors(&config, 5));
    let mut metadata = gguf_metadata(&config, "mistral3");
    write_gguf(&path, &metadata, &tensors, GgmlDType::F32);
    assert_eq!(open(&path).unwrap().config, config);
    let beta = "mistral3.attention.temperature_scale".to_owned();
    metadata.push((beta.clone(), gguf_file::Value::F32(0.0)));
    write_gguf(&path, &metadata, &tensors, GgmlDType::F32);
    assert_eq!(open(&path).unwrap().config, config);
    metadata.push((beta, gguf_file::Value::F32(0.1)));
    write_gguf(&path, &metadata, &tensors, GgmlDType::F32);
    assert!(error(&path).contains("rope.scaling.original_context_length is missing"));
}

#[test]
fn llama3_scaling_is_recognised_in_a_ggufs_divisors() {
    let folder = tempfile::tempdir().unwrap();
    let mut json = config_json("llama");
    json["head_dim"] = json!(64);
    json["rope_theta"] = json!(500000.0);
    json["rope_scaling"] = json!({"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192});
    let config = Config::from_json(&json, Path::new("config.json")).unwrap();
    let plain = Rope {
        scaling: RopeScaling::Default,
        ..config.ropes[0].clone().unwrap()
    };
    let divisors = plain
        .inv_freq(64)
        .iter()
        .zip(config.ropes[0].as_ref().unwrap().inv_freq(64))
        .map(|(plain, scaled)| plain / scaled)
        .collect();
    let mut tensors = as_gguf(&config, "llama", &random_tensors(&config, 5));
    tensors.push(("rope_freqs.weight".into(), vec![32], divisors));
    let path = folder.path().join("tiny.gguf");
    write_gguf(
        &path,
        &gguf_metadata(&config, "llama"),
        &tensors,
        GgmlDType::F32,
    );
    assert_eq!(open(&path).unwrap().config, config);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Any damage to a header ends in an error line or in a model, never in a panic or a huge allocation.
    #[test]
    fn damaged_files_never_panic(at in 0usize..4000, byte in any::<u8>(), cut in 0usize..4000, safetensors: bool) {
        let folder = tempfile::tempdir().unwrap();
        let path = match safetensors {
            true => {
                let config = config("llama");
                save(folder.path(), &config, None, borrowed(&random_tensors(&config, 2))).unwrap();
                folder.path().join("model.safetensors")
            }
            false => gguf(folder.path(), "llama", GgmlDType::Q4_0).0,
        };
        let mut bytes = fs::read(&path).unwrap();
        bytes[at] = byte;
        if cut < 2000 {
            bytes.truncate(cut);
        }
        fs::write(&path, bytes).unwrap();
        let model = if safetensors { folder.path() } else { &path };
        if let Ok(weights) = open(model) {
            for (name, shape) in weights.config.parameters() {
                let _ = weights.tensor(&name, &shape);
            }
        }
    }
}

#[test]
fn vocabularies_and_tokenizers_must_fit() {
    let (folder, ..) = checkpoint("llama");
    let weights = open(folder.path()).unwrap();
    assert!(weights.check_tokenizer(40).is_ok());
    let line = format!("{:#}", weights.check_tokenizer(41).unwrap_err());
    assert!(
        line.contains("the tokenizer has 41 tokens, the weights only 40"),
        "{line}"
    );
    assert!(weights.check_same_vocabulary(&weights).is_ok());
    let other = Config {
        vocab: 48,
        ..weights.config.clone()
    };
    let next = tempfile::tempdir().unwrap();
    save(
        next.path(),
        &other,
        None,
        borrowed(&random_tensors(&other, 1)),
    )
    .unwrap();
    let line = weights
        .check_same_vocabulary(&open(next.path()).unwrap())
        .unwrap_err();
    assert!(line.to_string().contains("one of 48"), "{line}");
}

/// What Python found of a tensor: its sum, its sum weighted by (index mod 1009) − 504, which notices
/// misplaced rows, and its values at 1, at half + 3 and at the end.
struct Figures {
    name: &'static str,
    shape: &'static [usize],
    sum: f64,
    weighted: f64,
    values: [f64; 3],
}

/// Of the default model; `gguf.dequantize`, rows un-permuted as transformers does.
const FIGURES: [Figures; 6] = [
    Figures {
        name: "model.embed_tokens.weight",
        shape: &[49152, 576],
        sum: -15353.04449415207,
        weighted: -66877.3282699585,
        values: [
            0.032978057861328125,
            -0.23443984985351562,
            -0.0417022705078125,
        ],
    },
    Figures {
        name: "model.layers.0.self_attn.q_proj.weight",
        shape: &[576, 576],
        sum: 59.22322082519531,
        weighted: 2093.4718475341797,
        values: [0.1573486328125, 0.2060546875, -0.255859375],
    },
    Figures {
        name: "model.layers.0.self_attn.k_proj.weight",
        shape: &[192, 576],
        sum: 26.937057495117188,
        weighted: 10697.64730834961,
        values: [0.3402099609375, 1.71337890625, 0.3636474609375],
    },
    Figures {
        name: "model.layers.29.self_attn.v_proj.weight",
        shape: &[192, 576],
        sum: -23.565185546875,
        weighted: 38128.958251953125,
        values: [-0.277587890625, -0.09649658203125, 0.05322265625],
    },
    Figures {
        name: "model.layers.7.mlp.down_proj.weight",
        shape: &[576, 1536],
        sum: -198.9853515625,
        weighted: 1828.1307830810547,
        values: [-0.127593994140625, 0.1055908203125, 0.05706787109375],
    },
    Figures {
        name: "model.norm.weight",
        shape: &[576],
        sum: 1038.33203125,
        weighted: -224581.22265625,
        values: [1.8203125, 1.46875, 1.984375],
    },
];

#[test]
fn the_default_models_tensors_match_pythons() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/SmolLM2-135M-Instruct.gguf");
    let path = std::env::var_os("DICE_MODEL").map_or(root, PathBuf::from);
    if !path.is_file() {
        eprintln!("skipped: {} is not there", path.display());
        return;
    }
    let weights = open(&path).unwrap();
    assert_eq!(weights.config.ropes[0].as_ref().unwrap().theta, 100_000.0);
    assert!(weights.config.tied && weights.config.context == 8192);
    for figures in FIGURES {
        let name = figures.name;
        let tensor = weights.tensor(name, figures.shape).unwrap();
        let sum: f64 = tensor.iter().map(|v| f64::from(*v)).sum();
        assert!((sum / figures.sum - 1.0).abs() < 1e-6, "{name}: {sum}");
        let weight = |i: usize| (i % 1009) as f64 - 504.0;
        let weighted = tensor.iter().enumerate();
        let weighted: f64 = weighted.map(|(i, v)| f64::from(*v) * weight(i)).sum();
        let ratio = weighted / figures.weighted;
        assert!((ratio - 1.0).abs() < 1e-6, "{name}: {weighted}");
        let picked = [1, tensor.len() / 2 + 3, tensor.len() - 1].map(|i| f64::from(tensor[i]));
        assert_eq!(picked, figures.values, "{name}");
    }
    // The conversion of this file to a folder by Python has the same one.
    assert_eq!(weights.fingerprint().unwrap(), "9fccf05a252b2a2d");
}

#[test]
fn a_head_beside_a_tied_embedding_is_that_embedding() {
    let folder = tempfile::tempdir().unwrap();
    let untied = config("llama");
    let tied = Config {
        tied: true,
        ..untied.clone()
    };
    let tensors = random_tensors(&tied, 7);
    let embedding = tensors[0].clone();
    for change in [0.0, 1.0] {
        let mut head = embedding.clone();
        head.0 = "lm_head.weight".to_owned();
        head.2[5] += change;
        let both = [tensors.clone(), vec![head]].concat();
        save(folder.path(), &untied, None, borrowed(&both)).unwrap();
        let mut json = read_json(&folder.path().join("config.json")).unwrap();
        json["tie_word_embeddings"] = json!(true);
        fs::write(folder.path().join("config.json"), json.to_string()).unwrap();
        match change {
            0.0 => assert_holds(&open(folder.path()).unwrap(), &tensors),
            _ => {
                let line = error(folder.path());
                assert!(
                    line.contains("lm_head.weight is there and another"),
                    "{line}"
                );
            }
        }
    }
}

#[test]
fn formats_whose_numbers_are_all_bfloat16s_are_known() {
    let said = |weights: &Weights| {
        let parameters = weights.config.parameters().into_iter();
        let each = parameters.map(|(name, shape)| {
            let said = weights.is_bfloat16(&name, &shape).unwrap();
            let values = weights.tensor(&name, &shape).unwrap();
            let are = values.iter().all(|value| value.to_bits() & 0xffff == 0);
            assert!(are || !said, "{name}");
            said
        });
        each.collect::<Vec<_>>()
    };
    let packed = open(&golden("gpt-oss-mxfp4")).unwrap(); // what is not packed is in bfloat16
    assert!(said(&packed).into_iter().all(|said| said));
    let plain = open(&golden("gpt-oss")).unwrap();
    assert!(!said(&plain).into_iter().any(|said| said));
    let folder = tempfile::tempdir().unwrap();
    let (path, ..) = gguf(folder.path(), "qwen2", GgmlDType::BF16);
    let found = said(&open(&path).unwrap());
    assert!(
        found.contains(&true) && found.contains(&false),
        "norms are in float32"
    );
}
