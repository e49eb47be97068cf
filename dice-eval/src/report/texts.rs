//! What there is to read: responses side by side, and the exact settings, fingerprints and commands.

use anyhow::Result;
use maud::{Markup, html};
use serde_json::Value;

use super::rounds::{Round, Samples, Shown};
use crate::format::number;

/// Prompts that are shown.
const SHOWN: usize = 4;

/// The first response to a few prompts, stage by stage: the policy before the first round, then after each.
pub fn responses(rounds: &[Round]) -> Markup {
    let mut stages: Vec<(String, &Samples)> = vec![];
    for round in rounds {
        if let (Some(before), true) = (&round.before, stages.is_empty()) {
            stages.push((format!("before {}", round.name), before));
        }
        if let Some(after) = &round.after {
            stages.push((format!("after {}", round.name), after));
        }
    }
    if stages.is_empty() {
        let samples = rounds
            .iter()
            .filter_map(|r| Some((format!("in {}", r.name), r.samples.as_ref()?)));
        stages.extend(samples);
    }
    let shown = |samples: &Samples, id: &str| -> Option<Shown> {
        let found = samples.first.iter().find(|(other, _)| other == id);
        found.map(|(_, shown)| shown.clone())
    };
    let Some((_, last)) = stages.last() else {
        return html! { p { "There are no samples." } };
    };
    // Those that most stages answer come first.
    let mut ids: Vec<&String> = last.first.iter().map(|(id, _)| id).collect();
    ids.sort_by_key(|id| {
        stages
            .iter()
            .filter(|(_, s)| shown(s, id).is_none())
            .count()
    });
    html! {
        p.note { "The first sample of each prompt: not picked." }
        @for (at, id) in ids.into_iter().take(SHOWN).enumerate() {
            @let prompt = shown(last, id).map(|s| s.prompt).unwrap_or_default();
            details open[at == 0] {
                summary { (prompt) }
                div.stages {
                    @for (name, samples) in &stages {
                        @if let Some(shown) = shown(samples, id) {
                            article {
                                h4 {
                                    (name)
                                    @if let Some(reward) = shown.reward { ", reward " (number(Some(reward), 3).replace('-', "−")) }
                                    @if shown.truncated { ", cut at the token limit" }
                                }
                                p.text tabindex="0" { (shown.response) }
                            }
                        }
                    }
                }
            }
        }
    }
}

pub fn settings(rounds: &[Round]) -> Result<Markup> {
    let pretty = |value: &Value| serde_json::to_string_pretty(value);
    let mut parts = vec![];
    for round in rounds {
        let mut texts: Vec<(&str, String)> = vec![];
        if let Some(trainer) = &round.trainer {
            let mut trainer = trainer.clone();
            if let Some(fields) = trainer.as_object_mut() {
                // The steps are drawn above.
                fields.remove("log_history");
            }
            texts.push(("training (trainer_state.json)", pretty(&trainer)?));
        }
        if let Some(stats) = &round.stats {
            let mut stats = stats.clone();
            if let Some(fields) = stats.as_object_mut() {
                fields.remove("curve");
            }
            texts.push(("choice of pairs (pairs.stats.json)", pretty(&stats)?));
        }
        let fingerprints = round
            .samples
            .iter()
            .flat_map(|samples| &samples.fingerprints);
        let fingerprints: Vec<String> = fingerprints
            .map(|(role, print)| format!("{role}: {print}"))
            .collect();
        if !fingerprints.is_empty() {
            texts.push((
                "fingerprints of the models in scored.jsonl",
                fingerprints.join("\n"),
            ));
        }
        if let Some(commands) = &round.commands {
            texts.push(("commands", commands.clone()));
        }
        parts.push((round, texts));
    }
    Ok(html! {
        @for (round, texts) in parts {
            @for (title, text) in texts {
                details { summary { (round.name) ": " (title) } pre tabindex="0" { (text) } }
            }
        }
        p.note { "Made by dice-eval " (env!("CARGO_PKG_VERSION")) "." }
    })
}
