"""Layouts against the bytes that codecs write, and against the struct that kernels read."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvcfg.cache.closing import ClosingStorage
from kvcfg.cache.layout import ElementFormat, PageLayout, ScaleType, SideLayout, page_layout
from kvcfg.cache.storage import PagedStorage
from kvcfg.dtypes import DeviceRef, DType
from kvcfg.errors import ShapeError
from kvcfg.formats import FORMATS, Recipe
from kvcfg.formats.transforms import Hadamard
from kvcfg.params import KVCacheParams

HEADER = Path(__file__).parents[2] / "kvcfg" / "kernels" / "cpu" / "pages" / "page_layout.h"
HEADS, PAGE, KEY_DIM, VALUE_DIM = 3, 8, 24, 16
NUMBERS = {
    ElementFormat.FLOAT32: torch.float32,
    ElementFormat.FLOAT16: torch.float16,
    ElementFormat.BFLOAT16: torch.bfloat16,
    ElementFormat.E4M3: torch.float8_e4m3fn,
    ElementFormat.E5M2: torch.float8_e5m2,
    ElementFormat.INT8: torch.int8,
}
SCALES = {ScaleType.FLOAT32: torch.float32, ScaleType.FLOAT16: torch.float16, ScaleType.BFLOAT16: torch.bfloat16}


def recipe_of(keys: str, values: str | None = None, scale: DType = DType.float16, **changes: object) -> Recipe:
    key_format, value_format = FORMATS[keys], FORMATS[values or keys]
    granularity = "token_head" if key_format.scaled or value_format.scaled else "none"
    base = {"granularity": granularity, "scale_source": "dynamic", "scale_dtype": scale}
    return Recipe(key_format, value_format, **{**base, **changes})  # type: ignore[arg-type]


READ = {
    **{name: recipe_of(name, scale=DType.float32) for name in ("float32", "float16", "bfloat16", "int8")},
    "fp8": recipe_of("float8_e4m3fn", "float8_e5m2", DType.bfloat16, transform="hadamard"),
    "int8 without scales": recipe_of("int8", granularity="tensor", scale_source="unit"),
    "int8 keys, float16 values": recipe_of("int8", "float16"),
    "gauss4": recipe_of("gauss4", transform="centred", sink_tokens=1),
    "int4": recipe_of("int4", scale=DType.float32),
    "float4": recipe_of("float4_e2m1fn", transform="hadamard"),
    "uint4": recipe_of("uint4", scale=DType.bfloat16, transform="centred", sink_tokens=3),
    "gauss4 keys, uint4 values": recipe_of("gauss4", "uint4", transform="centred"),
    "int8 that closes": recipe_of("int8", transform="centred", sink_tokens=2),
}

NOT_READ = {
    "6 bits": recipe_of("gauss6"),
    "values of 2 bits": recipe_of("gauss4", "gauss2"),
    "blocks": recipe_of("int8", granularity="block", block_size=8),
    "channels": recipe_of("int4", granularity="channel"),
    "8-bit scales": recipe_of("float4_e2m1fn", scale=DType.float8_e4m3fn),
    "calibrated matrices": recipe_of("gauss4", transform="balanced"),
    "sinks alone": recipe_of("gauss4", sink_tokens=1),
}


def params_of(recipe: Recipe, **changes: object) -> KVCacheParams:
    base: dict[str, object] = {
        "dtype": recipe.key_format.dtype,
        "n_kv_heads": HEADS,
        "head_dim": KEY_DIM,
        "value_head_dim": VALUE_DIM,
        "num_layers": 1,
        "devices": [DeviceRef.CPU()],
        "page_size": PAGE,
        "recipe": recipe,
    }
    return KVCacheParams(**{**base, **changes})  # type: ignore[arg-type]


def read_page(page: Tensor, layout: PageLayout, side: SideLayout, levels: Tensor) -> Tensor:
    """A page's numbers `[page_size, n_kv_heads, dim]`, read number by number as the layout says."""
    numbers = torch.zeros(layout.page_size, layout.n_kv_heads, side.dim)
    turn = Hadamard(side.dim)
    for token in range(layout.page_size):
        own = token - layout.sink_tokens
        for head in range(layout.n_kv_heads):
            if own < 0:
                row = token * layout.n_kv_heads + head
                elements = page[side.sinks + row * side.dim :][: side.dim].view(torch.int8)
                scale = page[side.sink_scales + 2 * row :][:2].clone().view(torch.float16)
                numbers[token, head] = turn.undo(elements * scale.float())
                continue
            start = side.elements + own * side.token_bytes + head * side.head_bytes
            numbers[token, head] = as_numbers(page[start : start + side.head_bytes], side, levels)
            if side.scale_type != ScaleType.NONE:
                place = own * layout.n_kv_heads + head
                numbers[token, head] *= one_scale(page, side, side.scales, place)
                if side.zeros >= 0:
                    numbers[token, head] += one_scale(page, side, side.zeros, place)
            if layout.turned:
                numbers[token, head] = turn.undo(numbers[token, head])
            if side.means >= 0:
                means = [one_scale(page, side, side.means, head * side.dim + place) for place in range(side.dim)]
                numbers[token, head] += torch.stack(means)
    return numbers


def as_numbers(elements: Tensor, side: SideLayout, levels: Tensor) -> Tensor:
    if side.format == ElementFormat.CODES4:
        return levels[torch.stack((elements & 15, elements >> 4), -1).flatten().long()]
    return elements.clone().view(NUMBERS[side.format]).float()


def one_scale(page: Tensor, side: SideLayout, begin: int, place: int) -> Tensor:
    dtype = SCALES[side.scale_type]
    return page[begin + place * dtype.itemsize :][: dtype.itemsize].clone().view(dtype)[0].float()


@pytest.mark.parametrize("recipe", READ.values(), ids=READ)
def test_layout_finds_every_number_that_is_stored(recipe: Recipe) -> None:
    params = params_of(recipe)
    device = torch.device("cpu")
    closes = params.closes_pages
    storage = ClosingStorage(params, 2, 1, [device]) if closes else PagedStorage(params, 2, [device])
    keys, values = torch.randn(PAGE, HEADS, KEY_DIM) * 30, torch.randn(PAGE, HEADS, VALUE_DIM) + 20
    if closes:
        storage.store(0, storage.encode(0, keys.unsqueeze(0), values.unsqueeze(0)), torch.tensor([1]))
    else:
        storage.store(0, storage.encode(0, keys, values), PAGE + torch.arange(PAGE))
    pages = storage.layer_pages(0, 0, VALUE_DIM)
    assert pages.layout is not None
    levels = torch.zeros(2, 16) if pages.levels is None else pages.levels
    stored = storage.read(0, torch.tensor([1]), torch.float32)
    for side, table, expected in zip((pages.layout.keys, pages.layout.values), levels, stored, strict=True):
        assert torch.allclose(read_page(pages.arena[1], pages.layout, side, table), expected, atol=1e-4)


@pytest.mark.parametrize("recipe", NOT_READ.values(), ids=NOT_READ)
def test_pages_that_kernels_do_not_read_have_no_layout(recipe: Recipe) -> None:
    assert page_layout(params_of(recipe)) is None


def test_zeros_between_the_scales_of_tokens_have_no_layout() -> None:
    assert page_layout(params_of(recipe_of("uint4"), kind="sliding_window", window=8)) is None
    assert page_layout(params_of(recipe_of("int4"), kind="sliding_window", window=8)) is not None


def test_open_pages_have_the_layout_of_their_own_recipe() -> None:
    layout = page_layout(params_of(recipe_of("gauss4", transform="centred", sink_tokens=1)).open_pages)
    assert layout is not None
    assert (layout.keys.format, layout.sink_tokens, layout.turned) == (ElementFormat.INT8, 0, True)


def test_values_of_a_latent_are_the_first_numbers_of_its_key() -> None:
    params = params_of(recipe_of("int8"), is_mla=True, num_q_heads=4, n_kv_heads=1, value_head_dim=None)
    layout = page_layout(params, 16)
    assert layout is not None
    assert layout.values.dim == 16
    assert layout.values.ints()[2:] == layout.keys.ints()[2:]


@pytest.mark.parametrize("value_dim", [None, 0, 25])
def test_rank_that_a_latent_cannot_have_is_refused(value_dim: int | None) -> None:
    params = params_of(recipe_of("int8"), is_mla=True, num_q_heads=4, n_kv_heads=1, value_head_dim=None)
    with pytest.raises(ShapeError, match=f"value_dim={value_dim}: a latent of 24"):
        page_layout(params, value_dim)


def test_another_width_than_the_stored_one_is_refused() -> None:
    with pytest.raises(ShapeError, match="value_dim=8: values are stored with 16"):
        page_layout(params_of(recipe_of("int8")), 8)


def test_shards_have_the_layout_of_their_own_heads() -> None:
    params = params_of(recipe_of("int8"), devices=[DeviceRef.CPU(index) for index in range(3)])
    layout = page_layout(params)
    assert layout is not None
    assert (layout.n_kv_heads, layout.keys.token_bytes) == (1, KEY_DIM)


@pytest.mark.parametrize("layout", [SideLayout, PageLayout])
def test_fields_stand_in_the_order_of_the_struct(layout: type) -> None:
    body = re.search(rf"struct {layout.__name__} {{(.*?)}};", HEADER.read_text(), re.DOTALL)
    assert body is not None
    declared = re.findall(r"^\s*(?:int64_t|SideLayout) ([\w, ]+);", body[1], re.MULTILINE)
    assert ", ".join(declared) == ", ".join(field.name for field in fields(layout))


@pytest.mark.parametrize("numbers", [ElementFormat, ScaleType])
def test_formats_have_the_numbers_of_the_header(numbers: type[ElementFormat] | type[ScaleType]) -> None:
    body = re.search(rf"enum {numbers.__name__} : int64_t {{(.*?)}};", HEADER.read_text())
    assert body is not None
    names = [re.sub("^k(No)?(Scale)?", "", name.strip()).upper() or "NONE" for name in body[1].split(",")]
    assert names == [item.name for item in numbers]
