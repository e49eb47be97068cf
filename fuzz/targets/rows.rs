//! The row reader, and the fields of rows: any bytes are rows up to the first bad line, then one error.
#![no_main]

use common::jsonl::{groups, rows};
use dice_fuzz::{fill, folder};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    fill(input, &["rows.jsonl"]);
    let file = [folder().join("rows.jsonl")];
    for row in rows(&file) {
        let Ok(row) = row else { continue };
        for field in ["response", "chosen", "model"] {
            drop(row.opt_string(field));
        }
        for field in ["reward", "logp"] {
            assert!(row.opt_number(field).is_ok_and(|n| n.is_none_or(f64::is_finite)) || row.opt_number(field).is_err());
        }
        drop(row.opt_ids("token_ids"));
        drop(row.finish_reason("finish_reason"));
        if let Ok(prompt) = row.prompt() {
            assert!(!prompt.messages().is_empty());
            assert_eq!(prompt.derived_id().len(), 16);
        }
    }
    for group in groups(rows(&file), 4).flatten() {
        assert!((1..=4).contains(&group.len()));
    }
});
