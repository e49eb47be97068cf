#!/usr/bin/env python3
"""How the cost of sampling, scoring and training grows with rows, with length and with K, beside the FLOPs that it takes.

    just build model
    peers/bin/python benches/scaling/scaling.py --model peers/smollm2 --output docs/scaling   (environment: benches/peers/bench.py)

Writes OUTPUT.json, each point once measured, and draws OUTPUT.svg; points that are in the file already are kept. The tools run as
users run them; what the same command takes for one small row is taken off (training: from the first step to the last).

- rows: 64 … 4096 responses of 24 tokens, 8 to a prompt (training: so many pairs)
- length: responses of 64 … 2048 tokens; the more, the fewer (some 16,000 tokens in all; 65,000 sampled, 32 responses at a time)
- K: 64 responses of 64 tokens to prompts of 512 tokens, 1 … 64 to a prompt

Sampling keeps keys and values in 8 bits, as it does by default in bfloat16; over length also as --dtype says ("wide").

Lines are FLOPs by the stage's median rate in that sweep: where the points lie on them, cost grows as the arithmetic does. A
sequence that is sampled reads its own keys and values again for each token, which no other shares: the dashed lines are the
FLOPs at the rate of the shortest responses and those bytes at the rate of memory, one after the other (`--memory`, GB/s of all
cores: `cargo bench -p common -- reading`).
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "peers"))
import ours
from workload import Cost, write

ROWS = [64, 128, 256, 512, 1024, 2048, 4096]
LENGTHS = [64, 128, 256, 512, 1024, 2048]
KS = [1, 2, 4, 8, 16, 32, 64]
SHORT, SHARED, TOKENS, SAMPLED, BATCH = 24, 8, 16384, 65536, 8
STAGES = {"generate": "tab:blue", "generate, wide": "tab:purple", "score": "tab:orange", "train": "tab:green"}


class Bench:
    def __init__(self, model, dtype, work):
        from transformers import AutoConfig, AutoTokenizer

        self.model, self.dtype, self.work = model, dtype, work
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.cost = Cost(AutoConfig.from_pretrained(model))
        self.random = random.Random(0)
        self.starts = {}

    def prompt(self, number, words):
        """A prompt's text that no other has, and its length in tokens."""
        text = f"{number}:" + " a" * words
        messages = [{"role": "user", "content": text}]
        rendered = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return text, len(self.tokenizer(rendered, add_special_tokens=False)["input_ids"])

    def ids(self, length):
        return [self.random.randrange(100, 40000) for _ in range(length)]

    def net(self, command, rows, least=()):
        """Seconds of a run on the rows less those of the command, or of `least`, on the first row alone."""
        name = command[0]
        if name not in self.starts:
            one = write(self.work / "one.jsonl", rows[:1])
            self.starts[name] = statistics.median(ours.run(*(least or command), one) for _ in range(3))
        return ours.run(*command, write(self.work / "all.jsonl", rows)) - self.starts[name]

    def generate(self, responses, length, k, words=1, cache="int8", at_once=128):
        """So hot that no response ends early."""
        prompts = [self.prompt(i, words) for i in range(responses // k)]
        common = ["dice-gen", "--model", self.model, "--dtype", self.dtype, "--kv-cache-dtype", cache, "--batch-size", at_once, "--temperature", 5]
        sample = lambda k, length: [*common, "--k", k, "--max-tokens", length]
        seconds = self.net(sample(k, length), [{"prompt": text} for text, _ in prompts], least=sample(1, 1))
        # Eight bits, and a scale of 32 for each key and value.
        element = 1 + 4 / self.cost.head_size if cache == "int8" else {"f32": 4, "bf16": 2}[self.dtype]
        flops = sum(self.cost.group(tokens, [length] * k) for _, tokens in prompts)
        return seconds, flops, responses * self.cost.reread(length, element)

    def score(self, responses, length, k, words=1):
        prompts = [self.prompt(i, words) for i in range(responses // k)]
        rows = [{"prompt": text, "response": "", "finish_reason": "length", "token_ids": self.ids(length)}
                for text, _ in prompts for _ in range(k)]
        seconds = self.net(["dice-score", "--policy", self.model, "--ref", self.model, "--dtype", self.dtype], rows)
        return seconds, 2 * sum(self.cost.group(tokens, [length] * k) for _, tokens in prompts)

    def train(self, pairs, length, batch):
        prompts = [self.prompt(i, 1) for i in range(pairs)]
        rows = [{"prompt": text, "chosen": "", "rejected": "", "chosen_finish_reason": "length",
                 "rejected_finish_reason": "length", "chosen_token_ids": self.ids(length),
                 "rejected_token_ids": self.ids(length)} for text, _ in prompts]
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            seconds = ours.between_rows(
                "dice-train", "--model", self.model, "--dtype", self.dtype, "--batch-size", batch, "--no-shuffle",
                "--save-steps", 0, "--output", Path(folder) / "next", write(self.work / "all.jsonl", rows))
        # The first step is before the clock; all are alike, so that its share of the FLOPs comes off.
        flops = 3 * sum(self.cost.group(tokens, [length] * 2) for _, tokens in prompts)
        return seconds * pairs / (pairs - batch), flops


def points(bench, most_rows):
    """(sweep, stage, x, work): work gives seconds, useful FLOPs and, of sampling, the bytes of keys and values that are read again."""
    for n in ROWS:
        if n <= most_rows:
            yield "rows", "generate", n, lambda n=n: bench.generate(n, SHORT, SHARED)
            yield "rows", "score", n, lambda n=n: bench.score(n, SHORT, SHARED)
            yield "rows", "train", n, lambda n=n: bench.train(n, SHORT, BATCH)
    for length in LENGTHS:
        pairs = TOKENS // (2 * length)
        yield "length", "generate", length, lambda n=length: bench.generate(SAMPLED // n, n, SHARED, at_once=32)
        yield "length", "generate, wide", length, lambda n=length: bench.generate(SAMPLED // n, n, SHARED, cache="auto", at_once=32)
        yield "length", "score", length, lambda n=length: bench.score(TOKENS // n, n, min(SHARED, TOKENS // n))
        yield "length", "train", length, lambda n=length, p=pairs: bench.train(p, n, p // 4)
    for k in KS:
        yield "K", "generate", k, lambda k=k: bench.generate(64, 64, k, words=480)
        yield "K", "score", k, lambda k=k: bench.score(64, 64, k, words=480)


def draw(measured, path, memory):
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "scaling"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    labels = {"rows": "rows (training: pairs)", "length": "tokens of a response", "K": "responses to a prompt"}
    for axis, sweep in zip(axes, labels):
        per_row = sweep == "length"
        for stage, colour in STAGES.items():
            of = sorted((p["x"], p["seconds"], p["flops"], p["rows"]) for p in measured if (p["sweep"], p["stage"]) == (sweep, stage))
            if not of:
                continue
            rate = statistics.median(flops / seconds for _, seconds, flops, _ in of)
            share = [rows if per_row else 1 for *_, rows in of]
            xs = [x for x, *_ in of]
            axis.plot(xs, [s / n for (_, s, _, _), n in zip(of, share)], "o", color=colour, label=f"{stage}, {rate / 1e9:.0f} GFLOP/s")
            axis.plot(xs, [f / rate / n for (_, _, f, _), n in zip(of, share)], "-", color=colour, linewidth=1)
            again = [p for p in measured if per_row and (p["sweep"], p["stage"]) == (sweep, stage) and "bytes" in p]
            if again:
                again.sort(key=lambda p: p["x"])
                rate = again[0]["flops"] / again[0]["seconds"]
                floor = [(p["flops"] / rate + p["bytes"] / memory / 1e9) / p["rows"] for p in again]
                axis.plot([p["x"] for p in again], floor, "--", color=colour, linewidth=1, label=f"{stage}, and caches at {memory:.0f} GB/s")
        axis.set(xscale="log", yscale="log", xlabel=labels[sweep], ylabel="seconds a response or pair" if per_row else "seconds")
        axis.set_xscale("log", base=2)
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the model in Hugging Face layout")
    parser.add_argument("--output", required=True, type=Path, help="path of the results without .json and .svg")
    parser.add_argument("--dtype", default="bf16", choices=("f32", "bf16"))
    parser.add_argument("--memory", type=float, default=78, help="GB/s that memory gives all cores")
    parser.add_argument("--most-rows", type=int, default=ROWS[-1], help="leave out larger points of the rows' sweep")
    args = parser.parse_args()
    file = args.output.with_suffix(".json")
    measured = json.loads(file.read_text()) if file.exists() else []
    known = {(p["sweep"], p["stage"], p["x"]) for p in measured}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args.model, args.dtype, Path(folder))
        for sweep, stage, x, work in points(bench, args.most_rows):
            if (sweep, stage, x) in known:
                continue
            seconds, flops, *read = work()
            rows = {"rows": x, "length": SAMPLED // x if stage.startswith("generate") else TOKENS // x // (2 if stage == "train" else 1), "K": 64}[sweep]
            point = {"sweep": sweep, "stage": stage, "x": x, "rows": rows, "seconds": round(seconds, 3), "flops": flops}
            point |= {"bytes": read[0]} if read else {}
            print(f"{sweep} {x}, {stage}: {seconds:.2f} s, {flops / seconds / 1e9:.0f} GFLOP/s", file=sys.stderr, flush=True)
            measured.append(point)
            file.write_text("[\n" + ",\n".join(json.dumps(p) for p in measured) + "\n]\n")
    draw(measured, args.output.with_suffix(".svg"), args.memory)


if __name__ == "__main__":
    main()
