//! Replay: a share γ of the output comes from offline pairs (the data that the first policy was trained on), which
//! keeps a policy from forgetting what it knew before it judged itself (DICE, arXiv 2406.09760, section 4).

use std::collections::HashSet;

use anyhow::Result;
use serde_json::{Map, Value};

use super::{Pair, Skipped, Spool};
use crate::jsonl::Row;

/// Offline preference pairs, one to a prompt.
pub struct Replay {
    spool: Spool,
    pairs: Vec<Pair>,
    prompts: HashSet<blake3::Hash>,
    skipped: Skipped,
}

/// What [`mix`] made.
pub struct Mix {
    /// The generated pairs in their order, then the offline ones in theirs.
    pub pairs: Vec<Pair>,
    pub generated: usize,
    pub replayed: usize,
    /// Generated pairs of a prompt that had one already, under another id: left out.
    pub repeated: usize,
}

impl Replay {
    /// None yet.
    pub fn new(spool: Spool) -> Self {
        Self {
            spool,
            pairs: vec![],
            prompts: HashSet::new(),
            skipped: Skipped::default(),
        }
    }

    /// Takes in one preference row in any of TRL's forms; what comes out has `prompt`, and text as `chosen` and `rejected`.
    /// A prompt that is there already, and a pair without a difference, are counted and left out.
    pub fn add(&mut self, row: &Row) -> Result<()> {
        let chosen = row.response("chosen")?;
        let rejected = row.response("rejected")?;
        if chosen == rejected {
            self.skipped.add("replay pairs without a difference", 1);
            return Ok(());
        }
        let key = row.prompt_key()?;
        if !self.prompts.insert(key) {
            self.skipped.add("replay pairs of a repeated prompt", 1);
            return Ok(());
        }
        let mut fields = Map::from_iter([
            ("id".to_owned(), row.id_value()?),
            ("prompt".to_owned(), row.prompt_value()?),
            ("chosen".to_owned(), Value::from(chosen)),
            ("rejected".to_owned(), Value::from(rejected)),
            ("source".to_owned(), Value::from("replay")),
        ]);
        for (field, value) in &row.fields {
            if !fields.contains_key(field) {
                fields.insert(field.clone(), value.clone());
            }
        }
        self.pairs.push(Pair::new(key, &fields, &self.spool)?);
        Ok(())
    }

    /// The number of pairs on offer.
    pub fn len(&self) -> usize {
        self.pairs.len()
    }

    pub fn is_empty(&self) -> bool {
        self.pairs.is_empty()
    }

    pub fn skipped(&self) -> &Skipped {
        &self.skipped
    }
}

/// Mixes generated and offline pairs: the largest output of which a share `gamma` in [0, 1] is offline, to within
/// half a pair, and in which no prompt occurs twice. Where one side has nothing, the other is kept whole at a `gamma` between, for
/// there is no share to hold. Which pairs are taken depends on the seed and their prompts alone, not on their order (of
/// generated ones of one prompt the first counts).
pub fn mix(generated: Vec<Pair>, replay: Replay, gamma: f64, seed: u64) -> Mix {
    let (mut generated, offline) = (generated, replay.pairs);
    let mut ours = HashSet::new();
    let all = generated.len();
    generated.retain(|pair| ours.insert(pair.prompt));
    let repeated = all - generated.len();
    let shared = |pair: &Pair| ours.contains(&pair.prompt);
    let both = offline.iter().filter(|pair| shared(pair)).count();
    let distinct = generated.len() + offline.len() - both;
    let (n_generated, n_replayed) = sizes(generated.len(), offline.len(), distinct, gamma);

    // Shared prompts may go to the offline side only while enough remain for the generated one.
    let mut lendable = generated.len() - n_generated;
    let mut lent = HashSet::new();
    let mut taken = HashSet::new();
    for at in shuffled(&offline, seed, "replay") {
        let pair = &offline[at];
        if taken.len() == n_replayed {
            break;
        }
        if shared(pair) {
            if lendable == 0 {
                continue;
            }
            lendable -= 1;
            lent.insert(pair.prompt);
        }
        taken.insert(pair.prompt);
    }
    let kept: HashSet<_> = shuffled(&generated, seed, "generated")
        .into_iter()
        .map(|at| generated[at].prompt)
        .filter(|prompt| !lent.contains(prompt))
        .take(n_generated)
        .collect();

    let mut pairs = generated;
    pairs.retain(|pair| kept.contains(&pair.prompt));
    pairs.extend(offline.into_iter().filter(|p| taken.contains(&p.prompt)));
    Mix {
        pairs,
        generated: n_generated,
        replayed: n_replayed,
        repeated,
    }
}

/// How many of each: the largest total n of which n·γ, rounded (a half down), can be offline.
fn sizes(generated: usize, offline: usize, distinct: usize, gamma: f64) -> (usize, usize) {
    if gamma <= 0.0 || (offline == 0 && gamma < 1.0) {
        return (generated, 0);
    }
    if gamma >= 1.0 || generated == 0 {
        return (0, offline);
    }
    // Some n ≤ 1 always fits: one pair of the side that its share rounds to.
    let mut n = distinct;
    loop {
        let replayed = (gamma * n as f64 - 0.5).ceil().max(0.0) as usize;
        if replayed <= offline && n - replayed <= generated {
            return (n - replayed, replayed);
        }
        n -= 1;
    }
}

/// The indices of the pairs in an order that depends on the seed and each prompt.
fn shuffled(pairs: &[Pair], seed: u64, side: &str) -> Vec<usize> {
    let key = |pair: &Pair| {
        let mut hasher = blake3::Hasher::new();
        hasher.update(side.as_bytes());
        hasher.update(&seed.to_le_bytes());
        hasher.update(pair.prompt.as_bytes());
        *hasher.finalize().as_bytes()
    };
    let mut order: Vec<usize> = (0..pairs.len()).collect();
    order.sort_by_cached_key(|&at| key(&pairs[at]));
    order
}

#[cfg(test)]
mod tests {
    use super::super::choose::tests::row;
    use super::*;
    use crate::records::Prompt;
    use proptest::prelude::*;
    use serde_json::json;

    fn replay(rows: &[Value]) -> Result<Replay> {
        let mut replay = Replay::new(Spool::new(None));
        for (i, value) in rows.iter().enumerate() {
            replay.add(&row(value.clone(), i as u64 + 1))?;
        }
        Ok(replay)
    }

    fn offline(prompts: impl IntoIterator<Item = u32>) -> Replay {
        let rows: Vec<_> = prompts
            .into_iter()
            .map(|p| json!({"prompt": p.to_string(), "chosen": "a", "rejected": "b"}))
            .collect();
        replay(&rows).unwrap()
    }

    fn generated(prompts: impl IntoIterator<Item = u32>) -> Vec<Pair> {
        let spool = Spool::new(None);
        let generated = |pair: Pair| {
            let mut fields = pair.fields().unwrap();
            fields.insert("source".into(), "generated".into());
            Pair::new(pair.prompt, &fields, &spool).unwrap()
        };
        offline(prompts).pairs.into_iter().map(generated).collect()
    }

    #[test]
    fn trl_rows_of_every_form_become_one_form() {
        let turn = |role: &str, content: &str| json!({"role": role, "content": content});
        let got = replay(&[
            json!({"score": 7, "prompt": "p", "chosen": "good", "rejected": "bad", "source": "x"}),
            json!({"prompt": [turn("user", "q")], "chosen": [turn("assistant", "good")], "rejected": [turn("assistant", "bad")]}),
            json!({"id": 3, "chosen": [turn("user", "r"), turn("assistant", "good")], "rejected": [turn("user", "r"), turn("assistant", "bad")]}),
        ])
        .unwrap();
        let text = |i: usize| serde_json::to_string(&got.pairs[i].fields().unwrap()).unwrap();
        let id = Prompt::Text("p".into()).derived_id();
        assert_eq!(
            text(0),
            json!({"id": id, "prompt": "p", "chosen": "good", "rejected": "bad", "source": "replay", "score": 7}).to_string()
        );
        assert_eq!(got.pairs[1].fields().unwrap()["chosen"], "good");
        assert_eq!(got.pairs[1].fields().unwrap()["rejected"], "bad");
        assert_eq!(
            got.pairs[2].fields().unwrap()["prompt"],
            json!([turn("user", "r")])
        );
        assert_eq!(got.pairs[2].fields().unwrap()["id"], 3);
        assert_eq!(got.len(), 3);
    }

    #[test]
    fn prompts_with_other_tools_are_others() {
        let pair =
            |more: Value| json!({"prompt": "p", "chosen": "a", "rejected": "b", "tools": more});
        let got = replay(&[
            pair(json!(null)),
            pair(json!([{"name": "clock"}])),
            pair(json!("[{\"name\": \"clock\"}]")),
            pair(json!([])),
        ])
        .unwrap();
        assert_eq!(got.len(), 3, "a list is the same as JSON in a string");
    }

    #[test]
    fn repeated_prompts_and_empty_differences_are_counted() {
        let got = replay(&[
            json!({"prompt": "p", "chosen": "a", "rejected": "a"}),
            json!({"prompt": "p", "chosen": "a", "rejected": "b"}),
            json!({"prompt": [{"role": "user", "content": "p"}], "chosen": "c", "rejected": "d"}),
        ])
        .unwrap();
        assert_eq!(got.len(), 1);
        assert_eq!(
            got.skipped().0,
            [
                ("replay pairs without a difference".to_owned(), 1),
                ("replay pairs of a repeated prompt".to_owned(), 1)
            ]
        );
    }

    #[test]
    fn errors_name_the_row_and_the_field() {
        for (bad, message) in [
            (
                json!({"prompt": "p", "chosen": "a"}),
                "field \"rejected\" is missing",
            ),
            (
                json!({"prompt": "p", "chosen": 1, "rejected": "b"}),
                "field \"chosen\" must be a string, or a list of messages that ends with an assistant's text",
            ),
            (
                json!({"chosen": "a", "rejected": "b"}),
                "field \"prompt\" is missing",
            ),
            (
                json!({"prompt": "", "chosen": "a", "rejected": "b"}),
                "field \"prompt\" is empty",
            ),
            (
                json!({"prompt": "p", "chosen": [{"role": "user", "content": "a"}], "rejected": "b"}),
                "field \"chosen\" must be a string, or a list of messages that ends with an assistant's text",
            ),
            (
                json!({"chosen": [{"role": "assistant", "content": "a"}], "rejected": "b"}),
                "field \"prompt\" is missing, and \"chosen\" does not hold it",
            ),
        ] {
            let err = replay(&[bad]).err().expect("an error").to_string();
            assert_eq!(err, format!("s.jsonl:1: {message}"));
        }
    }

    #[test]
    fn the_share_holds_and_the_output_is_as_large_as_it_can_be() {
        // The paper's case: both sides have every prompt.
        let got = mix(generated(0..100), offline(0..100), 0.5, 1);
        assert_eq!(
            (got.generated, got.replayed, got.pairs.len()),
            (50, 50, 100)
        );
        // Nothing shared: all of both.
        let got = mix(generated(0..10), offline(10..20), 0.5, 1);
        assert_eq!((got.generated, got.replayed), (10, 10));
        // The scarcer side sets the size.
        let got = mix(generated(0..90), offline(90..100), 0.25, 1);
        assert_eq!((got.generated, got.replayed), (32, 10)); // 42 / 4 = 10.5
        // Half a pair is rounded to the generated side.
        let got = mix(generated(0..1), offline(0..1), 0.5, 1);
        assert_eq!((got.generated, got.replayed), (1, 0));
        for (gamma, sizes) in [(0.0, (4, 0)), (1.0, (0, 5))] {
            let got = mix(generated(0..4), offline(2..7), gamma, 1);
            assert_eq!((got.generated, got.replayed), sizes);
        }
    }

    #[test]
    fn a_side_with_nothing_leaves_the_other_whole() {
        assert_eq!(mix(generated(0..4), offline(0..0), 0.5, 1).pairs.len(), 4);
        assert_eq!(mix(vec![], offline(0..4), 0.5, 1).pairs.len(), 4);
        assert_eq!(mix(generated(0..4), offline(0..0), 1.0, 1).pairs.len(), 0);
        assert_eq!(mix(vec![], offline(0..0), 0.5, 1).pairs.len(), 0);
    }

    #[test]
    fn the_seed_alone_decides_and_the_order_stays() {
        let prompts = |mix: Mix| -> Vec<u32> {
            let prompt = |p: Pair| {
                p.fields().unwrap()["prompt"]
                    .as_str()
                    .unwrap()
                    .parse()
                    .unwrap()
            };
            mix.pairs.into_iter().map(prompt).collect()
        };
        let a = prompts(mix(generated(0..50), offline(0..50), 0.5, 7));
        let b = prompts(mix(generated(0..50), offline(0..50), 0.5, 7));
        assert_eq!(a, b);
        assert!(a[..25].is_sorted() && a[25..].is_sorted());
        let mut backward = prompts(mix(
            generated((0..50).rev()),
            offline((0..50).rev()),
            0.5,
            7,
        ));
        backward[..25].reverse();
        backward[25..].reverse();
        assert_eq!(a, backward);
        assert_ne!(a, prompts(mix(generated(0..50), offline(0..50), 0.5, 8)));
    }

    #[test]
    fn a_prompt_under_two_ids_counts_once() {
        let twice = || generated([0, 1, 2]).into_iter().chain(generated([0, 1]));
        for gamma in [0.0, 0.5, 1.0] {
            let got = mix(twice().collect(), offline([0, 7]), gamma, 1);
            let prompts: HashSet<_> = got.pairs.iter().map(|pair| pair.prompt).collect();
            assert_eq!(prompts.len(), got.pairs.len());
            assert_eq!(got.generated + got.replayed, got.pairs.len());
            assert_eq!(got.repeated, 2);
        }
    }

    proptest! {
        #[test]
        fn sizes_agree_with_trying_them_all(
            ours in 0_u32..25, theirs in 0_u32..25, shared in 0_u32..25,
            gamma in prop_oneof![Just(0.0), Just(0.5), Just(1.0), 0.0..=1.0_f64], seed: u64,
        ) {
            let shared = shared.min(ours).min(theirs);
            let got = mix(generated(0..ours), offline(ours - shared..ours - shared + theirs), gamma, seed);

            let prompts: HashSet<_> = got.pairs.iter().map(|p| p.prompt).collect();
            prop_assert_eq!(prompts.len(), got.pairs.len(), "a prompt twice");
            let of = |source: &str| got.pairs.iter().filter(|p| p.fields().unwrap()["source"] == source).count();
            prop_assert_eq!((of("generated"), of("replay")), (got.generated, got.replayed));

            let one_side = ours == 0 || theirs == 0;
            if one_side && gamma > 0.0 && gamma < 1.0 {
                prop_assert_eq!(got.pairs.len() as u32, ours + theirs);
            } else {
                let near = |g: u32, r: u32| {
                    let off = f64::from(r) - gamma * f64::from(g + r);
                    (-0.5..0.5).contains(&off)
                };
                let most = (0..=ours)
                    .flat_map(|g| (0..=theirs).map(move |r| (g, r)))
                    .filter(|&(g, r)| g + r <= ours + theirs - shared && near(g, r))
                    .map(|(g, r)| g + r)
                    .max();
                prop_assert_eq!(Some(got.pairs.len() as u32), most);
                prop_assert!(near(got.generated as u32, got.replayed as u32));
            }
        }
    }
}
