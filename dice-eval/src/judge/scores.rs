//! Preferences from scores: P(b is better) = sigmoid(score b − score a), the model of Bradley and Terry that reward models
//! and DPO are trained under.

use std::io::{BufRead, BufReader, BufWriter, Write};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow, bail, ensure};
use common::jsonl::Patient;
use common::policy::Logps;
use common::program;
use common::reward::implicit_reward;
use serde_json::{Map, Value, json};

use super::outputs::Pair;
use crate::implicit::{Scored, Scorer};

/// Probability that the second output is better.
fn preference([a, b]: [f64; 2]) -> f64 {
    1.0 / (1.0 + (a - b).exp())
}

/// By the implicit reward of two models; `each` gets every pair's probability in order, none where it is left out.
pub fn implicit(
    mut scorer: Scorer,
    beta: f64,
    pairs: &[Pair],
    mut each: impl FnMut(Option<f64>) -> Result<()>,
) -> Result<()> {
    let mut take = |scored: Vec<Scored>| -> Result<()> {
        for (_, logps) in scored {
            let reward = |l: Logps| implicit_reward(beta, l.policy, l.reference);
            let rewards = logps.map(|[b, a]| [a, b].map(reward));
            each(rewards.map(preference))?;
        }
        Ok(())
    };
    for pair in pairs {
        program::check()?;
        // As text: whoever sampled these may have had other tokens.
        let [a, b] = &pair.rows;
        let finish =
            |row: &common::jsonl::Row| row.fields.get("finish_reason").cloned().unwrap_or_default();
        let fields = [
            ("prompt", json!(pair.prompt.messages())),
            ("chosen", json!(pair.outputs[1])),
            ("rejected", json!(pair.outputs[0])),
            ("chosen_finish_reason", finish(b)),
            ("rejected_finish_reason", finish(a)),
        ];
        let mut row = common::jsonl::Row {
            fields: Map::from_iter(fields.map(|(name, value)| (name.to_owned(), value))),
            place: a.place.clone(),
        };
        for of_template in ["tools", "chat_template_kwargs"] {
            if let Some(value) = a.fields.get(of_template) {
                row.fields.insert(of_template.to_owned(), value.clone());
            }
        }
        take(scorer.push(row)?)?;
    }
    take(scorer.finish()?)
}

/// By a command that reads rows with `prompt` and `response` and answers each with a row that has a `reward` or a `score`,
/// in their order.
pub fn command(
    shell: &str,
    pairs: &[Pair],
    mut each: impl FnMut(Option<f64>) -> Result<()>,
) -> Result<()> {
    let mut child = Command::new("sh")
        .args(["-c", shell])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("--command: cannot start sh")?;
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    let (stdin, stdout) = stdin.zip(stdout).expect("both are piped");
    let judged = std::thread::scope(|threads| {
        // From a thread of its own: a command that answers before it has read all would wait for us, and we for it.
        threads.spawn(move || {
            let mut to = BufWriter::new(stdin);
            let rows = pairs
                .iter()
                .flat_map(|pair| [0, 1].map(|side| (pair, side)));
            for (pair, side) in rows {
                let prompt = &pair.rows[side].fields;
                let prompt = prompt.get("prompt").or(prompt.get("instruction"));
                let row = json!({"prompt": prompt, "response": pair.outputs[side]});
                if writeln!(to, "{row}").is_err() {
                    // The command has stopped reading; what it answered tells why.
                    return;
                }
            }
            let _ = to.flush();
        });
        let answers = BufReader::new(Patient::start(|| BufReader::new(stdout)));
        let judged = read_scores(answers, pairs.len(), &mut each);
        if judged.is_err() {
            // Lets the writer go.
            let _ = child.kill();
        }
        judged
    });
    let status = child.wait().context("--command")?;
    judged.with_context(|| format!("--command {shell} ({status})"))?;
    ensure!(status.success(), "--command {shell} failed: {status}");
    Ok(())
}

fn read_scores(
    from: impl BufRead,
    pairs: usize,
    each: &mut impl FnMut(Option<f64>) -> Result<()>,
) -> Result<()> {
    let mut scores = from
        .lines()
        .filter(|line| !line.as_ref().is_ok_and(|line| line.trim().is_empty()))
        .zip(1..)
        .map(|(line, number)| score(&line?).with_context(|| format!("row {number} of its output")));
    for done in 0..pairs {
        let mut next = || {
            let next = scores.next();
            // A signal that both of us got is why there are no more.
            program::check()?;
            let missing = || anyhow!("it gave {} scores for {} outputs", 2 * done, 2 * pairs);
            next.ok_or_else(missing)?
        };
        each(Some(preference([next()?, next()?])))?;
    }
    if scores.next().is_some() {
        bail!(
            "it gave more scores than the {} that were asked for",
            2 * pairs
        );
    }
    Ok(())
}

fn score(line: &str) -> Result<f64> {
    let row: Value = serde_json::from_str(line).context("not JSON")?;
    let score = ["reward", "score"]
        .iter()
        .find_map(|field| row.get(field)?.as_f64());
    score.context("there is no number in \"reward\" or \"score\"")
}
