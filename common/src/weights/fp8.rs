//! Weights in FP8 (E4M3) with scales beside them, as `quant_method: fp8` has them in transformers: read as what they stand for.

use anyhow::{Context, Result, bail};
use rayon::prelude::*;
use serde_json::Value;

/// How a folder's FP8 weights share scales.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Scaling {
    /// All of a tensor have one.
    Tensor,
    /// A block of so many rows and columns has one.
    Blocks([usize; 2]),
}

impl Scaling {
    /// As the `quantization_config` of a folder in FP8 says.
    pub fn of(how: &Value) -> Result<Self> {
        Ok(match how.get("weight_block_size") {
            None => Self::Blocks([128, 128]), // transformers' default
            Some(Value::Null) => Self::Tensor,
            Some(block) => Self::Blocks(sides(block).with_context(|| {
                format!("quantization_config: weight_block_size: {block} is not two sizes")
            })?),
        })
    }

    /// The shape of the scales of a matrix.
    pub fn grid(self, shape: &[usize]) -> Result<Vec<usize>> {
        let &[rows, cols] = shape else {
            bail!("FP8 is supported for matrices, not for a shape of {shape:?}");
        };
        Ok(match self {
            Self::Tensor => vec![],
            Self::Blocks([high, wide]) => vec![rows.div_ceil(high), cols.div_ceil(wide)],
        })
    }

    /// Multiplies rows of a matrix, `cols` wide, from row `first` on, by their scales.
    pub fn apply(self, scales: &[f32], (first, cols): (usize, usize), values: &mut [f32]) {
        let [high, wide] = match self {
            Self::Tensor => [usize::MAX, cols],
            Self::Blocks(block) => block,
        };
        let rows = values.par_chunks_exact_mut(cols).enumerate();
        rows.for_each(|(row, values)| {
            let scales = &scales[(first + row) / high * cols.div_ceil(wide)..];
            for (values, scale) in values.chunks_mut(wide).zip(scales) {
                values.iter_mut().for_each(|value| *value *= scale);
            }
        });
    }
}

fn sides(block: &Value) -> Option<[usize; 2]> {
    let side = |i: usize| match block.get(i)?.as_u64()? {
        0 => None,
        side => usize::try_from(side).ok(),
    };
    (block.as_array()?.len() == 2).then_some([side(0)?, side(1)?])
}

/// What each byte stands for: a sign, four bits of exponent, three of mantissa, no infinities.
pub(super) const E4M3: [f32; 256] = {
    let mut all = [0.0; 256];
    let mut byte = 0;
    while byte < 256 {
        all[byte] = value(byte as u32);
        byte += 1;
    }
    all
};

const fn value(byte: u32) -> f32 {
    let (exponent, mantissa) = ((byte >> 3) & 15, byte & 7);
    let magnitude = match (exponent, mantissa) {
        (15, 7) => f32::NAN,
        (0, mantissa) => mantissa as f32 / 512.0,
        (exponent, mantissa) => f32::from_bits(((exponent + 120) << 23) | (mantissa << 20)),
    };
    if byte >> 7 == 1 {
        -magnitude
    } else {
        magnitude
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn bytes_are_what_they_stand_for() {
        for (byte, value) in [
            (0x00, 0.0),
            (0x01, 0.001953125),
            (0x07, 0.013671875),
            (0x08, 0.015625),
            (0x38, 1.0),
            (0x3c, 1.5),
            (0x7e, 448.0),
            (0xbc, -1.5),
        ] {
            assert_eq!(E4M3[byte], value, "{byte:#x}");
        }
        assert!(E4M3[0x7f].is_nan() && E4M3[0xff].is_nan());
        assert!(E4M3[0x80].is_sign_negative());
    }

    #[test]
    fn scales_are_of_blocks_and_the_last_may_be_cut() {
        let fp8 = |block: Value| json!({"quant_method": "fp8", "weight_block_size": block});
        let of = |how: Value| Scaling::of(&how).unwrap();
        assert_eq!(of(fp8(Value::Null)), Scaling::Tensor);
        let unsaid = of(json!({"quant_method": "fp8"}));
        assert_eq!(unsaid, Scaling::Blocks([128, 128]));
        for bad in [json!([128]), json!([128, 0]), json!(128), json!([1, 2, 3])] {
            let line = Scaling::of(&fp8(bad)).unwrap_err().to_string();
            assert!(line.contains("is not two sizes"), "{line}");
        }
        let blocks = of(fp8(json!([2, 3])));
        assert_eq!(blocks.grid(&[3, 4]).unwrap(), [2, 2]);
        let mut values = vec![1.0; 12];
        blocks.apply(&[1.0, 2.0, 3.0, 4.0], (0, 4), &mut values);
        assert_eq!(values, [1., 1., 1., 2., 1., 1., 1., 2., 3., 3., 3., 4.]);
        let mut last = vec![1.0; 4];
        blocks.apply(&[1.0, 2.0, 3.0, 4.0], (2, 4), &mut last);
        assert_eq!(last, values[8..]);
        Scaling::Tensor.apply(&[5.0], (1, 4), &mut last);
        assert_eq!(last, [15., 15., 15., 20.]);
    }
}
