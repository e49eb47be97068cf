//! Streaming rows from files and stdin, one line in memory at a time.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Map, Value};

use super::patient::Patient;
use super::row::{Place, Row};
use crate::run::{self, Input};
use crate::{pipe, program};

/// The longest line that is read, in bytes: a bound on memory when the input is not JSON Lines at all.
pub const MAX_LINE_BYTES: u64 = 64 << 20;

/// The rows of the files, one file after the other; `-` is stdin, and so is no file at all.
///
/// Blank lines, CRLF, a byte-order mark and a last line without its newline are fine. A file that cannot be read,
/// a line that is not a JSON object in UTF-8, and a signal (see [`program::check`]) are errors, after which the
/// iterator ends. All files are looked at before the first row, so a mistyped name costs no work.
pub fn rows(files: &[PathBuf]) -> Rows {
    let files = match files {
        [] => vec![PathBuf::from("-")],
        files => files.to_vec(),
    };
    Rows {
        checked: false,
        waiting: files.into_iter().rev().collect(),
        open: None,
        max_line: MAX_LINE_BYTES,
        noted: true,
    }
}

/// The rows of a file that is open already: what was looked at is in the reader's buffer, and of a pipe nowhere else.
pub fn rows_of(path: &Path, reader: BufReader<File>) -> Rows {
    Rows {
        checked: true,
        waiting: vec![],
        open: Some(Lines::of_file(path, reader)),
        ..rows(&[])
    }
}

/// See [`rows`].
pub struct Rows {
    checked: bool,
    /// Files still to open, last first.
    waiting: Vec<PathBuf>,
    open: Option<Lines>,
    max_line: u64,
    /// Whether the manifest of what is made names what was read.
    noted: bool,
}

struct Lines {
    reader: Box<dyn BufRead + Send>,
    /// What the reader reads, to be asked at its end whether it is whole.
    source: Option<File>,
    place: Place,
    buffer: Vec<u8>,
    /// Of all bytes so far.
    hash: blake3::Hasher,
    bytes: u64,
}

impl Iterator for Rows {
    type Item = Result<Row>;

    fn next(&mut self) -> Option<Result<Row>> {
        let next = self.next_row();
        if next.is_err() {
            self.open = None;
            self.waiting.clear();
        }
        next.transpose()
    }
}

impl Rows {
    /// Rows of a file of our own, which are no input.
    pub(super) fn unnoted(file: &Path) -> Self {
        Self {
            noted: false,
            ..rows(&[file.to_owned()])
        }
    }

    fn next_row(&mut self) -> Result<Option<Row>> {
        if !self.checked {
            self.waiting.iter().try_for_each(|file| look_at(file))?;
            self.checked = true;
        }
        loop {
            program::check()?;
            if self.open.is_none() {
                let Some(file) = self.waiting.pop() else {
                    return Ok(None);
                };
                self.open = Some(Lines::open(&file)?);
            }
            let lines = self.open.as_mut().expect("opened above");
            if !lines.next_line(self.max_line)? {
                let read = self.open.take();
                if let Some(lines) = read.filter(|_| self.noted) {
                    run::has_read(lines.input());
                }
            } else if !lines.buffer.trim_ascii().is_empty() {
                return lines.row().map(Some);
            }
        }
    }
}

impl Lines {
    fn open(path: &Path) -> Result<Self> {
        if path == Path::new("-") {
            let source = io::stdin().as_fd().try_clone_to_owned();
            let reader = Box::new(BufReader::new(Patient::start(|| io::stdin().lock())));
            return Ok(Self::new(
                "stdin".into(),
                reader,
                source.ok().map(File::from),
            ));
        }
        let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        Ok(Self::of_file(path, BufReader::with_capacity(1 << 16, file)))
    }

    fn of_file(path: &Path, reader: BufReader<File>) -> Self {
        let source = reader.get_ref().try_clone().ok();
        Self::new(path.display().to_string().into(), Box::new(reader), source)
    }

    fn new(file: Arc<str>, reader: Box<dyn BufRead + Send>, source: Option<File>) -> Self {
        Self {
            reader,
            source,
            place: Place { file, line: 0 },
            buffer: Vec::new(),
            hash: blake3::Hasher::new(),
            bytes: 0,
        }
    }

    /// Reads the next line, with its newline, into the buffer; false at the end.
    fn next_line(&mut self, max: u64) -> Result<bool> {
        self.buffer.clear();
        let mut bounded = (&mut self.reader).take(max + 1);
        if let Err(err) = bounded.read_until(b'\n', &mut self.buffer) {
            program::check()?;
            return Err(err).with_context(|| format!("cannot read {}", self.place.file));
        }
        if self.buffer.is_empty() {
            if self.source.as_ref().is_some_and(pipe::is_unfinished) {
                bail!(
                    "{}: the program that wrote this pipe was killed: rows are missing after line {}",
                    self.place.file,
                    self.place.line
                );
            }
            return Ok(false);
        }
        self.place.line += 1;
        self.bytes += self.buffer.len() as u64;
        self.hash.update(&self.buffer);
        if self.buffer.len() as u64 > max {
            bail!(
                "{}: the line is longer than {} MiB; rows are one JSON object a line",
                self.place,
                max >> 20
            );
        }
        Ok(true)
    }

    /// What the manifest says of it once it is read.
    fn input(self) -> Input {
        Input {
            file: self.place.file.to_string(),
            bytes: self.bytes,
            lines: self.place.line,
            blake3: self.hash.finalize().to_string(),
        }
    }

    fn row(&self) -> Result<Row> {
        let mut line = self.buffer.as_slice();
        if self.place.line == 1 {
            line = line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(line);
        }
        let fields = object(line).map_err(|err| {
            let hint = match line.last() {
                Some(b'\n') => "",
                _ => "; the line has no end: did the program that wrote it fail?",
            };
            anyhow!("{}: {err:#}{hint}", self.place)
        })?;
        Ok(Row {
            fields,
            place: self.place.clone(),
        })
    }
}

/// Parses one line, which holds one JSON object.
pub(super) fn object(line: &[u8]) -> Result<Map<String, Value>> {
    if let Err(err) = std::str::from_utf8(line) {
        bail!("not valid UTF-8 at byte {}", err.valid_up_to() + 1);
    }
    match jsonl::read::<_, Value>(line) {
        Ok(Value::Object(fields)) => Ok(fields),
        Ok(_) => bail!("not a JSON object; rows are one object a line"),
        Err(jsonl::ReadError::Deserialize(err)) => {
            // serde_json counts lines within this one line: "… at line 1 column 9".
            let text = err.to_string();
            let what = text
                .rsplit_once(" at line ")
                .map_or(&*text, |(what, _)| what);
            bail!("not JSON: {what} at column {}", err.column())
        }
        Err(err) => bail!("not JSON: {err}"),
    }
}

fn look_at(path: &Path) -> Result<()> {
    if path == Path::new("-") {
        return Ok(());
    }
    let meta = path
        .metadata()
        .with_context(|| format!("cannot open {}", path.display()))?;
    if meta.is_dir() {
        bail!("{} is a folder, not a file of rows", path.display());
    }
    Ok(())
}

/// Reads rows in a thread of its own, for who has other work than to wait for a slow neighbour in the pipe. Dropping
/// the receiver ends it.
pub fn ahead(rows: impl Iterator<Item = Result<Row>> + Send + 'static) -> Receiver<Result<Row>> {
    /// Rows in memory that nobody has asked for yet.
    const AHEAD: usize = 16;
    let (sender, receiver) = sync_channel(AHEAD);
    std::thread::spawn(move || {
        for row in rows {
            if sender.send(row).is_err() {
                return;
            }
        }
    });
    receiver
}

/// Neighbouring rows of one prompt (same `id`, same `prompt`), at most `max` at a time: what is scored together.
/// An error comes after the rows that were whole before it.
pub fn groups(
    rows: impl Iterator<Item = Result<Row>>,
    max: usize,
) -> impl Iterator<Item = Result<Vec<Row>>> {
    Groups {
        rows,
        max: max.max(1),
        next: None,
    }
}

struct Groups<I> {
    rows: I,
    max: usize,
    /// The row (with its id) or the error that ended the last group.
    next: Option<Result<(String, Row)>>,
}

impl<I: Iterator<Item = Result<Row>>> Groups<I> {
    fn take_next(&mut self) -> Option<Result<(String, Row)>> {
        let with_id = |row: Result<Row>| {
            let row = row?;
            Ok((row.id()?, row))
        };
        self.next.take().or_else(|| self.rows.next().map(with_id))
    }
}

impl<I: Iterator<Item = Result<Row>>> Iterator for Groups<I> {
    type Item = Result<Vec<Row>>;

    fn next(&mut self) -> Option<Result<Vec<Row>>> {
        let (id, first) = match self.take_next()? {
            Ok(first) => first,
            Err(err) => return Some(Err(err)),
        };
        let mut group = vec![first];
        while group.len() < self.max {
            match self.take_next() {
                None => break,
                Some(Ok((next, row))) if next == id && is_of_one_prompt(&row, &group[0]) => {
                    group.push(row);
                }
                other => {
                    self.next = other;
                    break;
                }
            }
        }
        Some(Ok(group))
    }
}

/// Whether both begin with the same tokens.
fn is_of_one_prompt(one: &Row, other: &Row) -> bool {
    one.prompt().ok() == other.prompt().ok()
        && one.template_variables().ok() == other.template_variables().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::fs;

    struct World(tempfile::TempDir);

    impl World {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }
        fn file(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
            let path = self.0.path().join(name);
            fs::write(&path, bytes).unwrap();
            path
        }
        /// The messages of all rows' errors, without the folder's name.
        fn error(&self, files: &[PathBuf]) -> String {
            let mut rows = rows(files);
            let err = rows.by_ref().find_map(Result::err).expect("an error");
            assert!(rows.next().is_none(), "the iterator ends after an error");
            format!("{err:#}").replace(&format!("{}/", self.0.path().display()), "")
        }
    }

    #[test]
    fn files_are_one_stream_with_their_own_line_numbers() {
        let world = World::new();
        let a = world.file("a", "\u{feff}{\"n\":1}\r\n\r\n  \n{\"n\":2}\r\n");
        let b = world.file("b", "{\"n\":3}\n\n{\"z\":1,\"a\":2}");
        let empty = world.file("empty", "");
        let got: Vec<Row> = rows(&[a, empty, b]).collect::<Result<_>>().unwrap();
        let lines: Vec<_> = got.iter().map(|r| r.place.line).collect();
        assert_eq!(lines, [1, 4, 1, 3]);
        assert!(got[2].place.to_string().ends_with("/b:1"));
        let order: Vec<_> = got[3].fields.keys().collect();
        assert_eq!(order, ["z", "a"]);
    }

    #[test]
    fn what_is_not_a_row_is_named_with_its_place() {
        let world = World::new();
        for (bytes, message) in [
            (
                &b"{}\n{\"a\":\n"[..],
                "f:2: not JSON: EOF while parsing a value at column 0",
            ),
            (
                b"{}\n\n{\"a\":NaN}\n",
                "f:3: not JSON: expected value at column 6",
            ),
            (b"{} {}\n", "f:1: not JSON: trailing characters at column 4"),
            (
                b"{}\n{\"a\":",
                "f:2: not JSON: EOF while parsing a value at column 5; the line has no end: did the program that wrote it fail?",
            ),
            (
                b"[1]\n",
                "f:1: not a JSON object; rows are one object a line",
            ),
            (b"{\"a\":\"\xff\"}\n", "f:1: not valid UTF-8 at byte 7"),
            (
                b"{\"a\":\"\\ud800\"}\n",
                "f:1: not JSON: unexpected end of hex escape at column 13",
            ),
        ] {
            let file = world.file("f", bytes);
            assert_eq!(world.error(&[file]), message);
        }
        let deep = world.file("f", "{\"a\":".to_owned() + &"[".repeat(100_000) + "\n");
        assert_eq!(
            world.error(&[deep]),
            "f:1: not JSON: recursion limit exceeded at column 132"
        );
    }

    #[test]
    fn a_missing_file_or_a_folder_is_named_before_the_first_row() {
        let world = World::new();
        let good = world.file("good", "{}\n");
        let gone = world.0.path().join("gone");
        assert_eq!(
            world.error(&[good.clone(), gone]),
            "cannot open gone: No such file or directory (os error 2)"
        );
        fs::create_dir(world.0.path().join("d")).unwrap();
        assert_eq!(
            world.error(&[good, world.0.path().join("d")]),
            "d is a folder, not a file of rows"
        );
    }

    #[test]
    fn a_line_without_end_is_bounded() {
        let world = World::new();
        let file = world.file("f", "{\"a\":1}\n{\"a\": 12345}\n");
        let mut rows = rows(&[file]);
        rows.max_line = 10;
        assert!(rows.next().unwrap().is_ok());
        let err = rows.next().unwrap().unwrap_err().to_string();
        assert!(err.contains("f:2: the line is longer than"), "{err}");
        assert!(rows.next().is_none());
    }

    #[test]
    fn groups_are_neighbours_of_one_prompt_and_errors_come_after_them() {
        let world = World::new();
        let file = world.file(
            "f",
            "{\"prompt\":\"a\"}\n{\"prompt\":\"a\"}\n{\"prompt\":\"b\"}\n{\"prompt\":\"a\"}\n\
             {\"prompt\":\"a\",\"id\":1}\n{\"prompt\":\"b\",\"id\":1}\n{\"prompt\":\"b\",\"id\":1}\n{\n{}\n",
        );
        let sizes: Vec<_> = groups(rows(std::slice::from_ref(&file)), 16)
            .map(|g| g.map(|g| g.len()).unwrap_or(0))
            .collect();
        assert_eq!(sizes, [2, 1, 1, 1, 2, 0]);
        let sizes: Vec<_> = groups(rows(&[file]), 1)
            .map(|g| g.map(|g| g.len()).unwrap_or(0))
            .collect();
        assert_eq!(sizes, [1, 1, 1, 1, 1, 1, 1, 0]);
    }

    #[test]
    fn rows_of_one_prompt_and_other_variables_are_apart() {
        let world = World::new();
        let row = |more: &str| format!("{{\"id\":\"a\",\"prompt\":\"x\"{more}}}\n");
        let quick = row(",\"chat_template_kwargs\":{\"enable_thinking\":false}");
        let text = row("") + &row("") + &quick + &quick + &row(",\"tools\":[]");
        let file = world.file("rows", text);
        let sizes: Vec<usize> = groups(rows(&[file]), 10)
            .map(|group| group.unwrap().len())
            .collect();
        assert_eq!(sizes, [2, 2, 1]);
    }

    proptest! {
        /// Whatever the bytes: the rows before the first bad line, then one error that names it, never a panic.
        #[test]
        fn any_bytes_are_rows_up_to_the_first_bad_line(
            lines in prop::collection::vec(prop_oneof![
                4 => Just(b"{\"a\":[1,\"\xc3\xa9\"]}".to_vec()),
                2 => Just(b" \r".to_vec()),
                1 => prop::collection::vec(any::<u8>(), 0..12),
            ], 0..8),
        ) {
            let world = World::new();
            let file = world.file("f", lines.join(&b'\n'));
            let bytes = fs::read(&file).unwrap();
            let mut expected = Vec::new();
            for (i, line) in bytes.split(|b| *b == b'\n').enumerate() {
                if line.trim_ascii().is_empty() {
                    continue;
                }
                let row = serde_json::from_slice::<Map<String, Value>>(line);
                expected.push((i as u64 + 1, row.is_ok()));
                if row.is_err() {
                    break;
                }
            }
            let got: Vec<_> = rows(&[file]).map(|row| match row {
                Ok(row) => (row.place.line, true),
                Err(err) => {
                    let text = err.to_string();
                    let line = text.split(':').nth(1).unwrap().parse().unwrap();
                    (line, false)
                }
            }).collect();
            prop_assert_eq!(got, expected);
        }
    }
}
