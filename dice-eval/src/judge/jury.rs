//! Judges behind a server: questions in both orders, many at a time, answers in the order of the pairs.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::channel;

use anyhow::{Context, Result, anyhow};

use super::endpoint::Endpoint;
use super::journal::Journal;
use super::outputs::Pair;
use super::verdict::Verdict;
use super::{Order, coin};

/// What a judge says of a pair.
#[derive(Clone, Debug, PartialEq)]
pub struct Judged {
    /// Probability that the second output is better.
    pub win: Option<f64>,
    /// The same of each order asked: the first output shown first, and shown second.
    pub by_order: [Option<f64>; 2],
    /// Whether the two orders have different winners.
    pub turned: bool,
    pub from: Option<String>,
}

impl Judged {
    pub fn scored(win: Option<f64>) -> Self {
        Self {
            win,
            by_order: [None; 2],
            turned: false,
            from: None,
        }
    }
}

/// A judge behind a server, with all that a question needs.
pub struct Jury<'a> {
    pub endpoint: Endpoint,
    pub journal: Journal,
    pub template: String,
    pub labels: &'a [String; 2],
    pub order: Order,
    pub seed: u64,
}

impl Jury<'_> {
    /// Judges all pairs, so many at a time; `each` gets them in their order. After an error, what came before the failed
    /// pair has been given to `each`, and what came after is in the journal.
    pub fn judge_all(
        &self,
        pairs: &[Pair],
        at_a_time: usize,
        mut each: impl FnMut(&Pair, Judged) -> Result<()>,
    ) -> Result<()> {
        let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
        let (sender, results) = channel();
        std::thread::scope(|threads| {
            for _ in 0..at_a_time.min(pairs.len()) {
                let sender = sender.clone();
                threads.spawn(|| {
                    let sender = sender;
                    while !stop.load(Ordering::Relaxed) {
                        let at = next.fetch_add(1, Ordering::Relaxed);
                        let Some(pair) = pairs.get(at) else { break };
                        let judged = self.judge(pair);
                        // What failed here would fail for the next pair too.
                        stop.fetch_or(judged.is_err(), Ordering::Relaxed);
                        if sender.send((at, judged)).is_err() {
                            break;
                        }
                    }
                });
            }
            drop(sender);
            let mut early = BTreeMap::new();
            let mut done = 0;
            let mut failed = None;
            for (at, judged) in results {
                early.insert(at, judged);
                while failed.is_none()
                    && let Some(judged) = early.remove(&done)
                {
                    failed = judged.and_then(|judged| each(&pairs[done], judged)).err();
                    done += 1;
                }
                stop.fetch_or(failed.is_some(), Ordering::Relaxed);
            }
            // A pair before a failed one may never have been asked: then the failure is still waiting.
            let waiting = early.into_values().find_map(Result::err);
            failed.or(waiting).map_or(Ok(()), Err)
        })
    }

    fn judge(&self, pair: &Pair) -> Result<Judged> {
        if pair.outputs[0] == pair.outputs[1] {
            return Ok(Judged::scored(Some(0.5)));
        }
        let switched = match self.order {
            Order::Both => vec![false, true],
            Order::Seeded => vec![coin::is_switched(&pair.instruction(), self.seed)],
        };
        let (mut by_order, mut from) = ([None; 2], None);
        for &switched in &switched {
            let verdict = self.ask(pair, switched)?;
            let win = verdict
                .first
                .map(|first| if switched { first } else { 1.0 - first });
            by_order[usize::from(switched)] = win;
            from = Some(verdict.from);
        }
        let wins: Vec<f64> = by_order.iter().flatten().copied().collect();
        // One order alone would carry the judge's taste for a place.
        let whole = wins.len() == switched.len();
        Ok(Judged {
            win: whole.then(|| wins.iter().sum::<f64>() / wins.len() as f64),
            by_order,
            turned: matches!(by_order, [Some(a), Some(b)] if (a - 0.5) * (b - 0.5) < 0.0),
            from,
        })
    }

    fn ask(&self, pair: &Pair, switched: bool) -> Result<Verdict> {
        let message = self.message(pair, switched)?;
        let question = self.endpoint.question(&message);
        if let Some(known) = self.journal.get(&question) {
            return Ok(known);
        }
        let verdict = self
            .endpoint
            .ask(&message)
            .with_context(|| pair.rows[1].place.to_string())?;
        // What was refused may be taken another time.
        if verdict != Verdict::refused() {
            self.journal.put(&question, &verdict)?;
        }
        Ok(verdict)
    }

    fn message(&self, pair: &Pair, switched: bool) -> Result<String> {
        let [mut first, mut second] = [&pair.outputs[0], &pair.outputs[1]];
        if switched {
            (first, second) = (second, first);
        }
        let values = minijinja::context! {
            instruction => pair.instruction(), first, second,
            first_label => &self.labels[0], second_label => &self.labels[1],
        };
        let mut environment = minijinja::Environment::new();
        // A misspelt name would ask about nothing.
        environment.set_undefined_behavior(minijinja::UndefinedBehavior::Strict);
        let rendered = environment.render_str(&self.template, values);
        rendered.map_err(|err| anyhow!("--template: {err:#}"))
    }
}
