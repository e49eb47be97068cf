//! dice-score: the implicit reward of each response, from two checkpoints (step 2 of a DICE round).

use anyhow::{Result, ensure};
use clap::Parser;
use common::flags;
use common::jsonl::{self, Files, Opened, Output, Row};
use common::logprob::Group;
use common::policy::{
    Compute, Gathered, Logps, OnNan, Ready, Response, RewardModel, TooLong, name_prompt, responses,
};
use common::program;
use common::progress::Progress;
use common::reward::implicit_reward;
use common::run::settings;
use serde_json::json;
use std::process::ExitCode;

/// Give every response its implicit reward: beta * (log pi(y|x) - log pi_ref(y|x))
///
/// Reads rows with "prompt" and "response" and adds policy_logps, ref_logps (nats, summed over the response's tokens),
/// reward, and the fingerprints policy and ref. A row's token_ids are scored as they are (a finished one
/// without an end token gets it); without them the text is tokenised. A row without finish_reason counts as finished: its
/// end-of-turn token is scored too. Where dice-gen ran this
/// very policy in the same --dtype, its log-probs are taken from the rows.
///
/// Rows with "chosen" and "rejected" instead (preference pairs) get policy_chosen_logps, policy_rejected_logps,
/// ref_chosen_logps, ref_rejected_logps, reward_chosen and reward_rejected.
///
/// Neighbouring rows of one prompt share its forward pass. Rows leave in their order, a few thousand tokens at a time.
/// Memory: both models (2 bytes a weight in bf16, and in f32 where a checkpoint is bfloat16; else 4), and the activations
/// of those tokens; --memory-budget bounds it. A row that is longer than the models' context or the memory is left out,
/// named and counted. Where memory does not hold both models, they take turns, over tens of thousands of tokens each
/// (millions on a GPU).
#[derive(Parser)]
#[command(
    after_help = "Example:\n  dice-gen --model ./policy prompts.jsonl | dice-score --policy ./policy --ref ./base | dice-pairs > pairs.jsonl",
    version,
    max_term_width = 100
)]
struct Args {
    /// The tuned model pi: a Hugging Face folder, a .gguf file, or a hub id org/name[@revision]
    #[arg(long)]
    policy: String,
    /// Its reference pi_ref, of the same vocabulary
    #[arg(long = "ref")]
    reference: String,
    /// Scale of the reward
    #[arg(long, default_value_t = 0.1, value_parser = flags::positive::<f64>)]
    beta: f64,
    #[command(flatten)]
    files: Files,
    // Last: what comes after a heading is under it.
    #[command(flatten, next_help_heading = "Machine")]
    compute: Compute,
}

fn main() -> ExitCode {
    program::main(run)
}

fn run(args: Args) -> Result<()> {
    let open = || RewardModel::open(&args.policy, &args.reference, &args.compute);
    let output = match args.files.open(settings(json!({"beta": args.beta})))? {
        Opened::Ready(output) => output,
        Opened::AlreadyDone(done) => {
            let models = || {
                let (policy, reference) = open()?.fingerprints()?;
                Ok(settings(json!({"policy": policy, "ref": reference})))
            };
            return done.confirm(models, &args.files.inputs());
        }
    };
    let models = open()?;
    let (policy, reference) = models.fingerprints()?;
    let progress = Progress::new("rows", None);
    let mut job = Job {
        gathered: Gathered::new(&models)?,
        models,
        policy,
        reference,
        beta: args.beta,
        on_nan: args.compute.on_nan,
        output,
        progress,
        known: 0,
    };
    job.output.begin(settings(json!({
        "policy": job.policy, "ref": job.reference, "dtype": job.models.dtype(),
        "date": job.models.policy.chat.date(),
    })))?;
    let mut rows = args.files.rows();
    job.check_kept(&mut rows)?;
    // A prompt's rows may be many: so many at a time bound what is held.
    const TOGETHER: usize = 64;
    for group in jsonl::groups(rows, TOGETHER) {
        match group.and_then(|rows| job.encode(rows)) {
            Ok(Some(prompt)) => job.push(prompt)?,
            Ok(None) => {}
            Err(err) => {
                // What came before the bad row is not lost.
                job.finish()?;
                return Err(err);
            }
        }
        program::check()?;
    }
    job.finish()?;
    if job.known > 0 {
        job.progress
            .note(format!("{} with the sampler's log-probs", job.known));
    }
    job.progress.finish();
    job.output.finish()
}

/// A run over all rows.
struct Job {
    models: RewardModel,
    policy: String,
    reference: String,
    beta: f64,
    on_nan: OnNan,
    output: Output,
    progress: Progress,
    /// Prompts that wait: their rows, and the tokens of these.
    gathered: Gathered<(Vec<Row>, u64)>,
    /// Responses whose log-probs under the policy came from the sampler.
    known: u64,
}

/// The rows of a prompt, and their token ids.
struct Encoded {
    rows: Vec<Row>,
    /// One response per sample row, two per pair row.
    group: Group,
    /// The policy's log-probs, where the sampler brought them.
    known: Option<Vec<f64>>,
}

impl Job {
    /// Takes the rows that an interrupted run finished off the input, and checks that they are the same.
    fn check_kept(&mut self, inputs: &mut impl Iterator<Item = Result<Row>>) -> Result<()> {
        let kept = self.output.kept_rows();
        for row in self.output.kept() {
            let row = row?;
            let models = row.opt_string("policy")? == Some(&self.policy)
                && row.opt_string("ref")? == Some(&self.reference);
            let mut input = inputs.next().transpose()?;
            while let Some(other) = input.as_ref().filter(|input| !is_of(&row, input))
                && self.leaves_out(other)
            {
                input = inputs.next().transpose()?;
            }
            ensure!(
                models && input.is_some_and(|input| is_of(&row, &input)),
                "{}: not what this command would have written here ({}): \
                 give the same input and models, or remove the file to start over",
                row.place,
                if models {
                    "the input's row is another"
                } else {
                    "policy or ref is another model"
                }
            );
        }
        self.progress.kept(kept);
        Ok(())
    }

    /// Whether a row may have been left out.
    fn leaves_out(&self, row: &Row) -> bool {
        let alone = self.encode_alone(row);
        self.on_nan == OnNan::Skip || alone.is_err_and(|err| TooLong::is(&err))
    }

    fn encode_alone(&self, row: &Row) -> Result<Group> {
        self.models.encode(std::slice::from_ref(row), responses)
    }

    /// The rows of a prompt as token ids, without those that are too long; none where all are.
    fn encode(&self, mut rows: Vec<Row>) -> Result<Option<Encoded>> {
        let mut group = self.models.encode(&rows, responses);
        if group.as_ref().is_err_and(TooLong::is) {
            rows.retain(|row| match self.encode_alone(row) {
                Err(err) if TooLong::is(&err) => {
                    self.progress.leave_out("too long", err);
                    false
                }
                _ => true,
            });
            if rows.is_empty() {
                return Ok(None);
            }
            group = self.models.encode(&rows, responses);
        }
        let group = group?;
        Ok(Some(Encoded {
            known: self.models.known(&rows, &group)?,
            group,
            rows,
        }))
    }

    fn push(&mut self, prompt: Encoded) -> Result<()> {
        let Encoded {
            mut rows,
            group,
            known,
        } = prompt;
        for row in &mut rows {
            name_prompt(row, &group.prompt);
        }
        self.known += known.as_ref().map_or(0, Vec::len) as u64;
        let of = (rows, group.tokens() as u64);
        let ready = self.gathered.push(&self.models, of, Some(group), known)?;
        self.write(ready)
    }

    /// Scores and writes what waits.
    fn finish(&mut self) -> Result<()> {
        let ready = self.gathered.score(&self.models)?;
        self.write(ready)
    }

    fn write(&mut self, ready: Ready<(Vec<Row>, u64)>) -> Result<()> {
        if ready.is_empty() {
            return Ok(());
        }
        for ((rows, tokens), scores) in ready {
            let mut scores = scores.into_iter();
            let mut written = 0;
            for mut row in rows {
                let of = responses(&row);
                let logps: Vec<Logps> = scores.by_ref().take(of.len()).collect();
                if let Err(err) = self.describe(&mut row, of, &logps) {
                    ensure!(self.on_nan == OnNan::Skip, err);
                    self.progress.leave_out("not a number", err);
                    continue;
                }
                row.fields.insert("policy".into(), json!(self.policy));
                row.fields.insert("ref".into(), json!(self.reference));
                self.output.write(&row.fields)?;
                written += 1;
            }
            self.progress.add(written, tokens);
        }
        self.output.flush()
    }

    /// Adds the rewards of a row's responses; fails where one is not a number.
    fn describe(&self, row: &mut Row, of: &[Response], logps: &[Logps]) -> Result<()> {
        for (names, logps) in of.iter().zip(logps) {
            ensure!(
                logps.policy.is_finite() && logps.reference.is_finite(),
                row.error(
                    names.text,
                    "has a log-prob that is not a number: are the models sound?"
                )
            );
            let fields = match names.text {
                "chosen" => ["policy_chosen_logps", "ref_chosen_logps", "reward_chosen"],
                "rejected" => [
                    "policy_rejected_logps",
                    "ref_rejected_logps",
                    "reward_rejected",
                ],
                _ => ["policy_logps", "ref_logps", "reward"],
            };
            let reward = implicit_reward(self.beta, logps.policy, logps.reference);
            for (field, value) in fields
                .into_iter()
                .zip([logps.policy, logps.reference, reward])
            {
                row.fields.insert(field.into(), json!(value));
            }
        }
        Ok(())
    }
}

/// Whether a row that was written is this input's.
fn is_of(written: &Row, input: &Row) -> bool {
    let fields = ["prompt", "response", "chosen", "rejected"];
    (fields.iter()).all(|f| input.fields.get(*f) == written.fields.get(*f))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn every_flag_has_help() {
        let mut command = Args::command().help_expected(true);
        command.build();
        command.debug_assert();
    }
}
