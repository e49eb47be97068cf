//! Event files for TensorBoard (`--log-dir`): TFRecord frames around `Event` messages of TensorFlow's `event.proto`, of which
//! four fields are all that scalars need.

use anyhow::{Context, Result};
use common::dpo::StepMetrics;
use serde_json::Value;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// An event file that grows.
pub struct EventFile {
    file: File,
    path: PathBuf,
}

impl EventFile {
    /// A new file in a folder, which may hold those of earlier runs: what they have from `first_step` on is void to
    /// TensorBoard, as it was computed again.
    ///
    /// # Errors
    /// The folder or the file cannot be made.
    pub fn create(folder: &Path, first_step: u64) -> Result<Self> {
        let cannot = || format!("--log-dir: cannot write to {}", folder.display());
        fs::create_dir_all(folder).with_context(cannot)?;
        // TensorBoard reads the files of a folder in the order of their names.
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
        let (seconds, nanoseconds) = (now.as_secs(), now.subsec_nanos());
        let name = format!("events.out.tfevents.{seconds:010}.{nanoseconds:09}.dice-train");
        let path = folder.join(name);
        let file = File::create_new(&path).with_context(cannot)?;
        let mut events = Self { file, path };
        events.write(0, &delimited(3, b"brain.Event:2"))?;
        // SessionLog { status: START }
        events.write(first_step, &delimited(7, &[1 << 3, 1]))?;
        Ok(events)
    }

    /// Adds a step's figures, under the names that transformers' logs have: `train/loss`, `train/rewards/chosen`, …
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn step(&mut self, metrics: &StepMetrics) -> Result<()> {
        let Value::Object(fields) = serde_json::to_value(metrics)? else {
            unreachable!("a struct is an object")
        };
        let figures = fields.iter().filter(|(name, _)| *name != "step");
        let summary: Vec<u8> = figures
            .filter_map(|(name, value)| Some(scalar(&format!("train/{name}"), value.as_f64()?)))
            .flatten()
            .collect();
        self.write(metrics.step, &delimited(5, &summary))
    }

    /// Writes an `Event` of now with one more field.
    fn write(&mut self, step: u64, field: &[u8]) -> Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64();
        let mut event = vec![1 << 3 | FIXED_64];
        event.extend(now.to_le_bytes());
        event.push(2 << 3);
        event.extend(varint(step));
        event.extend(field);
        // One call: a reader finds whole records, or a torn one at the end, for which it waits.
        self.file
            .write_all(&record(&event))
            .with_context(|| format!("cannot write {}", self.path.display()))
    }
}

/// Protobuf's wire types; that of a varint is 0.
const FIXED_64: u8 = 1;
const DELIMITED: u8 = 2;
const FIXED_32: u8 = 5;

/// `Summary.value` of a tag and its `simple_value`.
fn scalar(tag: &str, value: f64) -> Vec<u8> {
    let mut message = delimited(1, tag.as_bytes());
    message.push(2 << 3 | FIXED_32);
    message.extend((value as f32).to_le_bytes());
    delimited(1, &message)
}

/// A field of bytes, text or a message.
fn delimited(field: u8, bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![field << 3 | DELIMITED];
    out.extend(varint(bytes.len() as u64));
    out.extend(bytes);
    out
}

/// Seven bits a byte, the lowest first.
fn varint(mut value: u64) -> Vec<u8> {
    let mut out = vec![];
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
    out
}

/// A TFRecord: the length, its checksum, the bytes, their checksum.
fn record(bytes: &[u8]) -> Vec<u8> {
    let length = (bytes.len() as u64).to_le_bytes();
    let checksum = |bytes| masked_crc(bytes).to_le_bytes();
    [&length[..], &checksum(&length), bytes, &checksum(bytes)].concat()
}

/// CRC-32C, rotated and shifted, as TFRecord has it.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes)
        .rotate_right(15)
        .wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_records_and_checksums_are_those_of_the_formats() {
        assert_eq!(varint(0), [0]);
        assert_eq!(varint(127), [127]);
        assert_eq!(varint(300), [0xac, 0x02]);
        assert_eq!(varint(u64::MAX).len(), 10);
        // RFC 3720, B.4: 32 zero bytes.
        let crc = 0x8a91_36aa_u32;
        assert_eq!(crc32c::crc32c(&[0; 32]), crc);
        let masked = crc.rotate_right(15).wrapping_add(0xa282_ead8);
        assert_eq!(masked_crc(&[0; 32]), masked);
        let record = record(&[0; 32]);
        assert_eq!(record.len(), 8 + 4 + 32 + 4);
        assert_eq!(record[..8], [32, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(record[44..], masked.to_le_bytes());
    }
}
