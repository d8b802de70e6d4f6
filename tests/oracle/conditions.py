"""One place where kvcfg's answer is not MAX's, and the conditions under which that is as it should be."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kvcfg.dtypes import DType
from kvcfg.formats import SCALE_DTYPES

MISSING = "missing"
FP8 = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
HOST_TIERS = ("local", "tiered")
NEW_METHODS = ("dflash2", "dspark")
NEW_ENCODINGS = ("float16", "float6_e2m3fn")
NEW_SETTINGS = (
    "host_offload_max_gb", "host_staging_alloc", "host_staging_mlock", "num_disk_workers",
    "num_h2d_onload_lanes", "type", "use_disk_direct_io",
)  # fmt: skip
OLD_SETTINGS = ("host_kvcache_swap_space_gb", "disk_offload_direct_io")
ANY_SETTING = "|".join(OLD_SETTINGS + NEW_SETTINGS)
NEW_FIELDS = (
    "adaptive_speculative_min_batch_size", "adaptive_speculative_widths", "bytes_per_scale_block",
    "bytes_per_value_block", "draft_proposal", "enable_dp_cross_replica_prefix_copy", "indexer_kv_cache_format",
    "is_nvfp4_kv_cache", "kv_cache_scale_dtype", "kv_dim", "leaves", "logit_penalties",
    "num_speculative_tokens_mixed_batch", "num_speculative_tokens_per_batch_size", "row_bytes", "scale_row_bytes",
    "shape_per_layer_block", "slots_per_page", "state_pool_dtype", "storage_head_dim", "use_greedy_acceptance",
    "window_size",
)  # fmt: skip
SIZES = ("num_blocks", "bytes", "max_seq_len", "total_pages", "available_cache_memory", "max_supported_sequence_length")


@dataclass(frozen=True)
class Difference:
    """One place where the answers differ."""

    record: Mapping[str, Any]
    path: str
    theirs: Any
    ours: Any

    @property
    def kind(self) -> str:
        """The kind of question."""
        return str(self.record["kind"])

    @property
    def is_new(self) -> bool:
        """Whether the newest release answered."""
        return str(self.record["max"]).startswith("26.7")

    @property
    def inputs(self) -> Mapping[str, Any]:
        """The question."""
        found: Mapping[str, Any] = self.record["inputs"]
        return found

    @property
    def cases(self) -> list[Mapping[str, Any]]:
        """The caches of the question, each with `config` and `call`."""
        return list(self.inputs.get("params", [self.inputs]))

    @property
    def calls(self) -> list[Mapping[str, Any]]:
        """The arguments of `to_params` for each cache."""
        return [case.get("call", {}) for case in self.cases]

    @property
    def connectors(self) -> set[Any]:
        """The connectors that the question names, as MAX read them."""
        fields = (self.record.get("outputs") or {}).get("fields", {})
        read = {fields.get("kv_connector"), (fields.get("kv_connector_config") or {}).get("type")}
        configs = [case.get("config", {}) for case in self.cases] + self.inputs.get("objects", [])
        return read | {config.get("kv_connector") for config in configs}

    @property
    def says(self) -> str:
        """MAX's message, or the types and places of its pydantic errors."""
        error = self.record.get("error", {})
        listed = (f"{item['type']} {'.'.join(map(str, item['loc']))}" for item in error.get("errors", ()))
        return str(error.get("message") or "; ".join(listed))

    def __str__(self) -> str:
        where = f"{self.record['id']} {self.kind} {self.record['max']} {self.path}"
        return f"{where}: MAX {str(self.theirs)[:160]}, kvcfg {str(self.ours)[:160]}"


Test = Callable[[Difference], bool]


@dataclass(frozen=True)
class Rule:
    """A reason to differ: fault number or scope, what kvcfg does, and where it holds."""

    reason: str
    why: str
    holds: Test

    def explains(self, difference: Difference) -> bool:
        """Whether it holds; values that cannot even be looked at are not explained."""
        try:
            return self.holds(difference)
        except (TypeError, ValueError, LookupError, AttributeError):
            return False


def refused(key: str, test: Test = lambda d: True) -> Test:
    """Only kvcfg refuses the value of a key (a regular expression), which is in `ours`."""
    return lambda d: re.fullmatch(rf"refused\.(?:{key})", d.path) is not None and test(d)


def unknown(key: str, test: Test = lambda d: True) -> Test:
    """Only kvcfg refuses a key it does not have."""
    return lambda d: re.fullmatch(rf"unknown\.(?:{key})", d.path) is not None and test(d)


def accepted(says: str, test: Test = lambda d: True) -> Test:
    """Only MAX refuses, with this message (the start of it, as a regular expression)."""
    return lambda d: d.path == "accepted" and re.match(says, d.says) is not None and test(d)


def value(path: str, test: Test = lambda d: True) -> Test:
    """Both answer, but differently at a path (a regular expression)."""
    return lambda d: re.fullmatch(path, d.path) is not None and test(d)


def old(test: Test) -> Test:
    """Only 26.4 answers so."""
    return lambda d: not d.is_new and test(d)


def new(test: Test) -> Test:
    """Only 26.7 answers so."""
    return lambda d: d.is_new and test(d)


def below(least: float) -> Test:
    """The value that kvcfg refuses is a number below that."""
    return lambda d: d.ours is not None and not isinstance(d.ours, str) and d.ours < least


def _scales(call: Mapping[str, Any]) -> str | None:
    config = call.get("kvcache_quant_config")
    return None if config is None else str(config.get("scale_dtype", "float32"))


def gains_scales(d: Difference) -> bool:
    """Scales are stored for int8 and fp8 wherever scales are asked for; MAX does for fewer pairs, by release."""
    types = ("float8_e4m3fn", "float8_e4m3fnuz") + (("int8",) if d.is_new else ())
    scales = ("float32", "float8_e8m0fnu") + (("float16",) if d.is_new else ())
    return any(
        call.get("dtype") in (*FP8, "int8")
        and _scales(call) in SCALE_DTYPES
        and not (call["dtype"] in types and _scales(call) in scales)
        for call in d.calls
    )


def is_dp_mla(d: Difference) -> bool:
    return not d.is_new and any(
        call.get("is_mla") and call.get("data_parallel_degree", 1) > 1 and call["n_kv_heads"] > 1 for call in d.calls
    )


def fewer_or_larger(d: Difference) -> bool:
    """Bytes of a page: MAX's without the scales that it forgets and with the latents that it repeats."""
    call, gains, repeats = d.calls[0], gains_scales(d), is_dp_mla(d)
    heads = call["n_kv_heads"] if repeats else 1
    if not gains:
        return bool(repeats and d.ours * heads == d.theirs)
    scales = math.ceil(call["head_dim"] / call["kvcache_quant_config"].get("quantization_granularity", 128))
    stored = call["head_dim"] + scales * DType[_scales(call) or "float32"].size_in_bytes
    return bool(d.ours * heads * call["head_dim"] == d.theirs * stored)


def other_pages_fit(d: Difference) -> bool:
    """Pages of another size: fewer fit with scales, more with one latent."""
    if d.path in ("bytes", "available_cache_memory") or gains_scales(d) == is_dp_mla(d):
        return gains_scales(d) or is_dp_mla(d)
    return bool(d.ours < d.theirs if gains_scales(d) else d.ours > d.theirs > 0)


def fewer_bytes(d: Difference) -> bool:
    """An offload unit of one latent where MAX's has all of them."""
    (pages, size), heads = d.theirs, d.calls[0]["n_kv_heads"]
    return is_dp_mla(d) and d.ours == [pages, size // heads] and size % heads == 0


def one_latent_shape(d: Difference) -> bool:
    """The shape of a buffer or page with one head where MAX has them all."""
    *before, dim = d.theirs
    return is_dp_mla(d) and d.ours == [*before[:-1], 1, dim] and before[-1] == d.calls[0]["n_kv_heads"]


def slack(call: Mapping[str, Any]) -> int:
    """Slots beyond its length that a sequence needs while drafting."""
    drafts = call.get("num_draft_tokens", 0)
    return 3 * drafts + (call.get("speculative_method") == "dflash") + 1 if drafts else 0


def _needed(d: Difference, slots: int) -> int:
    """What the workload needs, in pages or bytes, with that many slots beyond each sequence."""
    if d.path == "bytes":
        block = d.record["outputs"]["bytes_per_block"] * d.calls[0].get("data_parallel_degree", 1)
        return int(_pages_needed(d, slots) * block)
    return _pages_needed(d, slots)


def _pages_needed(d: Difference, slots: int) -> int:
    page = d.cases[0]["config"].get("kv_cache_page_size", 128)
    pages = math.ceil((d.inputs["max_seq_len"] + slots) / page) * d.inputs["max_batch_size"]
    return int(pages + d.inputs.get("flags", {}).get("include_null_block", False))


def gains_slack(d: Difference) -> bool:
    """The pool has room for drafts: more pages for a batch, fewer tokens in a pool."""
    slots = slack(d.calls[0])
    if d.path == "max_seq_len":
        return bool(slots and (d.theirs - d.ours == slots or d.ours == 1))
    return bool(slots and d.theirs == _needed(d, 0) < d.ours <= _needed(d, slots))


def loses_one_slot(d: Difference) -> bool:
    """One slot less for a sequence: a token more in a pool, a page less for some batches."""
    if not any(call.get("num_draft_tokens") == 1 and call["speculative_method"] != "dflash" for call in d.calls):
        return False
    if d.path == "max_seq_len":
        return bool(d.ours - d.theirs == 1)
    if d.path == "spec_decode_cache_slack":
        return bool(d.theirs - d.ours == 1)
    slots = slack(d.calls[0])
    return bool(d.ours == _needed(d, slots) < d.theirs <= _needed(d, slots + 1))


def is_same_draft(d: Difference) -> bool:
    """The copy has the drafts that the whole has, and MAX's has none."""
    key = d.path.rpartition(".")[2]
    return d.theirs in (None, 0) and d.ours == d.calls[0].get(key) != d.theirs


def method_is(*names: str | None) -> Test:
    return lambda d: any(call.get("speculative_method") in names for call in d.calls)


def is_size(d: Difference) -> bool:
    number = float(d.ours)
    return math.isfinite(number) and number > 0


def is_nvfp4(d: Difference) -> bool:
    return any(call.get("dtype") == "uint8" and _scales(call) == "float8_e4m3fn" for call in d.calls)


def merges(d: Difference) -> bool:
    kwargs = d.inputs.get("kwargs", {})
    return "config_file" in kwargs and isinstance(kwargs.get("kv_connector_config"), dict)


def repeats_or_mixes(d: Difference) -> bool:
    names = d.calls[0]["devices"]
    return len(set(names)) < len(names) or len({name.split(":")[0] for name in names}) > 1


def text(name: Any) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)


def nobody_drafts(d: Difference) -> bool:
    if d.kind == "speculative_config":
        return d.inputs["kwargs"].get("speculative_method") is None
    return any(call.get("speculative_method") is None for call in d.calls)
