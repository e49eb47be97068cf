//! A read-only memory map of a model's file, with its path for error lines.

use anyhow::{Context, Result};
use memmap2::Mmap;
use std::fs::File;
use std::path::{Path, PathBuf};

/// A mapped file.
pub struct Mapped {
    /// As it was opened.
    pub path: PathBuf,
    /// Its content.
    pub bytes: Mmap,
}

impl Mapped {
    /// Maps a file.
    pub fn open(path: &Path) -> Result<Self> {
        let at = || path.display().to_string();
        let file = File::open(path).with_context(at)?;
        // SAFETY: the map is only read. A file that another process cuts short while it is mapped
        // ends this process with SIGBUS, the usual bargain of every mapped-weights loader.
        let bytes = unsafe { Mmap::map(&file) }.with_context(at)?;
        Ok(Self {
            path: path.to_owned(),
            bytes,
        })
    }
}
