//! Figures of preference pairs under a reward: how often it prefers the chosen response, and how much of that is length.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use common::jsonl::Row;
use common::metrics::bootstrap::{interval, resample};
use common::metrics::{
    Estimate, Preferences, Spread, counted_correlation, hit, preferences, spread,
};
use common::policy::Logps;
use common::reward::implicit_reward;
use serde::Serialize;
use serde_json::{Map, Value, to_value};

use crate::format::{Line, average, estimate, number, percent};
use crate::samples::name;

/// A preference pair as the figures see it.
#[derive(Clone, Copy)]
pub struct Pair {
    /// Tells its prompt from others.
    prompt: u64,
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
        let key = row.prompt()?.key();
        Ok(Self {
            prompt: u64::from_le_bytes(key.as_bytes()[..8].try_into().expect("32 bytes")),
            rewards,
            chars: [chars("chosen")?, chars("rejected")?],
        })
    }

    fn margin(&self) -> f64 {
        self.rewards[0] - self.rewards[1]
    }

    /// How much longer the chosen response is.
    fn longer(&self) -> f64 {
        self.chars[0] - self.chars[1]
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

    /// RewardBench's summary: the mean of the groups' accuracies, each group counting once. Its interval is that of a sum of
    /// independent errors, each half the width of its group's interval.
    pub fn mean_accuracy(&self) -> Option<Estimate> {
        let accuracies: Vec<Estimate> = self
            .parts
            .iter()
            .filter_map(|(_, group)| Some(group.of(|_| true, Pair::margin)?.accuracy))
            .collect();
        let groups = accuracies.len() as f64;
        let value = accuracies.iter().map(|e| e.value).sum::<f64>() / groups;
        let squares: f64 = accuracies
            .iter()
            .map(|e| ((e.high - e.low) / 2.0).powi(2))
            .sum();
        let half = squares.sqrt() / groups;
        (groups > 0.0).then(|| Estimate {
            value,
            low: (value - half).max(0.0),
            high: (value + half).min(1.0),
        })
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
    accuracy_length_balanced: Option<Estimate>,
    /// Pearson's, of reward and length over all responses.
    reward_length_correlation: Option<Estimate>,
    /// Pearson's, of the margin and the difference in length: 0 where the reward does not look at length.
    margin_length_correlation: Option<Estimate>,
}

/// Resamples behind an interval that no formula gives.
const RESAMPLES: u64 = 1000;

impl Group {
    /// How often and how far a value is above 0, over some of the pairs.
    fn of(&self, is: fn(&Pair) -> bool, value: fn(&Pair) -> f64) -> Option<Preferences> {
        let there = self.0.iter().filter(|pair| is(pair));
        let (values, prompts): (Vec<_>, Vec<_>) = there.map(|p| (value(p), p.prompt)).unzip();
        preferences(&values, &prompts)
    }

    fn figures(&self) -> Figures {
        let all = |value| self.of(|_| true, value);
        let chars = |side: usize| {
            let chars: Vec<f64> = self.0.iter().map(|pair| pair.chars[side]).collect();
            spread(&chars)
        };
        let margins = all(Pair::margin);
        let [balanced, reward_length, margin_length] = self.of_length();
        Figures {
            pairs: self.0.len() as u64,
            accuracy: margins.map(|p| p.accuracy),
            margin: margins.map(|p| p.margin),
            rewards_chosen: all(|p| p.rewards[0]).map(|p| p.margin),
            rewards_rejected: all(|p| p.rewards[1]).map(|p| p.margin),
            chars_chosen: chars(0),
            chars_rejected: chars(1),
            chosen_longer: all(Pair::longer).map(|p| p.accuracy),
            accuracy_chosen_longer: self
                .of(|p| p.longer() > 0.0, Pair::margin)
                .map(|p| p.accuracy),
            accuracy_chosen_shorter: self
                .of(|p| p.longer() < 0.0, Pair::margin)
                .map(|p| p.accuracy),
            accuracy_length_balanced: balanced,
            reward_length_correlation: reward_length,
            margin_length_correlation: margin_length,
        }
    }

    /// Length-balanced accuracy, correlation of reward and length, of margin and difference in length; the intervals from
    /// resampled prompts.
    fn of_length(&self) -> [Option<Estimate>; 3] {
        let mut places: BTreeMap<u64, usize> = BTreeMap::new();
        let prompts: Vec<usize> = self
            .0
            .iter()
            .map(|pair| {
                let next = places.len();
                *places.entry(pair.prompt).or_insert(next)
            })
            .collect();
        let figures = |counts: &[f64]| {
            let pairs = self.0.iter().zip(prompts.iter().map(|at| counts[*at]));
            let accuracy = |is: fn(f64) -> bool| {
                let there = pairs.clone().filter(|(pair, _)| is(pair.longer()));
                let (hits, count) = there.fold((0.0, 0.0), |(hits, all), (pair, count)| {
                    (hits + count * hit(pair.margin()), all + count)
                });
                (count > 0.0).then(|| hits / count)
            };
            let responses = pairs.clone().flat_map(|(p, count)| {
                [0, 1].map(|side| ((p.rewards[side], p.chars[side]), count))
            });
            let margins = pairs
                .clone()
                .map(|(p, count)| ((p.margin(), p.longer()), count));
            let balanced = accuracy(|d| d > 0.0).zip(accuracy(|d| d < 0.0));
            [
                balanced.map(|(longer, shorter)| (longer + shorter) / 2.0),
                counted_correlation(responses),
                counted_correlation(margins),
            ]
        };
        let values = figures(&vec![1.0; places.len()]);
        let drawn = resample(places.len(), RESAMPLES, 0, |counts| Some(figures(counts)));
        std::array::from_fn(|which| {
            let [low, high] = interval(drawn.iter().filter_map(|figures| figures[which]))?;
            Some(Estimate {
                value: values[which]?,
                low,
                high,
            })
        })
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
                percent(figures.accuracy_length_balanced),
            ),
            (
                "margin ~ length",
                estimate(figures.margin_length_correlation),
            ),
        ];
        Ok(Line { json, cells })
    }
}
