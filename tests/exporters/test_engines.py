"""Engines, versions and formats: what there is is exported, and what there is not is refused with what works."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest

from kvcfg.composition import compose
from kvcfg.config.presets import preset_values
from kvcfg.errors import ConfigError
from kvcfg.exporters import ENGINES, Export, export, export_all, find_version, versions
from kvcfg.formats import FORMATS
from tests.exporters.cases import CASES, LLAMA

TIER = ("cache.kv_connector=local", "cache.kv_connector_config.host_kvcache_swap_space_gb=8")


def refusal(overrides: list[str], engine: str, version: str | None = None) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        export(compose(overrides), engine, version)
    return caught.value


def mended(overrides: list[str], engine: str, version: str) -> Export:
    """The export after every fix that a refusal offers."""
    for _ in range(4):
        try:
            return export(compose(overrides), engine, version)
        except ConfigError as error:
            fixes = [problem.fix for problem in error.problems]
            assert all(fixes), error
            overrides = [*overrides, *(word for fix in fixes for word in shlex.split(str(fix)))]
    raise AssertionError(f"the fixes of {engine} lead nowhere: {overrides}")


def test_unknown_engine_is_refused_with_the_nearest() -> None:
    assert refusal(list(LLAMA), "slang").problems[0].fix == "engine=sglang"


@pytest.mark.parametrize(
    ("version", "nearest"), [("26.3.0", "26.4"), ("26.6", "26.7"), ("25.1", "26.4"), ("x", "26.4")]
)
def test_unknown_version_is_refused_with_the_nearest(version: str, nearest: str) -> None:
    assert refusal(list(LLAMA), "max", version).problems[0].fix == f"version={nearest}"


def test_patch_release_follows_the_rules_of_its_version() -> None:
    assert find_version("max", "26.4.1").version == "26.4"


def test_no_version_is_the_newest() -> None:
    assert find_version("max", None).version == versions("max")[-1] == "26.7"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", FORMATS)
def test_format_is_exported_or_refused_with_overrides_that_work(name: str, engine: str) -> None:
    for version in versions(engine):
        made = mended([*LLAMA, *TIER, f"cache.kv_cache_format={name}"], engine, version)
        assert made.settings


@pytest.mark.parametrize("preset", preset_values("quantization").keys() - {"auto"})
def test_recipe_is_exported_or_refused_with_overrides_that_work(preset: str) -> None:
    for engine in ENGINES:
        assert mended([*LLAMA, *TIER, f"quantization={preset}"], engine, versions(engine)[-1]).settings


@pytest.mark.parametrize(
    "overrides",
    [
        ["cache.kv_cache_page_size=13"],
        ["quantization.key_format=int8", "quantization.value_format=float8_e4m3fn"],
        ["cache.kv_cache_format=int8", "quantization.layers=[{layers:[0,1],format:float8_e4m3fn}]"],
        ["quantization.granularity=block", "quantization.quantization_granularity=64", "cache.kv_cache_format=int8"],
        ["speculative=standalone"],
        ["speculative=dflash"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_fixes_work_beside_what_was_written(overrides: list[str]) -> None:
    for engine in ENGINES:
        for version in versions(engine):
            assert mended([*LLAMA, *TIER, *overrides], engine, version).settings


def test_no_room_beside_the_weights_is_refused() -> None:
    problem = refusal(["model=llama-3.3-70b", "devices=h100"], "vllm").problems[0]
    assert problem.key == "devices" and "weights" in problem.rule


def test_all_engines_are_exported_in_every_version() -> None:
    made = export_all(compose(CASES["reference"]))
    assert list(made) == [(engine, version) for engine in ENGINES for version in versions(engine)]


def test_file_states_no_value_that_is_not_there() -> None:
    texts = [item.text for item in export_all(compose(CASES["bytes"])).values() if isinstance(item, Export)]
    assert texts and not any("null" in text or "None" in text for text in texts)


def test_exporting_loads_neither_torch_nor_transformers() -> None:
    code = """
import sys, kvcfg
from kvcfg.exporters import export_all
export_all(kvcfg.compose(["model=llama-3.1-8b", "devices=h100x8"]))
print([name for name in ("torch", "transformers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr
