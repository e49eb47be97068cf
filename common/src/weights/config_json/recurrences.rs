//! Which layers have something else in the place of attention, and of what shape that is.

use super::super::config::{Config, Recurrence};
use super::super::family::{Family, RecurrenceKind};
use super::fields::Fields;
use super::positions::layer_types;
use super::write::Set;
use crate::kernels::{delta, gated_conv};
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

/// What `layer_types` calls layers with attention, and those of a kind.
fn names(kind: RecurrenceKind) -> [&'static str; 2] {
    let other = match kind {
        RecurrenceKind::Delta => "linear_attention",
        RecurrenceKind::Conv => "conv",
    };
    ["full_attention", other]
}

/// Per layer, what it has in the place of attention, as `layer_types` says; where that is absent, the family's own field.
pub fn read(
    fields: &Fields,
    family: &Family,
    layers: usize,
    hidden: usize,
) -> Result<Vec<Option<Recurrence>>> {
    let Some(kind) = family.recurrence else {
        return Ok(vec![None; layers]);
    };
    let shape = match kind {
        RecurrenceKind::Delta => Recurrence::Delta(delta_shape(fields)?),
        RecurrenceKind::Conv => Recurrence::Conv(gated_conv::Shape {
            channels: hidden,
            kernel: fields.size_or("conv_L_cache", 3)?,
        }),
    };
    let [attention, other] = names(kind);
    let recurs: Vec<bool> = match layer_types(fields, layers)? {
        Some(kinds) => {
            let recurs = |kind: &Value| match kind.as_str() {
                Some(kind) if kind == other => Ok(true),
                Some(kind) if kind == attention => Ok(false),
                _ => bail!("layer_types: {kind} is not supported; known: {attention}, {other}"),
            };
            kinds.iter().map(recurs).collect::<Result<_>>()?
        }
        None => match kind {
            RecurrenceKind::Delta => {
                let interval = fields.size_or("full_attention_interval", 4)?;
                (1..=layers).map(|n| !n.is_multiple_of(interval)).collect()
            }
            RecurrenceKind::Conv => {
                let attend = attending(fields, layers)?;
                (0..layers).map(|layer| !attend.contains(&layer)).collect()
            }
        },
    };
    Ok(recurs.into_iter().map(|on| on.then_some(shape)).collect())
}

fn delta_shape(fields: &Fields) -> Result<delta::Shape> {
    Ok(delta::Shape {
        key_heads: fields.size_or("linear_num_key_heads", 16)?,
        value_heads: fields.size_or("linear_num_value_heads", 32)?,
        key_dim: fields.size_or("linear_key_head_dim", 128)?,
        value_dim: fields.size_or("linear_value_head_dim", 128)?,
        kernel: fields.size_or("linear_conv_kernel_dim", 4)?,
    })
}

/// `full_attn_idxs`: the layers with attention; all, where it is absent.
fn attending(fields: &Fields, layers: usize) -> Result<Vec<usize>> {
    let key = "full_attn_idxs";
    let Some(list) = fields.present(key) else {
        return Ok((0..layers).collect());
    };
    let list = list
        .as_array()
        .with_context(|| format!("{key}: must be a list"))?;
    let index = |entry: &Value| {
        let index = entry.as_u64().map(|index| index as usize);
        index.with_context(|| format!("{key}: {entry} is no number of a layer"))
    };
    list.iter().map(index).collect()
}

/// The fields that say the same.
pub fn write(config: &Config, kind: RecurrenceKind, set: &mut Set) {
    let names = names(kind);
    let name = |recurrence: &Option<_>| names[usize::from(recurrence.is_some())];
    set("layer_types", config.recurrences.iter().map(name).collect());
    match config.recurrences.iter().flatten().next() {
        None => {}
        Some(Recurrence::Delta(shape)) => {
            set("linear_num_key_heads", json!(shape.key_heads));
            set("linear_num_value_heads", json!(shape.value_heads));
            set("linear_key_head_dim", json!(shape.key_dim));
            set("linear_value_head_dim", json!(shape.value_dim));
            set("linear_conv_kernel_dim", json!(shape.kernel));
        }
        Some(Recurrence::Conv(shape)) => {
            set("conv_L_cache", json!(shape.kernel));
            // vLLM asks for these.
            set("conv_dim", json!(shape.channels));
            set("block_dim", json!(shape.channels));
            set("conv_bias", json!(false));
        }
    }
}

/// Options of a kind under which the same tensors would mean something else.
pub fn refuse_others(fields: &Fields, kind: RecurrenceKind) -> Result<()> {
    let (key, only) = match kind {
        RecurrenceKind::Delta => ("attn_output_gate", true), // transformers does not ask
        RecurrenceKind::Conv => ("conv_bias", false),
    };
    let said = fields.flag(key)?.unwrap_or(only);
    ensure!(said == only, "{key}: only {only} is supported");
    Ok(())
}
