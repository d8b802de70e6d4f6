"""Where kvcfg's answer may differ from MAX's, and why: a rule a line, keyed by fault number or scope.

Config models follow the fields of 26.4, arithmetic follows 26.7. A rule looks at one difference: the path
of a value with both answers, `refused.KEY` (or `unknown.KEY`) for a value that only kvcfg refuses, or
`accepted` for a question that only MAX refuses. What no rule explains fails the replay.

    connector-names   26.7 moved the connector's type into its settings and renamed them
    26.7-only-field   fields, methods and layouts that only one release has
    hash-algo         page hashes: kvcfg has no 64-bit one
    class-name        how objects are called
    engine-rule       what MAX's own kernels, tiers, counters and planner ask for
"""

from __future__ import annotations

from typing import get_args

from conditions import (
    ANY_SETTING,
    FP8,
    HOST_TIERS,
    MISSING,
    NEW_ENCODINGS,
    NEW_FIELDS,
    NEW_METHODS,
    NEW_SETTINGS,
    OLD_SETTINGS,
    SIZES,
    Difference,
    Rule,
    accepted,
    below,
    fewer_bytes,
    fewer_or_larger,
    gains_scales,
    gains_slack,
    is_dp_mla,
    is_nvfp4,
    is_same_draft,
    is_size,
    loses_one_slot,
    merges,
    method_is,
    new,
    nobody_drafts,
    old,
    one_latent_shape,
    other_pages_fit,
    refused,
    repeats_or_mixes,
    text,
    unknown,
    value,
)
from engine_differences import ENGINE_RULES

from kvcfg.formats import FORMATS, SCALE_DTYPES
from kvcfg.param_checks import SpeculativeMethod


def explain(difference: Difference) -> str | None:
    """The reason of the first rule that holds for a difference."""
    return next((rule.reason for rule in (*RULES, *ENGINE_RULES) if rule.explains(difference)), None)


CONFIGS = ("kv_cache_config", "config_ops", "load_manager")
CONNECTOR = r"(?:kv_connector_config\.)?"
BLOCK = r"(?:copy_as_dp_1\.\d+\.)?bytes_per_block"
BUFFERS = r"replicas\.\d+\.(?:values|scales|memory_units)"

RULES = (
    # Config models
    Rule("1", "a page has 1 to 4096 tokens", refused("kv_cache_page_size", lambda d: not 1 <= float(d.ours) <= 4096)),
    Rule("2", "a share is above 0, at most 1", refused(
        "device_memory_utilization", lambda d: not 0 < float(d.ours) <= 1)),
    Rule("26.7-only-field", "packed 4-bit floats come with their own format", new(refused(
        "kv_cache_format", lambda d: str(d.ours).lower() in ("float4_e2m1fn", "float4_e2m1")))),
    Rule("3", "a format must be in the table", refused(
        "kv_cache_format", lambda d: text(d.ours).lower() not in FORMATS)),
    Rule("3", "the table has float16, int8 and 4-bit floats", accepted(
        "Unrecognized kv_cache_format",
        lambda d: d.inputs["kv_cache_format"].lower() in ("float16", "int8", "float4_e2m1fn"))),
    Rule("3", "an empty encoding names nothing", new(refused("quantization_encoding", lambda d: d.ours == ""))),
    Rule("26.7-only-field", "an encoding is read where no format is given, and 26.7 knows more", old(accepted(
        "literal_error quantization_encoding",
        lambda d: d.inputs["kv_cache_format"] is not None or d.inputs["quantization_encoding"] in NEW_ENCODINGS))),
    Rule("4", "kv_cache_format is the cache's dtype from the start", value(
        "cache_dtype|cache_dtype_before",
        lambda d: d.kind in ("kv_cache_config", "cache_dtype") and d.theirs == "float32" and d.ours in FORMATS)),
    Rule("6", "a host or disk tier has a size, finite and above 0", refused(
        CONNECTOR + "(?:host_kvcache_swap_space_gb|disk_offload_max_gb)",
        lambda d: d.connectors & {*HOST_TIERS} != set() if d.ours is None else not is_size(d))),
    Rule("6", "no hidden 50 GiB: a size that is not given is null", old(value(
        rf"(?:(?:fields|dump_json)\.)?{CONNECTOR}(?:host_kvcache_swap_space_gb|disk_offload_max_gb)",
        lambda d: d.theirs == 50.0 and d.ours is None))),
    Rule("6", "null is how a size is left open", accepted(
        rf"float_type {CONNECTOR}(?:host_kvcache_swap_space_gb|disk_offload_max_gb)$")),
    Rule("7", "tiered needs a folder", refused(
        "kv_connector_config.disk_offload_dir", lambda d: d.ours in (None, "") and "tiered" in d.connectors)),
    Rule("7", "dkv needs an endpoint", refused(
        "kv_connector_config.block_store_endpoint", lambda d: d.ours in (None, "") and "dkv" in d.connectors)),
    Rule("7", "a host tier needs prefix caching", refused(
        "enable_prefix_caching",
        lambda d: d.ours is False and d.kind in CONFIGS and d.connectors & {*HOST_TIERS} != set())),
    Rule("connector-names", "the type is kv_connector, beside its settings", unknown(CONNECTOR + "type")),
    Rule("26.7-only-field", "settings of 26.7's own tiers", new(unknown(CONNECTOR + f"(?:{'|'.join(NEW_SETTINGS)})"))),
    Rule("26.7-only-field", "fields that only 26.7 has", new(unknown("|".join(NEW_FIELDS)))),
    Rule("8", "unknown settings are refused", unknown(
        CONNECTOR + r"\w+", lambda d: d.kind == "kv_connector_config" or "kv_connector_config." in d.path)),
    Rule("8", "a number of drafts that nobody makes is refused", refused(
        "num_speculative_tokens|num_draft_tokens",
        lambda d: d.ours is not None and int(d.ours) > 0 and nobody_drafts(d))),
    Rule("9", "null is no mapping, but a value", accepted("'NoneType' object has no attribute 'get'", new(
        lambda d: d.inputs.get("kwargs", {}).get("kv_connector_config", 1) is None))),
    Rule("10", "a file must not name another file or section", refused(
        "(?:kv_connector_config.)?config_file", lambda d: "config_file" in d.inputs["kwargs"] or "kv_connector_config"
        in d.inputs["kwargs"])),
    Rule("10", "of a file with sections one must be named", refused(
        "(?:kv_connector_config.)?section_name", lambda d: d.ours is None)),
    Rule("11", "values given merge into the file's, however deep", old(value(
        r"(?:fields|dump_json)\.kv_connector_config\.\w+", merges))),
    Rule("connector-names", "kv_connector is a field, its settings are null until given", new(value(
        r"(?:fields|dump_json)\.kv_connector_config(?:\.\w+)*",
        lambda d: d.kind in CONFIGS and d.ours == MISSING))),
    Rule("connector-names", "settings keep 26.4's names", new(value(
        rf"(?:fields|dump_json|extra)\.{CONNECTOR}(?:__extra__\.)?(?:{ANY_SETTING})(?:\..+)?"))),
    Rule("connector-names", "settings keep 26.4's names", new(refused(CONNECTOR + f"(?:{'|'.join(OLD_SETTINGS)})"))),
    Rule("connector-names", "kv_connector is a field", new(accepted("extra_forbidden kv_connector$"))),
    Rule("connector-names", "26.7 has no local, and says so to all that is not its own", new(accepted(
        r"enum kv_connector_config\.type|enum type"))),
    Rule("hash-algo", "no 64-bit hash", refused(
        "kv_cache_hash_algo|kv_cache_hash_seed", lambda d: d.is_new)),
    Rule("hash-algo", "no 64-bit hash", new(value(
        r"kv_hash_algo|(?:fields|dump_json)\.kv_cache_hash_algo", lambda d: d.theirs == "ahash64"))),
    Rule("26.7-only-field", "fields that only 26.7 has", old(accepted(
        rf"extra_forbidden (?:{'|'.join(NEW_FIELDS)})$"))),
    Rule("hash-algo", "26.4 has no choice of hash", old(accepted("extra_forbidden kv_cache_hash_(?:algo|seed)$"))),
    Rule("13", "at least one draft token", refused("num_speculative_tokens", lambda d: int(d.ours) < 1)),
    Rule("26.7-only-field", "the number of drafts is null until a method needs it", value(
        r"(?:fields|dump_json)\.num_speculative_tokens", lambda d: d.theirs == 2 and d.ours is None)),
    Rule("26.7-only-field", "the number of drafts may be null", old(accepted("int_type num_speculative_tokens$",
        lambda d: d.inputs["kwargs"]["num_speculative_tokens"] is None))),
    Rule("26.7-only-field", "26.7 dropped the strategy", new(accepted("extra_forbidden rejection_sampling_strategy$"))),
    Rule("26.7-only-field", "methods change with the release", accepted("literal_error speculative_method$",
        lambda d: d.inputs["kwargs"]["speculative_method"] in get_args(SpeculativeMethod))),
    Rule("26.7-only-field", "methods change with the release", new(refused(
        "speculative_method", lambda d: d.ours in NEW_METHODS))),
    # Parameters
    Rule("class-name", "one class for MHA and MLA", new(value("class"))),
    Rule("class-name", "offload units have no class of their own", value(r"replicas\.\d+\.memory_units\.\d+\.class",
        lambda d: d.ours == MISSING)),
    Rule("class-name", "26.7 hides the shapes of its offload units", new(value(
        r"replicas\.\d+\.memory_units\.\d+\.shape", lambda d: d.theirs is None))),
    Rule("class-name", "26.7 names no peers that hold the same latent", new(value(
        r"replicas\.\d+\.memory_units\.\d+\.peers", lambda d: d.theirs == 0 and d.calls[0].get("is_mla")))),
    Rule("26.7-only-field", "fields that only 26.7 has", new(value(
        rf"(?:(?:fields|dump_json)\.)?(?:{'|'.join(NEW_FIELDS)})(?:\..*)?", lambda d: d.ours == MISSING))),
    Rule("26.7-only-field", "arguments that only 26.7 takes", new(refused("page_size|slots_per_page|window_size",
        lambda d: d.path.split(".")[1] in d.calls[0]))),
    Rule("connector-names", "the connector is kv_connector", new(value("connector_type"))),
    Rule("26.7-only-field", "uint8 pairs of 4-bit floats come with their own format", new(refused("dtype", is_nvfp4))),
    Rule("5", "integers but int8 hold no quantized numbers", refused("dtype", lambda d: d.ours == "uint8")),
    Rule("5", "a scale has a type that scales", refused(
        r"kvcache_quant_config\.scale_dtype", lambda d: d.ours not in SCALE_DTYPES)),
    Rule("13", "granularity is at least 1", refused("quantization_granularity", below(1))),
    Rule("5", "scales that are asked for are stored, so they must fit head_dim", refused(
        "quantization_granularity", lambda d: gains_scales(d) and d.calls[0]["head_dim"] % d.ours != 0)),
    Rule("5", "scales that are asked for are stored", value(
        "quantized_kv_cache", lambda d: gains_scales(d) and d.ours is True)),
    Rule("5", "every 8-bit float is fp8", value(
        "is_fp8_kv_dtype", lambda d: d.ours is True and d.calls[0]["dtype"] in FP8[2:])),
    Rule("5", "scales that are asked for take room", value(
        BLOCK, lambda d: gains_scales(d) and fewer_or_larger(d))),
    Rule("5", "scales that are asked for take room", value(
        "|".join(SIZES), lambda d: gains_scales(d) and other_pages_fit(d))),
    Rule("5", "scales that are asked for take room on the host", old(value(
        "num_host_blocks", lambda d: gains_scales(d) and d.theirs > d.ours > 0))),
    Rule("5", "scales that are asked for have a buffer", value(
        r"replicas\.\d+\.scales", lambda d: gains_scales(d) and d.theirs is None)),
    Rule("5", "scales that are asked for take room", refused("capacity", gains_scales)),
    Rule("13", "dimensions are at least 1", refused("n_kv_heads|head_dim|num_layers|num_q_heads", below(1))),
    Rule("13", "there is at least one replica", refused("data_parallel_degree", below(1))),
    Rule("13", "no negative number of drafts", refused("num_draft_tokens", below(0))),
    Rule("13", "a method must exist", refused(
        "speculative_method", lambda d: d.ours not in (*get_args(SpeculativeMethod), *NEW_METHODS))),
    Rule("26.7-only-field", "methods change with the release", refused(
        "speculative_method", lambda d: d.ours in NEW_METHODS)),
    Rule("26.7-only-field", "standalone is no method of 26.7", new(value(
        "num_draft_tokens_per_step|spec_decode_cache_slack",
        lambda d: d.theirs == "raised" and method_is("standalone")(d)))),
    Rule("13", "a workload has at least one sequence of one token", refused("max_batch_size|max_seq_len", below(1))),
    Rule("13", "no view of no pages, and no division by them", value(
        r"replicas\.\d+\.to_memory_error\.\w+", lambda d: d.inputs["total_num_pages"] == 0)),
    Rule("14", "no device twice, no CPU among GPUs", refused("devices", repeats_or_mixes)),
    Rule("16", "fp8 without scales is a choice to be made", refused("kvcache_quant_config", lambda d: any(
        call["dtype"] in FP8 and call.get("kvcache_quant_config") is None for call in d.calls))),
    Rule("17", "MLA has one latent on every device", value(
        r"(?:copy_as_dp_1\.\d+\.)?n_kv_heads_per_device",
        lambda d: is_dp_mla(d) and d.ours == 1 and d.theirs == d.calls[0]["n_kv_heads"])),
    Rule("17", "MLA has one latent on every device", value(
        rf"shape_per_(?:scale_)?block|{BUFFERS}\.\d+\.shape",
        lambda d: one_latent_shape(d) or ("memory_units" in d.path and fewer_bytes(d)))),
    Rule("17", "MLA has one latent on every device", value(
        BLOCK, lambda d: is_dp_mla(d) and fewer_or_larger(d))),
    Rule("17", "MLA has one latent on every device", value(
        "|".join(SIZES), lambda d: is_dp_mla(d) and other_pages_fit(d))),
    Rule("17", "MLA has one latent on every device, and fewer bytes on the host", value(
        "num_host_blocks", lambda d: is_dp_mla(d) and d.ours > d.theirs > 0)),
    Rule("17", "MLA has one latent on every device", old(accepted("Insufficient cache memory", is_dp_mla))),
    Rule("26.7-only-field", "data and tensor parallel together", old(accepted("We do not yet support DP \\+ TP"))),
    Rule("26.7-only-field", "26.7 has query heads for MLA alone", new(refused("num_q_heads", lambda d: any(
        not call.get("is_mla") and call.get("num_q_heads") == d.ours > 0 for call in d.calls)))),
    Rule("26.7-only-field", "26.7 compares more of the caches", old(refused(
        "enable_prefix_caching|devices|kv_connector_config", lambda d: d.kind == "multi_params"))),
    Rule("19", "a replica's copy keeps its drafts", old(value(
        r"copy_as_dp_1\.\d+\.(?:speculative_method|num_draft_tokens)", is_same_draft))),
    Rule("21", "room for drafts is part of the pool", old(value("|".join(SIZES), gains_slack))),
    Rule("23", "no negative memory", refused("available_cache_memory", below(0))),
    Rule("25", "only a block drafter needs the slot of its own token", new(value(
        "spec_decode_cache_slack|" + "|".join(SIZES), loses_one_slot))),
    Rule("25", "only a block drafter needs the slot of its own token", new(accepted(
        "Insufficient cache memory to support a batch", lambda d: any(
            call.get("num_draft_tokens") == 1 and call["speculative_method"] != "dflash" for call in d.calls)))),
    Rule("25", "no drafter, no draft per step", old(value(
        "num_draft_tokens_per_step", lambda d: (d.theirs, d.ours) == (1, 0) and method_is(None)(d)))),
    Rule("25", "the slot of a block's own token needs a block", value("seq_len", lambda d: d.kind == "seq_len"
        and d.inputs["num_draft_tokens"] == d.inputs["num_draft_tokens_per_step"] <= 1 and d.theirs - d.ours == 1)),
)  # fmt: skip
