//! What a tool says of its work: a bar while it is at it, where somebody sees it, and one line at the end.

use std::fmt;
use std::io::{self, IsTerminal};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};

use crate::program::{name, one_line, say};

/// What a tool has done so far: a bar with rate and remaining time where stderr is a terminal,
/// and one summary line at the end everywhere. All methods take `&self`, from any thread.
pub struct Progress {
    unit: String,
    started: Instant,
    bar: ProgressBar,
    counts: Mutex<Counts>,
}

#[derive(Clone, Default)]
struct Counts {
    read: Option<u64>,
    kept: u64,
    done: u64,
    tokens: u64,
    /// In the order of first appearance.
    skipped: Vec<(String, u64)>,
    notes: Vec<String>,
}

impl Progress {
    /// `unit` is the plural noun of what `add` counts ("rows", "prompts", "steps"); `total` of them, when known.
    pub fn new(unit: &str, total: Option<u64>) -> Self {
        let bar = if io::stderr().is_terminal() {
            ProgressBar::with_draw_target(total, ProgressDrawTarget::stderr_with_hz(5))
        } else {
            ProgressBar::hidden()
        };
        let template = match total {
            Some(_) => format!(
                "{{prefix}} {{wide_bar}} {{pos}}/{{len}} {unit} {{msg}} {{rate}} ETA {{eta}}"
            ),
            None => {
                format!("{{prefix}} {{spinner}} {{pos}} {unit} {{msg}} {{rate}} {{elapsed}}")
            }
        };
        let style = ProgressStyle::with_template(&template);
        let style = style.expect("the templates above are valid: a test makes them");
        bar.set_style(
            style.with_key("rate", |state: &ProgressState, to: &mut dyn fmt::Write| {
                let _ = write!(to, "{:.1}/s", state.per_sec());
            }),
        );
        bar.set_prefix(name().to_owned());
        Self {
            unit: unit.to_owned(),
            started: Instant::now(),
            bar,
            counts: Mutex::default(),
        }
    }

    /// Counts input rows, where they differ from what `add` counts.
    pub fn read(&self, rows: u64) {
        let mut counts = self.counts();
        *counts.read.get_or_insert(0) += rows;
        self.show(&counts);
    }

    /// Counts rows (or whatever `unit` is) done, and the tokens that they took.
    pub fn add(&self, rows: u64, tokens: u64) {
        let mut counts = self.counts();
        counts.done += rows;
        counts.tokens += tokens;
        self.show(&counts);
        self.bar.inc(rows);
    }

    /// Counts units that an earlier run had done: they move the bar, not the rate.
    pub fn kept(&self, rows: u64) {
        self.counts().kept += rows;
        self.bar.inc(rows);
        self.bar.reset_eta();
    }

    /// Counts `n` left out for a reason ("too short"). Zero is not mentioned.
    pub fn skip(&self, reason: &str, n: u64) {
        if n == 0 {
            return;
        }
        let mut counts = self.counts();
        match counts.skipped.iter_mut().find(|(r, _)| r == reason) {
            Some((_, count)) => *count += n,
            None => counts.skipped.push((reason.to_owned(), n)),
        }
    }

    /// Says what is wrong with one row (or prompt, or step) and counts it as left out for a reason ("too long").
    pub fn leave_out(&self, reason: &str, err: anyhow::Error) {
        self.say(format_args!("{}; left out", one_line(&err)));
        self.skip(reason, 1);
    }

    /// Adds a remark to the summary line ("alpha 0.0031").
    pub fn note(&self, text: impl Into<String>) {
        self.counts().notes.push(text.into());
    }

    /// Says one line on stderr now, above the bar.
    pub fn say(&self, line: impl fmt::Display) {
        self.bar.suspend(|| say(line));
    }

    /// Clears the bar and says the summary line.
    pub fn finish(self) {
        self.bar.finish_and_clear();
        let line = self.summary(self.started.elapsed());
        say(line);
    }

    fn summary(&self, elapsed: Duration) -> String {
        let counts = self.counts().clone();
        let mut parts = Vec::new();
        if let Some(read) = counts.read {
            parts.push(format!("{read} rows read"));
        }
        parts.push(format!("{} {} done", counts.done, self.unit));
        if counts.kept > 0 {
            parts.push(format!("{} kept from before", counts.kept));
        }
        if !counts.skipped.is_empty() {
            let reasons: Vec<_> = counts
                .skipped
                .iter()
                .map(|(reason, n)| format!("{reason} {n}"))
                .collect();
            parts.push(format!("skipped: {}", reasons.join(", ")));
        }
        parts.extend(counts.notes);
        if counts.tokens > 0 {
            parts.push(format!(
                "{} tokens, {:.0} tokens/s",
                counts.tokens,
                counts.tokens as f64 / elapsed.as_secs_f64().max(1e-9)
            ));
        }
        format!("{} in {:.1} s", parts.join("; "), elapsed.as_secs_f64())
    }

    /// Brings the bar's text up to date.
    fn show(&self, counts: &Counts) {
        if self.bar.is_hidden() {
            return;
        }
        let mut parts = Vec::new();
        if let Some(read) = counts.read {
            parts.push(format!("of {read} rows read"));
        }
        if counts.tokens > 0 {
            let seconds = self.started.elapsed().as_secs_f64().max(1e-9);
            parts.push(format!("{:.0} tokens/s", counts.tokens as f64 / seconds));
        }
        self.bar.set_message(parts.join(" "));
    }

    fn counts(&self) -> std::sync::MutexGuard<'_, Counts> {
        // A panic elsewhere leaves plain counters, never a broken state.
        self.counts.lock().unwrap_or_else(|e| e.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_names_every_count_once() {
        let progress = Progress::new("pairs", None);
        progress.read(10);
        progress.add(3, 100);
        progress.add(1, 100);
        progress.kept(2);
        progress.skip("too short", 1);
        progress.skip("duplicate", 2);
        progress.skip("too short", 1);
        progress.skip("never", 0);
        progress.note("alpha 0.5");
        assert_eq!(
            progress.summary(Duration::from_secs(2)),
            "10 rows read; 4 pairs done; 2 kept from before; skipped: too short 2, duplicate 2; \
             alpha 0.5; 200 tokens, 100 tokens/s in 2.0 s"
        );
    }

    #[test]
    fn templates_of_the_bars_are_valid() {
        for total in [None, Some(3)] {
            let progress = Progress::new("rows", total);
            progress.add(1, 5);
            progress.finish();
        }
    }
}
