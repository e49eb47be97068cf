//! Where the texts of samples and pairs wait until it is known which are wanted: a nameless temporary file, so that
//! memory holds numbers and places only. A few megabytes are kept in memory instead.

use std::cell::RefCell;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::rc::Rc;

use anyhow::{Context, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tempfile::{SpooledTempFile, spooled_tempfile, spooled_tempfile_in};

/// Texts up to this are not worth a file.
const IN_MEMORY: usize = 8 << 20;
/// What is written at a time.
const CHUNK: usize = 1 << 20;

/// A place for values; its clones are the same place.
#[derive(Clone)]
pub struct Spool(Rc<RefCell<Store>>);

struct Store {
    file: SpooledTempFile,
    /// How much the file holds; what was put after that waits here.
    written: u64,
    waiting: Vec<u8>,
}

/// A value that was put away.
#[derive(Clone)]
pub struct Kept {
    spool: Spool,
    at: u64,
    bytes: u32,
}

impl Spool {
    /// An empty one, whose file is made in a folder, or where the system has its temporary files.
    pub fn new(folder: Option<&Path>) -> Self {
        let file = match folder {
            Some(folder) => spooled_tempfile_in(IN_MEMORY, folder),
            None => spooled_tempfile(IN_MEMORY),
        };
        Self(Rc::new(RefCell::new(Store {
            file,
            written: 0,
            waiting: vec![],
        })))
    }

    /// Puts a value away.
    ///
    /// # Errors
    /// The temporary file cannot be written.
    pub fn put(&self, value: &impl Serialize) -> Result<Kept> {
        let text = serde_json::to_vec(value)?;
        let mut store = self.0.borrow_mut();
        let at = store.written + store.waiting.len() as u64;
        store.waiting.extend_from_slice(&text);
        if store.waiting.len() >= CHUNK {
            store.write().context("cannot write a temporary file")?;
        }
        Ok(Kept {
            spool: self.clone(),
            at,
            bytes: u32::try_from(text.len()).context("a row of more than 4 GB")?,
        })
    }
}

impl Store {
    fn write(&mut self) -> io::Result<()> {
        self.file.seek(SeekFrom::Start(self.written))?;
        self.file.write_all(&self.waiting)?;
        self.written += self.waiting.len() as u64;
        self.waiting.clear();
        Ok(())
    }
}

impl Kept {
    /// The value.
    ///
    /// # Errors
    /// The temporary file cannot be read.
    pub fn get<T: DeserializeOwned>(&self) -> Result<T> {
        let mut store = self.spool.0.borrow_mut();
        let mut text = vec![0; self.bytes as usize];
        match self.at.checked_sub(store.written) {
            Some(at) => text.copy_from_slice(&store.waiting[at as usize..][..self.bytes as usize]),
            None => {
                let file = &mut store.file;
                file.seek(SeekFrom::Start(self.at))
                    .and_then(|_| file.read_exact(&mut text))
                    .context("cannot read a temporary file")?;
            }
        }
        Ok(serde_json::from_slice(&text)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_come_back_from_memory_and_from_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let spool = Spool::new(Some(folder.path()));
        let text = |i: usize| format!("é{i}").repeat(60_000);
        let kept: Vec<Kept> = (0..200).map(|i| spool.put(&text(i)).unwrap()).collect();
        assert!(spool.0.borrow().written > IN_MEMORY as u64);
        for i in [199, 0, 7, 198, 100] {
            assert_eq!(kept[i].get::<String>().unwrap(), text(i));
        }
        let more = spool.put(&1).unwrap();
        assert_eq!(more.get::<u8>().unwrap(), 1);
        assert_eq!(kept[3].get::<String>().unwrap(), text(3));
        assert_eq!(
            std::fs::read_dir(folder.path()).unwrap().count(),
            0,
            "it has no name"
        );
    }
}
