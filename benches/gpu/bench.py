#!/usr/bin/env python3
"""Our tools on a GPU: are the figures right, how fast is each stage, how much memory does it take. It builds nothing.

Where the tools are built (no GPU needed), `benches/gpu/pack.sh` makes three pieces below 50 MB each in gpu-pack/. Bring them
and this file's folder to the GPU machine, in as many trips as its door asks for, and there:

    python3 benches/gpu/bench.py unpack gpu-pack    # after each trip: keeps what has come in $DICE_GPU (/tmp/dice-gpu)
    python3 benches/gpu/bench.py rates tests        # ~1 minute: what the card gives; every kernel, every family, sanitizers
    python3 benches/gpu/bench.py small figures      # ~1 minute: SmolLM2-135M: generate, score, train; log-probs, samples
    python3 benches/gpu/bench.py large              # ~1 minute: a random Llama-3-8B: generate, score
    python3 benches/gpu/bench.py large-train        # ~1 minute: its full-parameter DPO and LoRA at 2 x 2048 tokens a pair
    python3 benches/gpu/bench.py small-peers large-peers  # ~2 minutes: transformers on the same rows
    python3 benches/gpu/bench.py experts            # ~1 minute: a random mixture of OLMoE's shape: generate, score, train LoRA
    python3 benches/gpu/bench.py table              # the tables, in Markdown, with the floors

(The model is for `small` and `figures` alone. On $DICE_GPU in memory, /dev/shm, an 8B model is there in seconds.)

Steps may share a call and come in any order after `unpack`; a machine that starts afresh between two calls needs `unpack` (and
`rates`, for the shares) again. Every step adds to $DICE_GPU/results.json, which is copied to $OUT where that is set, and prints
what it found at once, so that a step that runs out of time loses only itself. `--quick` runs each on a few rows.

Needs: the driver, and cuBLAS, which is looked for beside PyTorch's wheels and in /usr/local/cuda. How things are measured:

- Rates of our tools are those of their own summary line: from the first row read to the last written, models loaded. Training
  is timed from its first step's row to its last.
- Useful FLOPs: two per weight and token, a prompt once for all that shares it, the LM head for response tokens only; training
  three times that, of adapters alone two times. Attention's own products are left out. The share is of the best product
  that `gpu_rates` measured in that format.
- The floor of generation is the time in which all weights are read once a step, at the rate of a copy on the device.
- Peak memory is the highest that nvidia-smi showed, every 0.1 s, less what was taken before.
"""

import argparse
import glob
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

HOME = Path(os.environ.get("DICE_GPU", "/tmp/dice-gpu"))
RESULTS = HOME / "results.json"
SMALL = HOME / "SmolLM2-135M-Instruct.gguf"
LARGE, EXPERTS = HOME / "llama-8b", HOME / "olmoe"
K = 16
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")


# ---- What is kept between calls --------------------------------------------------------------------------------------


def results():
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def note(name, value):
    kept = results()
    kept[name] = value
    RESULTS.write_text(json.dumps(kept, indent=1))
    if os.environ.get("OUT"):
        shutil.copy(RESULTS, Path(os.environ["OUT"]) / "results.json")
    print(f"{name}: {json.dumps(value)}", flush=True)


def unpack(folder):
    HOME.mkdir(parents=True, exist_ok=True)
    for piece in (piece for piece in Path(folder).glob("*") if piece.is_file()):
        shutil.copy(piece, HOME / piece.name)
    if (HOME / "tools.tar.xz").exists():
        with tarfile.open(HOME / "tools.tar.xz") as tools:
            tools.extractall(HOME, filter="tar")
    (HOME / "common").mkdir(exist_ok=True)  # from where the tests look for their figures
    parts = sorted(HOME.glob("model-*.part"))
    if len(parts) == 2 and not SMALL.exists():
        SMALL.write_bytes(b"".join(part.read_bytes() for part in parts))
    print(f"{HOME}: tools {'there' if (HOME / 'bin').exists() else 'missing'}, model {'there' if SMALL.exists() else 'missing'}")


# ---- Running our tools -----------------------------------------------------------------------------------------------


def environment():
    folders = ["/usr/local/cuda/lib64"]
    for site in sys.path:
        folders += glob.glob(f"{site}/nvidia/*/lib")
    old = os.environ.get("LD_LIBRARY_PATH")
    return {**os.environ, "LD_LIBRARY_PATH": ":".join(folders + ([old] if old else []))}


def gpu_memory(which):
    """GB of the first GPU: `used` or `total`."""
    query = ["nvidia-smi", f"--query-gpu=memory.{which}", "--format=csv,noheader,nounits", "-i", "0"]
    return float(subprocess.run(query, capture_output=True, text=True, check=True).stdout) / 1024 * 1.073741824


class Peak(threading.Thread):
    """The most memory that was in use while it ran."""

    def __init__(self):
        super().__init__(daemon=True)
        self.before, self.most, self.going = gpu_memory("used"), 0.0, True

    def run(self):
        while self.going:
            self.most = max(self.most, gpu_memory("used"))
            time.sleep(0.1)

    def stop(self):
        self.going = False
        self.join()
        return max(self.most - self.before, 0.0)


def run(*command, output=None, timeout=590):
    """Runs a tool; gives its summary's tokens, rate and seconds, the seconds of the whole, and the peak of memory."""
    command = [str(HOME / "bin" / command[0]), *map(str, command[1:])]
    peak = Peak()
    peak.start()
    start = time.perf_counter()
    with open(output or os.devnull, "w") as to:
        done = subprocess.run(command, stdout=to, stderr=subprocess.PIPE, text=True, env=environment(), timeout=timeout)
    whole = time.perf_counter() - start
    memory = peak.stop()
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    found = re.search(r"(\d+) tokens, (\d+) tokens/s in ([\d.]+) s", done.stderr)
    if not found:
        sys.exit(f"{' '.join(command)}: no rate in its last line:\n{done.stderr[-2000:]}")
    tokens, rate, seconds = (float(x) for x in found.groups())
    return {"tokens": tokens, "rate": rate, "seconds": seconds, "whole": whole, "peak_gb": memory,
            "on": (re.search(r"computing in (.*)", done.stderr) or [None, "?"])[1]}


def rows_of(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ---- The arithmetic --------------------------------------------------------------------------------------------------


class Shape:
    """A model's sizes, and what it costs: FLOPs of a token in the layers and in the LM head, and the weights that a step reads
    (of experts all: there are more sequences)."""

    def __init__(self, hidden, layers, heads, kv, dim, ffn, vocab, experts=1, used=1):
        self.hidden, self.layers, self.heads, self.kv, self.dim, self.ffn, self.vocab = hidden, layers, heads, kv, dim, ffn, vocab
        self.experts, self.used = experts, used
        attention = hidden * dim * (heads + 2 * kv) + heads * dim * hidden
        mlp = 3 * hidden * ffn
        self.weights = layers * (attention + experts * mlp) + vocab * hidden
        self.layer_flops, self.head_flops = 2 * layers * (attention + used * mlp), 2 * vocab * hidden

    def flops(self, prompt, response):
        return self.layer_flops * (prompt + response) + self.head_flops * response


SHAPES = {
    "small": Shape(576, 30, 9, 3, 64, 1536, 49152),
    "large": Shape(4096, 32, 32, 8, 128, 14336, 128256),
    "experts": Shape(2048, 16, 16, 16, 128, 1024, 50304, experts=64, used=8),
}


def gemm(dtype):
    return results().get("rates", {}).get("gemm_tflops", {}).get(dtype, {}).get("best")


def share(flops, seconds, dtype):
    rate = gemm(dtype)
    return flops / seconds / 1e12 / rate if rate else None


# ---- Steps -----------------------------------------------------------------------------------------------------------


def rates(_):
    text = subprocess.run([HOME / "bin/gpu_rates"], capture_output=True, text=True, env=environment())
    if text.returncode != 0:
        sys.exit(f"gpu_rates failed: {text.stderr}")
    note("rates", json.loads(text.stdout))


def tests(args):
    """Every kernel against float64; every family against transformers' figures and the CPU's decoder, training included."""
    env = {**environment(), "CARGO_MANIFEST_DIR": str(HOME / "common")}
    checked = sanitizers(env) if not args.quick else {}
    for test in ("cuda_kernels", "cuda", "cuda_training"):
        done = subprocess.run([HOME / f"bin/test-{test}"], env=env, capture_output=True, text=True)
        note(f"tests {test}", {"passed": done.returncode == 0, "end": (done.stdout + done.stderr)[-1500:]})
    for tool, process in checked.items():
        try:
            code = process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            code = "timed out"
        text = (HOME / f"{tool}.log").read_text()
        note(f"sanitizer {tool}", {"clean": code == 0, "exit": code, "end": text[-300:]})
        if os.environ.get("OUT"):
            shutil.copy(HOME / f"{tool}.log", os.environ["OUT"])


def sanitizers(env):
    """compute-sanitizer over the kernels' tests: accesses, races, what nobody wrote, barriers. All go on at once."""
    found = shutil.which("compute-sanitizer") or next(iter(glob.glob("/usr/local/cuda*/bin/compute-sanitizer")), None)
    going = {}
    for tool in SANITIZERS if found else ():
        # Which module has a kernel is asked of one after the other: a "no" is no error.
        command = [found, "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9", HOME / "bin/test-cuda_kernels",
                   "--test-threads", "1", *(() if tool == "memcheck" else ("bf16",))]
        output = open(HOME / f"{tool}.log", "w")
        going[tool] = subprocess.Popen(list(map(str, command)), env=env, stdout=output, stderr=output)
    return going


def logps_of(dtype, model):
    """SmolLM2's log-probs of the golden responses."""
    scored = HOME / f"golden-{dtype}.jsonl"
    run("dice-score", "--device", "cuda", "--dtype", dtype, "--policy", model, "--ref", model,
        HOME / "tests/golden/smollm2_logps.jsonl", output=scored)
    return [row["policy_logps"] for row in rows_of(scored)]


def compare(name, found, exact, lengths, tolerance):
    off = [(abs(f / e - 1), length) for f, e, length in zip(found, exact, lengths)]
    beyond = [one for one in sorted(off, reverse=True) if one[0] >= tolerance]
    note(name, {"mean_relative": sum(o for o, _ in off) / len(off), "most": max(off)[0],
                "beyond (relative, tokens)": beyond, "fine": not beyond})


def figures(_):
    """SmolLM2's log-probs against float64; the same draws again, with other neighbours."""
    golden = rows_of(HOME / "tests/golden/smollm2_logps.jsonl")
    exact, lengths = [row["logp64"] for row in golden], [len(row["token_ids"]) for row in golden]
    for dtype, tolerance in (("f32", 1e-4), ("f16", 1e-2), ("bf16", 1e-2)):
        compare(f"log-probs {dtype}", logps_of(dtype, SMALL), exact, lengths, tolerance)
    # The GGUF's weights are no bfloat16: of weights that are, only the arithmetic is left to differ. (float32 is exact enough.)
    rounded = small_folder(rounded=True)
    compare("log-probs bf16 (weights in bf16)", logps_of("bf16", rounded), logps_of("f32", rounded), lengths, 1e-2)
    prompts = write(HOME / "few.jsonl", text_prompts(4))
    made = []
    for order in (1, -1):
        write(HOME / "order.jsonl", rows_of(prompts)[::order])
        run("dice-gen", "--device", "cuda", "--model", SMALL, "--k", 4, "--max-tokens", 64, HOME / "order.jsonl",
            output=HOME / "made.jsonl")
        made.append({(row["id"], row["sample"]): row["token_ids"] for row in rows_of(HOME / "made.jsonl")})
    note("samples", {"same in another order": made[0] == made[1]})


def text_prompts(count):
    """So many prompts, from the start again where the file has fewer."""
    prompts = [row["prompt"] for row in rows_of(HOME / "examples/prompts.jsonl") if isinstance(row["prompt"], str)]
    return [{"prompt": prompts[i % len(prompts)], "id": str(i)} for i in range(count)]


def stages(name, model, dtype, prompts, max_tokens, at_once):
    """Generates, with each of these numbers of sequences at a time, and scores what came; notes all."""
    shape, bytes_each = SHAPES[name], {"bf16": 2, "f32": 4}[dtype]
    where = ("--device", "cuda", "--dtype", dtype)
    file, samples = write(HOME / "prompts.jsonl", text_prompts(prompts)), HOME / f"{name}-samples.jsonl"
    for slots in at_once:
        made = run("dice-gen", *where, "--model", model, "--k", K, "--max-tokens", max_tokens, "--batch-size", slots, file,
                   output=samples)
        read = results().get("rates", {}).get("read_gbps")
        if read:
            floor = slots * read * 1e9 / (shape.weights * bytes_each)
            made.update(floor=floor, share=made["rate"] / floor)
        note(f"{name} generate ({slots} at once) {dtype}", made)
    # Without the sampler's log-probs, so that the policy is run, too.
    rows = [{k: v for k, v in row.items() if k not in ("logp", "model")} for row in rows_of(samples)]
    unscored = write(HOME / f"{name}-unscored.jsonl", rows)
    response = sum(len(row["token_ids"]) for row in rows)
    for each in (dtype, "f16"):
        scored = run("dice-score", "--device", "cuda", "--dtype", each, "--policy", model, "--ref", model, unscored)
        shared = scored["tokens"] - response  # what the forward passes had beside responses: prompts, once each
        scored["share"] = share(2 * shape.flops(shared, response), scored["seconds"], dtype)
        scored["counted_per_row"] = response + shared * K
        note(f"{name} score {each}", scored)


def train(name, model, dtype, pairs, *more, label="train", batch=8):
    """Timed from the first step's row to the last; then it is stopped: writing a model is no part of training."""
    shape, rows = SHAPES[name], rows_of(pairs)
    shutil.rmtree(HOME / "trained.part", ignore_errors=True)
    command = [HOME / "bin/dice-train", "--device", "cuda", "--dtype", dtype, "--model", model, "--output", HOME / "trained",
               "--save-steps", 0, "--batch-size", batch, *more, pairs]
    peak = Peak()
    peak.start()
    steps, times = [], []
    with open(HOME / "train.log", "w") as log:
        process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=log, text=True, env=environment())
        for line in process.stdout:
            steps.append(json.loads(line))
            times.append(time.perf_counter())
            if len(steps) == -(-len(rows) // batch):
                process.kill()
        process.wait()
    memory = peak.stop()
    shutil.rmtree(HOME / "trained.part", ignore_errors=True)
    if len(steps) < 2:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{(HOME / 'train.log').read_text()[-2000:]}")
    seconds = times[-1] - times[0]
    tokens = steps[-1]["num_tokens"] - steps[0]["num_tokens"]
    # Each step has its share of all responses, near enough: rows come shuffled.
    response = sum(len(row[f"{side}_token_ids"]) for row in rows for side in ("chosen", "rejected"))
    response = response * (len(steps) - 1) / len(steps)
    prompts = tokens - response
    passes = 2 if "LoRA" in label else 3  # adapters have no gradient of the weights
    note(f"{name} {label} {dtype}", {
        "tokens": tokens, "seconds": seconds, "rate": tokens / seconds, "peak_gb": memory, "loss": steps[-1]["loss"],
        "share": share(passes * shape.flops(prompts, response), seconds, dtype), "counted_per_row": response + 2 * prompts})


def pairs_of(samples, count, name="pairs"):
    """Preference pairs of neighbouring samples, with their token ids; which is the better does not matter to time."""
    rows, pairs = rows_of(samples), []
    for a, b in zip(rows[::2], rows[1::2]):
        if a["id"] == b["id"] and a["response"] and b["response"]:
            pair = {"prompt": a["prompt"]}
            for side, row in (("chosen", a), ("rejected", b)):
                pair |= {side: row["response"], f"{side}_token_ids": row["token_ids"],
                         f"{side}_finish_reason": row["finish_reason"]}
            pairs.append(pair)
    return write(HOME / f"{name}.jsonl", pairs[:count])


def small(args):
    stages("small", SMALL, "bf16", 8 if args.quick else 512, 64 if args.quick else 256, (256, 1024))
    samples = HOME / "small-samples.jsonl"
    train("small", SMALL, "bf16", pairs_of(samples, 24 if args.quick else 800))
    if not args.quick:
        train("small", SMALL, "bf16", pairs_of(samples, 1920, "many-pairs"), label="train (64 pairs a step)", batch=64)


def large(args):
    random_model("large", LARGE)
    # Up to 128 or so the products wait for the weights, and the floor is one.
    stages("large", LARGE, "bf16", 4 if args.quick else 64, 32 if args.quick else 128, (64, 128, 512))


def long_pairs(count):
    """Pairs of 2 x 1900 tokens for the large model."""
    rows = []
    for i in range(count):
        ids = lambda seed: [(i * 7919 + seed * 104729 + j * 31) % 250 for j in range(1900)]
        rows.append({"prompt": "Write. " * 60, "chosen": "x", "rejected": "y", "chosen_token_ids": ids(1),
                     "rejected_token_ids": ids(2), "chosen_finish_reason": "length", "rejected_finish_reason": "length"})
    return write(HOME / "long-pairs.jsonl", rows)


def experts(args):
    random_model("experts", EXPERTS)
    stages("experts", EXPERTS, "bf16", 4 if args.quick else 64, 32 if args.quick else 128, (64, 512))
    pairs = long_pairs(16 if args.quick else 24)
    train("experts", EXPERTS, "bf16", pairs, "--lora-rank", 16, label="train LoRA")


def large_train(args):
    random_model("large", LARGE)
    pairs = long_pairs(16 if args.quick else 24)
    train("large", LARGE, "bf16", pairs, "--lora-rank", 16, "--memory-budget", "22G", label="train LoRA")
    if gpu_memory("total") < 135:
        return print("large train: all weights take 130 GB, which this card does not have", file=sys.stderr)
    # With float32 moments an 8B model would need 18 bytes a parameter: 144 GB before the first activation.
    train("large", LARGE, "bf16", pairs, "--optimizer", "adamw-bf16")


def small_folder(rounded=False):
    """The small model as a folder, which a step of training at rate zero makes; or its weights rounded to bfloat16."""
    folder = HOME / ("small-rounded" if rounded else "small-folder")
    if folder.exists():
        return folder
    if rounded:
        import torch
        from safetensors.torch import load_file, save_file

        shutil.copytree(small_folder(), folder)
        tensors = load_file(folder / "model.safetensors")
        save_file({name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}, folder / "model.safetensors",
                  metadata={"format": "pt"})
    else:
        one = write(HOME / "one.jsonl", rows_of(HOME / "examples/preferences.jsonl")[:1])
        run("dice-train", "--device", "cpu", "--model", SMALL, "--learning-rate", 0, "--max-steps", 1, "--output", folder, one)
    return folder


def small_peers(_):
    peers("small", small_folder(), HOME / "pairs.jsonl")


def large_peers(_):
    peers("large", LARGE, long_pairs(24))


def peers(name, model, pairs):
    """transformers on the rows that our tools had."""
    work = {"generate": HOME / "prompts.jsonl", "score": HOME / f"{name}-unscored.jsonl", "train": pairs}
    there = {stage: rows for stage, rows in work.items() if Path(rows).exists()}
    if len(there) < len(work):
        print(f"{name}: nothing to compare with yet: {sorted(work.keys() - there.keys())}", file=sys.stderr)
    command = [sys.executable, HOME / "peer.py", model, *(f"{stage}={rows}" for stage, rows in there.items()), "--k", K]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            found = json.loads(line)
            note(f"peer {name} {found['stage']}", found)


# ---- A random model --------------------------------------------------------------------------------------------------


def random_model(name, folder):
    """A folder with a model of Llama's or OLMoE's kind in such a shape: bfloat16, normal weights, and a tokenizer of bytes."""
    if (folder / "config.json").exists():
        return
    try:
        import torch
    except ImportError:
        sys.exit("torch is needed to make a random model")
    folder.mkdir(exist_ok=True)
    shape = SHAPES[name]
    hidden, vocab = shape.hidden, shape.vocab
    q, kv = shape.heads * shape.dim, shape.kv * shape.dim
    mlp = {"gate_proj": [shape.ffn, hidden], "up_proj": [shape.ffn, hidden], "down_proj": [hidden, shape.ffn]}
    layer = {"self_attn.q_proj": [q, hidden], "self_attn.k_proj": [kv, hidden], "self_attn.v_proj": [kv, hidden],
             "self_attn.o_proj": [hidden, q], "input_layernorm": [hidden], "post_attention_layernorm": [hidden]}
    if shape.experts > 1:
        layer |= {"self_attn.q_norm": [q], "self_attn.k_norm": [kv], "mlp.gate": [shape.experts, hidden]}
        layer |= {f"mlp.experts.{e}.{part}": size for e in range(shape.experts) for part, size in mlp.items()}
    else:
        layer |= {f"mlp.{part}": size for part, size in mlp.items()}
    shapes = {"model.embed_tokens.weight": [vocab, hidden], "model.norm.weight": [hidden], "lm_head.weight": [vocab, hidden]}
    shapes |= {f"model.layers.{i}.{part}.weight": size for i in range(shape.layers) for part, size in layer.items()}
    block = memoryview((torch.randn(1 << 27) * 0.02).to(torch.bfloat16).view(torch.uint8).numpy())
    ones = torch.ones(max(hidden, q), dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    names, index, writers = list(shapes), {}, []
    each = -(-len(names) // 8)
    shards = [names[i : i + each] for i in range(0, len(names), each)]
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        header, end = {}, 0
        for name in shard:
            size = 2 * math.prod(shapes[name])
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [end, end + size]}
            end, index[name] = end + size, file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)

        def fill(path=folder / file, shard=shard, text=text, header=header, start=2_000_006 * number):
            with open(path, "wb") as out:
                out.write(len(text).to_bytes(8, "little") + text)
                for name in shard:
                    left = header[name]["data_offsets"][1] - header[name]["data_offsets"][0]
                    if len(shapes[name]) == 1:
                        out.write(ones[:left])
                        continue
                    while left:
                        start = (start + 7_777_778) % (len(block) // 2)  # even, so that numbers stay whole
                        part = block[start : start + min(left, len(block) - start)]
                        out.write(part)
                        left -= len(part)

        writers.append(threading.Thread(target=fill))
        writers[-1].start()
    for writer in writers:
        writer.join()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    tokenizer(folder, vocab)
    config = {"vocab_size": vocab, "hidden_size": hidden, "intermediate_size": shape.ffn, "num_hidden_layers": shape.layers,
              "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv, "hidden_act": "silu",
              "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "rope_theta": 500000.0,
              "torch_dtype": "bfloat16", "bos_token_id": 256, "eos_token_id": 257}
    if shape.experts > 1:
        config |= {"architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "num_experts": shape.experts,
                   "num_experts_per_tok": shape.used, "norm_topk_prob": False}
    else:
        config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "head_dim": shape.dim}
    (folder / "config.json").write_text(json.dumps(config))


def tokenizer(folder, vocab):
    """Bytes, two special tokens, and fillers up to the size of the vocabulary."""
    # The characters that stand for bytes in byte-level BPE.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    characters = {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}
    words = [characters[b] for b in range(256)] + ["<|start|>", "<|end|>"]
    words += [f"x{i}" for i in range(vocab - len(words))]
    special = [{"id": 256 + i, "content": word, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
                "special": True} for i, word in enumerate(("<|start|>", "<|end|>"))]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    (folder / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
        "pre_tokenizer": level, "post_processor": None, "decoder": level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "vocab": {word: i for i, word in enumerate(words)}, "merges": []}}))
    template = ("{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>{% endfor %}"
                "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}")
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template, "bos_token": "<|start|>",
        "eos_token": "<|end|>", "pad_token": "<|end|>"}))


# ---- The tables ------------------------------------------------------------------------------------------------------


def table(_):
    kept = results()
    card = kept.get("rates", {})
    best = card.get("gemm_tflops", {})
    number = lambda value, form="{:.0f}": form.format(value) if value is not None else "-"
    print(f"\n{card.get('device', '?')}: bf16 product {number(best.get('bf16', {}).get('best'))} TFLOP/s, "
          f"float32 {number(best.get('f32', {}).get('best'))}, copy {number(card.get('read_gbps'))} GB/s\n")
    print("| model | stage | dtype | tokens/s | share of the floor | asked for | peak GB | transformers, tokens/s | ratio |")
    print("|---|---|---|--:|--:|--:|--:|--:|--:|")
    asked = {"generate": "60%", "score": "50%", "train": "45%"}
    for name in SHAPES:
        for key, value in kept.items():
            part = key.split()
            if part[0] != name:
                continue
            stage, dtype = " ".join(part[1:-1]), part[-1]
            peer = kept.get(f"peer {name} {part[1]}", {}) if dtype == "bf16" else {}
            # Ours counts a prompt once, a peer once a row; and a peer scores with one model, ours with two.
            rate = value.get("counted_per_row", value["tokens"]) / value["seconds"]
            models = 2 if part[1] == "score" else 1
            ratio = models * rate / peer["rate"] if peer.get("rate") else None
            percent = number(value["share"] * 100, "{:.0f}%") if value.get("share") is not None else "-"
            print(f"| {name} | {stage} | {dtype} | {value['rate']:.0f} | {percent} | {asked.get(part[1], '-')} | "
                  f"{value['peak_gb']:.1f} | {number(peer.get('rate'))} | {number(ratio, '{:.1f}')} |")
    for key, value in kept.items():
        if key.split()[0] in ("tests", "sanitizer", "log-probs", "samples"):
            print(f"- {key}: " + json.dumps({k: v for k, v in value.items() if k != "end"}))


STEPS = {"rates": rates, "tests": tests, "figures": figures, "small": small, "large": large, "large-train": large_train,
         "experts": experts,
         "small-peers": small_peers, "large-peers": large_peers, "table": table}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few rows of each: does it run at all?")
    parser.add_argument("step", nargs="+", metavar="STEP", help="unpack FOLDER, or any of: " + ", ".join(STEPS))
    args = parser.parse_args()
    if args.step[0] == "unpack":
        unpack(*args.step[1:2] or ["gpu-pack"])
        args.step = args.step[2:]
    for step in args.step:
        if step not in STEPS:
            parser.error(f"no such step: {step}")
        STEPS[step](args)


if __name__ == "__main__":
    main()
