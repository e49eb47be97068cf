//! Small disks to fill, in memory.

use crate::text;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A file system of its own, gone when dropped.
pub struct Mount {
    folder: PathBuf,
}

impl Mount {
    /// Mounts so many KiB at a new folder; none, which is said, where that is not permitted.
    pub fn new(folder: &Path, kib: usize) -> Option<Self> {
        fs::create_dir(folder).unwrap();
        let size = format!("size={kib}k");
        if !mount(&["-t", "tmpfs", "-o", &size, "tmpfs", &text(folder)]) {
            eprintln!("skipped: a small disk cannot be mounted here (run as root)");
            return None;
        }
        Some(Self {
            folder: folder.to_owned(),
        })
    }

    /// Makes it larger.
    pub fn resize(&self, kib: usize) {
        self.remount(&format!("remount,size={kib}k"));
    }

    /// Forbids writing.
    pub fn read_only(&self) {
        self.remount("remount,ro");
    }

    fn remount(&self, options: &str) {
        assert!(mount(&["-o", options, &text(&self.folder)]), "{options}");
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Lazily: a killed program may still have a file open.
        let _ = Command::new("umount").arg("-l").arg(&self.folder).status();
    }
}

fn mount(args: &[&str]) -> bool {
    let done = Command::new("mount").args(args).output();
    done.is_ok_and(|output| output.status.success())
}
