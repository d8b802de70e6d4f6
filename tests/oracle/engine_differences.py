"""Rules, as in `differences.py`, for planning, loading, inputs of a step, metrics and configs as values."""

from __future__ import annotations

import math

from conditions import (
    MISSING,
    NEW_FIELDS,
    Difference,
    Rule,
    Test,
    accepted,
    gains_scales,
    is_dp_mla,
    new,
    old,
    one_latent_shape,
    refused,
    slack,
    unknown,
    value,
)

TIERS = "h2d|d2h|disk|inflight|nixl|rpc|dkv|connector|remote|cross_replica|device_blocks"
NEW_INPUTS = (
    "kv_blocks_per_layer|kv_scales_per_layer|max_cache_length|max_prompt_length|page_stride|scales_lookup_table"
    "|scales_page_stride"
)


def when(kind: str, test: Test = lambda d: True) -> Test:
    """The question is of a kind."""
    return lambda d: d.kind == kind and test(d)


def operation(name: str) -> Test:
    """The question does that to a config."""
    return lambda d: d.kind == "config_ops" and d.inputs["op"] == name


def pages(d: Difference, slots: int = 0) -> int:
    """Pages of one sequence of full length, with slots beyond it."""
    page_size = d.cases[0]["config"].get("kv_cache_page_size", 128)
    return math.ceil((d.inputs["max_seq_len"] + slots) / page_size)


def by(difference: int) -> Test:
    """Pages, or the first dimension of a buffer, are that many fewer than MAX's; all else is equal."""

    def test(d: Difference) -> bool:
        if isinstance(d.theirs, list):
            return bool(d.theirs[0] - d.ours[0] == difference and d.theirs[1:] == d.ours[1:])
        return bool(d.theirs - d.ours == difference)

    return test


def gains_pages(d: Difference) -> bool:
    """Pages that the workload's drafts need on top of those that its tokens do."""
    theirs, ours = (item[0] - 1 if isinstance(item, list) else item for item in (d.theirs, d.ours))
    batch, slots = d.inputs["max_batch_size"], slack(d.calls[0])
    return bool(slots and theirs == batch * pages(d) < ours <= batch * pages(d, slots))


def holds_one_sequence(d: Difference) -> bool:
    """MAX's pool holds a sequence of full length, as long as the null page is not taken from it."""
    return bool(d.record["outputs"]["total_pages"] >= pages(d))


def is_cut_short(d: Difference) -> bool:
    """Less memory may be taken at once than there is."""
    free = [size for size in d.inputs["free_memory"] if size is not None]
    return bool(len(free) * d.inputs["max_single_alloc_size"] < sum(free) * d.inputs["device_memory_utilization"])


def names_connector(d: Difference) -> bool:
    return any("kv_connector" in item for item in d.inputs["objects"])


POOL = r"total_pages|(?:values|scales)\.\d+\.shape"

ENGINE_RULES = (
    # Configs as values
    Rule("12", "a config is frozen", old(refused(".+", operation("set")))),
    Rule("12", "a frozen config can be hashed", old(accepted(".*", operation("hash")))),
    Rule("connector-names", "null and not set are two values of kv_connector", new(value(
        "result", lambda d: operation("eq")(d) and names_connector(d)))),
    Rule("26.7-only-field", "fields that only 26.7 has", new(value(
        "keys", lambda d: operation("repr")(d) and {*d.theirs} - {*d.ours} <= {*NEW_FIELDS}))),
    Rule("8", "unknown settings are refused", unknown(r"kv_connector_config\.\w+", when("config_ops"))),
    # Metrics
    Rule("engine-rule", "tiers count for themselves", value(
        rf"(?:{TIERS})_\w+", when("kv_metrics", lambda d: d.ours == MISSING))),
    # Inputs of a step
    Rule("5", "scales that are asked for are an input", value(
        r"per_device\.\d+\.kv_scales", lambda d: gains_scales(d) and d.theirs is None)),
    Rule("17", "MLA has one latent on every device", value(
        r"per_device\.\d+\.kv_(?:blocks|scales)\.shape", one_latent_shape)),
    Rule("26.7-only-field", "layouts that only 26.7 has", new(value(
        rf"per_device\.\d+\.(?:{NEW_INPUTS})(?:\.\w+)?", lambda d: d.ours == MISSING))),
    Rule("26.7-only-field", "scales lie in the pages of their elements", new(value(
        r"per_device\.\d+\.kv_scales\.shape",
        lambda d: d.theirs[0] == "total_num_scale_pages" and d.theirs[1:] == d.ours[1:]))),
    # Loading
    Rule("class-name", "what a manager and its tier are called", value(
        "class|connector", when("load_manager", lambda d: d.ours == MISSING))),
    Rule("engine-rule", "multiples of 128 are a kernel's wish", accepted(
        "Page size must be a multiple of 128", when("load_manager"))),
    Rule("engine-rule", "no tier behind a cache on the CPU", accepted(
        "KVCacheMemory is on the CPU|No module named 'dkv'|The '\\w+' KV connector is incompatible",
        when("load_manager"))),
    Rule("connector-names", "26.7 has no local", new(accepted(
        r"enum kv_connector_config\.type", when("load_manager")))),
    Rule("22", "the null page is part of the budget", old(value(POOL, when("load_manager", by(1))))),
    Rule("22", "the null page is part of the budget", old(refused(
        "capacity", when("load_manager", holds_one_sequence)))),
    Rule("21", "room for drafts is part of the pool", old(value(POOL, when("load_manager", gains_pages)))),
    Rule("26.7-only-field", "a pool holds a sequence of full length; 26.4 only warns", old(refused(
        "capacity", when("load_manager", lambda d: not holds_one_sequence(d))))),
    Rule("5", "scales that are asked for have a buffer", value(
        "scales", when("load_manager", lambda d: gains_scales(d) and d.theirs is None))),
    Rule("17", "MLA has one latent on every device", value(
        r"(?:values|scales)\.\d+\.shape", when("load_manager", one_latent_shape))),
    # Planning
    Rule("engine-rule", "memory that cannot be read must be told", refused(
        r"devices\.memory_gib", when("memory_footprint"))),
    Rule("engine-rule", "how much a driver gives at once", accepted(
        "Insufficient cache memory to allocate", when("memory_footprint", is_cut_short))),
    Rule("engine-rule", "how much a driver gives at once", value(
        "available_cache_memory|max_supported_sequence_length", when("memory_footprint", is_cut_short))),
    Rule("17", "MLA has one latent on every device, and room for more", old(refused(
        "capacity", when("memory_footprint", is_dp_mla)))),
)  # fmt: skip
