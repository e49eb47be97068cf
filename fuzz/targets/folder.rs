//! A model folder: config.json, model.safetensors, the index of shards, and an adapter's two files.
#![no_main]

use common::weights::Weights;
use dice_fuzz::{fill, folder};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    fill(
        input,
        &["config.json", "model.safetensors", "model.safetensors.index.json"],
    );
    if let Ok(weights) = Weights::open(folder().to_str().expect("a plain path")) {
        drop(weights.fingerprint());
    }
});
