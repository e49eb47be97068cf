//! How a folder's weights are quantised, as the `quantization_config` of its config says.

use super::fp8::Scaling;
use anyhow::{Result, bail};
use serde_json::Value;

/// The format of some of a folder's weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Quantised {
    Fp8(Scaling),
    /// Experts: see [`super::mxfp4`].
    Mxfp4,
}

impl Quantised {
    /// As a config's `quantization_config` says; None where there is none.
    ///
    /// # Errors
    /// Weights in another format.
    pub fn of(how: Option<&Value>) -> Result<Option<Self>> {
        let Some(how) = how.filter(|how| !how.is_null()) else {
            return Ok(None);
        };
        Ok(Some(
            match how.get("quant_method").and_then(Value::as_str) {
                Some("fp8") => Self::Fp8(Scaling::of(how)?),
                Some("mxfp4") => Self::Mxfp4,
                _ => bail!(
                    "quantization_config: of quantised safetensors only those of \"quant_method\": \"fp8\" or \"mxfp4\" are \
                     supported; use the float checkpoint, or a GGUF"
                ),
            },
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_config_says_how() {
        assert_eq!(Quantised::of(None).unwrap(), None);
        assert_eq!(Quantised::of(Some(&Value::Null)).unwrap(), None);
        let of = |how: Value| Quantised::of(Some(&how));
        let mxfp4 = of(json!({"quant_method": "mxfp4", "modules_to_not_convert": []}));
        assert_eq!(mxfp4.unwrap(), Some(Quantised::Mxfp4));
        let fp8 = of(json!({"quant_method": "fp8", "weight_block_size": null}));
        assert_eq!(fp8.unwrap(), Some(Quantised::Fp8(Scaling::Tensor)));
        for other in [json!({"bits": 4}), json!({"quant_method": "awq"})] {
            let line = of(other).unwrap_err().to_string();
            assert!(line.contains("use the float checkpoint"), "{line}");
        }
    }
}
