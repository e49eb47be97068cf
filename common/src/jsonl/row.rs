//! One row, where it stands, and typed access to its fields with errors that say both.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use anyhow::{Result, anyhow};
use serde_json::{Map, Value};

use crate::records::{Prompt, calls_tools, text_of};

/// Where a row was read; shown as `FILE:LINE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The file as the user named it; `stdin` for standard input.
    pub file: Arc<str>,
    /// From 1; blank lines count.
    pub line: u64,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file, self.line)
    }
}

/// A JSON object with its place.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    pub fields: Map<String, Value>,
    pub place: Place,
}

/// How a response ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// With an end-of-turn token or a stop text, or unknown: the row does not say.
    Stop,
    /// Cut at the limit on tokens or at the end of the context; no end-of-turn token.
    Length,
}

impl FinishReason {
    /// The value of the `finish_reason` field.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

const NO_RESPONSE: &str =
    "must be a string, or a list of messages that ends with an assistant's text";
const OTHER_TURNS: &str = "has other turns before its answer than the prompt (leave \"prompt\" out where \"chosen\" holds it)";

impl Row {
    /// The `prompt` field: a non-empty string or list of messages. A pair row without it may hold it in `chosen`: the messages
    /// before the answer (TRL's implicit prompt).
    pub fn prompt(&self) -> Result<Prompt> {
        match (self.present("prompt"), self.present("chosen")) {
            (None, Some(Value::Array(messages))) => {
                let (before, _) = self.conversation("chosen", messages)?;
                if before.is_empty() {
                    return Err(self.error("prompt", "is missing, and \"chosen\" does not hold it"));
                }
                Prompt::from_value(&Value::from(before)).map_err(|e| self.error("chosen", e))
            }
            _ => Prompt::from_value(self.required("prompt")?).map_err(|e| self.error("prompt", e)),
        }
    }

    /// The prompt as a row of its own has it: the field as it is, or the messages before the answer of "chosen".
    pub fn prompt_value(&self) -> Result<Value> {
        match self.present("prompt") {
            Some(value) => Ok(value.clone()),
            None => Ok(Value::from_iter(self.prompt()?.messages())),
        }
    }

    /// What the row gives the chat template besides the prompt: `tools`, and the fields of `chat_template_kwargs`.
    pub fn template_variables(&self) -> Result<Map<String, Value>> {
        let mut found = match self.fields.get("chat_template_kwargs") {
            None | Some(Value::Null) => Map::new(),
            Some(Value::Object(given)) => given.clone(),
            Some(_) => return Err(self.error("chat_template_kwargs", "must be an object")),
        };
        // Data sets that are tables keep tools as JSON in a string, as TRL reads it, too.
        let tools = self.present("tools").map(|tools| match tools.as_str() {
            Some(text) => serde_json::from_str(text).unwrap_or(Value::Null),
            None => tools.clone(),
        });
        match tools {
            None => {}
            Some(tools @ Value::Array(_)) => drop(found.insert("tools".to_owned(), tools)),
            Some(_) => return Err(self.error("tools", "must be a list")),
        }
        Ok(found)
    }

    /// What makes two rows' prompts the same one: the messages, and what else the template is given.
    pub fn prompt_key(&self) -> Result<blake3::Hash> {
        let key = self.prompt()?.key();
        let more: BTreeMap<_, _> = self.template_variables()?.into_iter().collect();
        Ok(match more.is_empty() {
            true => key,
            false => blake3::hash(format!("{key}{}", serde_json::json!(more)).as_bytes()),
        })
    }

    /// A response: a string, or a list of messages that ends with the assistant's (TRL's conversational form), before which
    /// there may be the prompt's once more, and no others.
    pub fn response(&self, field: &str) -> Result<&str> {
        match self.required(field)? {
            Value::String(text) => Ok(text),
            Value::Array(messages) => {
                let (before, answer) = self.conversation(field, messages)?;
                if !before.is_empty() && !self.prompt()?.is(before) {
                    return Err(self.error(field, OTHER_TURNS));
                }
                Ok(answer)
            }
            _ => Err(self.error(field, NO_RESPONSE)),
        }
    }

    /// The messages before the last, and its text, if it is the assistant's.
    fn conversation<'a>(
        &self,
        field: &str,
        messages: &'a [Value],
    ) -> Result<(&'a [Value], &'a str)> {
        let is_answer = |m: &&Value| m.get("role").and_then(Value::as_str) == Some("assistant");
        let (answer, before) = (messages.split_last())
            .filter(|(last, _)| is_answer(last))
            .ok_or_else(|| self.error(field, NO_RESPONSE))?;
        // Trained without them, the model would learn to say less than the row has.
        let more = ["reasoning_content", "reasoning", "thinking"];
        let has = |name: &&str| answer.get(*name).is_some_and(|m| !m.is_null() && m != "");
        let more = more.iter().copied().find(has);
        if let Some(name) = more.or(calls_tools(answer).then_some("tool_calls")) {
            let message = format!(
                "has an answer with {name:?}: answers are text alone; write into it what the model is to say"
            );
            return Err(self.error(field, message));
        }
        let text = text_of(answer).ok_or_else(|| self.error(field, NO_RESPONSE))?;
        Ok((before, text))
    }

    /// The `id` field (a string, or a number as written); without one, derived from the prompt's text.
    pub fn id(&self) -> Result<String> {
        match self.present("id") {
            Some(Value::String(id)) if !id.is_empty() => Ok(id.clone()),
            Some(Value::Number(id)) => Ok(id.to_string()),
            Some(_) => Err(self.error("id", "must be a non-empty string or a number")),
            None => Ok(self.prompt()?.derived_id()),
        }
    }

    /// The id as a row of its own has it: as it is there, or derived.
    pub fn id_value(&self) -> Result<Value> {
        let derived = self.id()?;
        Ok(self.present("id").cloned().unwrap_or(derived.into()))
    }

    /// A field that must be a string.
    pub fn string(&self, field: &str) -> Result<&str> {
        self.required(field)?
            .as_str()
            .ok_or_else(|| self.error(field, "must be a string"))
    }

    /// A field that may be absent or null, else must be a string.
    pub fn opt_string(&self, field: &str) -> Result<Option<&str>> {
        self.present(field).map(|_| self.string(field)).transpose()
    }

    /// A field that must be a finite number.
    pub fn number(&self, field: &str) -> Result<f64> {
        self.required(field)?
            .as_f64()
            .filter(|number| number.is_finite())
            .ok_or_else(|| self.error(field, "must be a finite number"))
    }

    /// A field that may be absent or null, else must be a finite number.
    pub fn opt_number(&self, field: &str) -> Result<Option<f64>> {
        self.present(field).map(|_| self.number(field)).transpose()
    }

    /// A list of token ids that may be absent or null.
    pub fn opt_ids(&self, field: &str) -> Result<Option<Vec<u32>>> {
        let Some(value) = self.present(field) else {
            return Ok(None);
        };
        let wrong = || self.error(field, "must be a list of token ids");
        let ids = value.as_array().ok_or_else(wrong)?;
        ids.iter()
            .map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok()))
            .collect::<Option<_>>()
            .map(Some)
            .ok_or_else(wrong)
    }

    /// A finish reason (`finish_reason`, or with a pair's prefix); absent counts as `stop`.
    pub fn finish_reason(&self, field: &str) -> Result<FinishReason> {
        match self.opt_string(field)? {
            None | Some("stop") => Ok(FinishReason::Stop),
            Some("length") => Ok(FinishReason::Length),
            Some(other) => Err(self.error(
                field,
                format_args!("must be \"stop\" or \"length\", not {other:?}: drop such rows"),
            )),
        }
    }

    /// An error about this row: `FILE:LINE: field "x" message`.
    pub fn error(&self, field: &str, message: impl fmt::Display) -> anyhow::Error {
        anyhow!("{}: field \"{field}\" {message}", self.place)
    }

    fn required(&self, field: &str) -> Result<&Value> {
        self.fields
            .get(field)
            .ok_or_else(|| self.error(field, "is missing"))
    }

    /// A field that is there: `null` is how many writers say "none".
    pub fn present(&self, field: &str) -> Option<&Value> {
        self.fields.get(field).filter(|value| !value.is_null())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn row(value: Value) -> Row {
        let Value::Object(fields) = value else {
            panic!("not an object: {value}")
        };
        let file = "in.jsonl".into();
        Row {
            fields,
            place: Place { file, line: 7 },
        }
    }

    fn message<T: fmt::Debug>(result: Result<T>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn errors_name_file_line_and_field() {
        let bad = row(json!({
            "prompt": "", "id": true, "response": 3, "reward": "x", "token_ids": [1, -1],
            "finish_reason": "abort", "huge": [4294967296u64],
        }));
        let at = |rest: &str| format!("in.jsonl:7: field {rest}");
        assert_eq!(message(bad.prompt()), at("\"prompt\" is empty"));
        assert_eq!(
            message(bad.id()),
            at("\"id\" must be a non-empty string or a number")
        );
        assert_eq!(
            message(bad.string("response")),
            at("\"response\" must be a string")
        );
        assert_eq!(
            message(bad.opt_string("response")),
            at("\"response\" must be a string")
        );
        assert_eq!(message(bad.string("gone")), at("\"gone\" is missing"));
        assert_eq!(
            message(bad.number("reward")),
            at("\"reward\" must be a finite number")
        );
        assert_eq!(
            message(bad.opt_number("reward")),
            at("\"reward\" must be a finite number")
        );
        assert_eq!(message(bad.number("gone")), at("\"gone\" is missing"));
        for field in ["token_ids", "huge", "response"] {
            let expected = at(&format!("\"{field}\" must be a list of token ids"));
            assert_eq!(message(bad.opt_ids(field)), expected);
        }
        assert_eq!(
            message(bad.finish_reason("finish_reason")),
            at("\"finish_reason\" must be \"stop\" or \"length\", not \"abort\": drop such rows")
        );
        assert_eq!(message(row(json!({})).id()), at("\"prompt\" is missing"));
    }

    #[test]
    fn conversations_hold_the_response_and_perhaps_the_prompt() {
        let turn = |role: &str, content: &str| json!({"role": role, "content": content});
        let question = [turn("user", "q"), turn("assistant", "a"), turn("user", "r")];
        let mut whole = question.to_vec();
        whole.push(turn("assistant", "good"));
        let pair = row(json!({"chosen": whole, "rejected": [turn("assistant", "bad")]}));
        assert_eq!(pair.response("chosen").unwrap(), "good");
        assert_eq!(pair.response("rejected").unwrap(), "bad");
        let prompt = pair.prompt().unwrap();
        assert_eq!(prompt, Prompt::from_value(&json!(question)).unwrap());
        assert_eq!(pair.id().unwrap(), prompt.derived_id());
        let null = row(json!({"prompt": null, "chosen": whole}));
        assert_eq!(null.prompt().unwrap(), prompt);
        assert_eq!(null.prompt_value().unwrap(), json!(question));
        let explicit = row(json!({"prompt": "p", "chosen": whole}));
        assert_eq!(explicit.prompt().unwrap(), Prompt::Text("p".into()));

        // Both answer the same prompt, or neither is taken.
        assert!(explicit.response("chosen").is_err());
        let text = row(
            json!({"prompt": "r", "chosen": [turn("user", "r"), turn("assistant", "b")],
            "rejected": [turn("user", "s"), turn("assistant", "c")]}),
        );
        assert_eq!(text.response("chosen").unwrap(), "b");
        assert_eq!(
            message(text.response("rejected")),
            format!("in.jsonl:7: field \"rejected\" {OTHER_TURNS}")
        );
        for (more, value) in [
            ("tool_calls", json!([{"function": {}}])),
            ("reasoning_content", json!("so")),
        ] {
            let mut answer = turn("assistant", "b");
            answer[more] = value;
            let pair = row(json!({"prompt": "r", "chosen": [answer]}));
            assert!(message(pair.response("chosen")).contains(more));
            let mut answer = turn("assistant", "b");
            answer[more] = json!("");
            let pair = row(json!({"prompt": "r", "chosen": [answer]}));
            assert_eq!(pair.response("chosen").unwrap(), "b");
        }
        let goes_on =
            row(json!({"prompt": "r", "chosen": [turn("assistant", "a"), turn("user", "?")]}));
        assert!(message(goes_on.response("chosen")).ends_with(NO_RESPONSE));

        let bare = row(json!({"chosen": [turn("assistant", "a")], "response": 3, "rejected": []}));
        let at = |rest: &str| format!("in.jsonl:7: field {rest}");
        assert_eq!(
            message(bare.prompt()),
            at("\"prompt\" is missing, and \"chosen\" does not hold it")
        );
        assert_eq!(
            message(bare.response("response")),
            at(&format!("\"response\" {NO_RESPONSE}"))
        );
        assert_eq!(
            message(bare.response("rejected")),
            at(&format!("\"rejected\" {NO_RESPONSE}"))
        );
    }

    #[test]
    fn absent_and_null_are_the_same_where_a_field_is_optional() {
        for empty in [json!({}), json!({"f": null})] {
            let row = row(empty);
            assert_eq!(row.opt_string("f").unwrap(), None);
            assert_eq!(row.opt_number("f").unwrap(), None);
            assert_eq!(row.opt_ids("f").unwrap(), None);
            assert_eq!(row.finish_reason("f").unwrap(), FinishReason::Stop);
        }
    }

    #[test]
    fn fields_are_read_with_their_types() {
        let row = row(json!({
            "prompt": "hi", "id": 12, "reward": -3, "token_ids": [0, 4294967295u32],
            "finish_reason": "length", "s": "",
        }));
        assert_eq!(row.id().unwrap(), "12");
        assert_eq!(row.number("reward").unwrap(), -3.0);
        assert_eq!(row.opt_ids("token_ids").unwrap().unwrap(), [0, u32::MAX]);
        assert_eq!(
            row.finish_reason("finish_reason").unwrap(),
            FinishReason::Length
        );
        assert_eq!(row.string("s").unwrap(), "");
        let unnamed = super::tests::row(json!({"prompt": "hi"}));
        assert_eq!(
            unnamed.id().unwrap(),
            unnamed.prompt().unwrap().derived_id()
        );
    }
}
