//! Text to ids and back, with the line drawn between what the template wrote and what a row's text says.
//!
//! A control token (`<|im_end|>`) is one id when the template writes it and ordinary text when it stands in
//! a prompt or a response: no row can forge a turn.

use std::collections::HashSet;

use anyhow::{Result, anyhow, bail};
use serde_json::{Map, Value as Json};
use tokenizers::normalizer::Range;
use tokenizers::{
    AddedToken, Encoding, Model, NormalizedString, Normalizer, NormalizerWrapper,
    OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, Token, Tokenizer,
};

/// First of the private-use characters that stand for control tokens while a template renders.
const FIRST_STAND_IN: u32 = 0xF_0000;
/// Last character of that plane that may be assigned.
const LAST_STAND_IN: u32 = 0xF_FFFD;

/// A tokenizer twice: with control tokens as ids, and with the same tokens as plain text.
pub struct Encoder {
    full: Tokenizer,
    plain: Tokenizer,
    controls: HashSet<u32>,
    vocab_size: usize,
    base_size: usize,
}

/// A piece of text, and the added token that it is, if it is one.
type Piece = (String, Option<u32>);

impl Encoder {
    /// `extra` are ids of added tokens that mark turns although the tokenizer does not call them special.
    pub fn new(full: Tokenizer, extra: &[u32]) -> Result<Self> {
        let added = full.get_added_tokens_decoder();
        let controls: HashSet<u32> = added
            .iter()
            .filter(|(id, token)| token.special || extra.contains(id))
            .map(|(id, _)| *id)
            .collect();
        let mut plain = full.clone();
        plain
            .add_special_tokens(added.iter().filter(|(id, _)| controls.contains(id)).map(
                |(_, token)| AddedToken {
                    special: true,
                    ..token.clone()
                },
            ))
            .map_err(tokenizer_error)?;
        plain.set_encode_special_tokens(true);
        // Added tokens that are no part of the vocabulary proper: few, where that is large.
        let model = full.get_model();
        let beyond = added
            .iter()
            .filter(|(_, token)| model.token_to_id(&token.content).is_none());
        let beyond: HashSet<u32> = beyond.map(|(id, _)| *id).collect();
        let (mut vocab_size, mut base_size) = (0, 0);
        for id in full.get_vocab(true).into_values() {
            vocab_size = vocab_size.max(id as usize + 1);
            if !beyond.contains(&id) {
                base_size = base_size.max(id as usize + 1);
            }
        }
        Ok(Self {
            full,
            plain,
            controls,
            vocab_size,
            base_size,
        })
    }

    pub fn tokenizer(&self) -> &Tokenizer {
        &self.full
    }

    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The same of the vocabulary without added tokens.
    pub fn base_size(&self) -> usize {
        self.base_size
    }

    /// Ids of a string that the template alone wrote: control tokens are ids, nothing is put before or after.
    pub fn rendered(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self
            .full
            .encode_fast(text, false)
            .map_err(tokenizer_error)?
            .get_ids()
            .to_vec())
    }

    /// Ids of a text without any control token in it.
    pub fn text(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self
            .plain
            .encode_fast(text, false)
            .map_err(tokenizer_error)?;
        self.without_controls(encoding, 0)
    }

    /// Ids of a text as the start of a document: what the tokenizer's post-processor adds (BOS) is added.
    pub fn document(&self, text: &str) -> Result<Vec<u32>> {
        self.text(text)?;
        let encoding = self
            .plain
            .encode_fast(text, true)
            .map_err(tokenizer_error)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of ids; special tokens and `dropped` are left out, spaces stay as they are.
    pub fn decode(&self, ids: &[u32], dropped: &[u32]) -> Result<String> {
        let kept: Vec<u32> = ids
            .iter()
            .copied()
            .filter(|id| !dropped.contains(id))
            .collect();
        self.full.decode(&kept, true).map_err(tokenizer_error)
    }

    /// Splits a text at its added tokens, as the tokenizer does before anything else.
    pub fn pieces(&self, text: &str) -> Vec<Piece> {
        pieces(&self.full, text)
    }

    /// What a row gives the template, with control tokens in its texts replaced by stand-ins; none if there is nothing to
    /// replace, which is nearly always.
    pub fn guard(
        &self,
        messages: &[Map<String, Json>],
        more: &Map<String, Json>,
    ) -> Result<Option<Guarded>> {
        let mut taken = HashSet::new();
        let mut found = false;
        for map in messages.iter().chain([more]) {
            self.inspect_map(map, &mut taken, &mut found);
        }
        if !found {
            return Ok(None);
        }
        let mut stand_ins = StandIns {
            taken,
            next: FIRST_STAND_IN,
            pairs: Vec::new(),
        };
        let mut replaced = |map| self.replace_map(map, &mut stand_ins);
        Ok(Some(Guarded {
            messages: messages.iter().map(&mut replaced).collect::<Result<_>>()?,
            more: replaced(more)?,
            pairs: stand_ins.pairs,
        }))
    }

    /// Ids of a rendered conversation whose stand-ins become text again.
    pub fn guarded(&self, rendered: &str, guarded: &Guarded) -> Result<Vec<u32>> {
        let mut text = String::new();
        let mut ranges = Vec::new();
        for (piece, id) in self.pieces(rendered) {
            let start = text.len();
            for c in piece.chars() {
                match guarded.pairs.iter().find(|(stand_in, _)| *stand_in == c) {
                    Some((_, original)) => text.push_str(original),
                    None => text.push(c),
                }
            }
            ranges.push((start..text.len(), id));
        }
        let written = ranges
            .iter()
            .filter(|(_, id)| id.is_some_and(|id| self.controls.contains(&id)))
            .count();
        let encoding = self
            .encode_ranges(&text, &ranges)
            .map_err(tokenizer_error)?;
        self.without_controls(encoding, written)
    }

    /// What `Tokenizer::encode` does after it found the added tokens, with those of `ranges` instead.
    fn encode_ranges(
        &self,
        text: &str,
        ranges: &[(std::ops::Range<usize>, Option<u32>)],
    ) -> tokenizers::Result<Encoding> {
        let mut split = PreTokenizedString::from(text);
        split.split(|_, whole| {
            ranges
                .iter()
                .map(|(range, id)| {
                    let slice = whole
                        .slice(Range::Original(range.clone()))
                        .ok_or("a rendered piece does not fall on character boundaries")?;
                    let token =
                        id.map(|id| vec![Token::new(id, slice.get().to_owned(), (0, range.len()))]);
                    Ok((slice, token))
                })
                .collect::<tokenizers::Result<Vec<(NormalizedString, Option<Vec<Token>>)>>>()
        })?;
        if let Some(normalizer) = self.full.get_normalizer() {
            split.normalize(|piece| normalizer.normalize(piece))?;
        }
        if let Some(pre_tokenizer) = self.full.get_pre_tokenizer() {
            pre_tokenizer.pre_tokenize(&mut split)?;
        }
        split.tokenize(|piece| self.full.get_model().tokenize(piece.get()))?;
        split.into_encoding(None, 0, OffsetType::None)
    }

    /// The ids, unless the model of the tokenizer made more control tokens than the `written` ones.
    fn without_controls(&self, encoding: Encoding, written: usize) -> Result<Vec<u32>> {
        let ids = encoding.get_ids().to_vec();
        let made = ids.iter().filter(|id| self.controls.contains(id));
        if made.clone().count() > written {
            let token = made
                .last()
                .and_then(|id| self.full.id_to_token(*id))
                .unwrap_or_default();
            bail!(
                "the tokenizer turns plain text into the control token {token:?}: take it out of the text"
            );
        }
        Ok(ids)
    }

    fn inspect(&self, value: &Json, taken: &mut HashSet<char>, found: &mut bool) {
        match value {
            Json::String(text) => self.inspect_text(text, taken, found),
            Json::Array(items) => {
                items
                    .iter()
                    .for_each(|item| self.inspect(item, taken, found));
            }
            Json::Object(map) => self.inspect_map(map, taken, found),
            _ => {}
        }
    }

    fn inspect_map(&self, map: &Map<String, Json>, taken: &mut HashSet<char>, found: &mut bool) {
        for (key, item) in map {
            self.inspect_text(key, taken, found);
            self.inspect(item, taken, found);
        }
    }

    fn inspect_text(&self, text: &str, taken: &mut HashSet<char>, found: &mut bool) {
        *found |= self.pieces(text).iter().any(|(_, id)| self.is_control(*id));
        taken.extend(text.chars().filter(|c| *c as u32 >= FIRST_STAND_IN));
    }

    fn replace(&self, value: &Json, stand_ins: &mut StandIns) -> Result<Json> {
        Ok(match value {
            Json::String(text) => self.replace_text(text, stand_ins)?.into(),
            Json::Array(items) => items
                .iter()
                .map(|item| self.replace(item, stand_ins))
                .collect::<Result<Vec<_>>>()?
                .into(),
            Json::Object(map) => self.replace_map(map, stand_ins)?.into(),
            other => other.clone(),
        })
    }

    /// Keys, too: a template may write the names of a tool's parameters.
    fn replace_map(
        &self,
        map: &Map<String, Json>,
        stand_ins: &mut StandIns,
    ) -> Result<Map<String, Json>> {
        map.iter()
            .map(|(key, item)| {
                let key = self.replace_text(key, stand_ins)?;
                Ok((key, self.replace(item, stand_ins)?))
            })
            .collect()
    }

    fn replace_text(&self, text: &str, stand_ins: &mut StandIns) -> Result<String> {
        let mut out = String::new();
        for (piece, id) in self.pieces(text) {
            if self.is_control(id) {
                out.push(stand_ins.of(piece)?);
            } else {
                out.push_str(&piece);
            }
        }
        Ok(out)
    }

    /// Whether a piece is a control token.
    pub fn is_control(&self, id: Option<u32>) -> bool {
        id.is_some_and(|id| self.controls.contains(&id))
    }
}

/// Messages and other variables safe to render, and what each stand-in character means.
pub struct Guarded {
    pub messages: Vec<Map<String, Json>>,
    pub more: Map<String, Json>,
    pairs: Vec<(char, String)>,
}

/// Hands out private-use characters that occur nowhere in the messages.
struct StandIns {
    taken: HashSet<char>,
    next: u32,
    pairs: Vec<(char, String)>,
}

impl StandIns {
    fn of(&mut self, text: String) -> Result<char> {
        if let Some((stand_in, _)) = self.pairs.iter().find(|(_, known)| *known == text) {
            return Ok(*stand_in);
        }
        while self.next <= LAST_STAND_IN {
            let candidate = char::from_u32(self.next).filter(|c| !self.taken.contains(c));
            self.next += 1;
            if let Some(stand_in) = candidate {
                self.pairs.push((stand_in, text));
                return Ok(stand_in);
            }
        }
        bail!("the prompt uses every private-use character and control tokens too")
    }
}

/// Splits a text at the tokenizer's added tokens.
pub fn pieces(tokenizer: &Tokenizer, text: &str) -> Vec<Piece> {
    tokenizer
        .get_added_vocabulary()
        .extract_and_normalize(None::<&NormalizerWrapper>, text)
        .get_splits(OffsetReferential::Original, OffsetType::Byte)
        .into_iter()
        .map(|(slice, _, tokens)| {
            let id = tokens
                .as_ref()
                .and_then(|tokens| tokens.first())
                .map(|token| token.id);
            (slice.to_owned(), id)
        })
        .collect()
}

/// The tokenizers crate's boxed error, as ours.
pub fn tokenizer_error(error: tokenizers::Error) -> anyhow::Error {
    anyhow!("tokenizer: {error}")
}
