//! Preference pairs: best against worst of a prompt's own samples, and offline pairs mixed back in (replay).

mod choose;
mod replay;
mod spool;

pub use choose::{Chosen, Length, Rules, Samples};
pub use replay::{Mix, Replay, mix};
pub use spool::Spool;

use anyhow::Result;
use serde_json::{Map, Value};
use spool::Kept;

/// A preference pair, ready to be written.
#[derive(Clone)]
pub struct Pair {
    /// See [`crate::records::Prompt::key`].
    pub prompt: blake3::Hash,
    row: Kept,
}

impl Pair {
    fn new(prompt: blake3::Hash, fields: &Map<String, Value>, spool: &Spool) -> Result<Self> {
        let row = spool.put(fields)?;
        Ok(Self { prompt, row })
    }

    /// Its row.
    ///
    /// # Errors
    /// The temporary file cannot be read.
    pub fn fields(&self) -> Result<Map<String, Value>> {
        self.row.get()
    }
}

/// How many were left out, by reason, in order of first appearance.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Skipped(pub Vec<(String, u64)>);

impl Skipped {
    fn add(&mut self, reason: &str, n: u64) {
        match self.0.iter_mut().find(|(known, _)| known == reason) {
            Some((_, count)) => *count += n,
            None => self.0.push((reason.to_owned(), n)),
        }
    }
}
