"""Makes smollm2_logps.jsonl: prompt/response rows of SmolLM2-135M-Instruct with transformers' log p(y|x).

    python make_smollm2_logps.py MODEL_DIR OUTPUT.jsonl [--rows OLD.jsonl]

MODEL_DIR comes from make_smollm2_folder.py. Responses are the model's own samples (temperature 0.9, 4 a prompt)
and some written by hand for this project. `logp` is float32, eager, one row alone; `logp64` is the same in float64 (exact.py),
so |logp - logp64| says how much of a difference is float32 itself.
"""

import argparse
import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from exact import exact, response_logps

SAMPLES = 4
TEMPERATURE = 0.9

# (prompt, most new tokens)
SAMPLED = [
    ("Explain why the sky is blue to a ten-year-old.", 256),
    ("Write a short story about a lighthouse keeper who finds a message in a bottle.", 256),
    ("Give me three tips for keeping houseplants alive during winter.", 256),
    ("What is the difference between a virus and a bacterium?", 256),
    ("Write a Python function that returns the n-th Fibonacci number.", 256),
    ("Summarise the plot of Romeo and Juliet in two sentences.", 192),
    ("My neighbour plays loud music at night. How should I bring it up with them?", 192),
    ("Convert 250 degrees Fahrenheit to Celsius and show the steps.", 192),
    ("List the planets of the solar system from largest to smallest.", 128),
    ("Write a polite e-mail asking my landlord to repair the heating.", 192),
    ("Suggest a name for a small bakery that only sells sourdough.", 48),
    ("Translate into French: The train leaves at half past seven.", 48),
    ("What is 17 * 23?", 48),
    ("Give a one-word answer: what is the capital of Japan?", 24),
    ("Write a haiku about a rainy Monday.", 48),
    ("Plan a cheap dinner for four people who like beans, rice and spinach.", 128),
    (
        [
            {"role": "system", "content": "You answer like a pirate, in one sentence."},
            {"role": "user", "content": "Where can I buy a good umbrella?"},
        ],
        64,
    ),
    (
        [
            {"role": "user", "content": "I have 12 apples and give away 5."},
            {"role": "assistant", "content": "Then you have 7 apples left."},
            {"role": "user", "content": "And if I buy 30 more?"},
        ],
        48,
    ),
]

# (prompt, response, finish_reason)
WRITTEN = [
    ("Is the Earth flat?", "No.", "stop"),
    ("Reply with a single letter.", "k", "stop"),
    ("Say nothing.", "", "stop"),
    ("Send me a cheerful emoji line.", "🎉🚀 Let's go! 👩‍🔬❤️ — “ready”?", "stop"),
    ("Sag mir auf Deutsch, wie das Wetter ist.", "Heute ist es schön: 21 °C, leichter Wind aus Südwest.", "stop"),
    ("日本語で自己紹介してください。", "はじめまして。私は小さな言語モデルです。よろしくお願いします！", "stop"),
    (
        "Write a Rust function that adds two numbers.",
        "```rust\nfn add(a: i64, b: i64) -> i64 {\n    a + b\n}\n```\n\nIt can't overflow silently in debug builds.",
        "stop",
    ),
    ("Count from 1 to 20.", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20", "length"),
    ("Give me the date and a phone number.", "2024-02-29, +49 30 1234567 (ext. 0089)", "stop"),
    ("  Leading spaces in a prompt.\n", "\n\n  Indented,\twith a tab\r\nand a Windows line end.  ", "length"),
]


def prompt_ids(tokenizer, prompt):
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def sample(model, tokenizer, prompt, max_tokens, seed):
    """Rows of one prompt's samples, without their log-probs."""
    ids = prompt_ids(tokenizer, prompt)
    torch.manual_seed(seed)
    batch = torch.tensor([ids])
    out = model.generate(
        batch,
        attention_mask=torch.ones_like(batch),
        do_sample=True,
        temperature=TEMPERATURE,
        top_k=0,
        top_p=1.0,
        num_return_sequences=SAMPLES,
        max_new_tokens=max_tokens,
    )
    end = tokenizer.eos_token_id
    for row in out[:, len(ids) :].tolist():
        stopped = end in row
        yield {
            "prompt": prompt,
            "response": tokenizer.decode(row[: row.index(end)] if stopped else row),
            "finish_reason": "stop" if stopped else "length",
            "prompt_ids": ids,
            "token_ids": row[: row.index(end) + 1] if stopped else row,
        }


def written(tokenizer, prompt, response, finish_reason):
    end = [tokenizer.eos_token_id] if finish_reason == "stop" else []
    return {
        "prompt": prompt,
        "response": response,
        "finish_reason": finish_reason,
        "prompt_ids": prompt_ids(tokenizer, prompt),
        "token_ids": tokenizer.encode(response, add_special_tokens=False) + end,
    }


def retokenizes(tokenizer, row):
    """Whether the response's text gives its token_ids again (samples need not take the tokenizer's own path)."""
    end = [tokenizer.eos_token_id] if row["finish_reason"] == "stop" else []
    return tokenizer.encode(row["response"], add_special_tokens=False) + end == row["token_ids"]


def make_rows(model, tokenizer):
    rows = []
    for seed, (prompt, max_tokens) in enumerate(SAMPLED):
        rows += sample(model, tokenizer, prompt, max_tokens, seed)
        print(f"{seed}: {[len(r['token_ids']) for r in rows[-SAMPLES:]]}", flush=True)
    return rows + [written(tokenizer, *row) for row in WRITTEN]


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("--rows", help="take the responses from here; only compute their log-probs anew")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    load = lambda: AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    model = load()
    if args.rows:
        rows = [json.loads(line) for line in open(args.rows, encoding="utf-8")]
    else:
        rows = make_rows(model, tokenizer)
    model64 = load().double()
    for i, row in enumerate(rows):
        row["retokenizes"] = retokenizes(tokenizer, row)
        row["logp"] = response_logps(model, row["prompt_ids"], row["token_ids"]).sum().item()
        with exact():
            row["logp64"] = response_logps(model64, row["prompt_ids"], row["token_ids"]).sum().item()
        print(f"{i}: {len(row['token_ids'])} tokens, {row['logp']:.4f}, {row['logp'] - row['logp64']:+.1e}", flush=True)
    with open(args.output, "w", encoding="utf-8") as f:
        for row in rows:
            f.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
