//! Rows from files that hold a JSON list or JSON Lines.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use common::jsonl::{Place, Row, rows, rows_of};
use common::program;
use common::run::{self, Input};
use serde_json::value::RawValue;

/// The rows of a file that holds a JSON list of objects (as AlpacaEval writes) or JSON Lines.
pub fn list_or_lines(file: &Path) -> Result<Box<dyn Iterator<Item = Result<Row>>>> {
    let lines = || Box::new(rows(&[file.to_owned()]));
    let open = || format!("cannot open {}", file.display());
    if file == Path::new("-") {
        // What is looked at here stays in the buffer of stdin, which all its readers share.
        let mut stdin = std::io::stdin().lock();
        if stdin.fill_buf()?.trim_ascii_start().first() != Some(&b'[') {
            drop(stdin);
            return Ok(lines());
        }
        return list("stdin", &mut stdin);
    }
    if file.is_dir() {
        // The error of a folder is said there.
        return Ok(lines());
    }
    let mut reader = BufReader::new(File::open(file).with_context(open)?);
    if reader
        .fill_buf()
        .with_context(open)?
        .trim_ascii_start()
        .first()
        != Some(&b'[')
    {
        return Ok(Box::new(rows_of(file, reader)));
    }
    list(&file.display().to_string(), &mut reader)
}

/// The objects of a JSON list, each with the line that it starts on.
fn list(name: &str, reader: &mut impl Read) -> Result<Box<dyn Iterator<Item = Result<Row>>>> {
    program::check()?;
    let mut text = String::new();
    reader
        .read_to_string(&mut text)
        .with_context(|| format!("cannot read {name}"))?;
    run::has_read(Input {
        file: name.to_owned(),
        bytes: text.len() as u64,
        lines: text.lines().count() as u64,
        blake3: blake3::hash(text.as_bytes()).to_string(),
    });
    let items: Vec<&RawValue> =
        serde_json::from_str(&text).map_err(|err| anyhow!("{name}: not JSON: {err}"))?;
    let (mut line, mut counted) = (1, 0);
    let mut found = vec![];
    for item in items {
        let offset = item.get().as_ptr() as usize - text.as_ptr() as usize;
        line += text[counted..offset].matches('\n').count() as u64;
        counted = offset;
        let place = Place {
            file: name.into(),
            line,
        };
        let fields = serde_json::from_str(item.get())
            .map_err(|_| anyhow!("{place}: not a JSON object; the list must hold objects"))?;
        found.push(Ok(Row { fields, place }));
    }
    Ok(Box::new(found.into_iter()))
}
