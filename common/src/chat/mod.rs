//! Between a row's text and token ids: chat templates, and the tokens of prompt and response.
//!
//! The prompt is rendered once by the template, generation prompt included; a response is tokenised apart
//! from it and never re-tokenised across the seam; what a row's text says is never taken for a control token.

mod contained;
mod encoder;
mod folder;
mod gguf_tokenizer;
#[cfg(test)]
mod published;
mod save;
mod strftime;
mod template;
#[cfg(test)]
pub mod testing;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value as Json};
use tokenizers::Tokenizer;

use crate::gguf::{Arrays, Header, Value};
use crate::mapped::Mapped;
use crate::records::{Prompt, turn};
use contained::contained;
use encoder::Encoder;
use template::Template;

/// The tokenizer, the template and the special tokens of one model.
pub struct Chat {
    encoder: Encoder,
    template: Option<Template>,
    specials: BTreeMap<String, String>,
    end_of_turn: u32,
    end_ids: Vec<u32>,
    opens_answers: bool,
    /// What opens an answer, if there are control tokens in it, such as those of a channel; else empty.
    channel: Vec<u32>,
    /// Original files by name, empty for a GGUF.
    files: BTreeMap<String, Vec<u8>>,
}

/// What a folder or a GGUF file says about text, before it is put to work.
struct Parts {
    tokenizer: Tokenizer,
    template: Option<String>,
    /// `bos_token`, `eos_token`, `unk_token`, `pad_token` → text.
    specials: BTreeMap<String, String>,
    /// Ids that end a turn by the model's configuration.
    end_ids: Vec<u32>,
    /// Whether every sequence has to begin with BOS even if the template does not write it (GGUF).
    add_bos: bool,
    files: BTreeMap<String, Vec<u8>>,
}

impl Chat {
    /// Opens a folder in Hugging Face layout or a `.gguf` file.
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_dir() {
            return Self::from_folder(path);
        }
        let header = Header::of_file(&Mapped::open(path)?, Arrays::Read)?;
        Self::from_gguf(&header.metadata).with_context(|| path.display().to_string())
    }

    /// Reads tokenizer.json and, where they exist, tokenizer_config.json, special_tokens_map.json,
    /// chat_template.jinja, generation_config.json and config.json of a folder.
    pub fn from_folder(dir: &Path) -> Result<Self> {
        let parts = folder::read(dir)?;
        contained(|| Self::assemble(parts)).with_context(|| dir.display().to_string())
    }

    /// Builds the tokenizer and template from the `tokenizer.*` entries of a GGUF file.
    pub fn from_gguf(metadata: &HashMap<String, Value>) -> Result<Self> {
        contained(|| Self::assemble(gguf_tokenizer::read(metadata)?))
    }

    fn assemble(parts: Parts) -> Result<Self> {
        let Parts {
            mut tokenizer,
            template,
            specials,
            mut end_ids,
            add_bos,
            files,
        } = parts;
        // A tokenizer.json may carry the cut-off and padding of its training: a prompt is never cut silently.
        tokenizer
            .with_truncation(None)
            .map_err(encoder::tokenizer_error)?;
        tokenizer.with_padding(None);
        let template = match template {
            Some(source) => Some(compile(&source, &specials, add_bos)?),
            None => None,
        };
        let eos = specials
            .get("eos_token")
            .and_then(|text| tokenizer.token_to_id(text));
        let exchange = template.as_ref().and_then(exchange);
        let found = exchange
            .as_ref()
            .and_then(|exchange| turn_end(exchange, &tokenizer));
        let Some(end_of_turn) = found.or(eos).or(end_ids.first().copied()) else {
            bail!("no end-of-turn token: neither the template nor eos_token names one");
        };
        end_ids.extend(eos);
        end_ids.push(end_of_turn);
        end_ids.sort_unstable();
        end_ids.dedup();
        let mut turn_marks = end_ids.clone();
        if let Some(template) = &template {
            turn_marks.extend(turn_tokens(template, &tokenizer));
        }
        let opens_answers = template
            .as_ref()
            .zip(exchange)
            .is_some_and(|(template, exchange)| opens_answers(template, &exchange));
        let encoder = Encoder::new(tokenizer, &turn_marks)?;
        let channel = match template.as_ref().filter(|_| opens_answers) {
            Some(template) => channel(template, &encoder)?,
            None => vec![],
        };
        if let Some(id) = end_ids
            .iter()
            .find(|id| **id as usize >= encoder.vocab_size())
        {
            bail!(
                "eos_token_id {id} is outside the tokenizer's vocabulary of {}",
                encoder.vocab_size()
            );
        }
        Ok(Self {
            encoder,
            template,
            specials,
            end_of_turn,
            end_ids,
            opens_answers,
            channel,
            files,
        })
    }

    /// Ids of a prompt, ready for the response to follow: rendered once by the template with the generation
    /// prompt, or, without a template, the text as the tokenizer begins a document (BOS if it adds one).
    pub fn prompt_ids(&self, prompt: &Prompt) -> Result<Vec<u32>> {
        self.prompt_ids_with(prompt, &Map::new())
    }

    /// The same with more variables for the template.
    pub fn prompt_ids_with(&self, prompt: &Prompt, more: &Map<String, Json>) -> Result<Vec<u32>> {
        contained(|| self.encode_prompt(prompt, more))
    }

    fn encode_prompt(&self, prompt: &Prompt, more: &Map<String, Json>) -> Result<Vec<u32>> {
        let Some(template) = &self.template else {
            return match prompt {
                Prompt::Text(text) => self.encoder.document(text),
                Prompt::Messages(_) => bail!(
                    "the model has no chat template: its prompts must be strings, without a system turn"
                ),
            };
        };
        let messages = prompt.messages();
        match self.encoder.guard(&messages, more)? {
            None => {
                let text = template.render_with(&messages, true, more)?;
                self.encoder.rendered(&text)
            }
            Some(guarded) => {
                let text = template.render_with(&guarded.messages, true, &guarded.more)?;
                self.encoder.guarded(&text, &guarded)
            }
        }
    }

    /// Ids of a response, tokenised by itself; a finished one ends with [`Self::end_of_turn`].
    pub fn response_ids(&self, response: &str, finished: bool) -> Result<Vec<u32>> {
        let mut ids = contained(|| self.encoder.text(response))?;
        if finished {
            ids.push(self.end_of_turn);
        }
        Ok(ids)
    }

    /// Ids of what the template puts before the text of an answer to a prompt: an empty thought, or the channel that answers go to,
    /// as TRL's conversational form has it. None where there is nothing of the kind, or the template does not take the text as
    /// it is (it may hold a thought of its own).
    pub fn opening_ids(
        &self,
        prompt: &Prompt,
        more: &Map<String, Json>,
        text: &str,
    ) -> Result<Option<Vec<u32>>> {
        let Some(template) = self.template.as_ref().filter(|_| self.opens_answers) else {
            return Ok(None);
        };
        contained(|| {
            let mut messages = prompt.messages();
            messages.push(turn("assistant", text));
            let guarded = self.encoder.guard(&messages, more)?;
            let (messages, more) = match &guarded {
                Some(guarded) => (&guarded.messages, &guarded.more),
                None => (&messages, more),
            };
            let opening = opening(template, messages, more)?;
            opening.map(|text| self.encoder.rendered(&text)).transpose()
        })
    }

    /// Every token that ends a turn by generation config, config, tokenizer or template: where sampling
    /// stops. Ascending.
    pub fn end_ids(&self) -> &[u32] {
        &self.end_ids
    }

    /// The token with which the template ends an assistant's turn; without a template, EOS.
    pub fn end_of_turn(&self) -> u32 {
        self.end_of_turn
    }

    /// Whether the template puts something between what it asks for an answer with and an answer, such as an empty thought: an
    /// answer that is given as text, and tokenised by itself, lacks it.
    pub fn opens_answers(&self) -> bool {
        self.opens_answers
    }

    /// The text of the token that ends a turn.
    pub fn end_text(&self) -> String {
        let tokenizer = self.encoder.tokenizer();
        tokenizer.id_to_token(self.end_of_turn).unwrap_or_default()
    }

    /// Text of ids without special and end-of-turn tokens; no clean-up of spaces. Bytes that are not UTF-8
    /// (a character cut in two) become U+FFFD; ids that the tokenizer does not know are left out.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        contained(|| self.encoder.decode(ids, &self.end_ids))
    }

    /// The answer in a response, and where in its ids it begins: all of it, or, of a model with channels, what it says in the
    /// template's for answers. (Text cannot show which channel is which: control tokens are left out.)
    pub fn answer(&self, ids: &[u32]) -> Result<(usize, String)> {
        let channel = self.channel.as_slice();
        let opened = ids
            .windows(channel.len().max(1))
            .rposition(|ids| ids == channel);
        let begin = opened.map_or(0, |at| at + channel.len());
        Ok((begin, self.decode(&ids[begin..])?))
    }

    /// The day that the template writes into prompts; none if it writes none.
    pub fn date(&self) -> Option<String> {
        let template = self.template.as_ref()?;
        (template.source().contains("strftime_now")).then(strftime::today)
    }

    /// Whether it is a chat model's: a base model's has no template.
    pub fn has_template(&self) -> bool {
        self.template.is_some()
    }

    /// The first id that both have, and that stands for two different tokens.
    pub fn first_difference(&self, other: &Self) -> Option<(u32, [String; 2])> {
        let token = |chat: &Self, id| chat.encoder.tokenizer().id_to_token(id);
        let both = 0..self.vocab_size().min(other.vocab_size()) as u32;
        both.filter_map(|id| Some((id, [token(self, id)?, token(other, id)?])))
            .find(|(_, [ours, theirs])| ours != theirs)
    }

    /// Rows that a model's embedding must have: for the vocabulary and the end of a turn. (More are usual, padding; tokens that
    /// were added behind the vocabulary may have none, such as that for images of the Gemma 3 that reads none.)
    pub fn least_rows(&self) -> usize {
        let end = self.end_of_turn as usize + 1;
        self.encoder.base_size().max(end)
    }

    /// One more than the largest token id.
    pub fn vocab_size(&self) -> usize {
        self.encoder.vocab_size()
    }
}

/// Compiles a template; where every sequence must begin with BOS and the template does not write it, it will.
fn compile(source: &str, specials: &BTreeMap<String, String>, add_bos: bool) -> Result<Template> {
    let template = Template::new(source, specials)?;
    let Some(bos) = specials.get("bos_token").filter(|_| add_bos) else {
        return Ok(template);
    };
    match template.render(&[turn("user", "Hello")], true) {
        Ok(text) if !text.starts_with(bos) => {
            Template::new(&format!("{{{{ bos_token }}}}{source}"), specials)
        }
        _ => Ok(template),
    }
}

/// A word that no template rewrites.
const SENTINEL: &str = "Sentinel5791";

/// A question and its answer as the template writes them; none where it does not take them.
fn exchange(template: &Template) -> Option<String> {
    let messages = [turn("user", "Hello"), turn("assistant", SENTINEL)];
    template.render(&messages, false).ok()
}

/// The token that follows the content of an assistant's turn.
fn turn_end(exchange: &str, tokenizer: &Tokenizer) -> Option<u32> {
    let after = exchange.rfind(SENTINEL)? + SENTINEL.len();
    encoder::pieces(tokenizer, &exchange[after..])
        .into_iter()
        .find(|(text, _)| !text.trim().is_empty())
        .and_then(|(_, id)| id)
}

/// See [`Chat::opens_answers`].
fn opens_answers(template: &Template, exchange: &str) -> bool {
    let Ok(asked) = template.render(&[turn("user", "Hello")], true) else {
        return false; // it does not take this, which says nothing about it
    };
    // Space is nothing to speak of.
    let answer = exchange.strip_prefix(&asked).map(str::trim_start);
    !answer.is_some_and(|answer| answer.starts_with(SENTINEL))
}

/// See [`Chat`].
fn channel(template: &Template, encoder: &Encoder) -> Result<Vec<u32>> {
    let exchange = [turn("user", "Hello"), turn("assistant", SENTINEL)];
    let opening = opening(template, &exchange, &Map::new()).unwrap_or(None);
    let ids = encoder.rendered(&opening.unwrap_or_default())?;
    let is_channel = ids.iter().any(|&id| encoder.is_control(Some(id)));
    Ok(if is_channel { ids } else { vec![] })
}

/// What a template writes between what it asks for the last message with and the text of that, beside space; see
/// [`Chat::opening_ids`].
fn opening(
    template: &Template,
    messages: &[Map<String, Json>],
    more: &Map<String, Json>,
) -> Result<Option<String>> {
    let (answer, before) = messages.split_last().expect("there is an answer");
    let asked = template.render_with(before, true, more)?;
    let answered = |answer: Map<String, Json>| -> Result<Option<String>> {
        let whole = template.render_with(&[before, &[answer]].concat(), false, more)?;
        Ok(whole.strip_prefix(&asked).map(str::to_owned))
    };
    let Some(usual) = answered(turn("assistant", SENTINEL))? else {
        return Ok(None);
    };
    let opening = usual.find(SENTINEL).map_or("", |at| &usual[..at]);
    let text = answer.get("content").and_then(Json::as_str).unwrap_or("");
    let expected = format!("{opening}{}", text.trim());
    let taken = answered(answer.clone())?.is_some_and(|own| own.starts_with(&expected));
    Ok((taken && !opening.trim().is_empty()).then(|| opening.to_owned()))
}

/// Added tokens that a template writes around the turns of a past exchange: its turn marks. (In a past turn,
/// templates of reasoning models leave out the thinking tokens, which a response may well contain.)
fn turn_tokens(template: &Template, tokenizer: &Tokenizer) -> Vec<u32> {
    let messages = [
        turn("user", "Hello"),
        turn("assistant", SENTINEL),
        turn("user", "Hello"),
    ];
    let rendered = template.render(&messages, false).unwrap_or_default();
    encoder::pieces(tokenizer, &rendered)
        .into_iter()
        .filter(|(text, _)| !text.trim().is_empty())
        .filter_map(|(_, id)| id)
        .collect()
}
