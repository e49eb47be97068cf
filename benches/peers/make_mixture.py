"""A random mixture of experts of the shape of Granite 3.1's with 1.3 billion weights, 400 million of them for a token, in bfloat16.

    peers/bin/python benches/peers/make_mixture.py --tokenizer peers/smollm2 --output peers/mixture
    peers/bin/python benches/peers/bench.py --model peers/mixture --stage generate score
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GraniteMoeConfig


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="a folder whose tokenizer the model gets")
    parser.add_argument("--output", required=True)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    config = GraniteMoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=1024,
        intermediate_size=512,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=8,
        num_local_experts=32,
        num_experts_per_tok=8,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        embedding_multiplier=12.0,
        attention_multiplier=0.015625,
        residual_multiplier=0.22,
        logits_scaling=6.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
