"""The recipe of every layer: presets, defaults by format, and layers with formats of their own."""

from __future__ import annotations

import pytest

from kvcfg.composition import compose
from kvcfg.config.presets import preset_values
from kvcfg.config.recipes import is_measured, needs_calibration, resolve_recipe, stored_layers
from kvcfg.errors import ConfigError

LAYERS = "quantization.layers"
PRESETS = [name for name in preset_values("quantization") if name not in ("default", "auto")]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_counts_as_measured(name: str) -> None:
    assert is_measured(resolve_recipe(compose([f"quantization={name}"])))


@pytest.mark.parametrize(
    ("overrides", "measured"),
    [
        (["cache=int8"], True),
        (["quantization.key_format=int8", "quantization.value_format=bfloat16"], True),
        (["cache.kv_cache_format=gauss4"], True),
        (["cache.kv_cache_format=int4"], False),
        (["quantization=bits4", "quantization.sink_tokens=0"], False),
        (["quantization=bits4", "quantization.value_format=gauss3"], False),
        (["cache=int8", "quantization.open_page_format=bfloat16"], False),
        (["cache=int8", "quantization.granularity=head", "quantization.scale_source=static"], False),
    ],
)
def test_only_recipes_of_conf_and_plain_wide_ones_count_as_measured(overrides: list[str], measured: bool) -> None:
    assert is_measured(resolve_recipe(compose(overrides))) is measured


@pytest.mark.parametrize(
    ("name", "limit"),
    [("bits8", 8.5), ("bits6", 6.4), ("bits5", 5.3), ("bits4", 4.5), ("bits3", 3.5), ("bits2", 2.5)],
)
@pytest.mark.parametrize("suffix", ["", "_calibrated"])
@pytest.mark.parametrize("page_size", [64, 128])
def test_closed_pages_keep_to_the_bits_of_the_name(name: str, suffix: str, limit: float, page_size: int) -> None:
    recipe = resolve_recipe(compose([f"quantization={name}{suffix}"]))
    assert recipe.page_bytes(page_size, 1, 64, 64) * 8 / (page_size * 128) <= limit


def test_format_of_few_bits_brings_its_defaults_along() -> None:
    recipe = resolve_recipe(compose(["cache.kv_cache_format=gauss3"]))
    assert recipe == resolve_recipe(compose(["quantization=bits3"]))
    assert (recipe.transform, recipe.sink_tokens, recipe.open_page.format_name) == ("centred", 1, "int8")


@pytest.mark.parametrize("name", PRESETS)
def test_calibration_is_needed_by_the_recipes_that_say_so(name: str) -> None:
    assert needs_calibration(resolve_recipe(compose([f"quantization={name}"]))) is name.endswith("_calibrated")


def test_layers_with_own_formats_are_split_from_their_group() -> None:
    own = f"{LAYERS}=[{{layers:[0,29],format:bfloat16}},{{layers:[7],value_format:int8}}]"
    stored = stored_layers(compose(["quantization=bits4", own]))
    assert [(len(layers.group.layers or ()), layers.recipe.format_name) for layers in stored] == [
        (2, "bfloat16"),
        (27, "gauss4"),
        (1, "gauss4/int8"),
    ]
    assert stored[0].group.layers == (0, 29) and stored[0].recipe.transform == "none"


def test_last_entry_that_names_a_layer_counts() -> None:
    own = f"{LAYERS}=[{{kind:full,format:int8}},{{layers:[3],format:bfloat16}}]"
    stored = stored_layers(compose(["quantization=bits4", own]))
    assert {layers.recipe.format_name: layers.group.num_layers for layers in stored} == {"int8": 29, "bfloat16": 1}


def test_kind_names_the_layers_that_keep_the_same() -> None:
    own = f"{LAYERS}=[{{kind:sliding_window,format:float8_e4m3fn}}]"
    stored = stored_layers(compose(["model=gemma-3-27b", "devices=h200x8", own]))
    assert {layers.group.kind: layers.recipe.format_name for layers in stored} == {
        "full": "bfloat16",
        "sliding_window": "float8_e4m3fn",
    }


def test_latents_are_stored_without_a_transform() -> None:
    stored = stored_layers(compose(["model=deepseek-v3", "devices=h200x8", "quantization=bits4"]))
    assert {(layers.recipe.transform, layers.recipe.sink_tokens) for layers in stored} == {("none", 0)}


@pytest.mark.parametrize(
    ("overrides", "key", "fix"),
    [
        (
            ["quantization.transform=centred", "cache=int8", "quantization.granularity=channel"],
            "granularity",
            "granularity=null",
        ),
        (["quantization.transform=hadamard"], "transform", "transform=null"),
        (["quantization.value_format=int8", "quantization.transform=centred"], "transform", "transform=hadamard"),
        (["cache=int8", "quantization.sink_tokens=2"], "sink_tokens", "sink_tokens=null"),
        (["quantization=bits4", "quantization.sink_tokens=128"], "sink_tokens", "sink_tokens=1"),
        (["quantization=bits4", "quantization.open_page_format=int4"], "open_page_format", "open_page_format=int8"),
        (["quantization=bits4", "quantization.open_page_format=int9"], "open_page_format", "open_page_format=int8"),
        (["quantization=bits4", "quantization.scale_dtype=float8_e8m0fnu"], "scale_dtype", "scale_dtype=null"),
        (["quantization=bits4", "quantization.calibration=x"], "calibration", "calibration=null"),
        (["quantization=bits4", "quantization.key_granularity=head"], "key_granularity", "key_granularity=null"),
        (
            [
                "cache.kv_cache_format=uint4",
                "quantization.key_granularity=channel",
                "quantization.key_quantization_granularity=48",
            ],
            "key_quantization_granularity",
            "key_quantization_granularity=null",
        ),
        (
            ["cache=int8", "quantization.key_granularity=block"],
            "key_quantization_granularity",
            "key_quantization_granularity=32",
        ),
        (
            ["cache=int8", "quantization.scale_source=static", "quantization.granularity=token_head"],
            "scale_source",
            "scale_source=dynamic",
        ),
        (["quantization=bits4", f"{LAYERS}=[{{layers:[30],format:int8}}]"], "layers.0.layers", "layers=null"),
        (["quantization=bits4", f"{LAYERS}=[{{kind:mla,format:int8}}]"], "layers.0.kind", "layers=null"),
        (["quantization=bits4", f"{LAYERS}=[{{layers:[1],format:int7}}]"], "layers.0.format", "layers.0.format=int8"),
    ],
)
def test_what_does_not_go_together_is_refused_with_its_mend(overrides: list[str], key: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    found = {problem.key: problem.fix for problem in caught.value.problems}
    assert found == {f"quantization.{key}": f"quantization.{fix}"}
