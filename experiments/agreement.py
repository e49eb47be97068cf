"""agreement.py NAME=SCORED.jsonl … < ROWS: how often the implicit reward of each scored file puts two finished responses to one prompt
in the order in which the `reward` of ROWS, a program's, puts them. ROWS are the responses of all files; ties are left out. Prints a
Markdown table, percent with 95% intervals over prompts (bootstrap)."""

import itertools
import json
import random
import sys


def rows(file):
    return [json.loads(line) for line in file if line.strip()]


def right(scored, marks):
    """For each prompt the pairs that are in the same order, and all that have one."""
    prompts = {}
    for row in scored:
        if row["finish_reason"] != "length":
            mark = marks[row["prompt"], row["response"]]
            prompts.setdefault(row["prompt"], []).append((row["reward"], mark))
    for found in prompts.values():
        signs = [(a[0] - b[0]) * (a[1] - b[1]) for a, b in itertools.combinations(found, 2)]
        yield sum(s > 0 for s in signs), sum(s != 0 for s in signs)


def rate(counts):
    return 100 * sum(n for n, _ in counts) / max(1, sum(of for _, of in counts))


marks = {(row["prompt"], row["response"]): row["reward"] for row in rows(sys.stdin)}
print("| reward of | agrees | pairs | prompts |\n|---|--:|--:|--:|")
for argument in sys.argv[1:]:
    name, path = argument.split("=", 1)
    with open(path) as file:
        counts = [count for count in right(rows(file), marks) if count[1]]
    draws = random.Random(0)
    drawn = sorted(rate(draws.choices(counts, k=len(counts))) for _ in range(2000)) if counts else [0]
    low, high = drawn[len(drawn) // 40], drawn[-1 - len(drawn) // 40]
    print(f"| {name} | {rate(counts):.1f} ({low:.1f} … {high:.1f}) | {sum(of for _, of in counts)} | {len(counts)} |")
