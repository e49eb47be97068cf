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
