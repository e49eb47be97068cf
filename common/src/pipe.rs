//! How a tool tells the next one in a pipe that its rows are all there.
//!
//! A reader cannot tell a killed writer from one that is done: both are the end of the input. So our tools put a mark on
//! the pipe itself, not into it: the sticky bit of its mode, which no program looks at and no row shows. It is set when a
//! tool starts and taken away when it ends well; a reader that finds it at the end of its input knows that rows are
//! missing. Programs that know nothing of it (`jq`, `head`, a shell) neither see nor disturb it, and a pipe that they
//! write to has none, so that their rows count as whole, as ever.

use std::fs::{File, Permissions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::sync::atomic::{AtomicBool, Ordering};

/// The sticky bit.
const UNFINISHED: u32 = 0o1000;

/// Whether the mark on stdout is ours to take away.
static MARKED: AtomicBool = AtomicBool::new(false);

/// Marks stdout, if it is a pipe, as not yet whole. One that is marked already stays so: whoever wrote to it before
/// (`{ dice-gen a; dice-gen b; } | …`) did not end well.
pub fn begin() {
    if let Some((pipe, mode)) = stdout()
        && mode & UNFINISHED == 0
    {
        // Where a system does not let pipes be marked, there is no mark.
        let set = pipe.set_permissions(Permissions::from_mode(mode | UNFINISHED));
        MARKED.store(set.is_ok(), Ordering::Relaxed);
    }
}

/// Takes the mark of [`begin`] away: all rows are written.
pub fn end() {
    if MARKED.swap(false, Ordering::Relaxed)
        && let Some((pipe, mode)) = stdout()
    {
        drop(pipe.set_permissions(Permissions::from_mode(mode & !UNFINISHED)));
    }
}

/// Whether stdout is a pipe.
pub fn is_stdout() -> bool {
    stdout().is_some()
}

/// Whether `input`, read to its end, is a pipe whose writer did not finish.
pub fn is_unfinished(input: &File) -> bool {
    mode(input).is_some_and(|mode| mode & UNFINISHED != 0)
}

fn stdout() -> Option<(File, u32)> {
    let file = File::from(io::stdout().as_fd().try_clone_to_owned().ok()?);
    let mode = mode(&file)?;
    Some((file, mode))
}

/// The mode of a pipe; none if it is something else.
fn mode(file: &File) -> Option<u32> {
    let meta = file.metadata().ok()?;
    let is_pipe = meta.file_type().is_fifo();
    is_pipe.then(|| meta.permissions().mode() & 0o7777)
}
