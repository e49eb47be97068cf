"""Runs the tools for MINUTES on a model and watches their memory: `just soak MINUTES`.

Two things go on at the same time. A pipe without end, dice-gen | dice-score, whose processes' memory is looked at every
few seconds: a leak shows as growth. And rounds, one after the other, of dice-gen, dice-score, dice-pairs and dice-train,
whose peaks are noted. Writes every figure to LOG and says at the end whether there was growth (exit 1).
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BIN, MODEL, PROMPTS, PREFERENCES, LOG = (Path(argument) for argument in sys.argv[1:6])
SECONDS = 60 * float(sys.argv[6])
# Between two looks at the endless pipe.
PAUSE = 5
# Growth from the second quarter of the time to the last that counts as such: 3% and 4 MB.
SHARE, KIB = 1.03, 4 << 10

figures = {}
started = time.monotonic()
log = LOG.open("w")


def note(name, kib):
    figures.setdefault(name, []).append(kib)
    print(f"{time.monotonic() - started:.0f}\t{name}\t{kib}", file=log, flush=True)


def tool(name, *arguments, **files):
    return subprocess.Popen([BIN / name, *map(str, arguments)], stderr=subprocess.DEVNULL, **files)


def run(name, *arguments):
    """Runs a tool to its end and notes its peak."""
    process = tool(name, *arguments, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"soak: {name} failed ({process.returncode})")
    note(f"{name}, a round", usage.ru_maxrss)


def resident(process):
    status = Path(f"/proc/{process.pid}/status").read_text()
    line = next((line for line in status.splitlines() if line.startswith("VmRSS")), None)
    return line and int(line.split()[1])


def endless(policy):
    """The pipe without end."""
    feed = subprocess.Popen(["bash", "-c", 'while cat "$0"; do :; done', PROMPTS], stdout=subprocess.PIPE)
    sampling = ["--model", policy, "--k", 4, "--max-tokens", 24, "--batch-size", 8]
    sampler = tool("dice-gen", *sampling, stdin=feed.stdout, stdout=subprocess.PIPE)
    scorer = tool("dice-score", "--policy", policy, "--ref", MODEL, stdin=sampler.stdout, stdout=subprocess.DEVNULL)
    feed.stdout.close()
    sampler.stdout.close()
    return feed, sampler, scorer


def a_round(folder, policy, number):
    few = folder / "few.jsonl"
    few.write_text("".join(PROMPTS.open().readlines()[number % 8 :][:4]))
    samples, scored, pairs, following = (folder / f"{number}-{name}" for name in ("samples", "scored", "pairs", "policy"))
    run("dice-gen", "--model", policy, "--k", 4, "--max-tokens", 24, "--seed", number, "-o", samples, few)
    run("dice-score", "--policy", policy, "--ref", MODEL, "-o", scored, samples)
    run("dice-pairs", "--min-samples", 2, "--keep-truncated", "-o", pairs, scored)
    run("dice-train", "--model", policy, "--batch-size", 2, "-o", following, pairs)
    subprocess.run(["rm", "-rf", samples, scored, pairs, following])


def main():
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        policy = folder / "policy"
        seed = ["--learning-rate", "1e-5", "--max-steps", 1, "--batch-size", 2, "-o", policy]
        few = folder / "preferences.jsonl"
        few.write_text("".join(PREFERENCES.open().readlines()[:2]))
        run("dice-train", "--model", MODEL, *seed, few)
        pipe = endless(policy)
        number, looked = 0, 0.0
        while time.monotonic() - started < SECONDS:
            a_round(folder, policy, number)
            number += 1
            if any(process.poll() is not None for process in pipe):
                sys.exit("soak: the endless pipe ended")
            if time.monotonic() - looked > PAUSE:
                looked = time.monotonic()
                note("dice-gen, endless", resident(pipe[1]))
                note("dice-score, endless", resident(pipe[2]))
        for process in pipe:
            process.kill()
    report(number)


def report(rounds):
    print(f"{rounds} rounds in {time.monotonic() - started:.0f} s")
    grown = False
    for name, kibs in figures.items():
        quarter = max(1, len(kibs) // 4)
        early, late = kibs[quarter : 2 * quarter] or kibs, kibs[-quarter:]
        before, after = statistics.median(early), statistics.median(late)
        grows = after > SHARE * before + KIB
        grown |= grows
        print(f"{name}: {before / 1024:.1f} MB, at the end {after / 1024:.1f} MB, most {max(kibs) / 1024:.1f} MB"
              + (": it grows" if grows else ""))
    sys.exit(int(grown))


main()
