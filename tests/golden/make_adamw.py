"""Makes adamw.json: torch.optim.AdamW and clip_grad_norm_ on a small vector, and transformers' learning-rate schedules.

    python make_adamw.py --output adamw.json
"""

import argparse

import torch
from transformers import get_scheduler

from exact import dump, versions

SIZE = 10
STEPS = 5
SCHEDULE_STEPS = 10


def adamw(start, gradients, weight_decay, max_grad_norm, dtype):
    """Parameters and the norm before clipping (over the vector, split as two tensors) after each step."""
    halves = [start[:4].to(dtype).clone().requires_grad_(), start[4:].to(dtype).clone().requires_grad_()]
    optimizer = torch.optim.AdamW(halves, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay)
    steps = []
    for g in gradients:
        halves[0].grad, halves[1].grad = g[:4].to(dtype).clone(), g[4:].to(dtype).clone()
        limit = max_grad_norm if max_grad_norm is not None else float("inf")
        norm = torch.nn.utils.clip_grad_norm_(halves, limit).item()
        optimizer.step()
        steps.append({"grad_norm": norm, "params": torch.cat(halves).tolist()})
    return steps


def schedule(name, warmup, total):
    """Learning rate that step 1, 2, ... uses, for a peak of 1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return {"scheduler": name, "warmup_steps": warmup, "total_steps": total, "rates": rates}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True)
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(7)
    start = torch.randn(SIZE, generator=generator, dtype=torch.float64).float().double()
    gradients = torch.randn(STEPS, SIZE, generator=generator, dtype=torch.float64).float().double()
    gradients[:, 2] = 0.0  # a parameter without gradient: only decay moves it
    gradients[:, 3] *= 1e-9  # as small as eps
    gradients[1] *= 0.01  # a norm under the limit: not scaled
    gradients[3] *= 100.0
    runs = [
        {
            "weight_decay": decay,
            "max_grad_norm": limit,
            "lr": 1e-2,
            "betas": [0.9, 0.999],
            "eps": 1e-8,
            "steps": adamw(start, gradients, decay, limit, torch.float64),
        }
        for decay in (0.0, 0.1)
        for limit in (None, 1.0)
    ]
    schedules = [
        schedule(name, warmup, SCHEDULE_STEPS)
        for name in ("constant", "constant_with_warmup", "linear", "cosine")
        for warmup in (0, 3)
    ]
    dump(
        args.output,
        {
            "made_with": versions(),
            "start": start.tolist(),
            "gradients": gradients.tolist(),
            "runs": runs,
            "schedules": schedules,
        },
        indent=1,
    )


if __name__ == "__main__":
    main()
