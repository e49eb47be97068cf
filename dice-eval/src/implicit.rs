//! The implicit reward of preference pairs: from log-probs in their rows, or from two models.

use anyhow::{Context, Result, ensure};
use common::jsonl::Row;
use common::policy::{Compute, Logps, Prefers, RewardModel};
use common::program;

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
    #[arg(long, default_value_t = 0.1)]
    pub beta: f64,
    #[command(flatten)]
    pub compute: Compute,
}

/// Gives pairs their log-probs: from their rows, or from the models.
pub struct Scorer {
    models: Option<(RewardModel, (String, String))>,
    /// Pairs that wait until there are tokens enough for a forward pass.
    waiting: Vec<(Row, common::logprob::Group)>,
    tokens: usize,
    /// Tokens enough.
    limit: usize,
}

impl Scorer {
    pub fn open(args: &Models) -> Result<Self> {
        let models = match (&args.policy, &args.reference) {
            (Some(policy), Some(reference)) => {
                let place = args.compute.place(Prefers::Exactness)?;
                let models = RewardModel::open(policy, reference, &place)?;
                program::say(format_args!("computing in {place}"));
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
            waiting: vec![],
            tokens: 0,
        })
    }

    /// Takes a pair; gives those that have their log-probs now.
    pub fn push(&mut self, row: Row) -> Result<Vec<(Row, [Logps; 2])>> {
        let Some((models, (policy, reference))) = &self.models else {
            let logps = given(&row).with_context(|| {
                "without --policy and --ref every row needs the log-probs that dice-score writes"
            })?;
            return Ok(vec![(row, logps)]);
        };
        let theirs =
            row.opt_string("policy")? == Some(policy) && row.opt_string("ref")? == Some(reference);
        if let (true, Ok(logps)) = (theirs, given(&row)) {
            return Ok(vec![(row, logps)]);
        }
        let group = models.encode(std::slice::from_ref(&row))?;
        ensure!(
            group.responses.len() == 2,
            row.error("chosen", "or \"rejected\" is missing")
        );
        let tokens = group.tokens();
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
    pub fn finish(&mut self) -> Result<Vec<(Row, [Logps; 2])>> {
        let Some((models, _)) = &self.models else {
            return Ok(vec![]);
        };
        self.tokens = 0;
        let (rows, groups): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.waiting).into_iter().unzip();
        let scores = models.score(&groups, vec![None; groups.len()])?;
        let pairs = rows.into_iter().zip(scores);
        Ok(pairs
            .map(|(row, logps)| (row, [logps[0], logps[1]]))
            .collect())
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
