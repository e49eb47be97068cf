#!/usr/bin/env python3
"""Our stages beside transformers and a plain PyTorch loop: the same model, rows, number format and cores, in one run.

    just build model
    python3 -m venv peers && peers/bin/pip install torch transformers safetensors gguf
    peers/bin/python tests/golden/make_smollm2_folder.py models/SmolLM2-135M-Instruct.gguf peers/smollm2
    peers/bin/python benches/peers/bench.py --model peers/smollm2 [--runs 5] [--stage score …]

Prints one Markdown table: medians of the runs, tokens/s, and the ratio. The sides take turns, run by run, so that a busy
machine slows both. Ours is timed as a whole program less its start (the same command on one row, median), since it loads the
model each time and theirs does not; what is counted as a token is the same on both sides of a row.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
BIN = ROOT / "target" / "release"
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def rows_of(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def timed(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def tool(name, *args):
    with open("/dev/null", "wb") as null:
        subprocess.run([BIN / name, *map(str, args)], stdout=null, stderr=null, check=True)


class Peer:
    """transformers' model, and what a practitioner would write around it."""

    def __init__(self, folder, dtype):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype])
        self.end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")

    def prompt(self, text):
        messages = [{"role": "user", "content": text}]
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def response(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] + [self.end]

    def logp(self, prompt, response):
        """Sum of log p over the response; logits of the response's positions only."""
        ids = torch.tensor([prompt + response])
        logits = self.model(ids, logits_to_keep=len(response) + 1).logits[0, :-1].float()
        target = torch.tensor(response)
        return (logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(1)).sum()


def generate(work, model, dtype, peer):
    """16 prompts × K = 8, 128 new tokens each (none ends early, so that both do the same)."""
    prompts = [r for r in rows_of(ROOT / "examples/prompts.jsonl") if isinstance(r["prompt"], str)][:16]
    file, one = write(work / "prompts.jsonl", prompts), write(work / "one.jsonl", prompts[:1])
    done = work / "samples.jsonl"
    command = ["--model", model, "--dtype", dtype, "--max-tokens", 128, "--k"]
    done.unlink(missing_ok=True)
    tool("dice-gen", *command, 8, "-o", done, file)
    tokens = sum(len(r["token_ids"]) for r in rows_of(done))

    def theirs():
        with torch.no_grad():
            for at in range(0, len(prompts), 4):
                ids = [peer.prompt(r["prompt"]) for r in prompts[at : at + 4]]
                width = max(map(len, ids))
                pad = [[peer.end] * (width - len(i)) + i for i in ids]
                mask = [[0] * (width - len(i)) + [1] * len(i) for i in ids]
                peer.model.generate(
                    torch.tensor(pad), attention_mask=torch.tensor(mask), do_sample=True, temperature=0.9, top_k=0,
                    num_return_sequences=8, max_new_tokens=128, min_new_tokens=128, pad_token_id=peer.end,
                )

    return {
        "ours": lambda: tool("dice-gen", *command, 8, file),
        "start": lambda: tool("dice-gen", "--model", model, "--dtype", dtype, "--max-tokens", 1, "--k", 1, one),
        "ours_tokens": tokens,
        "theirs": theirs,
        "theirs_tokens": len(prompts) * 8 * 128,
    }


def score(work, model, dtype, peer):
    """16 prompts × 8 responses, policy and reference (here the same weights: the work is the same)."""
    file = work / "samples.jsonl"
    if not file.exists():
        generate(work, model, dtype, peer)
    rows = [{k: r[k] for k in ("prompt", "response", "finish_reason", "token_ids")} for r in rows_of(file)]
    file, one = write(work / "to-score.jsonl", rows), write(work / "one.jsonl", rows[:1])
    ids = [(peer.prompt(r["prompt"]), r["token_ids"]) for r in rows]

    def theirs():
        with torch.no_grad():
            for _ in ("policy", "reference"):
                for prompt, response in ids:
                    peer.logp(prompt, response)

    command = ["--policy", model, "--ref", model, "--dtype", dtype]
    tokens = sum(len(p) + len(r) for p, r in ids)
    return {
        "ours": lambda: tool("dice-score", *command, file),
        "start": lambda: tool("dice-score", *command, one),
        "ours_tokens": tokens,
        "theirs": theirs,
        "theirs_tokens": tokens,
    }


def train(work, model, dtype, peer):
    """64 pairs, batch 8; reference log-probs in the rows on our side, given on theirs. Theirs: row by row, no padding, AdamW."""
    pairs = rows_of(ROOT / "examples/preferences.jsonl")[:64]
    file = work / "pairs.jsonl"
    file.unlink(missing_ok=True)
    tool("dice-score", "--policy", model, "--ref", model, "-o", file, write(work / "raw.jsonl", pairs))
    scored = rows_of(file)
    eight = write(work / "eight.jsonl", scored[:8])
    ids = [(peer.prompt(r["prompt"]), peer.response(r["chosen"]), peer.response(r["rejected"])) for r in pairs]
    optimizer = torch.optim.AdamW(peer.model.parameters(), lr=5e-7, weight_decay=0.0)

    def theirs(count=64):
        for at in range(0, count, 8):
            for (prompt, chosen, rejected), row in zip(ids[at : at + 8], scored[at : at + 8]):
                margin = peer.logp(prompt, chosen) - peer.logp(prompt, rejected)
                margin = margin - (row["ref_chosen_logps"] - row["ref_rejected_logps"])
                (-torch.nn.functional.logsigmoid(0.1 * margin) / 8).backward()
            torch.nn.utils.clip_grad_norm_(peer.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    def ours(rows):
        with tempfile.TemporaryDirectory(dir=work) as folder:
            tool("dice-train", "--model", model, "--dtype", dtype, "--batch-size", 8, "--save-steps", 0,
                 "--output", Path(folder) / "next", rows)

    # Both less their first step: ours pays for loading and saving there, theirs for its warm-up.
    tokens = sum(len(p) * 2 + len(c) + len(r) for p, c, r in ids[8:])
    return {
        "ours": lambda: ours(file),
        "start": lambda: ours(eight),
        "ours_tokens": tokens,
        "theirs": lambda: theirs(),
        "theirs_start": lambda: theirs(8),
        "theirs_tokens": tokens,
    }


STAGES = {"generate": generate, "score": score, "train": train}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the model in Hugging Face layout, float32")
    parser.add_argument("--runs", type=int, default=5, help="runs of each side")
    parser.add_argument("--stage", nargs="*", default=list(STAGES), choices=STAGES)
    parser.add_argument("--dtype", nargs="*", default=list(DTYPES), choices=DTYPES)
    args = parser.parse_args()
    print("| stage | dtype | ours, tokens/s | transformers, tokens/s | ratio |\n|---|---|--:|--:|--:|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for dtype in args.dtype:
            peer = Peer(args.model, dtype)
            for stage in args.stage:
                case = STAGES[stage](Path(folder), args.model, dtype, peer)
                times = {key: [] for key in ("start", "ours", "theirs_start", "theirs")}
                for _ in range(args.runs):
                    for key, taken in times.items():
                        if key in case:
                            taken.append(timed(case[key]))
                        else:
                            taken.append(0.0)
                median = {key: statistics.median(taken) for key, taken in times.items()}
                ours = case["ours_tokens"] / (median["ours"] - median["start"])
                theirs = case["theirs_tokens"] / (median["theirs"] - median["theirs_start"])
                print(f"| {stage} | {dtype} | {ours:.0f} | {theirs:.0f} | {ours / theirs:.2f} |", flush=True)
                print({k: [round(t, 2) for t in v] for k, v in times.items()}, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
