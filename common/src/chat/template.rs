//! The chat template: messages in, one string out, with the semantics of Hugging Face's Jinja environment.
//!
//! A template comes with a downloaded model, so it is untrusted: it cannot reach files, its work is
//! bounded by fuel, its output by a byte limit, and whatever goes wrong in it ends in one line.

use std::collections::BTreeMap;
use std::fmt;
use std::io;

use anyhow::{Result, anyhow, bail};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, Serde};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, UndefinedBehavior, Value};
use serde_json::{Map, Value as Json};

use super::strftime::strftime_now;

/// Largest template that is compiled, in bytes. The longest in use are about 20 kB.
const MAX_SOURCE: usize = 1 << 20;
/// Engine steps that a render may take whatever its input; a long conversation needs some ten thousand.
const BASE_FUEL: u64 = 2_000_000;
/// Bytes that a render may write whatever its input.
const BASE_OUTPUT: usize = 1 << 20;
/// What a render may write, and the steps it may take, for each byte of its messages.
const PER_BYTE: usize = 16;
/// An error message of a template is cut at this many characters.
const MAX_MESSAGE: usize = 300;

const NAME: &str = "chat_template";

/// A compiled chat template.
pub struct Template {
    environment: Environment<'static>,
    source: String,
}

impl Template {
    /// Compiles a template; `specials` are the variables that HF passes to it (`bos_token`, `eos_token`, …).
    pub fn new(source: &str, specials: &BTreeMap<String, String>) -> Result<Self> {
        if source.len() > MAX_SOURCE {
            bail!(
                "the chat template has {} bytes, more than the {MAX_SOURCE} that are accepted",
                source.len()
            );
        }
        // As Jinja reads lines.
        let source = &source.replace("\r\n", "\n").replace('\r', "\n");
        let mut environment = Environment::new();
        environment.set_syntax(
            SyntaxConfig::builder()
                .trim_blocks(true)
                .lstrip_blocks(true)
                .build()
                .map_err(|error| anyhow!("{}", one_line(&error.to_string())))?,
        );
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_unknown_method_callback(python_method);
        environment.add_filter("tojson", to_json);
        environment.add_test("sequence", is_sequence);
        environment.add_test("iterable", is_iterable);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        for (name, text) in specials {
            environment.add_global(name.clone(), text.clone());
        }
        environment
            .add_template_owned(NAME, without_generation_tags(source))
            .map_err(|error| describe("does not compile", &error))?;
        Ok(Self {
            environment,
            source: source.to_owned(),
        })
    }

    /// The template as the model came with it.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Renders a conversation. Fails, in one line, when the template raises, errs, or exceeds its bounds.
    pub fn render(
        &self,
        messages: &[Map<String, Json>],
        add_generation_prompt: bool,
    ) -> Result<String> {
        self.render_with(messages, add_generation_prompt, &Map::new())
    }

    /// The same with more variables, such as `tools` or `enable_thinking`.
    pub fn render_with(
        &self,
        messages: &[Map<String, Json>],
        add_generation_prompt: bool,
        more: &Map<String, Json>,
    ) -> Result<String> {
        let values = messages.iter().flat_map(|message| message.values());
        let size: usize = values.chain(more.values()).map(text_bytes).sum();
        let extra = size.saturating_mul(PER_BYTE);
        // Fuel is the environment's, so a render with a large input works on its own copy of it.
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(BASE_FUEL.saturating_add(extra as u64)));
        let mut output = Bounded {
            bytes: Vec::new(),
            limit: BASE_OUTPUT.saturating_add(extra),
        };
        // Absent, these two are none, not undefined.
        let given = |name: &str| {
            more.get(name)
                .map_or(Value::from(()), |v| Value::from(Serde(v)))
        };
        let context = minijinja::context! {
            messages => Value::from(Serde(messages)),
            tools => given("tools"),
            documents => given("documents"),
            add_generation_prompt => add_generation_prompt,
            ..Value::from(Serde(more))
        };
        let result = environment.get_template(NAME).and_then(|template| {
            template
                .render_captured_to(context, &mut output)
                .map(|_| ())
        });
        match result {
            Ok(()) => Ok(String::from_utf8(output.bytes)?),
            Err(error) => Err(explain(&error)),
        }
    }
}

/// What Jinja takes for a sequence: whatever has a length and elements, texts and mappings too.
fn is_sequence(value: &Value) -> bool {
    use minijinja::value::ValueKind::{Map, Seq, String};
    matches!(value.kind(), Map | Seq | String)
}

/// What Jinja can go through: none is not of it.
fn is_iterable(value: &Value) -> bool {
    !value.is_none() && value.try_iter().is_ok()
}

/// Total length of the texts inside a JSON value.
fn text_bytes(value: &Json) -> usize {
    match value {
        Json::String(text) => text.len(),
        Json::Array(items) => items.iter().map(text_bytes).sum(),
        Json::Object(map) => map
            .iter()
            .map(|(key, item)| key.len() + text_bytes(item))
            .sum(),
        _ => 8,
    }
}

/// A buffer that refuses to grow past its limit.
struct Bounded {
    bytes: Vec<u8>,
    limit: usize,
}

impl io::Write for Bounded {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + data.len() > self.limit {
            return Err(io::Error::other(TooLong));
        }
        self.bytes.extend_from_slice(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Marks the error of a template that writes without end.
#[derive(Debug)]
struct TooLong;

impl fmt::Display for TooLong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the output is too long")
    }
}

impl std::error::Error for TooLong {}

/// Marks an error that the template raised itself.
#[derive(Debug)]
struct Raised(String);

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

fn raise_exception(message: &str) -> std::result::Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, "raise_exception")
        .with_source(Raised(message.to_owned())))
}

fn explain(error: &Error) -> anyhow::Error {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(cause) = source {
        if let Some(Raised(message)) = cause.downcast_ref::<Raised>() {
            return anyhow!(
                "the chat template refuses the prompt: {}",
                one_line(message)
            );
        }
        if let Some(cause) = cause.downcast_ref::<Error>()
            && cause.kind() == ErrorKind::OutOfFuel
        {
            return anyhow!(
                "the chat template does not end: it was stopped after its budget of steps"
            );
        }
        if let Some(cause) = cause.downcast_ref::<io::Error>()
            && cause.get_ref().is_some_and(|inner| inner.is::<TooLong>())
        {
            return anyhow!(
                "the chat template does not end: it was stopped after its budget of output"
            );
        }
        source = cause.source();
    }
    describe("fails", error)
}

fn describe(what: &str, error: &Error) -> anyhow::Error {
    let line = error
        .line()
        .map_or(String::new(), |line| format!(" at line {line}"));
    let detail = error
        .detail()
        .map_or(String::new(), |detail| format!(": {detail}"));
    anyhow!(
        "the chat template {what}{line}: {}",
        one_line(&format!("{}{detail}", error.kind()))
    )
}

/// A message of unknown origin as one printable line of bounded length.
fn one_line(text: &str) -> String {
    let printable: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(MAX_MESSAGE)
        .collect();
    printable.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// `{% generation %}` marks what training masks keep; it prints its body, so it becomes a plain `if`.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        out.push_str(&rest[..start]);
        rest = &rest[start..];
        // After the opening: the two of `{%}` share a character.
        let Some(end) = rest[2..].find("%}").map(|end| end + 2) else {
            break;
        };
        let tag = &rest[..end + 2];
        out.push_str(&match tag[2..end].trim_matches(['-', '+']).trim() {
            "generation" => tag.replacen("generation", "if true", 1),
            "endgeneration" => tag.replacen("endgeneration", "endif", 1),
            _ => tag.to_owned(),
        });
        rest = &rest[end + 2..];
    }
    out.push_str(rest);
    out
}

/// Methods of Python's types that templates call, beyond those of minijinja-contrib.
fn python_method(
    state: &mut State,
    value: &Value,
    method: &str,
    args: &[Value],
) -> std::result::Result<Value, Error> {
    if let (Some(text), "title", []) = (value.as_str(), method, args) {
        return Ok(title(text).into());
    }
    if let (Some(text), [argument]) = (value.as_str(), args)
        && let Some(part) = argument.as_str()
    {
        match method {
            "removeprefix" => return Ok(text.strip_prefix(part).unwrap_or(text).into()),
            "removesuffix" => return Ok(text.strip_suffix(part).unwrap_or(text).into()),
            _ => {}
        }
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args)
}

/// Python's `str.title`: a letter after anything but a letter is upper case, every other is lower case.
fn title(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut inside = false;
    for c in text.chars() {
        if inside {
            out.extend(c.to_lowercase());
        } else {
            out.extend(c.to_uppercase());
        }
        inside = c.is_alphabetic();
    }
    out
}

/// HF's `tojson` is Python's `json.dumps` with `ensure_ascii=False`: no HTML escapes, a space after separators.
fn to_json(
    value: &Value,
    args: Rest<Value>,
    options: Kwargs,
) -> std::result::Result<String, Error> {
    let invalid = |message: String| Error::new(ErrorKind::InvalidOperation, message);
    if !args.0.is_empty() {
        return Err(invalid("tojson takes its options by name".into()));
    }
    let indent: Option<usize> = options.get("indent")?;
    if indent.is_some_and(|width| width > 64) {
        return Err(invalid("tojson with an indent above 64".into()));
    }
    let ascii: Option<bool> = options.get("ensure_ascii")?;
    let sorted: Option<bool> = options.get("sort_keys")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    options.assert_all_used()?;
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        None if indent.is_some() => (",".into(), ": ".into()),
        None => (", ".into(), ": ".into()),
        Some(_) => return Err(invalid("tojson needs two separators".into())),
    };
    let value = serde_json::to_value(value)
        .map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    let mut dump = Dump {
        out: String::new(),
        item,
        key,
        indent,
        ascii: ascii.unwrap_or(false),
        sorted: sorted.unwrap_or(false),
    };
    dump.value(&value, 0);
    Ok(dump.out)
}

/// Python's `json.dumps`.
struct Dump {
    out: String,
    item: String,
    key: String,
    indent: Option<usize>,
    ascii: bool,
    sorted: bool,
}

impl Dump {
    fn value(&mut self, value: &Json, depth: usize) {
        match value {
            Json::String(text) => self.string(text),
            Json::Array(items) if items.is_empty() => self.out.push_str("[]"),
            Json::Array(items) => {
                self.out.push('[');
                for (index, item) in items.iter().enumerate() {
                    self.separate(index, depth + 1);
                    self.value(item, depth + 1);
                }
                self.new_line(depth);
                self.out.push(']');
            }
            Json::Object(map) if map.is_empty() => self.out.push_str("{}"),
            Json::Object(map) => {
                let mut pairs: Vec<_> = map.iter().collect();
                if self.sorted {
                    pairs.sort_by_key(|(key, _)| key.as_str());
                }
                self.out.push('{');
                for (index, (key, item)) in pairs.into_iter().enumerate() {
                    self.separate(index, depth + 1);
                    self.string(key);
                    self.out.push_str(&self.key);
                    self.value(item, depth + 1);
                }
                self.new_line(depth);
                self.out.push('}');
            }
            other => self.out.push_str(&other.to_string()),
        }
    }

    fn separate(&mut self, index: usize, depth: usize) {
        if index > 0 {
            self.out.push_str(&self.item);
        }
        self.new_line(depth);
    }

    fn new_line(&mut self, depth: usize) {
        if let Some(width) = self.indent {
            self.out.push('\n');
            self.out.push_str(&" ".repeat(width * depth));
        }
    }

    fn string(&mut self, text: &str) {
        use fmt::Write;
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if (c as u32) < 0x20 || (self.ascii && c as u32 > 0x7e) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        write!(self.out, "\\u{unit:04x}").expect("writing to a string succeeds");
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}
