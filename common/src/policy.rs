//! A language model as the tools use it: weights, tokenizer and decoder together, wherever it computes, and rows turned
//! into token ids.

use crate::budget;
use crate::chat::Chat;
use crate::cuda;
use crate::generate::{Generate, Generator, Limits, Sampling};
use crate::jsonl::{FinishReason, Row};
use crate::kernels::decoding::Format;
use crate::kernels::gemm::Precision;
use crate::kernels::isa::Isa;
use crate::logprob::{Group, PassLimits, score_all};
use crate::model::Decoder;
use crate::program;
use crate::records::Prompt;
use crate::weights::Weights;
use anyhow::{Context, Result, bail};
use std::sync::OnceLock;

/// Where and in which number format a tool computes; `#[command(flatten)]` it.
#[derive(clap::Args, Clone, Debug)]
pub struct Compute {
    /// Where to compute: auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto", value_parser = device)]
    pub device: String,

    /// Number format of the matrix products (sums, losses and saved weights are float32 always)
    #[arg(long, value_enum, default_value_t = Dtype::Auto)]
    pub dtype: Dtype,

    /// Most memory to use (8G, 512M): batches are made to fit, and a row that does not fit even alone is left out and
    /// named. Without it, three quarters of what the machine has left when the models are loaded. On a GPU: of its memory,
    /// models included; without it, all that is free there
    #[arg(long, value_name = "SIZE", value_parser = budget::size)]
    pub memory_budget: Option<usize>,

    /// What to do with a row or a step whose numbers are not finite: fail, or leave it out and name it
    #[arg(long, value_enum, value_name = "stop|skip", default_value_t = OnNan::Stop)]
    pub on_nan: OnNan,
}

/// What is done about log-probs, losses and gradients that are NaN or infinite. They are never averaged into anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum OnNan {
    /// End with an error that names the row or the step
    Stop,
    /// Leave the row or the step out, name it and count it
    Skip,
}

/// A row that is sound, but longer than the model or the memory takes: left out, and no reason to fail.
#[derive(Debug)]
pub struct TooLong(String);

impl std::fmt::Display for TooLong {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for TooLong {}

impl TooLong {
    /// What is said of a row's field.
    pub fn of(row: &Row, field: &str, message: impl std::fmt::Display) -> anyhow::Error {
        Self(row.error(field, message).to_string()).into()
    }

    /// Whether an error is one of these.
    pub fn is(err: &anyhow::Error) -> bool {
        err.is::<Self>()
    }
}

/// A choice of number format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Dtype {
    /// What suits the stage on this machine; said on stderr
    Auto,
    /// Float32
    F32,
    /// Bfloat16 operands, float32 sums
    Bf16,
    /// Half-precision operands, float32 sums: for scoring on a GPU, of bf16's size and eight times as fine
    #[value(alias = "fp16")]
    F16,
}

/// What is computed, which decides over number formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// `--dtype auto` is for speed: bfloat16 changes a draw now and then but not the distribution to speak of.
    Sampling,
    /// `--dtype auto` is for exact log-probs: a reward is a small difference of two of them.
    Scoring,
    /// `--dtype auto` is exact, too.
    Training,
}

/// A choice of number format for the keys and values of prompts and responses at work. (The name is vLLM's.)
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum KvCacheDtype {
    /// int8 where --dtype auto means bf16 on a CPU; else as --dtype says
    Auto,
    /// Integers of 8 bits, with a scale for each key and value (on a CPU)
    Int8,
}

impl KvCacheDtype {
    /// Settles the format. Half the bytes are what long responses wait for; and what 8 bits change of log-probs is not much
    /// more than what bfloat16 does.
    ///
    /// # Errors
    /// 8 bits on a GPU.
    pub fn format(self, compute: &Compute, place: &Place) -> Result<Format> {
        let fast = compute.dtype == Dtype::Auto && place.precision == cuda::Precision::Bf16;
        Ok(match (self, &place.gpu) {
            (Self::Int8, Some(_)) => bail!("--kv-cache-dtype int8 is for a CPU (--device cpu)"),
            (Self::Int8, None) => Format::Int8,
            (Self::Auto, None) if fast => Format::Int8,
            (Self::Auto, _) => Format::Float(place.full_range_precision()),
        })
    }
}

/// The name of the formats that something was sampled in: as `--dtype` takes it, where caches are in the same.
pub fn sampling_dtype(place: &Place, cache: Format) -> String {
    match cache {
        Format::Float(_) => place.dtype().to_owned(),
        Format::Int8 => format!("{}+kv-int8", place.dtype()),
    }
}

fn device(text: &str) -> Result<String, String> {
    let number = text
        .strip_prefix("cuda:")
        .is_some_and(|n| n.parse::<usize>().is_ok());
    if number || ["auto", "cpu", "cuda"].contains(&text) {
        Ok(text.to_owned())
    } else {
        Err("expected auto, cpu, cuda or cuda:N".to_owned())
    }
}

impl Compute {
    /// Settles where and in which number format to compute. `auto` takes the first GPU where this build can use one.
    ///
    /// # Errors
    /// A GPU that was asked for and cannot be used; a format that is not for the stage.
    pub fn place(&self, stage: Stage) -> Result<Place> {
        let gpu = match self.device.as_str() {
            "cpu" => None,
            "auto" if cuda::count() == 0 => None,
            "auto" => match cuda::open(0) {
                Ok(gpu) => Some(gpu),
                Err(err) => {
                    program::say(format_args!("the GPU is left alone: {err:#}"));
                    None
                }
            },
            named => {
                let number = named.strip_prefix("cuda:").map_or(Ok(0), str::parse)?;
                let gpu = cuda::open(number).with_context(|| format!("--device {named}"))?;
                Some(gpu)
            }
        };
        if let (Some(gpu), Some(budget)) = (&gpu, self.memory_budget) {
            gpu.limit_memory(budget);
        }
        let precision = self.precision(stage, gpu.is_some())?;
        if gpu.is_some() && self.dtype == Dtype::Auto && precision == cuda::Precision::F32 {
            let finer = match stage {
                Stage::Scoring => "; --dtype f16 is of that size, and finer",
                Stage::Sampling | Stage::Training => "",
            };
            program::say(format_args!(
                "float32 is exact, and slow on a GPU: --dtype bf16 multiplies some 15 times as fast{finer}"
            ));
        }
        Ok(Place {
            precision,
            gpu,
            budget: self.memory_budget,
        })
    }

    fn precision(&self, stage: Stage, on_gpu: bool) -> Result<cuda::Precision> {
        use cuda::Precision::{Bf16, F16, F32};
        let fast_bf16 = on_gpu || Isa::current() == Isa::Avx512 { bf16: true };
        Ok(match (self.dtype, stage) {
            (Dtype::Auto, Stage::Sampling) if fast_bf16 => Bf16,
            (Dtype::F32 | Dtype::Auto, _) => F32,
            (Dtype::Bf16, _) => Bf16,
            (Dtype::F16, Stage::Scoring) if on_gpu => F16,
            (Dtype::F16, _) => bail!("--dtype f16 is for scoring on a GPU: use f32 or bf16 here"),
        })
    }
}

/// Where and in which number format a tool computes.
#[derive(Clone)]
pub struct Place {
    /// The GPU; none is the CPU.
    pub gpu: Option<cuda::Device>,
    /// The format of the matrix products' operands.
    pub precision: cuda::Precision,
    /// What the user lets a CPU's computation take, bytes; a GPU knows it by itself.
    pub budget: Option<usize>,
}

impl Place {
    /// The name of the number format, as `--dtype` takes it.
    pub fn dtype(&self) -> &'static str {
        self.precision.name()
    }

    /// The format where there is no half precision: on a CPU, in sampling and in training.
    pub fn full_range_precision(&self) -> Precision {
        match self.precision {
            cuda::Precision::F32 => Precision::F32,
            cuda::Precision::Bf16 => Precision::Bf16,
            cuda::Precision::F16 => unreachable!("`Compute::place` refuses it there"),
        }
    }
}

/// For people: "f32", "bf16 on NVIDIA H200".
impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.dtype())?;
        match &self.gpu {
            Some(gpu) => write!(f, " on {}", gpu.name()),
            None => Ok(()),
        }
    }
}

/// A model that is ready to run, on a CPU or a GPU.
pub enum Engine {
    /// With the CPU's kernels.
    Cpu(Box<Decoder>),
    /// With CUDA's.
    Cuda(Box<cuda::Decoder>),
}

impl Engine {
    /// Σ log p of each response of each group, nats; at most `longest` tokens in a forward pass.
    ///
    /// # Errors
    /// A GPU that fails or has no room.
    pub fn score(&self, groups: &[Group], longest: usize) -> Result<Vec<Vec<f64>>> {
        let gathered = self.tokens_at_once()?;
        match self {
            Self::Cpu(decoder) => {
                let most = longest;
                Ok(score_all(decoder, groups, PassLimits { gathered, most }))
            }
            Self::Cuda(decoder) => cuda::score_all(decoder, groups, gathered.min(longest)),
        }
    }

    /// Tokens that are worth to be gathered for a call of [`Self::score`].
    pub fn tokens_at_once(&self) -> Result<usize> {
        match self {
            Self::Cpu(_) => Ok(TOKENS_AT_ONCE),
            Self::Cuda(decoder) => decoder.tokens_at_once(),
        }
    }

    /// A generator of which at most `slots` sequences run at a time, or what `budget` has room for; without a number,
    /// what suits the machine. On a CPU it keeps keys and values in the format `cache`.
    ///
    /// # Errors
    /// A model that is larger than the budget; a GPU without room for a single response.
    pub fn generator<'a>(
        &'a self,
        how: Sampling,
        end_ids: &[u32],
        cache: Format,
        slots: Option<usize>,
        budget: Option<usize>,
    ) -> Result<Box<dyn Generate + 'a>> {
        Ok(match self {
            Self::Cpu(decoder) => {
                let limits = Limits {
                    sequences: slots.unwrap_or(128),
                    bytes: budget::left(budget)?,
                };
                Box::new(Generator::new(decoder, how, end_ids, limits).with_cache(cache))
            }
            Self::Cuda(decoder) => Box::new(cuda::Generator::new(decoder, how, end_ids, slots)?),
        })
    }
}

/// The weights and the tokenizer of a MODEL, which fit each other.
pub struct Checkpoint {
    /// Config and tensors.
    pub weights: Weights,
    /// Tokenizer and template.
    pub chat: Chat,
}

impl Checkpoint {
    /// Opens a folder, a `.gguf` file or a hub id.
    ///
    /// # Errors
    /// Files that are missing, broken, of an unknown architecture, or a tokenizer with more tokens than the model.
    pub fn open(model: &str) -> Result<Self> {
        let weights = Weights::open(model)?;
        let chat = Chat::open(weights.path())?;
        weights.check_tokenizer(chat.vocab_size())?;
        if !chat.has_template() {
            program::say(format_args!(
                "{model}: it has no chat template: prompts are taken as plain text, as a base model reads it"
            ));
        }
        Ok(Self { weights, chat })
    }

    /// Fails unless both models have as many tokens, and says so where these are not the same.
    ///
    /// # Errors
    /// Vocabularies of two sizes.
    pub fn check_same_vocabulary(&self, other: &Self) -> Result<()> {
        self.weights.check_same_vocabulary(&other.weights)?;
        if let Some((id, [ours, theirs])) = self.chat.first_difference(&other.chat) {
            program::say(format_args!(
                "{} and {} have different tokens, such as {ours:?} and {theirs:?} for {id}: are they of one kind?",
                self.weights.path().display(),
                other.weights.path().display()
            ));
        }
        Ok(())
    }

    /// Makes the weights ready for forward passes.
    ///
    /// # Errors
    /// A tensor that cannot be read; a GPU without room.
    pub fn engine(&self, place: &Place) -> Result<Engine> {
        let weights = &self.weights;
        Ok(match &place.gpu {
            None => Engine::Cpu(Box::new(Decoder::new(
                &weights.config,
                weights,
                place.full_range_precision(),
            )?)),
            Some(gpu) => Engine::Cuda(Box::new(cuda::Decoder::new(
                gpu,
                &weights.config,
                weights,
                place.precision,
            )?)),
        })
    }

    /// The bytes that the weights take when they are ready.
    fn bytes(&self, place: &Place) -> Result<usize> {
        let config = &self.weights.config;
        match &place.gpu {
            Some(_) => Ok(cuda::Decoder::weight_bytes(config, place.precision)),
            None => Decoder::weight_bytes(config, &self.weights, place.full_range_precision()),
        }
    }

    /// The rendered prompt of a row.
    ///
    /// # Errors
    /// A prompt that is missing, that the template refuses, or ([`TooLong`]) that leaves no room for a response.
    pub fn prompt_ids(&self, row: &Row, prompt: &Prompt) -> Result<Vec<u32>> {
        let ids = self
            .chat
            .prompt_ids_with(prompt, &row.template_variables()?)
            .map_err(|err| row.error("prompt", format!("{err:#}")))?;
        if ids.is_empty() {
            return Err(row.error(
                "prompt",
                "has no token: the chat template writes nothing of it",
            ));
        }
        let context = self.weights.config.context;
        if ids.len() >= context {
            let message = format!(
                "has {} tokens, but the model's context is {context}",
                ids.len()
            );
            return Err(TooLong::of(row, "prompt", message));
        }
        Ok(ids)
    }

    /// The tokens of a response: the row's ids where it has them, else its text's; ended by the end-of-turn token
    /// where it is finished. The names are those of the row's fields.
    ///
    /// # Errors
    /// A field of the wrong type, or an id that the model does not have.
    pub fn response_ids(&self, row: &Row, names: Response) -> Result<Vec<u32>> {
        let text = row.response(names.text)?;
        let finished = row.finish_reason(names.finish_reason)? == FinishReason::Stop;
        let Some(mut ids) = row.opt_ids(names.token_ids)? else {
            return self
                .chat
                .response_ids(text, finished)
                .map_err(|err| row.error(names.text, format!("{err:#}")));
        };
        let vocab = self.weights.config.vocab;
        if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
            let message = format!(
                "holds {id}, but the model has {vocab} tokens: was it sampled by another model?"
            );
            return Err(row.error(names.token_ids, message));
        }
        if finished
            && !ids
                .last()
                .is_some_and(|last| self.chat.end_ids().contains(last))
        {
            ids.push(self.chat.end_of_turn());
        }
        Ok(ids)
    }
}

/// The fields of a row that hold a response.
#[derive(Clone, Copy, Debug)]
pub struct Response {
    /// Its text.
    pub text: &'static str,
    /// Its tokens, optional.
    pub token_ids: &'static str,
    /// Why it ended, optional.
    pub finish_reason: &'static str,
}

/// The response of a sample row.
pub const RESPONSE: Response = Response {
    text: "response",
    token_ids: "token_ids",
    finish_reason: "finish_reason",
};
/// The better response of a pair row.
pub const CHOSEN: Response = Response {
    text: "chosen",
    token_ids: "chosen_token_ids",
    finish_reason: "chosen_finish_reason",
};
/// The worse response of a pair row.
pub const REJECTED: Response = Response {
    text: "rejected",
    token_ids: "rejected_token_ids",
    finish_reason: "rejected_finish_reason",
};

/// The responses of a pair row.
pub const PAIR: [Response; 2] = [CHOSEN, REJECTED];

/// Which responses a row holds: a sample's one, or a pair's two. Samples for the prompts of pairs have those pairs' fields, too.
pub fn responses(row: &Row) -> &'static [Response] {
    let has = |field| row.fields.contains_key(field);
    if !has("response") && has("chosen") && has("rejected") {
        &PAIR
    } else {
        &[RESPONSE]
    }
}

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

    /// The token ids of rows of one prompt, and of the responses that each row is to have (see [`responses`]).
    ///
    /// # Errors
    /// A row that cannot be encoded; or ([`TooLong`]) that does not fit both models' contexts or the memory.
    pub fn encode(&self, rows: &[Row], of: impl Fn(&Row) -> &'static [Response]) -> Result<Group> {
        let mut group = Group {
            prompt: self.policy.prompt_ids(&rows[0], &rows[0].prompt()?)?,
            responses: vec![],
        };
        for row in rows {
            for names in of(row) {
                let ids = self.policy.response_ids(row, *names)?;
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
                let same = row.opt_string("model")? == Some(fingerprint)
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

/// Tokens of one forward pass when scoring on a CPU: enough to fill the matrix kernels, few enough for the caches.
pub const TOKENS_AT_ONCE: usize = 1024;
