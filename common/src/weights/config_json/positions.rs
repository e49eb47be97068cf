//! How far each layer sees, and how it rotates.

use super::super::family::{Family, Rotated, Windows};
use super::super::rope::Rope;
use super::fields::Fields;
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// Per layer: a window or none.
pub type LayerWindows = Vec<Option<usize>>;
/// Per layer: a rotation or none.
pub type LayerRopes = Vec<Option<Rope>>;

/// How far each layer sees and how it rotates, as the `__post_init__` of each family's config in transformers 5 has it:
/// `layer_types`, where it is there, says which layers have the window.
pub fn positions(
    fields: &Fields,
    family: &Family,
    layers: usize,
    head_dim: usize,
    context: usize,
) -> Result<(LayerWindows, LayerRopes)> {
    let everywhere = || -> Result<LayerRopes> {
        let by_alpha = match family.alpha {
            true => Rope::by_alpha(fields, family.theta, head_dim)?,
            false => None,
        };
        let rope = match by_alpha {
            Some(rope) => rope,
            None => Rope::from_json(fields, family.theta, context)?,
        };
        Ok(vec![Some(rope); layers])
    };
    let asked = || fields.flag("use_sliding_window");
    match family.windows {
        Windows::None => Ok((vec![None; layers], everywhere()?)),
        Windows::All => {
            let window = sliding_window(fields, None)?;
            Ok((vec![window; layers], everywhere()?))
        }
        Windows::Typed => {
            let window = sliding_window(fields, Some(4096))?;
            let windows = typed_windows(fields, window, layers, |_| true)?;
            Ok((windows, everywhere()?))
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
            ensure!(
                window.is_some() || rotated != Rotated::Only,
                "sliding_window: {} must have a window",
                family.model_type
            );
            let key = "sliding_window_pattern";
            let period = match (fields.present(key), fields.present("layer_types")) {
                (Some(_), None) => fields.size(key)?,
                _ => period,
            };
            let sliding = |layer: usize| !(layer + 1).is_multiple_of(period);
            let windows = typed_windows(fields, window, layers, sliding)?;
            let local = match rotated {
                Rotated::Alike => return Ok((windows, everywhere()?)),
                Rotated::Alone | Rotated::Only => {
                    let turns = |own: &Option<usize>| window.is_none() || own.is_some();
                    let ropes = everywhere()?.into_iter().zip(&windows);
                    let ropes = ropes
                        .map(|(rope, own)| rope.filter(|_| turns(own)))
                        .collect();
                    return Ok((windows, ropes));
                }
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
        let interval = fields.size_or("no_rope_layer_interval", 4)?;
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

/// `layer_types`, where it is there: one for each layer.
pub fn layer_types<'a>(fields: &Fields<'a>, layers: usize) -> Result<Option<&'a Vec<Value>>> {
    let Some(types) = fields.present("layer_types") else {
        return Ok(None);
    };
    let types = types.as_array().context("layer_types: must be a list")?;
    ensure!(
        types.len() == layers,
        "layer_types: has {} entries for {layers} layers",
        types.len()
    );
    Ok(Some(types))
}

/// A window on the layers of which `layer_types` says so; where it says nothing, on those that `unsaid` names.
fn typed_windows(
    fields: &Fields,
    window: Option<usize>,
    layers: usize,
    unsaid: impl Fn(usize) -> bool,
) -> Result<LayerWindows> {
    let Some(types) = layer_types(fields, layers)? else {
        return Ok((0..layers)
            .map(|layer| window.filter(|_| unsaid(layer)))
            .collect());
    };
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
