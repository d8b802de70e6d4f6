"""vLLM: a YAML file for `vllm serve --config`, whose keys are the long names of its flags.

Checked against vLLM 0.32: `vllm/config/cache.py` for names and types, `vllm/platforms/interface.py` and `cpu.py` for
what it changes, `vllm/v1/kv_offload/` for tiers.
"""

from __future__ import annotations

from math import ceil
from typing import Any

from kvcfg.exporters.exported import Export
from kvcfg.exporters.memory import budget_key, how_planned, planned_bytes
from kvcfg.exporters.servers import drafter_needed, has_states, is_latent, model_name, refuse_page_size, say_limits
from kvcfg.exporters.sheet import Sheet
from kvcfg.exporters.stored import (
    E4M3,
    E5M2,
    NVFP4,
    differing_layers,
    engine_format,
    per_token_head,
    plain,
)
from kvcfg.exporters.tiers import tiers_of, whole
from kvcfg.planning.plans import Plan
from kvcfg.units import ceil_div

VERSIONS = ("0.32",)

FORMATS = {
    plain("float16"): "float16",
    plain("bfloat16"): "bfloat16",
    E4M3: "fp8_e4m3",
    E5M2: "fp8_e5m2",
    per_token_head("float8_e4m3fn"): "fp8_per_token_head",
    per_token_head("int8"): "int8_per_token_head",
    per_token_head("int4"): "int4_per_token_head",
    NVFP4: "nvfp4",
}
FORMATS_OF_LATENTS = {plain("float16"): "float16", plain("bfloat16"): "bfloat16", E4M3: "fp8_e4m3"}

HASHES = {"sha256": "sha256", "xxh3_128": "xxhash"}
DRAFTS = {"standalone": "draft_model", "eagle": "eagle", "mtp": "mtp", "dflash": "dflash"}

KERNEL_BLOCK = 16
"""Attention kernels take blocks of so many tokens, or a multiple."""

CPU_LATENT_BLOCK = 16
"""The only block of its MLA kernel for CPUs without AMX."""


def export_vllm(plan: Plan, version: str) -> Export:
    """The settings of `vllm serve` for a planned cache.

    Raises:
        ConfigError: if vLLM cannot store it so.
    """
    sheet = Sheet("vllm", version, plan, dashed=True)
    experiment, devices = sheet.experiment, plan.resolution.devices
    sheet.say(model=model_name(sheet), dtype=experiment.model.dtype)
    _pages(sheet)
    _format(sheet)
    memory = planned_bytes(plan)
    sheet.convert(budget_key(plan), "kv-cache-memory-bytes", memory, how_planned(plan))
    sheet.say(kv_cache_memory_bytes=memory)
    _prefixes(sheet)
    sheet.say("devices.count", tensor_parallel_size=devices.tensor_parallel_degree)
    sheet.say("devices.data_parallel_degree", data_parallel_size=devices.data_parallel_degree)
    say_limits(sheet, max_seq_len="max_model_len", max_batch_size="max_num_seqs")
    _tiers(sheet)
    _drafts(sheet)
    return sheet.finish("vllm.yaml", ("vllm", "serve"), "--config")


def _pages(sheet: Sheet) -> None:
    plan, size = sheet.plan, sheet.plan.resolution.params.page_size
    why = f"must be a multiple of {KERNEL_BLOCK}, the smallest block of vLLM's kernels"
    refuse_page_size(sheet, multiple_of=KERNEL_BLOCK, why=why)
    sheet.say(block_size=size)
    on_cpu = plan.resolution.devices.kind == "cpu"
    if is_latent(plan) and on_cpu and size != CPU_LATENT_BLOCK:
        rule = "the CPU's MLA kernel has no other block (without AMX)"
        sheet.change("block-size", size, CPU_LATENT_BLOCK, rule, "vllm/platforms/cpu.py, check_and_update_config")
    if has_states(plan) and (hybrid := hybrid_block_size(plan)) > size:
        rule = "a block of a hybrid model is made at least as large as one linear layer's state"
        source = "vllm/platforms/interface.py, _align_hybrid_block_size"
        sheet.change("block-size", size, hybrid, rule, source)


def hybrid_block_size(plan: Plan) -> int:
    """The block that vLLM makes for a model with linear layers: whole kernel blocks that hold one layer's state."""
    params = plan.resolution.params
    tp, size = params.tensor_parallel_degree, params.page_size
    groups = [group for group in params.params if group.grows]
    states = [group.state_bytes or 0 for group in plan.experiment.model.layer_groups if group.kind == "linear"]
    if not groups or not states:
        return size
    group = groups[0]
    token = ceil_div(group.bytes_per_block, group.page_size * group.num_layers * tp)
    align = max(size, 128) if group.is_mla else max(size, KERNEL_BLOCK)
    block = align * ceil(ceil_div(max(states), tp) / (align * token))
    return KERNEL_BLOCK * ceil_div(block, KERNEL_BLOCK)


def _format(sheet: Sheet) -> None:
    table = FORMATS_OF_LATENTS if is_latent(sheet.plan) else FORMATS
    name = engine_format(sheet, table, auto="auto")
    sheet.say(kv_cache_dtype=name)
    if sheet.experiment.quantization.scale_source == "static":
        sheet.say("quantization.scale_source")
        sheet.need("Calibrated scales in the checkpoint: kvcfg export scales=FOLDER writes them as it reads them.")
    differing = differing_layers(sheet.experiment)
    usual = sheet.experiment.model.dtype
    if any(recipe.is_scaled or recipe.format_name != usual for recipe in differing.values()):
        rule = f"vLLM can leave layers in {usual}, and store them in no other format"
        sheet.refuse("quantization.layers", rule, "quantization.layers=null")
    elif differing:
        sheet.say("quantization.layers", kv_cache_dtype_skip_layers=[str(layer) for layer in sorted(differing)])


def _prefixes(sheet: Sheet) -> None:
    cache = sheet.experiment.cache
    sheet.say("cache.enable_prefix_caching", enable_prefix_caching=cache.enable_prefix_caching)
    if not cache.enable_prefix_caching:
        return
    if cache.kv_cache_hash_algo in HASHES:
        sheet.say("cache.kv_cache_hash_algo", prefix_caching_hash_algo=HASHES[cache.kv_cache_hash_algo])
    else:
        sheet.say(prefix_caching_hash_algo="sha256")
        sheet.lose("cache.kv_cache_hash_algo", "sha256", "there is no such hash")
    if cache.kv_cache_hash_seed is not None:
        why = "the seed is PYTHONHASHSEED, or cache_salt with each request"
        sheet.lose("cache.kv_cache_hash_seed", "null", why)


def _tiers(sheet: Sheet) -> None:
    tiers = tiers_of(sheet.experiment.cache)
    if tiers is None:
        return
    if tiers.host_gib is None:
        why = "vLLM's connectors speak to stores of other kinds"
        sheet.lose("cache.kv_connector", "null", why)
        return
    sheet.say("cache.kv_connector")
    if tiers.disk_dir is None:
        sheet.say(kv_offloading_size=whole(tiers.host_gib), kv_offloading_backend="native")
        return
    extra: dict[str, Any] = {
        "spec_name": "TieringOffloadingSpec",
        "cpu_bytes_to_use": tiers.host_bytes,
        "secondary_tiers": [{"type": "fs", "root_dir": tiers.disk_dir}],
    }
    connector = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    sheet.say(kv_transfer_config=connector)
    sheet.lose("cache.kv_connector_config.disk_offload_max_gb", "no limit", "its files take what they need")


def _drafts(sheet: Sheet) -> None:
    drafts = sheet.experiment.speculative
    if drafts.speculative_method is None:
        return
    method = DRAFTS[drafts.speculative_method]
    config: dict[str, Any] = {"method": method, "num_speculative_tokens": drafts.num_draft_tokens}
    if method != "mtp":
        config["model"] = "DRAFTER"
    drafter_needed(sheet, "DRAFTER in speculative-config")
    sheet.say("speculative.speculative_method", speculative_config=config)
