//! dice-gen: sample K responses for every prompt (step 1 of a DICE round).

use anyhow::{Result, ensure};
use clap::Parser;
use common::flags;
use common::generate::{Generate, Request, Sample, Sampling};
use common::jsonl::{self, Files, FinishReason, Opened, Output, Row};
use common::kernels::decoding::Format;
use common::policy::{
    Checkpoint, Compute, KvCacheDtype, OnNan, Stage, TooLong, name_prompt, sampling_dtype,
};
use common::program;
use common::progress::Progress;
use common::records::{Prompt, SAMPLE_FIELDS, Split};
use common::run::settings;
use serde_json::{Map, Value, json};
use std::collections::{HashSet, VecDeque};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError};

/// Sample K responses for every prompt
///
/// Reads rows with a "prompt" (a string, or a list of {"role", "content"} messages) and writes K rows for each: the
/// prompt's fields, and sample, response, finish_reason, token_ids, logp (nats, at temperature 1), model, dtype. The rows of a
/// prompt leave together, in the order of the prompts, as soon as they are done. A row's "tools" and "chat_template_kwargs"
/// ({"enable_thinking": false}) go to the chat template, here and in the stages after this one.
///
/// A response depends on the seed, the prompt's id, its sample's number, the model, the sampling flags and the number format
/// (--dtype auto is the machine's choice): batch size, order, sharding and resuming do not change it. (On a GPU another --batch-size may round differently, and a draw change now and then.)
/// Memory: the model (2 bytes a weight in bf16, and in f32 where the checkpoint is bfloat16; else 4), and keys and values of
/// --batch-size responses, or of as many as --memory-budget has room for. A prompt that is longer than the context or the
/// memory is left out, named and counted.
#[derive(Parser)]
#[command(
    after_help = "Example:\n  dice-gen --model ./policy --k 16 prompts.jsonl | dice-score --policy ./policy --ref ./base > scored.jsonl",
    version,
    max_term_width = 100
)]
struct Args {
    /// The policy: a Hugging Face folder, a .gguf file, or a hub id org/name[@revision]
    #[arg(long)]
    model: String,
    /// Responses per prompt (the paper takes 16)
    #[arg(long, visible_alias = "n", default_value_t = 16, value_parser = flags::count, help_heading = "Sampling")]
    k: usize,
    /// Softmax temperature; 0 is greedy
    #[arg(long, default_value_t = 0.9, value_parser = temperature, help_heading = "Sampling")]
    temperature: f64,
    /// Keep the most probable tokens whose probabilities reach this sum
    #[arg(long, default_value_t = 1.0, value_parser = top_p, help_heading = "Sampling")]
    top_p: f64,
    /// Keep so many most probable tokens; 0 keeps all
    #[arg(long, default_value_t = 0, help_heading = "Sampling")]
    top_k: usize,
    /// Drop tokens less probable than this fraction of the most probable one; before --top-k and --top-p, as in vLLM
    #[arg(long, default_value_t = 0.0, value_parser = flags::share::<f64>, help_heading = "Sampling")]
    min_p: f64,
    /// Divide the logits of tokens that occurred already; 1 changes nothing
    #[arg(long, default_value_t = 1.0, value_parser = flags::positive::<f64>, help_heading = "Sampling")]
    repetition_penalty: f64,
    /// Longest response, tokens; dice-pairs leaves out what was cut here
    #[arg(long, default_value_t = 2048, value_parser = flags::count, help_heading = "Sampling")]
    max_tokens: usize,
    /// End a response where this text appears (the text itself is left out, and the row has no logp); may be given more than
    /// once
    #[arg(long, value_name = "TEXT", value_parser = clap::builder::NonEmptyStringValueParser::new(), help_heading = "Sampling")]
    stop: Vec<String>,
    /// A system turn for prompts that have none; it becomes part of the rows' prompt
    #[arg(long, value_name = "TEXT", help_heading = "Prompts")]
    system: Option<String>,
    /// Take only the prompts in this part (by a stable hash, the same in every tool)
    #[arg(long, value_enum, default_value_t = Split::All, help_heading = "Prompts")]
    split: Split,
    /// Seed of all random numbers
    #[arg(long, default_value_t = 0, help_heading = "Sampling")]
    seed: u64,
    /// Responses that run at the same time: 128 on a CPU and as many as memory holds, up to 1024, on a GPU, unless given
    #[arg(long, value_parser = flags::count, help_heading = "Machine")]
    batch_size: Option<usize>,
    /// Number format of the cache of keys and values, which long responses spend most of their time reading. int8 changes
    /// log-probs little more than bf16 does; dtype then ends in +kv-int8, and dice-score computes the policy's log-probs itself
    #[arg(long, value_enum, default_value_t = KvCacheDtype::Auto, help_heading = "Machine")]
    kv_cache_dtype: KvCacheDtype,
    #[command(flatten)]
    files: Files,
    // Last: what comes after a heading is under it.
    #[command(flatten, next_help_heading = "Machine")]
    compute: Compute,
}

/// Colder ones would make infinities of logits.
fn temperature(text: &str) -> Result<f64> {
    let fits = |t| t == 0.0 || t >= 1e-6;
    flags::number(text, fits, "0 (greedy) or at least 0.000001")
}

fn top_p(text: &str) -> Result<f64> {
    flags::number(text, |p| p > 0.0 && p <= 1.0, "above 0 and at most 1")
}

fn main() -> ExitCode {
    program::main(run)
}

fn run(args: Args) -> Result<()> {
    let how = Sampling {
        temperature: args.temperature as f32,
        top_p: args.top_p as f32,
        top_k: args.top_k,
        min_p: args.min_p as f32,
        repetition_penalty: args.repetition_penalty as f32,
        max_tokens: args.max_tokens,
        seed: args.seed,
    };
    let output = match args.files.open(settings(json!({
        "k": args.k, "temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k,
        "min_p": args.min_p, "repetition_penalty": args.repetition_penalty, "max_tokens": args.max_tokens,
        "stop": args.stop, "system": args.system, "seed": args.seed, "split": args.split.name(),
    })))? {
        Opened::Ready(output) => output,
        Opened::AlreadyDone(done) => {
            let model = || {
                let model = Checkpoint::open(&args.model)?;
                let mut known = settings(json!({"model": model.weights.fingerprint()?}));
                if let Some(dtype) = args.compute.named_dtype() {
                    let int8 = args.kv_cache_dtype == KvCacheDtype::Int8;
                    known.insert("dtype".into(), json!(sampling_dtype(dtype, int8)));
                }
                Ok(known)
            };
            return done.confirm(model, &args.files.inputs());
        }
    };
    let place = args.compute.place(Stage::Sampling)?;
    let model = Checkpoint::open(&args.model)?;
    let engine = model.engine(&place)?;
    let cache = args.kv_cache_dtype.format(&args.compute, &place)?;
    let kept = match cache {
        Format::Float(_) => "",
        Format::Int8 => ", keys and values kept in int8",
    };
    program::say(format_args!("{}: computing in {place}{kept}", args.model));
    let mut job = Job {
        fingerprint: model.weights.fingerprint()?.to_owned(),
        dtype: sampling_dtype(place.dtype(), matches!(cache, Format::Int8)),
        generator: engine.generator(
            how,
            model.chat.end_ids(),
            cache,
            args.batch_size,
            place.budget,
        )?,
        model: &model,
        args: &args,
        output,
        waiting: Default::default(),
        ids: Default::default(),
        repeated: 0,
        progress: Progress::new("rows", None),
    };
    job.output.begin(settings(json!({
        "model": job.fingerprint, "dtype": job.dtype, "date": model.chat.date(),
    })))?;
    let left_out = Arc::new(AtomicU64::new(0));
    let mut rows = of_split(args.files.rows(), args.split, left_out.clone());
    job.take_up(&mut rows)?;
    job.run(&jsonl::ahead(rows))?;
    job.progress
        .skip("not in --split", left_out.load(Ordering::Relaxed));
    if job.repeated > 0 {
        job.progress.note(format!(
            "{} prompts with the id of one before, and so its draws",
            job.repeated
        ));
    }
    job.progress.finish();
    job.output.finish()
}

/// The rows whose prompt is in the part; the others are counted. What is wrong with a row is for others to say.
fn of_split(
    rows: impl Iterator<Item = Result<Row>>,
    split: Split,
    left_out: Arc<AtomicU64>,
) -> impl Iterator<Item = Result<Row>> {
    rows.filter(move |row| {
        let prompt = row.as_ref().map(Row::prompt);
        let holds = !matches!(prompt, Ok(Ok(prompt)) if !split.holds(&prompt));
        left_out.fetch_add(u64::from(!holds), Ordering::Relaxed);
        holds
    })
}

/// A run over all prompts.
struct Job<'a> {
    args: &'a Args,
    model: &'a Checkpoint,
    fingerprint: String,
    /// The formats of the computation: `logp` holds for these weights in these formats.
    dtype: String,
    generator: Box<dyn Generate + 'a>,
    output: Output,
    /// The rows of the prompts at work, in order.
    waiting: VecDeque<Row>,
    /// The ids so far, and how often one came again.
    ids: HashSet<String>,
    repeated: u64,
    progress: Progress,
}

impl Job<'_> {
    /// Takes the prompts that an interrupted run finished off the input; its last, incomplete one is cut away.
    fn take_up(&mut self, inputs: &mut impl Iterator<Item = Result<Row>>) -> Result<()> {
        let prompts = self.output.kept_rows() / self.args.k as u64;
        self.output.truncate_to(prompts * self.args.k as u64)?;
        let mut kept = self.output.kept();
        for _ in 0..prompts {
            let mut expected = None;
            for number in 0..self.args.k {
                let Some(row) = kept.next().transpose()? else {
                    break;
                };
                let prompt = (row.id()?, row.prompt()?);
                if number == 0 {
                    expected = self.next_written(inputs, &prompt)?;
                }
                let same = expected.as_ref() == Some(&prompt)
                    && row.number("sample")? == number as f64
                    && row.opt_string("model")? == Some(&self.fingerprint);
                ensure!(
                    same,
                    "{}: not what this command would have written here (sample {number} of prompt {}, model {}): \
                     give the same input and model, or remove the file to start over",
                    row.place,
                    expected.as_ref().map_or("none", |(id, _)| id),
                    self.fingerprint
                );
                if number == 0 {
                    self.ids.insert(prompt.0);
                }
            }
        }
        self.progress.kept(self.output.kept_rows());
        Ok(())
    }

    /// The id of the next prompt that an interrupted run would have written, which should be `written`: it may have left
    /// out some before it.
    fn next_written(
        &self,
        inputs: &mut impl Iterator<Item = Result<Row>>,
        written: &(String, Prompt),
    ) -> Result<Option<(String, Prompt)>> {
        loop {
            let Some(input) = inputs.next().transpose()? else {
                return Ok(None);
            };
            let prompt = (input.id()?, self.prompt(&input)?);
            let left_out = || {
                let too_long = self.encode(&input).is_err_and(|err| TooLong::is(&err));
                self.args.compute.on_nan == OnNan::Skip || too_long
            };
            if prompt == *written || !left_out() {
                return Ok(Some(prompt));
            }
        }
    }

    /// Feeds prompts and writes responses. A bad row ends the input: what came before it is finished first.
    /// Prompts that are late do not hold up the responses at work.
    fn run(&mut self, rows: &Receiver<Result<Row>>) -> Result<()> {
        let mut failed = None;
        let mut more = true;
        loop {
            while more && self.generator.wants_prompt() {
                let row = match self.generator.is_idle() {
                    true => rows.recv().ok(),
                    false => match rows.try_recv() {
                        Ok(row) => Some(row),
                        Err(TryRecvError::Empty) => break,
                        Err(TryRecvError::Disconnected) => None,
                    },
                };
                more = row.is_some();
                if let Some(Err(err)) = row.map(|row| row.and_then(|row| self.push(row))) {
                    (failed, more) = (Some(err), false);
                }
            }
            if self.generator.is_idle() {
                return failed.map_or(Ok(()), Err);
            }
            let before = self.generator.tokens();
            let (model, args) = (self.model, self.args);
            self.generator
                .step(&|ids: &[u32]| stops(model, &args.stop, ids))?;
            self.progress.add(0, self.generator.tokens() - before);
            self.write_finished()?;
            program::check()?;
        }
    }

    /// The prompt with its system turn.
    fn prompt(&self, row: &Row) -> Result<Prompt> {
        let prompt = row.prompt()?;
        Ok(match &self.args.system {
            Some(system) => prompt.with_system(system),
            None => prompt,
        })
    }

    /// The same, and its tokens.
    ///
    /// # Errors
    /// A row that is wrong; or ([`TooLong`]) longer than the model or the memory takes.
    fn encode(&self, row: &Row) -> Result<(Prompt, Vec<u32>)> {
        let prompt = self.prompt(row)?;
        let ids = self.model.prompt_ids(row, &prompt)?;
        if !self.generator.has_room_for(ids.len()) {
            let message = format!("has {} tokens, more than there is memory for", ids.len());
            return Err(TooLong::of(row, "prompt", message));
        }
        Ok((prompt, ids))
    }

    fn push(&mut self, mut row: Row) -> Result<()> {
        let (id, id_value) = (row.id()?, row.id_value()?);
        self.progress.read(1);
        let (prompt, ids) = match self.encode(&row) {
            Err(err) if TooLong::is(&err) => {
                self.progress.leave_out("too long", err);
                return Ok(());
            }
            encoded => encoded?,
        };
        if self.args.system.is_some() || row.present("prompt").is_none() {
            row.fields.insert("prompt".into(), json!(prompt.messages()));
        }
        row.fields.insert("id".into(), id_value);
        // What a prompt brings of another response to it is not of these.
        row.fields
            .retain(|field, _| !SAMPLE_FIELDS.contains(&field.as_str()));
        name_prompt(&mut row, &ids);
        self.repeated += u64::from(!self.ids.insert(id.clone()));
        self.waiting.push_back(row);
        self.generator.push(Request {
            key: id,
            prompt: ids,
            k: self.args.k,
        });
        Ok(())
    }

    fn write_finished(&mut self) -> Result<()> {
        for (_, samples) in self.generator.finished() {
            let prompt = self.waiting.pop_front().expect("every request has its row");
            // A broken model's tokens are no samples, and JSON has no NaN.
            if !samples.iter().all(|sample| sample.logp.is_finite()) {
                let message = "got a response whose log-prob is not a number: is the model sound?";
                let err = prompt.error("prompt", message);
                ensure!(self.args.compute.on_nan == OnNan::Skip, err);
                self.progress.leave_out("not a number", err);
                continue;
            }
            for (number, sample) in samples.into_iter().enumerate() {
                let mut row = prompt.fields.clone();
                self.describe(number, sample, &mut row)?;
                self.output.write(&row)?;
                self.progress.add(1, 0);
            }
            self.output.flush()?;
        }
        Ok(())
    }

    /// Adds a sample's fields to its prompt's.
    fn describe(&self, number: usize, sample: Sample, row: &mut Map<String, Value>) -> Result<()> {
        let chat = &self.model.chat;
        row.insert("sample".into(), json!(number));
        let (begin, text) = chat.answer(&sample.token_ids)?;
        // Where the text is shorter than the tokens are, those of the text go into the row, whose log-prob is unknown.
        let (text, finish, ids, logp) = match stop_at(&self.args.stop, &text) {
            Some(at) => {
                let ids = chat.response_ids(&text[..at], false)?;
                let ids = [&sample.token_ids[..begin], &ids].concat();
                (&text[..at], FinishReason::Stop, ids, None)
            }
            None => {
                let logp = Some(sample.logp);
                (&text[..], sample.finish, sample.token_ids, logp)
            }
        };
        row.insert("response".into(), json!(text));
        row.insert("finish_reason".into(), json!(finish.as_str()));
        row.insert("token_ids".into(), json!(ids));
        if let Some(logp) = logp {
            row.insert("logp".into(), json!(logp));
        }
        row.insert("model".into(), json!(self.fingerprint));
        row.insert("dtype".into(), json!(self.dtype));
        Ok(())
    }
}

/// Whether a stop text ends in the last token of a response. It was looked for after every token before, so that the last
/// few are enough: each but control tokens is a byte or more.
fn stops(model: &Checkpoint, stops: &[String], ids: &[u32]) -> bool {
    /// What a tokenizer may do to the first token of a text, it does to these.
    const MORE: usize = 8;
    let Some(longest) = stops.iter().map(String::len).max() else {
        return false;
    };
    let tail = &ids[ids.len().saturating_sub(longest + MORE)..];
    let text = model.chat.decode(tail);
    text.is_ok_and(|text| stop_at(stops, &text).is_some())
}

/// Where the first of the stop texts begins in a response, bytes.
fn stop_at(stops: &[String], text: &str) -> Option<usize> {
    stops
        .iter()
        .filter_map(|stop| text.find(stop.as_str()))
        .min()
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

    #[test]
    fn a_split_takes_its_prompts_and_counts_the_others() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("prompts.jsonl");
        let text: String = (0..100)
            .map(|i| format!("{{\"prompt\":\"{i}\"}}\n"))
            .collect();
        std::fs::write(&file, text + "{\n").unwrap();
        let taken = |split| {
            let left_out = Arc::new(AtomicU64::new(0));
            let rows = jsonl::rows(std::slice::from_ref(&file));
            let (fine, bad): (Vec<_>, Vec<_>) =
                of_split(rows, split, left_out.clone()).partition(Result::is_ok);
            assert_eq!(bad.len(), 1, "a broken row is not left out");
            assert_eq!(
                fine.len() as u64 + left_out.load(Ordering::Relaxed),
                100,
                "{split:?}"
            );
            fine.len()
        };
        let parts = [Split::Train, Split::Validation, Split::Test].map(taken);
        assert!(parts[0] > 60 && parts[1] > 0 && parts[2] > 0, "{parts:?}");
        assert_eq!(parts.iter().sum::<usize>(), taken(Split::All));
    }
}
