"""transformers' model, and what a practitioner would write around it in plain PyTorch."""

import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from workload import BATCH, K, NEW_TOKENS

logging.disable_progress_bar()

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


class Torch:
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

    def generate(self, prompts, min_new_tokens=NEW_TOKENS):
        """K samples of each prompt, 32 sequences at a time. Returns seconds and the responses' ids."""
        start, responses = time.perf_counter(), []
        with torch.no_grad():
            for at in range(0, len(prompts), 32 // K):
                part = prompts[at : at + 32 // K]
                width = max(map(len, part))
                ids = torch.tensor([[self.end] * (width - len(p)) + p for p in part])
                mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part])
                out = self.model.generate(
                    ids, attention_mask=mask, do_sample=True, temperature=0.9, top_k=0, num_return_sequences=K,
                    max_new_tokens=NEW_TOKENS, min_new_tokens=min_new_tokens, pad_token_id=self.end,
                )
                responses += [self.cut(row[width:].tolist()) for row in out]
        return time.perf_counter() - start, responses

    def cut(self, ids):
        return ids[: ids.index(self.end) + 1] if self.end in ids else ids

    def logp(self, prompt, response):
        """Sum of log p over the response; logits of the response's positions only."""
        ids = torch.tensor([prompt + response])
        logits = self.model(ids, logits_to_keep=len(response) + 1).logits[0, :-1].float()
        return (logits.gather(1, torch.tensor(response)[:, None])[:, 0] - logits.logsumexp(1)).sum()

    def score(self, rows):
        """Log-probs row by row. Returns seconds and the figures."""
        start = time.perf_counter()
        with torch.no_grad():
            figures = [self.logp(*row).item() for row in rows]
        return time.perf_counter() - start, figures

    def score_padded(self, rows, size=8):
        """Log-probs, `size` rows of like length at a time, padded to the longest."""
        start = time.perf_counter()
        rows = sorted(rows, key=lambda row: len(row[0]) + len(row[1]))
        with torch.no_grad():
            for at in range(0, len(rows), size):
                part = rows[at : at + size]
                width = max(len(p) + len(r) for p, r in part)
                keep = max(len(r) for _, r in part) + 1
                ids = torch.tensor([[self.end] * (width - len(p) - len(r)) + p + r for p, r in part])
                mask = torch.tensor([[0] * (width - len(p) - len(r)) + [1] * (len(p) + len(r)) for p, r in part])
                logits = self.model(ids, attention_mask=mask, logits_to_keep=keep).logits[:, :-1].float()
                target = ids[:, 1 - keep :]
                logps = logits.gather(2, target[:, :, None])[:, :, 0] - logits.logsumexp(2)
                for row, (_, response) in zip(logps, part):
                    row[-len(response) :].sum().item()
        return time.perf_counter() - start

    def train(self, pairs, reference):
        """DPO row by row, without padding, AdamW. pairs: (prompt, chosen, rejected) ids; reference: log-ratios.

        Returns the seconds of all steps, and of all but the first (in which PyTorch warms up).
        """
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=5e-7, weight_decay=0.0)
        times = [time.perf_counter()]
        for at in range(0, len(pairs), BATCH):
            for (prompt, chosen, rejected), expected in zip(pairs[at : at + BATCH], reference[at : at + BATCH]):
                margin = self.logp(prompt, chosen) - self.logp(prompt, rejected) - expected
                (-torch.nn.functional.logsigmoid(0.1 * margin) / BATCH).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            times.append(time.perf_counter())
        return times[-1] - times[0], times[-1] - times[1]
