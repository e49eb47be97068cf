//! Figures as JSON rows, as a Markdown table or as CSV: one table, whose rows are groups.

use std::path::PathBuf;

use anyhow::{Context, Result};
use common::metrics::{Estimate, Spread};
use common::run::write_whole;
use serde_json::{Map, Value};

/// Where figures go, and in which form.
#[derive(clap::Args, Clone, Debug)]
pub struct To {
    /// The form of the figures
    #[arg(long, value_enum, default_value_t = Format::Json)]
    format: Format,
    /// Write to FILE instead of stdout; an existing FILE is replaced. FILE.run.json says what made it
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// One JSON object per group, a line each
    Json,
    /// A table to read
    Markdown,
    /// A table for spreadsheets, with all figures
    Csv,
}

/// A group's figures: all of them for programs, the telling ones for readers.
pub struct Line {
    pub json: Map<String, Value>,
    /// (column, what stands in it)
    pub cells: Vec<(&'static str, String)>,
}

impl To {
    /// Writes the figures of all groups.
    pub fn write(&self, lines: &[Line]) -> Result<()> {
        let text = match self.format {
            Format::Json => json(lines)?,
            Format::Markdown => markdown(lines),
            Format::Csv => csv(lines)?,
        };
        write_whole(self.output.as_deref(), text.as_bytes())
    }
}

fn json(lines: &[Line]) -> Result<String> {
    let mut text = String::new();
    for line in lines {
        text += &serde_json::to_string(&line.json)?;
        text.push('\n');
    }
    Ok(text)
}

fn markdown(lines: &[Line]) -> String {
    let Some(first) = lines.first() else {
        return String::new();
    };
    let row = |cells: Vec<&str>| format!("| {} |\n", cells.join(" | "));
    let heads: Vec<&str> = first.cells.iter().map(|(head, _)| *head).collect();
    let rule = format!("|---{}|\n", "|--:".repeat(heads.len() - 1));
    let body = lines.iter().map(|line| {
        // A group's name may hold what would end the cell.
        let cells: Vec<String> = line
            .cells
            .iter()
            .map(|(_, cell)| cell.replace('|', "\\|").replace(['\n', '\r'], " "))
            .collect();
        row(cells.iter().map(String::as_str).collect())
    });
    row(heads) + &rule + &body.collect::<String>()
}

/// All figures: a column for each, those of an object named by its path (`accuracy.low`).
fn csv(lines: &[Line]) -> Result<String> {
    let flat: Vec<_> = lines.iter().map(|line| flatten(&line.json)).collect();
    let mut columns: Vec<&str> = vec![];
    for (name, _) in flat.iter().flatten() {
        if !columns.contains(&name.as_str()) {
            columns.push(name);
        }
    }
    let mut writer = csv::Writer::from_writer(vec![]);
    writer.write_record(&columns)?;
    for cells in &flat {
        let cell = |column: &&str| cells.iter().find(|(name, _)| name == column);
        writer.write_record(columns.iter().map(|c| cell(c).map_or("", |(_, text)| text)))?;
    }
    String::from_utf8(writer.into_inner()?).context("text became bytes")
}

fn flatten(fields: &Map<String, Value>) -> Vec<(String, String)> {
    let cells = fields.iter().flat_map(|(name, value)| match value {
        Value::Object(inner) => flatten(inner)
            .into_iter()
            .map(|(below, text)| (format!("{name}.{below}"), text))
            .collect(),
        other => vec![(name.clone(), cell(other))],
    });
    cells.collect()
}

fn cell(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        Value::Array(items) => items.iter().map(cell).collect::<Vec<_>>().join("; "),
        other => other.to_string(),
    }
}

/// What stands where there is no figure.
pub const NONE: &str = "–";

/// A share with its interval, in percent.
pub fn percent(share: Option<Estimate>) -> String {
    share.map_or(NONE.into(), |e| {
        format!(
            "{:.1}% ({:.1}–{:.1})",
            100.0 * e.value,
            100.0 * e.low,
            100.0 * e.high
        )
    })
}

/// A value with its interval.
pub fn estimate(value: Option<Estimate>) -> String {
    value.map_or(NONE.into(), |e| {
        format!("{:.3} ({:.3} … {:.3})", e.value, e.low, e.high)
    })
}

/// A plain figure.
pub fn number(value: Option<f64>, decimals: usize) -> String {
    value.map_or(NONE.into(), |v| format!("{v:.decimals$}"))
}

/// A percentage with its interval, where there is one.
pub fn points(value: Option<f64>, interval: Option<[f64; 2]>, decimals: usize) -> String {
    match (value, interval) {
        (None, _) => NONE.into(),
        (Some(value), None) => format!("{value:.decimals$}"),
        (Some(value), Some([low, high])) => {
            format!("{value:.decimals$} ({low:.decimals$} … {high:.decimals$})")
        }
    }
}

/// A figure of any magnitude, to so many digits that count.
pub fn significant(value: Option<f64>, digits: i32) -> String {
    let decimals = |v: f64| match v {
        0.0 => 0,
        v => (digits - 1 - v.abs().log10().floor() as i32).max(0) as usize,
    };
    value.map_or(NONE.into(), |v| format!("{v:.*}", decimals(v)))
}

/// Mean of a spread.
pub fn average(spread: Option<Spread>) -> String {
    number(spread.map(|s| s.mean), 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn tables_survive_names_that_would_break_them() {
        let line = |name: &str, n: &str| Line {
            json: Map::from_iter([("group".to_owned(), json!(name))]),
            cells: vec![("group", name.into()), ("pairs", n.into())],
        };
        let lines = [line("all", "3"), line("a|b\nc", "1")];
        assert_eq!(
            markdown(&lines),
            "| group | pairs |\n|---|--:|\n| all | 3 |\n| a\\|b c | 1 |\n"
        );
        assert_eq!(
            json(&lines).unwrap(),
            "{\"group\":\"all\"}\n{\"group\":\"a|b\\nc\"}\n"
        );
    }

    #[test]
    fn csv_has_every_figure_of_every_line() {
        let line = |json: Value| Line {
            json: json.as_object().unwrap().clone(),
            cells: vec![],
        };
        let lines = [
            line(json!({"group": "a, b", "rate": {"value": 0.5, "low": null}})),
            line(json!({"group": "c", "warnings": ["x", "y"]})),
        ];
        assert_eq!(
            csv(&lines).unwrap(),
            "group,rate.value,rate.low,warnings\n\"a, b\",0.5,,\nc,,,x; y\n"
        );
    }

    #[test]
    fn absent_figures_are_a_dash() {
        let half = Estimate {
            value: 0.5,
            low: 0.25,
            high: 0.75,
        };
        assert_eq!(percent(Some(half)), "50.0% (25.0–75.0)");
        assert_eq!(estimate(Some(half)), "0.500 (0.250 … 0.750)");
        assert_eq!(
            [percent(None), estimate(None), number(None, 2)],
            [NONE; 3].map(String::from)
        );
    }

    #[test]
    fn digits_that_count() {
        for (value, text) in [
            (0.0019939, "0.00199"),
            (-12.345, "-12.3"),
            (1234.5, "1234"),
            (0.0, "0"),
            (1.0, "1.00"),
        ] {
            assert_eq!(significant(Some(value), 3), text);
        }
    }
}
