//! `dice-eval judge`: which of two models' outputs is better, prompt by prompt; makes what `win-rate` reads.

mod coin;
mod endpoint;
mod job;
mod journal;
mod jury;
mod outputs;
mod scores;
mod verdict;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use common::jsonl::{Opened, To};
use common::progress::Progress;
use common::run::settings;
use serde_json::{Map, Value, json};

use crate::implicit::{Models, Scorer};
use endpoint::{Endpoint, Patience};
use job::{Counts, Job};
use journal::Journal;
use jury::{Judged, Jury};
use outputs::generators;

/// Compare the outputs of two models, prompt by prompt, and write annotations for win-rate and compare
///
/// Reads two files of samples ("prompt" and "response", as dice-gen writes, or AlpacaEval's "instruction" and "output"), joins
/// them by prompt and has every pair judged: by a model behind an OpenAI-compatible server (--endpoint, --judge), by the
/// implicit reward of two models (--policy, --ref), or by any command that scores rows (--command). "preference" is 1 where
/// a's output is better, 2 where b's is, and between as far as the judge is unsure; "output_1" is a's, the baseline's.
/// Equal outputs are draws, about which a server is not asked.
///
/// If the server's first token is a label, its log-probs weigh the two labels; otherwise the reply's text decides. A question that it refuses (400, 413, 422), though it answers others, has no verdict: "preference" is null.
/// Each pair is shown in both orders and the preferences are averaged: judges favour one place. The share of pairs whose
/// verdict turned with the order is said at the end. What fails for now (429, 5xx, time-outs, broken replies) is asked again,
/// after longer and longer waits. Answers go to a journal at once: a killed run asks nothing twice.
#[derive(clap::Args)]
#[group(skip)]
#[command(group(clap::ArgGroup::new("by").required(true).args(["endpoint", "policy", "command"])))]
#[command(
    after_help = "Example:\n  dice-eval judge --a round-1.jsonl --b round-2.jsonl --endpoint http://127.0.0.1:8000/v1 --judge llama -o judged.jsonl"
)]
pub struct Args {
    /// Samples of the baseline
    #[arg(long, value_name = "FILE")]
    a: PathBuf,
    /// Samples of the model that is judged against it
    #[arg(long, value_name = "FILE")]
    b: PathBuf,
    /// Ask this server: the address before /chat/completions, such as https://api.openai.com/v1
    #[arg(
        long,
        value_name = "URL",
        requires = "judge",
        help_heading = "A judge behind a server"
    )]
    endpoint: Option<String>,
    /// The judge's name: the model to ask at --endpoint, and "annotator" in the output
    #[arg(long, value_name = "NAME", help_heading = "A judge behind a server")]
    judge: Option<String>,
    /// Environment variable that holds the server's key; not set, no key is sent
    #[arg(
        long,
        value_name = "NAME",
        default_value = "OPENAI_API_KEY",
        help_heading = "A judge behind a server"
    )]
    key_env: String,
    /// The question, a Jinja template of instruction, first, second, first_label and second_label; the default asks for
    /// the better answer, length apart
    #[arg(long, value_name = "FILE", help_heading = "A judge behind a server")]
    template: Option<PathBuf>,
    /// What the judge calls the output shown first and the one shown second
    #[arg(long, value_name = "FIRST,SECOND", default_value = "m,M", value_parser = labels, help_heading = "A judge behind a server")]
    labels: Labels,
    /// In which order the outputs are shown
    #[arg(long, value_enum, default_value_t = Order::Both, help_heading = "A judge behind a server")]
    order: Order,
    /// Seed of the order, for --order seeded
    #[arg(long, default_value_t = 0, help_heading = "A judge behind a server")]
    seed: u64,
    /// Most tokens of a reply; a judge that thinks before it answers wants some thousand
    #[arg(
        long,
        value_name = "N",
        default_value_t = 8,
        help_heading = "A judge behind a server"
    )]
    max_tokens: u32,
    /// Requests in flight at a time
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=1024), help_heading = "A judge behind a server")]
    in_flight: u64,
    /// How often a failed request is repeated
    #[arg(
        long,
        value_name = "N",
        default_value_t = 6,
        help_heading = "A judge behind a server"
    )]
    retries: u32,
    /// Time for one request
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 120,
        help_heading = "A judge behind a server"
    )]
    timeout: u64,
    /// Keep answers in FILE, across runs; without it, beside --output (FILE.journal) or nowhere
    #[arg(long, value_name = "FILE", help_heading = "A judge behind a server")]
    journal: Option<PathBuf>,
    /// Score with this shell command: it reads rows with `prompt` and `response`, and answers each with a row that has a
    /// `reward` or `score`
    #[arg(
        long,
        value_name = "COMMAND",
        help_heading = "A judge that is a command"
    )]
    command: Option<String>,
    #[command(flatten)]
    to: To,
    // Last: what comes after a heading is under it.
    #[command(flatten, next_help_heading = "A judge that is an implicit reward")]
    models: Models,
}

/// How pairs are shown to a judge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Order {
    /// Both ways round, averaged
    Both,
    /// One way, by AlpacaEval's coin for the instruction: half the questions
    Seeded,
}

/// `--labels`.
#[derive(Clone, Debug)]
struct Labels([String; 2]);

fn labels(text: &str) -> Result<Labels> {
    match text.split_once(',') {
        Some((first, second)) if !first.is_empty() && !second.is_empty() && first != second => {
            Ok(Labels([first.to_owned(), second.to_owned()]))
        }
        _ => bail!("must be two different labels, such as A,B"),
    }
}

/// How long to wait before the first and before any repetition.
const WAITS: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(60)];

pub fn run(args: Args) -> Result<()> {
    judge(args, WAITS)
}

fn judge(args: Args, [wait, longest_wait]: [Duration; 2]) -> Result<()> {
    ensure!(
        [&args.a, &args.b]
            .iter()
            .any(|file| file.as_os_str() != "-"),
        "--a and --b cannot both come from stdin"
    );
    let mut output = match args.to.open(run_settings(&args)?)? {
        Opened::Ready(output) => output,
        Opened::AlreadyDone(done) => {
            let models = || {
                let mut models = Scorer::open(&args.models)?.settings();
                models.remove("date"); // on another day it is whole still
                Ok(models)
            };
            return done.confirm(models, &[&args.a, &args.b]);
        }
    };
    let pairs = outputs::pairs(&args.a, &args.b)?;
    let scorer = Scorer::open(&args.models)?;
    output.begin(scorer.settings())?;
    let mut job = Job {
        generators: generators([&args.a, &args.b], &pairs),
        annotator: annotator(&args),
        progress: Progress::new("pairs", Some(pairs.len() as u64)),
        output,
        counts: Counts::default(),
    };
    let kept = job.check_kept(&pairs)?;
    let rest = &pairs[kept..];
    if let Some(url) = &args.endpoint {
        let patience = Patience {
            retries: args.retries,
            wait,
            longest_wait,
            timeout: Duration::from_secs(args.timeout),
        };
        let key = std::env::var(&args.key_env)
            .ok()
            .filter(|key| !key.is_empty());
        let labels = args.labels.0.clone();
        let endpoint = Endpoint::new(url, &job.annotator, key, args.max_tokens, labels, patience);
        let jury = Jury {
            endpoint,
            journal: open_journal(&args)?,
            template: template(&args)?,
            labels: &args.labels.0,
            order: args.order,
            seed: args.seed,
        };
        jury.judge_all(rest, args.in_flight as usize, |pair, judged| {
            job.write(pair, judged)
        })?;
    } else {
        let mut waiting = rest.iter();
        let each = |win: Option<f64>| {
            let pair = waiting.next().expect("one probability per pair");
            job.write(pair, Judged::scored(win))
        };
        match &args.command {
            Some(command) => scores::command(command, rest, each)?,
            None => scores::implicit(scorer, args.models.beta, rest, each)?,
        }
    }
    job.finish()
}

/// What the annotations depend on besides the outputs and the models.
fn run_settings(args: &Args) -> Result<Map<String, Value>> {
    Ok(settings(match args.endpoint {
        Some(_) => json!({
            "annotator": annotator(args), "template": template(args)?, "labels": args.labels.0,
            "order": format!("{:?}", args.order).to_lowercase(), "seed": args.seed, "max_tokens": args.max_tokens,
        }),
        None => json!({"annotator": annotator(args), "beta": args.models.beta}),
    }))
}

/// The judge's name in the output.
fn annotator(args: &Args) -> String {
    let models = || {
        let policy = args.models.policy.as_deref()?;
        let reference = args.models.reference.as_deref()?;
        Some(format!("implicit reward of {policy} over {reference}"))
    };
    let named = args
        .judge
        .clone()
        .or_else(|| args.command.clone())
        .or_else(models);
    named.unwrap_or_default()
}

fn open_journal(args: &Args) -> Result<Journal> {
    let beside = args
        .to
        .output
        .as_ref()
        .filter(|output| output.as_os_str() != "-")
        .map(|output| {
            let mut name = output.clone().into_os_string();
            name.push(".journal");
            PathBuf::from(name)
        });
    Journal::open(args.journal.clone().or(beside).as_deref())
}

fn template(args: &Args) -> Result<String> {
    match &args.template {
        None => Ok(include_str!("template.txt").to_owned()),
        Some(file) => {
            std::fs::read_to_string(file).with_context(|| format!("--template {}", file.display()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use dice_tests::{Act, JudgeServer};
    use std::path::Path;

    const SHORT: [Duration; 2] = [Duration::from_millis(1), Duration::from_millis(4)];

    /// Twelve prompts; b has more exclamation marks on the even ones, and one pair is equal.
    fn samples(dir: &Path) -> [String; 2] {
        [("a", 1_usize), ("b", 2)].map(|(name, side)| {
            let row = |i: usize| {
                let marks = match (i, side) {
                    (11, _) => 1,
                    (i, 2) if i % 2 == 0 => 3,
                    (_, 2) => 0,
                    _ => 1,
                };
                let response = format!("answer{}", "!".repeat(marks));
                json!({"prompt": format!("question {i}"), "response": response, "dataset": "d", "sample": side,
                    "reward": marks})
            };
            // In another order, and one prompt of its own.
            let order: Vec<usize> = if side == 1 { (0..12).collect() } else { (0..13).rev().collect() };
            let text: String = order.into_iter().map(|i| format!("{}\n", row(i))).collect();
            let path = dir.join(format!("{name}.jsonl"));
            std::fs::write(&path, text).unwrap();
            path.display().to_string()
        })
    }

    fn run_in(dir: &Path, more: &[&str]) -> Result<Vec<Value>> {
        let [a, b] = samples(dir);
        let out = dir.join("out.jsonl").display().to_string();
        let words = ["dice-eval", "judge", "--a", &a, "--b", &b, "--output", &out];
        let args = crate::Args::try_parse_from(words.iter().chain(more))?;
        let crate::Command::Judge(args) = args.command else {
            panic!("not judge")
        };
        judge(args, SHORT)?;
        let text = std::fs::read_to_string(out)?;
        Ok(text
            .lines()
            .map(|l| serde_json::from_str(l).unwrap())
            .collect())
    }

    fn ask(acts: &[Act], more: &[&str]) -> (JudgeServer, Result<Vec<Value>>) {
        let dir = tempfile::tempdir().unwrap();
        let server = JudgeServer::start(acts);
        let words = [&["--endpoint", &server.url, "--judge", "j"], more].concat();
        let rows = run_in(dir.path(), &words);
        (server, rows)
    }

    fn wins(rows: &[Value]) -> Vec<f64> {
        rows.iter()
            .map(|row| row["preference"].as_f64().unwrap() - 1.0)
            .collect()
    }

    fn expected(sure: f64) -> Vec<f64> {
        let win = |i: usize| match i {
            11 => 0.5,
            i if i % 2 == 0 => sure,
            _ => 1.0 - sure,
        };
        (0..12).map(win).collect()
    }

    fn near(got: &[f64], expected: &[f64]) {
        let off = got.iter().zip(expected).any(|(a, b)| (a - b).abs() > 1e-9);
        assert!(got.len() == expected.len() && !off, "{got:?} {expected:?}");
    }

    #[test]
    fn log_probs_weigh_both_orders_and_rows_keep_their_order() {
        let (server, rows) = ask(&[Act::Weigh], &["--in-flight", "3"]);
        let rows = rows.unwrap();
        near(&wins(&rows), &expected(0.9));
        assert_eq!(
            server.asked(),
            22,
            "both orders; the equal pair is not asked about"
        );
        assert!(server.most_at_a_time() <= 3, "{}", server.most_at_a_time());
        let row = &rows[0];
        assert_eq!(row["instruction"], "question 0");
        assert_eq!(
            [&row["output_1"], &row["output_2"]],
            ["answer!", "answer!!!"]
        );
        assert_eq!([&row["generator_1"], &row["generator_2"]], ["a", "b"]);
        assert_eq!([&row["annotator"], &row["verdict_from"]], ["j", "logprobs"]);
        assert_eq!(
            (&row["dataset"], &row["sample"]),
            (&json!("d"), &Value::Null)
        );
        assert_eq!(row["turned"], false);
    }

    #[test]
    fn a_misbehaving_server_is_asked_until_it_answers() {
        let acts = [
            Act::Reset,
            Act::Status(500),
            Act::Half,
            Act::Garbage,
            Act::Later(0),
            Act::Status(503),
            Act::Weigh,
            Act::Close,
            Act::Noise,
            Act::Status(408),
            Act::Weigh,
        ];
        let (server, rows) = ask(&acts, &["--in-flight", "2"]);
        near(&wins(&rows.unwrap()), &expected(0.9));
        assert_eq!(server.asked(), 22 + 9);
        assert!(server.most_at_a_time() <= 2);
        // One that is too slow, and one that asks for a second's rest.
        let start = std::time::Instant::now();
        let acts = [Act::Hang(3000), Act::Later(1), Act::Weigh];
        let words = ["--in-flight", "1", "--timeout", "2", "--retries", "30"];
        let (server, rows) = ask(&acts, &words);
        near(&wins(&rows.unwrap()), &expected(0.9));
        // On a busy machine even the others may be too slow at first.
        assert!(server.asked() >= 22 + 2);
        assert!(start.elapsed() > Duration::from_secs(3));
    }

    #[test]
    fn a_server_that_never_recovers_or_refuses_ends_the_run() {
        let (server, rows) = ask(&[Act::Status(502)], &["--retries", "2", "--in-flight", "1"]);
        let message = format!("{:#}", rows.unwrap_err());
        assert!(
            message.contains("gave up after 3 attempts") && message.contains("status 502"),
            "{message}"
        );
        assert_eq!(server.asked(), 3);
        let (server, rows) = ask(&[Act::Status(401)], &["--in-flight", "1"]);
        let message = format!("{:#}", rows.unwrap_err());
        assert!(message.contains("status 401: {\"error\""), "{message}");
        assert_eq!(server.asked(), 1, "a refusal is not asked again");
        let (_, rows) = ask(
            &[Act::Hang(30_000)],
            &["--retries", "0", "--timeout", "1", "--in-flight", "1"],
        );
        let message = format!("{:#}", rows.unwrap_err());
        assert!(message.contains("timeout"), "{message}");
    }

    /// Such as a prompt that is too long for it.
    #[test]
    fn a_question_that_is_refused_costs_itself_alone() {
        let acts = [Act::Weigh, Act::Weigh, Act::Status(400), Act::Weigh];
        let (server, rows) = ask(&acts, &["--in-flight", "1"]);
        let rows = rows.unwrap();
        assert_eq!((server.asked(), rows.len()), (22, 12));
        let wins: Vec<_> = rows.iter().map(|row| row["preference"].as_f64()).collect();
        assert!(
            wins[1].is_none() && wins.iter().flatten().count() == 11,
            "{wins:?}"
        );
        // The first one, too: then it is asked whether it answers at all.
        let acts = [Act::Status(413), Act::Status(503), Act::Weigh];
        let (server, rows) = ask(&acts, &["--in-flight", "1"]);
        let nulls = |row: &&Value| row["preference"].is_null();
        assert_eq!(rows.unwrap().iter().filter(nulls).count(), 1);
        assert_eq!(server.asked(), 24);
        // A server that takes none is another matter.
        let (_, rows) = ask(&[Act::Status(400)], &["--in-flight", "1"]);
        assert!(format!("{:#}", rows.unwrap_err()).contains("status 400"));
    }

    #[test]
    fn what_a_server_refuses_is_left_out() {
        // In the words of OpenAI's service, for its newer models, and of llama.cpp's Python server.
        for act in [
            Act::Say,
            Act::Refuse(
                "logprobs",
                403,
                "You are not allowed to request logprobs from this model.",
            ),
            Act::Refuse(
                "logprobs",
                500,
                "logprobs is not supported for models created with logits_all=False",
            ),
            Act::Refuse(
                "temperature",
                400,
                "'temperature' does not support 0 with this model.",
            ),
            Act::Refuse(
                "max_tokens",
                400,
                "'max_tokens' is not supported. Use 'max_completion_tokens' instead.",
            ),
        ] {
            let (server, rows) = ask(&[act], &["--in-flight", "1"]);
            let rows = rows.unwrap();
            near(&wins(&rows), &expected(1.0));
            assert_eq!(rows[0]["verdict_from"], "text");
            assert!(
                server.asked() <= 22 + 2,
                "refused once, for good: {}",
                server.asked()
            );
        }
        let (_, rows) = ask(&[Act::Mumble], &[]);
        let rows = rows.unwrap();
        assert_eq!(rows.len(), 12);
        assert_eq!(rows[0]["preference"], Value::Null);
        assert_eq!(rows[11]["preference"], 1.5);
    }

    #[test]
    fn a_taste_for_the_first_place_cancels_out() {
        let (_, rows) = ask(&[Act::First], &[]);
        let rows = rows.unwrap();
        near(&wins(&rows), &[0.5; 12]);
        assert_eq!(rows[0]["turned"], true);
        // One order alone shows it.
        let (server, rows) = ask(&[Act::First], &["--order", "seeded"]);
        let rows = rows.unwrap();
        assert_eq!(server.asked(), 11);
        for (i, win) in wins(&rows[..11]).into_iter().enumerate() {
            let switched = coin::is_switched(&format!("question {i}"), 0);
            assert_eq!(win, f64::from(switched));
        }
    }

    #[test]
    fn a_killed_run_asks_nothing_twice() {
        let dir = tempfile::tempdir().unwrap();
        let journal = dir.path().join("journal").display().to_string();
        // The ninth request and all after it are refused.
        let acts = [&[Act::Weigh; 8][..], &[Act::Status(403)]].concat();
        let broken = JudgeServer::start(&acts);
        let words = [
            "--judge",
            "j",
            "--journal",
            &journal,
            "--in-flight",
            "1",
            "--resume",
        ];
        run_in(
            dir.path(),
            &[&["--endpoint", &broken.url], &words[..]].concat(),
        )
        .unwrap_err();
        let part = std::fs::read_to_string(dir.path().join("out.jsonl.part")).unwrap();
        assert_eq!(part.lines().count(), 4, "what was judged is kept");
        assert_eq!(
            std::fs::read_to_string(&journal).unwrap().lines().count(),
            8
        );

        // The output is lost, the journal is not.
        std::fs::remove_file(dir.path().join("out.jsonl.part")).unwrap();
        let again = run_in(
            dir.path(),
            &[&["--endpoint", &broken.url], &words[..]].concat(),
        );
        again.unwrap_err();
        assert_eq!(
            broken.asked(),
            10,
            "only the one that failed was asked again"
        );

        let part = std::fs::read_to_string(dir.path().join("out.jsonl.part")).unwrap();
        assert_eq!(part.lines().count(), 4);
        let server = JudgeServer::start(&[Act::Weigh]);
        let rows = run_in(
            dir.path(),
            &[&["--endpoint", &server.url], &words[..]].concat(),
        )
        .unwrap();
        near(&wins(&rows), &expected(0.9));
        assert_eq!(
            server.asked(),
            14,
            "rows that are written are not judged again"
        );
    }

    #[test]
    fn commands_judge_by_their_scores() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("score.py");
        let text = "import json, sys\nfor line in sys.stdin:\n    row = json.loads(line)\n    print(json.dumps({'score': row['response'].count('!')}))\n";
        std::fs::write(&program, text).unwrap();
        let command = format!("python3 {}", program.display());
        let rows = run_in(dir.path(), &["--command", &command, "--judge", "marks"]).unwrap();
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        let win = |i: usize| match i {
            11 => 0.5,
            i if i % 2 == 0 => sigmoid(2.0),
            _ => sigmoid(-1.0),
        };
        near(&wins(&rows), &(0..12).map(win).collect::<Vec<_>>());
        assert_eq!(rows[0]["annotator"], "marks");
        for (command, message) in [
            ("exit 3", "it gave 0 scores for 24 outputs"),
            ("yes '{\"score\": 1}'", "more scores than the 24"),
            ("cat", "row 1 of its output: there is no number in"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let found = run_in(dir.path(), &["--command", command]).unwrap_err();
            assert!(format!("{found:#}").contains(message), "{found:#}");
        }
    }

    /// Ends the server with the test, however the test ends.
    struct Running(std::process::Child);

    impl Drop for Running {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn a_real_server_is_understood() {
        let python = std::env::var("DICE_PYTHON").unwrap_or_else(|_| "python3".into());
        let model = std::env::var("DICE_MODEL").unwrap_or_else(|_| {
            concat!(
                env!("CARGO_MANIFEST_DIR"),
                "/../models/SmolLM2-135M-Instruct.gguf"
            )
            .into()
        });
        let quiet = |command: &mut std::process::Command| {
            use std::process::Stdio;
            command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()
        };
        let has_server = std::process::Command::new(&python)
            .args(["-c", "import llama_cpp.server.app"])
            .output()
            .is_ok_and(|output| output.status.success());
        if !has_server || !Path::new(&model).is_file() {
            eprintln!(
                "skipped: needs {model} and llama-cpp-python[server] in {python} (DICE_PYTHON names another)"
            );
            return;
        }
        // A port that was free a moment ago.
        let port = std::net::TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let port = port.to_string();
        let words = [
            "-m",
            "llama_cpp.server",
            "--host",
            "127.0.0.1",
            "--port",
            &port,
            "--model",
            &model,
            "--n_ctx",
            "1024",
            "--n_threads",
            "1",
            "--logits_all",
            "true",
        ];
        let child = quiet(std::process::Command::new(&python).args(words)).unwrap();
        let _running = Running(child);
        let dir = tempfile::tempdir().unwrap();
        let url = format!("http://127.0.0.1:{port}/v1");
        // Whom so small a model prefers is no matter, but that it names a label.
        let template = dir.path().join("question.txt");
        let question = "Which comes first in the alphabet, {{ first_label }} or {{ second_label }}? Reply with {{ first_label }} \
                        or {{ second_label }} alone.";
        std::fs::write(&template, question).unwrap();
        let template = template.display().to_string();
        // While it loads its model, it refuses connections: the first question waits for it.
        let words = [
            "--endpoint",
            &url,
            "--judge",
            "smollm2",
            "--labels",
            "A,B",
            "--template",
            &template,
            "--in-flight",
            "1",
            "--retries",
            "60",
        ];
        let [a, b] = samples(dir.path());
        for file in [&a, &b] {
            let text = std::fs::read_to_string(file).unwrap();
            let few: Vec<&str> = text
                .lines()
                .filter(|l| l.contains("question 2\"") || l.contains("question 3\""))
                .collect();
            std::fs::write(file, few.join("\n")).unwrap();
        }
        let out = dir.path().join("out.jsonl").display().to_string();
        let start = ["dice-eval", "judge", "--a", &a, "--b", &b, "--output", &out];
        let args = crate::Args::try_parse_from(start.iter().chain(&words)).unwrap();
        let crate::Command::Judge(args) = args.command else {
            panic!("not judge")
        };
        judge(args, [Duration::from_millis(500), Duration::from_secs(1)]).unwrap();
        let text = std::fs::read_to_string(out).unwrap();
        let rows: Vec<Value> = text
            .lines()
            .map(|l| serde_json::from_str(l).unwrap())
            .collect();
        assert_eq!(rows.len(), 2);
        for row in rows {
            assert_eq!(row["verdict_from"], "logprobs", "{row}");
            assert!(
                (1.0..=2.0).contains(&row["preference"].as_f64().unwrap()),
                "{row}"
            );
        }
    }

    #[test]
    fn keys_templates_and_flags() {
        let dir = tempfile::tempdir().unwrap();
        let template = dir.path().join("t.txt");
        std::fs::write(&template, "{{ instrction }}").unwrap();
        let template = template.display().to_string();
        let (server, rows) = ask(
            &[Act::Weigh],
            &["--template", &template, "--key-env", "PATH"],
        );
        let message = format!("{:#}", rows.unwrap_err());
        assert!(
            message.contains("--template") && server.asked() == 0,
            "{message}"
        );
        let (server, rows) = ask(&[Act::Weigh], &["--key-env", "PATH"]);
        rows.unwrap();
        let key = format!("Bearer {}", std::env::var("PATH").unwrap());
        assert!(server.keys().iter().all(|sent| *sent == key) && server.keys().len() == 22);
        let parse = |words: &[&str]| {
            let start = ["dice-eval", "judge", "--a", "a", "--b", "b"];
            crate::Args::try_parse_from(start.iter().chain(words)).is_ok()
        };
        assert!(parse(&["--command", "x"]));
        assert!(!parse(&[]), "some judge is needed");
        assert!(!parse(&["--endpoint", "x"]), "and its name");
        assert!(!parse(&["--command", "x", "--policy", "p", "--ref", "r"]));
        assert!(!parse(&["--command", "x", "--labels", "A"]));
    }
}
