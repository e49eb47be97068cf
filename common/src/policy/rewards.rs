//! Two models that are a reward: log-probs of responses under both, side by side in memory or in turns.

use super::checkpoint::{
    Checkpoint, Engine, RESPONSE, Response, TOKENS_AT_ONCE, TooLong, is_of_prompt,
};
use super::compute::{Compute, Place, Stage};
use crate::budget;
use crate::cuda;
use crate::jsonl::Row;
use crate::logprob::Group;
use crate::model::Decoder;
use crate::program;
use anyhow::{Context, Result};
use std::sync::OnceLock;

/// Two checkpoints, for implicit rewards: the policy and its reference.
pub struct RewardModel {
    /// π and its tokenizer, which renders the rows for both.
    pub policy: Checkpoint,
    reference: Checkpoint,
    place: Place,
    /// Whether memory holds both models at a time.
    together: bool,
    /// Policy and reference, since they were first wanted: where the sampler brought all of the policy's log-probs it never is.
    ready: [OnceLock<Engine>; 2],
    /// Most tokens of a prompt and its response that memory is left for.
    longest: usize,
}

/// log π and log π_ref of a response, nats.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Logps {
    /// log π(y|x).
    pub policy: f64,
    /// log π_ref(y|x).
    pub reference: f64,
}

impl RewardModel {
    /// Opens both models.
    ///
    /// # Errors
    /// As [`Checkpoint::open`]; or two models with different vocabularies, or larger than the memory budget.
    pub fn open(policy: &str, reference: &str, compute: &Compute) -> Result<Self> {
        let place = compute.place(Stage::Scoring)?;
        let policy = Checkpoint::open(policy).with_context(|| format!("--policy {policy}"))?;
        let reference =
            Checkpoint::open(reference).with_context(|| format!("--ref {reference}"))?;
        policy.check_same_vocabulary(&reference)?;
        let models = [policy.bytes(&place)?, reference.bytes(&place)?];
        let together = fit_together(models, &place)?;
        let ready = match together {
            true => models[0] + models[1],
            false => models[0].max(models[1]),
        };
        let configs = [&policy, &reference].map(|model| &model.weights.config);
        let longest = match &place.gpu {
            None => {
                let left = budget::left_beside(place.budget, ready)?;
                configs.map(|config| left / Decoder::forward_bytes(config, 1))
            }
            Some(gpu) => match gpu.memory()?.free.checked_sub(ready) {
                Some(left) => {
                    configs.map(|config| cuda::most_tokens(config, place.precision, left))
                }
                None => [usize::MAX; 2], // loading them will say so
            },
        };
        if !together {
            program::say("there is memory for one of the two models at a time: they take turns");
        }
        if policy.weights.fingerprint()? == reference.weights.fingerprint()? {
            program::say(
                "the policy and the reference are the same model: every implicit reward will be 0",
            );
        }
        program::say(format_args!("computing in {place}"));
        Ok(Self {
            longest: longest[0].min(longest[1]),
            policy,
            reference,
            place,
            together,
            ready: Default::default(),
        })
    }

    /// Tokens that are worth to be gathered for a call of [`Self::score`].
    ///
    /// # Errors
    /// A GPU that does not answer.
    pub fn tokens_at_once(&self) -> Result<usize> {
        match (&self.place.gpu, self.together) {
            (Some(_), true) => self.ready(REFERENCE)?.tokens_at_once(),
            (Some(_), false) => Ok(TOKENS_IN_TURN_ON_GPU),
            (None, true) => Ok(TOKENS_AT_ONCE.min(self.longest)),
            (None, false) => Ok(TOKENS_IN_TURN),
        }
    }

    /// What policy and reference are called in rows: their fingerprints, and, since log-probs in 16 bits are others, the
    /// format where it is not float32.
    pub fn fingerprints(&self) -> Result<(String, String)> {
        let format = match self.place.precision {
            cuda::Precision::F32 => String::new(),
            _ => format!("+{}", self.dtype()),
        };
        let of =
            |model: &Checkpoint| anyhow::Ok(format!("{}{format}", model.weights.fingerprint()?));
        Ok((of(&self.policy)?, of(&self.reference)?))
    }

    /// The number format that both compute in, as `--dtype` takes it.
    pub fn dtype(&self) -> &'static str {
        self.place.dtype()
    }

    /// The token ids of rows of one prompt, and of the responses that each row is to have (see [`super::responses`]).
    ///
    /// # Errors
    /// A row that cannot be encoded; or ([`TooLong`]) that does not fit both models' contexts or the memory.
    pub fn encode(&self, rows: &[Row], of: impl Fn(&Row) -> &'static [Response]) -> Result<Group> {
        let prompt = rows[0].prompt()?;
        let mut group = Group {
            prompt: self.policy.prompt_ids(&rows[0], &prompt)?,
            responses: vec![],
        };
        for row in rows {
            for names in of(row) {
                let ids = self.policy.response_ids(row, &prompt, *names)?;
                self.check_length(row, names.text, group.prompt.len(), ids.len())?;
                group.responses.push(ids);
            }
        }
        Ok(group)
    }

    /// Log-probs of every response of every group. `known` has the policy's of a group that need not be computed again.
    ///
    /// # Errors
    /// A GPU that fails or has no room.
    pub fn score(&self, groups: &[Group], known: Vec<Option<Vec<f64>>>) -> Result<Vec<Vec<Logps>>> {
        let open: Vec<Group> = groups
            .iter()
            .zip(&known)
            .filter(|(_, known)| known.is_none())
            .map(|(group, _)| group.clone())
            .collect();
        let scored = self.score_with(POLICY, &open)?;
        let reference = self.score_with(REFERENCE, groups)?;
        let mut scored = scored.into_iter();
        Ok(known
            .into_iter()
            .zip(reference)
            .map(|(known, reference)| {
                let policy = known
                    .or_else(|| scored.next())
                    .expect("one for every group");
                policy
                    .into_iter()
                    .zip(reference)
                    .map(|(policy, reference)| Logps { policy, reference })
                    .collect()
            })
            .collect())
    }

    /// Log-probs under one of the models.
    fn score_with(&self, which: usize, groups: &[Group]) -> Result<Vec<Vec<f64>>> {
        if groups.is_empty() {
            return Ok(vec![]);
        }
        match self.together {
            true => self.ready(which)?.score(groups, self.longest),
            false => self.engine(which)?.score(groups, self.longest),
        }
    }

    /// One of the models, which stays ready.
    fn ready(&self, which: usize) -> Result<&Engine> {
        let place = &self.ready[which];
        match place.get() {
            Some(engine) => Ok(engine),
            None => {
                let engine = self.engine(which)?;
                Ok(place.get_or_init(|| engine))
            }
        }
    }

    fn engine(&self, which: usize) -> Result<Engine> {
        [&self.policy, &self.reference][which].engine(&self.place)
    }

    /// The policy's log-probs that the sampler wrote into the rows of a prompt, if it ran these very weights in this
    /// number format, on the very tokens of `group`, which [`Self::encode`] made of the rows.
    pub fn known(&self, rows: &[Row], group: &Group) -> Result<Option<Vec<f64>>> {
        let fingerprint = self.policy.weights.fingerprint()?;
        if rows.len() != group.responses.len() {
            return Ok(None); // pairs
        }
        rows.iter()
            .zip(&group.responses)
            .map(|(row, response)| {
                // A row that calls a cut response finished is scored with an end that the sampler did not draw.
                let same = is_of_prompt(row, &group.prompt)?
                    && row.opt_string("model")? == Some(fingerprint)
                    && row.opt_string("dtype")? == Some(self.place.dtype())
                    && row.opt_ids(RESPONSE.token_ids)?.as_ref() == Some(response);
                Ok(row.opt_number("logp")?.filter(|_| same))
            })
            .collect()
    }

    fn check_length(&self, row: &Row, field: &str, prompt: usize, response: usize) -> Result<()> {
        let contexts = [&self.policy, &self.reference].map(|m| m.weights.config.context);
        let (tokens, context) = (prompt + response, contexts[0].min(contexts[1]));
        let message = if tokens > context {
            format!("and its prompt have {tokens} tokens, but the context is {context}")
        } else if tokens > self.longest {
            let longest = self.longest;
            format!("and its prompt have {tokens} tokens, but there is memory for {longest}")
        } else {
            return Ok(());
        };
        Err(TooLong::of(row, field, message))
    }
}

/// The number of a model in [`RewardModel::ready`].
const POLICY: usize = 0;
const REFERENCE: usize = 1;

/// Whether models of so many bytes can be ready at once, with a tenth of the memory left for batches.
fn fit_together(models: [usize; 2], place: &Place) -> Result<bool> {
    let (free, total) = match &place.gpu {
        Some(gpu) => gpu.memory().map(|memory| (memory.free, memory.total))?,
        None => budget::free_and_total(place.budget),
    };
    Ok(models[0] + models[1] + total / 10 <= free)
}

/// Tokens that are gathered when models take turns on a GPU: so many that loading them does not matter.
const TOKENS_IN_TURN_ON_GPU: usize = 8 << 20;

/// The same on a CPU, where loading a model takes as long as scoring some thousand.
const TOKENS_IN_TURN: usize = 32 << 10;
