//! What a length-controlled win rate takes besides annotations: instruction difficulties, regularisation rows, C.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use common::flags;
use common::jsonl::rows;
use common::metrics::length_control::{LengthModel, Regulariser};
use common::metrics::spread;
use common::metrics::win_rate::Judged;
use common::weights::dataset_file;

use crate::annotations::{Annotation, Annotations, Key};

/// The options that every command with a length-controlled win rate has.
#[derive(clap::Args, Clone, Debug)]
pub struct LengthControl {
    /// Take the difficulties and baselines of AlpacaEval 2 from the hub's data set tatsu-lab/alpaca_eval (fetched once; its
    /// data is CC BY-NC 4.0)
    #[arg(long, conflicts_with_all = ["difficulty", "baselines"])]
    pub alpaca_eval: bool,
    /// Instruction difficulties: CSV with `index` and `instruction_difficulty`, such as instruction_difficulty.csv of the
    /// data set tatsu-lab/alpaca_eval; without them, only length is controlled for
    #[arg(long, value_name = "FILE")]
    pub difficulty: Option<PathBuf>,
    /// The baseline prompted to be verbose and concise: CSV with `index`, `preference` (0 … 1) and `std_delta_len` or
    /// `variant`, `len_1`, `len_2`, such as df_gamed.csv of that data set
    #[arg(long, value_name = "FILE", requires = "difficulty")]
    pub baselines: Option<PathBuf>,
    /// What a row's difficulty is looked up by; by position, only in files that lack at most one prompt in a hundred
    #[arg(long, value_enum, default_value_t = DifficultyBy::Position)]
    pub difficulty_by: DifficultyBy,
    /// The prompts in the order of the difficulties (JSON Lines with `prompt`; `dataset` and the like serve --by)
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,
    /// Inverse strength of the penalty, instead of one by cross-validation
    #[arg(long, value_name = "C", value_parser = flags::positive::<f64>)]
    pub lc_c: Option<f64>,
    /// Resamples for the 95% intervals; 0 gives none
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub bootstrap: u64,
    /// Decides which rows are in which resample
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// How a row finds its difficulty.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum DifficultyBy {
    /// Its place in the file, as on AlpacaEval's leaderboard: wrong for all rows after a missing one
    Position,
    /// Its prompt: `prompt_id`, or the text found in --prompts
    Prompt,
}

impl DifficultyBy {
    pub fn name(self) -> &'static str {
        match self {
            Self::Position => "position",
            Self::Prompt => "prompt",
        }
    }
}

/// Where AlpacaEval keeps its difficulties (instruction_difficulty.csv) and baselines (df_gamed.csv).
const DATA_SET: &str = "tatsu-lab/alpaca_eval";

/// The files behind [`LengthControl`], read.
pub struct Covariates {
    by: DifficultyBy,
    /// By index; `None` where no file was given.
    difficulties: Option<HashMap<usize, f64>>,
    regularisers: Vec<Regulariser>,
    prompts: Prompts,
}

/// A model's pairs, ready for the regression that suits them.
pub struct Prepared {
    pub pairs: Vec<Judged>,
    pub model: LengthModel,
    pub remarks: Vec<String>,
}

impl LengthControl {
    /// Reads the files. `by` is the field that rows are grouped by.
    pub fn read(&self, by: &str) -> Result<Covariates> {
        let (difficulty, baselines) = match self.alpaca_eval {
            true => {
                let file = |name| {
                    dataset_file(DATA_SET, name)
                        .map(Some)
                        .context("--alpaca-eval")
                };
                (file("instruction_difficulty.csv")?, file("df_gamed.csv")?)
            }
            false => (self.difficulty.clone(), self.baselines.clone()),
        };
        let difficulties = difficulty.as_deref().map(difficulties).transpose()?;
        let regularisers = match (&baselines, &difficulties) {
            (Some(file), Some(difficulties)) => regularisers(file, difficulties)?,
            _ => vec![],
        };
        Ok(Covariates {
            by: self.difficulty_by,
            difficulties,
            regularisers,
            prompts: Prompts::read(self.prompts.as_deref(), by)?,
        })
    }
}

/// The baseline and the judge that AlpacaEval's difficulties and regularisation rows were measured with. (The first name
/// is that of the leaderboard's files, the second that of the outputs themselves.)
const BASELINES: [&str; 2] = ["gpt4_1106_preview", "gpt4_turbo"];
const JUDGE: &str = "weighted_alpaca_eval_gpt4_turbo";

impl Covariates {
    /// Gives the pairs their difficulties and chooses the form of the regression.
    ///
    /// # Errors
    /// `--difficulty-by prompt` with rows that do not say which prompt they are of.
    pub fn prepare(&self, annotations: &Annotations) -> Result<Prepared> {
        let mut remarks = annotations.remarks();
        let mut pairs: Vec<Judged> = annotations.rows.iter().map(unweighted).collect();
        let model = match self.of(annotations)? {
            Ok(found) => {
                for (pair, difficulty) in pairs.iter_mut().zip(found) {
                    pair.difficulty = difficulty;
                }
                remarks.extend(self.missing(pairs.len()));
                remarks.extend(assumptions(annotations));
                LengthModel::new(&self.regularisers)
            }
            Err(why) => {
                remarks.push(format!(
                    "{why}: the rate is controlled for length only, not comparable to AlpacaEval's leaderboard"
                ));
                LengthModel::length_only()
            }
        };
        Ok(Prepared {
            pairs,
            model,
            remarks,
        })
    }

    /// The rows' difficulties, or why they have none.
    fn of(&self, annotations: &Annotations) -> Result<Result<Vec<f64>, String>> {
        let Some(difficulties) = &self.difficulties else {
            return Ok(Err(
                "no instruction difficulties are given (--alpaca-eval, or --difficulty FILE)"
                    .into(),
            ));
        };
        let (rows, all) = (annotations.rows.len(), difficulties.len());
        // The leaderboard's own files lack at most 3 of 805. A file that lacks more is of other prompts, or of a part of these.
        if self.by == DifficultyBy::Position && rows + all / 100 < all {
            return Ok(Err(format!(
                "{rows} rows cannot be told by their places from {all} instruction difficulties \
                 (--difficulty-by prompt looks at their prompts)"
            )));
        }
        let mut found = vec![];
        for (position, row) in annotations.rows.iter().enumerate() {
            match difficulties.get(&self.index(position, row)?) {
                Some(difficulty) => found.push(*difficulty),
                None => {
                    return Ok(Err(format!(
                        "the {all} instruction difficulties do not cover these prompts"
                    )));
                }
            }
        }
        Ok(Ok(found))
    }

    /// What to say of difficulties that have no row.
    fn missing(&self, rows: usize) -> Option<String> {
        let all = self.difficulties.as_ref().map_or(0, HashMap::len);
        let consequence = match self.by {
            DifficultyBy::Position => {
                ": those after a gap get their neighbour's difficulty, as on the leaderboard; \
                 --difficulty-by prompt gives them their own"
            }
            DifficultyBy::Prompt => "",
        };
        let missing = all.saturating_sub(rows);
        (missing > 0).then(|| format!("{missing} of {all} rows are missing{consequence}"))
    }

    /// Every difficulty, for predictions from weights alone.
    ///
    /// # Errors
    /// No difficulties were given.
    pub fn all_difficulties(&self) -> Result<Vec<f64>> {
        let Some(difficulties) = &self.difficulties else {
            bail!(
                "--weights predicts from instruction difficulties: name them with --difficulty, or pass --alpaca-eval"
            )
        };
        let mut indexed: Vec<_> = difficulties.iter().collect();
        indexed.sort_by_key(|(index, _)| **index);
        Ok(indexed.into_iter().map(|(_, d)| *d).collect())
    }

    /// The group of a row: its own field, else that of its prompt.
    pub fn category(&self, row: &Annotation) -> Option<String> {
        row.category.clone().or_else(|| {
            let index = self.prompts.index(row)?;
            self.prompts.categories.get(index)?.clone()
        })
    }

    fn index(&self, position: usize, row: &Annotation) -> Result<usize> {
        match self.by {
            DifficultyBy::Position => Ok(position),
            DifficultyBy::Prompt => self.prompts.index(row).ok_or_else(|| {
                anyhow!(
                    "{}: --difficulty-by prompt needs a number in \"prompt_id\", or --prompts with this instruction",
                    row.place
                )
            }),
        }
    }
}

fn unweighted(row: &Annotation) -> Judged {
    Judged {
        len_1: row.lengths[0],
        len_2: row.lengths[1],
        win: row.win,
        difficulty: 0.0,
    }
}

/// What the difficulties take for granted and the annotations contradict.
fn assumptions(annotations: &Annotations) -> Vec<String> {
    let mut remarks = vec![];
    if let Some(baseline) = &annotations.baseline
        && !BASELINES.contains(&baseline.as_str())
    {
        remarks.push(format!(
            "the baseline is {baseline}; AlpacaEval's difficulties are those of {}: not comparable to its leaderboard",
            BASELINES[0]
        ));
    }
    for judge in annotations.judges.iter().filter(|judge| *judge != JUDGE) {
        remarks.push(format!(
            "the judge is {judge}; AlpacaEval's difficulties are those of {JUDGE}: not comparable to its leaderboard"
        ));
    }
    remarks
}

/// The prompts in the order of their indices, from `--prompts`.
#[derive(Default)]
struct Prompts {
    indices: HashMap<String, usize>,
    categories: Vec<Option<String>>,
}

impl Prompts {
    fn read(file: Option<&Path>, by: &str) -> Result<Self> {
        let mut prompts = Self::default();
        let Some(file) = file else {
            return Ok(prompts);
        };
        for row in rows(&[file.to_owned()]) {
            let row = row.context("--prompts")?;
            let field = ["prompt", "instruction"]
                .into_iter()
                .find(|field| row.fields.contains_key(*field))
                .unwrap_or("prompt");
            let text = row.string(field)?.to_owned();
            prompts.indices.insert(text, prompts.categories.len());
            let named = row.fields.contains_key(by);
            prompts
                .categories
                .push(named.then(|| crate::samples::name(&row, by)));
        }
        Ok(prompts)
    }

    fn index(&self, row: &Annotation) -> Option<usize> {
        row.prompt_id.or_else(|| match &row.key {
            Key::Instruction(text) => self.indices.get(text).copied(),
            _ => None,
        })
    }
}

/// A CSV file's records, by column name.
struct Table<'a> {
    file: &'a Path,
    columns: HashMap<String, usize>,
    records: Vec<csv::StringRecord>,
}

impl<'a> Table<'a> {
    fn read(file: &'a Path) -> Result<Self> {
        let wrong = || format!("cannot read {}", file.display());
        let mut reader = csv::Reader::from_path(file).with_context(wrong)?;
        let names = reader.headers().with_context(wrong)?.clone();
        let named = names.iter().map(|name| name.trim().to_owned());
        Ok(Self {
            file,
            columns: named.zip(0..).collect(),
            records: reader
                .records()
                .collect::<Result<_, _>>()
                .with_context(wrong)?,
        })
    }

    fn has(&self, column: &str) -> bool {
        self.columns.contains_key(column)
    }

    fn text(&self, record: &'a csv::StringRecord, column: &str) -> Result<&'a str> {
        let place = self.columns.get(column);
        let place = place
            .ok_or_else(|| anyhow!("{}: there is no column \"{column}\"", self.file.display()))?;
        Ok(record.get(*place).unwrap_or_default().trim())
    }

    fn number(&self, record: &'a csv::StringRecord, column: &str) -> Result<f64> {
        self.parse(record, column, "a number", |n: &f64| n.is_finite())
    }

    /// The number of a prompt. pandas may have made floats of them.
    fn index(&self, record: &'a csv::StringRecord, column: &str) -> Result<usize> {
        let whole = |n: &f64| *n >= 0.0 && n.fract() == 0.0 && *n < 1e15;
        let number = self.parse(record, column, "a whole number from 0", whole)?;
        Ok(number as usize)
    }

    fn parse(
        &self,
        record: &'a csv::StringRecord,
        column: &str,
        what: &str,
        fits: impl Fn(&f64) -> bool,
    ) -> Result<f64> {
        let text = self.text(record, column)?;
        text.parse().ok().filter(fits).ok_or_else(|| {
            let line = record.position().map_or(0, csv::Position::line);
            anyhow!(
                "{}:{line}: column \"{column}\" must be {what}, not {text:?}",
                self.file.display()
            )
        })
    }
}

fn difficulties(file: &Path) -> Result<HashMap<usize, f64>> {
    let table = Table::read(file).context("--difficulty")?;
    // pandas writes an index without a name.
    let index = if table.has("") && !table.has("index") {
        ""
    } else {
        "index"
    };
    let mut found = HashMap::new();
    for record in &table.records {
        let at = table.index(record, index)?;
        let difficulty = table.number(record, "instruction_difficulty")?;
        let before = found.insert(at, difficulty);
        ensure!(
            before.is_none_or(|before| before == difficulty),
            "{}: index {at} has two difficulties",
            file.display()
        );
    }
    ensure!(!found.is_empty(), "{}: no difficulties", file.display());
    Ok(found)
}

fn regularisers(file: &Path, difficulties: &HashMap<usize, f64>) -> Result<Vec<Regulariser>> {
    let table = Table::read(file).context("--baselines")?;
    let deltas = if table.has("len_1") && table.has("len_2") {
        standardised(&table)?
    } else {
        let scaled = table
            .records
            .iter()
            .map(|r| table.number(r, "std_delta_len"));
        scaled.collect::<Result<_>>()?
    };
    let rows = table.records.iter().zip(deltas);
    rows.map(|(record, std_delta_len)| {
        let index = table.index(record, "index")?;
        let difficulty = difficulties
            .get(&index)
            .with_context(|| format!("{}: index {index} has no difficulty", file.display()))?;
        let win = table.number(record, "preference")?;
        ensure!(
            (0.0..=1.0).contains(&win),
            "{}: column \"preference\" must be from 0 to 1, not {win}",
            file.display()
        );
        Ok(Regulariser {
            std_delta_len,
            difficulty: *difficulty,
            win,
        })
    })
    .collect()
}

/// len_1 − len_2 over its standard deviation within the row's variant.
fn standardised(table: &Table) -> Result<Vec<f64>> {
    let mut deltas: Vec<(&str, f64)> = vec![];
    for record in &table.records {
        let delta = table.number(record, "len_1")? - table.number(record, "len_2")?;
        deltas.push((table.text(record, "variant")?, delta));
    }
    let mut scales: HashMap<&str, f64> = HashMap::new();
    for (variant, _) in &deltas {
        if !scales.contains_key(variant) {
            let of = deltas.iter().filter(|(v, _)| v == variant);
            let all: Vec<f64> = of.map(|(_, delta)| *delta).collect();
            let scale = spread(&all).map_or(0.0, |s| s.standard_deviation);
            ensure!(
                scale > 0.0,
                "{}: all length differences of {variant:?} are equal",
                table.file.display()
            );
            scales.insert(variant, scale);
        }
    }
    Ok(deltas.iter().map(|(v, delta)| delta / scales[v]).collect())
}

#[cfg(test)]
mod tests {
    use crate::testing::{alpaca_eval, eval, models};
    use std::path::Path;

    fn write(dir: &Path, name: &str, text: &str) -> String {
        let path = dir.join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    }

    #[test]
    fn baselines_in_the_data_sets_own_form_give_the_same_rate() {
        let Some(data) = alpaca_eval() else { return };
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| data.join(name).display().to_string();
        // df_gamed.csv: one column of standardised differences, no lengths, pandas' floats and booleans.
        let shared = std::fs::read_to_string(data.join("gamed_baseline.csv")).unwrap();
        let rows = shared.lines().skip(1).map(|line| {
            let f: Vec<&str> = line.split(',').collect();
            format!("{},{},{},gpt4_{},False\n", f[1], f[5], f[4], f[0])
        });
        let head = "index,preference,std_delta_len,model,not_gamed_baseline\n";
        let gamed = write(
            dir.path(),
            "df_gamed.csv",
            &(head.to_owned() + &rows.collect::<String>()),
        );
        let (_, file, _) = models(&data).remove(0);
        let rate = |baselines: &str| {
            let difficulty = path("instruction_difficulty.csv");
            let words = [
                "--difficulty",
                &difficulty,
                "--baselines",
                baselines,
                "--bootstrap",
                "0",
                &file,
            ];
            eval("win-rate", words).unwrap()[0]["length_controlled_winrate"]
                .as_f64()
                .unwrap()
        };
        let (ours, theirs) = (rate(&path("gamed_baseline.csv")), rate(&gamed));
        assert!((ours - theirs).abs() < 1e-6, "{ours} {theirs}");
    }

    #[test]
    fn broken_files_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let row = "{\"index\":0,\"len_1\":1,\"len_2\":2,\"preference\":1.5}\n";
        let annotations = write(dir.path(), "a.jsonl", row);
        let good = write(dir.path(), "d.csv", ",instruction_difficulty\n0,0.5\n");
        for (difficulty, baselines, message) in [
            (
                "index,instruction_difficulty\n0,hard\n",
                "",
                ":2: column \"instruction_difficulty\" must be a number",
            ),
            (
                "index,difficulty\n0,1\n",
                "",
                "there is no column \"instruction_difficulty\"",
            ),
            (
                "index,instruction_difficulty\n0,1\n0,2\n",
                "",
                "index 0 has two difficulties",
            ),
            (
                "",
                "index,preference,std_delta_len\n4,0.5,1\n",
                "index 4 has no difficulty",
            ),
            (
                "",
                "index,preference,std_delta_len\n0,1.5,1\n",
                "must be from 0 to 1, not 1.5",
            ),
            (
                "",
                "variant,index,preference,len_1,len_2\na,0,0.5,1,2\n",
                "all length differences of \"a\" are equal",
            ),
        ] {
            let mut words = vec!["--difficulty".to_owned()];
            words.push(match difficulty {
                "" => good.clone(),
                text => write(dir.path(), "bad.csv", text),
            });
            if !baselines.is_empty() {
                words.extend([
                    "--baselines".to_owned(),
                    write(dir.path(), "bad.csv", baselines),
                ]);
            }
            words.push(annotations.clone());
            let err = eval("win-rate", words.iter().map(String::as_str)).unwrap_err();
            let line = format!("{err:#}");
            assert!(line.contains(message), "{line}");
        }
        let none = eval(
            "win-rate",
            [
                "--difficulty",
                &good,
                "--difficulty-by",
                "prompt",
                &annotations,
            ],
        );
        let line = format!("{:#}", none.unwrap_err());
        assert!(
            line.contains("a.jsonl:1: --difficulty-by prompt needs"),
            "{line}"
        );
    }

    #[test]
    fn prompts_that_no_difficulty_covers_are_controlled_for_length_alone() {
        let dir = tempfile::tempdir().unwrap();
        let row = |i: usize| {
            format!(
                "{{\"prompt_id\":{i},\"len_1\":10,\"len_2\":{},\"preference\":1.5}}\n",
                5 + i
            )
        };
        let annotations = write(dir.path(), "a.jsonl", &(0..9).map(row).collect::<String>());
        let difficulty = |count: usize| {
            let rows = (0..count).map(|i| format!("{i},0.5\n"));
            let table = "index,instruction_difficulty\n".to_owned() + &rows.collect::<String>();
            write(dir.path(), &format!("{count}.csv"), &table)
        };
        for (difficulties, by, form, warning) in [
            (
                2,
                "position",
                "minimal",
                "the 2 instruction difficulties do not cover",
            ),
            (
                2,
                "prompt",
                "minimal",
                "the 2 instruction difficulties do not cover",
            ),
            (9, "position", "noreg", ""),
            // Nine prompts of somebody's own are not the first nine of a hundred.
            (
                100,
                "position",
                "minimal",
                "9 rows cannot be told by their places from 100",
            ),
            (100, "prompt", "noreg", "91 of 100 rows are missing"),
        ] {
            let table = difficulty(difficulties);
            let words = [
                "--difficulty",
                &table,
                "--difficulty-by",
                by,
                "--bootstrap",
                "0",
                &annotations,
            ];
            let got = &eval("win-rate", words).unwrap()[0];
            assert_eq!(got["lc_form"], format!("length_controlled_{form}"));
            let warnings = got["warnings"].to_string();
            assert!(warnings.contains(warning), "{warnings}");
        }
    }
}
