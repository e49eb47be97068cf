"""Our tools, timed from outside as a user runs them."""

import re
import subprocess
import time

from workload import ROOT

BIN = ROOT / "target" / "release"


def command(name, *args):
    return [str(BIN / name), *map(str, args)]


def run(name, *args):
    """Seconds of one whole run."""
    start = time.perf_counter()
    subprocess.run(command(name, *args), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def pipe(*commands):
    """Seconds of a whole pipe."""
    line = " | ".join(" ".join(c) for c in commands)
    start = time.perf_counter()
    subprocess.run(["bash", "-o", "pipefail", "-c", line], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def between_rows(name, *args):
    """Seconds from the first row on stdout to the last: a training's steps, without its start and end."""
    with subprocess.Popen(command(name, *args), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        times = [time.perf_counter() for _ in process.stdout]
    assert process.returncode == 0 and len(times) > 1, f"{name} failed"
    return times[-1] - times[0]


def gemm_rates():
    """FLOP/s of our matrix product on both cores, the best shape: {"f32": …, "bf16": …} (benches/kernels.rs)."""
    text = subprocess.run(
        ["cargo", "bench", "-q", "--workspace", "--bench", "kernels", "--", "float32", "bfloat16"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout
    rates = {}
    for part, dtype in (("bfloat16", "bf16"), ("float32", "f32")):
        block = re.search(rf"[├╰]─ {part}\b(.*?)(?:\n[├╰]─ \w|\Z)", text, re.S).group(1)
        # The third figure of a line of rates is that of the median time.
        lines = [re.findall(r"([\d.]+) ([GT])item/s", line) for line in block.splitlines()]
        rates[dtype] = max(float(found[2][0]) * {"G": 1e9, "T": 1e12}[found[2][1]] for found in lines if len(found) == 4)
    return rates
