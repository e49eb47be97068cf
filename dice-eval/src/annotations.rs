//! Pairwise annotations: which of two outputs a judge preferred, in AlpacaEval's form.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use anyhow::{Result, anyhow, ensure};
use common::jsonl::{Place, Row};
use common::metrics::spread;
use serde_json::Value;

use crate::lists::list_or_lines;

/// The annotations of one model against one baseline.
pub struct Annotations {
    /// The file, as the user named it.
    pub file: String,
    pub rows: Vec<Annotation>,
    /// `generator_1`, where the rows name it.
    pub baseline: Option<String>,
    /// `generator_2`, where the rows name it.
    pub model: Option<String>,
    /// Every `annotator` that the rows name.
    pub judges: BTreeSet<String>,
}

/// A judged pair of outputs.
pub struct Annotation {
    pub place: Place,
    /// What tells its prompt from others: the instruction, else `prompt_id`, `id` or `index`, else the position.
    pub key: Key,
    pub prompt_id: Option<usize>,
    /// The value of the field that rows are grouped by, where the row has it.
    pub category: Option<String>,
    /// Lengths in characters: of the baseline's output and of the model's.
    pub lengths: [f64; 2],
    /// Probability that the model's output is better: `preference` − 1. `None` without a judgment.
    pub win: Option<f64>,
    /// The model's output, where the row has it; else unknown whether it repeats another.
    output: Option<u64>,
    /// Whether both outputs are the same text.
    identical: bool,
    /// Whether the judge's two orders had different winners, where `dice-eval judge` asked for both.
    turned: Option<bool>,
}

/// From this share of turned verdicts on, the order decides too much. (Verdicts by a coin turn half of the time.)
const MUCH_TURNED: f64 = 0.3;

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Key {
    Instruction(String),
    Id(String),
    /// No field says which prompt it was.
    Position(usize),
}

impl Annotations {
    /// Reads one file (`-`: stdin), a JSON list or JSON Lines. `by` is the field that rows may be grouped by.
    ///
    /// # Errors
    /// A field that is missing or wrong, two rows of one prompt, rows of two models or two baselines, no rows.
    pub fn read(file: &Path, by: &str) -> Result<Self> {
        let mut found = Self {
            file: match file.to_str() {
                Some("-") => "stdin".into(),
                _ => file.display().to_string(),
            },
            rows: vec![],
            baseline: None,
            model: None,
            judges: BTreeSet::new(),
        };
        let mut seen: HashMap<Key, Place> = HashMap::new();
        for row in list_or_lines(file)? {
            let row = row?;
            for (field, name) in [
                ("generator_1", &mut found.baseline),
                ("generator_2", &mut found.model),
            ] {
                one_name(&row, field, name)?;
            }
            found
                .judges
                .extend(row.opt_string("annotator")?.map(str::to_owned));
            let annotation = Annotation::read(&row, found.rows.len(), by)?;
            if let Some(first) = seen.insert(annotation.key.clone(), row.place.clone()) {
                return Err(anyhow!(
                    "{}: the same prompt as {first}: a prompt counts once; remove one of the rows",
                    row.place
                ));
            }
            found.rows.push(annotation);
        }
        ensure!(!found.rows.is_empty(), "{}: no annotations", found.file);
        Ok(found)
    }

    /// Whether the model was judged against itself.
    pub fn is_baseline(&self) -> bool {
        self.model.is_some() && self.model == self.baseline
    }

    /// The share of verdicts that turned with the order of the outputs, where both orders were judged.
    pub fn turned(&self) -> Option<f64> {
        let turned: Vec<f64> = self
            .rows
            .iter()
            .filter_map(|row| Some(f64::from(u8::from(row.turned?))))
            .collect();
        spread(&turned).map(|turned| turned.mean)
    }

    /// What to call the model: its name, else the file's.
    pub fn name(&self) -> String {
        let stem = Path::new(&self.file).file_stem();
        let stem = stem.map_or(self.file.clone(), |s| s.to_string_lossy().into_owned());
        self.model.clone().unwrap_or(stem)
    }

    /// What a reader should know of outputs that are no answers, and of rows that are no judgments.
    pub fn remarks(&self) -> Vec<String> {
        let n = self.rows.len();
        let count = |is: fn(&Annotation) -> bool| self.rows.iter().filter(|row| is(row)).count();
        let different: BTreeSet<u64> = self.rows.iter().filter_map(|row| row.output).collect();
        let texts = count(|row| row.output.is_some());
        let lengths: BTreeSet<u64> = self.rows.iter().map(|row| row.lengths[1] as u64).collect();
        let mut remarks = vec![];
        let mut say = |count: usize, what: &str| {
            if count > 0 {
                remarks.push(format!("{count} of {n} {what}"));
            }
        };
        say(
            count(|row| row.win.is_none()),
            "rows have no judgment and count in no rate",
        );
        say(
            count(|row| row.lengths[1] == 0.0),
            "outputs of the model are empty",
        );
        say(
            count(|row| row.identical),
            "outputs of the model are those of the baseline, word for word",
        );
        say(
            texts - different.len(),
            "outputs of the model repeat another of its outputs",
        );
        if n > 1 && different.len() == 1 && texts == n {
            remarks
                .push("the model's output is constant: the judge was played, not answered".into());
        } else if n > 9 && texts == 0 && lengths.len() == 1 {
            remarks.push("all outputs of the model have one length: are they constant?".into());
        }
        if let Some(share) = self.turned().filter(|share| *share >= MUCH_TURNED) {
            let percent = 100.0 * share;
            remarks.push(format!("{percent:.0}% of the verdicts turned with the order of the outputs: this is hardly a judge"));
        }
        remarks
    }
}

impl Annotation {
    fn read(row: &Row, position: usize, by: &str) -> Result<Self> {
        let texts = [row.opt_string("output_1")?, row.opt_string("output_2")?];
        let length = |text: Option<&str>, field: &str| match text {
            Some(text) => Ok(text.chars().count() as f64),
            None => {
                let length = row.opt_number(field)?.filter(|length| *length >= 0.0);
                length.ok_or_else(|| {
                    let output = field.replace("len", "output");
                    row.error(
                        &output,
                        format_args!("is missing, and so is a length \"{field}\""),
                    )
                })
            }
        };
        let hash = |text: &str| {
            let hash = blake3::hash(text.as_bytes());
            u64::from_le_bytes(hash.as_bytes()[..8].try_into().expect("32 bytes"))
        };
        Ok(Self {
            place: row.place.clone(),
            key: key(row, position)?,
            // Data sets have ids of other kinds under this name, too.
            prompt_id: (row.fields.get("prompt_id"))
                .and_then(Value::as_f64)
                .filter(|id| *id >= 0.0 && id.fract() == 0.0)
                .map(|id| id as usize),
            category: row
                .fields
                .contains_key(by)
                .then(|| crate::samples::name(row, by)),
            lengths: [length(texts[0], "len_1")?, length(texts[1], "len_2")?],
            win: preference(row)?,
            output: texts[1].map(hash),
            identical: texts[0].is_some() && texts[0] == texts[1],
            turned: row.fields.get("turned").and_then(Value::as_bool),
        })
    }
}

/// AlpacaEval's `preference`: 1 the baseline wins … 2 the model wins, or 0, an old way to write a draw.
fn preference(row: &Row) -> Result<Option<f64>> {
    match row.opt_number("preference")? {
        None if row.fields.contains_key("preference") => Ok(None),
        None => Err(row.error("preference", "is missing")),
        Some(0.0) => Ok(Some(0.5)),
        Some(preference) if (1.0..=2.0).contains(&preference) => Ok(Some(preference - 1.0)),
        Some(other) => Err(row.error(
            "preference",
            format_args!("must be from 1 (the baseline wins) to 2 (the model wins), not {other}"),
        )),
    }
}

fn key(row: &Row, position: usize) -> Result<Key> {
    for field in ["instruction", "prompt"] {
        match row.fields.get(field) {
            None | Some(Value::Null) => {}
            Some(Value::String(text)) => return Ok(Key::Instruction(text.clone())),
            Some(other) => return Ok(Key::Instruction(other.to_string())),
        }
    }
    for field in ["prompt_id", "id", "index"] {
        match row.fields.get(field) {
            Some(Value::String(id)) => return Ok(Key::Id(id.clone())),
            Some(Value::Number(id)) => return Ok(Key::Id(id.to_string())),
            _ => {}
        }
    }
    Ok(Key::Position(position))
}

/// Holds all rows to the name that the first of them gave.
fn one_name(row: &Row, field: &str, name: &mut Option<String>) -> Result<()> {
    let Some(here) = row.opt_string(field)? else {
        return Ok(());
    };
    match name {
        None => *name = Some(here.to_owned()),
        Some(first) if first != here => {
            let message = format!(
                "is {here:?}, but {first:?} before: give one model against one baseline per file"
            );
            return Err(row.error(field, message));
        }
        Some(_) => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Annotations> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.json");
        std::fs::write(&file, text).unwrap();
        Annotations::read(&file, "dataset")
    }

    fn error(text: &str) -> String {
        let message = format!("{:#}", read(text).err().expect("an error"));
        let at = message.find("a.json").unwrap_or(0);
        message[at..].to_owned()
    }

    const ROW: &str = r#"{"instruction":"i","output_1":"äb","output_2":"abc","generator_1":"g","generator_2":"m","preference":1.25,"dataset":"d","annotator":"j"}"#;

    #[test]
    fn lists_and_lines_read_alike() {
        let other = ROW.replace("\"i\"", "\"k\"").replace("1.25", "null");
        for text in [format!("[{ROW},\n{other}]"), format!("{ROW}\n{other}\n")] {
            let got = read(&text).unwrap();
            assert_eq!(
                (got.baseline.as_deref(), got.name().as_str()),
                (Some("g"), "m")
            );
            assert_eq!(got.judges.iter().collect::<Vec<_>>(), ["j"]);
            assert_eq!(got.rows[0].lengths, [2.0, 3.0]);
            assert_eq!(got.rows[0].category.as_deref(), Some("d"));
            assert_eq!([got.rows[0].win, got.rows[1].win], [Some(0.25), None]);
            assert_eq!(got.rows[1].place.line, 2);
            assert_eq!(got.rows[1].key, Key::Instruction("k".into()));
            let remarks = got.remarks().join("; ");
            assert!(
                remarks.contains("1 of 2 rows have no judgment"),
                "{remarks}"
            );
            assert!(remarks.contains("constant"), "{remarks}");
        }
    }

    #[test]
    fn compact_rows_and_old_draws() {
        let got = read("{\"prompt_id\":4,\"len_1\":3,\"len_2\":0,\"preference\":0}\n").unwrap();
        assert_eq!(got.rows[0].lengths, [3.0, 0.0]);
        assert_eq!(
            (got.rows[0].win, got.rows[0].prompt_id),
            (Some(0.5), Some(4))
        );
        assert_eq!(got.name(), "a");
        assert_eq!(got.remarks(), ["1 of 1 outputs of the model are empty"]);
    }

    #[test]
    fn a_judge_that_goes_by_the_order_is_pointed_out() {
        let rows = |turned: [bool; 4]| {
            let row = |(i, turned): (usize, bool)| {
                format!(
                    "{{\"id\":{i},\"len_1\":1,\"len_2\":{i},\"preference\":1.5,\"turned\":{turned}}}\n"
                )
            };
            read(&turned.into_iter().enumerate().map(row).collect::<String>()).unwrap()
        };
        let bad = rows([true, true, false, false]);
        assert_eq!(bad.turned(), Some(0.5));
        assert!(
            bad.remarks()
                .concat()
                .contains("50% of the verdicts turned")
        );
        let good = rows([true, false, false, false]);
        assert_eq!(good.turned(), Some(0.25));
        assert!(!good.remarks().concat().contains("turned"));
        assert_eq!(read(ROW).unwrap().turned(), None);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_place() {
        let with = |from: &str, to: &str| ROW.replace(from, to);
        for (text, message) in [
            (
                with("1.25", "2.5"),
                "a.json:1: field \"preference\" must be from 1",
            ),
            (
                with("1.25", "\"x\""),
                "a.json:1: field \"preference\" must be a finite number",
            ),
            (
                with(",\"preference\":1.25", ""),
                "a.json:1: field \"preference\" is missing",
            ),
            (
                with("\"output_2\":\"abc\",", ""),
                "a.json:1: field \"output_2\" is missing, and so",
            ),
            (format!("{ROW}\n{ROW}"), "a.json:2: the same prompt as"),
            (
                format!("[{ROW},\n\n{}]", with("\"m\"", "\"n\"")),
                "a.json:3: field \"generator_2\" is \"n\", but \"m\" before",
            ),
            (format!("[{ROW},\n3]"), "a.json:2: not a JSON object"),
            ("[{]".into(), "a.json: not JSON"),
            (String::new(), "a.json: no annotations"),
        ] {
            let got = error(&text);
            assert!(got.starts_with(message), "{got}\nshould be {message}");
        }
    }
}
