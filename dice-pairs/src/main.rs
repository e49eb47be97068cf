//! dice-pairs: of each prompt's scored samples, the best and the worst become a preference pair; offline pairs are
//! mixed back in.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, anyhow, bail};
use clap::Parser;
use common::files::{parent, write_aside};
use common::flags;
use common::jsonl::{Files, Opened, Output, rows};
use common::pairs::{Length, Mix, Replay, Rules, Samples, Spool, mix};
use common::program;
use common::progress::Progress;
use common::records::Split;
use common::run::settings;
use serde_json::json;

mod stats;

/// Turn scored samples into preference pairs
///
/// Reads what dice-score writes (rows with `prompt`, `response`, `reward`) and writes one row per prompt: its best
/// response as `chosen`, its worst as `rejected`, by the score r − α|y|: the reward r less a price α for each
/// character (or token) of length |y|. A policy's own reward tends to favour long answers; the default is the smallest
/// α ≥ 0 that brings chosen and rejected closest in mean length, found exactly at any scale of the rewards.
///
/// Left out, and counted on stderr by reason: truncated, too short and too long responses, repeated responses,
/// prompts with too few responses left, prompts whose best and worst score the same.
///
/// All input is read before anything is written, because α depends on all of it: memory holds only numbers for each
/// response that is kept; texts wait in an unnamed temporary file beside --output (else in TMPDIR). The rows of a prompt (same `id`, else same `prompt`) may come in any order.
///
/// Output: `id`, `prompt`, `chosen`, `rejected`, `score_chosen`, `score_rejected` (r − α|y|), `source` ("generated"
/// or "replay"), the samples' token ids and finish reasons, and the fields that all samples of the prompt agree on.
/// The policy that scored both becomes the reference of training: `ref` names it, `ref_chosen_logps` and
/// `ref_rejected_logps` are its log-probs. Generated pairs come first, in the order of their prompts; then offline
/// pairs, in the order of their file (dice-train shuffles).
#[derive(Parser, Debug)]
#[command(
    version,
    after_help = "Example:\n  dice-gen --model pi prompts.jsonl | dice-score --policy pi --ref ref \\\n    | dice-pairs --replay offline.jsonl --gamma 0.5 > pairs.jsonl"
)]
struct Args {
    #[command(flatten)]
    files: Files,

    /// Price of a unit of length, in reward per character or token; `auto` balances the lengths
    #[arg(long, value_name = "auto|NUMBER", default_value = "auto", value_parser = alpha)]
    alpha: Alpha,

    /// What length is counted in; tokens needs `token_ids` in the rows
    #[arg(long, value_enum, default_value = "chars")]
    length: Length,

    /// Offline preference pairs to mix in: TRL's `prompt`, `chosen`, `rejected`, as text or messages
    #[arg(long, value_name = "FILE")]
    replay: Option<PathBuf>,

    /// Take only the offline pairs whose prompt is in this part (by a stable hash, the same in every tool)
    #[arg(long, value_enum, default_value_t = Split::All, requires = "replay")]
    replay_split: Split,

    /// Share of the output, from 0 to 1, that comes from --replay; the output is the largest that keeps this share
    /// and repeats no prompt. (Below 1, where no offline pair can be used, all generated ones are written, with a warning)
    #[arg(long, default_value_t = 0.5, requires = "replay", value_parser = flags::share::<f64>)]
    gamma: f64,

    /// Drop prompts with fewer responses than this left
    #[arg(long, value_name = "N", default_value_t = 8)]
    min_samples: usize,

    /// Drop responses with fewer characters than this
    #[arg(long, value_name = "N", default_value_t = 3)]
    min_chars: usize,

    /// Drop responses with more characters than this
    #[arg(long, value_name = "N", default_value_t = 6700)]
    max_chars: usize,

    /// Keep responses that were cut at the token limit (`finish_reason` "length")
    #[arg(long)]
    keep_truncated: bool,

    /// Decides which pairs are taken where --gamma leaves some out
    #[arg(long, default_value_t = 0)]
    seed: u64,

    /// Write counts, α, its curve, lengths and rewards to FILE as one JSON object; replaces FILE
    #[arg(long, value_name = "FILE")]
    stats: Option<PathBuf>,
}

/// `--alpha`: given, or to be found.
#[derive(Clone, Copy, Debug)]
struct Alpha(Option<f64>);

fn alpha(text: &str) -> Result<Alpha> {
    if text == "auto" {
        return Ok(Alpha(None));
    }
    let fits = |x| x >= 0.0;
    flags::number(text, fits, "\"auto\" or a number not below 0").map(|alpha| Alpha(Some(alpha)))
}

fn main() -> ExitCode {
    program::main(run)
}

fn run(args: Args) -> Result<()> {
    let stdin = Path::new("-");
    let files = &args.files.files;
    if args.replay.as_deref() == Some(stdin)
        && (files.is_empty() || files.iter().any(|f| f == stdin))
    {
        bail!("--replay and the samples cannot both come from stdin: name a FILE for one of them");
    }
    let mut output = match args.files.open(run_settings(&args))? {
        Opened::Ready(output) => output,
        Opened::AlreadyDone(done) => {
            let replay = args.replay.as_deref();
            let inputs: Vec<_> = replay.into_iter().chain(args.files.inputs()).collect();
            return done.confirm(|| Ok(serde_json::Map::new()), &inputs);
        }
    };
    output.begin(serde_json::Map::new())?;
    let progress = Progress::new("pairs", None);
    let output_file = args
        .files
        .to
        .output
        .as_deref()
        .filter(|path| *path != stdin);
    let spool = Spool::new(output_file.map(parent));
    let replay = read_replay(&args, &spool)?;
    let chosen = read_samples(&args, &spool, &progress)?.choose()?;
    let mut stats = stats::Stats::new(
        &chosen,
        replay.skipped(),
        args.length,
        args.alpha.0.is_none(),
    );
    for (reason, n) in chosen.skipped.0.iter().chain(&replay.skipped().0) {
        progress.skip(reason, *n);
    }
    // A stage that is killed as it starts leaves an empty pipe, and one whose responses were all cut nothing to choose from: no
    // reason to train on offline pairs alone.
    if args.replay.is_some() && args.gamma < 1.0 && chosen.pairs.is_empty() {
        let reasons = chosen
            .skipped
            .0
            .iter()
            .map(|(reason, n)| format!("{reason} {n}"));
        let why = match chosen.rows {
            0 => "the input has no rows".to_owned(),
            _ => format!(
                "no prompt gave a pair ({})",
                reasons.collect::<Vec<_>>().join(", ")
            ),
        };
        bail!("{why}; pairs of --replay alone are made by --gamma 1");
    }
    progress.note(format!(
        "alpha {}, mean length gap {:.2} (at alpha 0: {:.2})",
        chosen.alpha, stats.gap, stats.gap_at_zero
    ));
    let pairs = if args.replay.is_some() {
        let (ours, theirs) = (chosen.pairs.len(), replay.len());
        let mix = mix(chosen.pairs, replay, args.gamma, args.seed);
        report_mix(&progress, &mix, ours, theirs, args.gamma);
        stats.mixed(&mix, theirs, args.gamma);
        mix.pairs
    } else {
        chosen.pairs
    };

    skip_kept(&output, &pairs)?;
    let kept = output.kept_rows();
    progress.kept(kept);
    for pair in &pairs[kept as usize..] {
        output.write(&pair.fields()?)?;
        progress.add(1, 0);
    }
    if let Some(path) = &args.stats {
        // Before the output gets its name: where that is whole, the figures are too.
        write_aside(path, |part| stats.write(part))?;
    }
    output.finish()?;
    if pairs.is_empty() {
        progress.say("no pair is left");
    }
    progress.finish();
    Ok(())
}

/// What the pairs depend on besides the input.
fn run_settings(args: &Args) -> serde_json::Map<String, serde_json::Value> {
    let replay = args.replay.as_ref();
    settings(json!({
        "alpha": args.alpha.0, "length": args.length.name(),
        "min_samples": args.min_samples, "min_chars": args.min_chars, "max_chars": args.max_chars,
        "keep_truncated": args.keep_truncated,
        "gamma": replay.map(|_| args.gamma), "seed": replay.map(|_| args.seed),
        "replay_split": replay.map(|_| args.replay_split.name()),
    }))
}

fn read_samples(args: &Args, spool: &Spool, progress: &Progress) -> Result<Samples> {
    let rules = Rules {
        alpha: args.alpha.0,
        length: args.length,
        min_samples: args.min_samples,
        min_chars: args.min_chars,
        max_chars: args.max_chars,
        keep_truncated: args.keep_truncated,
    };
    let mut samples = Samples::new(rules, spool.clone());
    progress.read(0);
    for row in args.files.rows() {
        samples.add(&row?)?;
        progress.read(1);
    }
    Ok(samples)
}

fn read_replay(args: &Args, spool: &Spool) -> Result<Replay> {
    let mut replay = Replay::new(spool.clone());
    if let Some(file) = &args.replay {
        for row in rows(std::slice::from_ref(file)) {
            let row = row?;
            if args.replay_split.holds(&row.prompt().context("--replay")?) {
                replay.add(&row).context("--replay")?;
            }
        }
    }
    Ok(replay)
}

/// Says what the share cost, or why it could not be held.
fn report_mix(progress: &Progress, mix: &Mix, ours: usize, theirs: usize, gamma: f64) {
    let total = mix.generated + mix.replayed;
    progress.note(format!(
        "{} generated and {} replayed",
        mix.generated, mix.replayed
    ));
    let ours = ours - mix.repeated;
    progress.skip("generated pairs of a repeated prompt", mix.repeated as u64);
    let left_out = (ours - mix.generated) as u64;
    progress.skip("generated pairs left out to keep --gamma", left_out);
    // A share of n rows is met to within half a row.
    if (mix.replayed as f64 - gamma * total as f64).abs() > 0.5 {
        progress.say(format_args!(
            "--gamma {gamma} cannot be met: --replay has no usable pair"
        ));
    } else if left_out > 0 && mix.replayed == theirs && gamma < 1.0 {
        progress.say(format_args!(
            "--replay has only {theirs} usable pairs: at --gamma {gamma} that leaves out {left_out} of {ours} generated ones"
        ));
    }
}

/// The same input and settings make the same rows; a `.part` that begins otherwise was made by others.
fn skip_kept(output: &Output, pairs: &[common::pairs::Pair]) -> Result<()> {
    let mut made = pairs.iter();
    for kept in output.kept() {
        let kept = kept?;
        let expected = made.next().map(|pair| pair.fields()).transpose()?;
        if expected.is_none_or(|fields| fields != kept.fields) {
            return Err(anyhow!(
                "{}: this row was made from other input or settings; remove {}",
                kept.place,
                kept.place.file
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;
    use serde_json::{Value, json};
    use std::fs;

    fn args(dir: &Path, more: &[&str]) -> Args {
        let path = |name: &str| dir.join(name).display().to_string();
        let (input, output) = (path("in.jsonl"), path("out.jsonl"));
        let all = ["dice-pairs", &input, "--output", &output];
        Args::try_parse_from(all.iter().chain(more)).unwrap()
    }

    fn scored(prompts: usize, k: usize) -> String {
        let row = |p: usize, s: usize| {
            let response = "x".repeat(5 + (p * 7 + s * 3) % 11) + &s.to_string();
            json!({"prompt": format!("p{p}"), "response": response, "reward": (s * 5 + p) % 7})
                .to_string()
                + "\n"
        };
        let pairs = (0..prompts).flat_map(|p| (0..k).map(move |s| (p, s)));
        pairs.map(|(p, s)| row(p, s)).collect()
    }

    fn lines(path: &Path) -> Vec<Value> {
        let text = fs::read_to_string(path).unwrap();
        text.lines()
            .map(|l| serde_json::from_str(l).unwrap())
            .collect()
    }

    #[test]
    fn the_command_line_is_sound_and_every_flag_explains_itself() {
        Args::command().debug_assert();
        for arg in Args::command().get_arguments() {
            assert!(arg.get_help().is_some(), "{} has no help", arg.get_id());
        }
        for wrong in [
            &["--alpha", "-1"][..],
            &["--alpha", "nan"],
            &["--alpha", "x"],
            &["--gamma", "0.5"],
            &["--replay", "f", "--gamma", "1.1"],
            &["--resume"],
        ] {
            let all = ["dice-pairs"].iter().chain(wrong);
            assert!(Args::try_parse_from(all).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn pairs_replay_and_figures_from_files() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("in.jsonl"), scored(10, 8)).unwrap();
        let offline: String = (5..25)
            .map(|p| format!("{{\"prompt\":\"p{p}\",\"chosen\":\"a\",\"rejected\":\"b\"}}\n"))
            .collect();
        let replay = dir.path().join("offline.jsonl");
        fs::write(&replay, offline).unwrap();
        let stats = dir.path().join("stats.json");
        let more = [
            "--replay",
            replay.to_str().unwrap(),
            "--stats",
            stats.to_str().unwrap(),
        ];
        run(args(dir.path(), &more)).unwrap();

        let pairs = lines(&dir.path().join("out.jsonl"));
        let sources: Vec<_> = pairs
            .iter()
            .map(|p| p["source"].as_str().unwrap())
            .collect();
        assert_eq!(sources, [["generated"; 10], ["replay"; 10]].concat());
        let stats: Value = serde_json::from_str(&fs::read_to_string(stats).unwrap()).unwrap();
        assert_eq!(stats["rows"], 80);
        assert_eq!(stats["replay"]["replayed"], 10);
        assert_eq!(stats["generated_pairs"], 10);
        let gap = stats["chosen"]["mean_length"].as_f64().unwrap()
            - stats["rejected"]["mean_length"].as_f64().unwrap();
        assert!((gap - stats["gap"].as_f64().unwrap()).abs() < 1e-9);
    }

    #[test]
    fn a_killed_run_goes_on_and_foreign_work_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (out, part) = (
            dir.path().join("out.jsonl"),
            dir.path().join("out.jsonl.part"),
        );
        fs::write(dir.path().join("in.jsonl"), scored(4, 8)).unwrap();
        run(args(dir.path(), &[])).unwrap();
        let whole = fs::read_to_string(&out).unwrap();
        let manifest = dir.path().join("out.jsonl.run.json");
        assert!(manifest.is_file());
        for cut in [0, 10, whole.len() / 2, whole.len()] {
            fs::remove_file(&out).unwrap();
            fs::write(&part, &whole[..cut]).unwrap();
            run(args(dir.path(), &["--resume"])).unwrap();
            assert_eq!(fs::read_to_string(&out).unwrap(), whole);
        }
        run(args(dir.path(), &["--resume"])).unwrap();

        fs::remove_file(&out).unwrap();
        fs::write(&part, &whole).unwrap();
        let err = run(args(dir.path(), &["--resume", "--alpha", "1e6"])).unwrap_err();
        assert!(
            err.to_string().contains(":1: this row was made from other"),
            "{err:#}"
        );
        assert!(!out.exists());
    }

    #[test]
    fn a_bad_row_leaves_no_output() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(
            dir.path().join("in.jsonl"),
            scored(1, 8) + "{\"prompt\":\"p\"}\n",
        )
        .unwrap();
        let err = format!("{:#}", run(args(dir.path(), &[])).unwrap_err());
        assert!(
            err.ends_with("in.jsonl:9: field \"response\" is missing"),
            "{err}"
        );
        let left = fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(left, 1, "only the input");
    }

    #[test]
    fn stdin_cannot_be_two_things() {
        for files in [&["--replay", "-"][..], &["f", "-", "--replay", "-"]] {
            let all = ["dice-pairs"].iter().chain(files);
            let err = run(Args::try_parse_from(all).unwrap()).unwrap_err();
            assert!(
                err.to_string().contains("cannot both come from stdin"),
                "{err:#}"
            );
        }
    }
}
