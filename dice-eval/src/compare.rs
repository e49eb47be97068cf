//! `dice-eval compare`: two models judged against one baseline on the same prompts. Is the difference more than chance?

use std::collections::HashMap;
use std::path::PathBuf;

use anyhow::{Result, bail, ensure};
use common::metrics::bootstrap::{interval, resample};
use common::metrics::length_control::{Weights, controlled};
use common::metrics::spread;
use common::program;
use serde_json::{Map, json, to_value};

use crate::annotations::Annotations;
use crate::covariates::{LengthControl, Prepared};
use crate::format::{Line, To, points};
use crate::win_rate::Fitted;

/// Difference between two models' win rates over one baseline, prompt by prompt, with a paired interval
///
/// Reads two files of annotations (see `dice-eval win-rate --help`), joins them by prompt and gives B minus A, in points,
/// for the raw and the length-controlled win rate. The 95% intervals are of the difference itself: prompts are resampled for
/// both models at once and both length models are fitted again. "win_rate_verdict" and "length_controlled_verdict" say
/// "better" or "worse" of B only where an interval leaves 0 out, else "undecided": a difference that other prompts might
/// turn round.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  dice-eval compare round-1.jsonl round-2.jsonl")]
pub struct Args {
    #[command(flatten)]
    control: LengthControl,
    #[command(flatten)]
    to: To,
    /// Annotations of the first model
    #[arg(value_name = "A")]
    a: PathBuf,
    /// Annotations of the second model, against the same baseline
    #[arg(value_name = "B")]
    b: PathBuf,
}

pub fn run(args: Args) -> Result<()> {
    let covariates = args.control.read("")?;
    let files = [&args.a, &args.b];
    if files.iter().all(|file| file.as_os_str() == "-") {
        bail!("A and B cannot both come from stdin");
    }
    let annotations = [
        Annotations::read(&args.a, "")?,
        Annotations::read(&args.b, "")?,
    ];
    let shared = shared(&annotations)?;
    let mut fitted = vec![];
    for (side, annotations) in annotations.iter().enumerate() {
        let prepared = covariates.prepare(annotations)?;
        let pairs = shared.iter().map(|places| prepared.pairs[places[side]]);
        let prepared = Prepared {
            pairs: pairs.collect(),
            ..prepared
        };
        fitted.push(Fitted::of(prepared, annotations, &args.control)?);
    }
    ensure!(
        fitted[0].form() == fitted[1].form(),
        "the difficulties cover the prompts of one file only: leave --difficulty out to control both for length alone"
    );
    let line = line(&annotations, &fitted, &args.control)?;
    args.to.write(&[line])
}

/// The places in both files of the prompts that both judge, in A's order.
fn shared(annotations: &[Annotations; 2]) -> Result<Vec<[usize; 2]>> {
    let [a, b] = annotations;
    if let (Some(one), Some(other)) = (&a.baseline, &b.baseline) {
        ensure!(
            one == other,
            "the models were judged against different baselines, {one} and {other}: their win rates do not compare"
        );
    }
    let in_b: HashMap<_, usize> = b
        .rows
        .iter()
        .zip(0..)
        .map(|(row, at)| (&row.key, at))
        .collect();
    let both = a.rows.iter().zip(0..).filter_map(|(row, at)| {
        let other = *in_b.get(&row.key)?;
        let judged = row.win.is_some() && b.rows[other].win.is_some();
        judged.then_some([at, other])
    });
    let both: Vec<_> = both.collect();
    ensure!(
        !both.is_empty(),
        "{} and {} have no judged prompt in common",
        a.file,
        b.file
    );
    Ok(both)
}

fn line(
    annotations: &[Annotations; 2],
    fitted: &[Fitted],
    control: &LengthControl,
) -> Result<Line> {
    let n = fitted[0].pairs().len();
    let win = |side: usize, i: usize| fitted[side].pairs()[i].win.expect("judged on both sides");
    let raw = |counts: &[f64]| -> [f64; 2] {
        [0, 1].map(|side| {
            let sum: f64 = (0..n).map(|i| counts[i] * win(side, i)).sum();
            100.0 * sum / n as f64
        })
    };
    let lc = |weights: [Weights; 2], counts: &[f64]| -> [f64; 2] {
        [0, 1].map(|side| {
            let pairs = fitted[side].pairs().iter().zip(counts);
            let sum: f64 = pairs
                .map(|(p, c)| c * weights[side].predict(p.difficulty))
                .sum();
            100.0 * sum / n as f64
        })
    };
    let resamples = resample(n, control.bootstrap, control.seed, |counts| {
        let weights = [fitted[0].refit(counts), fitted[1].refit(counts)];
        let ([raw_a, raw_b], [lc_a, lc_b]) = (raw(counts), lc(weights, counts));
        Some([raw_b - raw_a, lc_b - lc_a])
    });
    let over = |which: usize| interval(resamples.iter().map(|d| d[which]));

    let once = vec![1.0; n];
    let raw = raw(&once);
    let lc = lc([fitted[0].weights, fitted[1].weights], &once);
    let differences: Vec<f64> = (0..n).map(|i| win(1, i) - win(0, i)).collect();
    let error = spread(&differences).map(|s| 100.0 * s.standard_deviation / (n as f64).sqrt());
    // From the weights: how often B would beat A itself, at equal lengths.
    let against = fitted[1].weights.against(&fitted[0].weights);
    let head_to_head = controlled(&against, fitted[0].pairs().iter().map(|p| p.difficulty));

    let names = [annotations[0].name(), annotations[1].name()];
    let mut json = Map::new();
    let mut put = |name: &str, value| json.insert(name.to_owned(), value);
    put("a", json!(names[0]));
    put("b", json!(names[1]));
    put("baseline", json!(annotations[0].baseline));
    put("n_total", json!(n));
    let mut cells = vec![("prompts", n.to_string())];
    for (name, head, [a, b], interval) in [
        ("win_rate", "win rate, B − A", raw, over(0)),
        ("length_controlled", "length-controlled, B − A", lc, over(1)),
    ] {
        put(&format!("{name}_a"), json!(a));
        put(&format!("{name}_b"), json!(b));
        put(&format!("{name}_difference"), json!(b - a));
        if name == "win_rate" {
            put("win_rate_difference_standard_error", json!(error));
        }
        put(
            &format!("{name}_difference_low"),
            json!(interval.map(|i| i[0])),
        );
        put(
            &format!("{name}_difference_high"),
            json!(interval.map(|i| i[1])),
        );
        put(&format!("{name}_verdict"), json!(verdict(interval)));
        cells.push((head, points(Some(b - a), interval, 2)));
        cells.push(("B is", verdict(interval).to_owned()));
    }
    put("head_to_head", json!(head_to_head.map(|(rate, _)| rate)));
    put("lc_form", to_value(fitted[0].form())?);
    put("lc_c_a", json!(fitted[0].c));
    put("lc_c_b", json!(fitted[1].c));
    let warnings = warnings(annotations, fitted, n);
    warnings.iter().for_each(program::say);
    put("warnings", json!(warnings));
    Ok(Line { json, cells })
}

/// What the interval of B − A says of B.
fn verdict(interval: Option<[f64; 2]>) -> &'static str {
    match interval {
        Some([low, _]) if low > 0.0 => "better",
        Some([_, high]) if high < 0.0 => "worse",
        _ => "undecided",
    }
}

fn warnings(annotations: &[Annotations; 2], fitted: &[Fitted], n: usize) -> Vec<String> {
    let mut warnings = vec![];
    for (annotations, fitted) in annotations.iter().zip(fitted) {
        let of = |remark: &String| format!("{}: {remark}", annotations.file);
        warnings.extend(fitted.prepared.remarks.iter().map(of));
        warnings.extend(fitted.pull_of_penalty().as_ref().map(of));
        let dropped = annotations.rows.len() - n;
        if dropped > 0 {
            warnings.push(format!(
                "{}: {dropped} rows without a judged counterpart are left out",
                annotations.file
            ));
        }
    }
    let [a, b] = annotations;
    if a.judges != b.judges {
        warnings.push("the two files were not judged by the same judge".into());
    }
    warnings
}

#[cfg(test)]
mod tests {
    use crate::testing::{alpaca_eval, eval};
    use serde_json::{Value, json};

    fn annotations(rows: impl IntoIterator<Item = (usize, f64)>, model: &str) -> String {
        let row = |(i, preference): (usize, f64)| {
            json!({"instruction": format!("i{i}"), "len_1": 100 + i * 5 % 60, "len_2": 90 + i * 7 % 80, "generator_1": "base",
                "generator_2": model, "preference": preference})
            .to_string()
                + "\n"
        };
        rows.into_iter().map(row).collect()
    }

    fn compare(a: &str, b: &str) -> anyhow::Result<Value> {
        let dir = tempfile::tempdir().unwrap();
        let paths = [a, b].map(|text| {
            let path = dir
                .path()
                .join(format!("{}.jsonl", blake3::hash(text.as_bytes()).to_hex()));
            std::fs::write(&path, text).unwrap();
            path.display().to_string()
        });
        let words = [&paths[0], &paths[1], "--bootstrap", "300"];
        Ok(eval("compare", words)?.remove(0))
    }

    #[test]
    fn chance_is_not_sold_as_progress() {
        // 200 prompts, two of them turned: one point.
        let a = annotations((0..200).map(|i| (i, 1.0 + f64::from(i % 2 == 0))), "a");
        let b = annotations(
            (0..200).map(|i| (i, 1.0 + f64::from(i % 2 == 0 || [1, 3].contains(&i)))),
            "b",
        );
        let got = compare(&a, &b).unwrap();
        assert!(
            (got["win_rate_difference"].as_f64().unwrap() - 1.0).abs() < 1e-9,
            "{got}"
        );
        assert_eq!(got["win_rate_verdict"], "undecided");
        assert_eq!(got["length_controlled_verdict"], "undecided");
        // Pairing matters: unpaired, the difference's error would be five points.
        assert!(
            got["win_rate_difference_standard_error"].as_f64().unwrap() < 0.8,
            "{got}"
        );

        let better = annotations(
            (0..200).map(|i| (i, 1.0 + f64::from(i % 2 == 0 || i % 3 == 0))),
            "b",
        );
        let got = compare(&a, &better).unwrap();
        assert_eq!(got["win_rate_verdict"], "better");
        assert_eq!(got["length_controlled_verdict"], "better");
        assert!(got["head_to_head"].as_f64().unwrap() > 55.0);
        assert_eq!(compare(&better, &a).unwrap()["win_rate_verdict"], "worse");
    }

    #[test]
    fn rows_are_joined_by_prompt_whatever_their_order() {
        let a = annotations((0..20).map(|i| (i, 1.0 + (i % 4) as f64 / 4.0)), "a");
        let b = annotations((5..25).rev().map(|i| (i, 1.0 + (i % 4) as f64 / 4.0)), "b");
        let got = compare(&a, &b).unwrap();
        assert_eq!(got["n_total"], 15);
        assert!(got["win_rate_difference"].as_f64().unwrap().abs() < 1e-12);
        assert!(
            got["warnings"]
                .to_string()
                .contains("5 rows without a judged counterpart"),
            "{got}"
        );
        let other = b.replace("\"base\"", "\"other\"");
        let message = compare(&a, &other).unwrap_err().to_string();
        assert!(
            message.contains("different baselines, base and other"),
            "{message}"
        );
        let none = annotations([(99, 1.0)], "c");
        assert!(
            compare(&a, &none)
                .unwrap_err()
                .to_string()
                .contains("no judged prompt")
        );
    }

    #[test]
    fn real_models_differ() {
        let Some(data) = alpaca_eval() else { return };
        let path = |name: &str| data.join(name).display().to_string();
        let [a, b] = ["alpaca-7b", "claude-2.1"].map(|m| path(&format!("annotations/{m}.jsonl")));
        let (difficulty, baselines) = (
            path("instruction_difficulty.csv"),
            path("gamed_baseline.csv"),
        );
        let words = [
            &a,
            &b,
            "--difficulty",
            &difficulty,
            "--baselines",
            &baselines,
            "--bootstrap",
            "100",
        ];
        let got = eval("compare", words).unwrap().remove(0);
        let difference = got["length_controlled_difference"].as_f64().unwrap();
        // The leaderboard's 25.25 − 5.88.
        assert!((difference - 19.376).abs() < 0.2, "{got}");
        assert_eq!(got["length_controlled_verdict"], "better");
        assert_eq!(got["n_total"], 805);
    }

    /// How often the intervals of B − A hold the truth, raw and length-controlled, over so many invented pairs of models
    /// judged on so many prompts. Both models' luck hangs together, as on real prompts, and longer wins more.
    fn coverage(worlds: u32, prompts: usize, more: &[&str]) -> [f64; 2] {
        let mut random = rand_mt::Mt64::new(1);
        let mut uniform = move || (random.next_u64() >> 11) as f64 / (1_u64 << 53) as f64;
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        let strengths = [-0.3, 0.1];
        let (mut intervals, mut raw_truth) = (vec![], 0.0);
        for world in 0..worlds {
            let luck: Vec<f64> = (0..prompts).map(|_| uniform()).collect();
            let mut texts = [String::new(), String::new()];
            for (side, strength) in strengths.into_iter().enumerate() {
                // The sum of four uniforms is normal enough; B is longer on average. Its deviation is 150 / √3.
                let lengths: Vec<f64> = (0..prompts)
                    .map(|_| {
                        (0..4).map(|_| 75.0 * (2.0 * uniform() - 1.0)).sum::<f64>()
                            + 40.0 * side as f64
                    })
                    .map(|delta| (1000.0 + delta).round())
                    .collect();
                for (i, length) in lengths.into_iter().enumerate() {
                    let s = (1000.0 - length) / (150.0 / 3_f64.sqrt());
                    let win = sigmoid(strength - s.tanh());
                    raw_truth += 100.0 * win * (2.0 * side as f64 - 1.0);
                    let draw = if uniform() < 0.7 { luck[i] } else { uniform() };
                    texts[side] += &json!({"id": i, "len_1": 1000, "len_2": length, "generator_1": "base", "generator_2": side.to_string(),
                        "preference": if draw < win { 2 } else { 1 }}).to_string();
                    texts[side].push('\n');
                }
            }
            let dir = tempfile::tempdir().unwrap();
            let paths = [0, 1].map(|side| {
                let path = dir.path().join(format!("{side}.jsonl"));
                std::fs::write(&path, &texts[side]).unwrap();
                path.display().to_string()
            });
            let seed = world.to_string();
            let words = [paths[0].as_str(), &paths[1], "--seed", &seed];
            let words = words.into_iter().chain(more.iter().copied());
            let got = eval("compare", words).unwrap().remove(0);
            intervals.push(["win_rate", "length_controlled"].map(|name| {
                ["low", "high"].map(|end| got[format!("{name}_difference_{end}")].as_f64().unwrap())
            }));
        }
        let [a, b] = strengths.map(|strength| 100.0 * sigmoid(strength));
        let truth = [raw_truth / (f64::from(worlds) * prompts as f64), b - a];
        [0, 1].map(|which| {
            let holds =
                |of: &&[[f64; 2]; 2]| of[which][0] <= truth[which] && truth[which] <= of[which][1];
            intervals.iter().filter(holds).count() as f64 / f64::from(worlds)
        })
    }

    #[test]
    fn intervals_hold_the_truth_as_often_as_they_say() {
        // Of 200 worlds, 95% have a standard error of 1.5 points; few resamples make intervals a little short.
        let shares = coverage(200, 80, &["--bootstrap", "200", "--lc-c", "100"]);
        let right = |share: &f64| (0.895..=0.995).contains(share);
        assert!(shares.iter().all(right), "{shares:?}");
    }

    #[test]
    #[ignore = "minutes: the figures of docs/evaluation.md"]
    fn coverage_at_length() {
        for prompts in [50, 200] {
            let [chosen, free] =
                [&[][..], &["--lc-c", "1e4"]].map(|more| coverage(1000, prompts, more));
            println!("{prompts} prompts: C chosen {chosen:?}, C = 10⁴ {free:?}");
        }
    }
}
