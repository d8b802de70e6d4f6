"""Sequences of a batch are forked, cut and copied with the bytes they had, and the ledger still adds up."""

from __future__ import annotations

import copy
from itertools import count

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcfg.cache.batches import copy_sequences, cut_back, fork_sequences
from kvcfg.cache.paged import PagedKVCache
from kvcfg.cache.replica import CacheReplica
from kvcfg.dtypes import DeviceRef, DType
from kvcfg.errors import CapacityError
from kvcfg.formats import FORMATS, Recipe
from kvcfg.params import KVCacheParams, MultiKVCacheParams

FLOAT32 = Recipe(FORMATS["float32"], FORMATS["float32"], "none", "unit", DType.float32)
GAUSS4 = Recipe(FORMATS["gauss4"], FORMATS["gauss4"], "token_head", "dynamic", DType.float16, transform="hadamard")


def group_of(recipe: Recipe = FLOAT32, **changes: object) -> KVCacheParams:
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


GROUPS = {
    "full": [group_of()],
    "full and window": [group_of(), group_of(kind="sliding_window", window=5)],
    "closing and window": [group_of(GAUSS4, dtype=DType.uint8), group_of(kind="sliding_window", window=5)],
}


def cache_of(groups: str, num_pages: int = 40) -> PagedKVCache:
    layers = [(rank, place) for rank, group in enumerate(GROUPS[groups]) for place in range(group.num_layers)]
    return PagedKVCache(
        MultiKVCacheParams.from_params(*GROUPS[groups]),
        num_pages=num_pages,
        max_batch_size=4,
        max_seq_len=32,
        layers=layers,
        devices=[torch.device("cpu")],
    )


def fed(cache: PagedKVCache, batch_size: int, num_tokens: int, seed: int = 0) -> torch.Tensor:
    """What the last queries of every layer read, `[batch_size, …]`, after tokens that were fed one by one."""
    states = torch.randn(2, batch_size, 2, num_tokens, 8, generator=torch.Generator().manual_seed(seed))
    for place in range(num_tokens):
        keys, values = states[..., place : place + 1, :]
        read = [torch.cat(cache.append(layer, keys, values), -1) for layer in range(len(cache.layers))]
    return torch.cat(read, dim=2)


@pytest.mark.parametrize("groups", GROUPS)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=4), st.integers(1, 14))
def test_selected_sequences_read_what_they_read_before(groups: str, rows: list[int], length: int) -> None:
    cache, expected = cache_of(groups), cache_of(groups)
    for item in (cache, expected):
        fed(item, 3, length)
    cache.select(rows)
    cache.replica.check_integrity()
    keys = torch.randn(3, 2, 1, 8, generator=torch.Generator().manual_seed(9))
    for layer in range(len(cache.layers)):
        old = expected.append(layer, keys, keys)
        new = cache.append(layer, keys[rows], keys[rows])
        assert torch.equal(new.keys, old.keys[rows])
        assert torch.equal(new.values, old.values[rows])


@pytest.mark.parametrize("groups", GROUPS)
def test_forks_do_not_write_into_each_other(groups: str) -> None:
    cache = cache_of(groups)
    fed(cache, 1, 10)
    cache.select([0, 0, 0])
    read = fed(cache, 3, 9, seed=1)
    for row in range(3):
        alone = cache_of(groups)
        fed(alone, 1, 10)
        keys, values = torch.randn(2, 3, 2, 9, 8, generator=torch.Generator().manual_seed(1))[:, row : row + 1]
        for place in range(9):
            span = slice(place, place + 1)
            given = [
                torch.cat(alone.append(layer, keys[:, :, span], values[:, :, span]), -1)
                for layer in range(len(alone.layers))
            ]
        assert torch.equal(torch.cat(given, dim=2), read[row : row + 1])


def test_a_fork_shares_full_pages_and_copies_the_others() -> None:
    cache = cache_of("full")
    fed(cache, 1, 10)
    cache.select([0, 0, 0, 0])
    tables = [cache.replica.ledger.page_table(sequence).pages for sequence in cache._sequences]
    assert len({table[:2] for table in tables}) == 1
    assert len({table[2] for table in tables}) == 4


def test_forks_without_pages_leave_the_batch_as_it_was() -> None:
    replica, names = cache_of("full", num_pages=4).replica, count(1)
    replica.claim(0, None)
    replica.alloc(0, 10)
    replica.commit([0], 10)
    with pytest.raises(CapacityError, match="2 pages of their own beside those they share, and 1 of 4"):
        fork_sequences(replica, [0], [0, 0, 0], names)
    assert fork_sequences(replica, [0], [0, 0], names) == [0, 1]
    replica.check_integrity()


@pytest.mark.parametrize("length", [0, 1, 3, 4, 7, 9, 10, 12])
def test_a_sequence_cut_inside_a_full_page_keeps_its_bytes(length: int) -> None:
    cache, expected = cache_of("full"), cache_of("full")
    fed(cache, 2, 13)
    cache.select([0, 0])
    for sequence in cache._sequences:
        cut_back(cache.replica, sequence, length)
    cache.replica.check_integrity()
    cache._stored = [length] * 2
    fed(expected, 2, 13)
    expected.select([0, 0])
    keys = torch.ones(2, 2, 1, 8)
    for layer in range(2):
        old, new = expected.append(layer, keys, keys).keys[:, :, :length], cache.append(layer, keys, keys).keys
        assert torch.equal(new, torch.cat([old, keys], dim=2))


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("length", [0, 3, 8, 11, 17])
def test_copies_read_the_same_and_are_not_written_by_the_original(groups: str, length: int) -> None:
    cache = cache_of(groups)
    if length:
        fed(cache, 2, length)
    other = copy.deepcopy(cache)
    other.replica.check_integrity()
    expected = fed(cache, 2, 6, seed=2)
    assert torch.equal(fed(other, 2, 6, seed=2), expected)
    fed(cache, 2, 3, seed=3)
    assert other.length(0) == length + 6


def test_copies_hold_what_forks_shared() -> None:
    cache = cache_of("full")
    fed(cache, 1, 10)
    cache.select([0, 0])
    other = copy.deepcopy(cache)
    assert torch.equal(fed(other, 2, 1, seed=2), fed(cache, 2, 1, seed=2))


def test_copies_that_do_not_fit_are_refused() -> None:
    cache = cache_of("full", num_pages=4)
    fed(cache, 1, 12)
    cache.select([0, 0])
    small: CacheReplica = cache_of("full", num_pages=4).replica
    with pytest.raises(CapacityError):
        copy_sequences(cache.replica, small, cache._sequences)


@pytest.mark.parametrize("groups", ["full and window", "closing and window"])
@pytest.mark.parametrize("kept", [14, 17, 20, 25])
def test_drafts_that_are_taken_back_leave_no_trace(groups: str, kept: int) -> None:
    cache, expected = cache_of(groups), cache_of(groups)
    for item in (cache, expected):
        item.expect_drafts()
        fed(item, 1, 14)
    if kept > 14:
        drafts = torch.randn(2, 1, 2, 11, 8, generator=torch.Generator().manual_seed(4))
        for place in range(11):
            for layer in range(len(cache.layers)):
                keys, values = drafts[..., place : place + 1, :]
                cache.append(layer, keys, values)
                if place < kept - 14:
                    expected.append(layer, keys, values)
        cache.truncate(kept)
    assert torch.equal(fed(cache, 1, 3, seed=5), fed(expected, 1, 3, seed=5))
