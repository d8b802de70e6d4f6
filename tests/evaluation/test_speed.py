"""What a row says of the attention that read the cache."""

from __future__ import annotations

from typing import Any

import pytest

import kvcfg
from kvcfg.evaluation.speed import attention_of
from kvcfg.kernels.cpu.loader import load_kernel

transformers = pytest.importorskip("transformers")

needs_kernels = pytest.mark.skipif(load_kernel("pages") is None, reason="kernels cannot be compiled here")


@pytest.fixture(scope="module")
def model() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=64,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def attention(model: Any, implementation: str, *overrides: str) -> str:
    sized = ["workload.max_batch_size=1", "workload.max_seq_len=64", "cache.kv_cache_page_size=32"]
    experiment = kvcfg.compose(["model=tiny", "devices=cpu", *sized, *overrides])
    model.set_attn_implementation(implementation)
    return attention_of(model, kvcfg.build(experiment, model))


@needs_kernels
@pytest.mark.parametrize("asked", ["quantization=bits4", "cache.kv_cache_format=int8"])
def test_pages_that_kernels_read_are_read_by_them(model: Any, asked: str) -> None:
    assert attention(model, "kvcfg", asked) == "kernels"


@needs_kernels
def test_pages_that_kernels_do_not_read_are_gathered(model: Any) -> None:
    assert attention(model, "kvcfg", "quantization=bits3") == "gathered"


@needs_kernels
def test_layers_of_both_kinds_are_told(model: Any) -> None:
    layers = "quantization.layers=[{layers:[0],format:int8}]"
    found = attention(model, "kvcfg", "quantization=bits3", layers, "quantization.experimental=true")
    assert sorted(found.split("+")) == ["gathered", "kernels"]


def test_model_with_its_own_attention_reads_what_is_gathered(model: Any) -> None:
    assert attention(model, "sdpa", "cache.kv_cache_format=int8") == "gathered"


def test_without_a_compiler_everything_is_gathered(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcfg.evaluation.speed.load_kernel", lambda name: None)
    assert attention(model, "kvcfg", "cache.kv_cache_format=int8") == "gathered"
