"""Makes tiny_dpo.json: short DPO runs of every loss on the tiny llama family, in float64.

    python make_tiny_dpo.py FAMILIES/llama --output tiny_dpo.json
"""

import argparse
import pathlib

import torch
from transformers import get_scheduler

from dpo_loop import sums, train
from exact import dump, exact, versions
from make_families import load, random_ids

DEFAULTS = dict(
    loss_type="sigmoid",
    beta=0.1,
    label_smoothing=0.0,
    rpo_alpha=None,
    batch_size=2,
    max_grad_norm=1.0,
    learning_rate=1e-3,
    betas=[0.9, 0.999],
    eps=1e-8,
    weight_decay=0.0,
    scheduler="constant",
    warmup_steps=0,
)
PAIRS = 4  # gone through twice: 4 steps of 2, and the last two see what the first two learned
EPOCHS = 2

RUNS = [
    {},
    {"label_smoothing": 0.1},
    {"loss_type": "ipo"},
    {"loss_type": "hinge"},
    {"loss_type": "robust", "label_smoothing": 0.1},
    {"rpo_alpha": 1.0},
    {"weight_decay": 0.1, "scheduler": "linear", "warmup_steps": 1, "max_grad_norm": 0.0},
    {"scheduler": "cosine", "warmup_steps": 2, "beta": 0.5},
]


def run(folder, pairs, settings):
    model = load(folder)
    with torch.no_grad(), exact():
        references = [tuple(x.item() for x in sums(model, pair)) for pair in pairs]
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings["learning_rate"],
        betas=settings["betas"],
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
    )
    steps = len(pairs) // settings["batch_size"]
    scheduler = get_scheduler(settings["scheduler"], optimizer, settings["warmup_steps"], steps)
    with exact():
        metrics = list(train(model, pairs, references, optimizer, scheduler, settings))
    # A fingerprint of the trained weights: the L2 norm of each parameter.
    norms = {name: p.norm().item() for name, p in model.named_parameters()}
    return {"settings": settings, "steps": metrics, "parameter_norms": norms}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--output", required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(77)
    pairs = [
        {
            "prompt_ids": random_ids(generator, 5 + i, 96),
            "chosen_ids": random_ids(generator, 6 + 2 * i, 96),
            "rejected_ids": random_ids(generator, 17 - i, 96),
        }
        for i in range(PAIRS)
    ] * EPOCHS
    runs = [run(args.folder, pairs, {**DEFAULTS, **changes}) for changes in RUNS]
    for r in runs:
        print(r["settings"]["loss_type"], [round(s["loss"], 5) for s in r["steps"]], [round(s["grad_norm"], 3) for s in r["steps"]])
    dump(args.output, {"made_with": versions(), "pairs": pairs, "runs": runs})


if __name__ == "__main__":
    main()
