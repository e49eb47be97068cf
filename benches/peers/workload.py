"""The rows that both sides work on, in files that our tools read, and the arithmetic that they cost.

Rows come from examples/: the first 16 prompts, and the first 64 preference pairs. The samples to score are made once by dice-gen.
Ours does all of it. Peers, which take up to ten times as long, do a quarter, and their rate counts; all of their costs but loading
(which is not timed) grow with the rows. PyTorch and TRL train two steps of eight pairs, of which the second is timed.
"""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROMPTS, K, NEW_TOKENS, PAIRS, BATCH = 16, 8, 128, 64, 8
QUARTER = 4


def read(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prompts():
    rows = read(ROOT / "examples/prompts.jsonl")
    return [row for row in rows if isinstance(row["prompt"], str)][:PROMPTS]


def preferences():
    return read(ROOT / "examples/preferences.jsonl")[:PAIRS]


class Cost:
    """Useful FLOPs of a forward pass: two per weight and token; the LM head only where a next token is asked for.

    The products of attention are left out (under 2% at these lengths), and so is all that a shared prompt would cost twice.
    """

    def __init__(self, config):
        hidden, heads, kv = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        attention = hidden * hidden * 2 + 2 * hidden * hidden * kv // heads
        mlp = 3 * hidden * config.intermediate_size * (getattr(config, "num_experts_per_tok", None) or 1)
        self.layers = 2 * config.num_hidden_layers * (attention + mlp)
        self.head = 2 * hidden * config.vocab_size
        self.pair = 4 * hidden * config.num_hidden_layers
        # Elements of a token's keys and values, and of one of them.
        self.token = 2 * hidden * kv // heads * config.num_hidden_layers
        self.head_size = hidden // heads

    def forward(self, prompt_tokens, response_tokens):
        return self.layers * (prompt_tokens + response_tokens) + self.head * response_tokens

    def reread(self, length, element):
        """Bytes of a response's own keys and values that sampling it reads: each token's for all after it; `element` of each element."""
        return self.token * element * length**2 / 2

    def group(self, prompt, responses):
        """A prompt and the lengths of its responses, the products of attention included: each pair of tokens that see each other."""
        pairs = prompt**2 / 2 + sum(prompt * n + n**2 / 2 for n in responses)
        return self.forward(prompt, sum(responses)) + self.pair * pairs
