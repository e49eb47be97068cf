//! Our decoder against candle-transformers' Llama, an implementation that shares no line with it: the log-prob of every
//! next token, on the tiny checkpoints of tests/golden.

use candle_core::{DType, Device, Tensor};
use candle_nn::{VarBuilder, ops::log_softmax};
use candle_transformers::models::llama::{Cache, Llama, LlamaConfig};
use common::kernels::gemm::Precision;
use common::logprob::{Group, score};
use common::model::{Decoder, Use};
use common::weights::Weights;
use std::path::Path;

/// log p of each of `targets` as the token after `ids`, as candle has it.
fn theirs(folder: &Path, ids: &[u32], targets: &[u32]) -> Vec<f64> {
    let mut config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
    // candle reads the older place of this value.
    config["rope_theta"] = config["rope_parameters"]["rope_theta"].clone();
    let config: LlamaConfig = serde_json::from_value(config).unwrap();
    let config = config.into_config(false);
    let tensors = candle_core::safetensors::load(folder.join("model.safetensors"), &Device::Cpu);
    let weights = VarBuilder::from_tensors(tensors.unwrap(), DType::F32, &Device::Cpu);
    let model = Llama::load(weights, &config).unwrap();
    let mut cache = Cache::new(false, DType::F32, &config, &Device::Cpu).unwrap();
    let ids = Tensor::new(ids, &Device::Cpu)
        .unwrap()
        .unsqueeze(0)
        .unwrap();
    let logits = model.forward(&ids, 0, &mut cache).unwrap();
    let logps = log_softmax(&logits, 1).unwrap().squeeze(0).unwrap();
    let logps = logps.to_vec1::<f32>().unwrap();
    targets
        .iter()
        .map(|&t| f64::from(logps[t as usize]))
        .collect()
}

#[test]
fn log_probs_are_candle_transformers() {
    for family in ["llama", "smollm"] {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../tests/golden/families")
            .join(family);
        let weights = Weights::open(folder.to_str().unwrap()).unwrap();
        let decoder =
            Decoder::new(&weights.config, &weights, Precision::F32, Use::Inference).unwrap();
        let ids: Vec<u32> = (0..40).map(|i| (i * 37 + 11) % 96).collect();
        let targets: Vec<u32> = (0..96).collect();
        for n in [1, 2, 7, 40] {
            let responses = targets.iter().map(|&t| vec![t]).collect();
            let ours = score(
                &decoder,
                &[Group {
                    prompt: ids[..n].to_vec(),
                    responses,
                }],
            );
            for (ours, theirs) in ours.iter().zip(theirs(&folder, &ids[..n], &targets)) {
                assert!(
                    (ours - theirs).abs() < 2e-5,
                    "{family}, {n} tokens: {ours}, candle {theirs}"
                );
            }
        }
    }
}
