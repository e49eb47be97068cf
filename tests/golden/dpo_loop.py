"""A plain PyTorch DPO loop: no padding, no packing, row by row forward, gradients accumulated, metrics as TRL names them."""

import torch

from dpo_loss import pair_loss
from exact import response_logps


def sums(model, pair):
    """Summed log p of (chosen, rejected) under the model."""
    return tuple(response_logps(model, pair["prompt_ids"], pair[side]).sum() for side in ("chosen_ids", "rejected_ids"))


def train(model, pairs, references, optimizer, scheduler, settings):
    """One pass over `pairs` in their order; yields one dict of metrics a step.

    references: [(ref chosen, ref rejected)] aligned with pairs. settings: loss_type, beta, label_smoothing,
    rpo_alpha, batch_size, max_grad_norm. Loss is the mean over the batch's pairs, plus RPO's term (see dpo_loss.py).
    """
    beta, size = settings["beta"], settings["batch_size"]
    for start in range(0, len(pairs), size):
        optimizer.zero_grad(set_to_none=True)
        batch = list(zip(pairs, references))[start : start + size]
        chosen_tokens = sum(len(pair["chosen_ids"]) for pair, _ in batch)
        loss, rows = 0.0, []
        for pair, (ref_chosen, ref_rejected) in batch:
            chosen, rejected = sums(model, pair)
            part = pair_loss(
                settings["loss_type"],
                beta,
                settings["label_smoothing"],
                chosen - ref_chosen,
                rejected - ref_rejected,
                len(pair["chosen_ids"]),
                len(pair["rejected_ids"]),
            ) / len(batch)
            if settings["rpo_alpha"] is not None:
                part = part - settings["rpo_alpha"] * chosen / chosen_tokens
            part.backward()
            loss += part.item()
            chosen, rejected = chosen.item(), rejected.item()
            rows.append((chosen, rejected, beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)))
        limit = settings["max_grad_norm"] or float("inf")
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit).item()
        rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()
        mean = lambda values: sum(values) / len(rows)
        yield {
            "step": start // size + 1,
            "loss": loss,
            "rewards/chosen": mean([r[2] for r in rows]),
            "rewards/rejected": mean([r[3] for r in rows]),
            "rewards/margins": mean([r[2] - r[3] for r in rows]),
            "rewards/accuracies": mean([float(r[2] > r[3]) for r in rows]),
            "logps/chosen": mean([r[0] for r in rows]),
            "logps/rejected": mean([r[1] for r in rows]),
            "grad_norm": grad_norm,
            "learning_rate": rate,
        }
