//! Runs the built programs and shell pipes of them.

use crate::{Fields, parse_rows, workspace};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};

/// The folder of the built programs: of the target folder that this test lies in, of `CARGO_TARGET_DIR`, or of the
/// workspace. Always the release profile: unoptimised arithmetic is no use.
pub fn bin_folder() -> PathBuf {
    let own = std::env::current_exe().ok();
    // target/PROFILE/deps/TEST
    let own = own.and_then(|exe| exe.ancestors().nth(3).map(PathBuf::from));
    let named = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    [own, named, Some(workspace().join("target"))]
        .into_iter()
        .flatten()
        .map(|target| target.join("release"))
        .find(|release| release.join("dice-gen").is_file())
        .expect("the programs are not built: run `cargo build --release --workspace` first")
}

/// One run of a program, to be.
pub struct Tool {
    name: String,
    command: Command,
    stdin: Vec<u8>,
    stdout: Option<PathBuf>,
}

impl Tool {
    /// A program with its arguments; stdin is empty.
    pub fn new<S: AsRef<OsStr>>(name: &str, args: impl IntoIterator<Item = S>) -> Self {
        let program = bin_folder().join(name);
        assert!(
            program.is_file(),
            "{name} is not built: run `cargo build --release --workspace` first"
        );
        let mut command = Command::new(program);
        command.args(args);
        Self::of(name, command)
    }

    /// Any other command.
    pub fn of(name: &str, command: Command) -> Self {
        Self {
            name: name.to_owned(),
            command,
            stdin: vec![],
            stdout: None,
        }
    }

    /// More arguments.
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.command.args(args);
        self
    }

    /// A variable of its environment.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.command.env(name, value);
        self
    }

    /// What the program reads on stdin.
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = bytes.into();
        self
    }

    /// The file that its stdout goes to.
    pub fn stdout_to(mut self, file: PathBuf) -> Self {
        self.stdout = Some(file);
        self
    }

    /// Starts it. Input is written by a thread, since a program may write before it has read all.
    pub fn start(mut self) -> Child {
        let stdout = match &self.stdout {
            Some(file) => File::create(file).expect("its folder is there").into(),
            None => Stdio::piped(),
        };
        let mut child = self
            .command
            .stdin(Stdio::piped())
            .stdout(stdout)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|err| panic!("cannot start {}: {err}", self.name));
        let mut stdin = child.stdin.take().expect("piped above");
        // A program that fails early leaves its input unread.
        std::thread::spawn(move || drop(stdin.write_all(&self.stdin)));
        child
    }

    /// Runs it to its end; gives its greatest resident memory, too, in KiB.
    // `wait4` below waits for it.
    #[expect(clippy::zombie_processes)]
    pub fn run_measured(self) -> (Finished, u64) {
        let name = self.name.clone();
        let mut child = self.start();
        let read = |pipe: Option<Box<dyn Read + Send>>| {
            std::thread::spawn(move || {
                let mut bytes = vec![];
                pipe.map(|mut pipe| pipe.read_to_end(&mut bytes));
                bytes
            })
        };
        let stdout = read(child.stdout.take().map(|p| Box::new(p) as Box<_>));
        let stderr = read(child.stderr.take().map(|p| Box::new(p) as Box<_>));
        let (mut status, pid) = (0, child.id() as libc::pid_t);
        // SAFETY: all zeros are a value of this struct of integers.
        let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
        // SAFETY: both pointers are to live variables, and nobody else waits for this child.
        let ended = unsafe { libc::wait4(pid, &mut status, 0, &mut usage) };
        assert_eq!(ended, pid, "a started program ends");
        let output = Output {
            status: ExitStatus::from_raw(status),
            stdout: stdout.join().expect("it only reads"),
            stderr: stderr.join().expect("it only reads"),
        };
        (Finished::new(name, output), usage.ru_maxrss as u64)
    }

    /// Runs it to its end.
    pub fn run(self) -> Finished {
        let name = self.name.clone();
        let output = self
            .start()
            .wait_with_output()
            .expect("a started program ends");
        Finished::new(name, output)
    }
}

/// A bash script under `pipefail`, with the programs on its PATH.
pub fn pipe(script: &str) -> Tool {
    let mut command = Command::new("bash");
    let inherited = std::env::var_os("PATH").unwrap_or_default();
    let mut path = vec![bin_folder()];
    path.extend(std::env::split_paths(&inherited));
    command.args(["-euo", "pipefail", "-c", script]).env(
        "PATH",
        std::env::join_paths(path).expect("no colons in target folders"),
    );
    Tool::of("bash", command)
}

/// What a run came to.
#[derive(Debug)]
pub struct Finished {
    name: String,
    /// The exit code; `None` after a signal.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Finished {
    /// What a started program came to.
    pub fn new(name: impl Into<String>, output: Output) -> Self {
        let utf8 = |bytes| String::from_utf8(bytes).expect("programs write UTF-8");
        Self {
            name: name.into(),
            code: output.status.code(),
            stdout: utf8(output.stdout),
            stderr: utf8(output.stderr),
        }
    }

    /// Fails unless it ended well.
    #[track_caller]
    pub fn ok(self) -> Self {
        assert_eq!(self.code, Some(0), "{} failed: {}", self.name, self.stderr);
        self
    }

    /// The rows on stdout.
    #[track_caller]
    pub fn rows(&self) -> Vec<Fields> {
        parse_rows(&self.stdout)
    }

    /// The rows that a failed program wrote before it tore its output.
    #[track_caller]
    pub fn rows_before_failure(&self) -> Vec<Fields> {
        assert_ne!(self.code, Some(0), "{} did not fail", self.name);
        let (rows, torn) = self.stdout.rsplit_once('\n').unwrap_or(("", &self.stdout));
        let text = format!("{{\"{} failed, rows are missing here", self.name);
        assert_eq!(torn, text, "a pipe's reader is told");
        parse_rows(rows)
    }

    /// The one line that says why it failed: exit code 1, and nothing on stderr but this and the tool's known notes.
    #[track_caller]
    pub fn error_line(&self) -> &str {
        assert_eq!(self.code, Some(1), "{}: {}", self.name, self.stderr);
        let note = |line: &str| {
            [
                "computing in ",
                " is kept: --resume",
                "are the same model",
                " done; ",
                "; left out",
            ]
            .iter()
            .any(|note| line.contains(note))
        };
        let errors: Vec<_> = self.stderr.lines().filter(|line| !note(line)).collect();
        let [line] = errors[..] else {
            panic!("{}: not one line of error: {}", self.name, self.stderr)
        };
        assert!(line.starts_with(&format!("{}: ", self.name)), "{line}");
        line
    }

    /// The line of stderr that holds `part`.
    #[track_caller]
    pub fn note(&self, part: &str) -> &str {
        let line = self.stderr.lines().find(|line| line.contains(part));
        line.unwrap_or_else(|| panic!("{}: nothing says {part:?}: {}", self.name, self.stderr))
    }
}
