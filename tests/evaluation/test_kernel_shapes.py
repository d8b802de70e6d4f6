"""Layers that kernels cannot tell apart are one shape."""

from __future__ import annotations

import kvcfg
from kvcfg.evaluation.kernel_shapes import KernelShape, kernel_shapes


def shapes(*overrides: str) -> list[KernelShape]:
    return kernel_shapes(kvcfg.compose(overrides))


def test_layers_of_one_kind_are_one_shape() -> None:
    (shape,) = shapes("model=llama-3.1-8b", "devices=cpu", "cache.kv_cache_format=int8")
    assert str(shape) == "32/8/128" and shape.params.storage.format_name == "int8" and shape.params.num_layers == 1


def test_windowed_layers_are_a_shape_of_their_own_that_grows() -> None:
    found = shapes("model=gemma-3-1b", "devices=cpu")
    assert sorted(map(str, found)) == ["4/1/256", "4/1/256 window 512"]
    assert all(shape.params.grows for shape in found)


def test_layers_of_two_formats_are_two_shapes() -> None:
    found = shapes("quantization=bits4", "quantization.layers=[{layers:[0,1],format:int8}]")
    assert {shape.params.storage.format_name for shape in found} == {"int8", "gauss4"}


def test_heads_are_those_of_one_device() -> None:
    (shape,) = shapes("model=llama-3.1-8b", "devices=h100x8")
    assert str(shape) == "4/1/128"


def test_latent_is_read_as_value_by_its_rank() -> None:
    (shape,) = shapes("model=deepseek-v3", "devices=cpu")
    assert (str(shape), shape.value_dim) == ("128/1/576", 512)


def test_drafter_and_layers_without_pages_are_left_out() -> None:
    found = shapes("model=qwen3-next-80b-a3b", "devices=cpu", "speculative=mtp")
    assert len(found) == 1
