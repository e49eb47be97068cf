"""transformers on a GPU: what a practitioner would write around it in plain PyTorch, on the rows that our tools had.

Weights, activations and the optimiser's states are bfloat16 throughout (what fits a big model on one card), attention is
PyTorch's own (`sdpa`). The first batch of each stage is not timed. Prints a JSON object for each stage: tokens a second (prompt
and response, every row alone, as TRL counts them; generation counts new tokens) and the peak of memory.

    python3 peer.py MODEL generate=PROMPTS score=SAMPLES train=PAIRS
"""

import argparse
import json
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def rows_of(path, tokenizer, fields):
    """(prompt ids, response ids …) of each row, as our tools encode them."""
    found = []
    for line in open(path, encoding="utf-8"):
        row = json.loads(line)
        prompt = row["prompt"]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        def encode(field):
            given = row.get("token_ids" if field == "response" else f"{field}_token_ids")
            return given or tokenizer(row[field], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]

        found.append((ids, *(encode(field) for field in fields)))
    return found


def padded(rows, pad):
    """Left-padded ids and their mask, on the GPU."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    return ids.cuda(), mask.cuda()


def logps(model, rows, pad):
    """Σ log p of each (prompt, response), one padded batch."""
    ids, mask = padded([p + r for p, r in rows], pad)
    longest = max(len(r) for _, r in rows)
    logits = model(ids, attention_mask=mask, logits_to_keep=longest + 1).logits[:, :-1].float()
    targets = ids[:, -longest:]
    each = logits.gather(2, targets[:, :, None])[:, :, 0] - logits.logsumexp(2)
    keep = torch.tensor([[i >= longest - len(r) for i in range(longest)] for _, r in rows]).cuda()
    return (each * keep).sum(1)


# Each stage is its rows, cut to what is worth the time (rates hardly change with more), and what is done with a batch of
# them, which gives the tokens that it took. Batches are of a size that is good for the model.


def generate(model, path, args, tokenizer, pad, large):
    prompts = [prompt for (prompt,) in rows_of(path, tokenizer, [])[:32]]

    def run(prompts):
        ids, mask = padded(prompts, pad)
        out = model.generate(ids, attention_mask=mask, do_sample=True, temperature=0.9, top_k=0, top_p=1.0,
                             num_return_sequences=args.k, max_new_tokens=args.max_tokens,
                             min_new_tokens=args.max_tokens, pad_token_id=pad)
        return out.shape[0] * (out.shape[1] - ids.shape[1])

    return prompts, 16, run


def score(model, path, args, tokenizer, pad, large):
    rows = rows_of(path, tokenizer, ["response"])[: 512 if large else 2048]
    rows.sort(key=lambda r: len(r[0]) + len(r[1]))

    @torch.no_grad()
    def run(rows):
        logps(model, rows, pad).tolist()
        return sum(len(p) + len(r) for p, r in rows)

    return rows, 32 if large else 64, run


def train(model, path, args, tokenizer, pad, large):
    pairs = rows_of(path, tokenizer, ["chosen", "rejected"])[: 16 if large else 256]
    if large:
        model.gradient_checkpointing_enable()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-7, weight_decay=0.0, fused=True)

    def run(pairs):
        # A large model takes one pair after the other.
        for part in [[pair] for pair in pairs] if large else [pairs]:
            both = logps(model, [(p, c) for p, c, _ in part] + [(p, r) for p, _, r in part], pad)
            margin = both[: len(part)] - both[len(part) :]
            # The reference's log-probs are given: constants cost nothing.
            (-torch.nn.functional.logsigmoid(0.1 * margin).sum() / len(pairs)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return sum(2 * len(p) + len(c) + len(r) for p, c, r in pairs)

    return pairs, 8, run


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("stage", nargs="+", help="generate=PROMPTS, score=SAMPLES or train=PAIRS")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "f32"])
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=128)
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    dtype = {"bf16": torch.bfloat16, "f32": torch.float32}[args.dtype]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).cuda()
    pad = tokenizer.eos_token_id or 0
    large = sum(p.numel() for p in model.parameters()) > 1e9
    for stage in args.stage:
        name, path = stage.split("=", 1)
        rows, at_once, run = {"generate": generate, "score": score, "train": train}[name](model, path, args, tokenizer, pad, large)
        batches = [rows[at : at + at_once] for at in range(0, len(rows), at_once)]
        run(batches[0])  # to warm up
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        tokens = sum(map(run, batches[1:]))
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        print(json.dumps({"stage": name, "tokens": tokens, "seconds": seconds, "rate": tokens / seconds,
                          "peak_gb": torch.cuda.max_memory_allocated() / 1e9}), flush=True)


main()
