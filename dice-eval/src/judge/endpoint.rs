//! A judge behind an OpenAI-compatible server: one question, one reply, however often the server has to be asked.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use common::program;
use serde_json::{Value, json};
use ureq::Agent;

use super::verdict::{self, Verdict};

/// Replies are a few words; what is longer is not one.
const MAX_REPLY_BYTES: u64 = 16 << 20;

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
    /// How often the server has refused a number of log-probs: the place in [`TOP`].
    refused: AtomicUsize,
}

/// Likeliest tokens to ask for: OpenAI's bound, then a common older one, then none at all.
const TOP: [u32; 3] = [20, 5, 0];

/// How often a failed request is repeated, and after how long.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    pub retries: u32,
    /// Before the first repetition; doubled before each further one.
    pub wait: Duration,
    pub longest_wait: Duration,
    /// For one request, from connecting to the reply's last byte.
    pub timeout: Duration,
}

/// Why there is no reply.
enum Failure {
    /// Worth another try, after the time that the server asked for.
    Passing(anyhow::Error, Option<Duration>),
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
            refused: AtomicUsize::new(0),
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

    /// Asks until there is a reply.
    ///
    /// # Errors
    /// A refusal (4xx but 429), a failure that outlives all retries, a signal.
    pub fn ask(&self, message: &str) -> Result<Verdict> {
        let mut wait = self.patience.wait;
        for attempt in 0.. {
            program::check()?;
            match self.once(message) {
                Ok(verdict) => return Ok(verdict),
                Err(Failure::Final(err)) => return Err(err),
                Err(Failure::Passing(err, _)) if attempt == self.patience.retries => {
                    return Err(err.context(format!("gave up after {} attempts", attempt + 1)));
                }
                Err(Failure::Passing(_, asked)) => {
                    let wait = asked.unwrap_or(wait).min(self.patience.longest_wait);
                    sleep(scattered(wait, message, attempt))?;
                }
            }
            wait = (wait * 2).min(self.patience.longest_wait);
        }
        unreachable!("the loop has no end but the returns")
    }

    fn once(&self, message: &str) -> Result<Verdict, Failure> {
        let refused = self.refused.load(Ordering::Relaxed);
        let (status, wait, text) = self
            .post(&self.body(message, TOP[refused]))
            .map_err(|err| Failure::Passing(err.context(self.url.clone()), None))?;
        match status {
            200..300 => {
                let reply: Option<Value> = serde_json::from_str(&text).ok();
                let verdict = reply.and_then(|reply| verdict::read(&reply, &self.labels));
                verdict.ok_or_else(|| {
                    let what = anyhow!("{}: not a chat completion: {}", self.url, excerpt(&text));
                    Failure::Passing(what, None)
                })
            }
            400 | 422 if TOP[refused] > 0 && text.contains("logprob") => {
                self.refused.fetch_max(refused + 1, Ordering::Relaxed);
                self.once(message)
            }
            _ => {
                let what = anyhow!("{}: status {status}: {}", self.url, excerpt(&text));
                Err(match status {
                    408 | 429 | 500.. => Failure::Passing(what, wait),
                    _ => Failure::Final(what),
                })
            }
        }
    }

    fn body(&self, message: &str, top: u32) -> Value {
        let mut body = json!({
            "model": self.model,
            "messages": [{"role": "user", "content": message}],
            "max_tokens": self.max_tokens,
            "temperature": 0,
        });
        if top > 0 {
            body["logprobs"] = json!(true);
            body["top_logprobs"] = json!(top);
        }
        body
    }

    /// Status, `Retry-After` in seconds, text.
    fn post(&self, body: &Value) -> Result<(u16, Option<Duration>, String)> {
        let mut request = self
            .agent
            .post(&self.url)
            .header("content-type", "application/json");
        if let Some(key) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let mut response = request.send(body.to_string())?;
        let wait = response.headers().get("retry-after");
        let wait = wait
            .and_then(|seconds| seconds.to_str().ok()?.parse().ok())
            .map(Duration::from_secs);
        let text = response
            .body_mut()
            .with_config()
            .limit(MAX_REPLY_BYTES)
            .read_to_string()
            .context("the reply broke off")?;
        Ok((response.status().as_u16(), wait, text))
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

/// Between half and all of the time: requests that failed together do not come back together.
fn scattered(wait: Duration, message: &str, attempt: u32) -> Duration {
    let mut hash = blake3::Hasher::new();
    hash.update(message.as_bytes())
        .update(&attempt.to_le_bytes());
    let share = f64::from(hash.finalize().as_bytes()[0]) / 255.0;
    wait.mul_f64(0.5 + 0.5 * share)
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
