"""TensorRT-LLM: a YAML file for `trtllm-serve --extra_llm_api_options`; it forbids keys that it does not know.

Checked against the published `tensorrt_llm/llmapi/llm_args.py` of 1.2 (class KvCacheConfig), read, not run.
"""

from __future__ import annotations

from typing import Any

from kvcfg.exporters.exported import Export
from kvcfg.exporters.memory import budget_key, how_planned, planned_bytes
from kvcfg.exporters.servers import drafter_needed, model_name, refuse_drafts, refuse_page_size, say_limits
from kvcfg.exporters.sheet import Sheet
from kvcfg.exporters.stored import E4M3, NVFP4, engine_format, plain, refuse_layers
from kvcfg.exporters.tiers import tiers_of
from kvcfg.planning.plans import Plan

VERSIONS = ("1.2",)

FORMATS = {
    plain("float32"): "float32",
    plain("float16"): "float16",
    plain("bfloat16"): "bfloat16",
    E4M3: "fp8",
    NVFP4: "nvfp4",
}

PAGES = tuple(2**power for power in range(1, 13))

DRAFTS = {  # how drafts are decoded, and what their number is called there
    "eagle": ("Eagle", "max_draft_len"),
    "mtp": ("MTP", "num_nextn_predict_layers"),
    "standalone": ("Draft_Target", "max_draft_len"),
}


def export_trtllm(plan: Plan, version: str) -> Export:
    """The settings of `trtllm-serve` for a planned cache.

    Raises:
        ConfigError: if TensorRT-LLM cannot store it so.
    """
    sheet = Sheet("trtllm", version, plan)
    experiment = sheet.experiment
    model = model_name(sheet)
    sheet.say(dtype=experiment.model.dtype)
    _devices(sheet)
    cache: dict[str, Any] = {"enable_block_reuse": experiment.cache.enable_prefix_caching}
    sheet.say("cache.enable_prefix_caching", "cache.reuse_partial_pages")
    cache["enable_partial_reuse"] = experiment.cache.reuse_partial_pages
    refuse_page_size(sheet, among=PAGES, why="must be a power of two, 2 or more")
    cache["tokens_per_block"] = plan.resolution.params.page_size
    refuse_layers(sheet)
    cache["dtype"] = engine_format(sheet, FORMATS, auto="auto")
    if experiment.quantization.scale_source == "static":
        sheet.say("quantization.scale_source")
        sheet.need("Scales in the checkpoint, with kv_cache_quant_algo FP8 in its hf_quant_config.json.")
    memory = planned_bytes(plan)
    cache |= {"max_gpu_total_bytes": memory, "free_gpu_memory_fraction": 1.0}
    how = f"{how_planned(plan)}; the fraction is opened, because the smaller of the two counts"
    sheet.convert(budget_key(plan), "max_gpu_total_bytes", memory, how)
    _tiers(sheet, cache)
    if experiment.cache.eviction == "priority":
        sheet.say("cache.eviction")
        sheet.need("Priorities with each request: KvCacheRetentionConfig.")
    sheet.say(kv_cache_config=cache)
    say_limits(sheet, max_batch_size="max_batch_size", max_seq_len="max_seq_len")
    _drafts(sheet)
    return sheet.finish("trtllm.yaml", ("trtllm-serve", model), "--extra_llm_api_options")


def _devices(sheet: Sheet) -> None:
    devices = sheet.plan.resolution.devices
    replicas, tp = devices.data_parallel_degree, devices.tensor_parallel_degree
    sheet.say("devices.count")
    if replicas > 1 and tp == 1:
        sheet.say("devices.data_parallel_degree", tensor_parallel_size=replicas, enable_attention_dp=True)
        sheet.need("Attention data parallel splits the experts, or copies the weights of a dense model.")
    else:
        sheet.say(tensor_parallel_size=tp)


def _tiers(sheet: Sheet, cache: dict[str, Any]) -> None:
    tiers = tiers_of(sheet.experiment.cache)
    if tiers is None or tiers.host_gib is None:
        return
    sheet.say("cache.kv_connector")
    ranks = sheet.plan.resolution.devices.tensor_parallel_degree
    cache["host_cache_size"] = tiers.host_bytes // ranks
    key = "cache.kv_connector_config.host_kvcache_swap_space_gb"
    sheet.convert(key, "host_cache_size", cache["host_cache_size"], f"bytes for each of {ranks} ranks")
    if tiers.disk_dir is not None:
        sheet.lose("cache.kv_connector_config.disk_offload_dir", "null", "version 1.2 has no tier on disk")


def _drafts(sheet: Sheet) -> None:
    drafts = sheet.experiment.speculative
    method = drafts.speculative_method
    if method is None:
        return
    if method not in DRAFTS:
        refuse_drafts(sheet, "TensorRT-LLM", DRAFTS)
        return
    kind, count = DRAFTS[method]
    settings: dict[str, Any] = {"decoding_type": kind, count: drafts.num_draft_tokens}
    if method != "mtp":
        settings["speculative_model_dir"] = "DRAFTER"
    sheet.say("speculative.speculative_method", speculative_config=settings)
    drafter_needed(sheet, "DRAFTER in speculative_config")
