//! The implicit reward of preference pairs: from log-probs in their rows, or from two models.

use anyhow::{Context, Result, ensure};
use common::flags;
use common::jsonl::Row;
use common::policy::{
    Compute, Gathered, Logps, OnNan, PAIR, Ready, RewardModel, TooLong, is_of_prompt,
};
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
    models: Option<Both>,
    on_nan: OnNan,
}

/// The models, what rows call them, and the pairs that wait for them, those among them that brought log-probs with these.
struct Both {
    models: RewardModel,
    names: (String, String),
    gathered: Gathered<Scored>,
}

/// A pair with its log-probs; none where it is left out, which has been said.
pub type Scored = (Row, Option<[Logps; 2]>);

impl Scorer {
    pub fn open(args: &Models) -> Result<Self> {
        let models = match (&args.policy, &args.reference) {
            (Some(policy), Some(reference)) => {
                let models = RewardModel::open(policy, reference, &args.compute)?;
                Some(Both {
                    names: models.fingerprints()?,
                    gathered: Gathered::new(&models)?,
                    models,
                })
            }
            _ => None,
        };
        let on_nan = args.compute.on_nan;
        Ok(Self { models, on_nan })
    }

    /// What the log-probs depend on: the models' fingerprints and number format, as settings of a run.
    pub fn settings(&self) -> Map<String, Value> {
        let Some(Both { models, names, .. }) = &self.models else {
            return Map::new();
        };
        let date = models.policy.chat.date();
        settings(json!({"policy": names.0, "ref": names.1, "dtype": models.dtype(), "date": date}))
    }

    /// Takes a pair; gives those that are done now, in order.
    ///
    /// # Errors
    /// A row that is wrong; a log-prob that is not a number, unless such pairs are to be skipped.
    pub fn push(&mut self, row: Row) -> Result<Vec<Scored>> {
        let Some(Both {
            models,
            names,
            gathered,
        }) = &mut self.models
        else {
            let logps = given(&row).with_context(|| {
                "without --policy and --ref every row needs the log-probs that dice-score writes"
            })?;
            return Ok(vec![(row, Some(logps))]);
        };
        let theirs =
            row.opt_string("policy")? == Some(&names.0) && row.opt_string("ref")? == Some(&names.1);
        let known = given(&row).ok().filter(|_| theirs);
        let (known, group) = match models.encode(std::slice::from_ref(&row), |_| &PAIR) {
            Ok(group) if known.is_some() && is_of_prompt(&row, &group.prompt)? => (known, None),
            Ok(group) => (None, Some(group)),
            // Somebody had the memory for it.
            Err(err) if TooLong::is(&err) && known.is_some() => (known, None),
            Err(err) if TooLong::is(&err) => {
                program::say(format_args!("{err}; left out"));
                (None, None)
            }
            Err(err) => return Err(err),
        };
        let ready = gathered.push(models, (row, known), group, None)?;
        self.checked(ready)
    }

    /// Scores the pairs that wait.
    ///
    /// # Errors
    /// As [`Self::push`].
    pub fn finish(&mut self) -> Result<Vec<Scored>> {
        let Some(Both {
            models, gathered, ..
        }) = &mut self.models
        else {
            return Ok(vec![]);
        };
        let ready = gathered.score(models)?;
        self.checked(ready)
    }

    /// Pairs with the log-probs that they brought or got.
    fn checked(&self, ready: Ready<Scored>) -> Result<Vec<Scored>> {
        let mut done = vec![];
        for ((row, known), scored) in ready {
            let logps = match (known, &scored[..]) {
                (None, &[chosen, rejected]) => self.finite(&row, [chosen, rejected])?,
                (known, _) => known,
            };
            done.push((row, logps));
        }
        Ok(done)
    }

    /// The log-probs if they are numbers; if not, what is to be done about it.
    fn finite(&self, row: &Row, logps: [Logps; 2]) -> Result<Option<[Logps; 2]>> {
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
