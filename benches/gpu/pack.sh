#!/usr/bin/env bash
# Builds and packs what a GPU machine needs, in pieces that are each below 50 MB: run it where there is a compiler, with
#     just cuda-toolkit model          # nvcc, where there is none
#     benches/gpu/pack.sh [FOLDER]     # default: gpu-pack
# bench.py says what to do with the pieces there.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-gpu-pack}
model=models/SmolLM2-135M-Instruct.gguf
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cargo build --release --workspace --features common/cuda --bins --example gpu_rates
# The device's tests, which find the GPU by themselves; with the emulated device, too, since they are one program.
tests() {
    cargo test --release --workspace --features common/cuda,common/cuda-emulated --test "$1" --no-run \
        --message-format=json | python3 -c '
import json, sys
for line in sys.stdin:
    made = json.loads(line)
    if made.get("executable") and made["target"]["name"] == sys.argv[1] and "common/tests" in made["target"]["src_path"]:
        print(made["executable"])' "$1"
}
mkdir -p "$work/bin" "$work/tests/golden" "$work/examples" "$out"
for tool in dice-gen dice-score dice-pairs dice-train dice-eval examples/gpu_rates; do
    strip -o "$work/bin/$(basename $tool)" target/release/$tool
done
for test in cuda_kernels cuda cuda_training; do
    strip -o "$work/bin/test-$test" "$(tests $test)"
done
cp -r tests/golden/{families,tiny_chat,smollm2_logps.jsonl,tiny_dpo.json} "$work/tests/golden/"
cp examples/prompts.jsonl examples/preferences.jsonl "$work/examples/"
cp benches/gpu/bench.py benches/gpu/peer.py "$work/"
# The programs share most of their code: a dictionary that spans them all halves the piece.
tar -C "$work" -c . | xz -9 > "$out/tools.tar.xz"
split -n 2 -d --additional-suffix=.part "$model" "$out/model-"
ls -l "$out" >&2
