"""Tokens that the kernel stores are the codec's, byte for byte; with a Hadamard turn up to the rounding of sums."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from kvcfg.cache.layout import page_layout
from kvcfg.cache.storage import PagedStorage
from kvcfg.dtypes import DeviceRef, DType
from kvcfg.errors import ShapeError
from kvcfg.formats import FORMATS, Recipe
from kvcfg.formats.codec import Calibrated, Codec, LayerCalibration
from kvcfg.kernels.cpu.append import append_tokens
from kvcfg.kernels.cpu.loader import load_kernel
from kvcfg.params import KVCacheParams

pytestmark = pytest.mark.skipif(load_kernel("pages") is None, reason="no C++ compiler")

PAGES, SIZE = 9, 4
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
UNSCALED = ("float32", "float16", "bfloat16")
EIGHT_BITS = ("float8_e4m3fn", "float8_e5m2", "int8")
SHAPES = ((1, 7, 5), (2, 16, 16), (3, 64, 64), (2, 80, 24), (8, 128, 128))


def params_of(recipe: Recipe, n_heads: int = 2, dim: int = 16, value_dim: int | None = None) -> KVCacheParams:
    return KVCacheParams(
        dtype=recipe.key_format.dtype,
        n_kv_heads=n_heads,
        head_dim=dim,
        value_head_dim=value_dim,
        num_layers=1,
        devices=[DeviceRef.CPU()],
        page_size=SIZE,
        recipe=recipe,
    )


def recipe_of(name: str, granularity: str = "token_head", scale: str = "float32", **changes: str) -> Recipe:
    element, source = FORMATS[name], "dynamic" if granularity == "token_head" else "unit"
    return Recipe(element, element, granularity, source, DType[scale], **changes)  # type: ignore[arg-type]


def numbers_of(shape: tuple[int, int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Tokens `[32, n_heads, dim]`: common ones, all kinds of extremes, and numbers in the middle between elements."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(32, *shape, generator=generator)
    numbers[1], numbers[2], numbers[3] = 0.0, -0.0, numbers[3] * 1e30
    numbers[4, 0, 0], numbers[5, 0, 1], numbers[6, 0, 2] = torch.nan, torch.inf, -torch.inf
    numbers[7, -1, -1] = -torch.tensor(torch.nan)
    numbers[8, 0, 0] = 3.3e38
    for row, factor in enumerate((1e-5, 2e-7, 2.0**-20, 2.0**-24, 1e-30, 1e-40, 200.0, 4e4), start=9):
        numbers[row] *= factor
    numbers[17] = torch.randint(-254, 255, shape, generator=generator) / 2
    numbers[18] = torch.randint(-127, 127, shape, generator=generator) + 0.5
    numbers[17:19, :, 0] = 127
    numbers[19] = torch.randint(-16, 17, shape, generator=generator) * 2.0**-10
    return numbers.to(dtype)


def stored_both_ways(
    params: KVCacheParams, keys: torch.Tensor, values: torch.Tensor, calibrated: list[LayerCalibration] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages as the kernel fills them, and as the codecs do."""
    slots = torch.randperm(PAGES * SIZE, generator=torch.Generator().manual_seed(1))[: len(keys)]
    by_kernel, by_codec = (PagedStorage(params, PAGES, [torch.device("cpu")], calibrated) for _ in range(2))
    assert by_kernel.put(0, keys, values, slots, None)
    by_codec.shards[0].token_writer = None
    by_codec.store(0, by_codec.encode(0, keys, values), slots)
    assert by_kernel.clip_rate == by_codec.clip_rate
    return by_kernel.shards[0].arena, by_codec.shards[0].arena


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "recipe",
    [
        *(recipe_of(name, "none") for name in UNSCALED),
        *(recipe_of(name, "tensor") for name in EIGHT_BITS),
        *(recipe_of(name, scale=scale) for name in EIGHT_BITS for scale in UNSCALED),
    ],
    ids=str,
)
def test_bytes_are_those_of_the_codec(recipe: Recipe, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    n_heads, dim, value_dim = shape
    keys, values = numbers_of((n_heads, dim), dtype, 0), numbers_of((n_heads, value_dim), dtype, 1)
    by_kernel, by_codec = stored_both_ways(params_of(recipe, n_heads, dim, value_dim), keys, values)
    assert torch.equal(by_kernel, by_codec)


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_calibrated_scales_of_each_head_divide_and_what_is_cut_off_is_counted(name: str) -> None:
    element = FORMATS[name]
    recipe = Recipe(element, element, "head", "static", DType.float32)
    amax = Calibrated(amax=torch.tensor([0.7, 3.0]))
    keys, values = numbers_of((2, 16), torch.bfloat16, 0), numbers_of((2, 16), torch.bfloat16, 1)
    by_kernel, by_codec = stored_both_ways(params_of(recipe), keys, values, [LayerCalibration(amax, amax)])
    assert torch.equal(by_kernel, by_codec)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim", [8, 24, 64, 80, 128, 256, 512])
@pytest.mark.parametrize("scale", ["float16", "float32"])
def test_turned_tokens_are_the_codecs_up_to_a_step(dim: int, dtype: torch.dtype, scale: str) -> None:
    recipe = recipe_of("int8", scale=scale, transform="hadamard")
    params, codec = params_of(recipe, 2, dim), Codec(recipe.keys, 2, dim)
    numbers = torch.randn(20, 2, dim, generator=torch.Generator().manual_seed(dim)).to(dtype)
    storage = PagedStorage(params, PAGES, [torch.device("cpu")])
    assert storage.put(0, numbers, numbers, torch.arange(20), None)
    by_kernel, by_codec = storage.shards[0].pick(0, torch.arange(20)), codec.encode(numbers)
    assert (by_kernel.keys.elements == by_codec.elements).float().mean() > 0.995
    read, wanted = (codec.decode(item, torch.float32) for item in (by_kernel.keys, by_codec))
    assert torch.dist(read, numbers.float()) < 1.001 * torch.dist(wanted, numbers.float())
    assert torch.equal(by_kernel.keys.scales, by_kernel.values.scales)


@pytest.mark.parametrize("recipe", [recipe_of("bfloat16", "none"), recipe_of("int8", scale="float16")], ids=str)
def test_tokens_between_other_tokens_and_heads_are_read_where_they_lie(recipe: Recipe) -> None:
    whole = torch.randn(1, 4, 9, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    keys = whole[0, ::2, :, 8:24].transpose(0, 1)
    by_kernel, by_codec = stored_both_ways(params_of(recipe), keys, keys[:, :, :])
    assert torch.equal(by_kernel, by_codec)


def test_only_chosen_rows_are_stored_and_slots_below_0_store_nothing() -> None:
    params = params_of(recipe_of("float32", "none"))
    layout = tuple(page_layout(params).ints())  # type: ignore[union-attr]
    keys = torch.arange(4 * 2 * 16).float().view(4, 2, 16)
    pages = torch.zeros(PAGES, params.bytes_per_layer_page, dtype=torch.uint8)
    assert append_tokens(keys, keys, torch.tensor([5, -1]), pages, layout, torch.tensor([3, 0]))
    numbers = pages.view(torch.float32).view(PAGES, 2, SIZE, 2, 16)
    assert torch.equal(numbers[1, 0, 1], keys[3])
    numbers[1, :, 1] = 0
    assert not numbers.any()


def test_slots_and_rows_that_are_every_other_number_of_a_tensor_are_read_as_such() -> None:
    params = params_of(recipe_of("int8"))
    layout = tuple(page_layout(params).ints())  # type: ignore[union-attr]
    keys = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(0))
    arenas = torch.zeros(2, PAGES, params.bytes_per_layer_page, dtype=torch.uint8)
    slots, rows = torch.tensor([4, -1, 9, -1]), torch.tensor([2, 0, 1, 0])
    assert append_tokens(keys, keys, slots[::2], arenas[0], layout, rows[::2])
    assert append_tokens(keys, keys, torch.tensor([4, 9]), arenas[1], layout, torch.tensor([2, 1]))
    assert torch.equal(*arenas)


def test_threads_store_what_one_does() -> None:
    recipe = recipe_of("int8", scale="float16", transform="hadamard")
    params = params_of(recipe, 8, 128)
    layout = tuple(page_layout(params).ints())  # type: ignore[union-attr]
    keys = torch.randn(999, 8, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    slots, arenas, before = torch.randperm(1000)[:999], list[torch.Tensor](), torch.get_num_threads()
    for threads in (1, 3):
        arenas.append(torch.zeros(250, params.bytes_per_layer_page, dtype=torch.uint8))
        torch.set_num_threads(threads)
        try:
            assert append_tokens(keys, keys, slots, arenas[-1], layout)
        finally:
            torch.set_num_threads(before)
    assert torch.equal(*arenas)


def test_slot_beyond_the_pages_is_refused_and_nothing_is_stored() -> None:
    params = params_of(recipe_of("int8"))
    layout = tuple(page_layout(params).ints())  # type: ignore[union-attr]
    pages = torch.zeros(PAGES, params.bytes_per_layer_page, dtype=torch.uint8)
    with pytest.raises(ShapeError, match=f"slots must be below {PAGES * SIZE}"):
        append_tokens(*[torch.ones(2, 2, 16)] * 2, torch.tensor([0, PAGES * SIZE]), pages, layout)
    assert not pages.any()


def test_heads_of_another_width_are_refused_with_both_shapes() -> None:
    params = params_of(recipe_of("int8"))
    layout = tuple(page_layout(params).ints())  # type: ignore[union-attr]
    pages = torch.zeros(PAGES, params.bytes_per_layer_page, dtype=torch.uint8)
    with pytest.raises(ShapeError, match=r"\[num_tokens, 2, 16\].* got \[1, 2, 17\]"):
        append_tokens(torch.ones(1, 2, 17), torch.ones(1, 2, 16), torch.tensor([0]), pages, layout)


def test_numbers_of_another_type_are_left_to_the_codec() -> None:
    params = params_of(recipe_of("int8"))
    layout = tuple(page_layout(params).ints())  # type: ignore[union-attr]
    pages = torch.zeros(PAGES, params.bytes_per_layer_page, dtype=torch.uint8)
    assert not append_tokens(*[torch.ones(1, 2, 16, dtype=torch.float64)] * 2, torch.tensor([0]), pages, layout)


def test_a_latent_has_no_values_of_its_own() -> None:
    params = KVCacheParams(
        dtype=DType.int8,
        n_kv_heads=1,
        head_dim=24,
        num_layers=1,
        devices=[DeviceRef.CPU()],
        page_size=SIZE,
        is_mla=True,
        num_q_heads=4,
        recipe=recipe_of("int8"),
    )
    latent = torch.randn(20, 1, 24, generator=torch.Generator().manual_seed(0))
    by_kernel, by_codec = stored_both_ways(params, latent, latent[..., :0])
    assert torch.equal(by_kernel, by_codec)


def test_operator_passes_the_checks_of_torch() -> None:
    params = params_of(recipe_of("int8", "tensor"))
    layout = page_layout(params).ints()  # type: ignore[union-attr]
    pages = torch.zeros(PAGES, params.bytes_per_layer_page, dtype=torch.uint8)
    keys, slots = torch.randn(3, 2, 16), torch.tensor([1, 2, 30])
    whole = (keys, keys, slots, pages, layout)
    torch.library.opcheck(torch.ops.kvcfg.append.default, whole)
    options = (torch.tensor([0, 2, 1]), torch.ones(2, 2), torch.zeros(2, dtype=torch.int64))
    torch.library.opcheck(torch.ops.kvcfg.append.default, (*whole, *options))


@pytest.mark.skipif("KVCFG_CPU" in os.environ, reason="this is the code that is used anyway")
def test_code_for_any_cpu_does_the_same() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    ran = subprocess.run(command, env={**os.environ, "KVCFG_CPU": "portable"}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
