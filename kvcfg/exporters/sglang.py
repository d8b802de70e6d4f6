"""SGLang: a YAML file for `sglang serve --config`, whose keys are the long names of its flags.

Checked against SGLang 0.5.23: `sglang/srt/arg_groups/fields/` for names and choices, `arg_groups/overrides.py` for
what it changes.
"""

from __future__ import annotations

from kvcfg.exporters.exported import Export
from kvcfg.exporters.memory import budget_key, how_planned, share_used
from kvcfg.exporters.servers import drafter_needed, has_states, is_latent, model_name, say_limits
from kvcfg.exporters.sheet import Sheet
from kvcfg.exporters.stored import E4M3, E5M2, MXFP4_16, MXFP8, NVFP4, engine_format, plain, refuse_layers
from kvcfg.exporters.tiers import tiers_of
from kvcfg.planning.plans import Plan

VERSIONS = ("0.5.23",)

FORMATS = {
    plain("bfloat16"): "bf16",
    E4M3: "fp8_e4m3",
    E5M2: "fp8_e5m2",
    MXFP8: "mxfp8",
    NVFP4: "nvfp4",
    MXFP4_16: "fp4_mx_block16",
}

EVICTIONS = ("lru", "lfu", "priority")
DRAFTS = {"standalone": "STANDALONE", "eagle": "EAGLE", "mtp": "NEXTN", "dflash": "DFLASH"}

PAGES_ON_BLACKWELL = {False: (16, 32, 64, 128), True: (32, 64)}
"""Pages of the TensorRT-LLM kernels, which are the default there: for heads, and for latents."""

GB = 10**9


def export_sglang(plan: Plan, version: str) -> Export:
    """The settings of `sglang serve` for a planned cache.

    Raises:
        ConfigError: if SGLang cannot store it so.
    """
    sheet = Sheet("sglang", version, plan, dashed=True)
    experiment, devices = sheet.experiment, plan.resolution.devices
    sheet.say(model_path=model_name(sheet), dtype=experiment.model.dtype)
    _pages(sheet)
    refuse_layers(sheet)
    sheet.say(kv_cache_dtype=engine_format(sheet, FORMATS, auto="auto"))
    _memory(sheet)
    _prefixes(sheet)
    sheet.say("devices.count", tp_size=devices.tensor_parallel_degree)
    sheet.say("devices.data_parallel_degree", dp_size=devices.data_parallel_degree)
    say_limits(sheet, max_seq_len="context_length", max_batch_size="max_running_requests")
    _tiers(sheet)
    _drafts(sheet)
    return sheet.finish("sglang.yaml", ("sglang", "serve"), "--config")


def _pages(sheet: Sheet) -> None:
    plan, size = sheet.plan, sheet.plan.resolution.params.page_size
    sheet.say("cache.kv_cache_page_size", page_size=size)
    latent = is_latent(plan)
    if plan.resolution.devices.kind == "gpu" and size not in PAGES_ON_BLACKWELL[latent]:
        backend = "trtllm_mla" if latent else "trtllm_mha"
        rule = f"where the attention backend is {backend}, the default on Blackwell"
        source = "sglang/srt/arg_groups/overrides.py, _mla_backend_page_constraints"
        sheet.change("page-size", size, 64, rule, source)
    if has_states(plan) and size > 1 and sheet.experiment.cache.enable_prefix_caching:
        sheet.need("A model whose states have an extra buffer: without, SGLang stops at pages of more than 1 token.")


def _memory(sheet: Sheet) -> None:
    plan = sheet.plan
    share, key = share_used(plan), budget_key(plan)
    how = f"{how_planned(plan)}; weights and cache together are that share of a device"
    sheet.convert(key, "mem-fraction-static", share, how)
    sheet.say(mem_fraction_static=share)
    if plan.num_tokens:
        pages = f"{plan.num_pages:,} pages of {plan.resolution.params.page_size}"
        sheet.convert(key, "max-total-tokens", plan.num_tokens, f"{pages} in what was planned for a replica")
        sheet.say(max_total_tokens=plan.num_tokens)


def _prefixes(sheet: Sheet) -> None:
    cache = sheet.experiment.cache
    sheet.say("cache.enable_prefix_caching", disable_radix_cache=not cache.enable_prefix_caching)
    if cache.eviction in EVICTIONS:
        sheet.say("cache.eviction", radix_eviction_policy=cache.eviction)


def _tiers(sheet: Sheet) -> None:
    tiers, ranks = tiers_of(sheet.experiment.cache), sheet.plan.resolution.devices.tensor_parallel_degree
    if tiers is None:
        return
    if tiers.host_gib is None:
        sheet.lose("cache.kv_connector", "null", "SGLang's storage backends speak to stores of other kinds")
        return
    gigabytes = int(tiers.host_bytes / ranks / GB)
    sheet.say("cache.kv_connector", enable_hierarchical_cache=True, hicache_size=gigabytes)
    how = f"whole GB (10^9 bytes) of each of {ranks} ranks, rounded down"
    sheet.convert("cache.kv_connector_config.host_kvcache_swap_space_gb", "hicache-size", gigabytes, how)
    if gigabytes == 0:
        rule = "is less than 1 GB for each rank, and SGLang counts whole ones"
        sheet.refuse("cache.kv_connector_config.host_kvcache_swap_space_gb", rule, _host_fix(ranks))
    if tiers.disk_dir is not None:
        sheet.say(hicache_storage_backend="file")
        sheet.need(f"SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR={tiers.disk_dir} in the environment.")
        sheet.lose("cache.kv_connector_config.disk_offload_max_gb", "no limit", "its files take what they need")


def _host_fix(ranks: int) -> str:
    return f"cache.kv_connector_config.host_kvcache_swap_space_gb={ranks}"


def _drafts(sheet: Sheet) -> None:
    drafts = sheet.experiment.speculative
    if drafts.speculative_method is None:
        return
    number = drafts.num_draft_tokens
    sheet.say("speculative.speculative_method", speculative_algorithm=DRAFTS[drafts.speculative_method])
    if drafts.is_dflash():
        sheet.say(speculative_num_draft_tokens=number)
    else:
        sheet.say(speculative_num_steps=number, speculative_eagle_topk=1, speculative_num_draft_tokens=number + 1)
        how = "one more than the drafts: the token that they start from is verified with them"
        sheet.convert("speculative.num_speculative_tokens", "speculative-num-draft-tokens", number + 1, how)
    if drafts.speculative_method != "mtp":
        sheet.say(speculative_draft_model_path="DRAFTER")
    drafter_needed(sheet, "DRAFTER in speculative-draft-model-path")
