//! Rotary frequencies, with the context scalings that checkpoints ask for.

use super::config_json::{Fields, shortest};
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value, json};
use std::f32::consts::PI;

/// Rotary position embedding, halves rotated against each other (transformers' `rotate_half`).
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the wavelengths.
    pub theta: f32,
    pub scaling: RopeScaling,
}

/// How the frequencies are stretched to a longer context.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    Default,
    /// Every frequency divided by `factor`.
    Linear {
        factor: f32,
    },
    /// This part of the pairs, the fastest, turn as they would if all did, divided by `factor`; the others do not (Gemma 4).
    Proportional {
        part: f32,
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
    /// YaRN (arXiv 2309.00071): pairs that turn more than `beta_fast` times in the original context kept, those that turn
    /// less than `beta_slow` times divided by `factor`, a ramp between; queries and keys grow with `attention_factor`.
    Yarn {
        factor: f32,
        original_context: f32,
        beta_fast: f32,
        beta_slow: f32,
        attention_factor: f32,
        /// The ramp's ends are rounded to pairs.
        truncate: bool,
    },
    /// LongRoPE (arXiv 2402.13753): a divisor for each pair. There are others for sequences beyond the original context, which
    /// transformers turns to for a whole batch; here sequences end where these do.
    LongRope {
        short: Vec<f32>,
        /// The divisors beyond; kept for the file that a checkpoint gets.
        long: Vec<f32>,
        /// Context of the pretraining, and what `long` stretches it to, tokens.
        original_context: usize,
        context: usize,
        attention_factor: f32,
    },
}

/// Beside being turned, queries are multiplied by 1 + `beta` · ln(1 + ⌊position / `context`⌋): the longer what they look back
/// on, the sharper they look (Ministral 3, which has it from Llama 4).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QueryGrowth {
    pub beta: f32,
    /// Context of the pretraining, tokens: before its end nothing grows.
    pub context: usize,
}

impl QueryGrowth {
    /// What a query at that position is multiplied by.
    pub fn at(self, position: usize) -> f32 {
        1.0 + self.beta * ((1 + position / self.context) as f32).ln()
    }

    /// As the object has it that says how positions are rotated. That must be there: what transformers puts in its place
    /// does not follow from the sizes.
    pub(super) fn from_json(top: &Fields, context: usize) -> Result<Option<Self>> {
        let (key, inner) = parameters(top)?;
        let inner = Fields(inner.with_context(|| format!("{key} is missing"))?);
        let key = "llama_4_scaling_beta";
        let Some(beta) = inner.number(key)?.filter(|&beta| beta != 0.0) else {
            return Ok(None);
        };
        Ok(Some(Self {
            beta: positive(key, beta)?,
            context: original_context(&inner, top, Some(context))?,
        }))
    }
}

impl Rope {
    /// Radians per position of each pair among the `dims` of a head that are rotated: `dims / 2` values, computed in float32 with the
    /// operations of transformers' `modeling_rope_utils.py` (torch evaluates scalar/tensor as a
    /// reciprocal and a product), so that angles agree to the last bits even far into the context.
    pub fn inv_freq(&self, dims: usize) -> Vec<f32> {
        let ramp = self.scaling.ramp(self.theta, dims);
        (0..dims / 2)
            .map(|pair| {
                let wavelength = self.theta.powf((2 * pair) as f32 / dims as f32);
                self.scaling.frequency(pair, wavelength, ramp(pair))
            })
            .collect()
    }

    /// Fails where a scaling is not one of so many pairs.
    pub(super) fn check(&self, pairs: usize) -> Result<()> {
        if let RopeScaling::LongRope { short, long, .. } = &self.scaling {
            for (name, factors) in [("short", short), ("long", long)] {
                ensure!(
                    factors.len() == pairs,
                    "{name}_factor: has {} entries for {pairs} pairs of dimensions",
                    factors.len()
                );
            }
        }
        Ok(())
    }

    /// Where sequences end that this can turn, if before the model's context.
    pub(super) fn end(&self) -> Option<usize> {
        match self.scaling {
            RopeScaling::LongRope {
                original_context, ..
            } => Some(original_context),
            _ => None,
        }
    }

    /// What a rotation multiplies queries and keys by, beside turning them.
    pub fn growth(&self) -> f32 {
        match self.scaling {
            RopeScaling::Yarn {
                attention_factor, ..
            }
            | RopeScaling::LongRope {
                attention_factor, ..
            } => attention_factor,
            _ => 1.0,
        }
    }

    /// From `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (older) of a `config.json`; `theta` is
    /// the base where it has none.
    pub(super) fn from_json(top: &Fields, theta: f64, context: usize) -> Result<Self> {
        let (key, inner) = parameters(top)?;
        let empty = Map::new();
        let inner = inner.unwrap_or(&empty);
        for nested in ["full_attention", "sliding_attention"] {
            ensure!(
                !inner.contains_key(nested),
                "{key}: rope parameters by layer type are not supported"
            );
        }
        let theta = top.number("rope_theta")?.unwrap_or(theta);
        Self::of_fields(key, &Fields(inner), top, theta, context)
    }

    /// Hunyuan's NTK-aware scaling, "dynamic" by name: its `alpha` makes the base larger, whatever the length, by
    /// alpha^(dims / (dims − 2)). None where there is none.
    pub(super) fn by_alpha(top: &Fields, theta: f64, dims: usize) -> Result<Option<Self>> {
        let Some(inner) = parameters(top)?.1.map(Fields) else {
            return Ok(None);
        };
        let alpha = inner.number("alpha")?;
        let Some(alpha) = alpha.filter(|_| kind(&inner).is_ok_and(|kind| kind == "dynamic")) else {
            return Ok(None);
        };
        let theta = match inner.number("rope_theta")? {
            Some(theta) => theta,
            None => top.number("rope_theta")?.unwrap_or(theta),
        };
        let dims = dims as f64;
        let stretched = theta * alpha.powf(dims / (dims - 2.0));
        Ok(Some(Self {
            theta: positive("rope_theta stretched by alpha", stretched)?,
            scaling: RopeScaling::Default,
        }))
    }

    /// The same for families that rotate layers with a window otherwise than those without: first of those, then of
    /// these. Both are in `rope_parameters` by the names that `layer_types` has; older files give one rope, which is that of the
    /// layers without, and for the others `rope_local_base_freq`, or `local` where that is absent, or else (None) its base.
    pub(super) fn by_layer_type(
        top: &Fields,
        theta: f64,
        local: Option<f64>,
        context: usize,
    ) -> Result<(Self, Self)> {
        let nested = top.present("rope_parameters").and_then(Value::as_object);
        let of_type = |kind: &str| nested.and_then(|types| types.get(kind)?.as_object());
        let read = |fields, theta| {
            Self::of_fields("rope_parameters", &Fields(fields), top, theta, context)
        };
        let full = match of_type("full_attention") {
            Some(fields) => read(fields, top.number("rope_theta")?.unwrap_or(theta))?,
            None => Self::from_json(top, theta, context)?,
        };
        let local = match (top.number("rope_local_base_freq")?, local) {
            (Some(theta), Some(_)) | (None, Some(theta)) => theta,
            (_, None) => f64::from(full.theta),
        };
        let local = match of_type("sliding_attention") {
            Some(fields) => read(fields, local)?,
            None => Self {
                theta: positive("rope_local_base_freq", local)?,
                scaling: RopeScaling::Default,
            },
        };
        Ok((full, local))
    }

    /// `theta` is the base where `inner` has none.
    fn of_fields(
        key: &str,
        inner: &Fields,
        top: &Fields,
        theta: f64,
        context: usize,
    ) -> Result<Self> {
        let theta = inner.number("rope_theta")?.unwrap_or(theta);
        Ok(Self {
            theta: positive("rope_theta", theta)?,
            scaling: scaling(inner, top, context)
                .with_context(|| format!("{key} is not usable"))?,
        })
    }

    /// The same with its base, as transformers 5 has it.
    pub(super) fn parameters_json(&self) -> Value {
        let mut json = self.scaling_json();
        if json.is_null() {
            json = json!({"rope_type": "default"});
        }
        json["rope_theta"] = shortest(self.theta);
        json
    }

    /// The value of `rope_scaling` in a `config.json`; null when there is none.
    pub(super) fn scaling_json(&self) -> Value {
        match &self.scaling {
            RopeScaling::LongRope {
                short,
                long,
                original_context,
                context,
                attention_factor,
            } => {
                let list =
                    |factors: &[f32]| factors.iter().map(|&f| shortest(f)).collect::<Value>();
                let mut json = json!({"type": "longrope", "short_factor": list(short), "long_factor": list(long)});
                // Three fields and no more are what transformers 4 wants; the growth follows from the contexts.
                let stretched = *context as f64 / *original_context as f64;
                if *attention_factor != longrope_growth(stretched, *original_context) {
                    json["attention_factor"] = shortest(*attention_factor);
                }
                json
            }
            RopeScaling::Default => Value::Null,
            RopeScaling::Proportional { part, factor } => json!({
                "rope_type": "proportional",
                "partial_rotary_factor": shortest(*part),
                "factor": shortest(*factor),
            }),
            RopeScaling::Linear { factor } => {
                json!({"rope_type": "linear", "factor": shortest(*factor)})
            }
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_context,
            } => json!({
                "rope_type": "llama3",
                "factor": shortest(*factor),
                "low_freq_factor": shortest(*low_freq_factor),
                "high_freq_factor": shortest(*high_freq_factor),
                "original_max_position_embeddings": *original_context as u64,
            }),
            RopeScaling::Yarn {
                factor,
                original_context,
                beta_fast,
                beta_slow,
                attention_factor,
                truncate,
            } => json!({
                "rope_type": "yarn",
                "factor": shortest(*factor),
                "original_max_position_embeddings": *original_context as u64,
                "beta_fast": shortest(*beta_fast),
                "beta_slow": shortest(*beta_slow),
                "attention_factor": shortest(*attention_factor),
                "truncate": truncate,
            }),
        }
    }
}

/// The object of a config that says how positions are rotated, and its name: `rope_parameters`, or what it was before.
fn parameters<'a>(top: &Fields<'a>) -> Result<(&'static str, Option<&'a Map<String, Value>>)> {
    let (key, inner) = match (top.present("rope_scaling"), top.present("rope_parameters")) {
        (Some(scaling), _) if scaling.as_object().is_none_or(|s| !s.is_empty()) => {
            ("rope_scaling", Some(scaling))
        }
        (_, parameters) => ("rope_parameters", parameters),
    };
    let object = |value: &'a Value| {
        value
            .as_object()
            .with_context(|| format!("{key}: must be an object, not {value}"))
    };
    Ok((key, inner.map(object).transpose()?))
}

/// The name of a scaling.
fn kind<'a>(inner: &Fields<'a>) -> Result<&'a str> {
    Ok(match inner.text("rope_type")? {
        Some(kind) => kind,
        None => inner.text("type")?.unwrap_or("default"),
    })
}

/// The context of the pretraining, `unsaid` where neither the config nor its object says.
fn original_context(inner: &Fields, top: &Fields, unsaid: Option<usize>) -> Result<usize> {
    let key = "original_max_position_embeddings";
    match (top.present(key), inner.present(key), unsaid) {
        (Some(_), ..) => top.size(key),
        (None, None, Some(unsaid)) => Ok(unsaid),
        _ => inner.size(key),
    }
}

/// A number that must be above zero.
pub(super) fn positive(key: &str, value: f64) -> Result<f32> {
    ensure!(
        value.is_finite() && value > 0.0,
        "{key}: must be a positive number, not {value}"
    );
    Ok(value as f32)
}

fn scaling(inner: &Fields, top: &Fields, context: usize) -> Result<RopeScaling> {
    let given = |key: &str| match inner.number(key)? {
        Some(value) => positive(key, value).map(Some),
        None => Ok(None),
    };
    let needed = |key: &str| given(key)?.with_context(|| format!("{key:?} is missing"));
    let original = |unsaid| original_context(inner, top, unsaid);
    let original_context = || anyhow::Ok(original(Some(context))? as f32);
    Ok(match kind(inner)? {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear {
            factor: needed("factor")?,
        },
        "proportional" => RopeScaling::Proportional {
            part: given("partial_rotary_factor")?.unwrap_or(1.0),
            factor: given("factor")?.unwrap_or(1.0),
        },
        "llama3" => {
            let (low, high) = (needed("low_freq_factor")?, needed("high_freq_factor")?);
            ensure!(
                low < high,
                "low_freq_factor {low} must be below high_freq_factor {high}"
            );
            RopeScaling::Llama3 {
                factor: needed("factor")?,
                low_freq_factor: low,
                high_freq_factor: high,
                original_context: original_context()?,
            }
        }
        "yarn" => {
            let factor = needed("factor")?;
            let scale = |key: &str| anyhow::Ok(inner.number(key)?.filter(|&scale| scale != 0.0));
            let scales = scale("mscale")?.zip(scale("mscale_all_dim")?);
            let growth = yarn_growth(factor, scales.unwrap_or((1.0, 0.0)));
            RopeScaling::Yarn {
                factor,
                original_context: original_context()?,
                beta_fast: given("beta_fast")?.unwrap_or(32.0),
                beta_slow: given("beta_slow")?.unwrap_or(1.0),
                attention_factor: given("attention_factor")?.unwrap_or(growth),
                truncate: inner.flag("truncate")?.unwrap_or(true),
            }
        }
        // The first Phi-3 models have it by its first name.
        "longrope" | "su" => {
            let original_context = original(None)?;
            let stretched = context as f64 / original_context as f64;
            let factor = inner.number("factor")?.unwrap_or(stretched);
            RopeScaling::LongRope {
                short: factors(inner, "short_factor")?,
                long: factors(inner, "long_factor")?,
                original_context,
                context,
                attention_factor: given("attention_factor")?
                    .unwrap_or(longrope_growth(factor, original_context)),
            }
        }
        other => bail!(
            "rope type {other:?} is not supported; known: default, linear, llama3, yarn, longrope, proportional"
        ),
    })
}

/// A list of divisors.
fn factors(inner: &Fields, key: &str) -> Result<Vec<f32>> {
    let list = inner
        .present(key)
        .with_context(|| format!("{key:?} is missing"))?;
    let list = list
        .as_array()
        .with_context(|| format!("{key}: must be a list"))?;
    let number = |value: &Value| match value.as_f64() {
        Some(number) => positive(key, number),
        None => bail!("{key}: entries must be numbers, not {value}"),
    };
    list.iter().map(number).collect()
}

/// What transformers multiplies queries and keys by, for a context that is `factor` times the original one.
pub(super) fn longrope_growth(factor: f64, original_context: usize) -> f32 {
    match factor <= 1.0 {
        true => 1.0,
        false => (1.0 + factor.ln() / (original_context as f64).ln()).sqrt() as f32,
    }
}

/// The part of a head that is rotated: `partial_rotary_factor`, beside the base or in the config itself.
pub(super) fn rotated_part(top: &Fields, unsaid: f64) -> Result<f64> {
    const KEY: &str = "partial_rotary_factor";
    let mut objects = vec![top.0];
    if let (_, Some(inner)) = parameters(top)? {
        objects.push(inner);
        objects.extend(inner.values().filter_map(Value::as_object)); // by layer type
    }
    let mut part = unsaid;
    for object in objects {
        part = Fields(object).number(KEY)?.unwrap_or(part);
    }
    Ok(part)
}

/// What queries and keys are multiplied by: the paper has the scales 1 and 0; others are DeepSeek's `mscale` and
/// `mscale_all_dim`.
pub(super) fn yarn_growth(factor: f32, (scale, over): (f64, f64)) -> f32 {
    let grown = |scale: f64| 0.1 * scale * f64::from(factor.max(1.0)).ln() + 1.0;
    (grown(scale) / grown(over)) as f32
}

impl RopeScaling {
    /// YaRN's part of each pair's frequency that is divided: 0 for the first pairs, 1 for the last. (The other scalings go
    /// by the frequency itself.)
    fn ramp(&self, theta: f32, dims: usize) -> impl Fn(usize) -> f32 + use<> {
        let (low, span) = match *self {
            Self::Yarn {
                original_context,
                beta_fast,
                beta_slow,
                truncate,
                ..
            } => {
                let dim = dims as f64;
                let pair_that_turns = |times: f32| {
                    let turns = f64::from(original_context)
                        / (f64::from(times) * 2.0 * std::f64::consts::PI);
                    dim * turns.ln() / (2.0 * f64::from(theta).ln())
                };
                let (low, high) = (pair_that_turns(beta_fast), pair_that_turns(beta_slow));
                let (low, high) = match truncate {
                    true => (low.floor(), high.ceil()),
                    false => (low, high),
                };
                let (low, high) = (low.max(0.0), high.min(dim - 1.0));
                let span = if low == high { 0.001 } else { high - low };
                (low as f32, span as f32)
            }
            // Where it is above 0, pairs do not turn.
            Self::Proportional { part, .. } => {
                let turning = (part * dims as f32 / 2.0).floor();
                (turning - 1.0, 1.0)
            }
            _ => (0.0, 1.0),
        };
        move |pair| ((pair as f32 - low) / span).clamp(0.0, 1.0)
    }

    fn frequency(&self, pair: usize, wavelength: f32, ramp: f32) -> f32 {
        let frequency = 1.0 / wavelength;
        match *self {
            Self::Default => frequency,
            Self::LongRope { ref short, .. } => 1.0 / (short[pair] * wavelength),
            Self::Linear { factor } => frequency / factor,
            Self::Proportional { .. } if ramp > 0.0 => 0.0,
            Self::Proportional { factor, .. } => frequency / factor,
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
            Self::Yarn { factor, .. } => {
                let divided = 1.0 / (factor * (1.0 / frequency));
                let kept = 1.0 - ramp;
                divided * (1.0 - kept) + frequency * kept
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(fields: Value) -> Result<Rope> {
        Rope::from_json(&Fields(fields.as_object().unwrap()), 10_000.0, 131_072)
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
        let yarn = rope(
            json!({"rope_theta": 500000.0, "rope_scaling": {"rope_type": "yarn", "factor": 8.0,
            "original_max_position_embeddings": 8192, "beta_fast": 32, "beta_slow": 1}}),
        );
        let yarn = yarn.unwrap();
        assert_eq!(yarn.growth(), 1.207_944_2);
        assert_bits(
            &yarn,
            [
                0x3f800000, 0x3e4693b0, 0x3d1a08c8, 0x3ba94482, 0x39ecda8c, 0x380fc8f8, 0x36df10c4,
                0x35ad07a7,
            ],
        );
        for (i, expected) in [(13, 0x3b41d158u32), (14, 0x3ad84fc3), (18, 0x38a3418d)] {
            assert!(
                yarn.inv_freq(64)[i].to_bits().abs_diff(expected) <= 16,
                "{i}"
            );
        }
        let qwen = rope(
            json!({"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0,
            "original_max_position_embeddings": 32768}}),
        );
        let qwen = qwen.unwrap();
        assert_eq!(qwen.growth(), 1.138_629_4);
        assert_bits(
            &qwen,
            [
                0x3f800000, 0x3e361887, 0x3d0186e3, 0x3ba8e98f, 0x3a18ead7, 0x383a7753, 0x3704a2b2,
                0x35bcb0c1,
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
        assert_eq!(default.theta, 10_000.0);
        assert_eq!(default.scaling, RopeScaling::Default);
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

    /// As transformers' `_compute_yarn_parameters` has it.
    #[test]
    fn yarns_scales_count_where_both_are_there() {
        let growth = |mut fields: Value| {
            fields["rope_type"] = json!("yarn");
            fields["factor"] = json!(64.0);
            rope(json!({"rope_scaling": fields})).unwrap().growth()
        };
        let usual = growth(json!({}));
        assert_eq!(usual, 1.415_888_3);
        assert_eq!(growth(json!({"mscale": 1.0})), usual);
        assert_eq!(growth(json!({"mscale": 1.0, "mscale_all_dim": 0.0})), usual);
        assert_eq!(growth(json!({"mscale": 1.0, "mscale_all_dim": 1.0})), 1.0);
        let other = growth(json!({"mscale": 0.707, "mscale_all_dim": 1.0}));
        assert_eq!(other, 0.913_937_2);
    }

    #[test]
    fn queries_grow_from_the_end_of_the_first_context_on() {
        let of = |fields: Value| QueryGrowth::from_json(&Fields(fields.as_object().unwrap()), 64);
        let yarn = json!({"rope_type": "yarn", "llama_4_scaling_beta": 0.5,
            "original_max_position_embeddings": 16});
        let growth = of(json!({"rope_parameters": yarn})).unwrap().unwrap();
        assert_eq!([0, 15].map(|position| growth.at(position)), [1.0; 2]);
        assert_eq!(growth.at(16), 1.0 + 0.5 * 2f32.ln());
        assert_eq!(growth.at(63), 1.0 + 0.5 * 4f32.ln());
        let none = json!({"rope_parameters": {"llama_4_scaling_beta": 0.0}});
        assert!(of(none).unwrap().is_none());
        let absent = format!("{:#}", of(json!({})).unwrap_err());
        assert_eq!(absent, "rope_parameters is missing");
    }

    #[test]
    fn what_is_not_supported_is_named() {
        for (fields, wanted) in [
            (
                json!({"rope_scaling": {"rope_type": "dynamic"}}),
                "\"dynamic\" is not supported; known: default, linear, llama3, yarn, longrope, proportional",
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
                json!({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}),
                "original_max_position_embeddings\" is missing",
            ),
            (
                json!({"rope_scaling": {"rope_type": "longrope"}, "original_max_position_embeddings": 64}),
                "\"short_factor\" is missing",
            ),
            (
                json!({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0, 0]},
                    "original_max_position_embeddings": 64}),
                "short_factor: must be a positive number, not 0",
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
