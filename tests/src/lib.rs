//! What the tests share: the built programs, tiny checkpoints, a judge, rows in and out.

mod checkpoint;
mod judge;
mod mount;
mod tool;
pub mod world;

pub use checkpoint::{Family, Tiny, copy_folder, edit_json};
pub use judge::{Act, JudgeServer};
pub use mount::Mount;
pub use tool::{Finished, Tool, bin_folder, pipe};

use serde_json::{Map, Value};
use std::fs;
use std::path::{Path, PathBuf};

/// A row.
pub type Fields = Map<String, Value>;

/// The folder of the workspace.
pub fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("tests/ lies in the workspace")
}

/// A file of `tests/golden`.
pub fn golden(name: &str) -> PathBuf {
    workspace().join("tests/golden").join(name)
}

/// SmolLM2-135M-Instruct: where `DICE_MODEL` points, else `models/SmolLM2-135M-Instruct.gguf`, else none, which is said.
pub fn real_model() -> Option<String> {
    let path = std::env::var_os("DICE_MODEL").map_or_else(
        || workspace().join("models/SmolLM2-135M-Instruct.gguf"),
        PathBuf::from,
    );
    if path.exists() {
        return Some(text(&path));
    }
    eprintln!(
        "skipped: {} is not there; `just model` fetches it",
        path.display()
    );
    None
}

/// A path as a command-line argument.
pub fn text(path: &Path) -> String {
    path.to_str().expect("paths of tests are UTF-8").to_owned()
}

/// JSON Lines as rows.
///
/// # Panics
/// A line is not a JSON object.
pub fn parse_rows(lines: &str) -> Vec<Fields> {
    let row = |line| match serde_json::from_str(line) {
        Ok(row) => row,
        Err(err) => panic!("not a row ({err}): {line}"),
    };
    lines.lines().map(row).collect()
}

/// The rows of a file.
pub fn read_rows(path: &Path) -> Vec<Fields> {
    let lines = fs::read_to_string(path).unwrap_or_else(|err| panic!("{}: {err}", path.display()));
    parse_rows(&lines)
}

/// Rows as JSON Lines.
pub fn lines<'a>(rows: impl IntoIterator<Item = &'a Value>) -> String {
    rows.into_iter().map(|row| row.to_string() + "\n").collect()
}

/// A number of a row.
///
/// # Panics
/// It is not one.
pub fn number(row: &Fields, field: &str) -> f64 {
    let value = row.get(field).and_then(Value::as_f64);
    value.unwrap_or_else(|| panic!("{field} is no number in {}", Value::from(row.clone())))
}

/// The names of a row's fields, in order.
pub fn names(row: &Fields) -> Vec<&str> {
    row.keys().map(String::as_str).collect()
}
