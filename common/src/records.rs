//! What a row is about, whatever stage it passes: the prompt, and the id derived from it.

use anyhow::{Result, bail};
use serde::{Serialize, Serializer};
use serde_json::{Map, Value};

/// A prompt as rows carry it: plain text, or TRL's conversational form.
#[derive(Clone, Debug, PartialEq)]
pub enum Prompt {
    /// One user turn.
    Text(String),
    /// Objects with a string `role` and a string `content` (there may be none where there are `tool_calls`), in order; other keys
    /// are the template's business.
    Messages(Vec<Map<String, Value>>),
}

/// The fields of a row that are about one response to its prompt, as the tools write them.
pub const SAMPLE_FIELDS: [&str; 12] = [
    "sample",
    "response",
    "finish_reason",
    "token_ids",
    "logp",
    "model",
    "dtype",
    "policy_logps",
    "ref_logps",
    "reward",
    "policy",
    "ref",
];

/// A part of a data set. Every prompt lies in one of the first three for good, by its hash: the same in every tool, file and
/// order, so that what chose a setting is never what judges it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Split {
    /// Four prompts of five
    Train,
    /// One of ten, to choose settings by
    Validation,
    /// One of ten, to report
    Test,
    /// All prompts
    All,
}

impl Split {
    /// As flags and manifests have it.
    pub fn name(self) -> String {
        format!("{self:?}").to_lowercase()
    }

    /// Whether a prompt is in this part.
    pub fn holds(self, prompt: &Prompt) -> bool {
        self == Split::All || self == prompt.split()
    }
}

impl Prompt {
    /// Reads the value of a row's `prompt` field. The error says what is wrong, not where: the row knows that.
    pub fn from_value(value: &Value) -> Result<Self> {
        match value {
            Value::String(text) if text.trim().is_empty() => bail!("is empty"),
            Value::String(text) => Ok(Self::Text(text.clone())),
            Value::Array(messages) if messages.is_empty() => bail!("is an empty list of messages"),
            Value::Array(messages) => messages
                .iter()
                .map(message)
                .collect::<Result<_>>()
                .map(Self::Messages),
            _ => bail!("must be a string or a list of {{\"role\", \"content\"}} messages"),
        }
    }

    /// The list of messages that a chat template renders; plain text becomes one user turn.
    pub fn messages(&self) -> Vec<Map<String, Value>> {
        match self {
            Self::Messages(messages) => messages.clone(),
            Self::Text(text) => vec![turn("user", text)],
        }
    }

    /// The prompt with a system turn before it, unless it brings a system (or developer) turn of its own.
    #[must_use]
    pub fn with_system(self, text: &str) -> Self {
        let mut messages = self.messages();
        if messages.iter().any(is_system) {
            return self;
        }
        messages.insert(0, turn("system", text));
        Self::Messages(messages)
    }

    /// Whether it is these messages, whichever form it has.
    pub fn is(&self, messages: &[Value]) -> bool {
        let theirs = Self::from_value(&Value::from(messages));
        theirs.is_ok_and(|theirs| theirs.key() == self.key())
    }

    /// What makes two prompts the same one, whichever form they have: the hash of their messages.
    pub fn key(&self) -> blake3::Hash {
        hash_json(&self.messages())
    }

    /// Which part of a data set the prompt belongs to; never [`Split::All`]. The same with another system turn, or without.
    pub fn split(&self) -> Split {
        let messages = self.messages();
        let is_question = |m: &&Map<String, Value>| !is_system(m);
        let question: Vec<_> = messages.iter().filter(is_question).cloned().collect();
        // The first byte of the hash, as 256ths: 80%, 10%, 10%.
        match hash_json(&question).as_bytes()[0] {
            0..205 => Split::Train,
            205..230 => Split::Validation,
            _ => Split::Test,
        }
    }

    /// A stable id: the first 16 hex digits of the BLAKE3 hash of the text, or of the messages' compact JSON (of each the role,
    /// the content, then other fields by name).
    pub fn derived_id(&self) -> String {
        let hash = match self {
            Self::Text(text) => blake3::hash(text.as_bytes()),
            Self::Messages(messages) => hash_json(messages),
        };
        hash.to_hex()[..16].to_owned()
    }
}

fn is_system(message: &Map<String, Value>) -> bool {
    message
        .get("role")
        .is_some_and(|role| role == "system" || role == "developer")
}

/// A message of a chat.
pub fn turn(role: &str, content: &str) -> Map<String, Value> {
    Map::from_iter([
        ("role".to_owned(), Value::from(role)),
        ("content".to_owned(), Value::from(content)),
    ])
}

/// A message's fields in one order, whatever order they came in, and without those that are null.
struct Ordered<'a>(Vec<(&'a String, &'a Value)>);

impl<'a> Ordered<'a> {
    fn new(message: &'a Map<String, Value>) -> Self {
        let rank = |name: &str| match name {
            "role" => 0,
            "content" => 1,
            _ => 2,
        };
        let mut fields: Vec<_> = message.iter().filter(|(_, v)| !v.is_null()).collect();
        fields.sort_by_key(|&(name, _)| (rank(name), name));
        Self(fields)
    }
}

impl Serialize for Ordered<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().copied())
    }
}

fn hash_json(messages: &[Map<String, Value>]) -> blake3::Hash {
    let ordered: Vec<_> = messages.iter().map(Ordered::new).collect();
    let text = serde_json::to_string(&ordered).expect("JSON values always serialise");
    blake3::hash(text.as_bytes())
}

fn message(value: &Value) -> Result<Map<String, Value>> {
    let Value::Object(message) = value else {
        bail!("holds a message that is not an object")
    };
    if !message.get("role").is_some_and(Value::is_string) {
        bail!("holds a message without a string \"role\"");
    }
    let mut message = message.clone();
    match (text_of(value), message.get("content")) {
        (Some(text), Some(Value::Array(_))) => drop(message.insert("content".into(), text.into())),
        (Some(_), _) => {}
        (None, None | Some(Value::Null)) if calls_tools(value) => {}
        (None, Some(Value::Array(_))) => {
            bail!("holds a message whose \"content\" is more than one part of text")
        }
        (None, _) => bail!("holds a message without a string \"content\""),
    }
    Ok(message)
}

/// A message's text: its `content`, or the only part of that (`[{"type": "text", "text": "…"}]`).
pub fn text_of(message: &Value) -> Option<&str> {
    match message.get("content")? {
        Value::String(text) => Some(text),
        Value::Array(parts) => match &parts[..] {
            [part] if part.get("type")? == "text" => part.get("text")?.as_str(),
            _ => None,
        },
        _ => None,
    }
}

/// Whether a message has tool calls.
pub fn calls_tools(message: &Value) -> bool {
    let calls = message.get("tool_calls").and_then(Value::as_array);
    calls.is_some_and(|calls| !calls.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_prompt_is_the_same_whatever_order_its_messages_fields_have() {
        let of = |message: Value| Prompt::from_value(&json!([message])).unwrap();
        let one = of(json!({"role": "user", "content": "Why?"}));
        let same = of(json!({"content": "Why?", "role": "user", "tool_calls": null}));
        assert_eq!((one.key(), one.split()), (same.key(), same.split()));
        assert_eq!(one.derived_id(), same.derived_id());
        assert_eq!(one.key(), Prompt::Text("Why?".into()).key());
        let other = of(json!({"role": "user", "content": "Why?", "name": "Ada"}));
        assert_ne!(one.key(), other.key());
    }

    #[test]
    fn content_is_a_text_or_one_part_of_text_or_there_are_tool_calls() {
        let of = |message: Value| Prompt::from_value(&json!([message]));
        let part = json!({"type": "text", "text": "Why?"});
        let parts = of(json!({"role": "user", "content": [part]})).unwrap();
        assert_eq!(parts.key(), Prompt::Text("Why?".into()).key());
        let call =
            json!({"role": "assistant", "content": null, "tool_calls": [{"type": "function"}]});
        assert!(of(call).is_ok());
        for (content, wanted) in [
            (json!([part, part]), "more than one part of text"),
            (json!([{"type": "image"}]), "more than one part of text"),
            (json!(null), "without a string \"content\""),
        ] {
            let message = of(json!({"role": "user", "content": content})).unwrap_err();
            assert!(message.to_string().contains(wanted), "{message}");
        }
    }

    #[test]
    fn splits_are_stable_and_of_their_sizes() {
        let prompt = |text: String| Prompt::Text(text);
        let mut counts = [0_u32; 3];
        for i in 0..10_000 {
            let split = prompt(format!("prompt {i}")).split();
            counts[split as usize] += 1;
            assert!(Split::All.holds(&prompt(format!("prompt {i}"))));
        }
        assert!(counts[0].abs_diff(8_000) < 200, "{counts:?}");
        assert!(counts[1].abs_diff(1_000) < 120, "{counts:?}");
        // Pinned: a change would leak yesterday's training prompts into tomorrow's test.
        let names = ["a", "b", "c", "d", "e", "f", "g", "h"];
        let splits = names.map(|name| prompt(name.into()).split());
        use Split::{Test, Train};
        assert_eq!(
            splits,
            [Train, Train, Train, Train, Train, Train, Test, Train]
        );
        // Both forms of a prompt are the same prompt.
        let messages = Prompt::Messages(prompt("a".into()).messages());
        assert_eq!(messages.split(), prompt("a".into()).split());
        // Told to answer otherwise, it is the same question.
        for name in names {
            let told = prompt(name.into()).with_system("be brief");
            assert_eq!(told.split(), prompt(name.into()).split());
        }
    }

    #[test]
    fn text_and_messages_are_read_and_bad_prompts_refused() {
        assert_eq!(
            Prompt::from_value(&json!("hi")).unwrap(),
            Prompt::Text("hi".into())
        );
        let chat = Prompt::from_value(&json!([{"role": "user", "content": "hi"}])).unwrap();
        assert_eq!(chat.messages(), Prompt::Text("hi".into()).messages());
        for bad in [
            json!(""),
            json!(" \n"),
            json!([]),
            json!(3),
            json!([{"role": "user"}]),
            json!(["hi"]),
        ] {
            assert!(Prompt::from_value(&bad).is_err(), "{bad} should be refused");
        }
    }

    #[test]
    fn a_system_turn_is_added_unless_there_is_one() {
        let added = Prompt::Text("hi".into()).with_system("be brief");
        assert_eq!(
            added.messages(),
            [turn("system", "be brief"), turn("user", "hi")]
        );
        assert_eq!(added.clone().with_system("other"), added);
        let own = Prompt::Messages(vec![turn("user", "hi"), turn("developer", "be kind")]);
        assert_eq!(own.clone().with_system("other"), own);
    }

    #[test]
    fn a_prompt_is_the_same_in_both_forms() {
        let text = Prompt::Text("hi".into());
        assert_eq!(text.key(), Prompt::Messages(text.messages()).key());
        assert_ne!(text.key(), Prompt::Text("ho".into()).key());
    }

    #[test]
    fn ids_depend_on_the_prompt_alone() {
        let id = Prompt::Text("hi".into()).derived_id();
        assert_eq!(id.len(), 16);
        assert_eq!(id, Prompt::Text("hi".into()).derived_id());
        assert_ne!(id, Prompt::Text("ho".into()).derived_id());
    }
}
