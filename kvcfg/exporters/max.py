"""MAX: a YAML recipe for `max serve --config-file`, in the sections of the recipes that it ships.

Checked against MAX 26.4 and 26.7: `max/pipelines/kv_cache/config.py`, `max/pipelines/lib/config/`, the bundled
recipes, and the architectures' required arguments.
"""

from __future__ import annotations

from typing import Any

from kvcfg.config.recipes import resolve_recipe
from kvcfg.exporters.architectures import architectures_of
from kvcfg.exporters.exported import Export
from kvcfg.exporters.memory import budget_key, how_planned, share_of_memory
from kvcfg.exporters.servers import drafter_needed, model_name, refuse_drafts, refuse_page_size
from kvcfg.exporters.sheet import Sheet
from kvcfg.exporters.stored import E4M3, NVFP4, engine_format, plain, refuse_layers, stored_as
from kvcfg.exporters.tiers import tiers_of, whole
from kvcfg.planning.plans import Plan

VERSIONS = ("26.4", "26.7")

FORMATS_26_4 = {plain("float32"): "float32", plain("bfloat16"): "bfloat16", E4M3: "float8_e4m3fn"}
FORMATS = {"26.4": FORMATS_26_4, "26.7": FORMATS_26_4 | {NVFP4: "float4_e2m1fn"}}

PAGE = {"26.4": 128, "26.7": 1}
"""What pages must be a multiple of."""

HASHES = ("sha256",)
DRAFTS = ("eagle", "mtp", "dflash")

WITHOUT_PREFIXES = frozenset({
    "Gemma3ForConditionalGeneration", "Idefics3ForConditionalGeneration", "InternVLChatModel",
    "LlavaForConditionalGeneration", "NemotronHForCausalLM", "DiffusionGemmaForBlockDiffusion",
})  # fmt: skip
"""Architectures whose required arguments turn prefix caching off."""

WITHOUT_PREFIXES_IF_DRAFTED = frozenset({"Qwen3_5ForConditionalGeneration"})


def export_max(plan: Plan, version: str) -> Export:
    """The recipe of `max serve` for a planned cache.

    Raises:
        ConfigError: if MAX cannot store it so.
    """
    sheet = Sheet("max", version, plan)
    experiment, devices = sheet.experiment, plan.resolution.devices
    model: dict[str, Any] = {"model_path": model_name(sheet)}
    gpus = list(range(devices.count)) if devices.kind == "gpu" else None
    sheet.say("devices.count", "devices.data_parallel_degree")
    if gpus is not None:
        model["device_specs"] = gpus
    if devices.data_parallel_degree > 1:
        model["data_parallel_degree"] = devices.data_parallel_degree
    if experiment.workload.max_seq_len is not None:
        sheet.say("workload.max_seq_len")
        model["max_length"] = experiment.workload.max_seq_len
    if _is_float16(sheet):
        model["quantization_encoding"] = "float16"
    model["kv_cache"] = _cache(sheet)
    sheet.say(model=model)
    _drafts(sheet)
    if experiment.workload.max_batch_size is not None:
        sheet.say("workload.max_batch_size", runtime={"max_batch_size": experiment.workload.max_batch_size})
    launch = ("max", "serve") if gpus is not None else ("max", "serve", "--devices", "cpu")
    return sheet.finish("max.yaml", launch, "--config-file")


def _is_float16(sheet: Sheet) -> bool:
    """Whether the cache is float16 because the model is: MAX then has the weights' encoding say it."""
    recipe = resolve_recipe(sheet.experiment)
    stored = plain("float16") == stored_as(recipe.keys, recipe) == stored_as(recipe.values, recipe)
    return stored and sheet.experiment.model.dtype == "float16" and sheet.version != "26.4"


def _cache(sheet: Sheet) -> dict[str, Any]:
    plan, version = sheet.plan, sheet.version
    why = f"must be a multiple of {PAGE[version]} in MAX {version}"
    refuse_page_size(sheet, multiple_of=PAGE[version], why=why)
    cache: dict[str, Any] = {"kv_cache_page_size": plan.resolution.params.page_size}
    refuse_layers(sheet)
    if _is_float16(sheet):
        sheet.say("cache.kv_cache_format")
    else:
        cache["kv_cache_format"] = engine_format(sheet, FORMATS[version])
    _prefixes(sheet, cache)
    share = share_of_memory(plan)
    how = f"{how_planned(plan)}; weights and cache together are that share of free memory"
    sheet.convert(budget_key(plan), "device_memory_utilization", share, how)
    cache["device_memory_utilization"] = share
    _tiers(sheet, cache)
    return cache


def _prefixes(sheet: Sheet, cache: dict[str, Any]) -> None:
    asked = sheet.experiment.cache
    sheet.say("cache.enable_prefix_caching")
    cache["enable_prefix_caching"] = asked.enable_prefix_caching
    names = set(architectures_of(sheet.experiment.model))
    drafted = sheet.experiment.speculative.speculative_method is not None
    forced = names & (WITHOUT_PREFIXES | (WITHOUT_PREFIXES_IF_DRAFTED if drafted else frozenset()))
    if asked.enable_prefix_caching and forced:
        rule = f"{min(forced)} is not built for shared prefixes; a warning says so"
        source = "max/pipelines/lib/config/config.py, required_arguments of the architecture"
        sheet.change("enable_prefix_caching", True, False, rule, source)
    if sheet.version == "26.4" or not asked.enable_prefix_caching:
        return
    if asked.kv_cache_hash_algo in HASHES:
        sheet.say("cache.kv_cache_hash_algo")
    else:
        sheet.lose("cache.kv_cache_hash_algo", "sha256", "there is no such hash")
    cache["kv_cache_hash_algo"] = "sha256"
    if asked.kv_cache_hash_seed is not None:
        sheet.say("cache.kv_cache_hash_seed")
        cache["kv_cache_hash_seed"] = asked.kv_cache_hash_seed
    sheet.say("cache.enable_dp_cross_replica_prefix_copy")
    cache["enable_dp_cross_replica_prefix_copy"] = asked.enable_dp_cross_replica_prefix_copy


def _tiers(sheet: Sheet, cache: dict[str, Any]) -> None:
    tiers = tiers_of(sheet.experiment.cache)
    if tiers is None:
        return
    sheet.say("cache.kv_connector", "cache.kv_connector_config.disk_offload_direct_io")
    named: dict[str, Any] = {}
    if tiers.endpoint is not None:
        kind, named = "dkv", {"block_store_endpoint": tiers.endpoint}
    else:
        assert tiers.host_gib is not None
        newer = sheet.version != "26.4"
        kind = "rust_tiered" if newer else str(sheet.experiment.cache.kv_connector)
        named["host_offload_max_gb" if newer else "host_kvcache_swap_space_gb"] = whole(tiers.host_gib)
        if tiers.disk_dir is not None and tiers.disk_gib is not None:
            named |= {"disk_offload_dir": tiers.disk_dir, "disk_offload_max_gb": whole(tiers.disk_gib)}
            if tiers.direct_io:
                named["use_disk_direct_io" if newer else "disk_offload_direct_io"] = True
        elif newer:
            named["disk_offload_max_gb"] = 0
    if sheet.version == "26.4":
        cache |= {"kv_connector": kind, "kv_connector_config": named}
    else:
        cache["kv_connector_config"] = {"type": kind, **named}


def _drafts(sheet: Sheet) -> None:
    drafts = sheet.experiment.speculative
    method = drafts.speculative_method
    if method is None:
        return
    if method not in DRAFTS:
        refuse_drafts(sheet, "MAX", DRAFTS)
    settings: dict[str, Any] = {"speculative_method": method, "num_speculative_tokens": drafts.num_draft_tokens}
    keys = ["speculative.speculative_method"]
    if sheet.version == "26.4" and drafts.rejection_sampling_strategy is not None:
        keys.append("speculative.rejection_sampling_strategy")
        settings["rejection_sampling_strategy"] = drafts.rejection_sampling_strategy
    if drafts.synthetic_acceptance_rate is not None:
        keys.append("speculative.synthetic_acceptance_rate")
        settings["synthetic_acceptance_rate"] = drafts.synthetic_acceptance_rate
    if drafts.use_relaxed_acceptance_for_thinking:
        keys.append("speculative.use_relaxed_acceptance_for_thinking")
        settings["use_relaxed_acceptance_for_thinking"] = True
        settings |= {"relaxed_topk": drafts.relaxed_topk, "relaxed_delta": drafts.relaxed_delta}
    if method != "mtp":
        sheet.say(draft_model={"model_path": "DRAFTER"})
    sheet.say(*keys, speculative=settings)
    drafter_needed(sheet, "DRAFTER in draft_model")
