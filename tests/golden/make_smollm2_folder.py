"""Makes a Hugging Face folder from the GGUF of SmolLM2-135M-Instruct: float32 weights (its quantised values,
widened), tokenizer, chat template, generation config.

    python make_smollm2_folder.py GGUF OUTPUT_DIR

transformers' own conversion of the tokenizer is wrong for this model (its GGUF says `pre = smollm`, which
transformers and candle treat as GPT-2: digits are then not split one by one), so the tokenizer is built here.
"""

import argparse
import pathlib

import gguf
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTROL = 3  # gguf's token type of tokens such as <|im_end|>


def fields_of(path):
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def tokenizer_of(fields):
    """ByteLevel BPE from the GGUF's vocabulary and merges, with SmolLM's pre-tokenizer."""
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    special = [AddedToken(t, special=True, normalized=False) for t, k in zip(tokens, kinds) if k == CONTROL]
    tokenizer.add_special_tokens(special)
    name = lambda key: tokens[fields[f"tokenizer.ggml.{key}_token_id"]]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=name("bos"),
        eos_token=name("eos"),
        unk_token=name("unknown"),
        pad_token=name("padding"),
        chat_template=fields["tokenizer.chat_template"],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )


def permuted(w, heads):
    """Q or K rows from the GGUF's order (pairs side by side) to Hugging Face's (halves): [heads * d, in]."""
    return w.reshape(heads, w.shape[0] // heads // 2, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def check_weights(model, path):
    """Every parameter equals the GGUF's tensor as the gguf package dequantises it, bit for bit."""
    names = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
    ours = dict(model.named_parameters())  # tied: no lm_head
    for tensor in gguf.GGUFReader(path).tensors:
        *layer, part = tensor.name.removesuffix(".weight").rsplit(".", 1)
        prefix = f"model.layers.{layer[0].split('.')[1]}." if layer else ""
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if part in heads:
            values = permuted(values, heads[part])
        parameter = ours.pop(f"{prefix}{names[part]}.weight")
        assert torch.equal(torch.from_numpy(values.copy()), parameter), tensor.name
    assert not ours, f"not in the GGUF: {sorted(ours)}"
    assert model.config.tie_word_embeddings and model.lm_head.weight is model.model.embed_tokens.weight


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=pathlib.Path)
    parser.add_argument("output", type=pathlib.Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    fields = fields_of(args.gguf)
    read = AutoModelForCausalLM.from_pretrained(
        args.gguf.parent, gguf_file=args.gguf.name, dtype=torch.float32
    )
    # transformers refuses to save a model that it knows to come from a GGUF: save a plain one with its weights.
    config = read.config.to_dict()
    config.pop("quantization_config", None)
    config["architectures"] = ["LlamaForCausalLM"]
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(read.state_dict())
    check_weights(model, args.gguf)
    model.generation_config.bos_token_id = fields["tokenizer.ggml.bos_token_id"]
    model.generation_config.eos_token_id = fields["tokenizer.ggml.eos_token_id"]
    model.generation_config.pad_token_id = fields["tokenizer.ggml.padding_token_id"]
    model.save_pretrained(args.output)
    tokenizer = tokenizer_of(fields)
    tokenizer.save_pretrained(args.output)
    assert tokenizer.encode("Hello", add_special_tokens=False) == [19556]
    print(model.config)


if __name__ == "__main__":
    main()
