//! What the targets share: a folder in memory whose files an input fills, and panics that are told from caught ones.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Between the files of one input.
const SEPARATOR: &[u8] = b"\x1e\x1e";

/// The one folder of this process, in memory where the system has such a place.
pub fn folder() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        // libfuzzer-sys would end the process at a panic that our code catches; one that escapes ends it all the same.
        drop(std::panic::take_hook());
        let memory = Path::new("/dev/shm");
        let folder = match memory.is_dir() {
            true => tempfile::tempdir_in(memory),
            false => tempfile::tempdir(),
        };
        folder.expect("a temporary folder").keep()
    })
}

/// Writes the parts of an input as the named files; a missing part is a missing file. What is left of the input is the
/// last part.
pub fn fill(input: &[u8], names: &[&str]) -> Vec<u8> {
    let mut rest = Some(input);
    for name in names {
        let path = folder().join(name);
        match rest {
            Some(bytes) => {
                let (part, more) = split(bytes);
                fs::write(path, part).expect("the folder takes files");
                rest = more;
            }
            None => drop(fs::remove_file(path)),
        }
    }
    rest.unwrap_or_default().to_vec()
}

fn split(bytes: &[u8]) -> (&[u8], Option<&[u8]>) {
    match bytes.windows(SEPARATOR.len()).position(|at| at == SEPARATOR) {
        Some(at) => (&bytes[..at], Some(&bytes[at + SEPARATOR.len()..])),
        None => (bytes, None),
    }
}
