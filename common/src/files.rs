//! Files and folders that appear whole or not at all: made beside their place, synced, then renamed.

use std::ffi::OsString;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// Where the work on `path` happens until it is whole: `path.part`, in the same folder.
pub fn part_path(path: &Path) -> PathBuf {
    // `next/` is the folder `next`; its components leave the slash out.
    let mut name = OsString::from(path.components().as_path());
    name.push(".part");
    PathBuf::from(name)
}

/// Whether a path is neither file nor folder: a device or a named pipe, which is written to as it is, and never replaced.
pub fn is_stream(path: &Path) -> bool {
    path.metadata()
        .is_ok_and(|meta| !meta.is_file() && !meta.is_dir())
}

/// Makes a file or folder by calling `write` with a path beside it, then publishes what it wrote.
/// An existing file is replaced in one step, by way of a link to it, too; an existing folder is an error. A leftover `.part`
/// is thrown away.
pub fn write_aside(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    if is_stream(path) {
        return write(path);
    }
    let linked = path
        .is_symlink()
        .then(|| path.canonicalize().ok())
        .flatten();
    let path = linked.as_deref().unwrap_or(path);
    let part = part_path(path);
    if path.is_dir() {
        bail!("{} is already there: move it away first", path.display());
    }
    remove(&part)?;
    write(&part)?;
    publish(&part, path)
}

/// Gives finished work its name: syncs every file of `part` (a file, or a folder and all below it) to disk,
/// renames it to `path` and syncs the folder around it, so that a power cut leaves all of it or none.
pub fn publish(part: &Path, path: &Path) -> Result<()> {
    sync_tree(part).with_context(|| format!("cannot sync {}", part.display()))?;
    fs::rename(part, path)
        .with_context(|| format!("cannot rename {} to {}", part.display(), path.display()))?;
    let parent = parent(path);
    File::open(parent)
        .and_then(|folder| folder.sync_all())
        .with_context(|| format!("cannot sync the folder {}", parent.display()))
}

/// Locks an open file or folder, until it is closed, for this program alone.
///
/// # Errors
/// Another program has it.
pub fn lock(file: &File, path: &Path) -> Result<()> {
    // Where the file system has no locks, there is none to respect.
    if let Err(TryLockError::WouldBlock) = file.try_lock() {
        bail!("{} is being written by another program", path.display());
    }
    Ok(())
}

/// To be asked once the `.part` of a path that was not there is locked: who had the lock before may have finished since.
///
/// # Errors
/// The path is there.
pub fn still_missing(path: &Path) -> Result<()> {
    if path.exists() {
        bail!(
            "{} has just been written by another program",
            path.display()
        );
    }
    Ok(())
}

/// The right to work in the `.part` of a folder, which no other program has at the same time.
pub struct Claim {
    folder: PathBuf,
    _lock: File,
}

impl Claim {
    /// Makes `path.part` where it is not there, and locks it.
    ///
    /// # Errors
    /// It cannot be made, or another program works in it, or has just finished.
    pub fn new(path: &Path) -> Result<Self> {
        let folder = part_path(path);
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let open =
            File::open(&folder).with_context(|| format!("cannot open {}", folder.display()))?;
        lock(&open, &folder)?;
        let claim = Self {
            folder,
            _lock: open,
        };
        still_missing(path)?;
        Ok(claim)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // Succeeds where it is empty: there is no work to keep.
        drop(fs::remove_dir(&self.folder));
    }
}

/// Whether a file or folder holds anything.
pub fn holds_work(part: &Path) -> bool {
    match fs::read_dir(part) {
        Ok(mut entries) => entries.next().is_some(),
        Err(_) => part.metadata().is_ok_and(|meta| meta.len() > 0),
    }
}

/// The folder that `path` lies in; `.` for a bare name.
pub fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn sync_tree(path: &Path) -> std::io::Result<()> {
    if path.is_dir() {
        for entry in fs::read_dir(path)? {
            sync_tree(&entry?.path())?;
        }
    }
    File::open(path)?.sync_all()
}

fn remove(path: &Path) -> Result<()> {
    let result = match path.symlink_metadata() {
        Err(_) => return Ok(()),
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
    };
    result.with_context(|| format!("cannot remove the leftover {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_or_folder_appears_only_when_its_writer_succeeds() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("stats.json");
        let failed = write_aside(&file, |part| {
            fs::write(part, "half")?;
            bail!("disk on fire")
        });
        assert!(failed.is_err() && !file.exists());

        write_aside(&file, |part| Ok(fs::write(part, "one")?)).unwrap();
        write_aside(&file, |part| Ok(fs::write(part, "two")?)).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "two");

        let folder = dir.path().join("model");
        let make = |part: &Path| {
            fs::create_dir_all(part.join("sub"))?;
            Ok(fs::write(part.join("sub/a"), "a")?)
        };
        write_aside(&folder, make).unwrap();
        assert_eq!(fs::read_to_string(folder.join("sub/a")).unwrap(), "a");
        let again = write_aside(&folder, make).unwrap_err();
        assert!(again.to_string().contains("already there"), "{again:#}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "no leftovers");
    }

    #[test]
    fn what_is_no_file_is_written_to_and_links_stay() {
        let dir = tempfile::tempdir().unwrap();
        assert!(is_stream(Path::new("/dev/null")) && !is_stream(dir.path()));
        write_aside(Path::new("/dev/null"), |null| Ok(fs::write(null, "one")?)).unwrap();
        assert!(is_stream(Path::new("/dev/null")));
        let (file, link) = (dir.path().join("file"), dir.path().join("link"));
        fs::write(&file, "old").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        write_aside(&link, |part| Ok(fs::write(part, "new")?)).unwrap();
        assert!(link.is_symlink());
        assert_eq!(fs::read_to_string(&file).unwrap(), "new");
    }

    #[test]
    fn a_folder_has_one_worker_and_goes_if_it_did_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (path, part) = (dir.path().join("next"), dir.path().join("next.part"));
        let claim = Claim::new(&path).unwrap();
        let second = Claim::new(&path).err().unwrap().to_string();
        assert!(
            second.ends_with("next.part is being written by another program"),
            "{second}"
        );
        drop(claim);
        assert!(!part.exists());
        let claim = Claim::new(&path).unwrap();
        fs::write(part.join("a"), "a").unwrap();
        drop(claim);
        assert!(holds_work(&part) && holds_work(&part.join("a")));
        fs::rename(&part, &path).unwrap();
        let late = Claim::new(&path).err().unwrap().to_string();
        assert!(late.ends_with("next has just been written by another program"));
        assert!(!part.exists());
        assert!(!holds_work(&dir.path().join("gone")));
    }

    #[test]
    fn parts_lie_beside_their_place() {
        assert_eq!(
            part_path(Path::new("a/b.jsonl")),
            Path::new("a/b.jsonl.part")
        );
        assert_eq!(part_path(Path::new("a/next/")), Path::new("a/next.part"));
        assert_eq!(parent(Path::new("b")), Path::new("."));
        assert_eq!(parent(Path::new("a/b")), Path::new("a"));
    }
}
