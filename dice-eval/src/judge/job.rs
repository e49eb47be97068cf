//! The annotations that a run writes, after those of the run that was interrupted.

use anyhow::{Result, ensure};
use common::jsonl::Output;
use common::progress::Progress;
use serde_json::{Map, Value, json};

use super::jury::Judged;
use super::outputs::Pair;

/// The writing side of a run.
pub struct Job {
    pub generators: [String; 2],
    pub annotator: String,
    pub progress: Progress,
    pub output: Output,
    pub counts: Counts,
}

#[derive(Default)]
pub struct Counts {
    /// Pairs judged in both orders, and those whose winner turned with the order.
    both: u64,
    turned: u64,
}

impl Job {
    /// Checks that the rows of an interrupted run are those of these files; gives their number.
    pub fn check_kept(&mut self, pairs: &[Pair]) -> Result<usize> {
        let mut expected = pairs.iter();
        for row in self.output.kept() {
            let row = row?;
            let same = expected.next().is_some_and(|pair| {
                row.fields.get("output_1") == Some(&json!(pair.outputs[0]))
                    && row.fields.get("output_2") == Some(&json!(pair.outputs[1]))
                    && row.fields.get("annotator") == Some(&json!(self.annotator))
            });
            ensure!(
                same,
                "{}: not what this command would have written here; remove the file to start over",
                row.place
            );
            let count = |name: &str| row.fields.get(name).is_some_and(Value::is_number);
            let both = count("preference_shown_first") && count("preference_shown_second");
            self.counts.both += u64::from(both);
            self.counts.turned += u64::from(row.fields.get("turned") == Some(&json!(true)));
        }
        self.progress.kept(self.output.kept_rows());
        Ok(self.output.kept_rows() as usize)
    }

    pub fn write(&mut self, pair: &Pair, judged: Judged) -> Result<()> {
        let mut row: Map<String, Value> = Map::new();
        row.insert("instruction".into(), json!(pair.instruction()));
        let shared = pair.shared_fields();
        row.extend(shared.map(|(name, value)| (name.clone(), value.clone())));
        let preference = |win: Option<f64>| json!(win.map(|win| 1.0 + win));
        for side in [0, 1] {
            row.insert(format!("output_{}", side + 1), json!(pair.outputs[side]));
            row.insert(
                format!("generator_{}", side + 1),
                json!(self.generators[side]),
            );
        }
        row.insert("annotator".into(), json!(self.annotator));
        row.insert("preference".into(), preference(judged.win));
        if let [Some(_), Some(_)] = judged.by_order {
            row.insert(
                "preference_shown_first".into(),
                preference(judged.by_order[1]),
            );
            row.insert(
                "preference_shown_second".into(),
                preference(judged.by_order[0]),
            );
            row.insert("turned".into(), json!(judged.turned));
            self.counts.both += 1;
            self.counts.turned += u64::from(judged.turned);
        }
        if let Some(from) = &judged.from {
            row.insert("verdict_from".into(), json!(from));
        }
        if judged.win.is_none() {
            self.progress.skip("no verdict (\"preference\" is null)", 1);
        }
        self.output.write(&row)?;
        self.progress.add(1, 0);
        self.output.flush()
    }

    pub fn finish(self) -> Result<()> {
        let Counts { both, turned } = self.counts;
        if both > 0 {
            self.progress.note(format!(
                "{turned} of {both} verdicts ({:.0}%) turned with the order of the outputs",
                100.0 * turned as f64 / both as f64
            ));
        }
        self.progress.finish();
        self.output.finish()
    }
}
