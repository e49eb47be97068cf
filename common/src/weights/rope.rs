//! Rotary frequencies, with the context scalings that checkpoints ask for.

use super::config::{Fields, shortest};
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value, json};
use std::f32::consts::PI;

/// Rotary position embedding over the whole head, halves rotated against each other (transformers' `rotate_half`).
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the wavelengths.
    pub theta: f32,
    pub scaling: RopeScaling,
}

/// How the frequencies are stretched to a longer context.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    Default,
    /// Every frequency divided by `factor`.
    Linear {
        factor: f32,
    },
    /// Llama 3.1: long wavelengths divided by `factor`, short ones kept, a ramp between.
    Llama3 {
        factor: f32,
        low_freq_factor: f32,
        high_freq_factor: f32,
        /// Context of the pretraining, tokens.
        original_context: f32,
    },
}

impl Rope {
    /// Radians per position of each pair of a head: `head_dim / 2` values, computed in float32 with the
    /// operations of transformers' `modeling_rope_utils.py` (torch evaluates scalar/tensor as a
    /// reciprocal and a product), so that angles agree to the last bits even far into the context.
    pub fn inv_freq(&self, head_dim: usize) -> Vec<f32> {
        (0..head_dim)
            .step_by(2)
            .map(|i| 1.0 / self.theta.powf(i as f32 / head_dim as f32))
            .map(|frequency| self.scaling.apply(frequency))
            .collect()
    }

    /// From `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (older) of a `config.json`.
    pub(super) fn from_json(fields: &Map<String, Value>, context: usize) -> Result<Self> {
        let top = Fields(fields);
        let (key, inner) = match (top.present("rope_scaling"), top.present("rope_parameters")) {
            (Some(scaling), _) if scaling.as_object().is_none_or(|s| !s.is_empty()) => {
                ("rope_scaling", Some(scaling))
            }
            (_, parameters) => ("rope_parameters", parameters),
        };
        let empty = Map::new();
        let inner = match inner {
            None => &empty,
            Some(value) => value
                .as_object()
                .with_context(|| format!("{key}: must be an object, not {value}"))?,
        };
        for nested in ["full_attention", "sliding_attention"] {
            ensure!(
                !inner.contains_key(nested),
                "{key}: rope parameters by layer type are not supported"
            );
        }
        let inner = Fields(inner);
        for source in [&inner, &top] {
            let partial = source.number("partial_rotary_factor")?.unwrap_or(1.0);
            ensure!(
                partial == 1.0,
                "partial_rotary_factor: {partial} is not supported, only 1 (the whole head is rotated)"
            );
        }
        let theta = match inner.number("rope_theta")? {
            Some(theta) => theta,
            None => top.number("rope_theta")?.unwrap_or(10_000.0),
        };
        ensure!(
            theta.is_finite() && theta > 0.0,
            "rope_theta: must be a positive number, not {theta}"
        );
        let scaling =
            scaling(&inner, &top, context).with_context(|| format!("{key} is not usable"))?;
        Ok(Self {
            theta: theta as f32,
            scaling,
        })
    }

    /// The value of `rope_scaling` in a `config.json`; null when there is none.
    pub(super) fn scaling_json(&self) -> Value {
        match self.scaling {
            RopeScaling::Default => Value::Null,
            RopeScaling::Linear { factor } => {
                json!({"rope_type": "linear", "factor": shortest(factor)})
            }
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_context,
            } => json!({
                "rope_type": "llama3",
                "factor": shortest(factor),
                "low_freq_factor": shortest(low_freq_factor),
                "high_freq_factor": shortest(high_freq_factor),
                "original_max_position_embeddings": original_context as u64,
            }),
        }
    }
}

fn scaling(inner: &Fields, top: &Fields, context: usize) -> Result<RopeScaling> {
    let positive = |key: &str| {
        let value = inner
            .number(key)?
            .with_context(|| format!("{key:?} is missing"))?;
        ensure!(
            value.is_finite() && value > 0.0,
            "{key}: must be a positive number, not {value}"
        );
        Ok(value as f32)
    };
    let kind = match inner.text("rope_type")? {
        Some(kind) => kind,
        None => inner.text("type")?.unwrap_or("default"),
    };
    Ok(match kind {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear {
            factor: positive("factor")?,
        },
        "llama3" => {
            let (low, high) = (positive("low_freq_factor")?, positive("high_freq_factor")?);
            ensure!(
                low < high,
                "low_freq_factor {low} must be below high_freq_factor {high}"
            );
            let key = "original_max_position_embeddings";
            let original = match (top.present(key), inner.present(key)) {
                (Some(_), _) => top.size(key)?,
                (None, Some(_)) => inner.size(key)?,
                (None, None) => context,
            };
            RopeScaling::Llama3 {
                factor: positive("factor")?,
                low_freq_factor: low,
                high_freq_factor: high,
                original_context: original as f32,
            }
        }
        _ => bail!("rope type {kind:?} is not supported; known: default, linear, llama3"),
    })
}

impl RopeScaling {
    fn apply(&self, frequency: f32) -> f32 {
        match *self {
            Self::Default => frequency,
            Self::Linear { factor } => frequency / factor,
            Self::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_context,
            } => {
                let wavelength = (1.0 / frequency) * (2.0 * PI);
                if wavelength > original_context / low_freq_factor {
                    frequency / factor
                } else if wavelength < original_context / high_freq_factor {
                    frequency
                } else {
                    let smooth = ((1.0 / wavelength) * original_context - low_freq_factor)
                        / (high_freq_factor - low_freq_factor);
                    (1.0 - smooth) * frequency / factor + smooth * frequency
                }
            }
        }
    }
}
