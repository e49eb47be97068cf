"""halves.py PREFERENCES PROMPTS DIR SHARE: writes DIR/a.jsonl, the preference pairs of so large a share of their prompts,
DIR/b.jsonl, the others, and DIR/prompts.jsonl, the prompts that are in neither. Shares and order come from a hash of the prompt."""

import hashlib
import json
import os
import sys


def rows(path):
    with open(path) as file:
        return [json.loads(line) for line in file if line.strip()]


def key(row):
    # Not the hash by which the tools split: each half has its own training, validation and test prompts.
    return hashlib.sha256(json.dumps(row["prompt"], sort_keys=True).encode()).digest()


def write(path, rows):
    with open(path + ".part", "w") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(path + ".part", path)


preferences, prompts, folder = sys.argv[1:4]
first = 256 * float(sys.argv[4])
pairs = rows(preferences)
write(f"{folder}/a.jsonl", [row for row in pairs if key(row)[0] < first])
write(f"{folder}/b.jsonl", [row for row in pairs if key(row)[0] >= first])
paired = {key(row) for row in pairs}
write(f"{folder}/prompts.jsonl", sorted((row for row in rows(prompts) if key(row) not in paired), key=key))
