//! What a judge has answered already, on disk: a killed run asks nothing twice.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::Mutex;

use anyhow::{Context, Result};
use common::files::lock;
use serde::{Deserialize, Serialize};

use super::verdict::Verdict;

/// Answers by the hash of the question. One line per answer; a last line that a kill tore is cut away.
pub struct Journal {
    inner: Mutex<Inner>,
}

struct Inner {
    known: HashMap<String, Verdict>,
    /// `None`: nothing is kept.
    file: Option<Lines>,
}

/// A file of whole lines.
struct Lines {
    file: File,
    bytes: u64,
}

impl Lines {
    /// Writes a line, or, where it does not fit on the disk, nothing of it: the next would go on with a torn one.
    fn push(&mut self, line: &str) -> io::Result<()> {
        let written = self.file.write_all(line.as_bytes());
        match &written {
            Ok(()) => self.bytes += line.len() as u64,
            Err(_) => self.end_at(self.bytes)?,
        }
        written
    }

    fn end_at(&mut self, bytes: u64) -> io::Result<()> {
        self.file.set_len(bytes)?;
        self.file.seek(SeekFrom::Start(bytes))?;
        self.bytes = bytes;
        Ok(())
    }
}

#[derive(Serialize, Deserialize)]
struct Entry {
    question: String,
    #[serde(flatten)]
    verdict: Verdict,
}

impl Journal {
    /// Opens or starts a journal; without a path, one that is forgotten.
    ///
    /// # Errors
    /// A file that cannot be written, that another run holds, or that is no journal.
    pub fn open(path: Option<&Path>) -> Result<Self> {
        let (known, file) = match path {
            None => (HashMap::new(), None),
            Some(path) => {
                let (known, file) = load(path)?;
                (known, Some(file))
            }
        };
        let inner = Mutex::new(Inner { known, file });
        Ok(Self { inner })
    }

    /// The answer that was given to this question before.
    pub fn get(&self, question: &str) -> Option<Verdict> {
        self.lock().known.get(question).cloned()
    }

    /// Keeps an answer. It is on its way to the disk when this returns: a kill of this program does not lose it.
    pub fn put(&self, question: &str, verdict: &Verdict) -> Result<()> {
        let mut inner = self.lock();
        if let Some(file) = &mut inner.file {
            let entry = Entry {
                question: question.to_owned(),
                verdict: verdict.clone(),
            };
            let line = serde_json::to_string(&entry)? + "\n";
            file.push(&line).context("cannot write the journal")?;
        }
        inner.known.insert(question.to_owned(), verdict.clone());
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|e| e.into_inner())
    }
}

fn load(path: &Path) -> Result<(HashMap<String, Verdict>, Lines)> {
    let context = || format!("--journal {}", path.display());
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .with_context(context)?;
    lock(&file, path)?;
    let mut known = HashMap::new();
    let mut whole = 0;
    let mut reader = BufReader::new(&file);
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = reader.read_until(b'\n', &mut line).with_context(context)?;
        if read == 0 || line.last() != Some(&b'\n') {
            break;
        }
        let entry: Entry = serde_json::from_slice(&line)
            .with_context(|| format!("{}: not a journal of dice-eval judge", path.display()))?;
        known.insert(entry.question, entry.verdict);
        whole += read as u64;
    }
    let mut lines = Lines { file, bytes: whole };
    lines.end_at(whole).with_context(context)?;
    Ok((known, lines))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(first: Option<f64>) -> Verdict {
        Verdict {
            first,
            from: "text".into(),
        }
    }

    #[test]
    fn answers_outlive_the_run_and_torn_ones_do_not_count() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("j");
        let journal = Journal::open(Some(&path)).unwrap();
        journal.put("a", &verdict(Some(0.25))).unwrap();
        journal.put("b", &verdict(None)).unwrap();
        assert!(Journal::open(Some(&path)).is_err(), "locked");
        drop(journal);
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, &text[..text.len() - 3]).unwrap();

        let journal = Journal::open(Some(&path)).unwrap();
        assert_eq!(journal.get("a"), Some(verdict(Some(0.25))));
        assert_eq!(journal.get("b"), None);
        journal.put("b", &verdict(Some(1.0))).unwrap();
        drop(journal);
        let journal = Journal::open(Some(&path)).unwrap();
        assert_eq!(journal.get("b"), Some(verdict(Some(1.0))));
        assert_eq!(Journal::open(None).unwrap().get("a"), None);

        let other = dir.path().join("o");
        std::fs::write(&other, "{\"rows\":1}\n").unwrap();
        assert!(Journal::open(Some(&other)).is_err());
    }
}
