//! `dice-eval report`: a run of any number of rounds as one HTML file that needs nothing else.

mod figures;
mod overview;
mod plot;
mod rounds;
mod texts;

use std::path::PathBuf;

use anyhow::Result;
use common::run::write_whole;
use maud::{DOCTYPE, Markup, PreEscaped, html};

use rounds::Round;

/// A report of a whole run to look at: one HTML file, with tables, figures and sampled responses
///
/// Reads a folder as `just round` makes it: round-1, round-2, ... with scored.jsonl (samples and rewards), before.jsonl and
/// after.jsonl (check prompts), pairs.jsonl, pairs.stats.json (dice-pairs --stats), steps.jsonl (dice-train's stdout),
/// win-rate.jsonl (rows of dice-eval win-rate) and commands.sh (shown as it is); beside them policy-1, policy-2, ... with
/// trainer_state.json. What is missing is left out. The file opens offline and runs no script.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  dice-eval report runs > report.html")]
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
    write_whole(args.output.as_deref(), page.as_bytes())
}

fn page(name: &str, rounds: &[Round]) -> Result<Markup> {
    let parts = [
        ("rounds", "Round by round", overview::part(rounds)?),
        ("training", "Training", figures::training(rounds)?),
        ("pairs", "Pairs, α and γ", figures::pairs(rounds)?),
        ("responses", "Responses", texts::responses(rounds)),
        ("settings", "Settings", texts::settings(rounds)?),
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
                h1 { "DICE run " (name) }
                // It stays in sight: the page is long.
                nav aria-label="Parts" { @for (id, title, _) in &parts { a href={ "#" (id) } { (title) } } }
                main { @for (id, title, part) in &parts { section id=(id) { h2 { (title) } (part) } } }
            }
        }
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
            "Win rate of after against before",
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
        assert_eq!(page.matches("<figure>").count(), 3 + 4 + 2 + 1 + 4 + 1 + 2);
        for text in [
            // The summary: win rates, lengths, drift of chosen and rejected over β, α, γ.
            "<td>51.5 (45.0 … 58.0)</td><td>49.2</td>",
            "<td>1.00</td><td>−2.00</td><td>0.250</td><td>0.50</td>",
            // The details.
            "51.50 (45.00 … 58.00)",
            "α = 0.2500, where the gap is 0.50",
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
        // Sums up what was drawn, in the page's own words: the title is printed with the page. Browsers make no window as
        // narrow as a phone, so that one is a frame.
        let check = "<script>addEventListener('load', () => {
            const figures = [...document.querySelectorAll('figure svg')];
            const drawn = figures.filter(s => s.getBoundingClientRect().width > 100
                && s.querySelectorAll('polyline, circle, rect, line').length > 3).length;
            const letters = figures.flatMap(s => [...s.querySelectorAll('text')].map(t =>
                t.getAttribute('font-size') * s.getBoundingClientRect().width / s.viewBox.baseVal.width));
            const legible = Math.min(...letters) > 8;
            const wide = document.documentElement.scrollWidth > innerWidth;
            const [r] = getComputedStyle(document.body).backgroundColor.match(/\\d+/);
            const found = `drawn ${drawn} legible ${legible} wide ${wide} dark ${r < 128}`;
            if (top === self) document.title = found; else top.postMessage(found, '*');
            })</script>";
        let text = fs::read_to_string(&page).unwrap();
        let figures = text.matches("<figure>").count();
        let [checked, framed] = ["checked.html", "framed.html"].map(|name| dir.path().join(name));
        let with_check = text.replace("</body>", &format!("{check}</body>"));
        fs::write(&checked, with_check).unwrap();
        let frame = "<script>onmessage = event => document.title = event.data</script>\
            <iframe width=360 height=800 src=checked.html></iframe>";
        fs::write(&framed, frame).unwrap();
        for (page, dark) in [(&checked, true), (&checked, false), (&framed, false)] {
            let profile = tempfile::tempdir().unwrap();
            let output = Command::new(browser)
                .args([
                    "--headless=new",
                    "--no-sandbox",
                    "--disable-gpu",
                    "--enable-logging=stderr",
                    "--dump-dom",
                    "--window-size=1400,900",
                    "--virtual-time-budget=3000",
                ])
                .arg(format!(
                    "--blink-settings=preferredColorScheme={}",
                    u8::from(!dark)
                ))
                .arg(format!("--user-data-dir={}", profile.path().display()))
                .arg(format!("file://{}", page.display()))
                .output()
                .unwrap();
            let (dom, log) = (
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr),
            );
            let title =
                format!("<title>drawn {figures} legible true wide false dark {dark}</title>");
            let got = dom
                .split("<title>")
                .nth(1)
                .unwrap_or("no title")
                .split("</title>")
                .next();
            assert!(dom.contains(&title), "{got:?}, not {title}: {log}");
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
