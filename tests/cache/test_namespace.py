"""A page is never read as something it is not: whatever decides its content is part of its name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import kvcfg
from kvcfg.cache.building import build_manager
from kvcfg.cache.namespace import namespace

BASE = ["model=tiny", "devices=cpu", "workload.max_batch_size=2", "workload.max_seq_len=64"]


def of(*overrides: str, **named: str) -> bytes:
    return namespace(kvcfg.compose([*BASE, *overrides]), **named)


def test_equal_experiments_have_equal_namespaces() -> None:
    assert of() == of()


@pytest.mark.parametrize(
    "override",
    [
        "model.name=other",
        "model.dtype=float16",
        "cache.kv_cache_format=int8",
        "cache.kv_cache_page_size=64",
        "devices.count=2",
        "speculative=eagle",
    ],
)
def test_what_changes_a_page_changes_its_name(override: str) -> None:
    assert of(override) != of()


def test_recipes_of_one_format_are_kept_apart() -> None:
    int8 = "cache.kv_cache_format=int8"
    block = ("quantization.granularity=block", "quantization.quantization_granularity=8")
    assert len({of(int8), of(int8, *block), of(int8, "quantization.scale_dtype=bfloat16")}) == 3


def test_balanced_and_other_keys_are_kept_apart() -> None:
    int8, key = "cache.kv_cache_format=int8", "quantization.balance_rope"
    assert of(int8) == of(int8, f"{key}=true") != of(int8, f"{key}=false")


def test_adapters_and_calibrations_are_kept_apart() -> None:
    assert len({of(), of(adapter="lora-a"), of(adapter="lora-b"), of(calibration="lora-a")}) == 4


@pytest.mark.parametrize(
    "override", ["cache.eviction=lfu", "workload.max_batch_size=1", "cache.device_memory_utilization=0.5"]
)
def test_what_does_not_change_a_page_does_not_change_its_name(override: str) -> None:
    assert of(override) == of()


def test_another_rope_scaling_is_another_model(tmp_path: Path) -> None:
    facts = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "head_dim": 16,
        "vocab_size": 256,
        "max_position_embeddings": 512,
        "torch_dtype": "bfloat16",
    }
    names = []
    for scaling in (None, {"rope_type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 4.0}):
        (tmp_path / "config.json").write_text(json.dumps({**facts, "rope_scaling": scaling}))
        experiment = kvcfg.compose(["model=hf", f"model.path={tmp_path}", *BASE[1:]])
        names.append(namespace(experiment))
    assert len(set(names)) == 3


def test_managers_of_other_formats_name_the_same_prompt_otherwise() -> None:
    names = []
    for element in ("bfloat16", "int8"):
        manager = build_manager(
            kvcfg.compose([*BASE, "cache.kv_cache_page_size=4", f"cache.kv_cache_format={element}"])
        )
        manager.claim("a", range(9))
        names.append(manager.replicas[0].ledger.page_names("a", 9))
    assert len(names[0]) == 2 and not set(names[0]) & set(names[1])
