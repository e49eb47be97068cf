//! Where rows go: stdout, or a file that appears whole or not at all and whose making can be taken up again.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use serde::Serialize;
use serde_json::{Map, Value};

use super::read::{MAX_LINE_BYTES, Rows, object};
use crate::files::{holds_work, is_stream, lock, parent, part_path, publish, still_missing};
use crate::program;
use crate::run::{Manifest, beside};

/// What [`Output::open`] found.
pub enum Opened {
    /// The file is there and whole.
    AlreadyDone(Done),
    /// Ready for rows, after those that [`Output::kept_rows`] counts.
    Ready(Output),
}

/// A file that is there and whole, made by a command with these settings.
pub struct Done {
    path: PathBuf,
    made: Option<Manifest>,
}

impl Done {
    /// Says that there is nothing to do, if the file was made with these settings, too (the models' fingerprints), and of
    /// these files; see [`Manifest::check_inputs`]. Models that are gone by now cannot be compared, and need not be there.
    ///
    /// # Errors
    /// It was not; the error names the difference.
    pub fn confirm(
        self,
        models: impl FnOnce() -> Result<Map<String, Value>>,
        inputs: &[&Path],
    ) -> Result<()> {
        // Whoever made it without a manifest is to be trusted.
        if let Some(made) = self.made {
            made.check_inputs(inputs, &self.path)?;
            if let Ok(models) = models() {
                made.check_same(&models, &self.path)?;
            }
        }
        program::say(format_args!(
            "{} is already there, nothing to do",
            self.path.display()
        ));
        Ok(())
    }
}

/// A sink of rows. Dropped without [`Output::finish`] (an error, a signal), a file's rows stay in `FILE.part` for
/// `--resume`, and the user is told; a `FILE.part` without rows goes away.
pub struct Output {
    sink: Sink,
    /// For the manifest.
    settings: Map<String, Value>,
    kept: u64,
    written: u64,
    finished: bool,
}

enum Sink {
    /// stdout, a device or a named pipe.
    Stream {
        writer: BufWriter<Box<dyn Write + Send>>,
        name: String,
    },
    File {
        writer: BufWriter<File>,
        part: PathBuf,
        path: PathBuf,
    },
}

impl Output {
    /// Rows to stdout.
    pub fn stdout() -> Self {
        Self::stream(Box::new(io::stdout()), "stdout".to_owned())
    }

    fn stream(to: Box<dyn Write + Send>, name: String) -> Self {
        let writer = BufWriter::with_capacity(1 << 16, to);
        Self::new(Sink::Stream { writer, name }, 0, Map::new())
    }

    fn new(sink: Sink, kept: u64, settings: Map<String, Value>) -> Self {
        Self {
            sink,
            settings,
            kept,
            written: 0,
            finished: false,
        }
    }

    /// Rows to `output`, by way of `output.part`; without one, or with `-`, to stdout.
    ///
    /// With `resume`: an existing file is [`Opened::AlreadyDone`]; an existing `.part` is gone on with, a torn
    /// last line cut away. Without: either of them is an error, so that no work is overwritten unasked.
    /// The `.part` is locked: two runs never write one file.
    ///
    /// `settings` are those of the command that the rows depend on. An output that is there, or begun, with others is
    /// refused, and the difference named; what is known only later (fingerprints) comes by [`Self::begin`].
    pub fn open(
        output: Option<&Path>,
        resume: bool,
        settings: Map<String, Value>,
    ) -> Result<Opened> {
        let Some(path) = output.filter(|path| *path != Path::new("-")) else {
            return Ok(Opened::Ready(Self::stdout()));
        };
        if path.is_dir() {
            bail!(
                "--output {} is a folder, not a file of rows",
                path.display()
            );
        }
        let name = path.display().to_string();
        if is_stream(path) {
            let file = OpenOptions::new().write(true).open(path);
            let file = file.with_context(|| format!("cannot write {name}"))?;
            return Ok(Opened::Ready(Self::stream(Box::new(file), name)));
        }
        if name.ends_with('/') {
            bail!("--output {name} is the name of a folder, not of a file of rows");
        }
        let part = part_path(path);
        if path.exists() {
            if !resume {
                bail!(
                    "{} is already there: remove it, name another --output, or pass --resume to keep it",
                    path.display()
                );
            }
            let made = Manifest::read(&beside(path))?;
            if let Some(made) = &made {
                made.check_same(&settings, path)?;
            }
            // A kill just after the file got its name leaves this.
            drop(fs::remove_file(beside(&part)));
            let path = path.to_owned();
            return Ok(Opened::AlreadyDone(Done { path, made }));
        }
        // An empty one holds no work to lose.
        if holds_work(&part) && !resume {
            bail!(
                "{} is there from an interrupted run: pass --resume to go on with it, or remove it",
                part.display()
            );
        }
        let folder = parent(path);
        if !folder.is_dir() {
            bail!("the folder {} for --output is not there", folder.display());
        }
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&part)
            .with_context(|| format!("cannot write {}", part.display()))?;
        lock(&file, &part)?;
        still_missing(path)?;
        let (kept, bytes) = whole_rows(&file, &part)?;
        cut(&mut file, bytes).with_context(|| format!("cannot write {}", part.display()))?;
        let sink = Sink::File {
            writer: BufWriter::with_capacity(1 << 16, file),
            part,
            path: path.to_owned(),
        };
        Ok(Opened::Ready(Self::new(sink, kept, settings)))
    }

    /// Begins the work: with `more` settings, what the run is, is written to `FILE.part.run.json`.
    ///
    /// # Errors
    /// The rows that are kept come from another run; the error names the differences.
    pub fn begin(&mut self, more: Map<String, Value>) -> Result<()> {
        self.settings.extend(more);
        let Sink::File { part, .. } = &self.sink else {
            return Ok(());
        };
        let path = beside(part);
        // Rows without it are the caller's to check: somebody moved them here.
        if self.kept > 0
            && let Some(begun) = Manifest::read(&path)?
        {
            let same = begun.check_same(&self.settings, part);
            self.finished = same.is_err(); // what is there is not ours to speak of
            return same;
        }
        Manifest::new(self.settings.clone()).write(&path)
    }

    /// How many whole rows an earlier run left, and this one keeps.
    pub fn kept_rows(&self) -> u64 {
        self.kept
    }

    /// Those rows, streamed. To be read before the first `write`.
    pub fn kept(&self) -> Box<dyn Iterator<Item = Result<super::Row>>> {
        match &self.sink {
            Sink::Stream { .. } => Box::new(std::iter::empty()),
            Sink::File { part, .. } => {
                let kept = Rows::unnoted(part);
                Box::new(kept.take(usize::try_from(self.kept).unwrap_or(usize::MAX)))
            }
        }
    }

    /// Keeps only the first `rows` of the kept rows: cuts the incomplete group that the last run was at.
    /// To be called before the first `write`.
    pub fn truncate_to(&mut self, rows: u64) -> Result<()> {
        if rows >= self.kept {
            return Ok(());
        }
        let Sink::File { writer, part, .. } = &mut self.sink else {
            return Ok(());
        };
        let context = || format!("cannot cut {}", part.display());
        let file = writer.get_mut();
        file.seek(SeekFrom::Start(0)).with_context(context)?;
        let mut reader = BufReader::new(&*file);
        let (mut bytes, mut line) = (0, Vec::new());
        for _ in 0..rows {
            line.clear();
            bytes += reader.read_until(b'\n', &mut line).with_context(context)? as u64;
        }
        cut(file, bytes).with_context(context)?;
        self.kept = rows;
        Ok(())
    }

    /// Appends one row: a [`Row`](super::Row)'s `fields`, or anything that serialises to an object.
    /// A closed stdout is an `io::Error` of kind `BrokenPipe` in the error's chain.
    pub fn write(&mut self, row: &impl Serialize) -> Result<()> {
        let written = match &mut self.sink {
            Sink::Stream { writer, .. } => jsonl::write(writer, row),
            Sink::File { writer, .. } => jsonl::write(writer, row),
        };
        match written {
            Ok(()) => {
                self.written += 1;
                Ok(())
            }
            Err(jsonl::WriteError::Io(err)) => Err(self.failed(err)),
            Err(err) => Err(anyhow!(err).context("a row cannot be written as JSON")),
        }
    }

    /// Hands what was written to the reader of the pipe, or to the file. After each group of rows.
    pub fn flush(&mut self) -> Result<()> {
        let flushed = match &mut self.sink {
            Sink::Stream { writer, .. } => writer.flush(),
            Sink::File { writer, .. } => writer.flush(),
        };
        flushed.map_err(|err| self.failed(err))
    }

    /// Flushes stdout; syncs the file and gives it its name, with its manifest beside it.
    pub fn finish(mut self) -> Result<()> {
        self.flush()?;
        if let Sink::File { part, path, .. } = &self.sink {
            // First: where the file is, its manifest is.
            Manifest::new(self.settings.clone()).write(&beside(path))?;
            publish(part, path)?;
            drop(fs::remove_file(beside(part)));
        }
        self.finished = true;
        Ok(())
    }

    fn failed(&self, err: io::Error) -> anyhow::Error {
        let target = match &self.sink {
            Sink::Stream { name, .. } => name.clone(),
            Sink::File { part, .. } => part.display().to_string(),
        };
        anyhow::Error::new(err).context(format!("cannot write to {target}"))
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        let Sink::File { part, .. } = &self.sink else {
            return;
        };
        if self.finished {
            return;
        }
        match self.kept + self.written {
            // Nothing to go on with; left there, it would only be in the way.
            0 => {
                drop(fs::remove_file(part));
                drop(fs::remove_file(beside(part)));
            }
            _ => program::say(format_args!(
                "{} is kept: --resume goes on after its last whole row",
                part.display()
            )),
        }
    }
}

/// The number of whole rows at the start of the file, and their bytes. A last line that is torn (no newline, or
/// not JSON, as a power cut leaves it) does not count; one in the middle was not made by us, so it is an error.
fn whole_rows(file: &File, part: &Path) -> Result<(u64, u64)> {
    let mut reader = BufReader::with_capacity(1 << 16, file);
    let (mut rows, mut bytes) = (0, 0);
    let mut line = Vec::new();
    let mut torn = None;
    loop {
        line.clear();
        let read = (&mut reader)
            .take(MAX_LINE_BYTES + 1)
            .read_until(b'\n', &mut line)
            .with_context(|| format!("cannot read {}", part.display()))?;
        if read == 0 {
            return Ok((rows, bytes));
        }
        if let Some(err) = torn {
            bail!(
                "{}:{}: {err:#}; remove the file to start again",
                part.display(),
                rows + 1
            );
        }
        if line.last() != Some(&b'\n') {
            torn = Some(anyhow!("the line has no end"));
        } else if let Err(err) = object(&line) {
            torn = Some(err);
        } else {
            rows += 1;
            bytes += read as u64;
        }
    }
}

fn cut(file: &mut File, bytes: u64) -> io::Result<()> {
    file.set_len(bytes)?;
    file.seek(SeekFrom::Start(bytes)).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::settings;
    use serde_json::json;

    fn open(path: &Path, resume: bool) -> Result<Output> {
        match Output::open(Some(path), resume, Map::new())? {
            Opened::Ready(output) => Ok(output),
            Opened::AlreadyDone(_) => bail!("already done"),
        }
    }

    fn refusal(path: &Path, resume: bool) -> String {
        match open(path, resume) {
            Ok(_) => panic!("opened"),
            Err(err) => format!("{err:#}").replace(&format!("{}/", parent(path).display()), ""),
        }
    }

    #[test]
    fn a_file_appears_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("o.jsonl");
        let mut output = open(&path, false).unwrap();
        output.write(&json!({"b": 1, "a": "é\n"})).unwrap();
        output.flush().unwrap();
        assert!(!path.exists());
        output.finish().unwrap();
        assert_eq!(
            fs::read_to_string(&path).unwrap(),
            "{\"b\":1,\"a\":\"é\\n\"}\n"
        );
        assert!(!part_path(&path).exists());
        assert!(matches!(
            Output::open(Some(&path), true, Map::new()).unwrap(),
            Opened::AlreadyDone(_)
        ));
        assert_eq!(
            refusal(&path, false),
            "o.jsonl is already there: remove it, name another --output, or pass --resume to keep it"
        );
    }

    #[test]
    fn work_left_behind_is_taken_up_only_on_request() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("o.jsonl");
        let mut output = open(&path, true).unwrap();
        assert_eq!(output.kept_rows(), 0);
        output.write(&json!({"n": 0})).unwrap();
        drop(output);
        assert_eq!(
            refusal(&path, false),
            "o.jsonl.part is there from an interrupted run: pass --resume to go on with it, or remove it"
        );
        let mut output = open(&path, true).unwrap();
        assert_eq!(output.kept_rows(), 1);
        output.write(&json!({"n": 1})).unwrap();
        output.finish().unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\"n\":0}\n{\"n\":1}\n");
    }

    #[test]
    fn killed_at_any_byte_no_row_is_lost_or_doubled() {
        let whole = "{\"n\":0}\n{\"n\":\"ünï\"}\n{\"n\":2}\n";
        let dir = tempfile::tempdir().unwrap();
        for cut in 0..=whole.len() {
            let path = dir.path().join(format!("{cut}"));
            fs::write(part_path(&path), &whole.as_bytes()[..cut]).unwrap();
            let mut output = open(&path, true).unwrap();
            let kept = output.kept().collect::<Result<Vec<_>>>().unwrap();
            assert_eq!(kept.len() as u64, output.kept_rows());
            for line in whole.lines().skip(kept.len()) {
                let row: serde_json::Value = serde_json::from_str(line).unwrap();
                output.write(&row).unwrap();
            }
            output.finish().unwrap();
            assert_eq!(
                fs::read_to_string(&path).unwrap(),
                whole,
                "cut at byte {cut}"
            );
        }
    }

    #[test]
    fn a_bad_last_line_is_torn_and_a_bad_middle_one_is_not_ours() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("o");
        fs::write(part_path(&path), b"{}\n\0\0\0\0\n").unwrap();
        assert_eq!(open(&path, true).unwrap().kept_rows(), 1);
        fs::write(part_path(&path), b"{}\nx\n{}\n").unwrap();
        assert_eq!(
            refusal(&path, true),
            "o.part:2: not JSON: expected value at column 1; remove the file to start again"
        );
    }

    #[test]
    fn an_output_has_its_manifest_and_is_not_taken_for_another() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("o");
        let open = |seed: u8, model: &str| {
            let seed = settings(json!({"seed": seed}));
            let Opened::Ready(mut output) = Output::open(Some(&path), true, seed)? else {
                bail!("already done");
            };
            output.begin(settings(json!({"model": model})))?;
            anyhow::Ok(output)
        };
        let refusal = |seed: u8, model: &str| open(seed, model).err().unwrap().to_string();
        let mut output = open(1, "a").unwrap();
        output.write(&json!({"n": 0})).unwrap();
        drop(output);
        assert!(
            refusal(2, "a")
                .contains("o.part: the run that made it was another one (seed: 1, now 2)")
        );
        assert!(refusal(1, "b").contains("(model: \"a\", now \"b\")"));
        open(1, "a").unwrap().finish().unwrap();
        let made = Manifest::read(&beside(&path)).unwrap().unwrap();
        assert_eq!(Value::from(made.settings), json!({"seed": 1, "model": "a"}));
        assert!(!beside(&part_path(&path)).exists());
        // The model of a finished one is not opened again.
        assert_eq!(refusal(1, "b"), "already done");
        assert!(
            refusal(2, "a").contains("o: the run that made it was another one (seed: 1, now 2)")
        );
    }

    #[test]
    fn an_incomplete_group_can_be_cut() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("o");
        fs::write(part_path(&path), "{\"n\":0}\n{\"n\":1}\n{\"n\":2}\n{\"n\"").unwrap();
        let mut output = open(&path, true).unwrap();
        output.truncate_to(5).unwrap();
        assert_eq!(output.kept_rows(), 3);
        output.truncate_to(1).unwrap();
        assert_eq!(output.kept().count(), 1);
        output.write(&json!({"n": 9})).unwrap();
        output.finish().unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\"n\":0}\n{\"n\":9}\n");
    }

    #[test]
    fn two_runs_do_not_share_a_file_and_folders_are_not_invented() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("o");
        let first = open(&path, true).unwrap();
        assert_eq!(
            refusal(&path, true),
            "o.part is being written by another program"
        );
        drop(first);
        open(&path, true).unwrap();
        assert!(
            !part_path(&path).exists(),
            "a part without rows is in the way"
        );
        let err = refusal(&dir.path().join("gone/o"), false);
        assert!(
            err.starts_with("the folder ") && err.ends_with(" is not there"),
            "{err}"
        );
    }
}
