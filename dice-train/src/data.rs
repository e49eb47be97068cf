//! From preference rows to pairs ready to train on: token ids, lengths, and the reference's log-probs.

use crate::Args;
use anyhow::{Context, Result, anyhow, ensure};
use common::dpo::Pair;
use common::jsonl::{Place, Row};
use common::logprob::Group;
use common::policy::{CHOSEN, Checkpoint, OnNan, REJECTED, TooLong, is_of_prompt};
use common::program;
use common::progress::Progress;
use common::records::Prompt;

/// The pairs of the input, and where the reference's log-probs are still missing.
pub struct Pairs {
    pub pairs: Vec<Pair>,
    /// The rows that they come from.
    pub places: Vec<Place>,
    /// Indices of the pairs whose rows did not bring them.
    missing: Vec<usize>,
}

impl Pairs {
    /// Reads and encodes all rows. `reference` is the fingerprint that log-probs in the rows must come from to be taken;
    /// there is memory for pairs of `longest` tokens.
    pub fn read(
        args: &Args,
        model: &Checkpoint,
        reference: Option<&str>,
        longest: usize,
        progress: &Progress,
    ) -> Result<Self> {
        let mut found = Self {
            pairs: vec![],
            places: vec![],
            missing: vec![],
        };
        for row in common::jsonl::rows(&args.files) {
            let row = row?;
            progress.read(1);
            let prompt = row.prompt()?;
            if !args.split.holds(&prompt) {
                progress.skip("not in --split", 1);
                continue;
            }
            let mut pair = match encode(&row, &prompt, model, longest) {
                Err(err) if TooLong::is(&err) => {
                    progress.leave_out("too long", err);
                    continue;
                }
                encoded => encoded?,
            };
            if pair.chosen == pair.rejected {
                progress.skip("chosen equals rejected", 1);
            } else if pair.chosen.is_empty() || pair.rejected.is_empty() {
                // Nothing to raise or to lower, and no length to divide by.
                progress.skip("a response without tokens", 1);
            } else if pair.length() > args.max_length {
                progress.skip("longer than --max-length", 1);
            } else {
                let given = reference.map(|r| given(&row, r, &pair.prompt));
                match given.transpose()?.flatten() {
                    Some(logps) => pair.reference = logps,
                    None => found.missing.push(found.pairs.len()),
                }
                found.pairs.push(pair);
                found.places.push(row.place);
            }
        }
        Ok(found)
    }

    /// Whether a reference has to be run.
    pub fn needs_reference(&self) -> bool {
        !self.missing.is_empty()
    }

    /// The pairs whose reference log-probs came with their rows.
    pub fn given(&self) -> usize {
        self.pairs.len() - self.missing.len()
    }

    /// Runs the reference, `score`, on the pairs that miss its log-probs.
    ///
    /// # Errors
    /// A log-prob that is not a number, unless such pairs are to be skipped.
    pub fn fill(
        &mut self,
        score: impl Fn(&[Group]) -> Result<Vec<Vec<f64>>>,
        on_nan: OnNan,
    ) -> Result<()> {
        let mut broken = 0;
        // A few at a time, so that a signal is heard.
        for part in self.missing.chunks(32) {
            program::check()?;
            let groups: Vec<Group> = part.iter().map(|&i| self.pairs[i].group()).collect();
            for (&i, logps) in part.iter().zip(score(&groups)?) {
                self.pairs[i].reference = (logps[0], logps[1]);
                if !self.is_usable(i) {
                    let err = anyhow!(
                        "{}: the reference's log-prob is not a number",
                        self.places[i]
                    );
                    ensure!(on_nan == OnNan::Skip, err);
                    program::say(format_args!("{err}; left out"));
                    broken += 1;
                }
            }
        }
        if broken > 0 {
            let all = self.pairs.len();
            program::say(format_args!(
                "skipped: {broken} of {all} pairs, not a number"
            ));
        }
        Ok(())
    }

    /// Whether the reference has log-probs of a pair.
    pub fn is_usable(&self, i: usize) -> bool {
        let (chosen, rejected) = self.pairs[i].reference;
        chosen.is_finite() && rejected.is_finite()
    }

    /// A hash of all pairs in their order.
    pub fn hash(&self) -> String {
        let mut hash = blake3::Hasher::new();
        for pair in &self.pairs {
            for ids in [&pair.prompt, &pair.chosen, &pair.rejected] {
                hash.update(&(ids.len() as u64).to_le_bytes());
                ids.iter().for_each(|id| {
                    hash.update(&id.to_le_bytes());
                });
            }
        }
        hash.finalize().to_hex()[..16].to_owned()
    }
}

/// A row's pair, without its reference.
///
/// # Errors
/// A row that is wrong; or ([`TooLong`]) longer than the context or the memory.
fn encode(row: &Row, prompt: &Prompt, model: &Checkpoint, longest: usize) -> Result<Pair> {
    let pair = Pair {
        prompt: model.prompt_ids(row, prompt)?,
        chosen: model.response_ids(row, prompt, CHOSEN)?,
        rejected: model.response_ids(row, prompt, REJECTED)?,
        reference: (0.0, 0.0),
    };
    let (length, context) = (pair.length(), model.weights.config.context);
    let tokens = pair.prompt.len() + pair.chosen.len() + pair.rejected.len();
    let message = if length > context {
        format!("or \"rejected\" and the prompt have {length} tokens, but the context is {context}")
    } else if tokens > longest {
        format!(
            "and \"rejected\" have {tokens} tokens with their prompt, but there is memory for {longest}"
        )
    } else {
        return Ok(pair);
    };
    Err(TooLong::of(row, "chosen", message))
}

/// The reference's log-probs from a row, if they are of this very model (as `ref`, or as the `policy` that scored it) and of
/// these tokens of the prompt.
fn given(row: &Row, reference: &str, prompt: &[u32]) -> Result<Option<(f64, f64)>> {
    if !is_of_prompt(row, prompt)? {
        return Ok(None);
    }
    for role in ["ref", "policy"] {
        if row.opt_string(role)? == Some(reference) {
            let chosen = row.opt_number(&format!("{role}_chosen_logps"))?;
            let rejected = row.opt_number(&format!("{role}_rejected_logps"))?;
            if let (Some(chosen), Some(rejected)) = (chosen, rejected) {
                return Ok(Some((chosen, rejected)));
            }
        }
    }
    Ok(None)
}

/// Opens `--ref`, which must share the policy's vocabulary.
pub fn open_reference(name: &str, model: &Checkpoint) -> Result<Checkpoint> {
    let reference = Checkpoint::open(name).with_context(|| format!("--ref {name}"))?;
    model.check_same_vocabulary(&reference)?;
    Ok(reference)
}
