#!/usr/bin/env python3
"""Our stages and the whole round beside what people run today: the same model, rows, number format and cores, in one run.

    just build model
    python3 -m venv peers && peers/bin/pip install torch transformers trl datasets gguf llama-cpp-python
    peers/bin/python tests/golden/make_smollm2_folder.py models/SmolLM2-135M-Instruct.gguf peers/smollm2
    peers/bin/python benches/peers/bench.py --model peers/smollm2 --gguf models/SmolLM2-135M-Instruct.gguf [--runs 5] [--stage score …]

Prints one Markdown table: medians of the runs, useful GFLOP/s (workload.py) as a share of our matrix product's rate in the same run,
and the ratio to each peer. The sides take turns, run by run, so that a busy machine slows both. Peers do a quarter of the rows
(llama.cpp: 48 new tokens each for 64 sequences, in 16 and 8 bits), with the model loaded. Of ours, sampling and scoring are whole runs less the start (the same command on one row); training is timed between the
first and the last step on both sides; the whole round is the whole pipe, loading four times and saving included.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import ours
import workload
from torch_peer import DTYPES, Torch
from workload import BATCH, K, NEW_TOKENS, PAIRS, QUARTER, Cost


# What llama.cpp runs beside ours: the same numbers or fewer bits.
LLAMA = {"f32": ("f16", "q8_0"), "bf16": ("bf16", "q8_0")}


class Bench:
    def __init__(self, args, dtype, work):
        self.model, self.gguf, self.dtype, self.work = args.model, args.gguf, dtype, work
        self.peer = Torch(self.model, dtype)
        self.cost = Cost(self.peer.model.config)
        self.prompts = workload.prompts()
        self.ids = [self.peer.prompt(row["prompt"]) for row in self.prompts]
        self.prompt_file = workload.write(work / "prompts.jsonl", self.prompts)

    def args(self, *args):
        return [*args, "--dtype", self.dtype]

    def samples(self):
        """What both sides score, made once."""
        path = self.work / "samples.jsonl"
        if not path.exists():
            ours.run("dice-gen", "--model", self.model, "--k", K, "--max-tokens", NEW_TOKENS, "-o", path, self.prompt_file)
        return workload.read(path)

    def generate(self):
        """16 prompts × K = 8, 128 new tokens each: ours so hot that no response ends early, peers told so."""
        one = workload.write(self.work / "one.jsonl", self.prompts[:1])
        made = self.work / f"made-{self.dtype}.jsonl"
        made.unlink(missing_ok=True)
        sampled = ["dice-gen", *self.args("--model", self.model, "--k", K, "--max-tokens", NEW_TOKENS, "--temperature", 5, self.prompt_file)]
        ours.run(*sampled, "-o", made)
        tokens = sum(len(row["token_ids"]) for row in workload.read(made))
        some = self.ids[::QUARTER]
        yield "ours", lambda: ours.run(*sampled), tokens
        yield "start", lambda: ours.run("dice-gen", *self.args("--model", self.model, "--k", 1, "--max-tokens", 1, one)), 0
        yield "transformers", lambda: self.peer.generate(some)[0], len(some) * K * NEW_TOKENS
        if self.gguf:
            from llama_peer import TOKENS, Llama, convert

            half = self.ids[::2]
            for form in LLAMA[self.dtype]:
                llama = Llama(convert(self.gguf, form, self.work), len(half) * K)
                yield f"llama.cpp {form}", lambda llama=llama: llama.generate(half), len(half) * K * TOKENS
        self.flops = self.cost.forward(sum(map(len, self.ids)), tokens)

    def score(self):
        """16 prompts × 8 responses by π and π_ref (here the same weights: the work is the same; peers do it once, counted twice)."""
        rows = [{k: r[k] for k in ("prompt", "response", "finish_reason", "token_ids")} for r in self.samples()]
        file = workload.write(self.work / "to-score.jsonl", rows)
        one = workload.write(self.work / "one-row.jsonl", rows[:1])
        ids = [(self.peer.prompt(row["prompt"]), row["token_ids"]) for row in rows]
        tokens = sum(len(p) + len(r) for p, r in ids)
        command = self.args("dice-score", "--policy", self.model, "--ref", self.model)
        yield "ours", lambda: ours.run(*command, file), tokens
        yield "start", lambda: ours.run(*command, one), 0
        some = ids[::QUARTER]
        some_tokens = sum(len(p) + len(r) for p, r in some)
        yield "transformers", lambda: 2 * self.peer.score(some)[0], some_tokens
        yield "transformers, padded", lambda: 2 * self.peer.score_padded(some), some_tokens
        self.flops = 2 * self.cost.forward(sum(map(len, self.ids)), sum(len(r) for _, r in ids))

    def train(self):
        """64 pairs, batch 8, the reference's log-probs given on both sides."""
        pairs = workload.preferences()
        file = self.work / f"pairs-{self.dtype}.jsonl"
        file.unlink(missing_ok=True)
        ours.run(*self.args("dice-score", "--policy", self.model, "--ref", self.model), "-o", file,
                 workload.write(self.work / "raw.jsonl", pairs))
        ids = [(self.peer.prompt(r["prompt"]), self.peer.response(r["chosen"]), self.peer.response(r["rejected"])) for r in pairs]
        reference = [row["ref_chosen_logps"] - row["ref_rejected_logps"] for row in workload.read(file)]
        timed = ids[BATCH:]
        tokens = sum(2 * len(p) + len(c) + len(r) for p, c, r in timed)

        def steps():
            with tempfile.TemporaryDirectory(dir=self.work) as folder:
                command = self.args("dice-train", "--model", self.model, "--no-shuffle", "--batch-size", BATCH, "--save-steps", 0)
                return ours.between_rows(*command, "--output", Path(folder) / "next", file)

        yield "ours", steps, tokens
        from trl_peer import train

        few = slice(2 * BATCH)
        few_tokens = sum(2 * len(p) + len(c) + len(r) for p, c, r in ids[few][BATCH:])
        yield "PyTorch, row by row", lambda: Torch(self.model, self.dtype).train(ids[few], reference[few])[1], few_tokens
        yield "TRL", lambda: train(self.model, self.dtype, pairs[few]), few_tokens
        self.flops = 3 * self.cost.forward(sum(len(p) for p, _, _ in timed), sum(len(c) + len(r) for _, c, r in timed))

    def round(self):
        """16 prompts, K = 8, 128 tokens, scores by two models, 64 pairs trained (16 sampled, 48 replayed)."""
        offline = workload.preferences()
        replay = workload.write(self.work / "replay.jsonl", offline)
        model = ["--model", self.model, *self.args()]

        def pipe():
            with tempfile.TemporaryDirectory(dir=self.work) as folder:
                return ours.pipe(
                    ours.command("dice-gen", *model, "--k", K, "--max-tokens", NEW_TOKENS, self.prompt_file),
                    ours.command("dice-score", "--policy", self.model, "--ref", self.gguf or self.model, *self.args()),
                    ours.command("dice-pairs", "--replay", replay, "--gamma", "0.75", "--min-samples", 2, "--keep-truncated"),
                    ours.command("dice-train", *model, "--batch-size", BATCH, "--output", Path(folder) / "next"),
                )

        def scripted():
            """A quarter of it, in seconds of the whole."""
            policy, reference = Torch(self.model, self.dtype), self.peer
            prompts = self.ids[::QUARTER]
            total, responses = policy.generate(prompts, min_new_tokens=1)
            rows = [(prompts[i // K], response) for i, response in enumerate(responses)]
            for_policy, by_policy = policy.score(rows)
            for_reference, by_reference = reference.score(rows)
            rewards = [a - b for a, b in zip(by_policy, by_reference)]
            pairs = []
            for at in range(0, len(rows), K):
                order = sorted(range(at, at + K), key=lambda i: rewards[i])
                pairs.append((rows[at][0], rows[order[-1]][1], rows[order[0]][1]))
            pairs += [(policy.prompt(r["prompt"]), policy.response(r["chosen"]), policy.response(r["rejected"]))
                      for r in offline[: PAIRS // QUARTER - len(pairs)]]
            for_chosen, chosen = policy.score([(p, c) for p, c, _ in pairs])
            for_rejected, rejected = policy.score([(p, r) for p, _, r in pairs])
            for_steps = policy.train(pairs, [c - r for c, r in zip(chosen, rejected)])[0]
            return QUARTER * (total + for_policy + for_reference + for_chosen + for_rejected + for_steps)

        yield "ours", pipe, 1
        yield "transformers and PyTorch", scripted, 1
        self.flops = None


STAGES = ("generate", "score", "train", "round")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the model in Hugging Face layout, float32")
    parser.add_argument("--gguf", help="the same as GGUF, for llama.cpp (left out without it)")
    parser.add_argument("--runs", type=int, default=5, help="runs of each side")
    parser.add_argument("--stage", nargs="*", default=STAGES, choices=STAGES)
    parser.add_argument("--dtype", nargs="*", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--peer", nargs="*", help="only these peers (transformers, TRL, …); none after the flag: ours alone, beside the limit")
    args = parser.parse_args()
    gemm = ours.gemm_rates()
    print("matrix product: " + ", ".join(f"{gemm[d] / 1e9:.0f} GFLOP/s in {d}" for d in args.dtype) + "\n")
    print("| stage | dtype | ours | share of matrix product | peer | its rate | ratio |\n|---|---|--:|--:|---|--:|--:|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for dtype in args.dtype:
            bench = Bench(args, dtype, Path(folder))
            for stage in args.stage:
                report(bench, stage, dtype, args.runs, gemm[dtype], args.peer)


def report(bench, stage, dtype, runs, gemm, peers):
    sides = list(getattr(bench, stage)())
    if peers is not None:
        sides = [side for side in sides if side[0] in ("ours", "start", *peers)]
    times = {name: [] for name, _, _ in sides}
    for _ in range(runs):
        for name, work, _ in sides:
            times[name].append(work())
    print(json.dumps({name: [round(t, 2) for t in taken] for name, taken in times.items()}), file=sys.stderr, flush=True)
    median = {name: statistics.median(taken) for name, taken in times.items()}
    seconds = median["ours"] - median.pop("start", 0.0)
    tokens = {name: count for name, _, count in sides}
    rate = lambda name, t: f"{t:.0f} s" if stage == "round" else f"{tokens[name] / t:.0f} tokens/s"
    share = f"{bench.flops / seconds / gemm:.0%}" if bench.flops else ""
    if median.keys() == {"ours"}:
        print(f"| {stage} | {dtype} | {rate('ours', seconds)} | {share} | | | |", flush=True)
    for name, taken in median.items():
        if name != "ours":
            ratio = (tokens["ours"] / seconds) / (tokens[name] / taken)
            print(f"| {stage} | {dtype} | {rate('ours', seconds)} | {share} | {name} | {rate(name, taken)} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
