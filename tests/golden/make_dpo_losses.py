"""Makes dpo_losses.json: losses, rewards and derivatives with respect to the policy's log-probs, from autograd in float64.

    python make_dpo_losses.py --output dpo_losses.json

`batches` hold one or more pairs each. `loss` is the batch's (the mean over pairs, plus RPO's term);
`d_chosen`/`d_rejected` of a pair are d (batch loss) / d (its summed policy log-prob). See dpo_loss.py for the formulas.
"""

import argparse

import torch

from dpo_loss import pair_loss
from exact import dump, versions

# (policy chosen, policy rejected, reference chosen, reference rejected, chosen tokens, rejected tokens)
PAIRS = [
    (-45.25, -61.5, -47.0, -58.25, 31, 40),  # right way round
    (-120.5, -33.125, -101.0, -36.5, 77, 12),  # wrong way round
    (-50.0, -40.0, -50.0, -40.0, 20, 25),  # policy = reference
    (-10.0, -30.0, -15.0, -25.0, 5, 9),  # d = 1 at beta 0.1: the hinge's corner
    (-0.001, -2.5, -0.002, -2.25, 1, 1),  # one token each
    (-200.0, -1300.0, -250.0, -350.0, 256, 300),  # margin + 1000
    (-1300.0, -200.0, -350.0, -250.0, 300, 256),  # margin - 1000
    (-1e3, -1e6, -1e6, -1e3, 2048, 2048),  # margin about + 2e6
    (-1e6, -1e3, -1e3, -1e6, 2048, 2048),  # margin about - 2e6
]

# (loss, beta, label smoothing, RPO's alpha or None)
SETTINGS = [
    ("sigmoid", 0.1, 0.0, None),
    ("sigmoid", 1.0, 0.0, None),
    ("sigmoid", 0.1, 0.1, None),
    ("robust", 0.1, 0.1, None),
    ("robust", 0.1, 0.3, None),
    ("robust", 0.1, 0.0, None),
    ("hinge", 0.1, 0.0, None),
    ("hinge", 0.05, 0.0, None),
    ("ipo", 0.1, 0.0, None),
    ("ipo", 0.5, 0.0, None),
    ("sigmoid", 0.1, 0.0, 1.0),
    ("sigmoid", 0.1, 0.1, 0.25),
]


def batch(setting, pairs):
    loss_type, beta, smoothing, rpo_alpha = setting
    tensor = lambda column: torch.tensor([p[column] for p in pairs], dtype=torch.float64)
    chosen, rejected = tensor(0).requires_grad_(), tensor(1).requires_grad_()
    ref_chosen, ref_rejected = tensor(2), tensor(3)
    losses = pair_loss(
        loss_type, beta, smoothing, chosen - ref_chosen, rejected - ref_rejected, tensor(4), tensor(5)
    )
    loss = losses.mean()
    nll = -chosen.sum() / tensor(4).sum()
    if rpo_alpha is not None:
        loss = loss + rpo_alpha * nll
    loss.backward()
    rows = []
    for i, p in enumerate(pairs):
        rows.append(
            {
                "policy_chosen_logps": p[0],
                "policy_rejected_logps": p[1],
                "ref_chosen_logps": p[2],
                "ref_rejected_logps": p[3],
                "chosen_tokens": p[4],
                "rejected_tokens": p[5],
                "rewards_chosen": (beta * (chosen - ref_chosen))[i].item(),
                "rewards_rejected": (beta * (rejected - ref_rejected))[i].item(),
                "pair_loss": losses[i].item(),
                "d_chosen": chosen.grad[i].item(),
                "d_rejected": rejected.grad[i].item(),
            }
        )
    return {
        "loss_type": loss_type,
        "beta": beta,
        "label_smoothing": smoothing,
        "rpo_alpha": rpo_alpha,
        "nll": nll.item(),
        "loss": loss.item(),
        "pairs": rows,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True)
    args = parser.parse_args()
    batches = []
    for setting in SETTINGS:
        batches += [batch(setting, [pair]) for pair in PAIRS]
        batches.append(batch(setting, PAIRS[:5]))
    dump(args.output, {"made_with": {**versions(), "formulas": "see dpo_loss.py"}, "batches": batches}, indent=1)


if __name__ == "__main__":
    main()
