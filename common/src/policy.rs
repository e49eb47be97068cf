//! A language model as the tools use it: weights, tokenizer and decoder together, and rows turned into token ids.

use crate::budget;
use crate::chat::Chat;
use crate::jsonl::{FinishReason, Row};
use crate::kernels::gemm::Precision;
use crate::kernels::isa::Isa;
use crate::logprob::{Group, score_all};
use crate::model::Decoder;
use crate::program;
use crate::records::Prompt;
use crate::weights::Weights;
use anyhow::{Context, Result, bail};

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
    /// named. Without it, three quarters of what the machine has left when the models are loaded
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
    /// Float16: on a GPU only
    F16,
}

/// What a stage wants of `--dtype auto`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prefers {
    /// Exact log-probs: a reward is a small difference of two of them.
    Exactness,
    /// Speed: sampling, where bfloat16 changes a draw now and then but not the distribution to speak of.
    Speed,
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
    /// The number format to compute in.
    ///
    /// # Errors
    /// A device or a format that this build does not have.
    pub fn precision(&self, prefers: Prefers) -> Result<Precision> {
        if self.device.starts_with("cuda") {
            bail!(
                "--device {}: this build computes on the CPU alone; use --device cpu",
                self.device
            );
        }
        let fast_bf16 = Isa::current() == Isa::Avx512 { bf16: true };
        Ok(match (self.dtype, prefers) {
            (Dtype::F16, _) => bail!("--dtype f16 is for a GPU: on a CPU use f32 or bf16"),
            (Dtype::F32, _) | (Dtype::Auto, Prefers::Exactness) => Precision::F32,
            (Dtype::Bf16, _) => Precision::Bf16,
            (Dtype::Auto, Prefers::Speed) if fast_bf16 => Precision::Bf16,
            (Dtype::Auto, Prefers::Speed) => Precision::F32,
        })
    }
}

/// The name of a number format, as `--dtype` takes it.
pub fn dtype_name(precision: Precision) -> &'static str {
    match precision {
        Precision::F32 => "f32",
        Precision::Bf16 => "bf16",
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
        Ok(Self { weights, chat })
    }

    /// Packs the weights for forward passes.
    pub fn decoder(&self, precision: Precision) -> Result<Decoder> {
        Decoder::new(&self.weights.config, &self.weights, precision)
    }

    /// The rendered prompt of a row.
    ///
    /// # Errors
    /// A prompt that is missing, that the template refuses, or ([`TooLong`]) that leaves no room for a response.
    pub fn prompt_ids(&self, row: &Row, prompt: &Prompt) -> Result<Vec<u32>> {
        let ids = self
            .chat
            .prompt_ids(prompt, None)
            .map_err(|err| row.error("prompt", format!("{err:#}")))?;
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

/// Which responses a row holds: a pair's two, or a sample's one.
pub fn responses(row: &Row) -> &'static [Response] {
    let pair = row.fields.contains_key("chosen") && row.fields.contains_key("rejected");
    if pair {
        &[CHOSEN, REJECTED]
    } else {
        &[RESPONSE]
    }
}

/// Two checkpoints and their decoders, for implicit rewards: the policy and its reference.
pub struct RewardModel {
    /// π and its tokenizer, which renders the rows for both.
    pub policy: Checkpoint,
    policy_decoder: Decoder,
    reference: Checkpoint,
    reference_decoder: Decoder,
    /// What both compute in.
    dtype: &'static str,
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
        let precision = compute.precision(Prefers::Exactness)?;
        let policy = Checkpoint::open(policy).with_context(|| format!("--policy {policy}"))?;
        let reference =
            Checkpoint::open(reference).with_context(|| format!("--ref {reference}"))?;
        policy.weights.check_same_vocabulary(&reference.weights)?;
        let (policy_decoder, reference_decoder) =
            (policy.decoder(precision)?, reference.decoder(precision)?);
        if policy.weights.fingerprint()? == reference.weights.fingerprint()? {
            program::say(
                "the policy and the reference are the same model: every implicit reward will be 0",
            );
        }
        program::say(format_args!("computing in {}", dtype_name(precision)));
        let token = [&policy_decoder, &reference_decoder].map(|d| d.forward_bytes(1));
        let longest = budget::left(compute.memory_budget)? / token[0].max(token[1]);
        Ok(Self {
            policy,
            policy_decoder,
            reference,
            reference_decoder,
            dtype: dtype_name(precision),
            longest,
        })
    }

    /// The fingerprints of policy and reference.
    pub fn fingerprints(&self) -> Result<(String, String)> {
        Ok((
            self.policy.weights.fingerprint()?.to_owned(),
            self.reference.weights.fingerprint()?.to_owned(),
        ))
    }

    /// What both compute in.
    pub fn dtype(&self) -> &'static str {
        self.dtype
    }

    /// Tokens of one forward pass: enough to fill the matrix kernels, few enough for the caches and the memory.
    pub fn tokens_at_once(&self) -> usize {
        TOKENS_AT_ONCE.min(self.longest)
    }

    /// The token ids of rows of one prompt: one response per sample row, two per pair row.
    ///
    /// # Errors
    /// A row that cannot be encoded; or ([`TooLong`]) that does not fit both models' contexts or the memory.
    pub fn encode(&self, rows: &[Row]) -> Result<Group> {
        let mut group = Group {
            prompt: self.policy.prompt_ids(&rows[0], &rows[0].prompt()?)?,
            responses: vec![],
        };
        for row in rows {
            for names in responses(row) {
                let ids = self.policy.response_ids(row, *names)?;
                self.check_length(row, names.text, group.prompt.len(), ids.len())?;
                group.responses.push(ids);
            }
        }
        Ok(group)
    }

    /// Log-probs of every response of every group. `known` has the policy's of a group that need not be computed again.
    pub fn score(&self, groups: &[Group], known: Vec<Option<Vec<f64>>>) -> Vec<Vec<Logps>> {
        let open: Vec<Group> = groups
            .iter()
            .zip(&known)
            .filter(|(_, known)| known.is_none())
            .map(|(group, _)| group.clone())
            .collect();
        let mut scored = score_all(&self.policy_decoder, &open, self.tokens_at_once()).into_iter();
        let reference = score_all(&self.reference_decoder, groups, self.tokens_at_once());
        known
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
            .collect()
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
                    && row.opt_string("dtype")? == Some(self.dtype)
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

/// Tokens of one forward pass when scoring: enough to fill the matrix kernels, few enough for the caches.
pub const TOKENS_AT_ONCE: usize = 2048;
