"""DPO's losses as pure functions of summed log-probs, after TRL's own text (trl/trainer/dpo_trainer.py).

With r_w, r_l = log-ratios (policy - reference) of the chosen and rejected response, n_w, n_l their token counts
(the end-of-turn token counts), d = beta (r_w - r_l), s = label smoothing:

    sigmoid  -(1 - s) log sigma(d) - s log sigma(-d)                      [a]
    robust   (-(1 - s) log sigma(d) + s log sigma(-d)) / (1 - 2 s)
    hinge    max(0, 1 - d)
    ipo      (r_w / n_w - r_l / n_l - 1 / (2 beta))^2                     [b]
    + rpo    loss + alpha * (negative log-likelihood per chosen token, over the whole batch)   [c]

[a] TRL up to 0.24.0. TRL 1.16.0's `sigmoid` ignores label_smoothing (it is read by robust and exo_pair only).
[b] Token-averaged in both. 1.16.0 averages inside the loss and reports rewards = beta * summed log-ratio, as here;
    0.24.0 averaged the log-probs first, so its logged IPO rewards and logps are per token.
[c] `rpo_alpha` in 0.24.0: mean over pairs of (loss + alpha * nll), where nll = cross-entropy over all chosen response
    tokens of the batch together (token mean, not a mean of per-pair means). 1.16.0 has no rpo_alpha: the same
    figure is loss_type ["sigmoid", "sft"] with loss_weights [1, alpha].
"""

import torch
import torch.nn.functional as F


def pair_loss(loss_type, beta, label_smoothing, chosen_ratio, rejected_ratio, chosen_tokens, rejected_tokens):
    """Loss of one pair; the ratios are tensors (policy - reference, summed over tokens), the counts numbers."""
    d = beta * (chosen_ratio - rejected_ratio)
    s = label_smoothing
    if loss_type == "sigmoid":
        return -(1 - s) * F.logsigmoid(d) - s * F.logsigmoid(-d)
    if loss_type == "robust":
        return (-(1 - s) * F.logsigmoid(d) + s * F.logsigmoid(-d)) / (1 - 2 * s)
    if loss_type == "hinge":
        return torch.relu(1 - d)
    if loss_type == "ipo":
        return (chosen_ratio / chosen_tokens - rejected_ratio / rejected_tokens - 1 / (2 * beta)) ** 2
    raise ValueError(loss_type)
