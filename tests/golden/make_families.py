"""Makes tests/golden/families/<name>/: a tiny random checkpoint of each model family, saved by transformers,
and figures.json with exact log-probs, a DPO loss and its gradient for every parameter.

Weights are stored in float32 (or bfloat16), arithmetic is float64 (see exact.py), attention is eager.

    python make_families.py --output families [--only NAME ...]
"""

import argparse
import functools
import json
import pathlib
import shutil

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    Cohere2Config,
    CohereConfig,
    Ernie4_5_MoeConfig,
    Ernie4_5Config,
    Exaone4Config,
    FineGrainedFP8Config,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    Gemma4UnifiedTextConfig,
    GemmaConfig,
    Glm4Config,
    Glm4MoeConfig,
    GlmConfig,
    GptOssConfig,
    GraniteConfig,
    GraniteMoeConfig,
    GraniteMoeHybridConfig,
    GraniteMoeSharedConfig,
    HunYuanDenseV1Config,
    HunYuanMoEV1Config,
    Lfm2Config,
    Lfm2MoeConfig,
    LlamaConfig,
    Ministral3Config,
    MinistralConfig,
    Mistral3Config,
    MistralConfig,
    MixtralConfig,
    Mxfp4Config,
    Olmo2Config,
    Olmo3Config,
    OlmoeConfig,
    Phi3Config,
    PixtralVisionConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SeedOssConfig,
    SiglipVisionConfig,
    SmolLM3Config,
)
from transformers.core_model_loading import revert_weight_conversion

from exact import dump, exact, response_logps, versions

LENGTHS = [(7, 3), (23, 9), (40, 13)]  # (ids in all, ids of the prompt)
BETA = 0.1
SAMPLED_ENTRIES = 8

TINY = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=None,
    rms_norm_eps=1e-3,  # large, so that a wrong epsilon shows
    tie_word_embeddings=False,
)


MULTIPLIERS = dict(
    embedding_multiplier=6.0, attention_multiplier=0.3, residual_multiplier=0.35, logits_scaling=1.5
)


EXPERTS = dict(num_experts_per_tok=2, intermediate_size=16)


# With a limit that holds some of the numbers of experts.
GPT_OSS = dict(
    num_hidden_layers=2,
    head_dim=16,
    sliding_window=5,
    num_local_experts=8,
    swiglu_limit=2.0,
    rope_parameters={
        "rope_type": "yarn",
        "rope_theta": 1000.0,
        "factor": 4.0,
        "beta_fast": 8.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 32,
    },
)


def rope(theta, rope_type="default", **rest):
    return {"rope_type": rope_type, "rope_theta": theta, **rest}


def with_images(**text):
    vision = SiglipVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=14, patch_size=14
    )
    return Gemma3Config(
        text_config=Gemma3TextConfig(**text), vision_config=vision, mm_tokens_per_image=1, image_token_index=95
    )


def mistral_with_images(text_config, **text):
    vision = PixtralVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=14, patch_size=14
    )
    return Mistral3Config(
        text_config=text_config(**text),
        vision_config=vision,
        image_token_index=95,
        spatial_merge_size=1,
        tie_word_embeddings=text["tie_word_embeddings"],
    )


# Queries grow at positions 16 and 32.
GROWING = rope(
    1000000.0,
    "yarn",
    factor=8.0,
    original_max_position_embeddings=16,
    beta_fast=4.0,
    beta_slow=1.0,
    mscale=1.0,
    mscale_all_dim=1.0,
    llama_4_scaling_beta=0.5,
)


COHERE = dict(
    logit_scale=0.75,
    layer_norm_eps=1e-3,
    rms_norm_eps=0.5,  # nobody hears it
)


GEMMA4 = dict(
    head_dim=8,
    sliding_window=8,
    rope_parameters={
        "sliding_attention": rope(10000.0),
        "full_attention": rope(1000.0, "proportional", partial_rotary_factor=0.5),
    },
)


# name -> (config class, fields that differ from TINY, how it is saved and from which seed; else that is its place here)
FAMILIES = {
    "llama": (LlamaConfig, dict(rope_parameters=rope(10000.0)), {}),
    # Wavelengths 6.3, 18, 53, ... positions: kept (< 32/4), blended, slowed down (> 32/1). All branches are met.
    "llama3": (
        LlamaConfig,
        dict(
            head_dim=16,
            rope_parameters=rope(
                5000.0,
                "llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=32,
            ),
        ),
        {"legacy_beside": True},
    ),
    "llama-linear": (
        LlamaConfig,
        dict(rope_parameters=rope(10000.0, "linear", factor=4.0)),
        {"legacy": True},
    ),
    "llama-bias": (LlamaConfig, dict(attention_bias=True, mlp_bias=True, head_dim=16), {}),
    "smollm": (
        LlamaConfig,
        dict(
            tie_word_embeddings=True,
            hidden_size=48,
            num_attention_heads=3,
            num_key_value_heads=1,
            rope_parameters=rope(100000.0),
        ),
        {},
    ),
    "mistral": (MistralConfig, dict(sliding_window=8, head_dim=16, rope_parameters=rope(10000.0)), {}),
    "qwen2": (
        Qwen2Config,
        dict(tie_word_embeddings=True, rope_parameters=rope(1000000.0)),
        {"legacy": True},
    ),
    "qwen2-sliding": (
        Qwen2Config,
        dict(
            num_hidden_layers=3,
            use_sliding_window=True,
            sliding_window=8,
            max_window_layers=1,
            rope_parameters=rope(10000.0),
        ),
        {},
    ),
    "qwen3": (Qwen3Config, dict(head_dim=16, rope_parameters=rope(1000000.0)), {}),
    "smollm3": (
        SmolLM3Config,
        dict(
            num_hidden_layers=3,
            no_rope_layers=[1, 0, 1],
            use_sliding_window=True,
            sliding_window=8,
            tie_word_embeddings=True,
            rope_parameters=rope(5000000.0),
        ),
        {},
    ),
    "llama-bf16-sharded": (
        LlamaConfig,
        dict(rope_parameters=rope(10000.0)),
        {"dtype": torch.bfloat16, "max_shard_size": "22KB"},
    ),
    "gemma2": (
        Gemma2Config,
        dict(
            tie_word_embeddings=True,
            head_dim=16,
            query_pre_attn_scalar=24,
            sliding_window=8,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=3.0,
            rope_parameters=rope(10000.0),
        ),
        {},
    ),
    "gemma3": (
        Gemma3TextConfig,
        dict(
            tie_word_embeddings=True,
            num_hidden_layers=3,
            head_dim=12,
            intermediate_size=40,
            query_pre_attn_scalar=24,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters={
                "sliding_attention": rope(10000.0),
                "full_attention": rope(1000000.0, "linear", factor=8.0),
            },
        ),
        {},
    ),
    "olmo2": (Olmo2Config, dict(rope_parameters=rope(500000.0)), {}),
    # Wavelengths 6.3, 55, 489 positions of a context of 64: the ramp has a pair in it; layer 1 of 3 sees everything.
    "olmo3": (
        Olmo3Config,
        dict(
            num_hidden_layers=3,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters={
                "sliding_attention": rope(5000.0),
                "full_attention": rope(
                    5000.0, "yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=8.0, beta_slow=1.0
                ),
            },
        ),
        {},
    ),
    # What reads images is left out of the figures; the text part has the names that it has alone.
    "gemma3-images": (
        with_images,
        dict(
            tie_word_embeddings=True,
            head_dim=16,
            query_pre_attn_scalar=24,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters={
                "sliding_attention": rope(10000.0),
                "full_attention": rope(1000000.0, "linear", factor=8.0),
            },
        ),
        {},
    ),
    "phi3": (Phi3Config, dict(sliding_window=8, rope_parameters=rope(10000.0)), {}),
    # Three quarters of a head are rotated, by divisors of their own: 6 pairs of 8.
    "phi3-long": (
        Phi3Config,
        dict(
            tie_word_embeddings=True,
            hidden_size=64,
            intermediate_size=24,
            max_position_embeddings=512,
            original_max_position_embeddings=64,
            rope_parameters=rope(
                10000.0,
                "longrope",
                partial_rotary_factor=0.75,
                short_factor=[1.0, 1.05, 1.2, 1.5, 2.0, 2.5],
                long_factor=[1.5, 2.0, 4.0, 8.0, 16.0, 32.0],
            ),
        ),
        {},
    ),
    # Multipliers that are no powers of two.
    "granite": (GraniteConfig, dict(MULTIPLIERS, tie_word_embeddings=True, rope_parameters=rope(10000.0)), {}),
    # The hybrid's name for a model without state spaces and experts.
    "granite4": (
        GraniteMoeHybridConfig,
        dict(
            MULTIPLIERS,
            layer_types=["attention", "attention"],
            num_local_experts=0,
            num_experts_per_tok=0,
            shared_intermediate_size=40,
            position_embedding_type="rope",
            mamba_n_heads=2,
            mamba_d_head=32,
            rope_parameters=rope(10000.0),
        ),
        {},
    ),
    # Mixtures of experts: weights normed or not, the names and layouts that files have.
    "olmoe": (OlmoeConfig, dict(EXPERTS, num_experts=5, rope_parameters=rope(10000.0)), {}),
    "qwen3-moe": (
        Qwen3MoeConfig,
        dict(
            EXPERTS,
            head_dim=16,
            num_experts=6,
            num_experts_per_tok=3,
            moe_intermediate_size=12,
            norm_topk_prob=True,
            rope_parameters=rope(1000000.0),
        ),
        {},
    ),
    "mixtral": (
        MixtralConfig,
        dict(EXPERTS, num_local_experts=4, sliding_window=8, rope_parameters=rope(10000.0)),
        {},
    ),
    "granite-moe": (
        GraniteMoeConfig,
        dict(MULTIPLIERS, **EXPERTS, num_local_experts=5, tie_word_embeddings=True, rope_parameters=rope(10000.0)),
        {},
    ),
    "gemma": (
        GemmaConfig,
        dict(tie_word_embeddings=True, head_dim=16, hidden_act="gelu", rope_parameters=rope(10000.0)),
        {},
    ),
    # A window on every second layer; as Mistral's own file of it has it, "mistral" with layer_types.
    "ministral": (
        MinistralConfig,
        dict(
            sliding_window=8,
            head_dim=16,
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters=rope(10000.0),
        ),
        {},
    ),
    # Where some layers have a window, only those rotate.
    "exaone4": (
        Exaone4Config,
        dict(
            num_hidden_layers=3,
            head_dim=16,
            sliding_window=8,
            sliding_window_pattern="LGL",
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters=rope(10000.0),
        ),
        {},
    ),
    "exaone4-global": (
        Exaone4Config,
        dict(
            tie_word_embeddings=True,
            sliding_window=None,
            sliding_window_pattern=None,
            layer_types=["full_attention", "full_attention"],
            rope_parameters=rope(
                5000.0,
                "llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=32,
            ),
        ),
        {},
    ),
    "seed-oss": (SeedOssConfig, dict(head_dim=16, rope_parameters=rope(10000000.0)), {}),
    "seed-oss-bias": (
        SeedOssConfig,
        dict(
            head_dim=16,
            attention_bias=False,
            attention_out_bias=True,
            mlp_bias=True,
            rope_parameters=rope(10000.0),
        ),
        {},
    ),
    # As Devstral 2 has it, alone.
    "ministral3": (
        Ministral3Config,
        dict(head_dim=16, rope_parameters={**GROWING, "mscale_all_dim": 0.0}),
        {},
    ),
    "ministral3-images": (
        functools.partial(mistral_with_images, Ministral3Config),
        dict(head_dim=16, tie_word_embeddings=True, rope_parameters=GROWING),
        {},
    ),
    # Mistral Small 3.1.
    "mistral-images": (
        functools.partial(mistral_with_images, MistralConfig),
        dict(head_dim=16, sliding_window=None, rope_parameters=rope(1000000000.0)),
        {},
    ),
    # Two layers of linear attention, one of gated attention that rotates half of its heads.
    "qwen3.5": (
        Qwen3_5TextConfig,
        dict(
            num_hidden_layers=3,
            head_dim=16,
            layer_types=["linear_attention", "linear_attention", "full_attention"],
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=6,
            tie_word_embeddings=True,
            rope_parameters=rope(10000.0, partial_rotary_factor=0.5, mrope_section=[2, 1, 1], mrope_interleaved=True),
        ),
        {"seed": 100},
    ),
    # Half of a head is rotated, neighbours with each other, and the layers' norms have names of their own.
    "glm4": (Glm4Config, dict(head_dim=16, rope_parameters=rope(10000.0)), {"seed": 100}),
    "glm": (
        GlmConfig,
        dict(head_dim=12, attention_bias=False, rope_parameters=rope(50000.0)),
        {"seed": 101, "legacy": True},
    ),
    "ernie4-5": (
        Ernie4_5_MoeConfig,
    Ernie4_5Config,
        dict(head_dim=16, use_bias=True, tie_word_embeddings=True, rope_parameters=rope(500000.0)),
        {"seed": 102},
    ),
    # Queries and keys are normed after the rotation, whose base "alpha" stretches to some 27 million.
    "hunyuan": (
        HunYuanDenseV1Config,
        dict(
            head_dim=16,
            attention_bias=True,
            tie_word_embeddings=True,
            rope_parameters=rope(10000.0, "dynamic", alpha=1000.0, factor=1.0),
        ),
        {"seed": 103, "legacy": True},
    ),
    # Seeds from here on are such that no choice of experts is close, which rounding to bfloat16 would make another.
    # An expert for all tokens, gated; of three layers the middle one has one MLP.
    "qwen2-moe": (
        Qwen2MoeConfig,
        dict(
            num_hidden_layers=3,
            mlp_only_layers=[1],
            num_experts=5,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=24,
            rope_parameters=rope(1000000.0),
        ),
        {"seed": 201},
    ),
    # The first layer has one MLP, and what the best are worth is normed.
    "qwen3-moe-steps": (
        Qwen3MoeConfig,
        dict(
            head_dim=16,
            decoder_sparse_step=2,
            num_experts=6,
            num_experts_per_tok=3,
            moe_intermediate_size=16,
            norm_topk_prob=True,
            rope_parameters=rope(1000000.0),
        ),
        {"seed": 203},
    ),
    "qwen3.5-moe": (
        Qwen3_5MoeTextConfig,
        dict(
            head_dim=16,
            layer_types=["linear_attention", "full_attention"],
            linear_num_key_heads=2,
            linear_num_value_heads=8,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            num_experts=5,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=24,
            rope_parameters=rope(10000.0, partial_rotary_factor=0.5, mrope_section=[2, 1, 1], mrope_interleaved=True),
        ),
        {"seed": 218},
    ),
    "granite-moe-shared": (
        GraniteMoeSharedConfig,
        dict(
            MULTIPLIERS,
            **EXPERTS,
            num_local_experts=5,
            shared_intermediate_size=40,
            tie_word_embeddings=True,
            rope_parameters=rope(10000.0),
        ),
        {"seed": 202},
    ),
    "hunyuan-moe": (
        HunYuanMoEV1Config,
        dict(
            head_dim=16,
            intermediate_size=16,
            num_experts=5,
            moe_topk=[2, 2],
            tie_word_embeddings=True,
            rope_parameters=rope(10000.0, "dynamic", alpha=1000.0, factor=1.0),
        ),
        {"seed": 212},
    ),
    # The best are chosen by more than what they are worth; some sums of what those are worth are below 0.4, and so not divided
    # by.
    "ernie4-5-moe": (
        Ernie4_5_MoeConfig,
        dict(
            tie_word_embeddings=True,
            moe_num_experts=6,
            moe_k=2,
            moe_intermediate_size=16,
            moe_num_shared_experts=2,
            moe_norm_min=0.4,
            rope_parameters=rope(500000.0),
        ),
        {"seed": 202},
    ),
    # Scores that are no shares, and what they are multiplied by.
    "glm4-moe": (
        Glm4MoeConfig,
        dict(
            use_qk_norm=True,
            n_routed_experts=6,
            num_experts_per_tok=3,
            moe_intermediate_size=16,
            n_shared_experts=2,
            routed_scaling_factor=2.5,
            rope_parameters=rope(1000000.0, partial_rotary_factor=0.5),
        ),
        {"seed": 201},
    ),
    "glm4-moe-plain": (
        Glm4MoeConfig,
        dict(
            num_hidden_layers=3,
            attention_bias=True,
            first_k_dense_replace=2,
            n_routed_experts=5,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            norm_topk_prob=False,
            routed_scaling_factor=1.5,
            rope_parameters=rope(10000.0, partial_rotary_factor=0.5),
        ),
        {"seed": 201},
    ),
    # Short convolutions between gates around a layer of attention; the MLP is two thirds of what the file says, 1.1 times
    # that, rounded up.
    "lfm2": (
        Lfm2Config,
        dict(
            num_hidden_layers=3,
            layer_types=["conv", "full_attention", "conv"],
            intermediate_size=60,
            block_multiple_of=16,
            block_ffn_dim_multiplier=1.1,
            norm_eps=1e-3,
            rms_norm_eps=0.5,  # nobody hears it
            tie_word_embeddings=True,
            rope_parameters=rope(1000000.0),
        ),
        {"seed": 104},
    ),
    # As the first ones were published, the layers with attention by their numbers.
    "lfm2-untied": (
        Lfm2Config,
        dict(
            num_hidden_layers=3,
            full_attn_idxs=[2],
            conv_L_cache=4,
            block_auto_adjust_ff_dim=False,
            norm_eps=1e-3,
            rms_norm_eps=0.5,  # nobody hears it
            num_attention_heads=2,
            num_key_value_heads=1,
            rope_parameters=rope(10000.0),
        ),
        {"seed": 105, "legacy": True},
    ),
    "lfm2-moe": (
        Lfm2MoeConfig,
        dict(
            num_hidden_layers=3,
            layer_types=["conv", "full_attention", "conv"],
            num_dense_layers=1,
            num_experts=5,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            routed_scaling_factor=1.5,
            norm_eps=1e-3,
            tie_word_embeddings=True,
            rope_parameters=rope(1000000.0),
        ),
        {"seed": 201},
    ),
    # Weights in FP8: blocks of 16 x 8 share a scale, or all of a tensor do.
    "llama-fp8": (LlamaConfig, dict(rope_parameters=rope(10000.0)), {"seed": 114, "fp8": [16, 8]}),
    "ministral3-fp8": (
        functools.partial(mistral_with_images, Ministral3Config),
        dict(head_dim=16, tie_word_embeddings=True, rope_parameters=GROWING),
        {"seed": 115, "fp8": None},
    ),
    # Two layers attend to the keys of earlier ones, one of each kind; every layer has embeddings of its own.
    "gemma4": (
        Gemma4TextConfig,
        dict(
            num_hidden_layers=5,
            layer_types=["sliding_attention", "full_attention"] + ["sliding_attention"] * 2 + ["full_attention"],
            num_kv_shared_layers=2,
            use_double_wide_mlp=True,
            intermediate_size=16,
            global_head_dim=16,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=TINY["vocab_size"],
            final_logit_softcapping=4.0,
            tie_word_embeddings=True,
            **GEMMA4,
        ),
        {"seed": 127},
    ),
    # Values are keys in layers that see everything, whose key heads are fewer, too.
    "gemma4-keys": (
        Gemma4TextConfig,
        dict(
            num_hidden_layers=3,
            layer_types=["sliding_attention", "full_attention", "full_attention"],
            attention_k_eq_v=True,
            global_head_dim=12,
            num_global_key_value_heads=1,
            hidden_size_per_layer_input=0,
            final_logit_softcapping=4.0,
            tie_word_embeddings=True,
            **GEMMA4,
        ),
        {"seed": 117},
    ),
    # As the 12B is; two layers attend to keys that are values, too.
    "gemma4-unified": (
        Gemma4UnifiedTextConfig,
        dict(
            num_hidden_layers=4,
            layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            num_kv_shared_layers=2,
            attention_k_eq_v=True,
            global_head_dim=16,
            **GEMMA4,
        ),
        {"seed": 118},
    ),
    # An MLP and experts beside each other in every layer.
    "gemma4-moe": (
        Gemma4TextConfig,
        dict(
            layer_types=["sliding_attention", "full_attention"],
            attention_k_eq_v=True,
            global_head_dim=16,
            num_global_key_value_heads=1,
            hidden_size_per_layer_input=0,
            enable_moe_block=True,
            intermediate_size=24,
            num_experts=5,
            top_k_experts=2,
            moe_intermediate_size=16,
            final_logit_softcapping=4.0,
            tie_word_embeddings=True,
            **GEMMA4,
        ),
        {"seed": 2436},
    ),
    "gpt-oss": (GptOssConfig, dict(**GPT_OSS, **EXPERTS), {"seed": 360}),
    "gpt-oss-mxfp4": (
        GptOssConfig,
        dict(**GPT_OSS, hidden_size=64, intermediate_size=32, num_experts_per_tok=3),
        {"seed": 387, "dtype": torch.bfloat16, "mxfp4": True},
    ),
    # Attention and the MLP read the same, normed less its mean.
    "cohere": (CohereConfig, dict(COHERE, tie_word_embeddings=True, rope_parameters=rope(10000.0)), {"seed": 130}),
    "cohere-bias": (
        CohereConfig,
        dict(COHERE, attention_bias=True, head_dim=16, logit_scale=1.5, rope_parameters=rope(500000.0)),
        {"seed": 131, "legacy": True},
    ),
    # As Command R+: heads are normed, each by a weight of its own.
    "cohere-heads": (
        CohereConfig,
        dict(COHERE, use_qk_norm=True, head_dim=16, tie_word_embeddings=True, rope_parameters=rope(10000.0)),
        {"seed": 134},
    ),
    # The fourth layer sees everything and does not rotate.
    "cohere2": (
        Cohere2Config,
        dict(
            COHERE, num_hidden_layers=5, sliding_window=8, tie_word_embeddings=True, rope_parameters=rope(10000.0)
        ),
        {"seed": 132},
    ),
    # (Biases of keys that do not rotate would have no gradient.)
    "cohere2-types": (
        Cohere2Config,
        dict(
            COHERE,
            num_hidden_layers=3,
            sliding_window=8,
            layer_types=["full_attention", "sliding_attention", "full_attention"],
            logit_scale=1.5,
            rope_parameters=rope(10000.0, "linear", factor=4.0),
        ),
        {"seed": 133},
    ),
}


# What decides beside the scores which experts are the best: no gradient reaches it, be it a parameter or not.
SELECTION = ("e_score_correction_bias", "expert_bias")
# Nor this, which the residual stream is multiplied by.
SCALE = "layer_scalar"


def fill(model, seed):
    """Random weights of a size at which attention and logits are far from flat; no parameter is left at 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    # Norms that multiply by 1 + weight; not those of what Qwen3.5's linear attention reads.
    kind = model.config.model_type
    from_one = ["norm"] if "gemma" in kind and "gemma4" not in kind else ["layernorm", "_norm", "model.norm"] if "qwen3_5" in kind else []
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "norm" in name:
                p.copy_(0.2 * noise + (0.0 if any(part in name for part in from_one) else 1.0))
            elif name.endswith("bias"):
                p.copy_(0.3 * noise)
            elif name.endswith("sinks"):
                p.copy_(1.0 + noise)
            elif name.endswith("router.scale"):
                p.copy_(4.0 + noise)  # the router's logits are divided by the root of the hidden size
            elif name.endswith("per_expert_scale"):
                p.copy_(1.0 + 0.3 * noise)
            elif "conv.conv" in name:
                p.copy_(0.8 * noise)
            elif "embed_tokens" in name:
                p.copy_(0.4 * noise)
            else:
                p.copy_(0.22 * noise)
        for name, b in model.named_buffers():
            if name.endswith(SELECTION):
                b.copy_(0.3 * torch.randn(b.shape, generator=generator))
            if name.endswith(SCALE):
                b.copy_(0.6 + torch.rand(b.shape, generator=generator))


def legacy_config(config):
    """The same config as transformers 4 wrote it: rope_theta, rope_scaling, torch_dtype."""
    config = dict(config)
    rope_parameters = config.pop("rope_parameters")
    config["rope_theta"] = rope_parameters.pop("rope_theta")
    rope_type = rope_parameters.pop("rope_type")
    if rope_type == "linear":  # the oldest spelling of the key
        config["rope_scaling"] = {"type": "linear", **rope_parameters}
    elif rope_type != "default":
        config["rope_scaling"] = {"rope_type": rope_type, **rope_parameters}
    else:
        config["rope_scaling"] = None
    config["torch_dtype"] = config.pop("dtype")
    config.pop("layer_types", None)
    config["transformers_version"] = "4.44.0"
    return config


def save(folder, model, how):
    """Saves as transformers does, then drops what the tests do not read and writes older configs where asked."""
    if folder.exists():
        shutil.rmtree(folder)
    rest = {k: how[k] for k in ("max_shard_size",) if k in how}
    model.save_pretrained(folder, **rest)
    (folder / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    if how.get("legacy"):
        dump(folder / "config.json", legacy_config(config), indent=2)
    if how.get("legacy_beside"):
        dump(folder / "config.legacy.json", legacy_config(config), indent=2)
    if "fp8" in how:
        quantise(folder, config, how["fp8"])
    if how.get("mxfp4"):
        pack(folder, config)


def quantise(folder, config, block):
    """Puts the text part's projections in FP8, as transformers' fp8 quantisation stores them."""
    tensors, stored = load_file(folder / "model.safetensors"), {}
    for name, w in tensors.items():
        if "vision" in name or not name.endswith("_proj.weight"):
            stored[name] = w
            continue
        high, wide = block or w.shape
        blocks = w.unflatten(1, (-1, wide)).unflatten(0, (-1, high))  # [rows / high, high, cols / wide, wide]
        scales = (blocks.abs().amax((1, 3), keepdim=True) / 448).to(torch.bfloat16)
        stored[name] = (blocks / scales).to(torch.float8_e4m3fn).reshape(w.shape)
        stored[f"{name}_scale_inv"] = scales[:, 0, :, 0].contiguous() if block else scales.reshape(())
        if not block:
            stored[name.replace("weight", "activation_scale")] = torch.tensor(0.02, dtype=torch.bfloat16)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic" if block else "static",
        "weight_block_size": block,
        "modules_to_not_convert": ["lm_head", "model.vision_tower", "model.multi_modal_projector"],
    }
    dump(folder / "config.json", config, indent=2)


MATRICES_OF_EXPERTS = ("experts.gate_up_proj", "experts.down_proj")


def pack(folder, config):
    """Puts experts in MXFP4, as published folders have them: a byte is two numbers, the first in its low bits."""
    levels = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    stored = {}
    for name, w in load_file(folder / "model.safetensors").items():
        if not name.endswith(MATRICES_OF_EXPERTS):
            stored[name] = w
            continue
        blocks = w.float().mT.unflatten(-1, (-1, 32))  # [experts, rows, columns / 32, 32]
        power = (blocks.abs().amax(-1) / 6).log2().ceil()
        scaled = blocks / power.exp2().unsqueeze(-1)
        bits = (scaled.abs().unsqueeze(-1) - levels).abs().argmin(-1) + 8 * (scaled < 0)
        stored[f"{name}_blocks"] = (bits[..., ::2] + 16 * bits[..., 1::2]).to(torch.uint8)
        stored[f"{name}_scales"] = (power + 127).to(torch.uint8)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
    }
    dump(folder / "config.json", config, indent=2)


def auto_class(config):
    """What makes a model of a config: models that read images have a class of their own."""
    reads_images = config.get_text_config() is not config
    return transformers.AutoModelForImageTextToText if reads_images else transformers.AutoModelForCausalLM


def load(folder):
    """The checkpoint as a stranger would load it, FP8 and MXFP4 as what they stand for, widened to float64."""
    config = transformers.AutoConfig.from_pretrained(folder)
    rest = {}
    if how := getattr(config, "quantization_config", None):
        kind = Mxfp4Config if how["quant_method"] == "mxfp4" else FineGrainedFP8Config
        rest["quantization_config"] = kind(**{**how, "dequantize": True})
    # float32 first: the rotary frequencies are then the float32 ones that every user of the model has.
    model, info = auto_class(config).from_pretrained(
        folder,
        **rest,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.double().eval()


def checksums(x):
    """Of numbers of few bits, without rounding: their sum, and that of each times its place."""
    x = x.flatten()
    return [x.sum().item(), (x * torch.arange(x.numel())).sum().item()]


def random_ids(generator, n, vocab):
    return torch.randint(3, vocab, (n,), generator=generator).tolist()


def sequences(model, generator):
    rows = []
    for total, prompt_len in LENGTHS:
        ids = random_ids(generator, total, model.config.get_text_config().vocab_size)
        with torch.no_grad(), exact():
            logps = response_logps(model, ids[:prompt_len], ids[prompt_len:])
        rows.append({"ids": ids, "prompt_len": prompt_len, "logps": logps.tolist(), "sum": logps.sum().item()})
    return rows


def stored_gradients(model):
    """Gradients by the names of the tensors in the folder."""
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    fixed = {name: x for name, x in model.state_dict().items() if name.endswith((*SELECTION, SCALE))}
    grads.update({name: torch.zeros_like(x) for name, x in fixed.items()})
    if getattr(model.config, "num_experts_per_tok", None):
        return revert_weight_conversion(model, grads)
    return {name.replace("model.language_model.", "model."): grad for name, grad in grads.items()}


def gradient_summary(generator, grad):
    """L2 norm and some entries (flat row-major index, value) of one gradient, biggest first."""
    g = grad.flatten()
    some = torch.randperm(g.numel(), generator=generator)[: SAMPLED_ENTRIES - 1].tolist()
    some = [int(g.abs().argmax())] + some
    return {
        "shape": list(grad.shape),
        "norm": g.norm().item(),
        "entries": [[i, g[i].item()] for i in some],
    }


def dpo(model, generator):
    """Sigmoid DPO of one pair, and d loss / d parameter for every parameter."""
    vocab = model.config.get_text_config().vocab_size
    prompt, chosen, rejected = (random_ids(generator, n, vocab) for n in (11, 14, 9))
    model.zero_grad()
    with exact():
        chosen_logps = response_logps(model, prompt, chosen).sum()
        rejected_logps = response_logps(model, prompt, rejected).sum()
    # A reference that is not the policy: a margin of 7 nats the wrong way, so that the gradient is not small.
    ref_chosen = round(chosen_logps.item(), 2) + 4.25
    ref_rejected = round(rejected_logps.item(), 2) - 2.75
    rewards_chosen = BETA * (chosen_logps - ref_chosen)
    rewards_rejected = BETA * (rejected_logps - ref_rejected)
    loss = -F.logsigmoid(rewards_chosen - rewards_rejected)
    loss.backward()
    grads = {name: gradient_summary(generator, grad) for name, grad in stored_gradients(model).items()}
    return {
        "beta": BETA,
        "loss_type": "sigmoid",
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
        "policy_chosen_logps": chosen_logps.item(),
        "policy_rejected_logps": rejected_logps.item(),
        "rewards_chosen": rewards_chosen.item(),
        "rewards_rejected": rewards_rejected.item(),
        "loss": loss.item(),
        "grad_norm": sum(g["norm"] ** 2 for g in grads.values()) ** 0.5,
        "grads": grads,
    }


def make(folder, name, seed):
    config_class, fields, how = FAMILIES[name]
    config = config_class(**{**TINY, **fields})
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = auto_class(config).from_config(config)
    fill(model, seed)
    save(folder, model.to(how.get("dtype", torch.float32)), how)

    model = load(folder)
    generator = torch.Generator().manual_seed(seed + 1000)
    figures = {
        "family": name,
        "made_with": versions(),
        "arithmetic": "float64 on the stored weights, attention eager",
        "sequences": sequences(model, generator),
        "dpo": dpo(model, generator),
    }
    if how.get("mxfp4"):
        figures["experts"] = {
            name: checksums(x) for name, x in model.state_dict().items() if name.endswith(MATRICES_OF_EXPERTS)
        }
    dump(folder / "figures.json", figures)
    return figures


def check_legacy(folder, figures):
    """config.legacy.json means the same model."""
    text = (folder / "config.json").read_text()
    try:
        (folder / "config.json").write_text((folder / "config.legacy.json").read_text())
        model = load(folder)
    finally:
        (folder / "config.json").write_text(text)
    for row in figures["sequences"]:
        with torch.no_grad(), exact():
            total = response_logps(model, row["ids"][: row["prompt_len"]], row["ids"][row["prompt_len"] :]).sum()
        assert abs(total.item() - row["sum"]) < 1e-12, (total, row["sum"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--only", nargs="*", choices=sorted(FAMILIES))
    args = parser.parse_args()
    torch.set_num_threads(1)
    for seed, name in enumerate(FAMILIES):
        if args.only and name not in args.only:
            continue
        folder = args.output / name
        figures = make(folder, name, FAMILIES[name][2].get("seed", seed))
        if FAMILIES[name][2].get("legacy_beside"):
            check_legacy(folder, figures)
        size = sum(p.stat().st_size for p in folder.iterdir())
        worst = min(min(s["logps"]) for s in figures["sequences"])
        print(
            f"{name}: {size} bytes in {sorted(p.name for p in folder.iterdir())}, "
            f"sums {[round(s['sum'], 3) for s in figures['sequences']]}, lowest {worst:.2f}, "
            f"loss {figures['dpo']['loss']:.4f}, |grad| {figures['dpo']['grad_norm']:.4f}"
        )


if __name__ == "__main__":
    main()
