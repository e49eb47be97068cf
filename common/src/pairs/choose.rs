//! From scored samples to pairs: what is fit to be chosen from, and the best and the worst of it.

use std::collections::{HashMap, HashSet};

use anyhow::Result;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::spool::Kept;
use super::{Pair, Skipped, Spool};
use crate::jsonl::{FinishReason, Place, Row};
use crate::records::SAMPLE_FIELDS;
use crate::reward::{Balance, MAX_REWARD, Point, balance_lengths, best_and_worst, shaped};

/// The unit of a response's length |y|.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Length {
    /// Unicode characters of the response
    Chars,
    /// Entries of token_ids
    Tokens,
}

impl Length {
    /// As flags and manifests have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Chars => "chars",
            Self::Tokens => "tokens",
        }
    }
}

/// What is fit to be chosen from, and how the choice weighs length.
#[derive(Clone, Debug)]
pub struct Rules {
    /// α; `None` finds α*.
    pub alpha: Option<f64>,
    pub length: Length,
    /// Fewer responses than this left: the prompt makes no pair.
    pub min_samples: usize,
    /// Bounds on a response's characters, both inclusive, whatever `length` is.
    pub min_chars: usize,
    pub max_chars: usize,
    pub keep_truncated: bool,
}

/// Whether a sample's field goes to the pair, where all samples agree on it: it says something about the prompt, and is none
/// that a pair has itself. (The prompt may have been taken from another pair.)
fn passes(field: &str) -> bool {
    const OF_A_SIDE: [&str; 7] = [
        "*",
        "score_*",
        "*_token_ids",
        "*_finish_reason",
        "ref_*_logps",
        "policy_*_logps",
        "reward_*",
    ];
    let side = field
        .replacen("chosen", "*", 1)
        .replacen("rejected", "*", 1);
    !SAMPLE_FIELDS.contains(&field) && !OF_A_SIDE.contains(&side.as_str())
}

/// Scored samples, gathered by prompt in whatever order they come. Memory holds numbers and hashes of the fit ones; their
/// texts are in the spool.
pub struct Samples {
    rules: Rules,
    spool: Spool,
    index: HashMap<String, usize>,
    prompts: Vec<OnePrompt>,
    rows: u64,
    skipped: Skipped,
}

/// The samples of a prompt.
struct OnePrompt {
    id: Value,
    first: Place,
    key: blake3::Hash,
    /// Who gave the rewards: the fingerprints of policy and reference, where rows have them.
    models: [Option<String>; 2],
    /// As the first row has it.
    prompt: Kept,
    /// Fields that all rows so far agree on.
    common: Map<String, Value>,
    /// The first half of each response's hash.
    seen: HashSet<u128>,
    samples: Vec<(Point, Kept)>,
}

/// What a pair wants of a sample besides its [`Point`].
#[derive(Serialize, Deserialize)]
struct Sample {
    response: String,
    token_ids: Option<Vec<u32>>,
    finish_reason: Option<Value>,
    policy_logps: Option<f64>,
}

/// What [`Samples::choose`] made.
pub struct Chosen {
    /// In the order in which their prompts came.
    pub pairs: Vec<Pair>,
    /// Of each pair: (chosen, rejected), before shaping.
    pub points: Vec<(Point, Point)>,
    pub alpha: f64,
    /// The gap as a function of α over the prompts that were compared, α* included.
    pub balance: Balance,
    /// Rows read, prompts read, prompts compared.
    pub rows: u64,
    pub prompts: u64,
    pub compared: u64,
    pub skipped: Skipped,
}

impl Samples {
    pub fn new(rules: Rules, spool: Spool) -> Self {
        Self {
            rules,
            spool,
            index: HashMap::new(),
            prompts: Vec::new(),
            rows: 0,
            skipped: Skipped::default(),
        }
    }

    /// Takes one scored row in. Errors name the row and the field.
    pub fn add(&mut self, row: &Row) -> Result<()> {
        let prompt = self.prompt_of(row)?;
        let (point, sample) = self.sample(row)?;
        self.rows += 1;
        let chars = sample.response.chars().count();
        let truncated = row.finish_reason("finish_reason")? == FinishReason::Length;
        let seen = || {
            let hash = *blake3::hash(sample.response.as_bytes()).as_bytes();
            hash.iter()
                .take(16)
                .fold(0, |sum, &byte| (sum << 8) | u128::from(byte))
        };
        let reason = if truncated && !self.rules.keep_truncated {
            "truncated"
        } else if chars < self.rules.min_chars {
            "too short"
        } else if chars > self.rules.max_chars {
            "too long"
        } else if !self.prompts[prompt].seen.insert(seen()) {
            "duplicate"
        } else {
            let kept = self.spool.put(&sample)?;
            self.prompts[prompt].samples.push((point, kept));
            return Ok(());
        };
        self.skipped.add(reason, 1);
        Ok(())
    }

    /// The index of the row's prompt, made or brought up to date.
    fn prompt_of(&mut self, row: &Row) -> Result<usize> {
        let id = row.id()?;
        let key = row.prompt_key()?;
        if let Some(&index) = self.index.get(&id) {
            let known = &mut self.prompts[index];
            if known.key != key {
                let message = format!(
                    "differs from that of {}, which has the same id {id:?}",
                    known.first
                );
                return Err(row.error("prompt", message));
            }
            for (field, of) in [("policy", &known.models[0]), ("ref", &known.models[1])] {
                if row.opt_string(field)? != of.as_deref() {
                    let message = format!(
                        "differs from that of {}, which has the same prompt: rewards of different models cannot be compared",
                        known.first
                    );
                    return Err(row.error(field, message));
                }
            }
            known
                .common
                .retain(|field, value| row.fields.get(field) == Some(value));
            return Ok(index);
        }
        let common = row.fields.iter().filter(|(field, _)| passes(field));
        let common = common.map(|(f, v)| (f.clone(), v.clone())).collect();
        self.index.insert(id, self.prompts.len());
        self.prompts.push(OnePrompt {
            id: row.id_value()?,
            first: row.place.clone(),
            key,
            models: [row.opt_string("policy")?, row.opt_string("ref")?]
                .map(|model| model.map(str::to_owned)),
            prompt: self.spool.put(&row.prompt_value()?)?,
            common,
            seen: HashSet::new(),
            samples: Vec::new(),
        });
        Ok(self.prompts.len() - 1)
    }

    fn sample(&self, row: &Row) -> Result<(Point, Sample)> {
        let response = row.string("response")?.to_owned();
        let reward = row.number("reward")?;
        if reward.abs() > MAX_REWARD {
            return Err(row.error("reward", format_args!("is beyond ±{MAX_REWARD:e}")));
        }
        let token_ids = row.opt_ids("token_ids")?;
        let length = match (self.rules.length, &token_ids) {
            (Length::Chars, _) => response.chars().count(),
            (Length::Tokens, Some(ids)) => ids.len(),
            (Length::Tokens, None) => {
                return Err(row.error(
                    "token_ids",
                    "is missing: --length tokens counts them; use --length chars",
                ));
            }
        };
        let present = |field: &str| row.fields.get(field).filter(|v| !v.is_null()).cloned();
        let point = Point {
            reward,
            length: length as u64,
        };
        let sample = Sample {
            response,
            token_ids,
            finish_reason: present("finish_reason"),
            policy_logps: row.opt_number("policy_logps")?,
        };
        Ok((point, sample))
    }

    /// Finds α* where the rules leave it open, and pairs the best of each prompt with its worst.
    ///
    /// # Errors
    /// The spool cannot be read or written.
    pub fn choose(mut self) -> Result<Chosen> {
        let read = self.prompts.len() as u64;
        let has_enough = |p: &OnePrompt| p.samples.len() >= self.rules.min_samples;
        self.prompts.retain(has_enough);
        let enough = self.prompts.len() as u64;
        let mut skipped = self.skipped;
        if enough < read {
            skipped.add("prompts with too few samples", read - enough);
        }

        // Of responses that are all as good only the price of length would make a best and a worst.
        let differ = |p: &OnePrompt| {
            p.samples
                .iter()
                .any(|s| s.0.reward != p.samples[0].0.reward)
        };
        self.prompts.retain(differ);
        let compared = self.prompts.len() as u64;
        if compared < enough {
            skipped.add("prompts with equal rewards", enough - compared);
        }

        let points = |p: &OnePrompt| p.samples.iter().map(|(point, _)| *point).collect();
        let points: Vec<Vec<Point>> = self.prompts.iter().map(points).collect();
        let balance = balance_lengths(&points);
        let alpha = self.rules.alpha.unwrap_or(balance.alpha);

        let mut chosen = Chosen {
            pairs: Vec::new(),
            points: Vec::new(),
            alpha,
            balance,
            rows: self.rows,
            prompts: read,
            compared,
            skipped,
        };
        for (prompt, points) in self.prompts.into_iter().zip(points) {
            let Some((best, worst)) = best_and_worst(&points, alpha) else {
                continue;
            };
            let score = |i: usize| shaped(points[i].reward, alpha, points[i].length);
            // Equal scores say nothing about which is better.
            if best == worst || score(best) <= score(worst) {
                chosen.skipped.add("prompts with equal best and worst", 1);
                continue;
            }
            chosen.points.push((points[best], points[worst]));
            let (key, scores) = (prompt.key, [score(best), score(worst)]);
            let fields = prompt.pair([best, worst], scores)?;
            chosen.pairs.push(Pair::new(key, &fields, &self.spool)?);
        }
        Ok(chosen)
    }
}

impl OnePrompt {
    /// The row of a pair: of the best and the worst sample, with their scores.
    fn pair(self, [best, worst]: [usize; 2], scores: [f64; 2]) -> Result<Map<String, Value>> {
        let chosen: Sample = self.samples[best].1.get()?;
        let rejected: Sample = self.samples[worst].1.get()?;
        let mut fields = Map::new();
        let mut put = |field: &str, value: Option<Value>| {
            if let Some(value) = value {
                fields.insert(field.to_owned(), value);
            }
        };
        put("id", Some(self.id));
        put("prompt", Some(self.prompt.get()?));
        put("chosen", Some(chosen.response.as_str().into()));
        put("rejected", Some(rejected.response.as_str().into()));
        put("score_chosen", Some(scores[0].into()));
        put("score_rejected", Some(scores[1].into()));
        // The next round's reference is the policy that scored both.
        if let (Some(of_chosen), Some(of_rejected)) = (chosen.policy_logps, rejected.policy_logps) {
            put("ref_chosen_logps", Some(of_chosen.into()));
            put("ref_rejected_logps", Some(of_rejected.into()));
            put("ref", self.models[0].as_deref().map(Value::from));
        }
        for (side, sample) in [("chosen", chosen), ("rejected", rejected)] {
            put(
                &format!("{side}_token_ids"),
                sample.token_ids.map(Value::from),
            );
            put(&format!("{side}_finish_reason"), sample.finish_reason);
        }
        put("source", Some("generated".into()));
        for (field, value) in self.common {
            fields.entry(field).or_insert(value);
        }
        Ok(fields)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    pub fn rules() -> Rules {
        Rules {
            alpha: Some(0.0),
            length: Length::Chars,
            min_samples: 2,
            min_chars: 1,
            max_chars: 100,
            keep_truncated: false,
        }
    }

    pub fn row(value: Value, line: u64) -> Row {
        let Value::Object(fields) = value else {
            panic!("not an object: {value}")
        };
        let file = "s.jsonl".into();
        Row {
            fields,
            place: Place { file, line },
        }
    }

    fn samples(rules: Rules, rows: &[Value]) -> Result<Samples> {
        let mut samples = Samples::new(rules, Spool::new(None));
        for (i, value) in rows.iter().enumerate() {
            samples.add(&row(value.clone(), i as u64 + 1))?;
        }
        Ok(samples)
    }

    fn choose(rules: Rules, rows: &[Value]) -> Chosen {
        samples(rules, rows).unwrap().choose().unwrap()
    }

    fn error(rules: Rules, rows: &[Value]) -> String {
        samples(rules, rows).err().expect("an error").to_string()
    }

    fn sample(prompt: &str, response: &str, reward: f64) -> Value {
        json!({"prompt": prompt, "response": response, "reward": reward})
    }

    #[test]
    fn a_pair_carries_what_training_needs() {
        let scored = |sample: u64, response: &str, reward: f64| {
            json!({
                "prompt": [{"role": "user", "content": "q"}], "id": "p1", "category": "maths",
                "sample": sample, "response": response, "finish_reason": "stop",
                "token_ids": [sample, 2], "logp": -1.0, "model": "pi", "policy_logps": -10.0 - reward,
                "ref_logps": -12.0, "reward": reward, "policy": "pi", "ref": "pi_ref", "note": sample,
            })
        };
        let got = choose(
            rules(),
            &[
                scored(0, "middling", 0.5),
                scored(1, "good", 1.0),
                scored(2, "bad", -1.0),
            ],
        );
        assert_eq!(
            serde_json::to_string(&got.pairs[0].fields().unwrap()).unwrap(),
            json!({
                "id": "p1", "prompt": [{"role": "user", "content": "q"}],
                "chosen": "good", "rejected": "bad", "score_chosen": 1.0, "score_rejected": -1.0,
                "ref_chosen_logps": -11.0, "ref_rejected_logps": -9.0, "ref": "pi",
                "chosen_token_ids": [1, 2], "chosen_finish_reason": "stop",
                "rejected_token_ids": [2, 2], "rejected_finish_reason": "stop",
                "source": "generated", "category": "maths",
            })
            .to_string()
        );
    }

    #[test]
    fn a_row_needs_only_prompt_response_and_reward() {
        let got = choose(
            rules(),
            &[sample("q", "good", 1.0), sample("q", "bad", 0.0)],
        );
        let pair = got.pairs[0].fields().unwrap();
        let fields: Vec<_> = pair.keys().map(String::as_str).collect();
        let expected = [
            "id",
            "prompt",
            "chosen",
            "rejected",
            "score_chosen",
            "score_rejected",
            "source",
        ];
        assert_eq!(fields, expected);
    }

    #[test]
    fn rewards_of_two_models_are_not_compared() {
        let scored = |response: &str, policy: &str| json!({"prompt": "q", "response": response, "reward": 1.0, "policy": policy});
        let mixed = samples(rules(), &[scored("good", "a"), scored("bad", "b")]);
        let line = mixed.err().unwrap().to_string();
        assert!(
            line.starts_with("s.jsonl:2: field \"policy\" differs from that of s.jsonl:1"),
            "{line}"
        );
        assert!(samples(rules(), &[scored("good", "a"), scored("bad", "a")]).is_ok());
    }

    /// A prompt whose responses are all as good, at whatever price of length, is in no pair and in no average.
    #[test]
    fn equal_rewards_say_nothing_but_who_is_shorter() {
        let rows = [
            sample("equal", "short", 1.0),
            sample("equal", "much longer", 1.0),
            sample("q", "right", 1.0),
            sample("q", "wrong, and long", 0.0),
            sample("r", "right, and long", 1.0),
            sample("r", "wrong", 0.0),
        ];
        for alpha in [Some(0.0), Some(0.01), None] {
            let got = choose(Rules { alpha, ..rules() }, &rows);
            assert_eq!((got.pairs.len(), got.compared), (2, 2), "{alpha:?}");
            assert_eq!(
                got.skipped.0,
                [("prompts with equal rewards".to_owned(), 1)]
            );
            assert_eq!(got.balance.gap, 0.0);
        }
    }

    #[test]
    fn what_is_left_out_is_counted_by_reason() {
        let long = "x".repeat(101);
        let cut =
            json!({"prompt": "q", "response": "cut", "reward": 9.0, "finish_reason": "length"});
        let rows = [
            sample("q", "", 9.0),
            sample("few", "alone", 1.0),
            sample("q", "good", 1.0),
            cut,
            sample("q", &long, 9.0),
            sample("q", "good", 1.0),
            sample("q", "bad", 0.0),
            sample("even", "one", 1.0),
            sample("even", "two", 1.0),
        ];
        let got = choose(rules(), &rows);
        let skipped: Vec<_> = got
            .skipped
            .0
            .iter()
            .map(|(r, n)| (r.as_str(), *n))
            .collect();
        assert_eq!(
            skipped,
            [
                ("too short", 1),
                ("truncated", 1),
                ("too long", 1),
                ("duplicate", 1),
                ("prompts with too few samples", 1),
                ("prompts with equal rewards", 1),
            ]
        );
        assert_eq!((got.rows, got.prompts, got.compared), (9, 3, 1));
        assert_eq!(got.pairs.len(), 1);
        assert_eq!(got.pairs[0].fields().unwrap()["chosen"], "good");

        let kept = Rules {
            keep_truncated: true,
            ..rules()
        };
        assert_eq!(
            choose(kept, &rows).pairs[0].fields().unwrap()["chosen"],
            "cut"
        );
    }

    #[test]
    fn bounds_on_characters_are_inclusive_and_count_characters() {
        let rules = Rules {
            min_chars: 2,
            max_chars: 3,
            ..rules()
        };
        let rows = ["é", "éé", "ééé", "éééé"].map(|r| sample("q", r, r.len() as f64));
        let got = choose(rules, &rows);
        assert_eq!(got.pairs[0].fields().unwrap()["chosen"], "ééé");
        assert_eq!(got.pairs[0].fields().unwrap()["rejected"], "éé");
        assert_eq!(got.points[0].0.length, 3);
    }

    #[test]
    fn prompts_need_not_be_adjacent_and_keep_their_order() {
        let rows = [
            sample("b", "b1", 1.0),
            sample("a", "a1", 1.0),
            sample("b", "b2", 0.0),
            sample("a", "a2", 2.0),
        ];
        let got = choose(rules(), &rows);
        let chosen: Vec<_> = got
            .pairs
            .iter()
            .map(|p| p.fields().unwrap()["chosen"].clone())
            .collect();
        assert_eq!(chosen, ["b1", "a2"]);
    }

    #[test]
    fn length_in_tokens_takes_them_from_the_rows() {
        let tokens = Rules {
            length: Length::Tokens,
            alpha: Some(1.0),
            ..rules()
        };
        let scored = |response: &str, reward: f64, ids: &[u32]| json!({"prompt": "q", "response": response, "reward": reward, "token_ids": ids});
        let got = choose(
            tokens.clone(),
            &[scored("a", 3.0, &[1, 2, 3]), scored("bbbb", 2.0, &[1])],
        );
        assert_eq!(got.pairs[0].fields().unwrap()["chosen"], "bbbb");
        assert_eq!(got.pairs[0].fields().unwrap()["score_rejected"], 0.0);
        assert_eq!(
            error(tokens, &[sample("q", "a", 1.0)]),
            "s.jsonl:1: field \"token_ids\" is missing: --length tokens counts them; use --length chars"
        );
    }

    #[test]
    fn alpha_is_found_where_it_is_not_given() {
        let auto = Rules {
            alpha: None,
            ..rules()
        };
        let rows = [
            sample("q", &"x".repeat(30), 3.0),
            sample("q", &"y".repeat(14), 1.0),
            sample("q", &"z".repeat(14), 0.0),
        ];
        let got = choose(auto, &rows);
        assert_eq!((got.alpha, got.balance.gap_at_zero), (0.125, 16.0));
        assert_eq!(got.pairs[0].fields().unwrap()["chosen"], "y".repeat(14));
    }

    #[test]
    fn errors_name_the_row() {
        let good = sample("q", "a", 1.0);
        for (bad, message) in [
            (
                json!({"prompt": "q", "reward": 1}),
                "field \"response\" is missing",
            ),
            (
                json!({"prompt": "q", "response": "a"}),
                "field \"reward\" is missing",
            ),
            (
                json!({"prompt": "q", "response": "a", "reward": null}),
                "field \"reward\" must be a finite number",
            ),
            (
                json!({"prompt": "q", "response": "a", "reward": 1e200}),
                "field \"reward\" is beyond ±1e150",
            ),
            (
                json!({"response": "a", "reward": 1}),
                "field \"prompt\" is missing",
            ),
            (
                json!({"prompt": "q", "response": "a", "reward": 1, "finish_reason": "abort"}),
                "field \"finish_reason\" must be \"stop\" or \"length\", not \"abort\": drop such rows",
            ),
        ] {
            assert_eq!(
                error(rules(), &[good.clone(), bad]),
                format!("s.jsonl:2: {message}")
            );
        }
        let mixed = [
            json!({"id": 1, "prompt": "q", "response": "a", "reward": 1}),
            json!({"id": "1", "prompt": "r", "response": "a", "reward": 1}),
        ];
        assert_eq!(
            error(rules(), &mixed),
            "s.jsonl:2: field \"prompt\" differs from that of s.jsonl:1, which has the same id \"1\""
        );
    }

    proptest! {
        /// Against a plain retelling of the rules, on rows with many ties and duplicates.
        #[test]
        fn the_choice_agrees_with_brute_force(
            rows in prop::collection::vec((0_usize..3, "[ab]{0,4}", -3_i32..4, prop::bool::ANY), 0..40),
            alpha in prop_oneof![Just(0.0), Just(0.5), Just(1.0)],
            min_samples in 1_usize..4,
        ) {
            let rules = Rules { alpha: Some(alpha), min_samples, min_chars: 1, max_chars: 3, ..rules() };
            let values: Vec<_> = rows.iter().map(|(prompt, response, reward, cut)| json!({
                "prompt": format!("p{prompt}"), "response": response, "reward": reward,
                "finish_reason": if *cut { "length" } else { "stop" },
            })).collect();
            let got = choose(rules, &values);
            for prompt in 0..3 {
                let mut fit: Vec<(&str, f64)> = Vec::new();
                for (p, response, reward, cut) in &rows {
                    if *p == prompt && !cut && (1..=3).contains(&response.len())
                        && !fit.iter().any(|(known, _)| known == response) {
                        fit.push((response, f64::from(*reward)));
                    }
                }
                let score = |r: &(&str, f64)| r.1 - alpha * r.0.len() as f64;
                let high = fit.iter().map(score).fold(f64::NEG_INFINITY, f64::max);
                let low = fit.iter().map(score).fold(f64::INFINITY, f64::min);
                let differ = fit.iter().any(|r| r.1 != fit[0].1);
                let expected = (fit.len() >= min_samples && differ && low < high).then(|| {
                    let best = fit.iter().filter(|r| score(r) == high).min_by_key(|r| r.0.len()).unwrap();
                    let longest = fit.iter().filter(|r| score(r) == low).map(|r| r.0.len()).max().unwrap();
                    let worst = fit.iter().find(|r| score(r) == low && r.0.len() == longest).unwrap();
                    (best.0.to_owned(), worst.0.to_owned())
                });
                let pair = got.pairs.iter().find(|p| p.fields().unwrap()["prompt"] == format!("p{prompt}"));
                let pair = pair.map(|p| {
                    let text = |f: &str| p.fields().unwrap()[f].as_str().unwrap().to_owned();
                    (text("chosen"), text("rejected"))
                });
                prop_assert_eq!(pair, expected);
            }
        }
    }
}
