//! Figures of preference pairs under a reward: how often it prefers the chosen response, and how much of that is length.

use anyhow::{Result, ensure};
use common::jsonl::Row;
use common::metrics::{Estimate, Spread, correlation, mean, preferences, share, spread};
use common::policy::Logps;
use common::reward::implicit_reward;
use serde::Serialize;
use serde_json::{Map, Value, to_value};

use crate::format::{Line, average, estimate, number, percent};
use crate::samples::name;

/// A preference pair as the figures see it.
#[derive(Clone, Copy)]
pub struct Pair {
    /// Implicit rewards of chosen and rejected.
    rewards: [f64; 2],
    /// Characters of chosen and rejected.
    chars: [f64; 2],
}

impl Pair {
    /// A row with its implicit rewards.
    pub fn implicit(row: &Row, logps: [Logps; 2], beta: f64) -> Result<Self> {
        let rewards = logps.map(|l| implicit_reward(beta, l.policy, l.reference));
        ensure!(
            rewards.iter().all(|r| r.is_finite()),
            row.error(
                "chosen",
                "or \"rejected\" has a log-prob that is not a number"
            )
        );
        Self::new(row, rewards)
    }

    /// A row with the rewards of its chosen and its rejected response.
    pub fn new(row: &Row, rewards: [f64; 2]) -> Result<Self> {
        let chars = |field| Ok::<_, anyhow::Error>(row.response(field)?.chars().count() as f64);
        Ok(Self {
            rewards,
            chars: [chars("chosen")?, chars("rejected")?],
        })
    }
}

#[derive(Default)]
struct Group(Vec<Pair>);

/// All pairs, and those of each value of a field.
pub struct Groups {
    field: String,
    all: Group,
    parts: Vec<(String, Group)>,
}

impl Groups {
    pub fn by(field: &str) -> Self {
        Self {
            field: field.to_owned(),
            all: Group::default(),
            parts: vec![],
        }
    }

    pub fn add(&mut self, row: &Row, pair: Pair) {
        self.all.0.push(pair);
        if !row.fields.contains_key(&self.field) {
            return;
        }
        let group = name(row, &self.field);
        match self.parts.iter_mut().find(|(name, _)| *name == group) {
            Some((_, pairs)) => pairs.0.push(pair),
            None => self.parts.push((group, Group(vec![pair]))),
        }
    }

    /// A line for all pairs, called `name`, then one for each group, sorted by theirs.
    pub fn lines(mut self, name: &str) -> Result<Vec<Line>> {
        let mut lines = vec![self.all.line(name)?];
        // One group says nothing that the whole does not.
        if self.parts.len() > 1 {
            self.parts.sort_by(|a, b| a.0.cmp(&b.0));
            for (name, group) in &self.parts {
                lines.push(group.line(name)?);
            }
        }
        Ok(lines)
    }

    /// RewardBench's summary: the mean of the groups' accuracies, each group counting once.
    pub fn mean_accuracy(&self) -> Option<f64> {
        let accuracies: Vec<f64> = self
            .parts
            .iter()
            .filter_map(|(_, group)| Some(group.figures().accuracy?.value))
            .collect();
        spread(&accuracies).map(|s| s.mean)
    }
}

/// The figures of a group, `null` where there are no pairs.
#[derive(Serialize)]
struct Figures {
    pairs: u64,
    accuracy: Option<Estimate>,
    margin: Option<Estimate>,
    #[serde(rename = "rewards/chosen")]
    rewards_chosen: Option<Estimate>,
    #[serde(rename = "rewards/rejected")]
    rewards_rejected: Option<Estimate>,
    chars_chosen: Option<Spread>,
    chars_rejected: Option<Spread>,
    /// Share of pairs whose chosen response is the longer; equal lengths count half.
    chosen_longer: Option<Estimate>,
    /// Accuracy on the pairs whose chosen response is the longer, and on those whose rejected one is.
    accuracy_chosen_longer: Option<Estimate>,
    accuracy_chosen_shorter: Option<Estimate>,
    /// The mean of those two: what is left of the accuracy where length says nothing. 0.5 of a reward that is length.
    accuracy_length_balanced: Option<f64>,
    /// Pearson's, of reward and length over all responses.
    reward_length_correlation: Option<f64>,
    /// Pearson's, of the margin and the difference in length: 0 where the reward does not look at length.
    margin_length_correlation: Option<f64>,
}

impl Group {
    fn figures(&self) -> Figures {
        let side = |f: fn(&Pair) -> f64| self.0.iter().map(f).collect::<Vec<_>>();
        let margins = side(|p| p.rewards[0] - p.rewards[1]);
        let longer = side(|p| p.chars[0] - p.chars[1]);
        let hits = longer.iter().map(|&d| match d {
            d if d > 0.0 => 1.0,
            0.0 => 0.5,
            _ => 0.0,
        });
        let where_length = |is: fn(f64) -> bool| {
            let there = margins.iter().zip(&longer).filter(|(_, d)| is(**d));
            let margins: Vec<f64> = there.map(|(margin, _)| *margin).collect();
            preferences(&margins).map(|p| p.accuracy)
        };
        let [if_longer, if_shorter] = [where_length(|d| d > 0.0), where_length(|d| d < 0.0)];
        let responses: Vec<(f64, f64)> = self
            .0
            .iter()
            .flat_map(|p| [0, 1].map(|side| (p.rewards[side], p.chars[side])))
            .collect();
        let preferences = preferences(&margins);
        let points: Vec<_> = margins
            .iter()
            .copied()
            .zip(longer.iter().copied())
            .collect();
        Figures {
            pairs: self.0.len() as u64,
            accuracy: preferences.map(|p| p.accuracy),
            margin: preferences.map(|p| p.margin),
            rewards_chosen: mean(&side(|p| p.rewards[0])),
            rewards_rejected: mean(&side(|p| p.rewards[1])),
            chars_chosen: spread(&side(|p| p.chars[0])),
            chars_rejected: spread(&side(|p| p.chars[1])),
            chosen_longer: share(hits.sum(), self.0.len() as u64),
            accuracy_chosen_longer: if_longer,
            accuracy_chosen_shorter: if_shorter,
            accuracy_length_balanced: if_longer
                .zip(if_shorter)
                .map(|(longer, shorter)| (longer.value + shorter.value) / 2.0),
            reward_length_correlation: correlation(&responses),
            margin_length_correlation: correlation(&points),
        }
    }

    fn line(&self, name: &str) -> Result<Line> {
        let figures = self.figures();
        let mut json = Map::from_iter([("group".to_owned(), name.into())]);
        if let Value::Object(fields) = to_value(&figures)? {
            json.extend(fields);
        }
        let cells = vec![
            ("pairs of", name.to_owned()),
            ("pairs", figures.pairs.to_string()),
            ("accuracy", percent(figures.accuracy)),
            ("margin", estimate(figures.margin)),
            (
                "reward of chosen",
                number(figures.rewards_chosen.map(|e| e.value), 3),
            ),
            (
                "of rejected",
                number(figures.rewards_rejected.map(|e| e.value), 3),
            ),
            ("characters of chosen", average(figures.chars_chosen)),
            ("of rejected", average(figures.chars_rejected)),
            ("chosen longer", percent(figures.chosen_longer)),
            (
                "accuracy, length-balanced",
                number(figures.accuracy_length_balanced, 3),
            ),
            (
                "margin ~ length",
                number(figures.margin_length_correlation, 2),
            ),
        ];
        Ok(Line { json, cells })
    }
}
