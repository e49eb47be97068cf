//! A judge behind an OpenAI-compatible server: one question, one reply, however often the server has to be asked.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, anyhow, bail};
use common::program;
use serde_json::{Value, json};
use time::format_description::well_known::Rfc2822;
use ureq::Agent;

use super::verdict::{self, Verdict};

/// Replies are a few words; what is longer is not one.
const MAX_REPLY_BYTES: u64 = 16 << 20;

/// However long a server asks to wait, it is asked again after this time.
const LONGEST_ASKED: Duration = Duration::from_secs(600);

/// Where and how to ask.
pub struct Endpoint {
    agent: Agent,
    url: String,
    /// Sent as a bearer token, where there is one.
    key: Option<String>,
    model: String,
    max_tokens: u32,
    labels: [String; 2],
    patience: Patience,
    form: Mutex<Form>,
    /// Whether it has ever answered.
    answered: AtomicBool,
}

/// How a question is put: everything that one would like, until the server refuses a part of it.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Form {
    /// Likeliest tokens of the first position; 0: no log-probs.
    top_logprobs: u32,
    /// The bound on the reply's length goes by two names: this one, or OpenAI's newer `max_completion_tokens`.
    max_tokens: bool,
    /// Without it the server's default holds.
    temperature: bool,
}

impl Form {
    const WHOLE: Self = Self {
        // OpenAI's bound.
        top_logprobs: 20,
        max_tokens: true,
        temperature: true,
    };

    /// What to ask after a refusal in these words; `None` where they name nothing that could be left out.
    fn without(self, refusal: &str) -> Option<Self> {
        match self {
            Self { top_logprobs, .. } if top_logprobs > 0 && refusal.contains("logprob") => {
                Some(Self {
                    // Five is what older servers give.
                    top_logprobs: if top_logprobs > 5 { 5 } else { 0 },
                    ..self
                })
            }
            Self {
                max_tokens: true, ..
            } if refusal.contains("max_completion_tokens") => Some(Self {
                max_tokens: false,
                ..self
            }),
            Self {
                temperature: true, ..
            } if refusal.contains("temperature") => Some(Self {
                temperature: false,
                ..self
            }),
            _ => None,
        }
    }
}

/// How often a failed request is repeated, and after how long.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    pub retries: u32,
    /// Before the first repetition; doubled before each further one, up to the longest. A server that names a longer
    /// time (`Retry-After`) gets it.
    pub wait: Duration,
    pub longest_wait: Duration,
    /// For one request, from connecting to the reply's last byte.
    pub timeout: Duration,
}

/// Why there is no reply.
enum Failure {
    /// Worth another try, after the time that the server asked for.
    Passing(anyhow::Error, Option<Duration>),
    /// This question is refused, such as for its length; others may not be.
    Refused(anyhow::Error),
    Final(anyhow::Error),
}

impl Endpoint {
    /// `base` is the part of the address before `/chat/completions`.
    pub fn new(
        base: &str,
        model: &str,
        key: Option<String>,
        max_tokens: u32,
        labels: [String; 2],
        patience: Patience,
    ) -> Self {
        let config = Agent::config_builder()
            .timeout_global(Some(patience.timeout))
            .http_status_as_error(false)
            .build();
        Self {
            agent: config.into(),
            url: format!("{}/chat/completions", base.trim_end_matches('/')),
            key,
            model: model.to_owned(),
            max_tokens,
            labels,
            patience,
            form: Mutex::new(Form::WHOLE),
            answered: AtomicBool::new(false),
        }
    }

    /// What makes two questions the same one: the judge and everything that it sees. Not the address: a local server
    /// comes back under another one.
    pub fn question(&self, message: &str) -> String {
        let asked = json!([self.model, self.max_tokens, self.labels, message]);
        blake3::hash(asked.to_string().as_bytes())
            .to_hex()
            .to_string()
    }

    /// Asks until there is a reply. A question that is refused, of a server that answers others, gets none: the verdict says
    /// so, and a line on stderr why.
    ///
    /// # Errors
    /// A refusal of everything (4xx but 408 and 429), a failure that outlives all retries, a signal.
    pub fn ask(&self, message: &str) -> Result<Verdict> {
        match self.patiently(message) {
            Ok(verdict) => Ok(verdict),
            Err(Failure::Refused(err)) if self.answers() => {
                program::say(format_args!("{err:#}; left without a verdict"));
                Ok(Verdict::refused())
            }
            Err(Failure::Refused(err) | Failure::Passing(err, _) | Failure::Final(err)) => Err(err),
        }
    }

    /// Whether it answers anything: it has, or it does now.
    fn answers(&self) -> bool {
        self.answered.load(Ordering::Relaxed) || self.patiently("Say yes.").is_ok()
    }

    /// Asks again what fails for now.
    fn patiently(&self, message: &str) -> Result<Verdict, Failure> {
        let mut wait = self.patience.wait;
        for attempt in 0.. {
            program::check().map_err(|err| Failure::Final(err.into()))?;
            match self.once(message) {
                Ok(verdict) => {
                    self.answered.store(true, Ordering::Relaxed);
                    return Ok(verdict);
                }
                Err(Failure::Passing(err, _)) if attempt == self.patience.retries => {
                    let err = err.context(format!("gave up after {} attempts", attempt + 1));
                    return Err(Failure::Final(err));
                }
                Err(Failure::Passing(_, asked)) => {
                    // Half of our own time is chance: requests that failed together do not come back together.
                    let least = asked.unwrap_or(wait / 2).min(LONGEST_ASKED);
                    sleep(least + (wait / 2).mul_f64(chance(message, attempt)))
                        .map_err(Failure::Final)?;
                }
                Err(failure) => return Err(failure),
            }
            wait = (wait * 2).min(self.patience.longest_wait);
        }
        unreachable!("the loop has no end but the returns")
    }

    fn once(&self, message: &str) -> Result<Verdict, Failure> {
        let form = *self.form();
        let (status, wait, text) = self
            .post(&self.body(message, form))
            .map_err(|err| Failure::Passing(err.context(self.url.clone()), None))?;
        if let 200..300 = status {
            let reply: Option<Value> = serde_json::from_str(&text).ok();
            let verdict = reply.and_then(|reply| verdict::read(&reply, &self.labels));
            return verdict.ok_or_else(|| {
                let what = anyhow!("{}: not a chat completion: {}", self.url, excerpt(&text));
                Failure::Passing(what, None)
            });
        }
        // Some servers refuse with 400, some with 403, and llama.cpp's Python server with 500.
        if let (true, Some(less)) = (status != 429, form.without(&text)) {
            // Another thread may have been refused the same meanwhile.
            let mut now = self.form();
            if *now == form {
                *now = less;
            }
            drop(now);
            return self.once(message);
        }
        let what = anyhow!("{}: status {status}: {}", self.url, excerpt(&text));
        Err(match status {
            408 | 429 | 500.. => Failure::Passing(what, wait),
            400 | 413 | 422 => Failure::Refused(what),
            _ => Failure::Final(what),
        })
    }

    fn form(&self) -> std::sync::MutexGuard<'_, Form> {
        self.form.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn body(&self, message: &str, form: Form) -> Value {
        let mut body = json!({
            "model": self.model,
            "messages": [{"role": "user", "content": message}],
        });
        let bound = match form.max_tokens {
            true => "max_tokens",
            false => "max_completion_tokens",
        };
        body[bound] = json!(self.max_tokens);
        if form.temperature {
            body["temperature"] = json!(0);
        }
        if form.top_logprobs > 0 {
            body["logprobs"] = json!(true);
            body["top_logprobs"] = json!(form.top_logprobs);
        }
        body
    }

    /// Sends a question from a thread of its own, since a signal is to be heard while a server thinks.
    fn post(&self, body: &Value) -> Result<Reply> {
        let (agent, url) = (self.agent.clone(), self.url.clone());
        let (key, body) = (self.key.clone(), body.to_string());
        let (sender, reply) = channel();
        std::thread::spawn(move || {
            // Where nobody waits any more, nobody needs it.
            let _ = sender.send(post(&agent, &url, key, body));
        });
        loop {
            match reply.recv_timeout(Duration::from_millis(50)) {
                Ok(reply) => return reply,
                Err(RecvTimeoutError::Timeout) => program::check()?,
                Err(RecvTimeoutError::Disconnected) => bail!("the request ended without a reply"),
            }
        }
    }
}

/// Status, what `Retry-After` asks for, text.
type Reply = (u16, Option<Duration>, String);

fn post(agent: &Agent, url: &str, key: Option<String>, body: String) -> Result<Reply> {
    let mut request = agent.post(url).header("content-type", "application/json");
    if let Some(key) = key {
        request = request.header("authorization", format!("Bearer {key}"));
    }
    let mut response = request.send(body)?;
    let wait = response.headers().get("retry-after");
    let wait = wait.and_then(|wait| retry_after(wait.to_str().ok()?, SystemTime::now()));
    let text = response
        .body_mut()
        .with_config()
        .limit(MAX_REPLY_BYTES)
        .read_to_string()
        .context("the reply broke off")?;
    Ok((response.status().as_u16(), wait, text))
}

/// Seconds, or a date (RFC 9110, section 10.2.3).
fn retry_after(value: &str, now: SystemTime) -> Option<Duration> {
    match value.trim().parse() {
        Ok(seconds) => Duration::try_from_secs_f64(seconds).ok(),
        Err(_) => {
            let then = time::OffsetDateTime::parse(value.trim(), &Rfc2822).ok()?;
            SystemTime::from(then).duration_since(now).ok()
        }
    }
}

/// The beginning of a reply, for an error message.
fn excerpt(text: &str) -> String {
    let start: String = text.chars().take(200).collect();
    match start.trim() {
        "" => "an empty reply".into(),
        start => start.to_owned(),
    }
}

/// From 0 to 1, another for each question and attempt.
fn chance(message: &str, attempt: u32) -> f64 {
    let mut hash = blake3::Hasher::new();
    hash.update(message.as_bytes())
        .update(&attempt.to_le_bytes());
    f64::from(hash.finalize().as_bytes()[0]) / 255.0
}

/// Waits, but hears a signal.
fn sleep(time: Duration) -> Result<()> {
    let until = Instant::now() + time;
    while let Some(left) = until.checked_duration_since(Instant::now()) {
        program::check()?;
        std::thread::sleep(left.min(Duration::from_millis(50)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_says_when_to_ask_again_in_seconds_or_by_a_date() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_735_689_599);
        let seconds = |value| retry_after(value, now).map(|wait| wait.as_secs());
        assert_eq!(seconds("3"), Some(3));
        assert_eq!(seconds("Wed, 01 Jan 2025 00:00:06 GMT"), Some(7));
        assert_eq!(seconds("Tue, 31 Dec 2024 00:00:00 GMT"), None);
        assert_eq!(seconds("soon"), None);
    }
}
