//! Which layers have a mixture of experts, and of which kind it is.

use super::super::config::{Config, Experts, Shared};
use super::super::family::{Mixture, Normed, SharedExpert, SparseLayers};
use super::super::rope::positive;
use super::fields::Fields;
use super::shortest;
use super::write::Set;
use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};

/// Per layer of a stream so wide, its mixture of experts, where it has one.
pub fn read(
    fields: &Fields,
    mixture: &Mixture,
    (layers, hidden): (usize, usize),
) -> Result<Vec<Option<Experts>>> {
    if let Some(key) = mixture.asked
        && !fields.flag(key)?.unwrap_or(false)
    {
        return Ok(vec![None; layers]);
    }
    let number = |key: Option<&str>, unsaid: f64| match key {
        Some(key) => positive(key, fields.number(key)?.unwrap_or(unsaid)),
        None => Ok(unsaid as f32),
    };
    let ffn = fields.size(mixture.width)?;
    let normed = match mixture.normed {
        Normed::Always => true,
        Normed::Asked { unsaid, .. } => fields.flag("norm_topk_prob")?.unwrap_or(unsaid),
    };
    let of_each = Experts {
        count: size_of_either(fields, mixture.count)?,
        used: size_of_either(fields, mixture.used)?,
        ffn,
        logit_scale: mixture.logit_scale(hidden),
        scores: mixture.scores,
        biased: mixture.selection.is_some(),
        normed: match normed {
            true => Some(number(mixture.least.0, mixture.least.1)?),
            false => None,
        },
        plus: mixture.plus,
        scale: number(mixture.scale, 1.0)?,
        shared: match &mixture.shared {
            Some(shared) => shared_expert(fields, shared, ffn)?,
            None => None,
        },
        apart: mixture.apart,
        biases: mixture.biases,
    };
    let sparse = sparse_layers(fields, mixture, layers)?.into_iter();
    Ok(sparse.map(|sparse| sparse.then_some(of_each)).collect())
}

/// A size under one of two names. It may be a list of one for each layer, all the same (Hunyuan).
fn size_of_either(fields: &Fields, [key, other]: [&str; 2]) -> Result<usize> {
    let key = if fields.present(key).is_none() && fields.present(other).is_some() {
        other
    } else {
        key
    };
    let Some(Value::Array(list)) = fields.present(key) else {
        return fields.size(key);
    };
    let first = list.first().with_context(|| format!("{key}: is empty"))?;
    ensure!(
        list.iter().all(|other| other == first),
        "{key}: layers of different numbers are not supported"
    );
    let one = Map::from_iter([(key.to_owned(), first.clone())]);
    Fields(&one).size(key)
}

fn shared_expert(fields: &Fields, shared: &SharedExpert, ffn: usize) -> Result<Option<Shared>> {
    let (key, times) = shared.width;
    let said = fields.present(key).map(|_| match shared.always {
        true => fields.size(key),
        false => fields.count(key),
    });
    let width = match (said.transpose()?, times) {
        (said, Some(unsaid)) => said.unwrap_or(unsaid).saturating_mul(ffn),
        (Some(width), None) => width,
        (None, None) if shared.always => fields.size(key)?,
        (None, None) => 0,
    };
    Ok((width > 0).then_some(Shared {
        ffn: width,
        gated: shared.gated,
    }))
}

/// Per layer, whether it has experts.
fn sparse_layers(fields: &Fields, mixture: &Mixture, layers: usize) -> Result<Vec<bool>> {
    let whole = |key: &str, unsaid: i64| match fields.present(key) {
        None => Ok(unsaid),
        Some(value) => {
            (value.as_i64()).with_context(|| format!("{key}: must be a whole number, not {value}"))
        }
    };
    let every = |step: usize| move |layer: &usize| (layer + 1).is_multiple_of(step);
    let all = 0..layers;
    Ok(match mixture.layers {
        SparseLayers::All => vec![true; layers],
        SparseLayers::Steps => {
            let step = every(fields.size_or("decoder_sparse_step", 1)?);
            let key = "mlp_only_layers";
            let dense = match fields.present(key) {
                None => &vec![],
                Some(list) => list
                    .as_array()
                    .with_context(|| format!("{key}: must be a list"))?,
            };
            all.map(|layer| step(&layer) && !dense.contains(&json!(layer)))
                .collect()
        }
        SparseLayers::Span => {
            let step = every(fields.size_or("moe_layer_interval", 1)?);
            let first = whole("moe_layer_start_index", 1)?;
            let last = match whole("moe_layer_end_index", -1)? {
                -1 => i64::MAX,
                last => last,
            };
            let within = |layer: usize| (first..=last).contains(&(layer as i64));
            all.map(|layer| step(&layer) && within(layer)).collect()
        }
        SparseLayers::From(key, unsaid) => {
            let first = whole(key, unsaid)?;
            all.map(|layer| layer as i64 >= first).collect()
        }
    })
}

/// The fields that say the same.
pub fn write(config: &Config, mixture: &Mixture, set: &mut Set) {
    if let Some(key) = mixture.asked {
        set(key, json!(config.mixture().is_some()));
    }
    let Some(experts) = config.mixture() else {
        return;
    };
    set(mixture.width, json!(experts.ffn));
    set(mixture.count[0], json!(experts.count));
    set(mixture.used[0], json!(experts.used));
    if let Normed::Asked { .. } = mixture.normed {
        set("norm_topk_prob", json!(experts.normed.is_some()));
    }
    if let (Some(key), Some(least)) = (mixture.least.0, experts.normed) {
        set(key, shortest(least));
    }
    if let Some(key) = mixture.scale {
        set(key, shortest(experts.scale));
    }
    if let Some(SharedExpert {
        width: (key, times),
        ..
    }) = mixture.shared
    {
        let width = experts.shared.map_or(0, |shared| shared.ffn);
        set(key, json!(times.map_or(width, |_| width / experts.ffn)));
    }
    let numbered = config.experts.iter().enumerate();
    let of = |sparse: bool| {
        let layers = numbered
            .clone()
            .filter(move |(_, own)| own.is_some() == sparse);
        layers.map(|(layer, _)| layer)
    };
    let first = of(true).next().unwrap_or(config.layers);
    match mixture.layers {
        SparseLayers::All => {}
        SparseLayers::Steps => {
            set("decoder_sparse_step", json!(1));
            set("mlp_only_layers", of(false).collect());
        }
        SparseLayers::Span => {
            let step = of(true).nth(1).map_or(1, |second| second - first);
            set("moe_layer_interval", json!(step));
            set("moe_layer_start_index", json!(first));
            set("moe_layer_end_index", json!(of(true).next_back()));
        }
        SparseLayers::From(key, _) => set(key, json!(first)),
    }
}

/// Those with options that no published one has set.
pub fn refuse_others(fields: &Fields) -> Result<()> {
    for (key, only) in [
        ("use_sliding_window", json!(false)),
        ("clip_qkv", Value::Null),
        ("use_bias", json!(false)),
        ("n_group", json!(1)),
        ("topk_group", json!(1)),
        ("use_expert_bias", json!(true)),
    ] {
        let found = fields.present(key).unwrap_or(&only);
        ensure!(
            *found == only,
            "{key}: {found} is not supported for mixtures of experts, only {only}"
        );
    }
    Ok(())
}
