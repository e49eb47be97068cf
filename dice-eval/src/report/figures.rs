//! What is drawn: training, and the choice of pairs.

use anyhow::Result;
use maud::{Markup, html};
use serde_json::Value;

use super::plot::{Mark, Plot, Series, histogram};
use super::rounds::{Pairs, Round, Samples};
use crate::format::{number, significant};

/// Figures side by side, as many as there is room for.
pub fn figures(plots: Vec<Plot>) -> Result<Markup> {
    let drawn: Vec<Markup> = plots.iter().map(Plot::markup).collect::<Result<_>>()?;
    Ok(html! { div.figures { @for figure in drawn { (figure) } } })
}

/// A figure of each round that has it, with the round's place on an axis.
pub fn whole_rounds<T>(
    rounds: &[Round],
    of: impl Fn(&Round) -> Option<T>,
) -> impl Iterator<Item = (f64, T)> {
    let found = rounds
        .iter()
        .zip(1..)
        .map(move |(round, at)| Some((f64::from(at), of(round)?)));
    found.flatten()
}

pub fn training(rounds: &[Round]) -> Result<Markup> {
    let course = |title, axis, column: &str, level: Option<f64>, note: &str| {
        let of_rounds = rounds.iter().enumerate();
        let series = of_rounds.map(|(i, round)| {
            Series::new(i, round.name.clone(), Mark::Course(round.course(column)))
        });
        Plot {
            title,
            axes: ["step", axis],
            series: level.map(Series::level).into_iter().chain(series).collect(),
            note: note.to_owned(),
        }
    };
    let mut plots = vec![
        course(
            "Loss",
            "loss",
            "loss",
            Some(std::f64::consts::LN_2),
            "Level: ln 2, where DPO's sigmoid loss starts.",
        ),
        course("Margin", "reward margin", "rewards/margins", Some(0.0), ""),
        course(
            "Accuracy",
            "share of pairs",
            "rewards/accuracies",
            Some(0.5),
            "Pairs of the batch whose chosen response has the higher reward. Level: chance.",
        ),
        course(
            "Gradient norm",
            "norm",
            "grad_norm",
            None,
            "Before clipping.",
        ),
    ];
    let drift = rounds.iter().map(|round| {
        let side =
            |at, name: &str, column| Series::new(at, name, Mark::Course(round.course(column)));
        Plot {
            title: "Drift of chosen and rejected",
            axes: ["step", "β × change of log-prob"],
            series: vec![
                Series::level(0.0),
                side(0, "chosen", "rewards/chosen"),
                side(1, "rejected", "rewards/rejected"),
            ],
            note: format!(
                "In {}. Where both fall, the model unlearns both.",
                round.name
            ),
        }
    });
    plots.extend(drift);
    Ok(html! {
        p.note { "Faint: each step; bold: the moving mean over a tenth of the steps." }
        (figures(plots)?)
    })
}

pub fn pairs(rounds: &[Round]) -> Result<Markup> {
    let of_rounds: Vec<(&str, Markup)> = rounds
        .iter()
        .filter(|round| round.pairs.is_some() || round.stats.is_some() || round.samples.is_some())
        .map(|round| Ok((round.name.as_str(), figures(choice(round))?)))
        .collect::<Result<_>>()?;
    Ok(html! {
        (figures(vec![mix(rounds)])?)
        @for (name, figures) in of_rounds { h3 { (name) } (figures) }
    })
}

/// How a round's pairs came to be.
fn choice(round: &Round) -> Vec<Plot<'_>> {
    let mut plots = vec![];
    if let Some(pairs) = &round.pairs {
        // Lengths have one axis at α = 0 and as trained on; scores are not of one kind.
        let lengths = [&pairs.lengths_without, &pairs.lengths]
            .map(|sides| sides.concat())
            .concat();
        let [scores_without, scores] =
            [&pairs.scores_without, &pairs.scores].map(|sides| sides.concat());
        for (title, axis, sides, over) in [
            (
                "Lengths at α = 0",
                "characters",
                &pairs.lengths_without,
                &lengths,
            ),
            (
                "Lengths as trained on",
                "characters",
                &pairs.lengths,
                &lengths,
            ),
            (
                "Scores at α = 0",
                "reward",
                &pairs.scores_without,
                &scores_without,
            ),
            (
                "Scores as trained on",
                "reward less α times length",
                &pairs.scores,
                &scores,
            ),
        ] {
            plots.push(Plot {
                title,
                axes: [axis, "pairs"],
                series: histogram(["chosen", "rejected"], sides, over),
                note: String::new(),
            });
        }
    }
    plots.extend(round.stats.as_ref().and_then(curve));
    plots.extend(round.samples.as_ref().map(scatter));
    plots
}

fn mix(rounds: &[Round]) -> Plot<'static> {
    let bars = |shift: f64, count: fn(&Pairs) -> usize| {
        let all = whole_rounds(rounds, |round| Some(count(round.pairs.as_ref()?) as f64));
        let bars = all.map(|(at, count)| (at + shift, at + shift + 0.35, count));
        Mark::Bars(bars.collect())
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
fn curve(stats: &Value) -> Option<Plot<'static>> {
    let alpha = stats.get("alpha")?.as_f64()?;
    let steps = stats.get("curve")?.as_array()?.iter();
    let steps: Vec<(f64, f64)> = steps
        .filter_map(|step| Some((step.get(0)?.as_f64()?, step.get(1)?.as_f64()?)))
        .collect();
    // The last corners are far out, where the gap hardly moves: they would press the rest against the axis.
    let far = steps.get(steps.len() * 9 / 10)?.0.max(3.0 * alpha);
    let steps = steps.into_iter().filter(|step| step.0 <= far).collect();
    let gap = stats.get("gap").and_then(Value::as_f64);
    let name = match stats.get("alpha_from").and_then(Value::as_str) {
        Some("given") => "the α given",
        _ => "α*",
    };
    Some(Plot {
        title: "Length gap by α",
        axes: ["α", "chosen − rejected, mean"],
        series: vec![
            Series::level(0.0),
            Series::new(0, "gap", Mark::Steps(steps)),
            Series::new(1, name, Mark::At(alpha)),
        ],
        note: format!(
            "α = {}, where the gap is {}.",
            significant(Some(alpha), 4),
            number(gap, 2)
        ),
    })
}

fn scatter(samples: &Samples) -> Plot<'static> {
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
            "Correlation {} over all, {} within prompts{}.",
            number(samples.figures.reward_length_correlation, 2),
            number(samples.figures.reward_length_correlation_within_prompts, 2),
            match every {
                1 => String::new(),
                n => format!("; every {n}th sample is drawn"),
            }
        ),
    }
}
