"""kvcfg's answers about configs and parameters to recorded questions, in the records' own words.

An answer is a nested dict with the keys of the record's `outputs` that kvcfg has; `RAISED` stands for a
property that raises. A refused question raises one of `REFUSALS`. Two stand-in CPUs of a record are
numbered, because kvcfg refuses the same device twice.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from math import isfinite
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from kvcfg.config.cache import KVCacheConfig, KVConnectorConfig, KVConnectorType
from kvcfg.config.speculative import SpeculativeConfig
from kvcfg.dtypes import DeviceRef, DType
from kvcfg.errors import CapacityError, ConfigError, Problem
from kvcfg.group_params import split_into_groups
from kvcfg.params import KVCacheParams, KVCacheQuantizationConfig, MultiKVCacheParams
from kvcfg.sizing import (
    RequestSlots,
    compute_max_seq_len_fitting_in_cache,
    compute_num_device_blocks,
    compute_num_host_blocks,
    estimated_memory_size,
)

Answer = dict[str, Any]

REFUSALS = (ConfigError, CapacityError, ValidationError)
RAISED = "raised"
TO_PARAMS = set(KVCacheConfig.to_params.__annotations__) | {"allow_kv_head_replication"}


def decode(value: Any) -> Any:
    """Python values from the tags of a record."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    tag, inner = next(iter(value.items()), ("", None))
    if tag in TAGS and len(value) == 1:
        return TAGS[tag](inner)
    return {key: decode(item) for key, item in value.items()}


TAGS: dict[str, Callable[[Any], Any]] = {
    "$float": float,
    "$bytes": bytes.fromhex,
    "$path": Path,
    "$tuple": lambda items: tuple(decode(items)),
    "$connector_type": KVConnectorType,
    "$connector_config": lambda kwargs: KVConnectorConfig(**decode(kwargs)),
}


def encode(value: Any) -> Any:
    """The JSON form that a record gives a value."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, BaseModel):
        return encode({**fields(value), "__extra__": value.model_extra or {}})
    if isinstance(value, DeviceRef):
        return same_cpus(str(value))
    if isinstance(value, bytes):
        return {"$bytes": value.hex()}
    if isinstance(value, float) and not isfinite(value):
        return {"$float": str(value)}
    if isinstance(value, dict):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    return value


def same_cpus(value: Any) -> Any:
    """The same JSON value with every CPU called `cpu`."""
    if isinstance(value, dict):
        return {key: same_cpus(item) for key, item in value.items()}
    if isinstance(value, list):
        return [same_cpus(item) for item in value]
    return "cpu" if isinstance(value, str) and value.startswith("cpu:") else value


def fields(model: BaseModel) -> Answer:
    """The fields of a model, sub-models as they are."""
    return {name: getattr(model, name) for name in type(model).model_fields}


def make_params(inputs: Mapping[str, Any]) -> KVCacheParams:
    """`KVCacheConfig(**config).to_params(**call)`; what only the newest release takes is set afterwards."""
    call = dict(inputs["call"])
    config = KVCacheConfig(**inputs["config"])
    if unknown := [key for key in call if key not in TO_PARAMS]:
        raise ConfigError([Problem(key, "is no argument of to_params", call[key]) for key in unknown])
    call["dtype"] = DType[call["dtype"]]
    call["devices"] = devices(call["devices"])
    if isinstance(quantization := call.get("kvcache_quant_config"), dict):
        scale_dtype = DType[quantization.get("scale_dtype", "float32")]
        call["kvcache_quant_config"] = KVCacheQuantizationConfig(**{**quantization, "scale_dtype": scale_dtype})
    if call.pop("allow_kv_head_replication", False):
        one_head_each = config.to_params(**{**call, "n_kv_heads": len(call["devices"])})
        return replace(one_head_each, n_kv_heads=call["n_kv_heads"], allow_kv_head_replication=True)
    return config.to_params(**call)


def devices(names: Sequence[str]) -> list[DeviceRef]:
    """Devices by name, stand-in CPUs numbered."""
    found = [DeviceRef.parse(name) for name in names]
    return [DeviceRef.CPU(index) for index in range(len(found))] if {*names} == {"cpu"} else found


def properties(params: Any, names: Sequence[str]) -> Answer:
    """Those of the named attributes that the object has, and which of them raise."""
    found: Answer = {}
    for name in names:
        if hasattr(type(params), name):
            try:
                found[name] = getattr(params, name)
            except REFUSALS:
                found[name] = RAISED
    return found


def ask_to_params(inputs: Answer, outputs: Answer) -> Answer:
    params = make_params(inputs)
    found = properties(params, list(outputs)) | {"class": type(params).__name__}
    try:
        found["num_host_blocks"] = compute_num_host_blocks(params)
    except CapacityError:
        found["num_host_blocks"] = RAISED
    found["copy_as_dp_1"] = {}
    for replica, theirs in outputs.get("copy_as_dp_1", {}).items():
        copy = params.copy_as_dp_1(int(replica))
        settings = copy.kv_connector_config
        folder = None if settings is None else settings.disk_offload_dir
        found["copy_as_dp_1"][replica] = {**properties(copy, theirs), "disk_offload_dir": folder}
    return found


def ask_num_blocks(inputs: Answer, outputs: Answer) -> Answer:
    params = make_params(inputs)
    blocks = compute_num_device_blocks(params, *workload(inputs), **inputs.get("flags", {}))
    return {"num_blocks": blocks, "bytes_per_block": params.bytes_per_block}


def ask_memory_size(inputs: Answer, outputs: Answer) -> Answer:
    params = make_params(inputs)
    return {"bytes": estimated_memory_size(params, *workload(inputs)), "bytes_per_block": params.bytes_per_block}


def workload(inputs: Answer) -> tuple[int, int | None, int | None]:
    """The arguments that the sizing functions share."""
    return inputs["available_cache_memory"], inputs.get("max_batch_size"), inputs.get("max_seq_len")


def ask_max_seq_len(inputs: Answer, outputs: Answer) -> Answer:
    params = make_params(inputs)
    flags = inputs.get("flags", {})
    longest = compute_max_seq_len_fitting_in_cache(params, inputs["available_cache_memory"], **flags)
    return {"max_seq_len": longest, "bytes_per_block": params.bytes_per_block}


def ask_multi_params(inputs: Answer, outputs: Answer) -> Answer:
    params = MultiKVCacheParams.from_params(*(make_params(item) for item in inputs["params"]))
    found = properties(params, list(outputs))
    found["bytes_per_block_each"] = [item.bytes_per_block for item in params.params]
    if "available_cache_memory" in inputs:
        found["num_blocks"] = compute_num_device_blocks(params, *workload(inputs))
    return found


def ask_seq_len(inputs: Answer, outputs: Answer) -> Answer:
    drafts, per_step = inputs["num_draft_tokens"], inputs["num_draft_tokens_per_step"]
    request = RequestSlots(
        processed=inputs["processed"],
        active=inputs["num_tokens"] - inputs["processed"],
        num_draft_tokens=drafts,
        is_block_draft=per_step == drafts > 1,
        to_verify=inputs["to_verify"],
        maybe_accepted=inputs["maybe_accepted"],
        num_steps=inputs["num_steps"],
    )
    return {
        "seq_len": request.slots,
        "prompt_tokens": request.query_width,
        "cache_valid_length": request.valid_length,
    }


def ask_model(model: type[BaseModel]) -> Callable[[Answer, Answer], Answer]:
    """A question that builds a config model and reads it back."""

    def ask(inputs: Answer, outputs: Answer) -> Answer:
        with working_directory(inputs.get("files", {})):
            built = build(model, inputs)
        found = {
            "fields": fields(built),
            "fields_set": sorted(built.model_fields_set),
            "dump_json": built.model_dump(mode="json"),
            "extra": built.model_extra or {},
        }
        return found | ({"cache_dtype": built.cache_dtype} if isinstance(built, KVCacheConfig) else {})

    return ask


def build(model: type[BaseModel], inputs: Answer) -> BaseModel:
    """The model, in the way the record says."""
    how, kwargs = inputs.get("how", "init"), inputs["kwargs"]
    if how == "model_validate_json":
        return model.model_validate_json(inputs["text"] if "text" in inputs else json.dumps(kwargs))
    if how == "init":
        return model(**kwargs)
    return model.model_validate(kwargs, strict=how == "model_validate_strict" or None)


@contextmanager
def working_directory(files: Mapping[str, str]) -> Iterator[None]:
    """An empty folder that holds these files, and work there."""
    home = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(home)


def ask_cache_dtype(inputs: Answer, outputs: Answer) -> Answer:
    config = KVCacheConfig(kv_cache_format=inputs["kv_cache_format"])
    return {
        "cache_dtype": config.cache_dtype_for(inputs["quantization_encoding"]),
        "cache_dtype_before": config.cache_dtype,
    }


def ask_dtype(inputs: Answer, outputs: Answer) -> Answer:
    dtype = DType[inputs["dtype"]]
    return {
        "size_in_bits": dtype.size_in_bits,
        "size_in_bytes": dtype.size_in_bytes,
        "is_float": dtype.is_float(),
        "is_float8": dtype.is_float8(),
        "is_half": dtype.is_half(),
        "is_integral": dtype.is_integral(),
    }


def ask_split_into_groups(inputs: Answer, outputs: Answer) -> Answer:
    return {"groups": split_into_groups(range(inputs["n"]), inputs["groups"])}


def ask_allocate_buffers(inputs: Answer, outputs: Answer) -> Answer:
    params, pages = make_params(inputs), inputs["total_num_pages"]
    values = [pages, *params.shape_per_block]
    scales = [pages, *params.shape_per_scale_block] if params.quantized_kv_cache else None
    element, scale = params.dtype, params.storage.scale_dtype
    shards = params.tensor_parallel_degree

    def buffers(shape: list[int] | None, dtype: DType) -> list[Answer] | None:
        return None if shape is None else [{"dtype": dtype, "host": True, "shape": shape} for _ in range(shards)]

    def units(shape: list[int] | None, dtype: DType) -> list[Answer]:
        if shape is None or not pages:
            return []
        size = dtype.size_in_bytes
        for length in shape[1:]:
            size *= length
        copies = shards if params.replicates_kv_across_tp else 1
        return [{"peers": copies - 1, "shape": [pages, size]} for _ in range(shards // copies)]

    replica = {
        "values": buffers(values, element),
        "scales": buffers(scales, scale),
        "memory_units": units(values, element) + units(scales, scale),
        "replicates_kv_across_tp": params.replicates_kv_across_tp,
    }
    return {"bytes_per_block": params.bytes_per_block, "replicas": [replica] * params.data_parallel_degree}


ASK: dict[str, Callable[[Answer, Answer], Answer]] = {
    "to_params": ask_to_params,
    "num_device_blocks": ask_num_blocks,
    "estimated_memory_size": ask_memory_size,
    "max_seq_len_fitting": ask_max_seq_len,
    "multi_params": ask_multi_params,
    "seq_len": ask_seq_len,
    "kv_cache_config": ask_model(KVCacheConfig),
    "kv_connector_config": ask_model(KVConnectorConfig),
    "speculative_config": ask_model(SpeculativeConfig),
    "cache_dtype": ask_cache_dtype,
    "dtype": ask_dtype,
    "split_into_groups": ask_split_into_groups,
    "allocate_buffers": ask_allocate_buffers,
}
