//! Numbers in MXFP4 (Open Compute's microscaling formats): blocks of 32 numbers of four bits, E2M1, with a power of two that all
//! of a block are multiplied by. Folders of gpt-oss have experts so (`quant_method: mxfp4`), and GGUFs of any family may.

use super::layout::Place;
use anyhow::{Result, ensure};
use rayon::prelude::*;

/// The numbers of a block.
const BLOCK: usize = 32;

/// What four bits stand for: a sign, two bits of exponent, one of mantissa.
const E2M1: [f32; 16] = [
    0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0,
];

/// The power of two that a byte stands for, 2^(byte − 127).
fn power(byte: u8) -> f32 {
    match byte {
        0 => f32::from_bits(1 << 22),
        exponent => f32::from_bits(u32::from(exponent) << 23),
    }
}

/// The two numbers of a byte, that of the low bits first.
fn two(byte: u8) -> [f32; 2] {
    [byte & 15, byte >> 4].map(|bits| E2M1[usize::from(bits)])
}

/// Where a folder has the bytes of an expert's matrix, [`BLOCK`] / 2 for a block, and the scales of those. Rows are as the decoder
/// has them, not turned.
pub(super) fn places(place: &Place) -> Result<[Place; 2]> {
    ensure!(
        place.row.is_multiple_of(BLOCK),
        "{}: rows of {} numbers are no blocks of {BLOCK}",
        place.name,
        place.row
    );
    let (experts, blocks) = (place.shape[0], place.row / BLOCK);
    let part = |end: &str, each: &[usize]| Place {
        name: format!("{}_{end}", place.name),
        shape: [&[experts, place.all_rows() / experts, blocks], each].concat(),
        row: blocks * each.iter().product::<usize>(),
        turned: false,
        ..place.clone()
    };
    Ok([part("blocks", &[BLOCK / 2]), part("scales", &[])])
}

/// The numbers of a place, of the bytes and the scales of [`places`]: neighbours share a byte.
pub(super) fn widen_place(place: &Place, bytes: &[u8], scales: &[u8]) -> Vec<f32> {
    let (mut values, blocks) = (vec![0.0; place.len()], place.row / BLOCK);
    let rows = values.par_chunks_mut(place.row).enumerate();
    rows.for_each(|(row, to)| {
        let first = place.row_among(row) * blocks;
        let bytes = bytes[first * BLOCK / 2..].chunks_exact(BLOCK / 2);
        let blocks = to.chunks_exact_mut(BLOCK).zip(bytes).zip(&scales[first..]);
        for ((to, bytes), &scale) in blocks {
            let scale = power(scale);
            for (to, &byte) in to.chunks_exact_mut(2).zip(bytes) {
                to.copy_from_slice(&two(byte).map(|value| value * scale));
            }
        }
    });
    values
}

/// The numbers of a GGUF's blocks: a scale, and bytes whose low bits are the first half of the numbers.
pub(super) fn widen_blocks(bytes: &[u8], values: &mut [f32]) {
    let blocks = bytes.chunks_exact(1 + BLOCK / 2);
    for (to, block) in values.chunks_exact_mut(BLOCK).zip(blocks) {
        let scale = power(block[0]);
        let (low, high) = to.split_at_mut(BLOCK / 2);
        for ((low, high), &byte) in low.iter_mut().zip(high).zip(&block[1..]) {
            [*low, *high] = two(byte).map(|value| value * scale);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::*;
    use super::super::read_json;
    use super::*;
    use candle_core::quantized::GgmlDType;
    use serde_json::json;
    use std::fs;

    #[test]
    fn bytes_are_what_they_stand_for() {
        assert_eq!(two(0x71), [0.5, 6.0]);
        assert_eq!(two(0xf8), [-0.0, -6.0]);
        assert!(two(0xf8)[0].is_sign_negative());
        for (byte, value) in [
            (0, 2f64.powi(-127)),
            (1, 2f64.powi(-126)),
            (127, 1.0),
            (130, 8.0),
            (254, 2f64.powi(127)),
        ] {
            assert_eq!(f64::from(power(byte)), value, "{byte}");
        }
        assert!(!power(255).is_finite());
    }

    /// Sums that are exact, of transformers' own dequantisation, in its layout.
    #[test]
    fn experts_are_what_transformers_makes_of_them() {
        let weights = open(&golden("gpt-oss-mxfp4")).unwrap();
        let figures = read_json(&golden("gpt-oss-mxfp4").join("figures.json")).unwrap();
        let tensors = all_tensors(&weights);
        let mut held = 0;
        for stored in weights.config.stored(borrowed(&tensors)) {
            let (name, _, values) = stored.unwrap();
            let Some(expected) = figures["experts"].get(&name) else {
                continue;
            };
            let wide = || values.iter().copied().map(f64::from);
            let by_place = wide().enumerate().map(|(at, value)| at as f64 * value);
            let sums = json!([wide().sum::<f64>(), by_place.sum::<f64>()]);
            assert_eq!(&sums, expected, "{name}");
            held += 1;
        }
        assert_eq!(held, 2 * weights.config.layers);
    }

    #[test]
    fn experts_of_other_shapes_or_that_are_not_said_to_be_so_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let model = fs::read(golden("gpt-oss-mxfp4").join("model.safetensors")).unwrap();
        fs::write(folder.path().join("model.safetensors"), model).unwrap();
        let config = read_json(&golden("gpt-oss-mxfp4").join("config.json")).unwrap();
        let line = |key: &str, value| {
            let mut config = config.clone();
            config[key] = value;
            fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
            error(folder.path())
        };
        let unsaid = line("quantization_config", json!(null));
        let missing = "mlp.experts.gate_up_proj\" is missing";
        assert!(unsaid.contains(missing), "{unsaid}");
        let wide = line("intermediate_size", json!(64));
        let shapes = "gate_up_proj_blocks\" has shape [8, 64, 2, 16], but the config asks for [8, 128, 2, 16]";
        assert!(wide.contains(shapes), "{wide}");
        let broken = line("intermediate_size", json!(48));
        assert!(
            broken.contains("gate_up_proj_blocks\" has shape"),
            "{broken}"
        );
    }

    /// Blocks of 17 bytes, which a table that is changed says are where longer ones were.
    #[test]
    fn ggufs_have_half_of_a_block_in_low_bits() {
        let folder = tempfile::tempdir().unwrap();
        let (path, _, tensors) = gguf(folder.path(), "qwen2", GgmlDType::Q8_0);
        let (tensor, shape, _) = tensors
            .iter()
            .find(|(name, ..)| name.ends_with("0.mlp.up_proj.weight"))
            .unwrap();
        let mut bytes = fs::read(&path).unwrap();
        let name = b"blk.0.ffn_up.weight";
        let at = bytes.windows(name.len()).position(|at| at == name).unwrap();
        // After the name: the count of dimensions, two of them, the type.
        bytes[at + name.len() + 4 + 16] = 39;
        fs::write(&path, &bytes).unwrap();
        let values = open(&path).unwrap().tensor(tensor, shape).unwrap();
        let file = crate::mapped::Mapped::open(&path).unwrap();
        let header = crate::gguf::Header::of_file(&file, crate::gguf::Arrays::Skip).unwrap();
        let blocks = &bytes[header.tensors["blk.0.ffn_up.weight"].bytes.clone()];
        assert_eq!(blocks.len(), values.len() / 32 * 17);
        for (values, block) in values.chunks(32).zip(blocks.chunks(17)) {
            for (i, value) in values.iter().enumerate() {
                let byte = block[1 + i % 16];
                let bits = if i < 16 { byte & 15 } else { byte >> 4 };
                assert_eq!(*value, E2M1[usize::from(bits)] * power(block[0]));
            }
        }
    }
}
