"""Makes smollm2_dpo.json: 8 steps of DPO on SmolLM2-135M-Instruct in a plain PyTorch loop, float32 and float64.

    python make_smollm2_dpo.py MODEL_DIR smollm2_logps.jsonl --output smollm2_dpo.json

Pairs are two samples of one prompt, cut to at most 60 tokens; which one is called chosen means nothing.
The reference is the initial model. `steps` is float32, `steps64` the same run in float64 (exact.py): the distance between
the two is what float32 costs, and the tolerance of a test should be read from it.
"""

import argparse
import contextlib
import itertools
import json

import torch
from transformers import AutoModelForCausalLM, get_scheduler

from dpo_loop import sums, train
from exact import dump, exact, versions

PAIRS = 16
SETTINGS = dict(
    loss_type="sigmoid",
    beta=0.1,
    label_smoothing=0.0,
    rpo_alpha=None,
    batch_size=2,
    max_grad_norm=1.0,
    learning_rate=1e-5,
    betas=[0.9, 0.999],
    eps=1e-8,
    weight_decay=0.0,
    scheduler="constant",
    warmup_steps=0,
)
MAX_PROMPT, MIN_RESPONSE, MAX_RESPONSE = 60, 10, 60


def choose_pairs(path):
    """One or two pairs of samples a prompt, in file order, until there are PAIRS."""
    rows = [json.loads(line) for line in open(path, encoding="utf-8")]
    groups = [list(g) for _, g in itertools.groupby(rows, key=lambda r: r["prompt_ids"])]
    groups = [g for g in groups if len(g) == 4 and len(g[0]["prompt_ids"]) <= MAX_PROMPT]
    pairs = []
    for first in (0, 2):
        for group in groups:
            # Cuts of different lengths, so that chosen and rejected, short and long, all mix.
            cut = [MAX_RESPONSE - 9 * (len(pairs) % 4), MAX_RESPONSE - 7 * ((len(pairs) + 2) % 5)]
            chosen, rejected = (r["token_ids"][:n] for r, n in zip(group[first : first + 2], cut))
            if min(len(chosen), len(rejected)) >= MIN_RESPONSE and chosen != rejected:
                pairs.append(
                    {"prompt_ids": group[0]["prompt_ids"], "chosen_ids": chosen, "rejected_ids": rejected}
                )
    assert len(pairs) >= PAIRS, len(pairs)
    return pairs[:PAIRS]


def run(folder, pairs, dtype):
    """(reference log-probs, metrics of every step, log-probs of the first 4 pairs afterwards)"""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    # The pad token is <|im_end|>, which ends every turn; transformers would give its embedding no gradient.
    model.get_input_embeddings().padding_idx = None
    model = model.to(dtype).eval()
    with exact() if dtype == torch.float64 else contextlib.nullcontext():
        return run_loaded(model, pairs, dtype)


def run_loaded(model, pairs, dtype):
    with torch.no_grad():
        references = [tuple(x.item() for x in sums(model, pair)) for pair in pairs]
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=SETTINGS["learning_rate"],
        betas=SETTINGS["betas"],
        eps=SETTINGS["eps"],
        weight_decay=SETTINGS["weight_decay"],
    )
    steps = len(pairs) // SETTINGS["batch_size"]
    scheduler = get_scheduler(SETTINGS["scheduler"], optimizer, SETTINGS["warmup_steps"], steps)
    metrics = []
    for step in train(model, pairs, references, optimizer, scheduler, SETTINGS):
        print(dtype, step, flush=True)
        metrics.append(step)
    with torch.no_grad():
        after = [tuple(x.item() for x in sums(model, pair)) for pair in pairs[:4]]
    return references, metrics, after


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("rows")
    parser.add_argument("--output", required=True)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pairs = choose_pairs(args.rows)
    references, steps, after = run(args.model, pairs, torch.float32)
    _, steps64, after64 = run(args.model, pairs, torch.float64)
    for pair, (chosen, rejected) in zip(pairs, references):
        pair["ref_chosen_logps"], pair["ref_rejected_logps"] = chosen, rejected
    dump(
        args.output,
        {
            "made_with": versions(),
            "settings": SETTINGS,
            "pairs": pairs,
            "steps": steps,
            "steps64": steps64,
            # (chosen, rejected) of the first 4 pairs under the trained model
            "logps_after": after,
            "logps_after64": after64,
        },
    )


if __name__ == "__main__":
    main()
