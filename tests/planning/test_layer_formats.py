"""Formats of single layers: the config they make, what it takes, and what may not be chosen."""

from __future__ import annotations

import random

import pytest

from kvcfg.composition import compose
from kvcfg.config.experiment import ExperimentConfig
from kvcfg.config.recipes import stored_layers
from kvcfg.errors import ConfigError
from kvcfg.planning import plan
from kvcfg.planning.layer_formats import (
    FOUND_FORMATS,
    Side,
    bytes_for_sides,
    open_sides,
    side_bytes,
    starting_point,
    with_formats,
)

MODELS = {
    "smollm2-135m": ["model=smollm2-135m", "devices=h100"],
    "two devices": ["model=llama-3.1-8b", "devices=h100x8"],
    "windows": ["model=gpt-oss-20b", "devices=h100"],
    "drafter": ["model=llama-3.1-8b", "devices=h100", "speculative=eagle"],
}
SEQUENCES = ["workload.max_batch_size=3", "workload.max_seq_len=5000"]


def started(*overrides: str) -> ExperimentConfig:
    return starting_point(compose(["quantization=auto", *overrides]))


def test_start_is_the_preset_that_it_is_built_on() -> None:
    assert started() == compose(["quantization=bits4"])


def test_keys_and_values_of_every_layer_are_open() -> None:
    sides = open_sides(started())
    assert len(sides) == 60
    assert sides[:3] == (Side(0, "key"), Side(0, "value"), Side(1, "key"))


def test_layers_of_windows_are_not_open() -> None:
    start = started("model=gpt-oss-20b", "devices=h100")
    full = next(group for group in start.model.layer_groups if group.kind == "full")
    assert {side.layer for side in open_sides(start)} == set(full.layers or ())


def test_latents_have_no_values_to_choose() -> None:
    start = started("model=deepseek-v3", "devices=h200x8")
    assert {side.what for side in open_sides(start)} == {"key"}


def test_states_are_refused() -> None:
    start = started("model=gpt-oss-20b", "devices=h100")
    windows = [group for group in start.model.layer_groups if group.window is not None]
    model = start.model.model_copy(update={"layer_groups": tuple(windows)})
    with pytest.raises(ConfigError, match="none of its layers keeps every token"):
        open_sides(start.model_copy(update={"model": model}))


def test_formats_come_out_of_the_config_as_they_went_in() -> None:
    start = started()
    sides = open_sides(start)
    chooser = random.Random(1)
    formats = {side: chooser.choice(FOUND_FORMATS) for side in sides}
    found = {}
    for stored in stored_layers(with_formats(start, formats)):
        for layer in stored.group.layers or range(30):
            found[Side(layer, "key")] = stored.recipe.key_format.name
            found[Side(layer, "value")] = stored.recipe.value_format.name
    assert found == formats


@pytest.mark.parametrize(
    ("keys", "values", "experimental"),
    [("gauss4", "gauss4", False), ("gauss5", "gauss4", False), ("gauss3", "gauss3", False), ("gauss5", "int8", True)],
)
def test_only_recipes_that_nobody_measured_are_experimental(keys: str, values: str, experimental: bool) -> None:
    found = with_formats(started(), {Side(3, "key"): keys, Side(3, "value"): values})
    assert found.quantization.experimental is experimental


@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS)
def test_budget_is_kept_to_the_byte(overrides: list[str]) -> None:
    """What the sides may take is what the plan has for them: that many bytes fit, and a page of one more does not."""
    chooser = random.Random(2)
    sides = open_sides(started(*overrides))
    formats = {side: chooser.choice(FOUND_FORMATS) for side in sides}
    start = started(*overrides, *SEQUENCES, "cache.kv_cache_memory_bytes=40GiB")
    sizes = {name: side_bytes(start, sides, name) for name in FOUND_FORMATS}
    taken = sum(sizes[name][side] for side, name in formats.items())
    capacity = plan(with_formats(start, formats)).capacity
    shards = capacity.params.tensor_parallel_degree
    for budget, fits in ((-(-capacity.needed.total // shards), True), (capacity.needed.total // shards - 1, False)):
        limited = started(*overrides, *SEQUENCES, f"cache.kv_cache_memory_bytes={budget}")
        assert (taken <= bytes_for_sides(limited, sides)) is fits
        assert plan(with_formats(limited, formats)).fits is fits


def test_layers_whose_pages_need_not_close_take_no_more_than_there_is() -> None:
    overrides = ["model=qwen3-8b", "devices=h100", "quantization.transform=hadamard", *SEQUENCES]
    start = started(*overrides, "cache.kv_cache_memory_bytes=40GiB")
    sides = open_sides(start)
    finest = with_formats(start, dict.fromkeys(sides, "int8"))
    budget = plan(finest).capacity.needed.total - 1
    limited = started(*overrides, f"cache.kv_cache_memory_bytes={budget}")
    assert sum(side_bytes(start, sides, "int8").values()) > bytes_for_sides(limited, sides)


def test_more_bits_take_more_bytes() -> None:
    start = started()
    sides = open_sides(start)
    sizes = [sum(side_bytes(start, sides, name).values()) for name in FOUND_FORMATS]
    assert sizes == sorted(set(sizes))


def test_budget_without_sequences_is_refused() -> None:
    start = started("devices=h100", "cache.kv_cache_memory_bytes=1GiB")
    with pytest.raises(ConfigError, match=r"Try: workload\.max_batch_size=1"):
        bytes_for_sides(start, open_sides(start))


def test_recipe_that_suits_no_few_bits_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"quantization\.granularity"):
        started("quantization.granularity=none", "quantization.transform=none")
