//! How every tool starts and ends.
//!
//! | exit | meaning |
//! |---|---|
//! | 0 | done; also `--help`, and a reader that closed the pipe (`dice-gen … \| head`) |
//! | 1 | failed; one line on stderr says why |
//! | 2 | wrong usage |
//! | 130, 143 | stopped by SIGINT or SIGTERM, after the row in hand; `--resume` goes on from there |
//!
//! A second signal ends the program at once, with the same code.
//!
//! A program that does not end well ends its output into a pipe with an unfinished line: the next stage, which would
//! else take the rows so far for all there are, fails too, and no checkpoint is made of half the data. One that is killed
//! cannot write that line: see [`crate::pipe`].
//!
//! stderr may be a closed pipe or `/dev/full`: nothing here fails because a message was not heard.

use std::fmt;
use std::io::{self, ErrorKind, Write};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use anyhow::{Context, Result};
use signal_hook::consts::{SIGINT, SIGTERM};

use crate::pipe;

static NAME: OnceLock<String> = OnceLock::new();
/// The first signal's number, 0 before it. `Arc` because signal-hook shares it with its handlers.
static SIGNAL: OnceLock<Arc<AtomicUsize>> = OnceLock::new();

/// Parses the command line, runs the tool and turns its result into the exit code of the table above.
pub fn main<A: clap::Parser + Send>(run: impl FnOnce(A) -> Result<()> + Send) -> ExitCode {
    NAME.get_or_init(|| A::command().get_name().to_owned());
    pipe::begin();
    let args = match A::try_parse() {
        Ok(args) => args,
        Err(usage) => {
            // Printing fails when nobody reads (`--help | true`): that changes nothing.
            let _ = usage.print();
            let code = u8::try_from(usage.exit_code()).unwrap_or(2);
            end_pipe(code == 0);
            return ExitCode::from(code);
        }
    };
    let result = catch_signals()
        .and_then(|()| pool())
        .and_then(|pool| pool.install(|| run(args)));
    let (code, line) = ending(&result);
    if let Some(line) = line {
        say(line);
    }
    end_pipe(code == 0);
    ExitCode::from(code)
}

/// Lets the reader of a pipe know that all rows are there, or that they are not, by an unfinished line: that one
/// reaches a reader behind `jq` or `tee` too. (A file is better off with its whole rows.)
fn end_pipe(whole: bool) {
    if whole {
        pipe::end();
    } else if pipe::is_stdout() {
        let mut stdout = io::stdout().lock();
        // Nobody may be reading any more.
        let _ = write!(stdout, "{{\"{} failed, rows are missing here", name())
            .and_then(|()| stdout.flush());
    }
}

/// The tool's name.
pub fn name() -> &'static str {
    NAME.get().map_or("dice", String::as_str)
}

/// One line on stderr, after the tool's name. For warnings and notes; never fails.
pub fn say(line: impl fmt::Display) {
    // In one piece, since the tools of a pipe share stderr. (`eprintln!` would panic where it is closed, too.)
    let line = format!("{}: {line}\n", name());
    let _ = io::stderr().write_all(line.as_bytes());
}

/// A signal asked the tool to stop. [`main`] exits with 128 + its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interrupted {
    signal: usize,
}

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = if self.signal == SIGTERM as usize {
            "SIGTERM"
        } else {
            "SIGINT"
        };
        write!(f, "stopped by {name}")
    }
}

impl std::error::Error for Interrupted {}

/// `Err(Interrupted)` once SIGINT or SIGTERM has come: `program::check()?` between two whole units of work.
pub fn check() -> Result<(), Interrupted> {
    match SIGNAL.get().map_or(0, |s| s.load(Ordering::Relaxed)) {
        0 => Ok(()),
        signal => Err(Interrupted { signal }),
    }
}

fn catch_signals() -> Result<()> {
    let first = SIGNAL.get_or_init(Default::default);
    let again = Arc::new(AtomicBool::new(false));
    for number in [SIGINT, SIGTERM] {
        // Registered first, so that it sees the flag as it was before this signal.
        signal_hook::flag::register_conditional_shutdown(number, 128 + number, again.clone())
            .and_then(|_| signal_hook::flag::register(number, again.clone()))
            .and_then(|_| signal_hook::flag::register_usize(number, first.clone(), number as usize))
            .context("cannot catch signals")?;
    }
    Ok(())
}

/// The threads that everything runs on, the tool itself among them: handing a loop from a thread outside to the pool
/// costs two context switches, and a decoding step has hundreds of loops.
fn pool() -> Result<rayon::ThreadPool> {
    const MAIN_THREADS_STACK: usize = 8 << 20;
    rayon::ThreadPoolBuilder::new()
        .stack_size(MAIN_THREADS_STACK)
        .build()
        .context("cannot start threads")
}

/// The exit code of a result, and the line to say.
fn ending(result: &Result<()>) -> (u8, Option<String>) {
    let Err(err) = result else { return (0, None) };
    if let Some(stop) = err.chain().find_map(|c| c.downcast_ref::<Interrupted>()) {
        (128 + stop.signal as u8, Some(one_line(err)))
    } else if is_closed_pipe(err) {
        (0, None)
    } else {
        (1, Some(one_line(err)))
    }
}

/// Whether an error is that nobody reads stdout any more.
pub fn is_closed_pipe(err: &anyhow::Error) -> bool {
    err.chain().any(|cause| {
        cause
            .downcast_ref::<io::Error>()
            .is_some_and(|io| io.kind() == ErrorKind::BrokenPipe)
    })
}

/// The chain of causes on one line, whatever line breaks the causes hold.
pub(crate) fn one_line(err: &anyhow::Error) -> String {
    let text = format!("{err:#}");
    text.split(['\n', '\r'])
        .map(str::trim)
        .filter(|part| !part.is_empty())
        .collect::<Vec<_>>()
        .join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::anyhow;

    #[test]
    fn errors_end_with_one_line_and_code_1() {
        let err = anyhow!("bad\n  value").context("rows.jsonl:3");
        assert_eq!(
            ending(&Err(err)),
            (1, Some("rows.jsonl:3: bad value".into()))
        );
        assert_eq!(ending(&Ok(())), (0, None));
    }

    #[test]
    fn a_closed_pipe_is_success_wherever_it_sits_in_the_chain() {
        let err = anyhow::Error::new(io::Error::from(ErrorKind::BrokenPipe))
            .context("cannot write")
            .context("group 7");
        assert_eq!(ending(&Err(err)), (0, None));
        let full = anyhow::Error::new(io::Error::from(ErrorKind::StorageFull));
        assert_eq!(ending(&Err(full)).0, 1);
    }

    #[test]
    fn signals_end_with_128_plus_their_number() {
        for (signal, code, name) in [(2, 130, "SIGINT"), (15, 143, "SIGTERM")] {
            let err = anyhow::Error::new(Interrupted { signal }).context("prompt 4");
            let (got, line) = ending(&Err(err));
            assert_eq!(got, code);
            assert_eq!(line.unwrap(), format!("prompt 4: stopped by {name}"));
        }
    }

    #[test]
    fn no_signal_no_interruption() {
        assert!(check().is_ok());
    }
}
