//! Linear attention as llama.cpp has it in its files (`qwen35`; `conversion/qwen.py` there): under other names, with value heads
//! in another order, and the speed at which memories fade in the place of its logarithm.

use super::config::{Config, Recurrence};
use super::gguf_config::Metadata;
use super::layout::Place;
use crate::gguf::Value;
use crate::kernels::delta::Shape;
use anyhow::{Result, ensure};

/// Per layer, its linear attention, where it has that: `attention.recurrent_layers` says, or all layers but every
/// `full_attention_interval`-th have.
pub(super) fn deltas(fields: &Metadata, layers: usize) -> Result<Vec<Option<Recurrence>>> {
    let values = fields.size("ssm.inner_size")?;
    let value_heads = fields.size("ssm.time_step_rank")?;
    ensure!(
        values.is_multiple_of(value_heads),
        "ssm.inner_size {values} is not a multiple of ssm.time_step_rank {value_heads}"
    );
    let shape = Shape {
        key_heads: fields.size("ssm.group_count")?,
        value_heads,
        key_dim: fields.size("ssm.state_size")?,
        value_dim: values / value_heads,
        kernel: fields.size("ssm.conv_kernel")?,
    };
    let key = "attention.recurrent_layers";
    let interval = fields.whole("full_attention_interval")?.unwrap_or(4);
    ensure!(interval > 0, "full_attention_interval: must be above 0");
    let linear: Vec<bool> = match fields.get(key) {
        Some(Value::Wholes(flags)) => flags.iter().map(|&flag| flag != 0).collect(),
        _ => (1..=layers)
            .map(|layer| !layer.is_multiple_of(interval))
            .collect(),
    };
    ensure!(
        linear.len() >= layers,
        "{key}: has {} entries for {layers} layers",
        linear.len()
    );
    let delta = |linear: bool| linear.then_some(Recurrence::Delta(shape));
    Ok(linear.into_iter().map(delta).take(layers).collect())
}

/// The name of a tensor after its layer; None for one that is not of linear attention.
fn name(of: &str) -> Option<&'static str> {
    Some(match of.strip_prefix("linear_attn.")? {
        "in_proj_qkv.weight" => "attn_qkv.weight",
        "in_proj_z.weight" => "attn_gate.weight",
        "in_proj_b.weight" => "ssm_beta.weight",
        "in_proj_a.weight" => "ssm_alpha.weight",
        "conv1d.weight" => "ssm_conv1d.weight",
        "dt_bias" => "ssm_dt.bias",
        "A_log" => "ssm_a",
        "norm.weight" => "ssm_norm.weight",
        "out_proj.weight" => "ssm_out.weight",
        _ => return None,
    })
}

/// Where a file has a tensor of linear attention; None for any other.
pub(super) fn place(tensor: &str, shape: &[usize]) -> Option<Place> {
    let (layer, rest) = tensor.strip_prefix("model.layers.")?.split_once('.')?;
    let stored = format!("blk.{layer}.{}", name(rest)?);
    Some(Place::whole(&stored, shape))
}

/// How a file has the value heads in a tensor of linear attention, if it has: the elements before those of the first, the
/// elements of one, and after how many it begins anew.
fn heads_in(shape: Shape, tensor: &str, len: usize) -> Option<(usize, usize, usize)> {
    let (_, rest) = tensor.split_once("linear_attn.")?;
    let rows = |first: usize, rows: usize| {
        let row = len / (first + rows);
        Some((first * row, rows / shape.value_heads * row, len))
    };
    match rest {
        "in_proj_qkv.weight" | "conv1d.weight" => rows(2 * shape.key_width(), shape.value_width()),
        "in_proj_z.weight" => rows(0, shape.value_width()),
        "in_proj_b.weight" | "in_proj_a.weight" | "dt_bias" | "A_log" => rows(0, shape.value_heads),
        "out_proj.weight" => Some((0, shape.value_dim, shape.value_width())),
        _ => None,
    }
}

/// Value head `h` of the decoder's, which has those of a key head together, as files count them, which have the first of every
/// key head together.
fn stored_head(shape: Shape, h: usize) -> usize {
    let each = shape.value_heads / shape.key_heads;
    h % each * shape.key_heads + h / each
}

/// A tensor that is read as a file has it, as the decoder has it.
pub(super) fn restored(config: &Config, tensor: &str, mut values: Vec<f32>) -> Vec<f32> {
    let Some(shape) = config.deltas().next() else {
        return values;
    };
    if tensor.ends_with("linear_attn.A_log") {
        values.iter_mut().for_each(|speed| *speed = (-*speed).ln());
    }
    let Some((first, each, period)) = heads_in(shape, tensor, values.len()) else {
        return values;
    };
    let stored = values.clone();
    for (to, from) in values
        .chunks_exact_mut(period)
        .zip(stored.chunks_exact(period))
    {
        for (h, to) in to[first..].chunks_exact_mut(each).enumerate() {
            to.copy_from_slice(&from[first + stored_head(shape, h) * each..][..each]);
        }
    }
    values
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::*;
    use super::*;
    use candle_core::quantized::{GgmlDType, gguf_file};
    use serde_json::json;
    use std::path::Path;

    /// As the converter writes a tensor: heads moved the other way, and speeds for their logarithms.
    fn as_stored(config: &Config, tensor: &str, values: &[f32]) -> Vec<f32> {
        let shape = config.deltas().next().unwrap();
        let mut stored = values.to_vec();
        if let Some((first, each, period)) = heads_in(shape, tensor, values.len()) {
            for (to, from) in stored
                .chunks_exact_mut(period)
                .zip(values.chunks_exact(period))
            {
                for (h, from) in from[first..].chunks_exact(each).enumerate() {
                    let at = first + stored_head(shape, h) * each;
                    to[at..at + each].copy_from_slice(from);
                }
            }
        }
        if tensor.ends_with("A_log") {
            stored.iter_mut().for_each(|x| *x = -x.exp());
        }
        stored
    }

    /// Two key heads of three value heads, and a layer for prediction ahead, which is left out.
    #[test]
    fn qwen35_opens_as_the_folder_would() {
        let mut json = config_json("qwen3_5_text");
        json["linear_num_key_heads"] = json!(2);
        json["linear_num_value_heads"] = json!(6);
        let config = Config::from_json(&json, Path::new("config.json")).unwrap();
        let tensors = random_tensors(&config, 5);
        let mut stored: Tensors = tensors
            .iter()
            .map(|(tensor, shape, values)| {
                let Place {
                    name,
                    shape: stored,
                    ..
                } = super::super::gguf::place(&config, tensor, shape).unwrap();
                let values = match tensor.contains("linear_attn.") {
                    true => as_stored(&config, tensor, values),
                    false => (config.stored_rows(tensor, shape, values.into())).into_owned(),
                };
                (name, stored, values)
            })
            .collect();
        stored.push(("blk.2.nextn.enorm.weight".into(), vec![32], vec![1.0; 32]));
        let number = |n: usize| gguf_file::Value::U32(n as u32);
        let mut metadata = gguf_metadata(&config, "qwen35");
        metadata.retain(|(key, _)| key != "qwen35.block_count");
        let sections = [1, 1, 0, 0].map(gguf_file::Value::I32).to_vec();
        for (key, value) in [
            ("block_count", number(3)),
            ("nextn_predict_layers", number(1)),
            ("ssm.conv_kernel", number(4)),
            ("ssm.state_size", number(4)),
            ("ssm.group_count", number(2)),
            ("ssm.time_step_rank", number(6)),
            ("ssm.inner_size", number(36)),
            ("full_attention_interval", number(2)),
            ("rope.dimension_sections", gguf_file::Value::Array(sections)),
        ] {
            metadata.push((format!("qwen35.{key}"), value));
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tiny.gguf");
        write_gguf(&path, &metadata, &stored, GgmlDType::F32);
        let weights = open(&path).unwrap();
        assert_eq!(weights.config, config);
        for (name, shape, values) in &tensors {
            for (found, value) in weights.tensor(name, shape).unwrap().iter().zip(values) {
                assert!(
                    (found - value).abs() < 1e-5 * value.abs().max(1.0),
                    "{name}: {found}, not {value}"
                );
            }
        }
    }

    #[test]
    fn value_heads_of_a_key_head_are_apart_in_files() {
        let shape = Shape {
            key_heads: 2,
            value_heads: 6,
            key_dim: 4,
            value_dim: 6,
            kernel: 4,
        };
        let found: Vec<_> = (0..6).map(|h| stored_head(shape, h)).collect();
        assert_eq!(found, [0, 2, 4, 1, 3, 5]);
    }
}
