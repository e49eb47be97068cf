//! Figures about samples and preference pairs: pure functions of numbers and texts, no model in sight.
//!
//! Every function of no data is `None`, so that an absent figure is `null` in JSON and never 0 or NaN.

#[cfg(feature = "win-rate")]
pub mod bootstrap;
#[cfg(feature = "win-rate")]
pub mod length_control;
pub mod win_rate;

use std::collections::{BTreeMap, HashMap, HashSet};
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

/// A share of n trials with Wilson's score interval, which stays within [0, 1] and is sound for few trials and shares
/// near the ends (Wilson 1927).
fn wilson(p: f64, n: f64) -> Estimate {
    let z2 = Z95 * Z95;
    let centre = (p + z2 / (2.0 * n)) / (1.0 + z2 / n);
    let half = Z95 / (1.0 + z2 / n) * (p * (1.0 - p) / n + z2 / (4.0 * n * n)).sqrt();
    Estimate {
        value: p,
        low: (centre - half).max(0.0),
        high: (centre + half).min(1.0),
    }
}

/// Values of which those of one cluster go together, such as pairs of one prompt: they say less than as many values
/// of clusters of their own.
struct Clusters {
    values: f64,
    clusters: f64,
    mean: f64,
    /// Variance of the mean, each cluster's deviations summed first.
    variance: f64,
}

impl Clusters {
    /// `of[i]` is the cluster of `values[i]`. `None` of no values.
    fn new(values: &[f64], of: &[u64]) -> Option<Self> {
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let mut sums: BTreeMap<u64, f64> = BTreeMap::new();
        for (value, cluster) in values.iter().zip(of) {
            *sums.entry(*cluster).or_default() += value - mean;
        }
        (n > 0.0).then(|| Self {
            values: n,
            clusters: sums.len() as f64,
            mean,
            variance: sums.values().map(|sum| sum * sum).sum::<f64>() / (n * n),
        })
    }

    /// Normal interval, ±1.96 standard errors. Of one cluster, the interval is the mean: nothing is known of its spread.
    fn mean(&self) -> Estimate {
        let correction = self.clusters / (self.clusters - 1.0).max(1.0);
        let half = Z95 * (self.variance * correction).sqrt();
        Estimate {
            value: self.mean,
            low: self.mean - half,
            high: self.mean + half,
        }
    }

    /// Wilson's interval at the number of independent values that would vary as much (Korn and Graubard 1998).
    fn share(&self) -> Estimate {
        let alike = self.mean * (1.0 - self.mean) / self.variance;
        let n = if self.variance > 0.0 {
            alike.min(self.values)
        } else {
            // All hits or none: nothing tells how much values of a cluster are alike.
            self.clusters
        };
        wilson(self.mean, n)
    }
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
    counted_correlation(points.iter().map(|point| (*point, 1.0)))
}

/// The same where each point counts so many times.
pub fn counted_correlation(points: impl Iterator<Item = ((f64, f64), f64)> + Clone) -> Option<f64> {
    let mean = |side: fn((f64, f64)) -> f64| {
        let sum = |f: &dyn Fn((f64, f64)) -> f64| -> f64 {
            points.clone().map(|(p, count)| count * f(p)).sum()
        };
        sum(&side) / sum(&|_| 1.0)
    };
    let (mean_x, mean_y) = (mean(|p| p.0), mean(|p| p.1));
    let (mut xx, mut yy, mut xy) = (0.0, 0.0, 0.0);
    for ((x, y), count) in points {
        let (dx, dy) = (x - mean_x, y - mean_y);
        xx += count * dx * dx;
        yy += count * dy * dy;
        xy += count * dx * dy;
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

/// 1 of a margin above 0, 0 of one below, a half of none.
pub fn hit(margin: f64) -> f64 {
    match margin {
        m if m > 0.0 => 1.0,
        0.0 => 0.5,
        _ => 0.0,
    }
}

/// From each pair's reward(chosen) − reward(rejected). `prompts[i]` tells the prompt of `margins[i]` from others: the
/// intervals take pairs of one prompt for what they are, no independent witnesses.
pub fn preferences(margins: &[f64], prompts: &[u64]) -> Option<Preferences> {
    let hits: Vec<f64> = margins.iter().map(|margin| hit(*margin)).collect();
    Some(Preferences {
        pairs: margins.len() as u64,
        accuracy: Clusters::new(&hits, prompts)?.share(),
        margin: Clusters::new(margins, prompts)?.mean(),
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
    /// Which prompt each sample is of, in the order of their first samples.
    of: Vec<u64>,
    chars: Vec<f64>,
    tokens: Vec<f64>,
    /// 1 of a truncated sample, 0 of others.
    truncated: Vec<f64>,
    distinct_1: Distinct,
    distinct_2: Distinct,
    prompts: HashMap<String, OfPrompt>,
    /// Rewards, and which prompts they are of.
    rewards: (Vec<f64>, Vec<u64>),
}

#[derive(Clone, Debug, Default)]
struct OfPrompt {
    /// Its number in the order of first samples.
    number: u64,
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
    /// Its mean. This interval and the others take samples of one prompt for what they are, no independent witnesses.
    pub mean_chars: Option<Estimate>,
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
            of: Vec::new(),
            chars: Vec::new(),
            tokens: Vec::new(),
            truncated: Vec::new(),
            distinct_1: Distinct::new(1),
            distinct_2: Distinct::new(2),
            prompts: HashMap::new(),
            rewards: Default::default(),
        }
    }
}

impl SampleSet {
    pub fn add(&mut self, sample: Sample) {
        let chars = sample.response.chars().count() as f64;
        self.chars.push(chars);
        self.tokens.extend(sample.tokens.map(|n| n as f64));
        let truncated = sample.finish == FinishReason::Length;
        self.truncated.push(f64::from(u8::from(truncated)));
        self.distinct_1.add(sample.response);
        self.distinct_2.add(sample.response);
        if !self.prompts.contains_key(sample.prompt) {
            let prompt = OfPrompt {
                number: self.prompts.len() as u64,
                ..OfPrompt::default()
            };
            self.prompts.insert(sample.prompt.to_owned(), prompt);
        }
        let prompt = self.prompts.get_mut(sample.prompt).expect("just made");
        self.of.push(prompt.number);
        prompt.samples += 1;
        prompt.responses.insert(hash(sample.response));
        if let Some(reward) = sample.reward {
            self.rewards.0.push(reward);
            self.rewards.1.push(prompt.number);
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
            mean_chars: Clusters::new(&self.chars, &self.of).map(|c| c.mean()),
            tokens: spread(&self.tokens),
            truncated: Clusters::new(&self.truncated, &self.of).map(|c| c.share()),
            distinct_1: self.distinct_1.share(),
            distinct_2: self.distinct_2.share(),
            distinct_responses: spread(&different).map(|s| s.mean),
            reward: Clusters::new(&self.rewards.0, &self.rewards.1).map(|c| c.mean()),
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
        let got = wilson(0.8, 10.0);
        assert!(near(got.value, 0.8));
        assert!((got.low - 0.490162).abs() < 1e-5, "{got:?}");
        assert!((got.high - 0.943318).abs() < 1e-5, "{got:?}");
        // 0 of n: [0, z² / (n + z²)].
        let none = wilson(0.0, 10.0);
        assert_eq!((none.value, none.low), (0.0, 0.0));
        assert!(near(none.high, Z95 * Z95 / (10.0 + Z95 * Z95)));
        assert_eq!(wilson(1.0, 3.0).high, 1.0);
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
        let got = Clusters::new(&[1.0, 3.0], &[0, 1]).unwrap().mean();
        assert_eq!(got.value, 2.0);
        // s = √2 over √2 values.
        assert!(near(got.high - 2.0, Z95) && near(2.0 - got.low, Z95));
        let one = Clusters::new(&[5.0], &[7]).unwrap().mean();
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
        let got = preferences(&[1.0, 0.0, -3.0, 4.0], &[0, 1, 2, 3]).unwrap();
        assert_eq!(
            (got.pairs, got.accuracy.value, got.margin.value),
            (4, 0.625, 0.5)
        );
        assert_eq!(preferences(&[], &[]), None);
    }

    #[test]
    fn pairs_of_one_prompt_are_no_independent_witnesses() {
        let margins = [1.0, 2.0, -1.0, 3.0, -2.0, 1.5, 0.5, -0.5];
        let apart = preferences(&margins, &[0, 1, 2, 3, 4, 5, 6, 7]).unwrap();
        let alone = wilson(5.0 / 8.0, 8.0);
        assert!(near(apart.accuracy.low, alone.low) && near(apart.accuracy.high, alone.high));
        // The same pairs four times over know nothing more.
        let repeated: Vec<f64> = margins.iter().flat_map(|m| [*m; 4]).collect();
        let prompts: Vec<u64> = (0..32).map(|i| i / 4).collect();
        let got = preferences(&repeated, &prompts).unwrap();
        for (one, other) in [(got.accuracy, apart.accuracy), (got.margin, apart.margin)] {
            assert!(
                near(one.low, other.low) && near(one.high, other.high),
                "{one:?} {other:?}"
            );
        }
        let naive = wilson(20.0 / 32.0, 32.0);
        assert!(got.accuracy.low < naive.low && got.accuracy.high > naive.high);
        // Nothing but hits: as many witnesses as prompts.
        let sure = preferences(&[1.0; 12], &[0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]).unwrap();
        assert_eq!(sure.accuracy, wilson(1.0, 4.0));
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
        assert_eq!(absent.count(), 10);
    }
}
