//! `dice-eval win-rate`: AlpacaEval's leaderboard columns from a judge's annotations, with honest intervals.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use common::metrics::bootstrap::{interval, resample};
use common::metrics::length_control::{Form, Weights, controlled, is_extreme};
use common::metrics::win_rate::{Judged, WinRate, win_rate};
use common::program;
use common::progress::Progress;
use serde_json::{Map, Value, json, to_value};

use crate::annotations::Annotations;
use crate::covariates::{Covariates, LengthControl, Prepared};
use crate::format::{Line, NONE, To, number, points};
use crate::weights;

/// Win rate and length-controlled win rate of a model, as AlpacaEval publishes them
///
/// Reads pairwise annotations, AlpacaEval's annotations.json (a list) or the same rows as JSON Lines: "instruction",
/// "output_1", "output_2" (or their lengths in characters, "len_1" and "len_2"), "generator_1" (the baseline), "generator_2"
/// (the model) and "preference", from 1 (the baseline wins) to 2 (the model wins). Gives one row per file under the
/// leaderboard's column names, in percent, with 95% bootstrap intervals over prompts. The intervals refit the length model;
/// lc_standard_error, the leaderboard's, ignores that fit's uncertainty and is far too small.
///
/// The leaderboard's figure needs the instruction difficulties and the two regularisation baselines of the data set
/// tatsu-lab/alpaca_eval: --alpaca-eval fetches them, --difficulty and --baselines name files. On other prompts the rate is
/// controlled for length only ("lc_form": "length_controlled_minimal").
///
/// With --weights, predicts the rates of models of which only the three fitted weights are known.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  dice-eval win-rate --alpaca-eval annotations.json")]
pub struct Args {
    #[command(flatten)]
    control: LengthControl,
    /// Give rows for each value of this field of the annotations (or of --prompts), too
    #[arg(long, value_name = "FIELD")]
    by: Option<String>,
    /// Give rows for N bins of the difference in length, equally full, too
    #[arg(long, value_name = "N", default_value_t = 0)]
    length_bins: usize,
    /// Predict from stored weights instead of annotations: CSV as AlpacaEval keeps, or rows of this command
    #[arg(long, value_name = "FILE", conflicts_with_all = ["files", "by", "length_bins"])]
    weights: Option<PathBuf>,
    #[command(flatten)]
    to: To,
    /// Files of annotations, each of one model; `-` or none reads stdin
    #[arg(value_name = "FILE")]
    files: Vec<PathBuf>,
}

pub fn run(args: Args) -> Result<()> {
    let by = args.by.as_deref().unwrap_or_default();
    let covariates = args.control.read(by)?;
    if let Some(file) = &args.weights {
        return args.to.write(&weights::lines(file, &covariates)?);
    }
    let progress = Progress::new("annotations", None);
    let mut lines = vec![];
    let stdin = [PathBuf::from("-")];
    let files = if args.files.is_empty() {
        &stdin[..]
    } else {
        &args.files
    };
    for file in files {
        program::check()?;
        let annotations = Annotations::read(file, by)?;
        progress.add(annotations.rows.len() as u64, 0);
        let mut groups = vec![Group::all(&annotations)];
        if args.by.is_some() {
            groups.extend(categories(&annotations, &covariates, by));
        }
        groups.extend(length_bins(&annotations, args.length_bins));
        let fitted = Fitted::new(&annotations, &covariates, &args.control)?;
        let found = fitted.lines(&annotations, &groups, &args.control)?;
        lines.extend(found);
        if let Some(c) = fitted.c {
            let origin = match args.control.lc_c {
                Some(_) => "given",
                None => "by cross-validation",
            };
            progress.note(format!("{}: C {c:.6} {origin}", annotations.name()));
        }
    }
    progress.finish();
    args.to.write(&lines)
}

/// Points that the penalty may move a rate by without a word; on AlpacaEval's 805 prompts it is some tenths.
const MUCH_PULLED: f64 = 1.0;

/// A model's length-controlled regression.
pub struct Fitted {
    pub prepared: Prepared,
    /// `None` for the baseline itself, which is not fitted: 50% by definition.
    pub c: Option<f64>,
    pub weights: Weights,
}

impl Fitted {
    /// Fits the form that the data allows.
    ///
    /// # Errors
    /// No row has a judgment.
    pub fn new(
        annotations: &Annotations,
        covariates: &Covariates,
        control: &LengthControl,
    ) -> Result<Self> {
        let prepared = covariates.prepare(annotations)?;
        Self::of(prepared, annotations, control)
    }

    /// Fits prepared pairs.
    pub fn of(
        prepared: Prepared,
        annotations: &Annotations,
        control: &LengthControl,
    ) -> Result<Self> {
        ensure!(
            prepared.pairs.iter().any(|pair| pair.win.is_some()),
            "{}: no row has a judgment: every \"preference\" is null",
            annotations.file
        );
        let c = (!annotations.is_baseline()).then(|| {
            let model = &prepared.model;
            control
                .lc_c
                .unwrap_or_else(|| model.choose_c(&prepared.pairs))
        });
        let fit = |c| prepared.model.fit(&prepared.pairs, c);
        let weights = c.map_or(Weights::default(), fit);
        Ok(Self {
            prepared,
            c,
            weights,
        })
    }

    /// The weights where pair i counts `counts[i]` times, at the same C.
    pub fn refit(&self, counts: &[f64]) -> Weights {
        let Prepared { pairs, model, .. } = &self.prepared;
        let fit = |c| model.fit_counted(pairs, counts, c, &self.weights);
        self.c.map_or(Weights::default(), fit)
    }

    pub fn pairs(&self) -> &[Judged] {
        &self.prepared.pairs
    }

    pub fn form(&self) -> Form {
        self.prepared.model.form()
    }

    fn lines(
        &self,
        annotations: &Annotations,
        groups: &[Group],
        control: &LengthControl,
    ) -> Result<Vec<Line>> {
        let resamples = resample(
            self.pairs().len(),
            control.bootstrap,
            control.seed,
            |counts| {
                let weights = self.refit(counts);
                let rates = groups
                    .iter()
                    .map(|g| rates(self.pairs(), g, counts, &weights));
                Some(rates.collect::<Vec<_>>())
            },
        );
        let lines = groups.iter().enumerate().map(|(at, group)| {
            let over = |which: usize| {
                let values = resamples
                    .iter()
                    .filter_map(|rates| rates[at].map(|r| r[which]));
                interval(values)
            };
            self.line(annotations, group, [over(0), over(1)], control)
        });
        lines.collect()
    }

    fn line(
        &self,
        annotations: &Annotations,
        group: &Group,
        [raw_interval, lc_interval]: [Option<[f64; 2]>; 2],
        control: &LengthControl,
    ) -> Result<Line> {
        let pairs: Vec<Judged> = group.members.iter().map(|&i| self.pairs()[i]).collect();
        let raw = win_rate(&pairs);
        let (lc, lc_error) = controlled(&self.weights, pairs.iter().map(|p| p.difficulty))
            .context("an empty group")?;
        let mut json = Map::new();
        let model = annotations.name();
        json.insert("model".into(), json!(model));
        json.insert("baseline".into(), json!(annotations.baseline));
        json.insert("group".into(), json!(group.name));
        leaderboard(&mut json, raw, lc, lc_error)?;
        for (name, interval) in [
            ("win_rate", raw_interval),
            ("length_controlled", lc_interval),
        ] {
            json.insert(format!("{name}_low"), json!(interval.map(|i| i[0])));
            json.insert(format!("{name}_high"), json!(interval.map(|i| i[1])));
        }
        if group.whole {
            json.insert("lc_form".into(), to_value(self.form())?);
            json.insert("lc_c".into(), json!(self.c));
            json.insert("glm_weights".into(), to_value(self.weights)?);
            if self.form() != Form::LengthOnly {
                json.insert("difficulty_by".into(), json!(control.difficulty_by.name()));
            }
            if let Some(turned) = annotations.turned() {
                json.insert("turned".into(), json!(turned));
            }
            let warnings = self.warnings(raw, lc);
            for warning in &warnings {
                program::say(format_args!("{}: {warning}", annotations.file));
            }
            json.insert("warnings".into(), json!(warnings));
        }
        let cells = vec![
            ("model", model),
            ("group", group.name.clone()),
            ("win rate", points(raw.map(|r| r.win_rate), raw_interval, 2)),
            ("length-controlled", points(Some(lc), lc_interval, 2)),
            (
                "C",
                if group.whole {
                    number(self.c, 4)
                } else {
                    String::new()
                },
            ),
            ("wins", raw.map_or(0, |r| r.n_wins).to_string()),
            ("losses", raw.map_or(0, |r| r.n_wins_base).to_string()),
            ("draws", raw.map_or(0, |r| r.n_draws).to_string()),
            ("judged", raw.map_or(0, |r| r.n_total).to_string()),
            (
                "average length",
                raw.map_or_else(|| NONE.to_owned(), |r| r.avg_length.to_string()),
            ),
        ];
        Ok(Line { json, cells })
    }

    /// Says so where the penalty, not the data, makes the rate: it pulls towards 50% by some 100 / (C n) points of n pairs.
    /// The interval is fitted at the same C and does not know.
    pub fn pull_of_penalty(&self) -> Option<String> {
        let c = self.c?;
        let Prepared { pairs, model, .. } = &self.prepared;
        if self.weights.psi_model == 0.0 {
            return Some(format!(
                "the penalty at C = {c} leaves the model no weight: its length-controlled rate says nothing, nor does the \
                 interval; judge more prompts, or choose --lc-c"
            ));
        }
        let rate = |weights: &Weights| controlled(weights, pairs.iter().map(|p| p.difficulty));
        let (free, _) = rate(&model.fit_freely(pairs))?;
        let (held, _) = rate(&self.weights)?;
        ((free - held).abs() > MUCH_PULLED).then(|| {
            format!(
                "the penalty at C = {c} moves the length-controlled rate from {free:.1} to {held:.1}, which the interval does not \
                 know; judge more prompts, or choose --lc-c"
            )
        })
    }

    fn warnings(&self, raw: Option<WinRate>, lc: f64) -> Vec<String> {
        let mut warnings = self.prepared.remarks.clone();
        warnings.extend(self.pull_of_penalty());
        if let Some(raw) = raw.filter(|raw| is_extreme(raw.win_rate, lc)) {
            warnings.push(format!(
                "the length-controlled rate {lc:.1} is far from the raw {:.1}: the length model may not fit these outputs",
                raw.win_rate
            ));
        }
        warnings
    }
}

/// The leaderboard's columns, in its order.
fn leaderboard(
    json: &mut Map<String, Value>,
    raw: Option<WinRate>,
    lc: f64,
    lc_error: f64,
) -> Result<()> {
    let Value::Object(columns) = raw.map_or(Ok(json!({})), to_value)? else {
        unreachable!("a struct is an object")
    };
    for (name, value) in columns {
        json.insert(name.clone(), value);
        if name == "standard_error" {
            json.insert("length_controlled_winrate".into(), json!(lc));
            json.insert("lc_standard_error".into(), json!(lc_error));
        }
    }
    Ok(())
}

/// Raw and length-controlled win rate (percent) of a group where pair i counts `counts[i]` times; `None` where none of it
/// was drawn.
fn rates(pairs: &[Judged], group: &Group, counts: &[f64], weights: &Weights) -> Option<[f64; 2]> {
    let (mut wins, mut judged, mut predicted, mut all) = (0.0, 0.0, 0.0, 0.0);
    for &i in &group.members {
        let (pair, count) = (&pairs[i], counts[i]);
        if count == 0.0 {
            continue;
        }
        if let Some(win) = pair.win {
            wins += count * win;
            judged += count;
        }
        predicted += count * weights.predict(pair.difficulty);
        all += count;
    }
    (judged > 0.0).then(|| [100.0 * wins / judged, 100.0 * predicted / all])
}

/// Some of a file's rows, by their positions.
struct Group {
    name: String,
    members: Vec<usize>,
    whole: bool,
}

impl Group {
    fn all(annotations: &Annotations) -> Self {
        Self {
            name: "all".into(),
            members: (0..annotations.rows.len()).collect(),
            whole: true,
        }
    }

    fn part(name: String) -> Self {
        Self {
            name,
            members: vec![],
            whole: false,
        }
    }
}

fn categories(annotations: &Annotations, covariates: &Covariates, by: &str) -> Vec<Group> {
    let mut groups: Vec<Group> = vec![];
    for (i, row) in annotations.rows.iter().enumerate() {
        let name = covariates
            .category(row)
            .unwrap_or_else(|| format!("no {by}"));
        let at = groups.iter().position(|group| group.name == name);
        let at = at.unwrap_or_else(|| {
            groups.push(Group::part(name));
            groups.len() - 1
        });
        groups[at].members.push(i);
    }
    groups.sort_by(|a, b| a.name.cmp(&b.name));
    groups
}

/// Bins of len_2 − len_1 with equal numbers of rows, equal differences in one bin.
fn length_bins(annotations: &Annotations, bins: usize) -> Vec<Group> {
    let rows = &annotations.rows;
    let delta = |i: usize| rows[i].lengths[1] - rows[i].lengths[0];
    let mut order: Vec<usize> = (0..rows.len()).collect();
    order.sort_by(|&a, &b| delta(a).total_cmp(&delta(b)));
    let mut groups: Vec<Group> = vec![];
    let mut rest = &order[..];
    for left in (1..=bins).rev() {
        let mut size = rest.len().div_ceil(left);
        while size > 0 && size < rest.len() && delta(rest[size]) == delta(rest[size - 1]) {
            size += 1;
        }
        let (bin, after) = rest.split_at(size);
        rest = after;
        if let (Some(&first), Some(&last)) = (bin.first(), bin.last()) {
            let name = format!("longer by {} … {}", delta(first), delta(last));
            let mut members = bin.to_vec();
            members.sort_unstable();
            groups.push(Group {
                members,
                ..Group::part(name)
            });
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{alpaca_eval, eval, models};

    fn near(got: &Value, expected: f64, tolerance: f64) {
        let value = got.as_f64().unwrap_or_else(|| panic!("{got} is no number"));
        assert!((value - expected).abs() <= tolerance, "{value} {expected}");
    }

    fn full(data: &std::path::Path) -> Vec<String> {
        let path = |name: &str| data.join(name).display().to_string();
        let words = [
            "--difficulty",
            &path("instruction_difficulty.csv"),
            "--baselines",
            &path("gamed_baseline.csv"),
        ];
        words.map(String::from).to_vec()
    }

    fn win_rate(words: &[String], more: &[&str]) -> Vec<Value> {
        let all = words.iter().map(String::as_str).chain(more.iter().copied());
        eval("win-rate", all).unwrap()
    }

    #[test]
    fn raw_figures_are_the_published_ones() {
        let Some(data) = alpaca_eval() else { return };
        for (name, file, expected) in models(&data) {
            let got = &win_rate(&[file], &["--bootstrap", "0", "--lc-c", "1"])[0];
            let published = &expected["published"];
            for column in ["win_rate", "standard_error", "discrete_win_rate"] {
                near(&got[column], published[column].as_f64().unwrap(), 1e-9);
            }
            for column in ["n_wins", "n_wins_base", "n_draws", "n_total"] {
                assert_eq!(got[column], published[column], "{name} {column}");
            }
            assert_eq!(got["avg_length"], expected["recomputed"]["avg_length"]);
        }
    }

    #[test]
    fn the_optimum_at_a_given_c_is_exact() {
        let Some(data) = alpaca_eval() else { return };
        let mut checked = 0;
        for (name, file, expected) in models(&data) {
            let by_c = expected["recomputed"]["exact_optimum_by_C"]
                .as_object()
                .unwrap();
            for (c, optimum) in by_c {
                let mut words = full(&data);
                words.push(file.clone());
                let got = &win_rate(&words, &["--bootstrap", "0", "--lc-c", c])[0];
                for column in ["length_controlled_winrate", "lc_standard_error"] {
                    near(&got[column], optimum[column].as_f64().unwrap(), 1e-5);
                }
                let weights = got["glm_weights"].as_object().unwrap().values();
                for (got, expected) in weights.zip(optimum["glm_weights"].as_array().unwrap()) {
                    near(got, expected.as_f64().unwrap(), 1e-6);
                }
                assert_eq!(got["lc_form"], "length_controlled", "{name}");
                checked += 1;
            }
        }
        assert!(checked >= 8 * 5, "{checked}");
    }

    #[test]
    fn the_published_rate_comes_out() {
        let Some(data) = alpaca_eval() else { return };
        for (name, file, expected) in models(&data) {
            let published = expected["published"]["length_controlled_winrate"]
                .as_f64()
                .unwrap();
            let mut words = full(&data);
            words.push(file.clone());
            let c = expected["recomputed"]["same_C_as_published"]["C"].to_string();
            let got = &win_rate(&words, &["--bootstrap", "0", "--lc-c", &c])[0];
            near(&got["length_controlled_winrate"], published, 0.02);
            // C by cross-validation: the published choice is partly noise.
            let got = &win_rate(&words, &["--bootstrap", "0"])[0];
            near(&got["length_controlled_winrate"], published, 0.15);
            let choice = &expected["recomputed"]["cv_choice_exact_solver"]["C"];
            near(
                &got["lc_c"],
                choice.as_f64().unwrap(),
                1e-6 * choice.as_f64().unwrap(),
            );
            assert!(got["lc_c"].as_f64().unwrap() > 1.0, "{name}");
        }
    }

    #[test]
    fn the_forms_without_regularisation_rows() {
        let Some(data) = alpaca_eval() else { return };
        for (name, file, expected) in models(&data) {
            for (form, words) in [
                ("length_controlled_noreg", &full(&data)[..2]),
                ("length_controlled_minimal", &[]),
            ] {
                let variant = &expected["recomputed"]["variants_reference_implementation"][form];
                let mut words = words.to_vec();
                words.push(file.clone());
                let c = variant["C"].to_string();
                let got = &win_rate(&words, &["--bootstrap", "0", "--lc-c", &c])[0];
                assert_eq!(got["lc_form"], form, "{name}");
                // liblinear stops at its tolerance, which leaves collinear weights 0.13 points away.
                let rate = variant["length_controlled_winrate"].as_f64().unwrap();
                near(&got["length_controlled_winrate"], rate, 0.15);
            }
        }
    }

    #[test]
    fn intervals_know_the_uncertainty_of_the_fit() {
        let Some(data) = alpaca_eval() else { return };
        let (_, file, _) = models(&data).remove(0);
        let mut words = full(&data);
        words.push(file);
        let got = &win_rate(&words, &["--bootstrap", "200"])[0];
        let width = |name: &str| {
            got[format!("{name}_high")].as_f64().unwrap()
                - got[format!("{name}_low")].as_f64().unwrap()
        };
        // Over 805 prompts both are about four standard errors of the raw rate, 1.34 points.
        assert!((4.0..7.0).contains(&width("win_rate")), "{got}");
        assert!((3.5..8.0).contains(&width("length_controlled")), "{got}");
        assert!(
            width("length_controlled") > 1.2 * 4.0 * got["lc_standard_error"].as_f64().unwrap()
        );
        assert_eq!(
            *got,
            win_rate(&words, &["--bootstrap", "200"])[0],
            "same seed"
        );
    }

    #[test]
    fn categories_and_bins_part_the_rows() {
        let Some(data) = alpaca_eval() else { return };
        let (_, file, _) = models(&data).remove(0);
        let mut words = full(&data);
        let prompts = data.join("prompts.jsonl").display().to_string();
        words.extend([file, "--prompts".into(), prompts]);
        let got = win_rate(
            &words,
            &["--by", "dataset", "--length-bins", "4", "--bootstrap", "20"],
        );
        let total = |rows: &[Value]| -> u64 {
            rows.iter()
                .map(|row| row["n_total"].as_u64().unwrap())
                .sum()
        };
        let categories: Vec<_> = got.iter().map(|r| r["group"].as_str().unwrap()).collect();
        assert_eq!(
            categories[..6],
            [
                "all",
                "helpful_base",
                "koala",
                "oasst",
                "selfinstruct",
                "vicuna"
            ]
        );
        assert_eq!(got.len(), 10);
        assert_eq!([total(&got[1..6]), total(&got[6..])], [805, 805]);
        assert!(got[1..].iter().all(|row| row["win_rate_low"].is_number()));
        let sizes: Vec<_> = got[6..]
            .iter()
            .map(|r| r["n_total"].as_u64().unwrap())
            .collect();
        assert!(sizes.iter().all(|n| (195..=208).contains(n)), "{sizes:?}");
    }

    #[test]
    fn missing_rows_shift_difficulties_only_by_position() {
        let Some(data) = alpaca_eval() else { return };
        let file = data
            .join("annotations/text_davinci_001.jsonl")
            .display()
            .to_string();
        let mut words = full(&data);
        words.push(file);
        let rate = |more: &[&str]| {
            let got = win_rate(
                &words,
                &[&["--bootstrap", "0", "--lc-c", "21.54"], more].concat(),
            );
            assert!(
                got[0]["warnings"][0]
                    .as_str()
                    .unwrap()
                    .starts_with("2 of 805 rows are missing")
            );
            got[0]["length_controlled_winrate"].as_f64().unwrap()
        };
        let moved = (rate(&[]) - rate(&["--difficulty-by", "prompt"])).abs();
        assert!(moved > 1.0 && moved < 4.0, "{moved}");
    }

    #[test]
    fn the_baseline_itself_is_half() {
        let row = |i: u32| {
            json!({"instruction": i.to_string(), "output_1": "a", "output_2": "a", "generator_1": "g",
                "generator_2": "g", "preference": 1.5})
        };
        let rows: String = (0..5).map(|i| format!("{}\n", row(i))).collect();
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.jsonl");
        std::fs::write(&file, rows).unwrap();
        let got = &win_rate(&[file.display().to_string()], &[])[0];
        near(&got["length_controlled_winrate"], 50.0, 0.0);
        near(&got["length_controlled_high"], 50.0, 0.0);
        assert_eq!((&got["lc_c"], &got["n_draws"]), (&Value::Null, &json!(5)));
        let warnings = got["warnings"].to_string();
        for warning in ["word for word", "constant", "controlled for length only"] {
            assert!(warnings.contains(warning), "{warnings}");
        }
    }

    #[test]
    fn a_fit_that_the_penalty_swallowed_is_pointed_out() {
        let row = |i: u32| json!({"instruction": i.to_string(), "len_1": 10, "len_2": 9 + i, "preference": 1 + i % 2});
        let rows: String = (0..4).map(|i| format!("{}\n", row(i))).collect();
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.jsonl");
        std::fs::write(&file, rows).unwrap();
        let file = [file.display().to_string()];
        let said = |more: &[&str]| win_rate(&file, more)[0]["warnings"].to_string();
        assert!(said(&["--lc-c", "0.0001"]).contains("leaves the model no weight"));
        assert!(!said(&["--lc-c", "1000"]).contains("penalty"));
    }

    #[test]
    fn a_rate_that_the_penalty_makes_is_pointed_out() {
        // 30 of 40 won at equal lengths: 75%, but for a penalty that pulls by some 100 / (0.5 · 40) points.
        let row = |i: u32| json!({"instruction": i.to_string(), "len_1": 10, "len_2": 10, "preference": if i < 30 { 2 } else { 1 }});
        let rows: String = (0..40).map(|i| format!("{}\n", row(i))).collect();
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.jsonl");
        std::fs::write(&file, rows).unwrap();
        let file = [file.display().to_string()];
        let said = |c: &str| {
            win_rate(&file, &["--bootstrap", "0", "--lc-c", c])[0]["warnings"].to_string()
        };
        let pulled = said("0.5");
        assert!(
            pulled.contains("moves the length-controlled rate from 75.0 to 70.0"),
            "{pulled}"
        );
        assert!(!said("20").contains("penalty"));
    }

    #[test]
    fn other_baselines_and_judges_are_pointed_out() {
        let Some(data) = alpaca_eval() else { return };
        let row = |i: usize| {
            json!({"instruction": i.to_string(), "output_1": "a", "output_2": "ab".repeat(i % 30), "generator_1": "base",
                "generator_2": "m", "preference": 1.0 + (i % 3) as f64 / 2.0, "annotator": "mine"})
        };
        let rows: Vec<Value> = (0..805).map(row).collect();
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.json");
        std::fs::write(&file, json!(rows).to_string()).unwrap();
        let mut words = full(&data);
        words.push(file.display().to_string());
        let warnings = win_rate(&words, &["--bootstrap", "0"])[0]["warnings"].to_string();
        for warning in [
            "the baseline is base",
            "the judge is mine",
            "27 of 805 outputs of the model are empty",
        ] {
            assert!(warnings.contains(warning), "{warnings}");
        }
    }
}
