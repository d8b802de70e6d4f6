"""Pages that the kernel closes are the codec's: the same scales, and elements but where two are as near."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from kvcfg.cache.closing import ClosingStorage
from kvcfg.cache.closing_step import closing_step
from kvcfg.cache.storage import KeysValues
from kvcfg.dtypes import DeviceRef, DType
from kvcfg.formats import FORMATS, Recipe
from kvcfg.formats.codebook import Codebook
from kvcfg.formats.codec import Calibrated, LayerCalibration
from kvcfg.kernels.cpu.close import level_table
from kvcfg.kernels.cpu.loader import load_kernel
from kvcfg.params import KVCacheParams
from kvcfg.registry import load_object

pytestmark = pytest.mark.skipif(load_kernel("pages") is None, reason="no C++ compiler")

CPU = torch.device("cpu")
FEW_BITS = [name for name, item in FORMATS.items() if item.is_packed]


def recipe_of(keys: str, values: str | None = None, **changes: object) -> Recipe:
    base = {"granularity": "token_head", "scale_source": "dynamic", "scale_dtype": DType.float16}
    return Recipe(FORMATS[keys], FORMATS[values or keys], **{**base, **changes})  # type: ignore[arg-type]


def params_of(recipe: Recipe, n_heads: int = 3, dim: int = 64, page_size: int = 16) -> KVCacheParams:
    return KVCacheParams(
        dtype=recipe.key_format.dtype,
        n_kv_heads=n_heads,
        head_dim=dim,
        num_layers=1,
        devices=[DeviceRef.CPU()],
        page_size=page_size,
        recipe=recipe,
    )


def tokens_of(count: int, n_heads: int, dim: int) -> KeysValues:
    """Keys with a mean and an outlier in each head, values with a large token and one of zeros."""
    generator = torch.Generator().manual_seed(dim)
    keys, values = (torch.randn(count, n_heads, dim, generator=generator) for _ in range(2))
    keys += 5 * torch.randn(n_heads, dim, generator=generator)
    keys[:, :, 3] *= 6
    values[2] *= 10
    values[3] = 0
    return KeysValues(keys, values)


def close(storage: ClosingStorage, states: KeysValues, split: int = 0) -> torch.Tensor:
    """The bytes of two pages; tokens from `split` on come in the step that closes them."""
    size, pages = storage.params.page_size, torch.tensor([[2, 1]])
    places = {"page_size": size, "ring_pages": storage.ring_pages, "horizon": 0}
    storage.begin(0, 0)
    start = 0
    for stop in (split, 2 * size):
        if stop > start:
            step = closing_step(pages, [0], [start], [stop - start], [start // size], **places)
            storage.write(0, step, *(item[start:stop] for item in states))
            start = stop
    return storage.shards[0].arena[0, [2, 1]].clone()


def both_ways(recipe: Recipe, n_heads: int = 3, dim: int = 64) -> tuple[torch.Tensor, ...]:
    """Bytes and squared error of the kernel, then of the codec."""
    calibrated, states, results = None, tokens_of(32, n_heads, dim), list[torch.Tensor]()
    if recipe.keys.transform == "balanced":
        matrix = torch.randn(n_heads, dim, dim, generator=torch.Generator().manual_seed(1)) / dim**0.5
        calibrated = [LayerCalibration(Calibrated(matrix + torch.eye(dim)), Calibrated())]
    for plain in (False, True):
        storage = ClosingStorage(params_of(recipe, n_heads, dim), 3, 1, [CPU], calibrated)
        shard = storage.shards[0]
        assert shard.closers is not None
        shard.closers = None if plain else shard.closers
        results.append(close(storage, states))
        opened = storage.opened
        truth = opened.decode(0, opened.encode(0, *states), torch.float32)
        read = storage.read(0, torch.tensor([2, 1]), torch.float32)
        results.append(torch.stack([(a - b).square().sum() for a, b in zip(read, truth, strict=True)]))
    return tuple(results)


@pytest.mark.parametrize("name", FEW_BITS)
@pytest.mark.parametrize("opened", ["int8", "bfloat16"])
def test_centred_pages_are_those_of_the_codec(name: str, opened: str) -> None:
    recipe = recipe_of(name, transform="centred", sink_tokens=1, open_page_format=FORMATS[opened])
    by_kernel, error, by_codec, least = both_ways(recipe)
    assert (by_kernel == by_codec).float().mean() > 0.99
    assert (error <= least * (1 + 1e-3)).all()


@pytest.mark.parametrize("name", FEW_BITS)
@pytest.mark.parametrize("scale_dtype", [DType.float32, DType.bfloat16, DType.float16])
def test_pages_that_nothing_turns_are_those_of_the_codec_to_the_byte(name: str, scale_dtype: DType) -> None:
    by_kernel, _, by_codec, _ = both_ways(recipe_of(name, scale_dtype=scale_dtype), 2, 24)
    assert torch.equal(by_kernel, by_codec)


@pytest.mark.parametrize("name", ["int8", "float8_e4m3fn", "float8_e5m2"])
def test_pages_of_8_bits_are_those_of_the_codec(name: str) -> None:
    recipe = recipe_of(name, transform="hadamard", open_page_format=FORMATS["bfloat16"])
    by_kernel, error, by_codec, least = both_ways(recipe)
    assert (by_kernel == by_codec).float().mean() > 0.99
    assert (error <= least * (1 + 1e-3)).all()


@pytest.mark.parametrize("opened", ["int8", "bfloat16"])
@pytest.mark.parametrize("dim", [16, 80])
def test_calibrated_matrices_turn_keys_as_the_codec_does(opened: str, dim: int) -> None:
    recipe = recipe_of("gauss5", "gauss4", transform="balanced", sink_tokens=2, open_page_format=FORMATS[opened])
    by_kernel, error, by_codec, least = both_ways(recipe, 2, dim)
    assert (by_kernel == by_codec).float().mean() > 0.99
    assert (error <= least * (1 + 1e-3)).all()


@pytest.mark.parametrize("split", [0, 1, 15, 16, 31])
def test_a_page_is_the_same_whichever_step_its_tokens_came_in(split: int) -> None:
    recipe = recipe_of("gauss4", transform="centred", sink_tokens=1)
    states = tokens_of(32, 3, 64)
    at_once, split_up = (ClosingStorage(params_of(recipe), 3, 1, [CPU]) for _ in range(2))
    assert torch.equal(close(at_once, states), close(split_up, states, split))


def test_a_nan_stays_in_its_own_token() -> None:
    recipe = recipe_of("gauss4", transform="centred", sink_tokens=1)
    clean, spoilt = tokens_of(32, 3, 64), tokens_of(32, 3, 64)
    spoilt.values[5, 1, 7] = torch.nan
    read = list[torch.Tensor]()
    for states in (clean, spoilt):
        storage = ClosingStorage(params_of(recipe), 3, 1, [CPU])
        close(storage, states)
        read.append(storage.read(0, torch.tensor([2, 1]), torch.float32).values)
    differ = (read[0] != read[1]).any(-1).nonzero()
    assert differ.tolist() == [[5, 1]]


@pytest.mark.parametrize("name", FEW_BITS)
def test_levels_begin_where_cells_of_the_codebook_change(name: str) -> None:
    codebook = load_object(FORMATS[name].codec)(FORMATS[name])
    assert isinstance(codebook, Codebook)
    table = level_table(tuple(codebook.levels.tolist()))
    count, low, cells_per_unit = int(table[0]), table[1], table[2]
    levels, edges = table[4:68], table[132:196]
    assert levels[:count].tolist() == sorted(set(codebook.levels.tolist()))
    at_edges = low + (edges[: count - 1] + 0.5) / cells_per_unit
    below = low + (edges[: count - 1] - 0.5) / cells_per_unit
    nearest = Codebook(FORMATS[name].bits, [round(level, 6) for level in codebook.levels.tolist()])
    assert torch.equal(nearest.rounded(at_edges), levels[1:count])
    assert torch.equal(nearest.rounded(below), levels[: count - 1])


@pytest.mark.skipif("KVCFG_CPU" in os.environ, reason="this is the code that is used anyway")
def test_code_for_any_cpu_does_the_same() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    ran = subprocess.run(command, env={**os.environ, "KVCFG_CPU": "portable"}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
