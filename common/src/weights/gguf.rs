//! GGUF files as weights: tensors dequantised (the ggml blocks are candle's, but for MXFP4) under their Hugging Face names.

use super::config::{Experts, SELECTION, SINKS};
use super::family::{self, QKV};
use super::layout::Place;
use super::{Config, gguf_delta, gguf_experts, gguf_uneven, mxfp4};
use crate::gguf::{Arrays, Blocks, Entry, Header, Value};
use crate::mapped::Mapped;
use anyhow::{Context, Result, bail, ensure};
use candle_core::CpuStorage;
use candle_core::quantized::GgmlDType;
use rayon::prelude::*;
use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;

/// Elements dequantised by one task: a multiple of every block size.
const CHUNK: usize = 1 << 16;

/// A mapped GGUF file with its checked header.
pub(super) struct Gguf {
    mapped: Mapped,
    pub(super) metadata: HashMap<String, Value>,
    tensors: HashMap<String, Entry>,
}

impl Gguf {
    /// Reads the header; every count and offset is checked against the file's length first.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let mapped = Mapped::open(path)?;
        let Header { metadata, tensors } = Header::of_file(&mapped, Arrays::Skip)?;
        Ok(Self {
            mapped,
            metadata,
            tensors,
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.mapped.path
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Shape of a tensor by its GGUF name, row-major.
    pub(super) fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|entry| entry.shape.as_slice())
    }

    /// Where a tensor of the decoder's is. Files of any architecture may have queries, keys and values as one matrix, and any of
    /// Gemma 4's experts gates and ups as two.
    pub(super) fn place(&self, config: &Config, name: &str, shape: &[usize]) -> Result<Place> {
        let usual = place(config, name, shape)
            .with_context(|| format!("GGUF has no name for the tensor {name:?}"))?;
        let there = |place: &Place| self.shape(&place.name).is_some();
        if there(&usual) {
            return Ok(usual);
        }
        let count = config.mixture().map_or(0, |experts| experts.count);
        let others = [
            named(config, config.place_in(&[QKV], name, shape)),
            gguf_experts::place(name, count, shape, false),
        ];
        Ok(others.into_iter().flatten().find(there).unwrap_or(usual))
    }

    pub(super) fn check(&self, place: &Place) -> Result<()> {
        self.find(place).map(|_| ())
    }

    fn find(&self, Place { name, shape, .. }: &Place) -> Result<&Entry> {
        let path = self.mapped.path.display();
        let entry = self
            .tensors
            .get(name)
            .with_context(|| format!("{path}: the tensor {name:?} is missing"))?;
        // Tensors have four dimensions there; those of 1 may be said or not.
        let said = |shape: &[usize]| {
            shape
                .iter()
                .copied()
                .filter(|&n| n != 1)
                .collect::<Vec<_>>()
        };
        ensure!(
            said(&entry.shape) == said(shape),
            "{path}: the tensor {name:?} has shape {:?}, but the metadata asks for {shape:?}",
            entry.shape
        );
        Ok(entry)
    }

    /// Whether a tensor is stored in a format of which all numbers are bfloat16's.
    pub(super) fn is_bfloat16(&self, place: &Place) -> Result<bool> {
        let formats = [Blocks::Candles(GgmlDType::BF16), Blocks::Mxfp4];
        Ok(formats.contains(&self.find(place)?.blocks))
    }

    /// Reads rows of a tensor by its GGUF name, dequantised to float32. (Blocks lie within rows.)
    pub(super) fn read(&self, place: &Place) -> Result<Vec<f32>> {
        let entry = self.find(place)?;
        let bytes = place.bytes_of(&self.mapped.bytes[entry.bytes.clone()]);
        let (block, size) = (entry.blocks.numbers(), entry.blocks.bytes());
        let mut values = vec![0.0; place.len()];
        values
            .par_chunks_mut(CHUNK)
            .zip(bytes.par_chunks(CHUNK / block * size))
            .try_for_each(|(out, bytes)| dequantise(entry.blocks, bytes, out))
            .with_context(|| {
                format!(
                    "{}: the tensor {:?}",
                    self.mapped.path.display(),
                    place.name
                )
            })?;
        Ok(values)
    }
}

fn dequantise(blocks: Blocks, bytes: &[u8], out: &mut [f32]) -> Result<()> {
    let Blocks::Candles(dtype) = blocks else {
        mxfp4::widen_blocks(bytes, out);
        return Ok(());
    };
    match dtype
        .from_data(Cow::Borrowed(bytes))
        .dequantize(out.len())?
    {
        CpuStorage::F32(floats) => out.copy_from_slice(&floats),
        _ => bail!("dequantisation gave no float32"),
    }
    Ok(())
}

/// Where a GGUF has a tensor; None where there is no place for it. Of experts it has each projection as one tensor for all.
pub(super) fn place(config: &Config, name: &str, shape: &[usize]) -> Option<Place> {
    let others = [gguf_delta::place, gguf_uneven::place];
    if let Some(place) = others.iter().find_map(|place| place(name, shape)) {
        return Some(place);
    }
    if let Some(Experts { count, apart, .. }) = config.mixture()
        && let Some(place) = gguf_experts::place(name, count, shape, apart)
    {
        return Some(place);
    }
    if name.contains(".mlp.shared_expert") {
        // Gates and ups are apart, however folders have them.
        return named(config, Place::whole(name, shape));
    }
    let family = family::of(&config.model_type);
    named(
        config,
        config.place_in(family.map_or(&[], |f| f.fused), name, shape),
    )
}

/// The same place by its GGUF name.
fn named(config: &Config, place: Place) -> Option<Place> {
    Some(Place {
        name: gguf_name(config, &place.name)?,
        ..place
    })
}

/// The GGUF name of a Hugging Face tensor name, which means different things in different families.
fn gguf_name(config: &Config, name: &str) -> Option<String> {
    let whole = match name {
        "model.embed_tokens.weight" => Some("token_embd.weight"),
        "lm_head.weight" => Some("output.weight"),
        _ => None,
    };
    if let Some(whole) = whole {
        return Some(whole.to_owned());
    }
    let family = family::of(&config.model_type)?;
    if name == "model.norm.weight" {
        return Some(format!("{}.weight", family.gguf_last_norm));
    }
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    if rest == SELECTION {
        return Some(format!("blk.{layer}.exp_probs_b.bias"));
    }
    if rest == SINKS {
        return Some(format!("blk.{layer}.attn_sinks.weight"));
    }
    let (module, kind) = rest.rsplit_once('.')?;
    let norms = [
        "attn_norm",
        "post_attention_norm",
        family.gguf_mlp_norm,
        "post_ffw_norm",
    ];
    let mut norms = config.layer_norms().into_iter().zip(norms);
    if let Some((_, norm)) = norms.find(|(norm, _)| *norm == Some(module)) {
        return Some(format!("blk.{layer}.{norm}.{kind}"));
    }
    let module = match module {
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.qkv_proj" => "attn_qkv",
        "self_attn.o_proj" => "attn_output",
        "self_attn.q_norm" => "attn_q_norm",
        "self_attn.k_norm" => "attn_k_norm",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" | "mlp.gate_up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        "mlp.gate" => "ffn_gate_inp",
        "conv.conv" => "shortconv.conv",
        "conv.in_proj" => "shortconv.in_proj",
        "conv.out_proj" => "shortconv.out_proj",
        "mlp.shared_expert_gate" => "ffn_gate_inp_shexp",
        "mlp.shared_expert.gate_proj" => "ffn_gate_shexp",
        "mlp.shared_expert.up_proj" => "ffn_up_shexp",
        "mlp.shared_expert.down_proj" => "ffn_down_shexp",
        _ => return None,
    };
    Some(format!("blk.{layer}.{module}.{kind}"))
}
