//! dice-train: DPO on preference pairs, giving the next policy (step 4 of a DICE round).

mod data;
mod tensorboard;

use anyhow::{Result, bail, ensure};
use clap::Parser;
use common::dpo::checkpoint::{Run, Writer, finished, resume};
use common::dpo::{
    LoraSettings, LossType, Memory, Moments, NotFinite, Objective, Scheduler, Settings,
    StepMetrics, Train, order, trainer,
};
use common::files::{Claim, holds_work, part_path};
use common::flags;
use common::jsonl::Output;
use common::kernels::gemm::Precision;
use common::policy::{Checkpoint, Compute, OnNan, Stage};
use common::program;
use common::progress::Progress;
use common::records::Split;
use common::run;
use data::{Pairs, open_reference};
use serde_json::{Map, Value, json};
use std::path::PathBuf;
use std::process::ExitCode;
use tensorboard::EventFile;

/// Train a policy with DPO on preference pairs
///
/// Reads rows with "prompt", "chosen" and "rejected" (text, or lists of messages) and writes the trained model to the
/// folder --output (config, safetensors, tokenizer, chat template, generation config: transformers and vLLM load it as it
/// is; with --lora-rank and no --merge, a PEFT adapter). The optimiser's state is in checkpoints alone. One row per step goes to stdout, under TRL's names: loss,
/// rewards/chosen, grad_norm, ...
///
/// The reference is the starting policy unless --ref names another. Its log-probs are taken from the rows where they
/// were made by that very model (ref_chosen_logps with its fingerprint in "ref", or policy_chosen_logps with it in
/// "policy"), else computed once before training. With --dtype bf16 they are always computed, so that policy and
/// reference are rounded alike.
///
/// All pairs are read before training starts. Memory: float32 weights, gradients and two moments (16 bytes a parameter),
/// a packed copy of the weights (4 more, or 2 in bf16), and some 500 MB for activations; for speed, a pair of more than
/// 1024 tokens may use half of the memory that is left (or that --memory-budget leaves). With --lora-rank, the
/// packed copy, and the weights as they are: 4 bytes, or 2 where the checkpoint is bfloat16. A pair that is longer than
/// the context or the memory is left out, named and counted; so is one of two equal responses. On a GPU (--device cuda) the
/// working copy adds nothing in float32, 2 bytes in bf16; moments in bfloat16 (--optimizer adamw-bf16) save 4; with --lora-rank there are the
/// weights alone, 2 bytes in bf16. Activations take what is left, and less if they must. A killed run goes on with
/// --resume, to the same weights as without the kill, on whichever device.
///
/// Beside TRL: a response ends with its end-of-turn token, and what the template writes after that (a line's end, say) is no
/// part of it, which losses per token (IPO, RPO) notice; an answer that is given as text follows the prompt for an answer,
/// without the empty thought that some templates put before it; mixtures of experts train without their routers' auxiliary
/// loss; num_tokens counts a prompt once for a pair.
#[derive(Parser)]
#[command(
    after_help = "Examples:\n  dice-train --model ./policy --output ./next pairs.jsonl > steps.jsonl\n  dice-train --model ./policy --output ./next --lora-rank 16 --merge --dtype bf16 pairs.jsonl > steps.jsonl",
    version,
    max_term_width = 100
)]
pub struct Args {
    /// The policy to start from: a Hugging Face folder, a .gguf file, or a hub id org/name[@revision]
    #[arg(long, help_heading = "Input and output")]
    model: String,
    /// Folder for the result; it appears only when whole (until then: DIR.part)
    #[arg(
        long,
        short,
        visible_alias = "output-dir",
        value_name = "DIR",
        help_heading = "Input and output"
    )]
    output: PathBuf,
    /// Go on from the newest checkpoint in DIR.part; nothing to do where DIR exists
    #[arg(long, help_heading = "Input and output")]
    resume: bool,
    /// The reference, if it is not the starting policy
    #[arg(long = "ref", value_name = "MODEL", help_heading = "Loss")]
    reference: Option<String>,
    /// Scale of the implicit reward: the larger, the closer the policy stays to the reference
    #[arg(long, default_value_t = 0.1, value_parser = flags::positive::<f64>, help_heading = "Loss")]
    beta: f64,
    /// The preference loss
    #[arg(long, visible_alias = "loss-type", value_enum, default_value_t = LossType::Sigmoid, help_heading = "Loss")]
    loss: LossType,
    /// Probability that a label is wrong (sigmoid: conservative DPO, which TRL 1.16 leaves out; robust)
    #[arg(long, default_value_t = 0.0, value_parser = label_smoothing, help_heading = "Loss")]
    label_smoothing: f64,
    /// Weight of the chosen responses' negative log-likelihood per token (RPO)
    #[arg(long, default_value_t = 0.0, value_parser = flags::not_negative::<f64>, help_heading = "Loss")]
    rpo_alpha: f64,
    /// Peak learning rate
    #[arg(long, default_value_t = 5e-7, value_parser = flags::not_negative::<f64>, help_heading = "Optimisation")]
    learning_rate: f64,
    /// Course of the learning rate after the warm-up
    #[arg(long, visible_alias = "lr-scheduler-type", value_enum, default_value_t = Scheduler::Constant, help_heading = "Optimisation")]
    scheduler: Scheduler,
    /// Steps over which the learning rate rises from 0, under every scheduler
    #[arg(long, default_value_t = 0, help_heading = "Optimisation")]
    warmup_steps: u64,
    /// Stop after so many steps, whatever --epochs says: pairs are gone through again where they run out
    #[arg(long, help_heading = "Optimisation")]
    max_steps: Option<u64>,
    /// Passes over the pairs
    #[arg(long, visible_alias = "num-train-epochs", default_value_t = 1, value_parser = flags::count, help_heading = "Optimisation")]
    epochs: usize,
    /// Pairs per step; gradients are accumulated inside it, memory does not grow with it
    #[arg(long, default_value_t = 32, value_parser = flags::count, help_heading = "Optimisation")]
    batch_size: usize,
    /// Pairs with more tokens (prompt and longer response) are left out and counted
    #[arg(long, default_value_t = 4096, help_heading = "Input and output")]
    max_length: usize,
    /// Clip the gradient's global norm; 0 does not
    #[arg(long, default_value_t = 1.0, value_parser = flags::not_negative::<f64>, help_heading = "Optimisation")]
    max_grad_norm: f64,
    /// AdamW's weight decay, on matrices only
    #[arg(long, default_value_t = 0.0, value_parser = flags::not_negative::<f64>, help_heading = "Optimisation")]
    weight_decay: f64,
    /// Take only the pairs whose prompt is in this part (by a stable hash, the same in every tool)
    #[arg(long, value_enum, default_value_t = Split::All, help_heading = "Input and output")]
    split: Split,
    /// Take the pairs in their order
    #[arg(long, help_heading = "Input and output")]
    no_shuffle: bool,
    /// The optimiser
    #[arg(long, value_enum, default_value_t = Optimizer::Adamw, help_heading = "Optimisation")]
    optimizer: Optimizer,
    /// Train low-rank adapters of this rank on all linear maps of the layers (of mixtures of experts on attention's alone),
    /// saved in PEFT's layout
    #[arg(long, value_name = "RANK", value_parser = flags::count, help_heading = "Adapters")]
    lora_rank: Option<usize>,
    /// The adapters' scale is ALPHA / RANK
    #[arg(long, value_name = "ALPHA", default_value_t = 16.0, value_parser = flags::positive::<f32>, help_heading = "Adapters")]
    lora_alpha: f32,
    /// Fold the adapters into the weights of the result; without it the result is an adapter
    #[arg(long, requires = "lora_rank", help_heading = "Adapters")]
    merge: bool,
    /// Steps between checkpoints; 0 writes none (SIGINT and SIGTERM always do)
    #[arg(long, default_value_t = 20, help_heading = "Checkpoints and logs")]
    save_steps: u64,
    /// Write the steps to DIR for TensorBoard, too; a resumed run goes on with the curves of the one before
    #[arg(long, value_name = "DIR", help_heading = "Checkpoints and logs")]
    log_dir: Option<PathBuf>,
    /// Seed of the pairs' order and the adapters' start
    #[arg(long, default_value_t = 0, help_heading = "Optimisation")]
    seed: u64,
    /// Files of pairs (JSON Lines), read one after the other; `-` or none reads stdin
    #[arg(value_name = "FILE")]
    files: Vec<PathBuf>,
    // Last: what comes after a heading is under it.
    #[command(flatten, next_help_heading = "Machine")]
    compute: Compute,
}

/// The optimisers there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Optimizer {
    /// AdamW, betas 0.9 and 0.999
    Adamw,
    /// AdamW whose moments are bfloat16, rounded stochastically: for large models on one GPU
    AdamwBf16,
}

/// At 0.5 a label says nothing.
fn label_smoothing(text: &str) -> Result<f64> {
    let fits = |p| (0.0..0.5).contains(&p);
    flags::number(text, fits, "in 0 … 0.5, 0.5 excluded")
}

fn main() -> ExitCode {
    program::main(run)
}

fn run(args: Args) -> Result<()> {
    if args.output.exists() {
        return already_made(&args);
    }
    let part = part_path(&args.output);
    if holds_work(&part) && !args.resume {
        bail!(
            "{} is there from an interrupted run: pass --resume to go on with it, or remove it",
            part.display()
        );
    }
    let _claim = Claim::new(&args.output)?;
    let place = args.compute.place(Stage::Training)?;
    ensure!(
        place.gpu.is_some() || args.optimizer == Optimizer::Adamw,
        "--optimizer adamw-bf16 needs a GPU: a CPU keeps the moments in float32 alone"
    );
    let (model, reference) = open_models(&args)?;
    if args.lora_rank.is_some()
        && !args.merge
        && let Some(why) = model.weights.no_base_for_adapters()
    {
        bail!("--lora-rank: {} is {why}; add --merge", args.model)
    }
    let (model_print, reference_print) = fingerprints(&model, reference.as_ref())?;
    let reading = Progress::new("pairs", None);
    // In bfloat16 a margin needs policy and reference rounded alike, which those of another program are not.
    let exact = place.full_range_precision() == Precision::F32;
    let given_by = exact.then_some(reference_print.as_str());
    let memory = Memory::new(&model.weights.config, &settings(&args, 0), &place)?;
    let mut pairs = Pairs::read(&args, &model, given_by, memory.longest, &reading)?;
    reading.add(pairs.pairs.len() as u64, 0);
    reading.note(format!("{} with reference log-probs", pairs.given()));
    reading.finish();
    ensure!(
        !pairs.pairs.is_empty(),
        "no pairs to train on: the input has none, or all were left out"
    );
    let settings = settings(&args, pairs.pairs.len());
    let run = Run {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        model: model_print,
        reference: reference_print,
        pairs: pairs.hash(),
        dtype: place.dtype().to_owned(),
        date: model.chat.date(),
        asked: asked(&args),
        settings: settings.clone(),
    };
    program::say(format_args!("{}: computing in {place}", args.model));
    let on_nan = args.compute.on_nan;
    // Another reference is gone before there is a trainer: they need not fit side by side.
    if let (true, Some(reference)) = (pairs.needs_reference(), &reference) {
        let engine = reference.engine(&place)?;
        pairs.fill(|groups| engine.score(groups, memory.longest), on_nan)?;
    }
    let mut trainer = trainer(&model.weights, settings, &place, memory.states)?;
    if pairs.needs_reference() && reference.is_none() {
        pairs.fill(|groups| trainer.score(groups), on_nan)?;
    }
    drop(reference);
    let log = if args.resume {
        resume(&args.output, &run, &mut *trainer)?
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
    train(&args, &mut *trainer, &pairs, &writer, log)
}

/// The result is there: it is compared with what was asked for, and its steps are said again.
fn already_made(args: &Args) -> Result<()> {
    ensure!(
        args.resume,
        "{} is already there: remove it, or name another --output",
        args.output.display()
    );
    let models = open_models(args);
    let prints = models.and_then(|(model, reference)| fingerprints(&model, reference.as_ref()));
    let ours = match prints {
        Ok((model, reference)) => json!({"model": model, "ref": reference}),
        // Models that are gone by now cannot be compared, and need not be there.
        Err(_) => json!({}),
    };
    let mut ours = run::settings(ours);
    ours.insert("settings".into(), known_settings(args).into());
    ours.insert("asked".into(), asked(args).into());
    if let Some(dtype) = args.compute.named_dtype() {
        ours.insert("dtype".into(), dtype.into());
    }
    let inputs: Vec<_> = args.files.iter().map(PathBuf::as_path).collect();
    let log = finished(&args.output, &ours, &inputs)?;
    program::say(format_args!(
        "{} is already there, nothing to do",
        args.output.display()
    ));
    Report(Some(Output::stdout())).write(&log)
}

/// The policy, and the reference if it is another model.
fn open_models(args: &Args) -> Result<(Checkpoint, Option<Checkpoint>)> {
    let model = Checkpoint::open(&args.model)?;
    let open = |name: &String| open_reference(name, &model);
    let reference = args.reference.as_ref().map(open).transpose()?;
    Ok((model, reference))
}

/// Of the policy and the reference.
fn fingerprints(model: &Checkpoint, reference: Option<&Checkpoint>) -> Result<(String, String)> {
    let of = |model: &Checkpoint| model.weights.fingerprint().map(str::to_owned);
    Ok((of(model)?, of(reference.unwrap_or(model))?))
}

/// What the command says beside the trainer's settings (see [`Run::asked`]).
fn asked(args: &Args) -> Map<String, Value> {
    let epochs = args.max_steps.is_none().then_some(args.epochs);
    run::settings(json!({
        "split": args.split.name(), "max_length": args.max_length, "epochs": epochs, "merge": args.merge,
    }))
}

/// The settings that are known before the pairs are read.
fn known_settings(args: &Args) -> Map<String, Value> {
    let mut known = run::settings(settings(args, 0));
    if args.max_steps.is_none() {
        known.remove("total_steps");
    }
    known
}

fn settings(args: &Args, pairs: usize) -> Settings {
    let per_epoch = pairs.div_ceil(args.batch_size) as u64;
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
        total_steps: args.max_steps.unwrap_or(args.epochs as u64 * per_epoch),
        batch_size: args.batch_size,
        max_grad_norm: args.max_grad_norm,
        weight_decay: args.weight_decay,
        seed: args.seed,
        shuffle: !args.no_shuffle,
        lora: args.lora_rank.map(|rank| LoraSettings {
            rank,
            alpha: args.lora_alpha,
        }),
        moments: match args.optimizer {
            Optimizer::Adamw => Moments::F32,
            Optimizer::AdamwBf16 => Moments::Bf16,
        },
    }
}

/// Steps until the end, from wherever the trainer is. stdout receives the whole log, that of an earlier part included.
fn train(
    args: &Args,
    trainer: &mut dyn Train,
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
    let progress = Progress::new("steps", Some(total));
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
        let last = (first + args.batch_size).min(n);
        let indices = current.1[first..last].iter().copied();
        let indices: Vec<usize> = indices.filter(|&i| pairs.is_usable(i)).collect();
        let batch: Vec<_> = indices.iter().map(|&i| &pairs.pairs[i]).collect();
        let done = epoch as f64 + last as f64 / n as f64;
        let before = log.last().map_or(0, |m| m.num_tokens);
        let stepped = (!batch.is_empty()).then(|| trainer.step(&batch, done));
        match stepped {
            // All its pairs are left out.
            None => trainer.skip(),
            Some(Ok(metrics)) => {
                progress.add(1, metrics.num_tokens - before);
                report.write(std::slice::from_ref(&metrics))?;
                if let Some(events) = &mut events {
                    events.step(&metrics)?;
                }
                log.push(metrics);
            }
            Some(Err(err)) => {
                let err = named(err.downcast::<NotFinite>()?, &indices, pairs);
                ensure!(
                    args.compute.on_nan == OnNan::Skip,
                    "{err:#}; lower --learning-rate"
                );
                progress.leave_out("not a number", err);
                trainer.skip();
            }
        }
        let due = args.save_steps > 0
            && trainer.steps().is_multiple_of(args.save_steps)
            && trainer.steps() < total;
        let going = program::check();
        if due || going.is_err() {
            writer.save(trainer, &log)?;
        }
        going?;
    }
    writer.finish(trainer, &log, args.merge)?;
    if let (Some(first), Some(last)) = (log.first(), log.last()) {
        progress.note(format!(
            "loss {:.4} at step {}, {:.4} at the last",
            first.loss, first.step, last.loss
        ));
    }
    progress.finish();
    Ok(())
}

/// What is wrong with a step, and the row that it comes from where that is known.
fn named(broken: NotFinite, indices: &[usize], pairs: &Pairs) -> anyhow::Error {
    let place = broken.pair.map(|i| &pairs.places[indices[i]]);
    let err = anyhow::Error::new(broken);
    match place {
        Some(place) => err.context(place.to_string()),
        None => err,
    }
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
