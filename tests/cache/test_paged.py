"""The paged cache as a whole: batches grow, are read as stored, and take the bytes that were planned."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcfg.cache.paged import PagedKVCache
from kvcfg.dtypes import DeviceRef, DType
from kvcfg.errors import CapacityError, ShapeError
from kvcfg.formats import FORMATS, Recipe
from kvcfg.params import KVCacheParams, MultiKVCacheParams

INT8 = Recipe(FORMATS["int8"], FORMATS["int8"], "token_head", "dynamic", DType.float32)
FLOAT32 = Recipe(FORMATS["float32"], FORMATS["float32"], "none", "unit", DType.float32)


def group_of(recipe: Recipe = INT8, **changes: object) -> KVCacheParams:
    base: dict[str, object] = {
        "dtype": recipe.key_format.dtype,
        "n_kv_heads": 2,
        "head_dim": 8,
        "num_layers": 2,
        "devices": [DeviceRef.CPU()],
        "page_size": 4,
        "recipe": recipe,
    }
    return KVCacheParams(**{**base, **changes})  # type: ignore[arg-type]


def cache_of(
    *groups: KVCacheParams, num_pages: int = 24, max_batch_size: int = 3, max_seq_len: int = 32
) -> PagedKVCache:
    layers = [(rank, place) for rank, group in enumerate(groups) for place in range(group.num_layers)]
    return PagedKVCache(
        MultiKVCacheParams.from_params(*groups),
        num_pages=num_pages,
        max_batch_size=max_batch_size,
        max_seq_len=max_seq_len,
        layers=layers,
        devices=[torch.device("cpu")] * groups[0].tensor_parallel_degree,
    )


def states(batch_size: int, num_tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch_size, 2, num_tokens, 8)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def feed(cache: PagedKVCache, keys: torch.Tensor, values: torch.Tensor, chunks: list[int]) -> list[torch.Tensor]:
    """What the last chunk's queries read of every layer, keys and values joined."""
    start = 0
    for size in chunks:
        span = slice(start, start + size)
        read = [cache.append(layer, keys[:, :, span], values[:, :, span]) for layer in range(len(cache.layers))]
        start += size
    return [torch.cat(list(pair), dim=-1) for pair in read]


def test_float32_pages_give_back_what_was_appended() -> None:
    keys, values = states(3, 10)
    for read in feed(cache_of(group_of(FLOAT32)), keys, values, [7, 1, 2]):
        assert torch.equal(read, torch.cat([keys, values], dim=-1))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
@settings(deadline=None, max_examples=30)
def test_what_is_read_does_not_depend_on_how_it_was_fed(chunks: list[int]) -> None:
    total = sum(chunks)
    if total > 32:
        return
    keys, values = states(2, total)
    at_once = feed(cache_of(group_of()), keys, values, [total])
    for piece, whole in zip(feed(cache_of(group_of()), keys, values, chunks), at_once, strict=True):
        assert torch.equal(piece, whole)


@pytest.mark.parametrize("window", [1, 3, 4, 6, 11])
@pytest.mark.parametrize("chunks", [[20], [1] * 20, [5, 1, 9, 5], [13, 7]])
def test_windowed_layers_read_the_window_before_the_new_tokens(window: int, chunks: list[int]) -> None:
    keys, values = states(2, 20)
    cache = cache_of(group_of(FLOAT32, kind="sliding_window", window=window), group_of(FLOAT32))
    sliding, _, full, _ = feed(cache, keys, values, chunks)
    everything = torch.cat([keys, values], dim=-1)
    start = max(0, 20 - chunks[-1] - (window - 1))
    assert torch.equal(sliding, everything[:, :, start:])
    assert torch.equal(full, everything)


@pytest.mark.parametrize("num_pages", [0, 7])
@pytest.mark.parametrize("max_batch_size", [1, 5])
@pytest.mark.parametrize("num_devices", [1, 2])
@pytest.mark.parametrize("recipe", [INT8, FLOAT32], ids=["int8", "float32"])
def test_allocation_equals_the_formula_to_the_byte(
    recipe: Recipe, num_devices: int, max_batch_size: int, num_pages: int
) -> None:
    devices = [DeviceRef.CPU(index) for index in range(num_devices)]
    groups = [
        group_of(recipe, devices=devices, num_layers=3),
        group_of(recipe, devices=devices, kind="sliding_window", window=9),
    ]
    if not num_pages:
        groups = groups[1:]
    cache = cache_of(*groups, num_pages=num_pages, max_batch_size=max_batch_size, max_seq_len=50)
    assert cache.nbytes == cache.params.memory(num_pages, max_batch_size, 50).total


def test_bytes_per_token_are_measured_on_growing_groups_alone() -> None:
    full, sliding = group_of(), group_of(kind="sliding_window", window=8)
    assert cache_of(full, sliding).bytes_per_token == full.bytes_per_token


def test_too_few_pages_leave_everything_as_it_was() -> None:
    cache = cache_of(group_of(FLOAT32), num_pages=5)
    keys, values = states(2, 9)
    before = feed(cache, keys[:, :, :8], values[:, :, :8], [8])
    with pytest.raises(CapacityError):
        cache.append(0, keys[:, :, 8:], values[:, :, 8:])
    cache.truncate(7)
    after = [cache.append(layer, keys[:, :, 7:8], values[:, :, 7:8]) for layer in range(2)]
    assert torch.equal(torch.cat(list(after[0]), dim=-1), before[0])


def test_too_many_sequences_name_the_override_that_helps() -> None:
    with pytest.raises(CapacityError, match=r"Try: workload\.max_batch_size=4"):
        cache_of(group_of()).append(0, *states(4, 1))


def test_too_long_a_sequence_names_the_override_that_helps() -> None:
    with pytest.raises(CapacityError, match=r"Try: workload\.max_seq_len=33"):
        cache_of(group_of(), num_pages=99).append(0, *states(1, 33))


def test_another_batch_size_is_refused_until_release() -> None:
    cache = cache_of(group_of())
    cache.append(0, *states(2, 1))
    with pytest.raises(ShapeError, match="begun with 2 sequences and got 1"):
        cache.append(1, *states(1, 1))
    cache.release()
    assert cache.append(0, *states(1, 1)).keys.shape == (1, 2, 1, 8)


def test_truncated_tokens_are_replaced_by_what_follows() -> None:
    cache = cache_of(group_of(FLOAT32))
    keys, values = states(2, 12)
    feed(cache, keys[:, :, :9], values[:, :, :9], [9])
    cache.truncate(5)
    read = feed(cache, keys[:, :, 9:], values[:, :, 9:], [3])
    kept = [0, 1, 2, 3, 4, 9, 10, 11]
    assert torch.equal(read[0], torch.cat([keys, values], dim=-1)[:, :, kept])


@pytest.mark.parametrize("length", [-1, 4])
def test_truncating_to_what_is_not_there_is_refused(length: int) -> None:
    cache = cache_of(group_of())
    feed(cache, *states(1, 3), [3])
    with pytest.raises(ValueError, match=f"cannot keep {length} of 3"):
        cache.truncate(length)


def test_released_pages_can_be_used_again() -> None:
    cache = cache_of(group_of(FLOAT32), num_pages=6, max_batch_size=2)
    for seed in range(4):
        keys, values = states(2, 12, seed)
        assert torch.equal(feed(cache, keys, values, [12])[1], torch.cat([keys, values], dim=-1))
        cache.release()


def test_linear_layers_are_refused() -> None:
    with pytest.raises(ShapeError, match="linear"):
        cache_of(group_of(kind="linear", state_bytes=64))
