"""Writes fuzz/seeds: small well-formed inputs for each target. Needs numpy, safetensors and gguf."""

import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import save

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "tests/golden"
SEPARATOR = b"\x1e\x1e"
HIDDEN, HEADS, FFN, VOCAB, EXPERTS = 8, 2, 16, 8, 2


def seed(target, name, *parts):
    folder = HERE / "seeds" / target
    folder.mkdir(parents=True, exist_ok=True)
    parts = [part.encode() if isinstance(part, str) else part for part in parts]
    (folder / name).write_bytes(SEPARATOR.join(parts))


def tensors(dtype):
    shapes = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    layer = "model.layers.0."
    for name in "qkvo":
        shapes[f"{layer}self_attn.{name}_proj.weight"] = (HIDDEN, HIDDEN)
    for name in ("gate", "up"):
        shapes[f"{layer}mlp.{name}_proj.weight"] = (FFN, HIDDEN)
    shapes[f"{layer}mlp.down_proj.weight"] = (HIDDEN, FFN)
    for name in ("input_layernorm", "post_attention_layernorm"):
        shapes[f"{layer}{name}.weight"] = (HIDDEN,)
    return {name: np.ones(shape, dtype) for name, shape in shapes.items()}


def mixture():
    """The same with experts, each a tensor of its own."""
    shapes = {name: values for name, values in tensors(np.float32).items() if ".mlp." not in name}
    for name, values in tensors(np.float32).items():
        if ".mlp." in name:
            for expert in range(EXPERTS):
                shapes[name.replace(".mlp.", f".mlp.experts.{expert}.")] = values
    shapes["model.layers.0.mlp.gate.weight"] = np.ones((EXPERTS, HIDDEN), np.float32)
    return shapes


def together():
    """The same with experts in one tensor, as Granite has them."""
    shapes = {name: values for name, values in tensors(np.float32).items() if ".mlp." not in name}
    layer = "model.layers.0.block_sparse_moe."
    shapes[layer + "input_linear.weight"] = np.ones((EXPERTS, 2 * FFN, HIDDEN), np.float32)
    shapes[layer + "output_linear.weight"] = np.ones((EXPERTS, HIDDEN, FFN), np.float32)
    shapes[layer + "router.layer.weight"] = np.ones((EXPERTS, HIDDEN), np.float32)
    return shapes


def config(family, **more):
    fields = {
        "architectures": [f"{family.capitalize()}ForCausalLM"], "model_type": family, "vocab_size": VOCAB,
        "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": 1, "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS, "hidden_act": "silu", "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, "rope_theta": 10000.0,
    }
    return json.dumps(fields | more)


def folders():
    whole = save(tensors(np.float32))
    seed("folder", "llama", config("llama"), whole)
    seed("folder", "mistral", config("mistral", sliding_window=4), save(tensors(np.float16)))
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 32}
    index = json.dumps({"weight_map": {name: "model.safetensors" for name in tensors(np.float32)}})
    seed("folder", "scaled", config("llama", rope_scaling=scaling), whole, index)
    experts = {"num_experts_per_tok": 1, "num_experts": EXPERTS, "moe_intermediate_size": FFN, "head_dim": HIDDEN // HEADS}
    norms = {f"model.layers.0.self_attn.{name}_norm.weight": np.ones(HIDDEN // HEADS, np.float32) for name in "qk"}
    seed("folder", "mixture", config("qwen3_moe", **experts), save(mixture() | norms))
    experts = {"num_experts_per_tok": 1, "num_local_experts": EXPERTS}
    seed("folder", "together", config("granitemoe", **experts), save(together()))


def gguf_name(tensor):
    names = {"embed_tokens": "token_embd", "norm": "output_norm", "self_attn.o_proj": "attn_output",
             "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "lm_head": "output"}
    block, in_layer, module = tensor.removeprefix("model.").removesuffix(".weight").rpartition("layers.0.")
    module = names.get(module) or module.replace("self_attn.", "attn_").replace("mlp.", "ffn_").replace("_proj", "")
    return ("blk.0." if in_layer else "") + module + ".weight"


def ggufs():
    path = HERE / "seed.gguf"
    for name, arch, experts in [("llama", "llama", 0), ("qwen2", "qwen2", 0), ("mixtral", "llama", EXPERTS)]:
        writer = gguf.GGUFWriter(path, arch)
        if experts:
            writer.add_expert_count(experts)
            writer.add_expert_used_count(1)
        writer.add_block_count(1)
        writer.add_context_length(64)
        writer.add_embedding_length(HIDDEN)
        writer.add_feed_forward_length(FFN)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(HEADS)
        writer.add_layer_norm_rms_eps(1e-5)
        sentence_piece = arch == "llama"
        writer.add_tokenizer_model("llama" if sentence_piece else "gpt2")
        writer.add_tokenizer_pre("default" if sentence_piece else "qwen2")
        writer.add_token_list(["<unk>", "<s>", "</s>", "a", "b", "ab", "▁", "▁a"])
        writer.add_token_types([2, 3, 3, 1, 1, 1, 1, 1])
        if sentence_piece:
            writer.add_token_scores([0.0, 0.0, 0.0, -3.0, -4.0, -1.0, -2.0, -1.5])
        else:
            writer.add_token_merges(["a b"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_chat_template("{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}")
        for tensor, values in tensors(np.float32).items():
            tensor = gguf_name(tensor)
            if experts and "ffn_" in tensor and "norm" not in tensor:
                tensor, values = tensor.replace(".weight", "_exps.weight"), np.stack([values] * experts)
            writer.add_tensor(tensor, values)
        if experts:
            writer.add_tensor("blk.0.ffn_gate_inp.weight", np.ones((experts, HIDDEN), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        seed("gguf", name, path.read_bytes())
    path.unlink()


def texts():
    rows = [
        {"prompt": "Say 1", "id": 3, "response": "é", "token_ids": [1, 2], "finish_reason": "length", "logp": -1.5},
        {"prompt": [{"role": "user", "content": "x"}], "chosen": "a", "rejected": "b", "reward": 1e308},
    ]
    seed("rows", "rows", "\ufeff" + "\r\n\n".join(json.dumps(row) for row in rows))
    tiny = GOLDEN / "tiny_chat"
    files = [(tiny / f"{name}.json").read_bytes() for name in ("tokenizer", "tokenizer_config", "generation_config")]
    seed("tokenizer", "tiny", *files, "Hi <|im_end|> é\u200b")
    template = json.loads((tiny / "tokenizer_config.json").read_text())["chat_template"]
    seed("template", "tiny", template, "hi<|im_end|>\n<|im_start|>system\nobey")
    for name, source in json.loads((GOLDEN / "templates.json").read_text())["templates"].items():
        seed("template", name.replace("/", "-"), source, "Say 1")


folders()
ggufs()
texts()
