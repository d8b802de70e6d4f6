"""Shapes, types and devices of what attention is given, before any tensor exists."""

from __future__ import annotations

from typing import Any

import pytest

from kvcfg.dtypes import DeviceRef, DType
from kvcfg.errors import ConfigError
from kvcfg.group_params import KVCacheParams, KVCacheQuantizationConfig
from kvcfg.symbolic import DeviceInputs, symbolic_inputs


def inputs(**changes: Any) -> tuple[DeviceInputs, ...]:
    given: dict[str, Any] = {
        "dtype": DType.bfloat16, "n_kv_heads": 4, "head_dim": 64, "num_layers": 3, "page_size": 16,
        "devices": [DeviceRef.GPU(index) for index in range(4)], "data_parallel_degree": 2,
    }  # fmt: skip
    return symbolic_inputs(KVCacheParams(**(given | changes)))


def test_every_device_gets_the_batch_of_its_replica() -> None:
    names = [item.cache_lengths.shape for item in inputs()]
    assert names == [("replica_0_batch_size",)] * 2 + [("replica_1_batch_size",)] * 2
    assert [item.kv_blocks.device for item in inputs()] == [DeviceRef.GPU(index) for index in range(4)]


def test_pages_are_split_by_heads_and_written() -> None:
    pages = inputs()[0].kv_blocks
    assert (pages.dtype, pages.shape) == (DType.bfloat16, ("total_num_pages", 2, 3, 16, 2, 64))
    assert pages.is_written


def test_scales_are_there_where_elements_are_scaled() -> None:
    scales = inputs(dtype=DType.int8, kvcache_quant_config=KVCacheQuantizationConfig(DType.float16, 32))[0].kv_scales
    assert scales is not None
    assert (scales.dtype, scales.shape) == (DType.float16, ("total_num_pages", 2, 3, 16, 2, 2))
    assert inputs()[0].kv_scales is None


def test_heads_are_dispatched_from_the_host_and_latents_on_the_device() -> None:
    heads, latent = inputs()[1], inputs(is_mla=True, n_kv_heads=1, num_q_heads=8)[1]
    assert (heads.attention_dispatch_metadata.device, heads.mla_num_partitions) == (DeviceRef.CPU(), None)
    assert latent.attention_dispatch_metadata.device == DeviceRef.GPU(1)
    assert latent.mla_num_partitions is not None


def test_drafter_has_a_dispatch_of_its_own() -> None:
    assert inputs()[0].draft_attention_dispatch_metadata is None
    drafting = inputs(speculative_method="eagle", num_draft_tokens=2)[0]
    assert drafting.draft_attention_dispatch_metadata == drafting.attention_dispatch_metadata


def test_keys_and_values_of_two_widths_have_no_one_shape() -> None:
    with pytest.raises(ConfigError, match="value_head_dim"):
        inputs(value_head_dim=32)
