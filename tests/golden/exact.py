"""Shared arithmetic of the reference scripts: exact float64 forward passes, response log-probs, compact JSON.

transformers casts to float32 inside RMSNorm, the eager softmax and the rotary embedding even when the model
is in float64. `exact()` makes those casts float64 for the time of a `with` block, so that a figure is exact to
about 1e-13 and a gradient check against it measures our code and not theirs. The rotary inverse frequencies
stay what transformers makes them: rounded to float32.
"""

import contextlib
import json

import torch


@contextlib.contextmanager
def exact():
    """Inside the block, transformers' casts to float32 are casts to float64."""
    saved = torch.float32, torch.float, torch.Tensor.float
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        torch.float32, torch.float, torch.Tensor.float = saved


def response_logps(model, prompt_ids, response_ids):
    """log p of each response token given all ids before it: tensor [len(response_ids)], nats.

    One row alone, no padding, no cache; temperature 1. The target's logit minus logsumexp, as TRL computes it in
    float32, and not log_softmax: torch's float32 log_softmax on a CPU is off by about +6e-6 a token, always upwards,
    at a vocabulary of 49,152, which makes 1.5e-3 over 256 tokens.
    """
    ids = torch.tensor([list(prompt_ids) + list(response_ids)])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt_ids) - 1 : -1]  # [R, V]
    targets = torch.tensor(list(response_ids))[:, None]  # [R, 1]
    return logits.gather(1, targets)[:, 0] - torch.logsumexp(logits, dim=-1)


def dump(path, value, indent=None):
    """Writes JSON with full float precision and a last newline; NaN and infinities are an error."""
    with open(path, "w", encoding="utf-8") as f:
        json.dump(value, f, ensure_ascii=False, allow_nan=False, indent=indent)
        f.write("\n")


def versions():
    """What made the figures."""
    import transformers

    return {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}
