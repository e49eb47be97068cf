//! A judge for the tests: a small HTTP server on loopback that speaks as OpenAI's does, and misbehaves on request.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};

/// What the server does with one request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Act {
    /// Prefers the output with more exclamation marks, with log-probs.
    Weigh,
    /// The same in words.
    Say,
    /// Always prefers the output shown first.
    First,
    Mumble,
    /// Closes the connection without a word.
    Close,
    /// Closes it before it has read the question, which resets it.
    Reset,
    Status(u16),
    /// 429, to be asked again after so many seconds.
    Later(u64),
    /// Promises more than it sends.
    Half,
    /// No chat completion.
    Garbage,
    /// No HTTP.
    Noise,
    /// Refuses questions with this part, with this status and in these words; others are answered in words.
    Refuse(&'static str, u16, &'static str),
    /// Says nothing for so many milliseconds, then closes.
    Hang(u64),
}

/// Serves until the tests' process ends.
pub struct JudgeServer {
    /// The address that ends before `/chat/completions`.
    pub url: String,
    state: Arc<State>,
}

struct State {
    /// What to do with the first requests; afterwards, the last of them.
    acts: Vec<Act>,
    asked: AtomicUsize,
    now: AtomicUsize,
    most: AtomicUsize,
    keys: Mutex<Vec<String>>,
}

impl JudgeServer {
    /// Does these things with the first requests, the last of them with all others.
    pub fn start(acts: &[Act]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/v1/", listener.local_addr().unwrap());
        let state = Arc::new(State {
            acts: acts.to_vec(),
            asked: AtomicUsize::new(0),
            now: AtomicUsize::new(0),
            most: AtomicUsize::new(0),
            keys: Mutex::default(),
        });
        let shared = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = shared.clone();
                std::thread::spawn(move || {
                    let now = state.now.fetch_add(1, Ordering::SeqCst) + 1;
                    state.most.fetch_max(now, Ordering::SeqCst);
                    let at = state.asked.fetch_add(1, Ordering::SeqCst);
                    let act = state.acts[at.min(state.acts.len() - 1)];
                    let reply = answer(stream, act, &state);
                    // Before the last byte, so that the next request cannot be counted beside this one.
                    state.now.fetch_sub(1, Ordering::SeqCst);
                    if let Some((mut stream, bytes)) = reply {
                        let _ = stream.write_all(&bytes);
                    }
                });
            }
        });
        Self { url, state }
    }

    /// Requests so far.
    pub fn asked(&self) -> usize {
        self.state.asked.load(Ordering::SeqCst)
    }

    /// The most requests that were open at once.
    pub fn most_at_a_time(&self) -> usize {
        self.state.most.load(Ordering::SeqCst)
    }

    /// The `Authorization` of every request that had one.
    pub fn keys(&self) -> Vec<String> {
        self.state.keys.lock().unwrap().clone()
    }
}

/// What is to be sent, and where to.
fn answer(stream: TcpStream, act: Act, state: &State) -> Option<(TcpStream, Vec<u8>)> {
    if act == Act::Reset {
        // With a byte unread, closing is a reset.
        stream.peek(&mut [0]).ok()?;
        return None;
    }
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut length = 0;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        if line.trim().is_empty() {
            break;
        }
        let (name, value) = line.trim().split_once(':').unwrap_or_default();
        match name.to_ascii_lowercase().as_str() {
            "content-length" => length = value.trim().parse().ok()?,
            "authorization" => state.keys.lock().unwrap().push(value.trim().to_owned()),
            _ => {}
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let body: Value = serde_json::from_slice(&body).ok()?;
    let reply = match act {
        Act::Reset | Act::Close => return None,
        Act::Hang(milliseconds) => {
            std::thread::sleep(Duration::from_millis(milliseconds));
            return None;
        }
        Act::Noise => b"\x15\x03\x01\0\x02\x02\x46".to_vec(),
        Act::Status(status) => http(status, 0, "{\"error\": \"not now\"}"),
        Act::Later(seconds) => http(429, seconds, "{\"error\": \"slow down\"}"),
        Act::Refuse(part, status, words) if body.get(part).is_some() => {
            http(status, 0, &json!({"error": {"message": words}}).to_string())
        }
        Act::Garbage => http(200, 0, "<html>busy</html>"),
        Act::Half => {
            let whole = http(200, 0, &chat("m", None).to_string());
            whole[..whole.len() - 20].to_vec()
        }
        Act::Mumble => http(200, 0, &chat("Both are fine.", None).to_string()),
        Act::First => http(200, 0, &chat("m", None).to_string()),
        Act::Say | Act::Refuse(..) => {
            let said = format!("**{}**.", better(&body));
            http(200, 0, &chat(&said, None).to_string())
        }
        Act::Weigh => {
            // Someone else in between, so that requests overlap.
            std::thread::sleep(Duration::from_millis(5));
            http(200, 0, &chat(better(&body), Some(0.9)).to_string())
        }
    };
    Some((stream, reply))
}

/// "m" where the answer shown first has more exclamation marks, else "M".
fn better(body: &Value) -> &'static str {
    let message = body["messages"][0]["content"].as_str().unwrap();
    let count = |label: &str| {
        // There are none where it is asked whether it answers at all.
        let after = message.split(&format!("<answer {label}>")).nth(1);
        let after = after.unwrap_or_default();
        after.split("</answer").next().unwrap().matches('!').count()
    };
    if count("m") > count("M") { "m" } else { "M" }
}

fn chat(text: &str, share: Option<f64>) -> Value {
    let mut choice = json!({"message": {"role": "assistant", "content": text}});
    if let Some(share) = share {
        let other = if text == "m" { "M" } else { "m" };
        choice["logprobs"] = json!({"content": [{"token": text, "top_logprobs": [
            {"token": text, "logprob": share.ln()}, {"token": other, "logprob": (1.0 - share).ln()}]}]});
    }
    json!({"choices": [choice]})
}

fn http(status: u16, retry_after: u64, body: &str) -> Vec<u8> {
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status} x\r\ncontent-type: application/json\r\ncontent-length: {length}\r\nretry-after: {retry_after}\r\n\
         connection: close\r\n\r\n"
    );
    (head + body).into_bytes()
}
