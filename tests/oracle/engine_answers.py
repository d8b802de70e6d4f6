"""kvcfg's answers about what stands around parameters: plans, loading, inputs of a step, metrics, configs as values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import answers
from answers import Answer, fields, make_params, working_directory, workload

from kvcfg.cache.metrics import LedgerMetrics
from kvcfg.config.cache import KVCacheConfig
from kvcfg.errors import ConfigError, Problem
from kvcfg.planning.memory import DeviceBudget
from kvcfg.sizing import (
    compute_max_seq_len_fitting_in_cache,
    compute_num_device_blocks,
    compute_num_host_blocks,
    estimated_memory_size,
    max_lengths,
)
from kvcfg.symbolic import InputSpec, symbolic_inputs

REFERENCE_BATCH_SIZE = 512
"""Sequences that MAX plans for where nobody says; one on a single CPU."""


def answer(record: Mapping[str, Any]) -> Answer | None:
    """What kvcfg says to the record's question; None if it cannot be asked yet."""
    ask = ASK.get(record["kind"])
    asked_for = {**(record.get("outputs") or {}), **record.get("output_errors", {})}
    return None if ask is None else answers.encode(ask(answers.decode(record["inputs"]), asked_for))


def ask_load_manager(inputs: Answer, outputs: Answer) -> Answer:
    params = make_params(inputs)
    memory, batch, length = workload(inputs)
    blocks = compute_num_device_blocks(
        params, memory, batch, length, include_null_block=True, require_max_seq_len_fits=True
    )
    is_bounded = batch is not None and length is not None
    pages = blocks - 1 if is_bounded else blocks
    (replica, *_) = answers.ask_allocate_buffers({**inputs, "total_num_pages": pages + 1}, {})["replicas"]
    return {
        "total_pages": pages,
        "host_pages": compute_num_host_blocks(params),
        "values": replica["values"],
        "scales": replica["scales"],
    }


def ask_memory_footprint(inputs: Answer, outputs: Answer) -> Answer:
    """All devices together as one, for that is how MAX adds them up."""
    share = inputs["device_memory_utilization"]
    config = KVCacheConfig(**{**inputs["config"], "device_memory_utilization": share})
    if None in inputs["free_memory"]:
        raise ConfigError(Problem("devices.memory_gib", "must be told where it cannot be read", None))
    params, free = make_params(inputs), sum(inputs["free_memory"])
    budget = DeviceBudget(
        memory=free,
        usable=int(free * config.device_memory_utilization),
        weights=inputs["weights"],
        reserved=inputs["activations"] + inputs["signal_buffers"],
        explicit=None,
    )
    batch, length = inputs["max_batch_size"], inputs["max_length"] or inputs["model_max_seq_len"]
    if batch is None:
        batch = 1 if inputs.get("host") else REFERENCE_BATCH_SIZE
    batch = min(batch, inputs["max_batch_input_tokens"])
    committed = estimated_memory_size(params, budget.available, batch, length)
    return {
        "available_cache_memory": committed,
        "max_batch_size": batch,
        "max_length": length,
        "max_supported_sequence_length": compute_max_seq_len_fitting_in_cache(params, committed),
    }


def ask_symbolic_inputs(inputs: Answer, outputs: Answer) -> Answer:
    def described(spec: InputSpec | None) -> Answer | None:
        if spec is None:
            return None
        kind = "BufferType" if spec.is_written else "TensorType"
        return {"device": spec.device, "dtype": spec.dtype, "kind": kind, "shape": spec.shape}

    devices = symbolic_inputs(make_params(inputs))
    return {"per_device": [{name: described(spec) for name, spec in item._asdict().items()} for item in devices]}


def ask_max_lengths(inputs: Answer, outputs: Answer) -> Answer:
    rows = max_lengths(inputs["max_seq_length"], inputs["max_cache_length"], inputs["num_steps"])
    first = {name: [rows[0][column]] for column, name in enumerate(("max_prompt_length", "max_cache_length")) if rows}
    return {"max_lengths": rows, **first}


def ask_kv_metrics(inputs: Answer, outputs: Answer) -> Answer:
    nothing = {name: 0 for name in LedgerMetrics.__slots__} | {"page_lifetimes": {}}
    snapshots = [
        LedgerMetrics(**{**nothing, **{name: value for name, value in item.items() if name in nothing}})
        for item in inputs["metrics"]
    ]
    return answers.properties(sum(snapshots, LedgerMetrics(**nothing)), list(outputs))


def ask_config_ops(inputs: Answer, outputs: Answer) -> Answer | None:
    with working_directory(inputs.get("files", {})):
        objects = [KVCacheConfig(**kwargs) for kwargs in inputs["objects"]]
    operation = OPERATIONS.get(inputs["op"])
    return None if operation is None else operation(objects, inputs, outputs)


def assigned(objects: list[KVCacheConfig], inputs: Answer, outputs: Answer) -> Answer:
    try:
        setattr(objects[0], inputs["name"], inputs["value"])
    except AttributeError as error:
        raise ConfigError(Problem(inputs["name"], str(error), inputs["value"])) from error
    return {"value": getattr(objects[0], inputs["name"])}


def copied(objects: list[KVCacheConfig], inputs: Answer, outputs: Answer) -> Answer:
    copy = objects[0].model_copy(update=inputs["update"])
    return {name: getattr(copy, name) for name in inputs["update"]}


def written(objects: list[KVCacheConfig], inputs: Answer, outputs: Answer) -> Answer:
    shown = {name for name, _ in objects[0].__repr_args__()}
    return {"keys": [name for name in outputs.get("keys", sorted(map(str, shown))) if name in shown]}


def read_back(objects: list[KVCacheConfig], inputs: Answer, outputs: Answer) -> Answer:
    again = KVCacheConfig.model_validate(objects[0].model_dump())
    return {"equal": again == objects[0], "fields": fields(again)}


def hashed(objects: list[KVCacheConfig], inputs: Answer, outputs: Answer) -> Answer:
    are_equal = len({hash(item) for item in objects}) == 1
    return {"hashable": True, "equal": are_equal, "result": are_equal}


OPERATIONS: dict[str, Callable[[list[KVCacheConfig], Answer, Answer], Answer]] = {
    "eq": lambda objects, inputs, outputs: {"result": objects[0] == objects[1]},
    "hash": hashed,
    "set": assigned,
    "copy_update": copied,
    "repr": written,
    "roundtrip": read_back,
}

ASK: dict[str, Callable[[Answer, Answer], Answer | None]] = {
    **answers.ASK,
    "load_manager": ask_load_manager,
    "memory_footprint": ask_memory_footprint,
    "symbolic_inputs": ask_symbolic_inputs,
    "max_lengths": ask_max_lengths,
    "kv_metrics": ask_kv_metrics,
    "config_ops": ask_config_ops,
}
