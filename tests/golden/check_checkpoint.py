"""Loads a checkpoint as a user of transformers would and computes log p(y|x) of rows with it.

    python check_checkpoint.py DIR ROWS.jsonl        (- reads stdin)

Rows: `prompt` (string or messages), `response` or `token_ids`, optional `finish_reason` (absent counts as stop),
optional `policy_logps`. Prints each row's `line` and `logp` as a JSON line. Exits 1, with one line on stderr a cause, when the
checkpoint has missing or unexpected keys or anything else does not load, or when a row's `policy_logps` is
further than --tolerance from the figure; 2 on wrong usage.
"""

import argparse
import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from exact import response_logps


def load(folder):
    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
        local_files_only=True,
    )
    for kind, keys in info.items():
        if keys:
            sys.exit(f"{folder}: {kind}: {sorted(map(str, keys))[:8]}")
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def ids_of(tokenizer, row):
    """(prompt ids through the saved chat template, response ids with the end-of-turn token when finished)."""
    prompt = row["prompt"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    prompt_ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    if row.get("token_ids") is not None:
        return prompt_ids, row["token_ids"]
    response_ids = tokenizer.encode(row["response"], add_special_tokens=False)
    finished = row.get("finish_reason", "stop") == "stop"
    return prompt_ids, response_ids + ([tokenizer.eos_token_id] if finished else [])


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("rows")
    parser.add_argument("--tolerance", type=float, default=2e-3, help="nats, absolute")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load(args.checkpoint)
    wrong = 0
    rows = sys.stdin if args.rows == "-" else open(args.rows, encoding="utf-8")
    for number, line in enumerate(rows, 1):
        row = json.loads(line)
        prompt_ids, response_ids = ids_of(tokenizer, row)
        logp = response_logps(model, prompt_ids, response_ids).sum().item() if response_ids else 0.0
        print(json.dumps({"line": number, "logp": logp}), flush=True)
        given = row.get("policy_logps")
        # `not <=`: a NaN is wrong too
        if given is not None and not abs(given - logp) <= args.tolerance:
            print(f"{args.rows}:{number}: policy_logps is {given}, transformers says {logp}", file=sys.stderr)
            wrong += 1
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
