//! Figures about samples and preference pairs: pure functions of numbers and texts, no model in sight.
//!
//! Every function of no data is `None`, so that an absent figure is `null` in JSON and never 0 or NaN.

#[cfg(feature = "win-rate")]
pub mod bootstrap;
#[cfg(feature = "win-rate")]
pub mod length_control;
pub mod win_rate;

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};

use serde::Serialize;

use crate::jsonl::FinishReason;

/// The normal distribution's 97.5th percentile: two-sided 95% intervals.
const Z95: f64 = 1.959_963_984_540_054;

/// An estimate with its 95% confidence interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Estimate {
    pub value: f64,
    pub low: f64,
    pub high: f64,
}

/// A share with Wilson's score interval, which stays within [0, 1] and is sound for few trials and shares near the
/// ends (Wilson 1927). `hits` may hold halves (ties).
pub fn share(hits: f64, trials: u64) -> Option<Estimate> {
    if trials == 0 {
        return None;
    }
    let n = trials as f64;
    let p = hits / n;
    let z2 = Z95 * Z95;
    let centre = (p + z2 / (2.0 * n)) / (1.0 + z2 / n);
    let half = Z95 / (1.0 + z2 / n) * (p * (1.0 - p) / n + z2 / (4.0 * n * n)).sqrt();
    Some(Estimate {
        value: p,
        low: (centre - half).max(0.0),
        high: (centre + half).min(1.0),
    })
}

/// A mean with the normal interval ±1.96 s/√n; s has n − 1 in its denominator. Of one value, the interval is the
/// value: nothing is known of its spread.
pub fn mean(values: &[f64]) -> Option<Estimate> {
    let spread = spread(values)?;
    let half = Z95 * spread.standard_deviation / (spread.count as f64).sqrt();
    Some(Estimate {
        value: spread.mean,
        low: spread.mean - half,
        high: spread.mean + half,
    })
}

/// Where values lie.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    pub count: u64,
    pub mean: f64,
    /// With n − 1 in its denominator; 0 of one value.
    pub standard_deviation: f64,
    pub min: f64,
    /// Of an even count, the mean of the middle two.
    pub median: f64,
    pub max: f64,
}

/// See [`Spread`].
pub fn spread(values: &[f64]) -> Option<Spread> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (&min, &max) = (sorted.first()?, sorted.last()?);
    let n = sorted.len();
    let mean = sorted.iter().sum::<f64>() / n as f64;
    let squares: f64 = sorted.iter().map(|v| (v - mean) * (v - mean)).sum();
    Some(Spread {
        count: n as u64,
        mean,
        standard_deviation: (squares / (n - 1).max(1) as f64).sqrt(),
        min,
        median: (sorted[(n - 1) / 2] + sorted[n / 2]) / 2.0,
        max,
    })
}

/// Pearson's correlation; `None` of fewer than two points, or where one side does not vary.
pub fn correlation(points: &[(f64, f64)]) -> Option<f64> {
    let n = points.len() as f64;
    let mean_x = points.iter().map(|p| p.0).sum::<f64>() / n;
    let mean_y = points.iter().map(|p| p.1).sum::<f64>() / n;
    let (mut xx, mut yy, mut xy) = (0.0, 0.0, 0.0);
    for (x, y) in points {
        let (dx, dy) = (x - mean_x, y - mean_y);
        xx += dx * dx;
        yy += dy * dy;
        xy += dx * dy;
    }
    let scale = xx.sqrt() * yy.sqrt();
    (scale > 0.0).then(|| (xy / scale).clamp(-1.0, 1.0))
}

/// How often and how clearly a reward prefers the chosen response.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Preferences {
    pub pairs: u64,
    /// Share of pairs with a margin above 0; a margin of 0 counts half. Wilson interval.
    pub accuracy: Estimate,
    /// Mean of reward(chosen) − reward(rejected). Normal interval.
    pub margin: Estimate,
}

/// From each pair's reward(chosen) − reward(rejected).
pub fn preferences(margins: &[f64]) -> Option<Preferences> {
    let hit = |margin: &f64| match margin {
        m if *m > 0.0 => 1.0,
        m if *m == 0.0 => 0.5,
        _ => 0.0,
    };
    let pairs = margins.len() as u64;
    Some(Preferences {
        pairs,
        accuracy: share(margins.iter().map(hit).sum(), pairs)?,
        margin: mean(margins)?,
    })
}

/// Distinct-n (Li et al. 2016): different n-grams over all n-grams, words being what whitespace separates. Depends
/// on the amount of text: compare it between equal numbers of samples only.
#[derive(Clone, Debug)]
pub struct Distinct {
    n: usize,
    /// 64-bit hashes stand for the n-grams: a handful of collisions in a billion.
    seen: HashSet<u64>,
    total: u64,
}

impl Distinct {
    pub fn new(n: usize) -> Self {
        Self {
            n: n.max(1),
            seen: HashSet::new(),
            total: 0,
        }
    }

    /// n-grams do not cross from one text to the next.
    pub fn add(&mut self, text: &str) {
        let words: Vec<&str> = text.split_whitespace().collect();
        for gram in words.windows(self.n) {
            self.seen.insert(hash(gram));
            self.total += 1;
        }
    }

    pub fn share(&self) -> Option<f64> {
        (self.total > 0).then(|| self.seen.len() as f64 / self.total as f64)
    }
}

fn hash(value: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// One sample as the figures see it.
#[derive(Clone, Copy, Debug)]
pub struct Sample<'a> {
    /// The id of its prompt.
    pub prompt: &'a str,
    pub response: &'a str,
    /// Number of token ids, where the row has them.
    pub tokens: Option<u64>,
    pub finish: FinishReason,
    pub reward: Option<f64>,
}

/// Samples of one group (a round, a model), taken in one at a time. Holds numbers and hashes, not texts.
#[derive(Clone, Debug)]
pub struct SampleSet {
    chars: Vec<f64>,
    tokens: Vec<f64>,
    truncated: u64,
    distinct_1: Distinct,
    distinct_2: Distinct,
    prompts: HashMap<String, OfPrompt>,
    rewards: Vec<f64>,
}

#[derive(Clone, Debug, Default)]
struct OfPrompt {
    samples: u64,
    responses: HashSet<u64>,
    /// (length in characters, reward)
    points: Vec<(f64, f64)>,
}

/// What a [`SampleSet`] amounts to.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SampleFigures {
    pub samples: u64,
    pub prompts: u64,
    /// Length in characters.
    pub chars: Option<Spread>,
    /// Length in tokens, of the samples that have token ids.
    pub tokens: Option<Spread>,
    /// Share of samples cut at the token limit.
    pub truncated: Option<Estimate>,
    pub distinct_1: Option<f64>,
    pub distinct_2: Option<f64>,
    /// Different responses over responses of a prompt, mean over prompts: 1 where no sample repeats another.
    pub distinct_responses: Option<f64>,
    pub reward: Option<Estimate>,
    /// Pearson's correlation of reward and characters over all samples with a reward.
    pub reward_length_correlation: Option<f64>,
    /// The same of the deviations from each prompt's means: what the choice within a prompt sees.
    pub reward_length_correlation_within_prompts: Option<f64>,
}

impl Default for SampleSet {
    fn default() -> Self {
        Self {
            chars: Vec::new(),
            tokens: Vec::new(),
            truncated: 0,
            distinct_1: Distinct::new(1),
            distinct_2: Distinct::new(2),
            prompts: HashMap::new(),
            rewards: Vec::new(),
        }
    }
}

impl SampleSet {
    pub fn add(&mut self, sample: Sample) {
        let chars = sample.response.chars().count() as f64;
        self.chars.push(chars);
        self.tokens.extend(sample.tokens.map(|n| n as f64));
        self.truncated += u64::from(sample.finish == FinishReason::Length);
        self.distinct_1.add(sample.response);
        self.distinct_2.add(sample.response);
        if !self.prompts.contains_key(sample.prompt) {
            self.prompts
                .insert(sample.prompt.to_owned(), OfPrompt::default());
        }
        let prompt = self.prompts.get_mut(sample.prompt).expect("just made");
        prompt.samples += 1;
        prompt.responses.insert(hash(sample.response));
        if let Some(reward) = sample.reward {
            self.rewards.push(reward);
            prompt.points.push((chars, reward));
        }
    }

    pub fn figures(&self) -> SampleFigures {
        let samples = self.chars.len() as u64;
        // Sums of floats depend on their order, and a hash map's is random: sort by id.
        let mut prompts: Vec<_> = self.prompts.iter().collect();
        prompts.sort_by_key(|(id, _)| *id);
        let prompts: Vec<&OfPrompt> = prompts.into_iter().map(|(_, p)| p).collect();
        let different: Vec<f64> = prompts
            .iter()
            .map(|p| p.responses.len() as f64 / p.samples as f64)
            .collect();
        let all: Vec<_> = prompts.iter().flat_map(|p| p.points.clone()).collect();
        let within: Vec<_> = prompts.iter().flat_map(|p| centred(&p.points)).collect();
        SampleFigures {
            samples,
            prompts: prompts.len() as u64,
            chars: spread(&self.chars),
            tokens: spread(&self.tokens),
            truncated: share(self.truncated as f64, samples),
            distinct_1: self.distinct_1.share(),
            distinct_2: self.distinct_2.share(),
            distinct_responses: spread(&different).map(|s| s.mean),
            reward: mean(&self.rewards),
            reward_length_correlation: correlation(&all),
            reward_length_correlation_within_prompts: correlation(&within),
        }
    }
}

fn centred(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let n = points.len() as f64;
    let mean_x = points.iter().map(|p| p.0).sum::<f64>() / n;
    let mean_y = points.iter().map(|p| p.1).sum::<f64>() / n;
    let centred = points.iter().map(|(x, y)| (x - mean_x, y - mean_y));
    centred.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(a: f64, b: f64) -> bool {
        (a - b).abs() < 1e-6
    }

    #[test]
    fn wilson_agrees_with_hand_worked_intervals() {
        // 8 of 10, z = 1.96: centre (0.8 + 0.19207) / 1.38415 = 0.716739, half 0.226577.
        let got = share(8.0, 10).unwrap();
        assert!(near(got.value, 0.8));
        assert!((got.low - 0.490162).abs() < 1e-5, "{got:?}");
        assert!((got.high - 0.943318).abs() < 1e-5, "{got:?}");
        // 0 of n: [0, z² / (n + z²)].
        let none = share(0.0, 10).unwrap();
        assert_eq!((none.value, none.low), (0.0, 0.0));
        assert!(near(none.high, Z95 * Z95 / (10.0 + Z95 * Z95)));
        assert_eq!(share(3.0, 3).unwrap().high, 1.0);
        assert_eq!(share(0.0, 0), None);
    }

    #[test]
    fn spreads_and_means() {
        let got = spread(&[4.0, 1.0, 3.0, 2.0]).unwrap();
        assert_eq!(
            (got.count, got.mean, got.min, got.median, got.max),
            (4, 2.5, 1.0, 2.5, 4.0)
        );
        assert!(near(got.standard_deviation, (5.0_f64 / 3.0).sqrt()));
        assert_eq!(spread(&[7.0, 1.0, 2.0]).unwrap().median, 2.0);
        assert_eq!(spread(&[]), None);
        let got = mean(&[1.0, 3.0]).unwrap();
        assert_eq!(got.value, 2.0);
        assert!(near(got.high - 2.0, Z95) && near(2.0 - got.low, Z95));
        let one = mean(&[5.0]).unwrap();
        assert_eq!((one.low, one.high), (5.0, 5.0));
    }

    #[test]
    fn correlations() {
        assert!(near(
            correlation(&[(1.0, 2.0), (2.0, 4.0), (3.0, 6.0)]).unwrap(),
            1.0
        ));
        assert!(near(correlation(&[(1.0, 1.0), (2.0, 0.0)]).unwrap(), -1.0));
        // dx = −1 0 1, dy = −1 1 0: 1 / 2.
        assert!(near(
            correlation(&[(1.0, 0.0), (2.0, 2.0), (3.0, 1.0)]).unwrap(),
            0.5
        ));
        assert_eq!(correlation(&[(1.0, 1.0), (1.0, 2.0)]), None);
        assert_eq!(correlation(&[(1.0, 1.0)]), None);
        assert_eq!(correlation(&[]), None);
    }

    #[test]
    fn preferences_count_ties_half() {
        let got = preferences(&[1.0, 0.0, -3.0, 4.0]).unwrap();
        assert_eq!(
            (got.pairs, got.accuracy.value, got.margin.value),
            (4, 0.625, 0.5)
        );
        assert_eq!(preferences(&[]), None);
    }

    #[test]
    fn distinct_n_counts_different_n_grams_within_texts() {
        let of = |n: usize, texts: &[&str]| {
            let mut distinct = Distinct::new(n);
            texts.iter().for_each(|text| distinct.add(text));
            distinct.share()
        };
        assert_eq!(of(1, &["a b a", "b c"]), Some(0.6));
        // ab ba | bc: not "a b" across the texts.
        assert_eq!(of(2, &["a b a", "b c"]), Some(1.0));
        assert_eq!(of(2, &["a b", "a\n b "]), Some(0.5));
        // Words are hashed apart: "ab c" is not "a bc".
        assert_eq!(of(2, &["ab c", "a bc"]), Some(1.0));
        assert_eq!(of(2, &["a", ""]), None);
    }

    #[test]
    fn a_set_of_samples_worked_by_hand() {
        let mut set = SampleSet::default();
        for (prompt, response, tokens, finish, reward) in [
            ("p", "a b", Some(3), FinishReason::Stop, Some(1.0)),
            ("p", "a b", Some(3), FinishReason::Stop, Some(1.0)),
            ("p", "a b c", None, FinishReason::Length, Some(2.0)),
            ("q", "é", Some(1), FinishReason::Stop, Some(9.0)),
            ("q", "d e", Some(5), FinishReason::Stop, None),
        ] {
            set.add(Sample {
                prompt,
                response,
                tokens,
                finish,
                reward,
            });
        }
        let got = set.figures();
        assert_eq!((got.samples, got.prompts), (5, 2));
        assert_eq!(got.chars.unwrap().mean, (3.0 + 3.0 + 5.0 + 1.0 + 3.0) / 5.0);
        assert_eq!(got.tokens.unwrap().count, 4);
        assert_eq!(got.truncated.unwrap().value, 0.2);
        assert_eq!(got.distinct_1, Some(0.6)); // a b c é d e of 10
        assert_eq!(got.distinct_2, Some(0.6)); // ab bc de of 5
        assert!(near(
            got.distinct_responses.unwrap(),
            (2.0 / 3.0 + 1.0) / 2.0
        ));
        assert_eq!(got.reward.unwrap().value, 13.0 / 4.0);
        // Long is better within p; the short answer of q hides it over all.
        assert!(got.reward_length_correlation.unwrap() < 0.0);
        assert!(near(
            got.reward_length_correlation_within_prompts.unwrap(),
            1.0
        ));
    }

    #[test]
    fn no_samples_no_figures() {
        let got = SampleSet::default().figures();
        assert_eq!(got.samples, 0);
        let json = serde_json::to_value(&got).unwrap();
        let absent = json.as_object().unwrap().values().filter(|v| v.is_null());
        assert_eq!(absent.count(), 9);
    }
}
