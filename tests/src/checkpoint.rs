//! Tiny random checkpoints, with which whole pipes run in milliseconds.

use crate::golden;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;

/// Which model it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    Llama,
    /// Projections are fused, and half of each head is rotated.
    Phi3,
    /// OLMoE: two of four experts for each token.
    Mixture,
}

/// The shape of a random model whose tokenizer is that of `tests/golden/tiny_chat`.
#[derive(Clone, Copy, Debug)]
pub struct Tiny {
    /// Width; a multiple of 32.
    pub hidden: usize,
    /// Layers.
    pub layers: usize,
    /// Tokens; the tokenizer has 261.
    pub vocab: usize,
    /// Longest prompt with its response, tokens.
    pub context: usize,
    pub family: Family,
}

impl Default for Tiny {
    fn default() -> Self {
        Self {
            hidden: 32,
            layers: 2,
            vocab: 264,
            context: 512,
            family: Family::Llama,
        }
    }
}

const EXPERTS: usize = 4;

/// tiny_chat's end-of-turn token, `<|im_end|>`.
const END: usize = 2;
/// tiny_chat's tokens of printable ASCII: the single characters, and two merges.
const PRINTABLE: [std::ops::Range<usize>; 2] = [3..97, 259..261];

impl Tiny {
    /// Writes the checkpoint of a seed into a new folder.
    ///
    /// All tokens share a large first embedding dimension, from which the head gives each a constant logit: responses
    /// are mostly printable and end by themselves after about a dozen tokens, as those of real models do.
    pub fn write(&self, folder: &Path, seed: u64) {
        fs::create_dir_all(folder).unwrap();
        for file in [
            "tokenizer.json",
            "tokenizer_config.json",
            "generation_config.json",
        ] {
            fs::copy(golden("tiny_chat").join(file), folder.join(file)).unwrap();
        }
        let config = serde_json::to_string_pretty(&self.config()).unwrap();
        fs::write(folder.join("config.json"), config).unwrap();
        let tensors = self.tensors(seed);
        let views = tensors.iter().map(|(name, shape, values)| {
            let view = TensorView::new(Dtype::F32, shape.clone(), values).unwrap();
            (name.as_str(), view)
        });
        safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
    }

    fn config(&self) -> Value {
        let (class, name, rotated) = match self.family {
            Family::Llama => ("LlamaForCausalLM", "llama", 1.0),
            Family::Phi3 => ("Phi3ForCausalLM", "phi3", 0.5),
            Family::Mixture => ("OlmoeForCausalLM", "olmoe", 1.0),
        };
        json!({
            "architectures": [class], "model_type": name, "partial_rotary_factor": rotated, "vocab_size": self.vocab,
            "hidden_size": self.hidden, "intermediate_size": 2 * self.hidden, "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden / 8, "num_key_value_heads": self.hidden / 16, "head_dim": 8,
            "hidden_act": "silu", "max_position_embeddings": self.context, "rms_norm_eps": 1e-5,
            "tie_word_embeddings": false, "rope_theta": 10000.0, "torch_dtype": "float32",
            "bos_token_id": 1, "eos_token_id": END, "pad_token_id": null, "num_experts": EXPERTS, "num_experts_per_tok": 2,
        })
    }

    fn tensors(&self, seed: u64) -> Vec<(String, Vec<usize>, Vec<u8>)> {
        let Self {
            hidden,
            layers,
            vocab,
            family,
            ..
        } = *self;
        let mut shapes = vec![("model.embed_tokens.weight".to_owned(), vec![vocab, hidden])];
        for layer in 0..layers {
            let mut add = |name: &str, shape: &[usize]| {
                shapes.push((
                    format!("model.layers.{layer}.{name}.weight"),
                    shape.to_vec(),
                ));
            };
            add("input_layernorm", &[hidden]);
            if family == Family::Phi3 {
                add("self_attn.qkv_proj", &[2 * hidden, hidden]);
            } else {
                add("self_attn.q_proj", &[hidden, hidden]);
                add("self_attn.k_proj", &[hidden / 2, hidden]);
                add("self_attn.v_proj", &[hidden / 2, hidden]);
            }
            add("self_attn.o_proj", &[hidden, hidden]);
            add("post_attention_layernorm", &[hidden]);
            if family == Family::Phi3 {
                add("mlp.gate_up_proj", &[4 * hidden, hidden]);
                add("mlp.down_proj", &[hidden, 2 * hidden]);
                continue;
            }
            let mut mlp = |prefix: &str| {
                add(&format!("{prefix}.gate_proj"), &[2 * hidden, hidden]);
                add(&format!("{prefix}.up_proj"), &[2 * hidden, hidden]);
                add(&format!("{prefix}.down_proj"), &[hidden, 2 * hidden]);
            };
            if family == Family::Llama {
                mlp("mlp");
                continue;
            }
            (0..EXPERTS).for_each(|expert| mlp(&format!("mlp.experts.{expert}")));
            add("mlp.gate", &[EXPERTS, hidden]);
            add("self_attn.q_norm", &[hidden]);
            add("self_attn.k_norm", &[hidden / 2]);
        }
        shapes.push(("model.norm.weight".to_owned(), vec![hidden]));
        shapes.push(("lm_head.weight".to_owned(), vec![vocab, hidden]));
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let fill = |(name, shape): (String, Vec<usize>)| {
            let values = self.values(&name, shape.iter().product(), &mut rng);
            let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            (name, shape, bytes)
        };
        shapes.into_iter().map(fill).collect()
    }

    fn values(&self, name: &str, count: usize, rng: &mut ChaCha8Rng) -> Vec<f32> {
        let scale = 1.0 / (self.hidden as f32).sqrt();
        let mut random = || (rng.next_u32() >> 8) as f32 / (1 << 23) as f32 - 1.0;
        let mut values: Vec<f32> = match name.contains("norm") {
            true => (0..count).map(|_| 1.0 + 0.1 * random()).collect(),
            false => (0..count).map(|_| 1.5 * scale * random()).collect(),
        };
        for (id, row) in values.chunks_exact_mut(self.hidden).enumerate() {
            match name {
                // The root mean square of the rest is about 1.
                "model.embed_tokens.weight" => {
                    row.iter_mut()
                        .for_each(|v| *v *= (self.hidden as f32).sqrt());
                    row[0] = (self.hidden as f32).sqrt();
                }
                "lm_head.weight" => {
                    let printable = PRINTABLE.iter().any(|ids| ids.contains(&id));
                    let logit = match (id == END, printable) {
                        (true, _) => 3.0,
                        (_, true) => 0.0,
                        _ => -3.0,
                    };
                    row[0] = logit * scale;
                }
                _ => {}
            }
        }
        values
    }
}

/// A copy of a checkpoint's files, to be spoiled.
pub fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// Changes a JSON file in place.
pub fn edit_json(path: &Path, edit: impl FnOnce(&mut Value)) {
    let mut value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    edit(&mut value);
    fs::write(path, value.to_string()).unwrap();
}
