//! dice-train: DPO on preference pairs, giving the next policy (step 4 of a DICE round).

mod data;
mod tensorboard;

use anyhow::{Result, bail, ensure};
use clap::Parser;
use common::dpo::checkpoint::{Run, Writer, finished, resume};
use common::dpo::{
    LoraSettings, LossType, Objective, Scheduler, Settings, StepMetrics, Trainer, order,
};
use common::files::{Claim, holds_work, part_path};
use common::jsonl::Output;
use common::kernels::gemm::Precision;
use common::policy::{Checkpoint, Compute, Prefers, dtype_name};
use common::program::{self, Progress};
use common::records::Split;
use data::{Pairs, open_reference};
use std::path::PathBuf;
use std::process::ExitCode;
use tensorboard::EventFile;

/// Train a policy with DPO on preference pairs
///
/// Reads rows with "prompt", "chosen" and "rejected" (text, or lists of messages) and writes the trained model to the folder --output (config,
/// safetensors, tokenizer, chat template, generation config: transformers and vLLM load it as it is), with the
/// optimiser's state beside. One row per step goes to stdout, under TRL's names: loss, rewards/chosen, grad_norm, ...
///
/// The reference is the starting policy unless --ref names another. Its log-probs are taken from the rows where they
/// were made by that very model (ref_chosen_logps with its fingerprint in "ref", or policy_chosen_logps with it in
/// "policy"), else computed once before training. With --dtype bf16 they are always computed, so that policy and
/// reference are rounded alike.
///
/// All pairs are read before training starts. Memory: float32 weights, gradients and two moments (16 bytes a parameter), a
/// packed copy of the weights (4 more, or 2 in bf16), and some 500 MB for activations. A killed run goes on with --resume, to the
/// same weights as without the kill.
///
/// Example: dice-train --model ./policy --output ./next pairs.jsonl > steps.jsonl
#[derive(Parser)]
#[command(version, max_term_width = 100)]
pub struct Args {
    /// The policy to start from: a Hugging Face folder, a .gguf file, or a hub id org/name[@revision]
    #[arg(long)]
    model: String,
    /// Folder for the result; it appears only when whole (until then: DIR.part)
    #[arg(long, short, value_name = "DIR")]
    output: PathBuf,
    /// Go on from the newest checkpoint in DIR.part; nothing to do where DIR exists
    #[arg(long)]
    resume: bool,
    /// The reference, if it is not the starting policy
    #[arg(long = "ref", value_name = "MODEL")]
    reference: Option<String>,
    /// How far the policy may move: the scale of the implicit reward
    #[arg(long, default_value_t = 0.1)]
    beta: f64,
    /// The preference loss
    #[arg(long, value_enum, default_value_t = LossType::Sigmoid)]
    loss: LossType,
    /// Probability that a label is wrong (sigmoid: conservative DPO; robust)
    #[arg(long, default_value_t = 0.0)]
    label_smoothing: f64,
    /// Weight of the chosen responses' negative log-likelihood per token (RPO)
    #[arg(long, default_value_t = 0.0)]
    rpo_alpha: f64,
    /// Peak learning rate
    #[arg(long, default_value_t = 5e-7)]
    learning_rate: f64,
    /// Course of the learning rate after the warm-up
    #[arg(long, value_enum, default_value_t = Scheduler::Constant)]
    scheduler: Scheduler,
    /// Steps over which the learning rate rises from 0
    #[arg(long, default_value_t = 0)]
    warmup_steps: u64,
    /// Stop after so many steps, whatever --epochs says
    #[arg(long)]
    max_steps: Option<u64>,
    /// Passes over the pairs
    #[arg(long, default_value_t = 1)]
    epochs: u64,
    /// Pairs per step; gradients are accumulated inside it, memory does not grow with it
    #[arg(long, default_value_t = 32)]
    batch_size: usize,
    /// Pairs with more tokens (prompt and longer response) are left out and counted
    #[arg(long, default_value_t = 4096)]
    max_length: usize,
    /// Clip the gradient's global norm; 0 does not
    #[arg(long, default_value_t = 1.0)]
    max_grad_norm: f64,
    /// AdamW's weight decay, on matrices only
    #[arg(long, default_value_t = 0.0)]
    weight_decay: f64,
    /// Take only the pairs whose prompt is in this part (by a stable hash, the same in every tool)
    #[arg(long, value_enum, default_value_t = Split::All)]
    split: Split,
    /// Take the pairs in their order
    #[arg(long)]
    no_shuffle: bool,
    /// The optimiser
    #[arg(long, value_enum, default_value_t = Optimizer::Adamw)]
    optimizer: Optimizer,
    /// Train low-rank adapters of this rank on all linear maps of the layers, saved in PEFT's layout
    #[arg(long, value_name = "RANK")]
    lora_rank: Option<usize>,
    /// The adapters' scale is ALPHA / RANK
    #[arg(long, value_name = "ALPHA", default_value_t = 16.0)]
    lora_alpha: f32,
    /// Fold the adapters into the weights of the result
    #[arg(long, requires = "lora_rank")]
    merge: bool,
    /// Steps between checkpoints; 0 writes none (SIGINT and SIGTERM always do)
    #[arg(long, default_value_t = 20)]
    save_steps: u64,
    /// Write the steps to DIR for TensorBoard, too; a resumed run goes on with the curves of the one before
    #[arg(long, value_name = "DIR")]
    log_dir: Option<PathBuf>,
    /// Seed of the pairs' order and the adapters' start
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    compute: Compute,
    /// Files of pairs (JSON Lines), read one after the other; `-` or none reads stdin
    #[arg(value_name = "FILE")]
    files: Vec<PathBuf>,
}

/// The optimisers there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Optimizer {
    /// AdamW, betas 0.9 and 0.999
    Adamw,
}

fn main() -> ExitCode {
    program::main(run)
}

fn run(args: Args) -> Result<()> {
    check(&args)?;
    if args.output.exists() {
        ensure!(
            args.resume,
            "{} is already there: remove it, or name another --output",
            args.output.display()
        );
        program::say(format_args!(
            "{} is already there, nothing to do",
            args.output.display()
        ));
        return Report(Some(Output::stdout())).write(&finished(&args.output)?);
    }
    let part = part_path(&args.output);
    if holds_work(&part) && !args.resume {
        bail!(
            "{} is there from an interrupted run: pass --resume to go on with it, or remove it",
            part.display()
        );
    }
    let _claim = Claim::new(&part)?;
    let precision = args.compute.precision(Prefers::Exactness)?;
    let model = Checkpoint::open(&args.model)?;
    let reference = args
        .reference
        .as_deref()
        .map(|name| open_reference(name, &model))
        .transpose()?;
    let fingerprint = |model: &Checkpoint| model.weights.fingerprint().map(str::to_owned);
    let reference_print = fingerprint(reference.as_ref().unwrap_or(&model))?;
    let reading = Progress::new("dice-train: pairs", "pairs", None);
    // In bfloat16 a margin needs policy and reference rounded alike, which those of another program are not.
    let exact = precision == Precision::F32;
    let given_by = exact.then_some(reference_print.as_str());
    let mut pairs = Pairs::read(&args, &model, given_by, &reading)?;
    reading.add(pairs.pairs.len() as u64, 0);
    reading.note(format!("{} with reference log-probs", pairs.given()));
    reading.finish();
    let settings = settings(&args, pairs.pairs.len());
    let run = Run {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        model: fingerprint(&model)?,
        reference: reference_print,
        pairs: pairs.hash(),
        dtype: dtype_name(precision).to_owned(),
        settings: settings.clone(),
    };
    let mut trainer = Trainer::new(&model.weights, settings, precision, state_bytes(precision))?;
    program::say(format_args!(
        "{}: computing in {}",
        args.model,
        dtype_name(precision)
    ));
    if pairs.needs_reference() {
        match &reference {
            Some(reference) => pairs.fill(&reference.decoder(precision)?)?,
            None => pairs.fill(trainer.decoder())?,
        }
    }
    drop(reference);
    let log = if args.resume {
        resume(&args.output, &run, &mut trainer)?
    } else {
        vec![]
    };
    let writer = Writer {
        output: &args.output,
        run: &run,
        start: &model.weights,
        chat: &model.chat,
        base: &args.model,
    };
    train(&args, &mut trainer, &pairs, &writer, log)
}

/// What layer states may take: a batch runs in parts whose states fit, since keeping them is cheaper than making them again.
/// In bfloat16 the packed weights leave room for more.
const fn state_bytes(precision: Precision) -> usize {
    match precision {
        Precision::F32 => 400 << 20,
        Precision::Bf16 => 640 << 20,
    }
}

fn check(args: &Args) -> Result<()> {
    ensure!(args.batch_size > 0, "--batch-size must be at least 1");
    ensure!(args.beta > 0.0, "--beta must be above 0");
    ensure!(
        (0.0..0.5).contains(&args.label_smoothing),
        "--label-smoothing must be in 0 … 0.5, 0.5 excluded"
    );
    ensure!(args.lora_rank != Some(0), "--lora-rank must be at least 1");
    ensure!(
        args.learning_rate >= 0.0,
        "--learning-rate must not be negative"
    );
    Ok(())
}

fn settings(args: &Args, pairs: usize) -> Settings {
    let per_epoch = pairs.div_ceil(args.batch_size) as u64;
    let Optimizer::Adamw = args.optimizer;
    Settings {
        objective: Objective {
            loss_type: args.loss,
            beta: args.beta,
            label_smoothing: args.label_smoothing,
            rpo_alpha: args.rpo_alpha,
        },
        learning_rate: args.learning_rate,
        scheduler: args.scheduler,
        warmup_steps: args.warmup_steps,
        total_steps: args.max_steps.unwrap_or(args.epochs * per_epoch),
        batch_size: args.batch_size,
        max_grad_norm: args.max_grad_norm,
        weight_decay: args.weight_decay,
        seed: args.seed,
        shuffle: !args.no_shuffle,
        lora: args.lora_rank.map(|rank| LoraSettings {
            rank,
            alpha: args.lora_alpha,
        }),
    }
}

/// Steps until the end, from wherever the trainer is. stdout receives the whole log, that of an earlier part included.
fn train(
    args: &Args,
    trainer: &mut Trainer,
    pairs: &Pairs,
    writer: &Writer,
    mut log: Vec<StepMetrics>,
) -> Result<()> {
    let total = trainer.settings().total_steps;
    let mut report = Report(Some(Output::stdout()));
    report.write(&log)?;
    let mut events = args
        .log_dir
        .as_ref()
        .map(|folder| EventFile::create(folder, trainer.steps() + 1))
        .transpose()?;
    let progress = Progress::new("dice-train", "steps", Some(total));
    progress.kept(trainer.steps());
    let n = pairs.pairs.len();
    let per_epoch = n.div_ceil(args.batch_size) as u64;
    let mut current = (u64::MAX, vec![]);
    while trainer.steps() < total {
        let (epoch, batch) = (trainer.steps() / per_epoch, trainer.steps() % per_epoch);
        if current.0 != epoch {
            current = (epoch, order(n, epoch, trainer.settings()));
        }
        let first = batch as usize * args.batch_size;
        let indices = &current.1[first..(first + args.batch_size).min(n)];
        let batch: Vec<_> = indices.iter().map(|&i| &pairs.pairs[i]).collect();
        let done = epoch as f64 + (first + batch.len()) as f64 / n as f64;
        let before = log.last().map_or(0, |m| m.num_tokens);
        let metrics = trainer.step(&batch, done)?;
        progress.add(1, metrics.num_tokens - before);
        report.write(std::slice::from_ref(&metrics))?;
        if let Some(events) = &mut events {
            events.step(&metrics)?;
        }
        log.push(metrics);
        let due = args.save_steps > 0
            && trainer.steps().is_multiple_of(args.save_steps)
            && trainer.steps() < total;
        if due || program::interrupted() {
            writer.save(trainer, &log)?;
        }
        program::check()?;
    }
    writer.finish(trainer, &log, args.merge)?;
    if let (Some(first), Some(last)) = (log.first(), log.last()) {
        progress.note(format!(
            "loss {:.4} at step 1, {:.4} at the last",
            first.loss, last.loss
        ));
    }
    progress.finish();
    Ok(())
}

/// The steps' rows on stdout, as long as somebody reads them: the result is the folder, and `| head` must not cost it.
struct Report(Option<Output>);

impl Report {
    fn write(&mut self, steps: &[StepMetrics]) -> Result<()> {
        let Some(stdout) = &mut self.0 else {
            return Ok(());
        };
        let written = steps.iter().try_for_each(|step| stdout.write(step));
        match written.and_then(|()| stdout.flush()) {
            Err(err) if program::is_closed_pipe(&err) => {
                self.0 = None;
                Ok(())
            }
            result => result,
        }
    }
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
