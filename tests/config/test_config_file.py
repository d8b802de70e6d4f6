from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from kvcfg.config.cache import KVCacheConfig, KVConnectorConfig
from kvcfg.errors import Problem

SECTIONS = """
target:
  kv_cache_page_size: 64
draft:
  kv_cache_page_size: 16
empty:
number: 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(text: str) -> str:
    Path("kv.yaml").write_text(text)
    return "kv.yaml"


def problem(**values: Any) -> Problem:
    """The one problem of a config that cannot be loaded."""
    with pytest.raises(ValidationError) as error:
        KVCacheConfig(**values)
    (item,) = error.value.errors()
    (found,) = item["ctx"]["problems"]
    assert isinstance(found, Problem)
    return found


def test_file_fills_in_what_is_not_given() -> None:
    config = KVCacheConfig(config_file=write("kv_cache_page_size: 64\nkv_cache_format: float32\n"))
    assert (config.kv_cache_page_size, config.kv_cache_format) == (64, "float32")


@pytest.mark.parametrize("given", ["bfloat16", None])
def test_given_value_wins_over_the_file_even_if_null(given: str | None) -> None:
    config = KVCacheConfig(config_file=write("kv_cache_format: float32\n"), kv_cache_format=given)
    assert config.kv_cache_format == given


def test_nested_values_merge_key_by_key() -> None:
    file = write("kv_connector_config:\n  disk_offload_dir: /pages\n  disk_offload_max_gb: 3\n")
    config = KVCacheConfig(config_file=file, kv_connector_config={"disk_offload_max_gb": 9})  # type: ignore[arg-type]
    assert config.kv_connector_config == KVConnectorConfig(disk_offload_dir="/pages", disk_offload_max_gb=9)


def test_settings_object_replaces_the_file_as_a_whole() -> None:
    file = write("kv_connector_config:\n  disk_offload_dir: /pages\n")
    given = KVConnectorConfig(disk_offload_max_gb=9)
    assert KVCacheConfig(config_file=file, kv_connector_config=given).kv_connector_config == given


def test_section_picks_a_mapping_of_the_file() -> None:
    assert KVCacheConfig(config_file=write(SECTIONS), section_name="draft").kv_cache_page_size == 16


def test_section_name_is_not_dumped() -> None:
    assert "section_name" not in KVCacheConfig(config_file=write(SECTIONS), section_name="draft").model_dump()


def test_section_without_a_file_does_nothing() -> None:
    assert KVCacheConfig(section_name="draft").kv_cache_page_size == 128


def test_settings_of_a_connector_load_a_file_of_their_own() -> None:
    file = write("disk_offload_dir: /pages\n")
    config = KVCacheConfig(kv_connector_config={"config_file": file})  # type: ignore[arg-type]
    assert config.kv_connector_config == KVConnectorConfig(config_file=file, disk_offload_dir="/pages")


@pytest.mark.parametrize("text", ["", "# nothing\n", "null\n"])
def test_empty_file_changes_nothing(text: str) -> None:
    assert KVCacheConfig(config_file=write(text)).kv_cache_page_size == 128


def test_missing_section_is_told_with_those_there_are() -> None:
    found = problem(config_file=write(SECTIONS), section_name="targt")
    assert "target, draft" in found.rule
    assert found.fix == "section_name=target"


def test_missing_section_of_a_file_without_any_says_so() -> None:
    assert "no sections" in problem(config_file=write("kv_cache_page_size: 1\n"), section_name="draft").rule


@pytest.mark.parametrize(("name", "what"), [("empty", "is empty"), ("number", "is a int")])
def test_section_that_is_no_mapping_is_told_apart_from_a_missing_one(name: str, what: str) -> None:
    assert what in problem(config_file=write(SECTIONS), section_name=name).rule


def test_file_of_sections_asks_for_one() -> None:
    found = problem(config_file=write(SECTIONS))
    assert (found.key, found.fix) == ("section_name", "section_name=target")


@pytest.mark.parametrize("key", ["config_file", "section_name"])
def test_file_that_names_another_is_refused(key: str) -> None:
    assert f"{key} has no effect there" in problem(config_file=write(f"{key}: other\n")).rule


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("- 1\n", "a mapping at its root, not a list"),
        ("a: [1\nb: }\n", "is not YAML"),
        ("a: !!python/x []", "not YAML"),
    ],
)
def test_file_that_is_no_mapping_is_refused(text: str, rule: str) -> None:
    assert rule in problem(config_file=write(text)).rule


@pytest.mark.parametrize("path", ["nowhere.yaml", ".", ""])
def test_file_that_cannot_be_read_is_refused(path: str) -> None:
    found = problem(config_file=path)
    assert (found.key, found.value) == ("config_file", path)
    assert "cannot be read" in found.rule


@pytest.mark.parametrize("path", [1, True, ["kv.yaml"], b"kv.yaml"])
def test_path_is_text(path: Any) -> None:
    assert problem(config_file=path).key == "config_file"


@pytest.mark.parametrize("values", [None, [], "kv.yaml", 3])
def test_input_that_is_no_mapping_is_refused_like_any_other(values: Any) -> None:
    with pytest.raises(ValidationError, match="valid dictionary or instance"):
        KVCacheConfig.model_validate(values)


def test_unknown_key_of_a_file_is_refused() -> None:
    with pytest.raises(ValidationError, match="kv_cache_pagesize"):
        KVCacheConfig(config_file=write("kv_cache_pagesize: 64\n"))


def test_section_that_values_came_from_makes_no_other_config() -> None:
    file = write(SECTIONS)
    named, other = (KVCacheConfig(config_file=file, section_name=name) for name in ("target", "draft"))
    same = KVCacheConfig(config_file=file, section_name="draft", kv_cache_page_size=64)
    assert (named == same, hash(named) == hash(same), named == other) == (True, True, False)


def test_configs_of_two_kinds_are_never_equal() -> None:
    assert KVCacheConfig() != KVConnectorConfig()
