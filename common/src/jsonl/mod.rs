//! Rows in and out as JSON Lines: one object a line, UTF-8, unknown fields kept in their order.
//!
//! Built on the `jsonl` crate; what is added is what a pipeline needs: errors that name file, line and field,
//! blank lines, bounds, flushing, outputs that appear whole or not at all, and going on after a kill.

mod output;
mod patient;
mod read;
mod row;

pub use output::{Done, Opened, Output};
pub use patient::Patient;
pub use read::{MAX_LINE_BYTES, Rows, ahead, groups, rows, rows_of};
pub use row::{FinishReason, Place, Row};

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::{Map, Value};

/// The arguments that every tool shares; `#[command(flatten)]` them.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct Files {
    /// Files of rows (JSON Lines), read one after the other; `-` or none reads stdin
    #[arg(value_name = "FILE")]
    pub files: Vec<PathBuf>,

    #[command(flatten)]
    pub to: To,
}

/// Where rows go, and whether an earlier run's work is taken up.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct To {
    /// Write rows to FILE instead of stdout; FILE appears only when whole (until then: FILE.part)
    #[arg(long, short, value_name = "FILE")]
    pub output: Option<PathBuf>,

    /// Go on after the last whole row of an interrupted run's FILE.part; nothing to do where FILE exists. FILE.run.json
    /// says what made it: other settings or another model are refused
    #[arg(long, requires = "output")]
    pub resume: bool,
}

impl Files {
    /// The files that are read, in their order.
    pub fn inputs(&self) -> Vec<&Path> {
        self.files.iter().map(PathBuf::as_path).collect()
    }

    /// The input rows, streamed.
    pub fn rows(&self) -> Rows {
        rows(&self.files)
    }

    /// Opens the output; see [`Output::open`].
    pub fn open(&self, settings: Map<String, Value>) -> Result<Opened> {
        self.to.open(settings)
    }
}

impl To {
    /// Opens the output; see [`Output::open`].
    pub fn open(&self, settings: Map<String, Value>) -> Result<Opened> {
        Output::open(self.output.as_deref(), self.resume, settings)
    }
}
