"""What the code of an architecture knows and its config.json may leave out, and what kvcfg cannot count.

Taken from the configuration classes and cache of transformers 5.23; a test goes through all of its causal language
models, with keys taken out, and finds each one read as transformers reads it, or refused.
"""

from __future__ import annotations

from typing import Any

FULL_EVERY = {  # every n-th layer is full, the others are windowed or linear
    **dict.fromkeys(("gemma2", "gpt_oss", "vaultgemma"), 2),
    **dict.fromkeys(("cohere2", "exaone4", "llama4_text", "olmo3"), 4),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), 4),
    **dict.fromkeys(("gemma3n_text",), 5),
    **dict.fromkeys(("gemma3_text", "gemma4_text", "gemma4_unified_text"), 6),
}

DEFAULTS: dict[str, dict[str, Any]] = {  # left out of published files because the architecture's code has it
    "gemma": {"head_dim": 256},
    "gemma2": {"head_dim": 256, "num_key_value_heads": 4, "sliding_window": 4096},
    "gemma3_text": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 4096,
        "max_position_embeddings": 131072,
        "vocab_size": 262208,
        "tie_word_embeddings": True,
    },
    "gemma3n_text": {"head_dim": 256, "num_key_value_heads": 2, "num_kv_shared_layers": 15},
    "gemma4_text": {"head_dim": 256, "global_head_dim": 512, "tie_word_embeddings": True},
    "gemma4_unified_text": {"head_dim": 256, "global_head_dim": 512, "tie_word_embeddings": True},
    "gpt_oss": {"head_dim": 64},
    "llama4_text": {"attention_chunk_size": 8192},
    "mistral": {"sliding_window": 4096},
    "qwen3": {"head_dim": 128},
}

FULL_EVERY_KEYS = (
    "sliding_window_pattern",
    "full_attention_interval",
    "no_rope_layer_interval",
    "global_attn_every_n_layers",
)

# Architectures whose code has another default than the usual one: as many KV heads as query heads,
# hidden_size / heads as head_dim, the same attention in every layer.
# fmt: off
MUST_STATE: dict[str, frozenset[str]] = {
    "num_key_value_heads": frozenset({
        "beam", "bitnet", "cwm", "emu3_text_model", "ernie4_5", "ernie4_5_moe", "flint", "gemma4_text",
        "gemma4_unified_text", "glm", "glm4", "gpt_oss", "granite_swa", "hy_v3", "internlm3", "iquestcoder",
        "jetmoe", "kolibri1", "laguna", "llama4_text", "mellum", "mimo_v2_flash", "minimax_m2", "ministral",
        "ministral3", "mistral", "mixtral", "phi4_multimodal", "phimoe", "qwen2", "qwen3", "qwen3_5_moe_text",
        "qwen3_5_text", "qwen3_moe", "qwen3_next", "seed_oss", "smollm3", "solar_open", "starcoder2",
        "vaultgemma",
    }),
    "head_dim": frozenset({
        "ernie4_5", "flint", "hy_v3", "mellum", "mimo_v2_flash", "minimax_m2", "qwen3_5_moe_text",
        "qwen3_5_text", "qwen3_next", "solar_open", "vaultgemma",
    }),
    "layer_types": frozenset({
        "beam", "cohere2_moe", "cohere_compass_text", "cwm", "dots1", "exaone_moe", "flint", "granite_swa",
        "granitemoe_swa", "kimi_linear", "kolibri1", "laguna", "mellum", "mimo_v2_flash", "minimax",
        "olmo_hybrid", "zaya",
    }),
}
# fmt: on

GATED_DELTA_NET = frozenset({"qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"})
"""Architectures whose linear layers keep a convolution's inputs and one matrix per head."""

NOT_UNDERSTOOD = (  # keys, as patterns, and what a layer keeps where one of them is set
    (r"index_(topk|head_dim|n_heads)|indexer_.*|.*sparse_attention.*", "a sparse-attention indexer"),
    (r"compress_ra(te|tio)s?|.*_compress_.*", "compressed keys"),
    (r"mamba_.*|ssm_.*|.*_mamba_.*|state_size|layers_block_type|hybrid_override_pattern", "Mamba states"),
    (r"conv_L_cache|conv1d_width|short_conv.*|linear_attn_config|lightning.*", "a state of another shape"),
    (r"cross_attention_layers|encoder_layers|num_encoder_layers|add_cross_attention", "keys of an encoder"),
    (r"local_attention.*|attention_window_size|attention_types|attn_layers|lsh_.*", "its own pattern of local layers"),
    (r"swa_.*|keep_window_size", "windowed layers with other heads"),
    (r"global_config|patcher_.*|depth_decoder_config|ngram_.*|ple_conv_.*", "more than one stack of layers"),
    (r"zero_expert_.*", "two attentions in a layer"),
    (r"attn_type_list|block_types", "layers of several types under names of its own"),
)
