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

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(fields: Value) -> Result<Rope> {
        Rope::from_json(fields.as_object().unwrap(), 131_072)
    }

    /// Every fourth of the 32 frequencies of a 64-wide head: the bits of LlamaRotaryEmbedding.inv_freq
    /// (transformers 5.23, torch 2.15). torch's vector `pow` may differ from libm's in the last two bits.
    fn assert_bits(rope: &Rope, expected: [u32; 8]) {
        let found = rope.inv_freq(64);
        assert_eq!(found.len(), 32);
        for (i, expected) in expected.into_iter().enumerate() {
            let found = found[4 * i];
            assert!(
                found.to_bits().abs_diff(expected) <= 2,
                "frequency {}: {found} is not {}",
                4 * i,
                f32::from_bits(expected)
            );
        }
    }

    #[test]
    fn frequencies_match_transformers() {
        let default = rope(json!({"rope_theta": 100000.0})).unwrap();
        assert_bits(
            &default,
            [
                0x3f800000, 0x3e72d423, 0x3d6655c2, 0x3c5a7bf2, 0x3b4f3e38, 0x3a44948c, 0x393a7753,
                0x3830df52,
            ],
        );
        let linear = rope(json!({"rope_parameters":
            {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0}}));
        assert_bits(
            &linear.unwrap(),
            [
                0x3ecccccd, 0x3e0186e2, 0x3d23d70a, 0x3c4f3e38, 0x3b83126e, 0x3aa5cb60, 0x39d1b718,
                0x3904a2b3,
            ],
        );
        let llama3 = rope(
            json!({"rope_theta": 500000.0, "rope_scaling": {"type": "llama3", "factor": 32.0,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}),
        );
        let llama3 = llama3.unwrap();
        assert_bits(
            &llama3,
            [
                0x3f800000, 0x3e4693b0, 0x3d1a08c8, 0x3beef74f, 0x39e13620, 0x370fc8f8, 0x35df10c4,
                0x34ad07a7,
            ],
        );
        // The ramp between the kept and the divided frequencies.
        for (i, expected) in [(14, 0x3b527720u32), (15, 0x3aa9279b), (17, 0x38cb98f7)] {
            assert!(
                llama3.inv_freq(64)[i].to_bits().abs_diff(expected) <= 16,
                "{i}"
            );
        }
    }

    #[test]
    fn old_and_new_fields_mean_the_same() {
        let scaling = json!({"rope_type": "linear", "factor": 4.0});
        let old = rope(json!({"rope_theta": 5e5, "rope_scaling": scaling})).unwrap();
        let mut parameters = scaling.clone();
        parameters["rope_theta"] = json!(5e5);
        assert_eq!(old, rope(json!({"rope_parameters": parameters})).unwrap());
        let default = rope(json!({"rope_scaling": null})).unwrap();
        assert_eq!(
            (default.theta, default.scaling),
            (10_000.0, RopeScaling::Default)
        );
        for rope_written in [old, default] {
            let json = json!({"rope_theta": rope_written.theta, "rope_scaling": rope_written.scaling_json()});
            assert_eq!(rope(json).unwrap(), rope_written);
        }
    }

    #[test]
    fn an_original_context_outside_or_absent_is_found_as_transformers_does() {
        let original = |fields: Value| match rope(fields).unwrap().scaling {
            RopeScaling::Llama3 {
                original_context, ..
            } => original_context,
            other => panic!("{other:?}"),
        };
        let mut scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0});
        assert_eq!(original(json!({"rope_scaling": scaling})), 131_072.0);
        scaling["original_max_position_embeddings"] = json!(4096);
        assert_eq!(original(json!({"rope_scaling": scaling})), 4096.0);
        let outside = json!({"rope_scaling": scaling, "original_max_position_embeddings": 2048});
        assert_eq!(original(outside), 2048.0);
    }

    #[test]
    fn what_is_not_supported_is_named() {
        for (fields, wanted) in [
            (
                json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
                "\"yarn\" is not supported; known: default, linear, llama3",
            ),
            (
                json!({"rope_scaling": {"type": "dynamic", "factor": 4.0}}),
                "\"dynamic\"",
            ),
            (
                json!({"rope_scaling": {"rope_type": "linear"}}),
                "\"factor\" is missing",
            ),
            (
                json!({"rope_scaling": {"rope_type": "linear", "factor": 0}}),
                "factor: must be a positive",
            ),
            (
                json!({"rope_scaling": {"rope_type": 3}}),
                "rope_type: must be a string",
            ),
            (
                json!({"rope_scaling": "linear"}),
                "rope_scaling: must be an object",
            ),
            (json!({"rope_theta": -1}), "rope_theta"),
            (
                json!({"partial_rotary_factor": 0.5}),
                "partial_rotary_factor",
            ),
            (
                json!({"rope_parameters": {"partial_rotary_factor": 0.5}}),
                "partial_rotary_factor",
            ),
            (
                json!({"rope_parameters": {"full_attention": {}}}),
                "by layer type",
            ),
            (
                json!({"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}}),
                "must be below",
            ),
        ] {
            let line = format!("{:#}", rope(fields.clone()).unwrap_err());
            assert!(line.contains(wanted), "{fields}: {line}");
        }
    }
}
