"""Configs that the goldens and others are made of."""

from __future__ import annotations

LLAMA = ("model=llama-3.1-8b", "devices=h100")

REFERENCE = (
    "model=llama-3.1-8b",
    "devices=h100x8_dp2tp4",
    "quantization=fp8_unit",
    "cache.kv_connector=tiered",
    "cache.kv_connector_config.host_kvcache_swap_space_gb=32",
    "cache.kv_connector_config.disk_offload_dir=/tmp/kv",
    "cache.kv_connector_config.disk_offload_max_gb=100",
    "speculative=eagle",
    "speculative.num_speculative_tokens=3",
)
"""Pages of 128 in fp8, host and disk behind them, TP 4, DP 2, three drafts."""

CASES = {
    "plain": LLAMA,
    "reference": REFERENCE,
    "int8": (*LLAMA, "cache=int8", "workload.max_batch_size=8", "workload.max_seq_len=8192"),
    "hybrid": ("model=qwen3-next-80b-a3b", "devices=h100x8"),
    "latent": ("model=deepseek-v3", "devices=h200x8", "model.weight_bits=8", "cache.kv_cache_page_size=64"),
    "vision": ("model=gemma-3-27b", "devices=h100", "cache.enable_prefix_caching=true"),
    "blocks": (
        *LLAMA,
        "cache.kv_cache_format=int8",
        "quantization.granularity=block",
        "quantization.quantization_granularity=32",
        "quantization.scale_dtype=float16",
    ),
    "bytes": (*LLAMA, "cache.kv_cache_memory_bytes=8GiB", "cache.enable_prefix_caching=false"),
}
