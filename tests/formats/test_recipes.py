"""Recipes as a planner sees them: bytes, and how a page is stored until it closes."""

from __future__ import annotations

import pytest

from kvcfg.dtypes import DeviceRef, DType
from kvcfg.errors import ConfigError
from kvcfg.formats import FORMATS, Recipe, find_format
from kvcfg.params import KVCacheParams


def recipe(keys: str, values: str | None = None, granularity: str = "token_head", **changes: object) -> Recipe:
    given = {"scale_source": "dynamic", "scale_dtype": DType.float16, **changes}
    return Recipe(FORMATS[keys], FORMATS[values or keys], granularity, **given)  # type: ignore[arg-type]


KIVI = {"key_granularity": "channel"}
E4M3, E8M0 = {"scale_dtype": DType.float8_e4m3fn}, {"scale_dtype": DType.float8_e8m0fnu}


@pytest.mark.parametrize(
    ("stored", "bits_per_element"),
    [
        (recipe("int8"), 8.25),
        (recipe("gauss6"), 6.25),
        (recipe("gauss5"), 5.25),
        (recipe("gauss4"), 4.25),
        (recipe("gauss3"), 3.25),
        (recipe("gauss2"), 2.25),
        (recipe("int6", "int4"), 5.25),
        (recipe("uint4"), 4.5),
        (recipe("uint4", granularity="block", block_size=32), 5.0),
        (recipe("float4_e2m1fn", granularity="block", block_size=16, **E4M3), 4.5),
        (recipe("float4_e2m1fn", granularity="block", block_size=32, **E8M0), 4.25),
        (recipe("uint4", granularity="channel"), 4.25),
        (recipe("uint4", granularity="channel", block_size=64), 4.5),
        (recipe("uint2", **KIVI), 2.375),
        (recipe("uint2", **KIVI, key_block_size=32), 2.75),
        (recipe("uint4", "gauss4", **KIVI, key_block_size=64), 4.375),
        (recipe("int8", "bfloat16"), 12.125),
    ],
    ids=str,
)
def test_bits_of_a_page_count_scales_and_zeros(stored: Recipe, bits_per_element: float) -> None:
    page_size, n_heads, dim = 128, 3, 64
    assert stored.page_bytes(page_size, n_heads, dim, dim) * 8 == bits_per_element * page_size * n_heads * 2 * dim


@pytest.mark.parametrize("name", FORMATS)
def test_elements_fill_whole_bytes_for_every_multiple_of_8(name: str) -> None:
    for dim in range(8, 264, 8):
        assert FORMATS[name].value_bytes(dim) * 8 == dim * FORMATS[name].bits


@pytest.mark.parametrize("name", FORMATS)
def test_facts_of_the_table_are_those_of_torch(name: str) -> None:
    torch = pytest.importorskip("torch")
    element = FORMATS[name]
    if element.is_packed:
        assert element.dtype is DType.uint8
        return
    dtype = element.dtype.to_torch()
    limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    assert element.bits == limits.bits
    assert element.max_value == pytest.approx(limits.max, rel=1e-12)


@pytest.mark.parametrize("name", FORMATS)
def test_pages_below_8_bits_close(name: str) -> None:
    granularity = "token_head" if FORMATS[name].scaled else "none"
    assert recipe(name, granularity=granularity).closes == (FORMATS[name].bits < 8)


def test_pages_whose_tokens_share_scales_close() -> None:
    assert recipe("int8", granularity="channel").closes
    assert recipe("int8", **KIVI).closes
    assert not recipe("bfloat16", granularity="channel").closes


def test_open_pages_are_int8_unless_said_otherwise() -> None:
    assert recipe("gauss4").open_page == recipe("int8")
    assert recipe("gauss4", open_page_format=FORMATS["bfloat16"]).open_page == Recipe(
        FORMATS["bfloat16"], FORMATS["bfloat16"], "none", "unit", DType.float32
    )


def test_pages_that_do_not_close_have_no_other_open_page() -> None:
    assert recipe("int8").open_page is None


def test_an_open_page_is_one_that_need_not_close() -> None:
    opened = recipe("gauss2", **KIVI).open_page
    assert opened is not None and not opened.closes


def test_recipes_that_differ_have_different_names() -> None:
    differing = [
        recipe("gauss4"),
        recipe("int4"),
        recipe("gauss4", "gauss3"),
        recipe("gauss4", granularity="channel"),
        recipe("gauss4", granularity="channel", block_size=64),
        recipe("gauss4", **KIVI),
        recipe("gauss4", **KIVI, key_block_size=64),
        recipe("gauss4", transform="hadamard"),
        recipe("gauss4", open_page_format=FORMATS["bfloat16"]),
        recipe("gauss4", **E4M3),
    ]
    assert len({str(item) for item in differing}) == len(differing)


def test_name_says_how_keys_and_values_share_scales() -> None:
    assert str(recipe("uint4", "gauss4", **KIVI, key_block_size=64, transform="hadamard")) == (
        "uint4/gauss4, dynamic scales per channel of 64 (keys) and token_head (values) in float16, hadamard"
    )


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"recipe": recipe("int4"), "head_dim": 20}, "recipe.format"),
        ({"recipe": recipe("uint4", **E8M0)}, "recipe.scale_dtype"),
        ({"recipe": recipe("gauss4", granularity="tensor")}, "recipe.granularity"),
        ({"recipe": recipe("uint4", granularity="channel", block_size=48)}, "recipe.block_size"),
        ({"recipe": recipe("uint4", key_granularity="block", key_block_size=48)}, "recipe.block_size"),
        (
            {"recipe": recipe("gauss4", transform="hadamard"), "kind": "mla", "num_q_heads": 4},
            "recipe.transform",
        ),
    ],
)
def test_parameters_refuse_what_cannot_be_stored(changes: dict[str, object], key: str) -> None:
    base: dict[str, object] = {
        "dtype": DType.uint8,
        "n_kv_heads": 2,
        "head_dim": 64,
        "num_layers": 1,
        "devices": [DeviceRef.CPU()],
        "page_size": 64,
    }
    with pytest.raises(ConfigError) as caught:
        KVCacheParams(**{**base, **changes})  # type: ignore[arg-type]
    assert key in [problem.key for problem in caught.value.problems]


def test_unknown_format_is_met_with_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        find_format("gaus4")
    assert caught.value.problems[0].fix == "cache.kv_cache_format=gauss4"
