//! log p(y|x) on the device: big packed batches, only rows that predict a response token meet the LM head, and they meet
//! it a tile of the vocabulary at a time.

use super::args;
use super::decoder::Decoder;
use super::delta::memories_bytes;
use super::device::{Buffer, Device, Launch, Precision, bytes_of};
use super::launches::THREADS;
use crate::logprob::{Batch, Group, PassLimits, in_parts};
use crate::weights::Config;
use anyhow::Result;

/// Bytes of logits that exist at a time.
const LOGITS: usize = 512 << 20;
/// Words of a tile, at least (or all): enough for the matrix units.
const WORDS: usize = 16 << 10;
/// Tokens of a forward pass: beyond these nothing is gained.
const MOST_TOKENS: usize = 32 << 10;

/// log p of each target, float32 on the device.
pub struct TargetLogps {
    /// log p(target), nats.
    pub logps: Buffer,
    /// log Σ exp(logits).
    pub lse: Buffer,
}

impl Decoder {
    /// Tokens of a forward pass that fit what memory is free now.
    ///
    /// # Errors
    /// A device that does not answer.
    pub fn tokens_at_once(&self) -> Result<usize> {
        let room = most_tokens(&self.config, self.precision, self.device.memory()?.free);
        Ok(room.clamp(1, MOST_TOKENS))
    }

    /// Groups packed for a pass: tokens and targets in round numbers, those at the end belonging to nobody.
    pub fn pack<'a>(&self, groups: impl IntoIterator<Item = &'a Group>) -> Batch {
        let mut batch = Batch::new(groups);
        let tokens = rounded(batch.tokens.len(), self.parameters);
        let targets = rounded(batch.targets.len(), self.parameters);
        if tokens > batch.tokens.len() {
            batch.layout.push(tokens - batch.tokens.len(), &[]);
        }
        batch.tokens.resize(tokens, 0);
        batch.targets.resize(targets, 0);
        batch.rows.resize(targets, 0);
        batch
    }
}

/// Tokens of the longest forward pass that `free` bytes have room for beside a model, its logits included.
pub fn most_tokens(config: &Config, precision: Precision, free: usize) -> usize {
    let free = free / 10 * 9; // the rest is for the rounding of allocations
    let free = free.saturating_sub(memories_bytes(config));
    // Rows that meet the LM head are at most as many as the tokens, and their logits come in tiles.
    let each = Decoder::pass_bytes(config, precision) + config.hidden * bytes_of(precision);
    let logits = config.vocab * size_of::<f32>();
    let rows = (free / (each + logits)).max(free.saturating_sub(LOGITS) / each);
    rows.saturating_sub((rows / 16).max(16)) // see `rounded`
}

/// So many rows in a round number: cuBLAS searches its kernels wherever it meets a shape for the first time, and loads what
/// it finds, which takes longer than a small product. A few percent more at most, and few rows of a large model.
fn rounded(rows: usize, parameters: usize) -> usize {
    const CHEAP: usize = 1 << 36; // parameters times rows
    let step = (rows / 32).min(CHEAP / parameters);
    rows.next_multiple_of(step.next_power_of_two().clamp(16, 512))
}

/// Σ log p over the tokens of each response, in nats, groups and responses in order.
pub fn score(decoder: &Decoder, groups: &[Group]) -> Result<Vec<f64>> {
    let device = &decoder.device;
    let batch = decoder.pack(groups);
    let shape = decoder.shape(&batch.layout)?;
    let pass = decoder.pass(batch.tokens.len())?;
    decoder.forward(&shape, &batch.tokens, &pass, |_| None)?;
    let predicting = Predicting::new(decoder, &batch, &pass.x)?;
    drop(pass);
    let found = predicting.target_logps(decoder)?;
    predicting.sums(device, &found.logps)
}

/// The rows of a batch that predict its targets.
pub(super) struct Predicting {
    /// How many.
    pub count: usize,
    /// Which they are in the batch, int32.
    pub rows: Buffer,
    /// What they should predict, int32.
    pub targets: Buffer,
    /// Their hidden states after the last norm, `[count, hidden]`.
    pub normed: Buffer,
    /// How many responses they are of.
    pub responses: usize,
    /// The first target of each response, and one past the last, int32.
    pub offsets: Buffer,
}

impl Predicting {
    /// Gathers them from the residual stream after the last layer.
    pub fn new(decoder: &Decoder, batch: &Batch, x: &Buffer) -> Result<Self> {
        let device = &decoder.device;
        let count = batch.targets.len();
        let rows: Vec<i32> = batch.rows.iter().map(|&r| r as i32).collect();
        let rows = device.buffer_of(&rows)?;
        let normed = device.allocate(count * decoder.config.hidden * decoder.size())?;
        decoder.final_norm(x, Some(&rows), count, &normed)?;
        let mut offsets = vec![0i32];
        offsets.extend(batch.responses.iter().map(|r| r.end as i32));
        Ok(Self {
            count,
            rows,
            targets: device.buffer_of(&batch.targets)?,
            normed,
            responses: batch.responses.len(),
            offsets: device.buffer_of(&offsets)?,
        })
    }

    /// log p of their targets.
    pub fn target_logps(&self, decoder: &Decoder) -> Result<TargetLogps> {
        target_logps(decoder, &self.normed, &self.targets, self.count)
    }

    /// Sums of each response, in float64 where they are: a few numbers come back.
    pub fn sums(&self, device: &Device, logps: &Buffer) -> Result<Vec<f64>> {
        let sums = device.allocate(self.responses * size_of::<f64>())?;
        device.launch(
            "segment_sums",
            Launch::row(self.responses.div_ceil(8), THREADS),
            args![logps, &self.offsets, &sums, self.responses as i32],
        )?;
        sums.read(0, self.responses)
    }
}

/// As [`score`] for many groups, with at most `limit` tokens in a forward pass.
pub fn score_all(decoder: &Decoder, groups: &[Group], limit: usize) -> Result<Vec<Vec<f64>>> {
    let limits = PassLimits {
        gathered: limit,
        most: limit,
    };
    in_parts(groups, limits, |part| score(decoder, part))
}

/// log p of each of `count` targets (int32), for `normed` `[count, hidden]`, the hidden states after the last norm.
pub fn target_logps(
    decoder: &Decoder,
    normed: &Buffer,
    targets: &Buffer,
    count: usize,
) -> Result<TargetLogps> {
    let device = &decoder.device;
    let (vocab, width) = (decoder.config.vocab, decoder.config.hidden);
    let floats = |n: usize| device.allocate(n * size_of::<f32>());
    let found = TargetLogps {
        logps: floats(count)?,
        lse: floats(count)?,
    };
    let (rows_at_once, words_at_once) = tile(count, vocab);
    let logits = floats(rows_at_once * words_at_once)?;
    let state = floats(3 * rows_at_once)?;
    for first in (0..count).step_by(rows_at_once) {
        let rows = (count - first).min(rows_at_once);
        let normed = normed.rows(first, width, decoder.precision);
        for word in (0..vocab).step_by(words_at_once) {
            let words = (vocab - word).min(words_at_once);
            decoder.logits(
                normed,
                rows,
                (word, words),
                logits.rows(0, words, Precision::F32),
            )?;
            device.launch(
                "logprob_update",
                Launch::row(rows, THREADS),
                args![
                    &logits,
                    targets.element(first, 4),
                    &state,
                    words as i32,
                    word as i32,
                    i32::from(word == 0),
                ],
            )?;
        }
        device.launch(
            "logprob_finish",
            Launch::row(rows.div_ceil(THREADS), THREADS),
            args![
                &state,
                found.logps.element(first, 4),
                found.lse.element(first, 4),
                rows as i32,
            ],
        )?;
    }
    Ok(found)
}

/// Rows and words of a tile of logits: few words and many rows, so that the head's weights are read few times.
pub(super) fn tile(rows: usize, vocab: usize) -> (usize, usize) {
    let all = LOGITS / size_of::<f32>();
    // cuBLAS is slow where rows do not begin at multiples of 16 bytes.
    let even = all / rows.max(1) / 64 * 64;
    let words = even.clamp(WORDS.min(vocab), vocab);
    ((all / words).min(rows).max(1), words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_in_few_numbers_and_cost_little() {
        for (parameters, dearest) in [(134_000_000, 512), (1_200_000_000, 64), (8_000_000_000, 16)]
        {
            for rows in 1..40_000 {
                let padded = rounded(rows, parameters);
                let more = padded - rows;
                assert!(
                    padded >= rows && more < dearest.min((rows / 16).max(16)),
                    "{rows}: {padded}"
                );
            }
            let mut shapes: Vec<usize> =
                (2500..3500).map(|rows| rounded(rows, parameters)).collect();
            shapes.dedup();
            assert!(
                shapes.len() <= 1000 / dearest.min(128) + 2,
                "{}",
                shapes.len()
            );
        }
        assert_eq!(rounded(0, 1), 0);
    }
}
