//! The implicit reward of preference pairs: from log-probs in their rows, or from two models.

use anyhow::{Context, Result, ensure};
use common::flags;
use common::jsonl::Row;
use common::logprob::Group;
use common::policy::{Compute, Logps, OnNan, PAIR, RewardModel, TooLong, is_of_prompt};
use common::program;
use common::run::settings;
use serde_json::{Map, Value, json};

/// The two models of an implicit reward, where they are to be run.
#[derive(clap::Args)]
pub struct Models {
    /// The tuned model pi: a Hugging Face folder, a .gguf file, or a hub id org/name[@revision]
    #[arg(long, requires = "reference")]
    pub policy: Option<String>,
    /// Its reference pi_ref, of the same vocabulary
    #[arg(long = "ref", requires = "policy")]
    pub reference: Option<String>,
    /// Scale of the implicit reward
    #[arg(long, default_value_t = 0.1, value_parser = flags::positive::<f64>)]
    pub beta: f64,
    #[command(flatten, next_help_heading = "Machine")]
    pub compute: Compute,
}

/// Gives pairs their log-probs: from their rows, or from the models.
pub struct Scorer {
    models: Option<(RewardModel, (String, String))>,
    on_nan: OnNan,
    /// Pairs that wait until there are tokens enough for a forward pass; without tokens if they are too long for one.
    waiting: Vec<(Row, Option<Group>)>,
    tokens: usize,
    /// Tokens enough.
    limit: usize,
}

/// A pair with its log-probs; none where it is left out, which has been said.
pub type Scored = (Row, Option<[Logps; 2]>);

impl Scorer {
    pub fn open(args: &Models) -> Result<Self> {
        let models = match (&args.policy, &args.reference) {
            (Some(policy), Some(reference)) => {
                let models = RewardModel::open(policy, reference, &args.compute)?;
                let fingerprints = models.fingerprints()?;
                Some((models, fingerprints))
            }
            _ => None,
        };
        let limit = match &models {
            Some((models, _)) => models.tokens_at_once()?,
            None => 0,
        };
        Ok(Self {
            limit,
            models,
            on_nan: args.compute.on_nan,
            waiting: vec![],
            tokens: 0,
        })
    }

    /// What the log-probs depend on: the models' fingerprints and number format, as settings of a run.
    pub fn settings(&self) -> Map<String, Value> {
        let Some((models, (policy, reference))) = &self.models else {
            return Map::new();
        };
        let date = models.policy.chat.date();
        settings(json!({"policy": policy, "ref": reference, "dtype": models.dtype(), "date": date}))
    }

    /// Takes a pair; gives those that are done now, in order.
    ///
    /// # Errors
    /// A row that is wrong; a log-prob that is not a number, unless such pairs are to be skipped.
    pub fn push(&mut self, row: Row) -> Result<Vec<Scored>> {
        let Some((models, (policy, reference))) = &self.models else {
            let logps = given(&row).with_context(|| {
                "without --policy and --ref every row needs the log-probs that dice-score writes"
            })?;
            return Ok(vec![(row, Some(logps))]);
        };
        let group = match models.encode(std::slice::from_ref(&row), |_| &PAIR) {
            Err(err) if TooLong::is(&err) => {
                program::say(format_args!("{err}; left out"));
                None
            }
            encoded => Some(encoded?),
        };
        let prompt = group.as_ref().map_or(&[][..], |group| &group.prompt);
        let theirs = row.opt_string("policy")? == Some(policy)
            && row.opt_string("ref")? == Some(reference)
            && is_of_prompt(&row, prompt)?;
        if let (true, Ok(logps)) = (theirs, given(&row)) {
            return Ok(vec![(row, Some(logps))]);
        }
        let tokens = group.as_ref().map_or(0, Group::tokens);
        let ready = if self.tokens + tokens > self.limit {
            self.finish()?
        } else {
            vec![]
        };
        self.tokens += tokens;
        self.waiting.push((row, group));
        Ok(ready)
    }

    /// Scores the pairs that wait.
    ///
    /// # Errors
    /// As [`Self::push`].
    pub fn finish(&mut self) -> Result<Vec<Scored>> {
        let Some((models, _)) = &self.models else {
            return Ok(vec![]);
        };
        self.tokens = 0;
        let waiting = std::mem::take(&mut self.waiting);
        let groups: Vec<Group> = waiting
            .iter()
            .filter_map(|(_, group)| group.clone())
            .collect();
        let mut scores = models.score(&groups, vec![None; groups.len()])?.into_iter();
        let mut done = vec![];
        for (row, group) in waiting {
            let logps = match group.and_then(|_| scores.next()).as_deref() {
                Some(&[chosen, rejected]) => self.checked(&row, [chosen, rejected])?,
                _ => None,
            };
            done.push((row, logps));
        }
        Ok(done)
    }

    /// The log-probs if they are numbers; if not, what is to be done about it.
    fn checked(&self, row: &Row, logps: [Logps; 2]) -> Result<Option<[Logps; 2]>> {
        let finite = logps
            .iter()
            .all(|l| l.policy.is_finite() && l.reference.is_finite());
        if finite {
            return Ok(Some(logps));
        }
        let message = "or \"rejected\" has a log-prob that is not a number: are the models sound?";
        let err = row.error("chosen", message);
        ensure!(self.on_nan == OnNan::Skip, err);
        program::say(format_args!("{err}; left out"));
        Ok(None)
    }
}

/// The log-probs that a row brings.
fn given(row: &Row) -> Result<[Logps; 2]> {
    let of = |role: &str| -> Result<Logps> {
        Ok(Logps {
            policy: row.number(&format!("policy_{role}_logps"))?,
            reference: row.number(&format!("ref_{role}_logps"))?,
        })
    };
    Ok([of("chosen")?, of("rejected")?])
}
