//! A model with its tokenizer, ready to run, and the rows that it turns into token ids.

use super::compute::Place;
use crate::budget;
use crate::chat::Chat;
use crate::cuda;
use crate::generate::{Generate, Generator, Limits, Sampling};
use crate::jsonl::{FinishReason, Row};
use crate::kernels::decoding::Format;
use crate::logprob::{Group, PassLimits, score_all};
use crate::model::Decoder;
use crate::program;
use crate::records::Prompt;
use crate::weights::Weights;
use anyhow::Result;
use serde_json::Value;
use std::sync::Once;

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
        weights.check_tokenizer(chat.least_rows())?;
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
    pub(super) fn bytes(&self, place: &Place) -> Result<usize> {
        let config = &self.weights.config;
        match &place.gpu {
            Some(_) => Ok(cuda::Decoder::weight_bytes(config, place.precision)),
            None => Decoder::weight_bytes(config, &self.weights, place.full_range_precision()),
        }
    }

    /// The rendered prompt of a row.
    ///
    /// # Errors
    /// A prompt that is missing, that the template refuses, that holds a token which the model has not, or ([`TooLong`]) that
    /// leaves no room for a response.
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
        self.check_tokens(row, "prompt", &ids)?;
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

    /// Fails on a token that the model has no weights for.
    fn check_tokens(&self, row: &Row, field: &str, ids: &[u32]) -> Result<()> {
        let vocab = self.weights.config.vocab;
        match ids.iter().find(|&&id| id as usize >= vocab) {
            None => Ok(()),
            Some(id) => {
                let message = format!(
                    "holds the token {id}, but the model has {vocab} tokens: is it of another model?"
                );
                Err(row.error(field, message))
            }
        }
    }

    /// Says, once, how an answer that is given as text differs from what the template would make of it.
    fn note_texts(&self, row: &Row, field: &str, (text, opened): (&str, bool), finished: bool) {
        static OPENED: Once = Once::new();
        static ENDED: Once = Once::new();
        let place = &row.place;
        if self.chat.opens_answers() && !opened {
            OPENED.call_once(|| {
                program::say(format_args!(
                    "{place}: the chat template opens an answer (with an empty thought, say) otherwise than it asks for one: \
                     {field:?} here is taken as what follows the prompt for an answer; where that is to be opened, give it as a \
                     message, [{{\"role\": \"assistant\", \"content\": …}}]"
                ));
            });
        }
        let end = self.chat.end_text();
        if finished && !end.is_empty() && text.trim_end().ends_with(&end) {
            ENDED.call_once(|| {
                program::say(format_args!(
                    "{place}: field {field:?} ends with {end:?} written out: it is read as text, and the token follows; \
                     take it off the text"
                ));
            });
        }
    }

    /// The tokens of a response to a prompt: the row's ids where it has them, else its text's, opened as the template does it
    /// where the response is given as a message; ended by the end-of-turn token where it is finished. The names are those of
    /// the row's fields.
    ///
    /// # Errors
    /// A field of the wrong type, or an id that the model does not have.
    pub fn response_ids(&self, row: &Row, prompt: &Prompt, names: Response) -> Result<Vec<u32>> {
        let text = row.response(names.text)?;
        let finished = row.finish_reason(names.finish_reason)? == FinishReason::Stop;
        let Some(mut ids) = row.opt_ids(names.token_ids)? else {
            let wrong = |err| row.error(names.text, format!("{err:#}"));
            let opening = match row.present(names.text).is_some_and(Value::is_array) {
                true => {
                    let more = row.template_variables()?;
                    let opening = self.chat.opening_ids(prompt, &more, text);
                    opening.map_err(wrong)?
                }
                false => None,
            };
            let ids = self.chat.response_ids(text, finished).map_err(wrong)?;
            let told = (text, opening.is_some());
            let ids = [opening.unwrap_or_default(), ids].concat();
            self.check_tokens(row, names.text, &ids)?;
            self.note_texts(row, names.text, told, finished);
            return Ok(ids);
        };
        self.check_tokens(row, names.token_ids, &ids)?;
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

/// The field with the hash of a prompt's tokens.
const PROMPT_HASH: &str = "prompt_hash";

/// Says in a row of which tokens its log-probs are: another chat template, or another date in it, makes others of the same
/// prompt.
pub fn name_prompt(row: &mut Row, ids: &[u32]) {
    row.fields.insert(PROMPT_HASH.into(), hash(ids).into());
}

/// Whether the log-probs that a row brings can be of a prompt of these tokens: a row that does not say is believed.
pub fn is_of_prompt(row: &Row, ids: &[u32]) -> Result<bool> {
    let named = row.opt_string(PROMPT_HASH)?;
    Ok(named.is_none_or(|named| named == hash(ids)))
}

fn hash(ids: &[u32]) -> String {
    let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    blake3::hash(&bytes).to_hex()[..16].to_owned()
}

/// Which responses a row holds: a sample's one, or a pair's two. Samples for the prompts of pairs have those pairs' fields, too.
pub fn responses(row: &Row) -> &'static [Response] {
    let has = |field| row.present(field).is_some();
    if !has("response") && has("chosen") && has("rejected") {
        &PAIR
    } else {
        &[RESPONSE]
    }
}

/// Tokens of one forward pass when scoring on a CPU: enough to fill the matrix kernels, few enough for the caches.
pub const TOKENS_AT_ONCE: usize = 1024;
