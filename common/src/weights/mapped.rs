//! A read-only memory map of a weights file, with its path for error lines.

use anyhow::{Context, Result};
use memmap2::Mmap;
use std::fs::File;
use std::path::{Path, PathBuf};

pub(super) struct Mapped {
    pub(super) path: PathBuf,
    pub(super) bytes: Mmap,
}

impl Mapped {
    pub(super) fn open(path: &Path) -> Result<Self> {
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
