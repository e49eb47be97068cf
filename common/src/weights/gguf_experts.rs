//! Mixtures of experts as llama.cpp has them in its files: which layers have one, how wide experts are and whether there is one that
//! all tokens go to is read off the tensors, since not every converter says it, or says it right (ERNIE's).

use super::config::{Experts, Scores, Shared};
use super::family::{Mixture, Normed, SharedExpert, SparseLayers};
use super::gguf_config::Metadata;
use super::layout::{Expert, ExpertPart, Place};
use super::rope::positive;
use crate::gguf::Value;
use anyhow::{Result, ensure};

/// Gates and ups of all experts, where they are one tensor (Gemma 4).
pub(super) const GATE_UP: &str = "ffn_gate_up_exps";

/// Where a file has an expert's projection among those of all, gates and ups `together` or not.
pub(super) fn place(name: &str, count: usize, shape: &[usize], together: bool) -> Option<Place> {
    let expert = Expert::of(name)?;
    let layer = expert.layer.strip_prefix("model.layers.")?;
    let (what, parts, part) = match (expert.projection, together) {
        (ExpertPart::Gate, true) => (GATE_UP, 2, 0),
        (ExpertPart::Up, true) => (GATE_UP, 2, 1),
        (ExpertPart::Gate, false) => ("ffn_gate_exps", 1, 0),
        (ExpertPart::Up, false) => ("ffn_up_exps", 1, 0),
        (ExpertPart::Down, _) => ("ffn_down_exps", 1, 0),
    };
    let first = (expert.number * parts + part) * shape[0];
    let file = [&[count, parts * shape[0]], &shape[1..]].concat();
    let name = format!("blk.{layer}{what}.{}", expert.kind);
    Some(Place::part(name, file, first, shape))
}

/// Per layer, its mixture of so many experts, where it has one.
pub(super) fn mixtures(
    fields: &Metadata,
    mixture: &Mixture,
    count: usize,
    layers: usize,
) -> Result<Vec<Option<Experts>>> {
    refuse_other_routers(fields, mixture)?;
    let used = fields.size("expert_used_count")?;
    let tensor =
        |layer: usize, name: &str| fields.gguf.shape(&format!("blk.{layer}.{name}.weight"));
    let all = matches!(mixture.layers, SparseLayers::All);
    let sparse = |layer: &usize| all || tensor(*layer, "ffn_gate_inp").is_some();
    let first = (0..layers).find(sparse).unwrap_or(0);
    let widths = [tensor(first, "ffn_up_exps"), tensor(first, GATE_UP)];
    let ffn = match widths {
        [Some(&[_, ffn, _]), _] => ffn,
        [None, Some(&[_, both, _])] => both / 2,
        _ => fields.size("feed_forward_length")?, // it is missing, as will be said
    };
    let shared = match &mixture.shared {
        Some(shared) => shared_expert(fields, mixture, shared, (first, ffn))?,
        None => None,
    };
    let key = "expert_weights_scale";
    let scale = fields.real(key)?.filter(|_| mixture.scale.is_some());
    let of_each = Experts {
        count,
        used,
        ffn,
        logit_scale: mixture.logit_scale(fields.size("embedding_length")?),
        scores: mixture.scores,
        biased: mixture.selection.is_some(),
        normed: is_normed(fields, mixture).then_some(mixture.least.1 as f32),
        plus: mixture.plus,
        scale: scale.map_or(Ok(1.0), |scale| positive(key, scale))?,
        shared,
        apart: mixture.apart,
        biases: mixture.biases,
    };
    let layers = (0..layers).map(|layer| sparse(&layer).then_some(of_each));
    Ok(layers.collect())
}

fn is_normed(fields: &Metadata, mixture: &Mixture) -> bool {
    match (&mixture.normed, fields.get("expert_weights_norm")) {
        (Normed::Always, _) => true,
        (Normed::Asked { .. }, Some(Value::Flag(normed))) => *normed,
        (Normed::Asked { gguf, .. }, _) => *gguf,
    }
}

/// The expert that all tokens go to, as the first layer that has experts has it, and what a `config.json` could say of it.
fn shared_expert(
    fields: &Metadata,
    mixture: &Mixture,
    shared: &SharedExpert,
    (layer, others): (usize, usize),
) -> Result<Option<Shared>> {
    let name = format!("blk.{layer}.ffn_up_shexp.weight");
    let Some(&[ffn, _]) = fields.gguf.shape(&name) else {
        ensure!(!shared.always, "the tensor {name:?} is missing");
        return Ok(None);
    };
    let (key, times) = shared.width;
    let fits = match times {
        Some(_) => ffn.is_multiple_of(others),
        None => key != mixture.width || ffn == others,
    };
    ensure!(
        fits,
        "an expert of size {ffn} for all tokens beside others of size {others} is not supported for {}",
        fields.architecture
    );
    let gated = shared.gated;
    Ok(Some(Shared { ffn, gated }))
}

/// Groups of experts, and scores that the family has otherwise.
fn refuse_other_routers(fields: &Metadata, mixture: &Mixture) -> Result<()> {
    let known = match mixture.scores {
        Scores::Softmax => 1,
        Scores::Sigmoid => 2,
    };
    for (key, only) in [("expert_gating_func", known), ("expert_group_count", 1)] {
        let found = fields.whole(key)?.filter(|&found| found > 0);
        ensure!(
            found.is_none_or(|found| found == only),
            "{key}: {} is not supported for {}, only {only}",
            found.unwrap_or_default(),
            fields.architecture
        );
    }
    Ok(())
}
