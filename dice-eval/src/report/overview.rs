//! What a reader looks at first: one line for each round, then the figures behind it.

use anyhow::Result;
use common::metrics::{Estimate, SampleFigures, spread};
use maud::{Markup, html};
use serde_json::Value;

use super::figures::{figures, whole_rounds};
use super::plot::{Mark, Plot, Series};
use super::rounds::{Round, Samples};
use crate::format::{average, estimate, number, percent, points, significant};

pub fn part(rounds: &[Round]) -> Result<Markup> {
    let details = |title: &str, table: Markup| html! { details { summary { (title) } (table) } };
    let wins = wins(rounds);
    Ok(html! {
        (summary(rounds))
        (figures(vec![lengths(rounds), rewards(rounds), win_rates(rounds)])?)
        (details("All figures of the samples", samples(rounds)))
        @if let Some(wins) = wins { (details("All win rates", wins)) }
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
                        @if at == 0 { th scope="row" { (cell) } } @else { td { (cell.replace('-', "−")) } }
                    }
                } } }
            }
        }
    }
}

fn summary(rounds: &[Round]) -> Markup {
    let heads = [
        "round",
        "win rate",
        "length-controlled",
        "characters",
        "truncated",
        "reward",
        "chosen log-prob",
        "rejected log-prob",
        "α",
        "γ",
    ];
    let row = |round: &Round| {
        let change = |of: fn(&SampleFigures) -> Option<f64>, scale: f64, decimals: usize| {
            let value = |samples: &Option<Samples>| {
                samples
                    .as_ref()
                    .and_then(|s| of(&s.figures))
                    .map(|v| v * scale)
            };
            match (value(&round.before), value(&round.after)) {
                (Some(before), Some(after)) => format!("{before:.decimals$} → {after:.decimals$}"),
                _ => number(value(&round.samples), decimals),
            }
        };
        let win = round.win_rates.iter().find(|row| row["group"] == "all");
        let rate = |name: &str, interval: &str| {
            win.map_or("–".into(), |row| rate(row, name, interval, 1))
        };
        let drift = |column: &str| number(round.drift(column), 2);
        let of_stats = |name: &str| {
            round
                .stats
                .as_ref()
                .and_then(|stats| stats.pointer(name)?.as_f64())
        };
        vec![
            round.name.clone(),
            rate("win_rate", "win_rate"),
            rate("length_controlled_winrate", "length_controlled"),
            change(|f| Some(f.chars?.mean), 1.0, 0),
            change(|f| Some(f.truncated?.value), 100.0, 1),
            change(|f| Some(f.reward?.value), 1.0, 2),
            drift("rewards/chosen"),
            drift("rewards/rejected"),
            significant(of_stats("/alpha"), 3),
            number(round.pairs.as_ref().map(|pairs| pairs.gamma()), 2),
        ]
    };
    let rows: Vec<_> = rounds.iter().map(row).collect();
    html! {
        (table("The policy before → after each round's training", &heads, &rows))
        p.note {
            "Win rates: of after against before, percent, with 95% intervals; – where nothing judged. Characters, truncated (percent) \
             and reward: means over the check prompts; without them, over the samples that became pairs. Each round's reward has a \
             policy and a reference of its own: it compares within a round only. Log-probs: how far training moved those of the \
             batches' responses, mean over the last tenth of its steps, nats. γ: the share of replayed pairs."
        }
    }
}

/// A rate with its interval, in percent.
fn rate(row: &Value, name: &str, interval: &str, decimals: usize) -> String {
    let [rate, low, high] = [
        name.to_owned(),
        format!("{interval}_low"),
        format!("{interval}_high"),
    ]
    .map(|field| row.get(field)?.as_f64());
    points(rate, low.zip(high).map(|(low, high)| [low, high]), decimals)
}

fn samples(rounds: &[Round]) -> Markup {
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
    table("Means, with 95% intervals in brackets", &heads, &rows)
}

fn wins(rounds: &[Round]) -> Option<Markup> {
    let heads = [
        "win rate",
        "raw",
        "length-controlled",
        "form",
        "judged",
        "average length",
    ];
    let all = rounds
        .iter()
        .flat_map(|round| round.win_rates.iter().map(move |row| (round, row)));
    let rows = all.map(|(round, row)| {
        let text = |field: &str| {
            let text = row.get(field).and_then(Value::as_str);
            text.unwrap_or("–").to_owned()
        };
        let count = |field: &str| number(row.get(field).and_then(Value::as_f64), 0);
        vec![
            format!("{}: {}, {}", round.name, text("model"), text("group")),
            rate(row, "win_rate", "win_rate", 2),
            rate(row, "length_controlled_winrate", "length_controlled", 2),
            text("lc_form"),
            count("n_total"),
            count("avg_length"),
        ]
    });
    let rows: Vec<_> = rows.collect();
    let caption = "Of after against before, percent, with 95% intervals";
    (!rows.is_empty()).then(|| table(caption, &heads, &rows))
}

/// Intervals by round of a figure of the check prompts (else of all samples), before and after.
fn by_round(rounds: &[Round], of: fn(&SampleFigures) -> Option<Estimate>) -> Vec<Series> {
    let series = |at: usize, name: &str, shift: f64, samples: fn(&Round) -> Option<&Samples>| {
        let all = whole_rounds(rounds, |round| of(&samples(round)?.figures));
        let shifted = all.map(|(at, e)| (at + shift, e.low, e.value, e.high));
        Series::new(at, name, Mark::Intervals(shifted.collect()))
    };
    vec![
        series(0, "samples for pairs", -0.1, |round| round.samples.as_ref()),
        series(1, "before training", 0.0, |round| round.before.as_ref()),
        series(2, "after training", 0.1, |round| round.after.as_ref()),
    ]
}

fn lengths(rounds: &[Round]) -> Plot<'static> {
    Plot {
        title: "Length of responses",
        axes: ["round", "mean characters"],
        series: by_round(rounds, |f| f.mean_chars),
        note: "Mean and 95% interval; before and after training: of the check prompts.".into(),
    }
}

fn rewards(rounds: &[Round]) -> Plot<'static> {
    Plot {
        title: "Implicit reward",
        axes: ["round", "mean reward"],
        series: by_round(rounds, |f| f.reward),
        note: "Mean and 95% interval; one pair of models scores all of a round.".into(),
    }
}

fn win_rates(rounds: &[Round]) -> Plot<'static> {
    let series = |at: usize, name: &str, shift: f64, [rate, interval]: [&str; 2]| {
        let all = whole_rounds(rounds, |round| {
            let row = round.win_rates.iter().find(|row| row["group"] == "all")?;
            let figure = |field: String| row.get(field)?.as_f64();
            let value = figure(rate.into())?;
            // Without resamples there is no interval.
            let [low, high] =
                ["low", "high"].map(|end| figure(format!("{interval}_{end}")).unwrap_or(value));
            Some((low, value, high))
        });
        let shifted = all.map(|(at, (low, value, high))| (at + shift, low, value, high));
        Series::new(at, name, Mark::Intervals(shifted.collect()))
    };
    Plot {
        title: "Win rate of after against before",
        axes: ["round", "percent"],
        series: vec![
            Series::level(50.0),
            series(3, "raw", -0.05, ["win_rate", "win_rate"]),
            series(
                4,
                "length-controlled",
                0.05,
                ["length_controlled_winrate", "length_controlled"],
            ),
        ],
        note: "95% intervals; one that holds 50 has not told better from worse.".into(),
    }
}

impl Round {
    /// The mean change of a log-prob over the last tenth of the steps, from the reward of that name.
    fn drift(&self, reward: &str) -> Option<f64> {
        let beta = self
            .trainer
            .as_ref()?
            .pointer("/settings/objective/beta")?
            .as_f64()?;
        let course = self.course(reward);
        let last = &course[course.len() - course.len().div_ceil(10)..];
        let values: Vec<f64> = last.iter().map(|(_, value)| *value).collect();
        (beta > 0.0).then_some(spread(&values)?.mean / beta)
    }
}
