//! `dice-eval report`: a run of any number of rounds as one HTML file that needs nothing else.

mod plot;
mod rounds;

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result};
use common::metrics::{Estimate, SampleFigures};
use common::run::write_with_manifest;
use maud::{DOCTYPE, Markup, PreEscaped, html};
use serde_json::Value;

use crate::format::{average, estimate, number, percent, points};
use plot::{Mark, Plot, Series, histogram};
use rounds::{Round, Samples, Shown};

/// A report of a whole run to look at: one HTML file, with tables, figures and sampled responses
///
/// Reads a folder as `just round` makes it: round-1, round-2, ... with scored.jsonl (samples and rewards), before.jsonl and
/// after.jsonl (check prompts), pairs.jsonl, pairs.stats.json (dice-pairs --stats), steps.jsonl (dice-train's stdout),
/// win-rate.jsonl (rows of dice-eval win-rate) and commands.sh (shown as it is); beside them policy-1, policy-2, ... with
/// trainer_state.json. What is missing is left out. The file opens offline and runs no script.
///
/// Example: dice-eval report runs > report.html
#[derive(clap::Args)]
pub struct Args {
    /// Write to FILE instead of stdout; an existing FILE is replaced
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Folder of the run, or of one round
    #[arg(value_name = "RUN_DIR")]
    run: PathBuf,
}

pub fn run(args: Args) -> Result<()> {
    let rounds = rounds::read(&args.run)?;
    let page = page(&args.run.display().to_string(), &rounds)?.into_string();
    match &args.output {
        Some(file) if file.as_os_str() != "-" => write_with_manifest(file, page.as_bytes()),
        _ => std::io::stdout()
            .write_all(page.as_bytes())
            .context("cannot write to stdout"),
    }
}

fn page(name: &str, rounds: &[Round]) -> Result<Markup> {
    let parts = [
        ("rounds", "Round by round", overview(rounds)?),
        ("training", "Training", training(rounds)?),
        ("pairs", "Pairs, α and γ", pairs(rounds)?),
        ("responses", "Responses", responses(rounds)),
        ("settings", "Settings", settings(rounds)?),
    ];
    Ok(html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                // Browsers ask for an icon unless told that there is none.
                link rel="icon" href="data:,";
                title { "DICE run " (name) }
                style { (PreEscaped(include_str!("style.css"))) }
            }
            body {
                header {
                    h1 { "DICE run " (name) }
                    nav aria-label="Parts" { @for (id, title, _) in &parts { a href={ "#" (id) } { (title) } } }
                }
                main { @for (id, title, part) in &parts { section id=(id) { h2 { (title) } (part) } } }
            }
        }
    })
}

fn table(caption: &str, heads: &[&str], rows: &[Vec<String>]) -> Markup {
    html! {
        // Wide tables scroll in their own frame, which the keyboard reaches.
        div.scroll tabindex="0" role="region" aria-label=(caption) {
            table {
                caption { (caption) }
                thead { tr { @for head in heads { th scope="col" { (head) } } } }
                tbody { @for row in rows { tr {
                    @for (at, cell) in row.iter().enumerate() {
                        @if at == 0 { th scope="row" { (cell) } } @else { td { (cell) } }
                    }
                } } }
            }
        }
    }
}

fn figures(plots: Vec<Plot>) -> Result<Markup> {
    let drawn: Vec<Markup> = plots.iter().map(Plot::markup).collect::<Result<_>>()?;
    Ok(html! { div.figures { @for figure in drawn { (figure) } } })
}

fn overview(rounds: &[Round]) -> Result<Markup> {
    let heads = [
        "samples",
        "count",
        "prompts",
        "reward",
        "characters",
        "tokens",
        "truncated",
        "distinct-1",
        "distinct-2",
        "reward ~ length",
    ];
    let row = |name: String, f: &SampleFigures| {
        vec![
            name,
            f.samples.to_string(),
            f.prompts.to_string(),
            estimate(f.reward),
            average(f.chars),
            average(f.tokens),
            percent(f.truncated),
            number(f.distinct_1, 3),
            number(f.distinct_2, 3),
            number(f.reward_length_correlation, 2),
        ]
    };
    let mut rows = vec![];
    for round in rounds {
        for (what, samples) in [
            ("samples that became pairs", &round.samples),
            ("check prompts, before", &round.before),
            ("check prompts, after", &round.after),
        ] {
            if let Some(samples) = samples {
                rows.push(row(format!("{}: {what}", round.name), &samples.figures));
            }
        }
    }
    let drift = drift(rounds);
    let drift_heads = [
        "round",
        "steps",
        "loss",
        "margin",
        "chosen log-prob",
        "rejected log-prob",
    ];
    let wins = win_rates(rounds);
    let win_heads = [
        "win rate",
        "raw",
        "length-controlled",
        "form",
        "judged",
        "average length",
    ];
    Ok(html! {
        (table("Samples; each round's reward has its own policy and reference, so rewards compare within a round only", &heads, &rows))
        @if !drift.is_empty() {
            (table("Training, first → last step; log-probs: mean change since the start of the round, nats", &drift_heads, &drift))
        }
        @if !wins.is_empty() { (table("Win rates, percent, with 95% intervals", &win_heads, &wins)) }
        (figures(vec![lengths(rounds), rewards(rounds)])?)
    })
}

/// Rows of the table of training.
fn drift(rounds: &[Round]) -> Vec<Vec<String>> {
    let trained = rounds.iter().filter(|round| !round.steps.is_empty());
    let row = |round: &Round| {
        let ends = |column: &str, scale: f64, decimals: usize| {
            let course = round.course(column);
            let (first, last) = (course.first(), course.last());
            let ends = first.zip(last).map(|(a, b)| (a.1 * scale, b.1 * scale));
            ends.map_or("–".into(), |(a, b)| {
                format!("{a:.decimals$} → {b:.decimals$}")
            })
        };
        // rewards/… are β times the change of the log-prob.
        let beta = round
            .trainer
            .as_ref()
            .and_then(|t| t.pointer("/settings/objective/beta")?.as_f64());
        let log_prob = |column: &str| match beta {
            Some(beta) if beta > 0.0 => ends(column, 1.0 / beta, 2),
            _ => "–".into(),
        };
        vec![
            round.name.clone(),
            round.steps.len().to_string(),
            ends("loss", 1.0, 4),
            ends("rewards/margins", 1.0, 3),
            log_prob("rewards/chosen"),
            log_prob("rewards/rejected"),
        ]
    };
    trained.map(row).collect()
}

fn win_rates(rounds: &[Round]) -> Vec<Vec<String>> {
    let all = rounds
        .iter()
        .flat_map(|round| round.win_rates.iter().map(move |row| (round, row)));
    all.map(|(round, row)| {
        let number = |field: &str| row.get(field).and_then(Value::as_f64);
        let text = |field: &str| {
            row.get(field)
                .and_then(Value::as_str)
                .unwrap_or("–")
                .to_owned()
        };
        let interval = |name: &str| {
            Some([
                number(&format!("{name}_low"))?,
                number(&format!("{name}_high"))?,
            ])
        };
        let count = |field: &str| number(field).map_or("–".into(), |n| format!("{n:.0}"));
        vec![
            format!("{}: {}, {}", round.name, text("model"), text("group")),
            points(number("win_rate"), interval("win_rate")),
            points(
                number("length_controlled_winrate"),
                interval("length_controlled"),
            ),
            text("lc_form"),
            count("n_total"),
            count("avg_length"),
        ]
    })
    .collect()
}

/// Intervals by round of a figure of the check prompts (else of all samples), before and after.
fn by_round(rounds: &[Round], of: fn(&SampleFigures) -> Option<Estimate>) -> Vec<Series> {
    let series = |at: usize, name: &str, shift: f64, samples: fn(&Round) -> Option<&Samples>| {
        let all = rounds.iter().enumerate().filter_map(|(i, round)| {
            let e = of(&samples(round)?.figures)?;
            Some((1.0 + i as f64 + shift, e.low, e.value, e.high))
        });
        Series::new(at, name, Mark::Intervals(all.collect()))
    };
    vec![
        series(0, "samples that became pairs", -0.1, |round| {
            round.samples.as_ref()
        }),
        series(1, "check prompts, before training", 0.0, |round| {
            round.before.as_ref()
        }),
        series(2, "check prompts, after training", 0.1, |round| {
            round.after.as_ref()
        }),
    ]
}

fn lengths(rounds: &[Round]) -> Plot<'static> {
    let mean = |f: &SampleFigures| {
        let spread = f.chars?;
        let half = 1.96 * spread.standard_deviation / (spread.count as f64).sqrt();
        Some(Estimate {
            value: spread.mean,
            low: spread.mean - half,
            high: spread.mean + half,
        })
    };
    Plot {
        title: "Length of responses",
        axes: ["round", "mean characters"],
        series: by_round(rounds, mean),
        note: "Mean and 95% interval.".into(),
    }
}

fn rewards(rounds: &[Round]) -> Plot<'static> {
    Plot {
        title: "Implicit reward",
        axes: ["round", "mean reward"],
        series: by_round(rounds, |f| f.reward),
        note: "Mean and 95% interval; before and after training are scored by the same pair of models.".into(),
    }
}

fn training(rounds: &[Round]) -> Result<Markup> {
    let course = |title, axis, column: &str, note: &str| Plot {
        title,
        axes: ["step", axis],
        series: rounds
            .iter()
            .enumerate()
            .map(|(i, round)| Series::new(i, round.name.clone(), Mark::Line(round.course(column))))
            .collect(),
        note: note.to_owned(),
    };
    let mut plots = vec![
        course(
            "Loss",
            "loss",
            "loss",
            "ln 2 = 0.693 is where DPO's sigmoid loss starts.",
        ),
        course("Margin", "reward margin", "rewards/margins", ""),
        course(
            "Accuracy",
            "share of pairs",
            "rewards/accuracies",
            "Pairs of the batch whose chosen response has the higher reward.",
        ),
        course("Gradient norm", "norm", "grad_norm", "Before clipping."),
    ];
    for round in rounds {
        let side = |at, name: &str, column| Series::new(at, name, Mark::Line(round.course(column)));
        plots.push(Plot {
            title: "Drift of chosen and rejected",
            axes: ["step", "β × change of log-prob"],
            series: vec![
                side(0, "chosen", "rewards/chosen"),
                side(1, "rejected", "rewards/rejected"),
            ],
            note: format!(
                "{}. Both falling means that the model unlearns both.",
                round.name
            ),
        });
    }
    figures(plots)
}

fn pairs(rounds: &[Round]) -> Result<Markup> {
    let mut plots = vec![mix(rounds)];
    for round in rounds {
        if let Some(pairs) = &round.pairs {
            let sides = |values: &[Vec<f64>; 2]| {
                histogram([
                    ("chosen", values[0].clone()),
                    ("rejected", values[1].clone()),
                ])
            };
            for (title, axis, values) in [
                ("Lengths at α = 0", "characters", &pairs.lengths_without),
                ("Lengths as trained on", "characters", &pairs.lengths),
                ("Scores at α = 0", "reward", &pairs.scores_without),
                (
                    "Scores as trained on",
                    "reward less α times length",
                    &pairs.scores,
                ),
            ] {
                plots.push(Plot {
                    title,
                    axes: [axis, "pairs"],
                    series: sides(values),
                    note: format!("{}, generated pairs.", round.name),
                });
            }
        }
        plots.extend(round.stats.as_ref().and_then(|stats| curve(round, stats)));
        if let Some(samples) = &round.samples {
            plots.push(scatter(round, samples));
        }
    }
    figures(plots)
}

fn mix(rounds: &[Round]) -> Plot<'static> {
    let bars = |shift: f64, count: fn(&rounds::Pairs) -> usize| {
        let all = rounds.iter().enumerate().filter_map(|(i, round)| {
            let at = 1.0 + i as f64 + shift;
            Some((at, at + 0.35, count(round.pairs.as_ref()?) as f64))
        });
        Mark::Bars(all.collect())
    };
    Plot {
        title: "Mix of pairs",
        axes: ["round", "pairs"],
        series: vec![
            Series::new(0, "generated", bars(-0.35, |p| p.generated)),
            Series::new(1, "replayed", bars(0.0, |p| p.replayed)),
        ],
        note: "γ is the replayed share.".into(),
    }
}

/// The mean length gap as a step function of α, with the α that was taken.
fn curve(round: &Round, stats: &Value) -> Option<Plot<'static>> {
    let alpha = stats.get("alpha")?.as_f64()?;
    let steps = stats.get("curve")?.as_array()?.iter();
    let steps: Vec<(f64, f64)> = steps
        .filter_map(|step| Some((step.get(0)?.as_f64()?, step.get(1)?.as_f64()?)))
        .collect();
    // The last corners are far out, where the gap hardly moves: they would press the rest against the axis.
    let far = steps.get(steps.len() * 9 / 10)?.0.max(3.0 * alpha);
    let steps = steps.into_iter().filter(|step| step.0 <= far).collect();
    let gap = stats.get("gap").and_then(Value::as_f64);
    Some(Plot {
        title: "Length gap by α",
        axes: ["α", "chosen − rejected, mean"],
        series: vec![
            Series::new(0, "gap", Mark::Steps(steps)),
            Series::new(1, "α of this round", Mark::At(alpha)),
        ],
        note: format!("{}: α = {alpha}, gap {}.", round.name, number(gap, 2)),
    })
}

fn scatter(round: &Round, samples: &Samples) -> Plot<'static> {
    // More dots than this make a blot and a heavy file.
    let every = samples.points.len().div_ceil(1500).max(1);
    Plot {
        title: "Reward against length",
        axes: ["characters", "reward"],
        series: vec![Series::new(
            0,
            "samples",
            Mark::Points(samples.points.iter().step_by(every).copied().collect()),
        )],
        note: format!(
            "{}: correlation {} over all, {} within prompts{}.",
            round.name,
            number(samples.figures.reward_length_correlation, 2),
            number(samples.figures.reward_length_correlation_within_prompts, 2),
            match every {
                1 => String::new(),
                n => format!("; every {n}th sample is drawn"),
            }
        ),
    }
}

/// Prompts that are shown.
const SHOWN: usize = 4;

/// The first response to a few prompts, stage by stage: the policy before the first round, then after each.
fn responses(rounds: &[Round]) -> Markup {
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
                                    @if let Some(reward) = shown.reward { ", reward " (number(Some(reward), 3)) }
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

fn settings(rounds: &[Round]) -> Result<Markup> {
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

#[cfg(test)]
mod tests {
    use crate::testing::text;
    use serde_json::json;
    use std::fs;
    use std::path::Path;
    use std::process::Command;

    fn lines(path: &Path, rows: impl IntoIterator<Item = serde_json::Value>) {
        let text: String = rows.into_iter().map(|row| format!("{row}\n")).collect();
        fs::write(path, text).unwrap();
    }

    /// A run of two rounds, the second without all of the first's files.
    fn make_run(dir: &Path) {
        for round in [1, 2] {
            let folder = dir.join(format!("round-{round}"));
            fs::create_dir(&folder).unwrap();
            let sample = |i: usize| {
                json!({"id": format!("p{}", i / 4), "prompt": format!("prompt <{}>", i / 4), "sample": i % 4,
                    "response": format!("round {round} <b>{}</b>", "x".repeat(i * 7 % 50)), "token_ids": [1, 2],
                    "reward": (i * 5 % 13) as f64 - 4.0, "policy": "abc", "ref": "def"})
            };
            lines(&folder.join("scored.jsonl"), (0..40).map(sample));
            let step = |i: u32| {
                json!({"step": i, "loss": 0.7 - 0.01 * f64::from(i), "rewards/chosen": 0.1, "rewards/rejected": -0.2,
                    "rewards/margins": 0.3, "rewards/accuracies": 0.5, "grad_norm": 3.0})
            };
            lines(&folder.join("steps.jsonl"), (1..6).map(step));
            if round == 1 {
                lines(&folder.join("before.jsonl"), (0..8).map(sample));
                lines(&folder.join("after.jsonl"), (0..8).map(sample));
                let pair = |i: usize| {
                    json!({"id": format!("p{i}"), "prompt": "x", "chosen": "good one", "rejected": "bad",
                        "score_chosen": 2.0, "score_rejected": -1.0, "source": (["generated", "replay"][i % 2])})
                };
                lines(&folder.join("pairs.jsonl"), (0..10).map(pair));
                let stats = json!({"alpha": 0.25, "gap": 0.5, "curve": [[0.0, 9.0], [0.25, 0.5], [0.5, -3.0]]});
                fs::write(folder.join("pairs.stats.json"), stats.to_string()).unwrap();
                let row = json!({"model": "m", "group": "all", "win_rate": 51.5, "win_rate_low": 45.0, "win_rate_high": 58.0,
                    "length_controlled_winrate": 49.25, "n_total": 200, "avg_length": 900, "lc_form": "length_controlled_minimal"});
                lines(&folder.join("win-rate.jsonl"), [row]);
                fs::write(
                    folder.join("commands.sh"),
                    "dice-gen --model x && echo '<done>'\n",
                )
                .unwrap();
            }
        }
        let policy = dir.join("policy-1");
        fs::create_dir(&policy).unwrap();
        let state = json!({"model": "abc", "settings": {"objective": {"beta": 0.1}}, "log_history": [{"step": 1}]});
        fs::write(policy.join("trainer_state.json"), state.to_string()).unwrap();
    }

    #[test]
    fn a_run_becomes_one_page_with_all_its_figures() {
        let dir = tempfile::tempdir().unwrap();
        make_run(dir.path());
        let page = text("report", [dir.path().to_str().unwrap()]).unwrap();
        for title in [
            "Length of responses",
            "Implicit reward",
            "Loss",
            "Margin",
            "Accuracy",
            "Gradient norm",
            "Drift of chosen and rejected",
            "Mix of pairs",
            "Lengths at α = 0",
            "Lengths as trained on",
            "Scores at α = 0",
            "Scores as trained on",
            "Length gap by α",
            "Reward against length",
        ] {
            assert!(
                page.contains(&format!("<strong>{title}</strong>")),
                "{title}"
            );
        }
        assert_eq!(
            page.matches("<figure>").count(),
            page.matches("<svg").count()
        );
        assert_eq!(page.matches("<figure>").count(), 2 + 4 + 2 + 1 + 4 + 1 + 2);
        for text in [
            "51.50 (45.00 … 58.00)",
            "49.25",
            "0.6900 → 0.6500",
            "1.00 → 1.00",
            "-2.00 → -2.00",
            "α = 0.25, gap 0.50",
            "policy: abc",
            "&lt;done&gt;",
            "prompt &lt;0&gt;",
            "before round 1",
            "after round 1",
        ] {
            assert!(page.contains(text), "{text}");
        }
        // Nothing from outside, no script, no markup from the data.
        for foreign in [
            "<script",
            "http-equiv",
            "src=",
            "@import",
            "url(",
            "<b>",
            "NaN",
            "log_history",
        ] {
            assert!(!page.contains(foreign), "{foreign}");
        }
    }

    #[test]
    fn a_browser_draws_it_without_complaint() {
        let names = ["chromium", "chromium-browser", "google-chrome"];
        let has = |name: &&&str| {
            let version = Command::new(name).arg("--version").output();
            version.is_ok_and(|output| output.status.success())
        };
        let Some(browser) = names.iter().find(has) else {
            eprintln!("skipped: needs one of {names:?}");
            return;
        };
        let dir = tempfile::tempdir().unwrap();
        make_run(dir.path());
        let page = dir.path().join("report.html");
        fs::write(
            &page,
            text("report", [dir.path().to_str().unwrap()]).unwrap(),
        )
        .unwrap();
        // Sums up what was drawn, in the page's own words: the title is printed with the page.
        let check = "<script>addEventListener('load', () => { \
            const drawn = [...document.querySelectorAll('figure svg')].filter(s => s.getBoundingClientRect().width > 100 \
                && s.querySelectorAll('polyline, circle, rect, line').length > 3).length; \
            const wide = document.documentElement.scrollWidth > innerWidth; \
            document.title = `drawn ${drawn} wide ${wide}`; })</script>";
        let text = fs::read_to_string(&page).unwrap();
        let figures = text.matches("<figure>").count();
        let checked = dir.path().join("checked.html");
        fs::write(
            &checked,
            text.replace("</body>", &format!("{check}</body>")),
        )
        .unwrap();
        for width in [360, 1400] {
            let profile = dir.path().join(format!("profile-{width}"));
            let output = Command::new(browser)
                .args([
                    "--headless=new",
                    "--no-sandbox",
                    "--disable-gpu",
                    "--enable-logging=stderr",
                    "--dump-dom",
                ])
                .arg(format!("--user-data-dir={}", profile.display()))
                .arg(format!("--window-size={width},900"))
                .arg(format!("file://{}", checked.display()))
                .output()
                .unwrap();
            let (dom, log) = (
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr),
            );
            assert!(
                dom.contains(&format!("<title>drawn {figures} wide false</title>")),
                "{width}: {log}"
            );
            assert!(!log.contains("CONSOLE"), "{log}");
        }
    }

    #[test]
    fn one_rounds_folder_will_do_and_an_empty_one_will_not() {
        let dir = tempfile::tempdir().unwrap();
        make_run(dir.path());
        let page = text("report", [dir.path().join("round-2").to_str().unwrap()]).unwrap();
        assert!(page.contains("<strong>Loss</strong>") && page.contains("in round 1"));
        let empty = tempfile::tempdir().unwrap();
        let err = text("report", [empty.path().to_str().unwrap()])
            .unwrap_err()
            .to_string();
        assert!(err.contains("there is no round-1"), "{err}");
        fs::write(
            dir.path().join("round-2/scored.jsonl"),
            "{\"prompt\":\"p\"}\n",
        )
        .unwrap();
        let err = text("report", [dir.path().to_str().unwrap()])
            .unwrap_err()
            .to_string();
        assert!(
            err.ends_with("scored.jsonl:1: field \"response\" is missing"),
            "{err}"
        );
    }
}
