//! What `--stats` writes: one JSON object with the figures of the choice.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use common::pairs::{Chosen, Length, Mix, Skipped};
use common::reward::Point;
use serde::Serialize;
use serde_json::{Map, Value};

/// Points of the α curve that are written at most; the curve of 10,000 prompts has a hundred thousand.
const CURVE_POINTS: usize = 200;

#[derive(Serialize)]
pub struct Stats {
    /// Rows and prompts read; prompts with enough responses left.
    rows: u64,
    prompts: u64,
    compared_prompts: u64,
    /// By reason: responses, or prompts or offline pairs where the reason says so.
    skipped: Map<String, Value>,
    alpha: f64,
    /// Whether α was found ("auto") or given.
    alpha_from: &'static str,
    /// The unit of every length here.
    length: &'static str,
    /// Mean over the compared prompts of |chosen| − |rejected|.
    pub gap_at_zero: f64,
    pub gap: f64,
    /// (α, gap from this α on), thinned where long; α's own step is always among them.
    curve: Vec<(f64, f64)>,
    generated_pairs: usize,
    chosen: Option<Side>,
    rejected: Option<Side>,
    #[serde(skip_serializing_if = "Option::is_none")]
    replay: Option<Mixed>,
}

/// One side of the generated pairs, before replay and before shaping.
#[derive(Serialize)]
struct Side {
    mean_length: f64,
    mean_reward: f64,
}

#[derive(Serialize)]
struct Mixed {
    gamma: f64,
    /// Usable offline pairs.
    offered: usize,
    generated: usize,
    replayed: usize,
}

impl Stats {
    pub fn new(chosen: &Chosen, replay: &Skipped, length: Length, auto: bool) -> Self {
        let steps = &chosen.balance.steps;
        // The last step that has begun at α; the first is at 0.
        let at = steps.partition_point(|(from, _)| *from <= chosen.alpha) - 1;
        let skipped = chosen.skipped.0.iter().chain(&replay.0);
        Self {
            rows: chosen.rows,
            prompts: chosen.prompts,
            compared_prompts: chosen.compared,
            skipped: skipped.map(|(r, n)| (r.clone(), (*n).into())).collect(),
            alpha: chosen.alpha,
            alpha_from: if auto { "auto" } else { "given" },
            length: length.name(),
            gap_at_zero: chosen.balance.gap_at_zero,
            gap: steps[at].1,
            curve: thinned(steps, at),
            generated_pairs: chosen.pairs.len(),
            chosen: side(chosen.points.iter().map(|(best, _)| best)),
            rejected: side(chosen.points.iter().map(|(_, worst)| worst)),
            replay: None,
        }
    }

    pub fn mixed(&mut self, mix: &Mix, offered: usize, gamma: f64) {
        self.replay = Some(Mixed {
            gamma,
            offered,
            generated: mix.generated,
            replayed: mix.replayed,
        });
    }

    pub fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)? + "\n";
        fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    }
}

fn side<'a>(points: impl ExactSizeIterator<Item = &'a Point> + Clone) -> Option<Side> {
    let n = points.len();
    (n > 0).then(|| Side {
        mean_length: points.clone().map(|p| p.length as f64).sum::<f64>() / n as f64,
        mean_reward: points.map(|p| p.reward).sum::<f64>() / n as f64,
    })
}

/// About `CURVE_POINTS` steps, evenly by rank, with the first, the last and the one at `keep`.
fn thinned(steps: &[(f64, f64)], keep: usize) -> Vec<(f64, f64)> {
    let every = steps.len().div_ceil(CURVE_POINTS);
    let last = steps.len() - 1;
    let indexed = steps.iter().enumerate();
    let wanted = indexed.filter(|(i, _)| i % every == 0 || *i == keep || *i == last);
    wanted.map(|(_, step)| *step).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_curves_are_thinned_but_keep_their_ends_and_alpha() {
        let steps: Vec<_> = (0..10_001).map(|i| (f64::from(i), -f64::from(i))).collect();
        let got = thinned(&steps, 1234);
        assert!(got.len() <= CURVE_POINTS + 3);
        for i in [0, 1234, 10_000] {
            assert!(got.contains(&steps[i]));
        }
        assert_eq!(thinned(&steps[..3], 1), steps[..3]);
    }
}
