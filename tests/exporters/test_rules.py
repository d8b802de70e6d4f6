"""What single engines are told, and what they change: each rule of an exporter once."""

from __future__ import annotations

import json
import shlex

import pytest

from kvcfg.composition import compose
from kvcfg.errors import ConfigError
from kvcfg.exporters import Export, export
from tests.exporters.cases import CASES, LLAMA, REFERENCE

HOST = ("cache.kv_connector=local", "cache.kv_connector_config.host_kvcache_swap_space_gb=8")


def made(engine: str, *overrides: str, version: str | None = None) -> Export:
    return export(compose([*LLAMA, *overrides]), engine, version)


def changes(item: Export) -> list[tuple[str, object, object]]:
    return [(change.setting, change.written, change.becomes) for change in item.changes]


def test_vllm_makes_blocks_of_a_hybrid_larger() -> None:
    """Version 0.32 logs 1056 tokens for Qwen3-Next with float32 states on one device."""
    overrides = ["model=qwen3-next-80b-a3b", "devices=h200", "model.weight_bits=8", "cache.kv_cache_page_size=16"]
    assert changes(export(compose(overrides), "vllm")) == [("block-size", 16, 1056)]


def test_vllm_has_one_block_for_latents_on_cpus() -> None:
    item = export(compose(["model=deepseek-v2-lite", "devices=cpu", "devices.memory_gib=64"]), "vllm")
    assert changes(item) == [("block-size", 128, 16)]


def test_vllm_leaves_layers_in_the_models_own_format() -> None:
    layers = "quantization.layers=[{layers:[0,31],format:bfloat16}]"
    item = made("vllm", "cache.kv_cache_format=int8", layers)
    assert item.settings["kv-cache-dtype-skip-layers"] == ["0", "31"]


def test_vllm_turns_prefix_caching_off_with_a_flag_of_its_own() -> None:
    flags = made("vllm", "cache.enable_prefix_caching=false").flags
    assert flags is not None and "--no-enable-prefix-caching" in flags


def test_vllm_gets_both_tiers_as_one_connector() -> None:
    connector = export(compose(REFERENCE), "vllm").settings["kv-transfer-config"]
    assert connector["kv_connector_extra_config"]["cpu_bytes_to_use"] == 32 * 2**30
    assert connector["kv_connector_extra_config"]["secondary_tiers"] == [{"type": "fs", "root_dir": "/tmp/kv"}]


def test_vllm_has_no_scale_per_head_for_latents() -> None:
    with pytest.raises(ConfigError, match="float8_e4m3fn"):
        export(compose(["model=deepseek-v2-lite", "devices=h100", "cache.kv_cache_format=int8"]), "vllm")


def test_sglang_verifies_one_token_more_than_is_drafted() -> None:
    settings = export(compose(REFERENCE), "sglang").settings
    assert settings["speculative-num-steps"] == 3 and settings["speculative-num-draft-tokens"] == 4


def test_sglang_counts_host_memory_in_whole_gigabytes_of_a_rank() -> None:
    assert export(compose(REFERENCE), "sglang").settings["hicache-size"] == 8  # 32 GiB are 4 × 8.59 GB


def test_sglang_changes_pages_that_its_kernels_lack() -> None:
    assert changes(made("sglang", "cache.kv_cache_page_size=256")) == [("page-size", 256, 64)]


def test_sglang_has_no_flag_that_turns_the_radix_tree_on() -> None:
    flags = made("sglang").flags
    assert flags is not None and not any("radix-cache" in word for word in flags)


def test_max_turns_prefix_caching_off_for_an_architecture() -> None:
    item = export(compose(CASES["vision"]), "max")
    assert changes(item) == [("enable_prefix_caching", True, False)]
    assert "Gemma3ForConditionalGeneration" in item.changes[0].rule


def test_max_knows_the_architecture_of_a_folder(tmp_path) -> None:  # type: ignore[no-untyped-def]
    config = {
        "model_type": "llama", "architectures": ["NemotronHForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256, "intermediate_size": 128,
        "max_position_embeddings": 512, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    item = export(compose(["model=hf", f"model.path={tmp_path}", "devices=h100"]), "max")
    assert changes(item) == [("enable_prefix_caching", True, False)]


def test_max_names_tiers_as_its_version_does() -> None:
    old = export(compose(REFERENCE), "max", "26.4").settings["model"]["kv_cache"]
    new = export(compose(REFERENCE), "max", "26.7").settings["model"]["kv_cache"]
    assert old["kv_connector"] == "tiered" and old["kv_connector_config"]["host_kvcache_swap_space_gb"] == 32
    assert "kv_connector" not in new and new["kv_connector_config"]["type"] == "rust_tiered"


def test_max_has_no_disk_behind_a_local_tier() -> None:
    config = made("max", *HOST).settings["model"]["kv_cache"]["kv_connector_config"]
    assert config == {"type": "rust_tiered", "host_offload_max_gb": 8, "disk_offload_max_gb": 0}


def test_max_takes_float16_from_the_weights_alone() -> None:
    model = made("max", "model.dtype=float16").settings["model"]
    assert model["quantization_encoding"] == "float16" and "kv_cache_format" not in model["kv_cache"]


def test_lmcache_chunks_are_whole_pages() -> None:
    assert made("lmcache", *HOST, "cache.kv_cache_page_size=96").settings["chunk_size"] == 288


def test_llamacpp_gives_every_slot_its_context() -> None:
    settings = made("llamacpp", "workload.max_batch_size=4", "workload.max_seq_len=8192").settings
    assert (settings["LLAMA_ARG_CTX_SIZE"], settings["LLAMA_ARG_N_PARALLEL"]) == (32768, 4)


def test_llamacpp_needs_flash_attention_for_quantized_values() -> None:
    settings = export(compose(CASES["blocks"]), "llamacpp").settings
    assert (settings["LLAMA_ARG_CACHE_TYPE_V"], settings["LLAMA_ARG_FLASH_ATTN"]) == ("q8_0", "on")


def test_llamacpp_stores_keys_and_values_in_types_of_their_own() -> None:
    sides = ("quantization.key_format=float16", "quantization.value_format=bfloat16")
    settings = made("llamacpp", *sides).settings
    assert (settings["LLAMA_ARG_CACHE_TYPE_K"], settings["LLAMA_ARG_CACHE_TYPE_V"]) == ("f16", "bf16")


def test_trtllm_starts_one_server_a_replica() -> None:
    losses = [loss.key for loss in export(compose(REFERENCE), "trtllm").losses]
    assert "devices.data_parallel_degree" in losses


def test_command_can_be_pasted() -> None:
    item = made("lmcache", *HOST)
    words = shlex.split(item.to_dict()["command"])
    assert words == list(item.command()) and json.loads(words[-1])["kv_connector"] == "LMCacheConnectorV1"
