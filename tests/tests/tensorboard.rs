//! `dice-train --log-dir`: a run that was killed and resumed is one curve to TensorBoard, each step once. Read by a decoder
//! of our own, and by TensorBoard's where the Python of `DICE_PYTHON` has it.

use dice_tests::{Fields, Tiny, Tool, lines, number, text};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Command;

const STEPS: u64 = 15;

/// Trains to the end after a kill behind step 6, where step 4 is the last that was saved (or 8, if the kill came late).
fn train(folder: &Path) -> Vec<Fields> {
    Tiny::default().write(&folder.join("pi"), 1);
    let pairs: Vec<_> = (0..2 * STEPS)
        .map(|i| json!({"prompt": format!("Say {i}"), "chosen": "yes, gladly", "rejected": "no"}))
        .collect();
    let path = |name: &str| text(&folder.join(name));
    let tool = || {
        let places = [
            ["--model".to_owned(), path("pi")],
            ["--output".to_owned(), path("next")],
            ["--log-dir".to_owned(), path("logs/run")],
        ];
        let settings = "--resume --learning-rate 1e-3 --batch-size 2 --save-steps 4".split(' ');
        Tool::new("dice-train", places.concat())
            .args(settings)
            .stdin(lines(&pairs))
    };
    let mut killed = tool().start();
    let mut rows = BufReader::new(killed.stdout.take().unwrap()).lines();
    rows.nth(5).unwrap().unwrap();
    killed.kill().unwrap();
    killed.wait().unwrap();
    tool().run().ok().rows()
}

/// What a curve of every figure of the steps must be: tag → (step, value).
fn expected(rows: &[Fields]) -> BTreeMap<String, Vec<(u64, f64)>> {
    let names = rows[0].keys().filter(|name| *name != "step");
    names
        .map(|name| {
            let point = |row: &Fields| (number(row, "step") as u64, number(row, name));
            (format!("train/{name}"), rows.iter().map(point).collect())
        })
        .collect()
}

/// CRC-32C by its definition, bit by bit.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0x82f6_3b78 * (crc & 1))
        })
    })
}

/// Takes a TFRecord off, whose checksums must be right.
fn record<'a>(bytes: &mut &'a [u8]) -> &'a [u8] {
    let mut take = |n: usize| {
        let (taken, rest) = bytes.split_at(n);
        *bytes = rest;
        taken
    };
    let mut checked = |n: usize| {
        let data = take(n);
        let crc = crc32c(data);
        let masked = crc.rotate_right(15).wrapping_add(0xa282_ead8);
        assert_eq!(take(4), masked.to_le_bytes(), "a checksum is wrong");
        data
    };
    let length = u64::from_le_bytes(checked(8).try_into().unwrap());
    checked(length as usize)
}

/// The fields of a protobuf message: number → its values, a varint as eight bytes.
fn fields(mut bytes: &[u8]) -> BTreeMap<u64, Vec<Vec<u8>>> {
    fn varint(bytes: &mut &[u8]) -> u64 {
        let end = bytes.iter().position(|byte| byte & 0x80 == 0).unwrap();
        let (taken, rest) = bytes.split_at(end + 1);
        *bytes = rest;
        let digits = taken.iter().rev();
        digits.fold(0, |value, byte| value << 7 | u64::from(byte & 0x7f))
    }
    let mut found = BTreeMap::<_, Vec<_>>::new();
    while !bytes.is_empty() {
        let key = varint(&mut bytes);
        let length = match key & 7 {
            0 => {
                let value = varint(&mut bytes).to_le_bytes().to_vec();
                found.entry(key >> 3).or_default().push(value);
                continue;
            }
            1 => 8,
            2 => varint(&mut bytes) as usize,
            5 => 4,
            other => panic!("wire type {other}"),
        };
        let (value, rest) = bytes.split_at(length);
        bytes = rest;
        found.entry(key >> 3).or_default().push(value.to_vec());
    }
    found
}

/// The curves of a folder's event files, as TensorBoard makes them: a start voids what earlier files have from its step on.
fn curves(folder: &Path) -> BTreeMap<String, Vec<(u64, f64)>> {
    let mut files: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    assert_eq!(files.len(), 2, "one for each run: {files:?}");
    let mut curves = BTreeMap::<String, Vec<_>>::new();
    for file in files {
        let bytes = fs::read(file).unwrap();
        let mut rest = &bytes[..];
        let first = fields(record(&mut rest));
        assert_eq!(first[&3], [b"brain.Event:2"]);
        while !rest.is_empty() {
            let event = fields(record(&mut rest));
            let step = u64::from_le_bytes(event[&2][0][..].try_into().unwrap());
            if let Some(session) = event.get(&7) {
                assert_eq!(fields(&session[0])[&1], [1_u64.to_le_bytes()]);
                curves
                    .values_mut()
                    .for_each(|curve| curve.retain(|(old, _)| *old < step));
            }
            let summary = event.get(&5).map(|summary| fields(&summary[0]));
            for value in summary.iter().flat_map(|summary| &summary[&1]) {
                let value = fields(value);
                let tag = String::from_utf8(value[&1][0].clone()).unwrap();
                let number = f32::from_le_bytes(value[&2][0][..].try_into().unwrap());
                curves.entry(tag).or_default().push((step, number.into()));
            }
        }
    }
    curves
}

fn check(got: &BTreeMap<String, Vec<(u64, f64)>>, rows: &[Fields]) {
    let expected = expected(rows);
    assert_eq!(expected["train/loss"].len() as u64, STEPS);
    assert!(got.keys().eq(expected.keys()), "{:?}", got.keys());
    for (tag, curve) in expected {
        assert_eq!(got[&tag].len(), curve.len(), "{tag}");
        for (got, expected) in got[&tag].iter().zip(curve) {
            assert_eq!(got.0, expected.0, "{tag}");
            // They are kept in float32.
            assert_eq!(got.1 as f32, expected.1 as f32, "{tag}");
        }
    }
}

#[test]
fn a_resumed_run_is_one_curve() {
    let folder = tempfile::tempdir().unwrap();
    let rows = train(folder.path());
    check(&curves(&folder.path().join("logs/run")), &rows);

    let script = "
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1]).Reload()
print(json.dumps({tag: [[e.step, e.value] for e in events.Scalars(tag)] for tag in events.Tags()['scalars']}))";
    let python = std::env::var("DICE_PYTHON").unwrap_or("python3".into());
    let there = Command::new(&python)
        .args(["-c", "import tensorboard"])
        .output();
    if !there.is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: DICE_PYTHON names no Python that has tensorboard");
        return;
    }
    let mut command = Command::new(python);
    command.args(["-c", script, &text(&folder.path().join("logs/run"))]);
    let out = Tool::of("python", command).run().ok().stdout;
    let got: Map<String, Value> = serde_json::from_str(&out).unwrap();
    let points = |curve: &Value| serde_json::from_value(curve.clone()).unwrap();
    let got = got.iter().map(|(tag, curve)| (tag.clone(), points(curve)));
    check(&got.collect(), &rows);
}
