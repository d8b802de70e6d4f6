"""Every export is taken by the engine's own parser, and means there what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvcfg.composition import compose
from kvcfg.errors import ConfigError
from kvcfg.exporters import Export, export
from tests.engines.conftest import Ask
from tests.exporters.cases import CASES, LLAMA, REFERENCE

pytestmark = pytest.mark.engines

LOCAL = (*LLAMA, "cache.kv_connector=local", "cache.kv_connector_config.host_kvcache_swap_space_gb=8")
MORE = {
    "local": LOCAL,
    "drafts": (*LLAMA, "speculative=mtp", "cache.eviction=lfu"),
    "layers": (*LLAMA, "cache=int8", "quantization.layers=[{layers:[0,31],format:bfloat16}]"),
    "e5m2": (*LLAMA, "cache.kv_cache_format=float8_e5m2", "quantization.granularity=tensor"),
    "dkv": (*LLAMA, "cache.kv_connector=dkv", "cache.kv_connector_config.block_store_endpoint='tcp://127.0.0.1:7000'"),
}
ALL = CASES | MORE


def written(case: str, engine: str, folder: Path, version: str | None = None) -> tuple[Export, Path]:
    """The export of a case in a file; skips cases that the engine refuses."""
    try:
        made = export(compose(ALL[case]), engine, version)
    except ConfigError as error:
        pytest.skip(f"refused: {error}")
    path = folder / made.file_name
    path.write_text(made.text, encoding="utf-8")
    return made, path


@pytest.mark.parametrize("case", ALL)
def test_vllm_parses_its_file(case: str, ask: Ask, tmp_path: Path) -> None:
    made, path = written(case, "vllm", tmp_path)
    found = ask("vllm", "vllm", path)
    for name, value in made.settings.items():
        own = found[name.replace("-", "_")]
        assert _holds(own, value), (name, own, value)


@pytest.mark.parametrize("case", ALL)
def test_sglang_parses_its_file(case: str, ask: Ask, tmp_path: Path) -> None:
    made, path = written(case, "sglang", tmp_path)
    found = ask("sglang", "sglang", path)
    assert {name: found[name.replace("-", "_")] for name in made.settings} == made.settings


@pytest.mark.parametrize("version", ["26.4", "26.7"])
@pytest.mark.parametrize("case", ALL)
def test_max_parses_its_recipe(case: str, version: str, ask: Ask, tmp_path: Path) -> None:
    made, path = written(case, "max", tmp_path, version)
    found = ask("max-26.4" if version == "26.4" else "max", "max", path)
    assert _holds(found["cache"], made.settings["model"]["kv_cache"])
    assert _holds(found["drafts"], made.settings.get("speculative", {}))


@pytest.mark.parametrize("case", ["reference", "local"])
def test_lmcache_loads_its_file(case: str, ask: Ask, tmp_path: Path) -> None:
    made, path = written(case, "lmcache", tmp_path)
    found = ask("lmcache", "lmcache", path)
    expected = dict(made.settings)
    if "local_disk" in expected:
        expected["local_disk"] = expected["local_disk"].removeprefix("file://")
    assert found == expected


def test_reference_is_among_the_cases() -> None:
    assert ALL["reference"] == REFERENCE


def _holds(found: Any, written: Any) -> bool:
    """Whether what was written is there, whatever an engine adds."""
    if isinstance(written, dict):
        return all(_holds(found[name], value) for name, value in written.items())
    return bool(found == written)
