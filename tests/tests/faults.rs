//! What else can happen to a run: a full disk, read-only output, readers that go, input that is cut, a clock that jumps, a
//! stage of a pipe that is killed for its memory. Every time the same command, resumed, makes what an undisturbed run makes.

use dice_tests::world::{
    Made, Moment, ROW_TOOLS, TOOLS, World, newest_checkpoint, prompts, set_template,
};
use dice_tests::{Finished, Mount, Tool, bin_folder, copy_folder, lines, parse_rows, pipe, text};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// A tool writes to a disk too small for it, again and again, each time a little larger.
#[test]
fn a_full_disk_costs_nothing_that_was_done() {
    for tool in TOOLS {
        let world = World::new();
        let (straight, _) = world.undisturbed(tool);
        let whole: usize = straight.files.values().map(Vec::len).sum();
        // A manifest has its place at first; a checkpoint, or half of the rows, has not.
        let mut kib = whole / 3 / 1024 + 16;
        let Some(disk) = Mount::new(&world.path("disk"), kib) else {
            return;
        };
        fs::create_dir(world.path("disk/more")).unwrap();
        let mut refused = 0;
        loop {
            let run = world
                .tool(tool, "disk/out")
                .args(["--resume"])
                .stdout_to(world.path("out.log"))
                .run();
            if run.code == Some(0) {
                break;
            }
            refused += 1;
            let line = run.error_line();
            assert!(line.contains("No space left on device"), "{line}");
            assert!(!world.path("disk/out").exists());
            let part = world.path("disk/out.part");
            if ROW_TOOLS.contains(&tool) {
                let rows = fs::read(&part).unwrap_or_default();
                assert!(straight.files[""].starts_with(&rows), "{tool}");
            } else if part.is_dir() {
                newest_checkpoint(&part);
            }
            assert!(refused < 100, "{tool} never has enough");
            kib += kib / 3;
            disk.resize(kib);
        }
        assert!(refused > 0, "{tool}: {kib} KiB were enough at once");
        let files = Made::files(&world.path("disk/out"));
        let log = fs::read(world.path("out.log")).unwrap();
        Made { files, log }.assert_same(&straight);
        let left: Vec<_> = fs::read_dir(world.path("disk")).unwrap().collect();
        assert!(left.len() <= 3, "{tool} left {left:?}");
    }
}

/// dice-pairs keeps the texts of a large input in a temporary file.
#[test]
fn no_room_for_temporary_files_is_said() {
    let world = World::new();
    let Some(_disk) = Mount::new(&world.path("disk"), 16 << 10) else {
        return;
    };
    let row = |i: usize| json!({"prompt": format!("{}", i / 2), "response": format!("{i} ").repeat(1000), "reward": i});
    fs::write(
        world.path("large.jsonl"),
        lines(&(0..10_000).map(row).collect::<Vec<_>>()),
    )
    .unwrap();
    let args = ["--min-samples", "2", &world.arg("large.jsonl")].map(str::to_owned);
    let run = |temporary: &str| {
        Tool::new("dice-pairs", &args)
            .env("TMPDIR", &world.arg(temporary))
            .run()
    };
    let refused = run("disk");
    let line = refused.error_line();
    assert!(
        line.contains("temporary file") && line.contains("No space left"),
        "{line}"
    );
    assert_eq!(refused.rows_before_failure().len(), 0);
    fs::create_dir(world.path("room")).unwrap();
    assert_eq!(run("room").ok().rows().len(), 5000);
}

#[test]
fn read_only_output_is_one_line() {
    let world = World::new();
    let Some(disk) = Mount::new(&world.path("disk"), 1024) else {
        return;
    };
    disk.read_only();
    for tool in TOOLS {
        let run = world.tool(tool, "disk/out").run();
        let line = run.error_line();
        assert!(
            line.contains("disk/out.part: Read-only file system"),
            "{line}"
        );
        assert_eq!(run.rows_before_failure().len(), 0);
    }
    for args in [
        [
            "samples",
            "--output",
            &world.arg("disk/out"),
            &world.arg("samples.jsonl"),
        ],
        [
            "report",
            "--output",
            &world.arg("disk/out"),
            &world.arg("."),
        ],
    ] {
        let run = Tool::new("dice-eval", args).run();
        assert_eq!(run.code, Some(1));
        run.note("disk/out.run.json.part: Read-only file system");
    }
}

/// The input ends in the middle of a row: what came before is kept, nothing is called done; with the whole input it goes on.
#[test]
fn input_that_is_cut_is_not_taken_for_whole() {
    for tool in TOOLS {
        let world = World::new();
        let (straight, _) = world.undisturbed(tool);
        let input = fs::read(world.path(World::input(tool))).unwrap();
        let rows = input.iter().filter(|&&byte| byte == b'\n').count();
        let middle = input.len() - 7;
        fs::write(world.path("cut.jsonl"), &input[..middle]).unwrap();
        let run = world.tool_on(tool, "cut.jsonl", "out").run();
        let line = run.error_line();
        let place = format!("cut.jsonl:{rows}: ");
        assert!(
            line.contains(&place) && line.contains("the line has no end"),
            "{line}"
        );
        assert!(!world.path("out").exists());
        if ["dice-gen", "dice-score"].contains(&tool) {
            let kept = fs::read(world.path("out.part")).unwrap();
            assert!(!kept.is_empty() && straight.files[""].starts_with(&kept));
        } else {
            world.check_no_part_left();
        }
        fs::write(world.path("cut.jsonl"), &input).unwrap();
        world
            .tool_on(tool, "cut.jsonl", "out")
            .args(["--resume"])
            .stdout_to(world.path("out.log"))
            .run()
            .ok();
        Made::read(&world, "out").assert_same(&straight);
        world.check_no_part_left();
    }
}

/// A library that makes the wall clock jump by up to years, to and fro, each time it is asked.
fn jumping_clock(folder: &Path) -> Option<PathBuf> {
    const SOURCE: &str = r"
#define _GNU_SOURCE
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static long jump(void) {
    static unsigned state = 1;
    state = state * 1664525u + 1013904223u;
    return (long)(state >> 4) - (1 << 27);
}
int clock_gettime(clockid_t clock, struct timespec *now) {
    int result = syscall(SYS_clock_gettime, clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec += jump();
    return result;
}
int gettimeofday(struct timeval *now, void *zone) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec, now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return out ? *out = now.tv_sec : now.tv_sec;
}
";
    let (source, library) = (folder.join("clock.c"), folder.join("clock.so"));
    fs::write(&source, SOURCE).unwrap();
    let built = Command::new("cc")
        .args([
            "-shared",
            "-fPIC",
            "-O1",
            "-o",
            &text(&library),
            &text(&source),
        ])
        .status();
    if !built.is_ok_and(|status| status.success()) {
        eprintln!("skipped: no C compiler for a clock that jumps");
        return None;
    }
    Some(library)
}

#[test]
fn a_clock_that_jumps_changes_nothing() {
    let world = World::new();
    let Some(clock) = jumping_clock(world.folder.path()) else {
        return;
    };
    let clock = text(&clock);
    // It does jump.
    let date = || {
        let date = Command::new("date")
            .arg("+%s")
            .env("LD_PRELOAD", &clock)
            .output()
            .unwrap();
        String::from_utf8(date.stdout)
            .unwrap()
            .trim()
            .parse::<i64>()
            .unwrap()
    };
    let now = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs() as i64;
    assert!((date() - now).abs() > 1000);
    for tool in TOOLS {
        let (straight, _) = world.undisturbed(tool);
        let run = |more: &[&str]| {
            let tool = world.tool(tool, "out").args(["--resume"]).args(more);
            tool.env("LD_PRELOAD", &clock)
                .stdout_to(world.path("out.log"))
        };
        // Killed in the middle, and resumed in what seems to be another year.
        let watched = match tool {
            "dice-train" => Moment::Bytes(world.path("out.log"), 2000),
            _ => Moment::Bytes(world.path("out.part"), 1),
        };
        let mut child = run(&[]).start();
        watched.wait(&mut child);
        child.kill().unwrap();
        child.wait().unwrap();
        let log_dir = world.arg("events");
        let more: &[&str] = match tool {
            "dice-train" => &["--log-dir", &log_dir],
            _ => &[],
        };
        run(more).run().ok();
        let made = Made::read(&world, "out");
        match tool {
            // Where the kill came after the last step, there were none to say again but those of the log.
            "dice-train" if made.log.is_empty() => assert!(made.files == straight.files),
            _ => made.assert_same(&straight),
        }
        world.remove("out");
        world.remove("straight");
    }
}

/// Templates may write the date: it is one date for a run, and a run is not gone on with on another.
#[test]
fn a_run_has_one_date() {
    let world = World::new();
    let Some(clock) = jumping_clock(world.folder.path()) else {
        return;
    };
    copy_folder(&world.path("pi"), &world.path("dated"));
    set_template(
        &world.path("dated"),
        "{{ strftime_now('%d %b %Y %H:%M:%S') }}: {{ messages[0]['content'] }}<|im_end|>",
    );
    let prompts: Vec<Value> = (0..20)
        .map(|i| json!({"prompt": "Say it.", "id": i}))
        .collect();
    let dated = world.arg("dated");
    let generate = |more: &[&str]| {
        let args = [
            "--model",
            &dated,
            "--k",
            "1",
            "--temperature",
            "0",
            "--max-tokens",
            "16",
        ];
        Tool::new("dice-gen", args)
            .args(more)
            .stdin(lines(&prompts))
    };
    let rows = generate(&[])
        .env("LD_PRELOAD", &text(&clock))
        .run()
        .ok()
        .rows();
    assert_eq!(rows.len(), 20);
    assert!(
        rows.iter().all(|row| row["logp"] == rows[0]["logp"]),
        "prompts of two dates"
    );

    let output = world.arg("out");
    let on = |day: &str| generate(&["--output", &output, "--resume"]).env("SOURCE_DATE_EPOCH", day);
    on("0").run().ok();
    // As if it had been killed.
    fs::rename(world.path("out"), world.path("out.part")).unwrap();
    fs::rename(world.path("out.run.json"), world.path("out.part.run.json")).unwrap();
    let other = on("86400").run();
    assert!(
        other
            .error_line()
            .contains("date: \"1970-01-01\", now \"1970-01-02\""),
        "{}",
        other.stderr
    );
    on("3600").run().ok();
}

/// Every stage of a pipe ends quietly when its reader goes, whoever that is.
#[test]
fn readers_may_go() {
    let world = World::new();
    let prompts: Vec<Value> = prompts()
        .into_iter()
        .map(|mut row| {
            row["filler"] = "x".repeat(5000).into();
            row
        })
        .collect();
    fs::write(world.path("wide.jsonl"), lines(&prompts)).unwrap();
    let stages = [
        "dice-gen --model pi --k 4 --max-tokens 6 wide.jsonl",
        "dice-score --policy pi --ref ref",
        "dice-pairs --min-samples 1 --min-chars 1 --keep-truncated",
        "dice-train --model pi --output next --batch-size 1",
    ];
    for n in 1..=stages.len() {
        let script = format!(
            "cd {}; {} | head -n 1",
            world.arg("."),
            stages[..n].join(" | ")
        );
        let run = pipe(&script).run().ok();
        assert_eq!(run.rows().len(), 1, "{script}");
        let quiet = ["roken pipe", "cannot", "error", "panic"];
        let quiet = quiet.iter().all(|word| !run.stderr.contains(word));
        assert!(quiet, "{script}: {}", run.stderr);
    }
    // Training's result is the folder, whoever reads the steps.
    assert!(world.path("next/model.safetensors").is_file());
    // dice-eval waits for all of its input.
    let script = format!(
        "cd {}; {} | {} | dice-eval samples | true",
        world.arg("."),
        stages[0],
        stages[1]
    );
    pipe(&script).run().ok();
}

/// The stages of a round as programs of ours to be struck, each reading the one before it.
fn stages(world: &World) -> Vec<(&'static str, Vec<String>)> {
    let [pi, reference, prompts, next] =
        ["pi", "ref", "prompts.jsonl", "next"].map(|name| world.arg(name));
    let of = |args: &[&str]| args.iter().map(|arg| (*arg).to_owned()).collect();
    vec![
        (
            "dice-gen",
            of(&["--model", &pi, "--k", "4", "--max-tokens", "24", &prompts]),
        ),
        ("dice-score", of(&["--policy", &pi, "--ref", &reference])),
        (
            "dice-pairs",
            of(&["--min-samples", "2", "--keep-truncated"]),
        ),
        (
            "dice-train",
            of(&["--model", &pi, "--output", &next, "--learning-rate", "1e-3"]),
        ),
    ]
}

/// Starts a round as a pipe.
fn start_pipe(world: &World) -> Vec<Child> {
    let mut input = Stdio::null();
    let mut children = vec![];
    let stages = stages(world);
    let last = stages.len() - 1;
    for (i, (tool, args)) in stages.into_iter().enumerate() {
        let program = bin_folder().join(tool);
        let (output, next): (Stdio, Stdio) = match i == last {
            true => (
                File::create(world.path("steps.jsonl")).unwrap().into(),
                Stdio::null(),
            ),
            false => {
                let (reader, writer) = std::io::pipe().unwrap();
                (writer.into(), reader.into())
            }
        };
        let child = Command::new(program)
            .args(args)
            .stdin(std::mem::replace(&mut input, next))
            .stdout(output)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        children.push(child);
    }
    children
}

/// What came of each stage.
fn end_pipe(children: Vec<Child>) -> Vec<std::process::Output> {
    children
        .into_iter()
        .map(|child| child.wait_with_output().unwrap())
        .collect()
}

/// One stage is killed, as the system does when memory runs out: the pipe fails as a whole, and makes nothing of half the
/// data; run again, it makes what it makes undisturbed.
#[test]
fn a_pipe_with_a_killed_stage_makes_no_checkpoint() {
    let world = World::new();
    let started = std::time::Instant::now();
    let calm = end_pipe(start_pipe(&world));
    let duration = started.elapsed();
    for (stage, output) in stages(&world).iter().zip(&calm) {
        assert!(
            output.status.success(),
            "{}: {}",
            stage.0,
            String::from_utf8_lossy(&output.stderr)
        );
    }
    let expected = Made::files(&world.path("next"));
    for stage in 0..4 {
        // Earlier and earlier, until two kills met the stage at its work.
        let mut struck = 0;
        let mut when = duration.mul_f64(0.7);
        while struck < 2 {
            drop(fs::remove_dir_all(world.path("next")));
            let mut children = start_pipe(&world);
            Moment::Time(when).wait(&mut children[stage]);
            when = when.mul_f64(0.7);
            children[stage].kill().unwrap();
            let ended = end_pipe(children);
            if ended[stage].status.signal() != Some(9) {
                continue; // It was done already.
            }
            struck += 1;
            let trained = &ended[3];
            assert!(
                !trained.status.success(),
                "a checkpoint was made of what stage {stage} left"
            );
            assert!(!world.path("next").exists());
            if stage < 3 {
                let said = String::from_utf8_lossy(&trained.stderr);
                let told = [
                    "rows are missing",
                    "the line has no end",
                    "no pairs to train on",
                ];
                assert!(told.iter().any(|part| said.contains(part)), "{said}");
                assert!(!world.path("next.part").exists());
            }
            drop(fs::remove_dir_all(world.path("next.part")));
        }
    }
    let again = end_pipe(start_pipe(&world));
    assert!(again.iter().all(|output| output.status.success()));
    assert!(Made::files(&world.path("next")) == expected);
}

/// Training stopped after every one of its steps, each time resumed.
#[test]
fn training_resumes_at_every_step() {
    let world = World::new();
    let train = |output: &str| {
        let log = world.path(&format!("{output}.log"));
        world.train(output, 1).args(["--resume"]).stdout_to(log)
    };
    train("straight").run().ok();
    let straight = Made::read(&world, "straight");
    let steps = parse_rows(std::str::from_utf8(&straight.log).unwrap()).len();
    let line = straight.log.len() / steps;
    let mut resumed = vec![];
    for step in 1..steps {
        let mut child = train("out").start();
        Moment::Bytes(world.path("out.log"), (step * line) as u64).wait(&mut child);
        child.kill().unwrap();
        let output = child.wait_with_output().unwrap();
        if output.status.signal().is_none() {
            Finished::new("dice-train", output).ok();
            break;
        }
        resumed.extend(newest_checkpoint(&world.path("out.part")));
    }
    resumed.dedup();
    assert!(resumed.len() > steps / 3, "only at steps {resumed:?}");
    train("out").run().ok();
    Made::read(&world, "out").assert_same(&straight);
}

/// Every output has its manifest, which names tool, command, models and inputs; a finished output is not taken for another.
#[test]
fn outputs_have_manifests() {
    let world = World::new();
    for tool in TOOLS {
        world.run(tool, "out", &[]);
        let manifest = match tool {
            "dice-train" => world.path("out/run.json"),
            _ => world.path("out.run.json"),
        };
        let manifest: Value = serde_json::from_slice(&fs::read(manifest).unwrap()).unwrap();
        assert_eq!(manifest["tool"], tool);
        assert_eq!(manifest["version"], env!("CARGO_PKG_VERSION"));
        let command = manifest["command"].as_array().unwrap();
        assert!(command.contains(&json!("--output")) && command.len() > 4);
        let input = world.path(World::input(tool));
        let bytes = fs::read(&input).unwrap();
        let read = manifest["inputs"].as_array().unwrap();
        let read = read
            .iter()
            .find(|read| read["file"] == text(&input))
            .unwrap();
        assert_eq!(read["bytes"], bytes.len());
        assert_eq!(read["blake3"], blake3::hash(&bytes).to_string());
        let models = manifest["models"].as_object().unwrap();
        assert_eq!(models.contains_key(&world.arg("pi")), tool != "dice-pairs");
        let rows = read["lines"].as_u64().unwrap();
        assert_eq!(
            rows,
            bytes.iter().filter(|&&byte| byte == b'\n').count() as u64
        );

        let (more, difference): (&[&str], &str) = match tool {
            "dice-gen" => (&["--seed", "7"], "seed: 0, now 7"),
            "dice-pairs" => (&["--alpha", "0.5"], "alpha: null, now 0.5"),
            "dice-train" => (&["--seed", "7"], "settings.seed: 0, now 7"),
            _ => (&["--beta", "0.3"], "beta: 0.1, now 0.3"),
        };
        let refused = world.tool(tool, "out").args(["--resume"]).args(more).run();
        let line = refused.error_line();
        assert!(
            line.contains(difference) && line.contains("remove"),
            "{line}"
        );
        world.run(tool, "out", &["--resume"]);
        world.remove("out");
    }
    let args = [
        "samples",
        "-o",
        &world.arg("figures.json"),
        &world.arg("samples.jsonl"),
    ];
    Tool::new("dice-eval", args).run().ok();
    assert!(world.path("figures.json.run.json").is_file());
}

/// A machine's slowness: the pause is a kill's neighbour. A stopped program goes on as if nothing had been.
#[test]
fn a_pause_is_no_fault() {
    let world = World::new();
    let (straight, _) = world.undisturbed("dice-gen");
    let mut child = world
        .tool("dice-gen", "out")
        .stdout_to(world.path("out.log"))
        .start();
    Moment::Bytes(world.path("out.part"), 1).wait(&mut child);
    dice_tests::world::signal(&child, "STOP");
    std::thread::sleep(Duration::from_millis(300));
    dice_tests::world::signal(&child, "CONT");
    Finished::new("dice-gen", child.wait_with_output().unwrap()).ok();
    Made::read(&world, "out").assert_same(&straight);
}
