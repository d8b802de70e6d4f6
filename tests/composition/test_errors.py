"""Every way to get an override wrong: one report, the key, the rule, and what to type instead."""

from __future__ import annotations

import pytest

from kvcfg.composition import compose
from kvcfg.errors import ConfigError

WRONG = [
    ("cache=fp9", "cache", "must be one of default, fp8, int8, offload or page16", "cache=fp8"),
    ("model=llama3.1-8b", "model", "must be one of", "model=llama-3.1-8b"),
    ("cache=null", "cache", "must be one of", "cache=default"),
    ("cache={kv_cache_page_size:64,other:1}", "cache", "must be one of", "cache=default"),
    ("experiment=rollout", "experiment", "must be one of", "experiment=rollout_h100x8"),
    ("experimnt=chat_h100", "experimnt", "is no group", "experiment=chat_h100"),
    ("cahce=fp8", "cahce", "is no key", "cache=fp8"),
    ("cache.kv_cache_page_sise=64", "cache.kv_cache_page_sise", "is no key", "cache.kv_cache_page_size=64"),
    ("+cache.kv_cache_page_sise=64", "cache.kv_cache_page_sise", "is no key", "cache.kv_cache_page_size=64"),
    ("kv_cache_format=int8", "kv_cache_format", "is no key", "cache.kv_cache_format=int8"),
    ("cache.kv_connector_config.disk_dir=/d", "cache.kv_connector_config.disk_dir", "is no key", None),
    ("output=json", "output", "leave it out here", None),
    ("cache.kv_cache_page_size=many", "cache.kv_cache_page_size", "must be a whole number between 1 and 4096", None),
    (
        "cache.kv_cache_page_size=64.5",
        "cache.kv_cache_page_size",
        "must be a whole number",
        "cache.kv_cache_page_size=64",
    ),
    ("cache.kv_cache_page_size=5000", "cache.kv_cache_page_size", "must be a whole", "cache.kv_cache_page_size=4096"),
    ("cache.kv_cache_page_size=null", "cache.kv_cache_page_size", "must be a whole", "cache.kv_cache_page_size=128"),
    ("cache.kv_cache_page_size=???", "cache.kv_cache_page_size", "must be given", "cache.kv_cache_page_size=128"),
    ("cache.kv_cache_page_size=${no.key}", "cache.kv_cache_page_size", "not found", "cache.kv_cache_page_size=128"),
    ("cache.kv_cache_page_size=16,32", "cache.kv_cache_page_size", "add -m", "cache.kv_cache_page_size=16"),
    ("cache.kv_cache_page_size=range(1,9)", "cache.kv_cache_page_size", "add -m", None),
    ("cache.enable_prefix_caching=12", "cache.enable_prefix_caching", "must be true or false", None),
    ("cache.device_memory_utilization=1.5", "cache.device_memory_utilization", "at most 1", None),
    ("cache.kv_cache_memory_bytes=8XB", "cache.kv_cache_memory_bytes", "is no size", None),
    (
        "cache.kv_cache_format=fp8",
        "cache.kv_cache_format",
        "must be one of float32",
        "cache.kv_cache_format=float8_e4m3fn",
    ),
    ("cache.kv_connector=tierd", "cache.kv_connector", "must be one of null, local", "cache.kv_connector=tiered"),
    ("cache.config_file=/no/file", "cache.config_file", "cannot be read", "cache.config_file=null"),
    ("model.layer_groups.0.kind=ful", "model.layer_groups.0.kind", "must be one of", "model.layer_groups.0.kind=full"),
    ("model.layer_groups=[{kind:full}]", "model.layer_groups.0.num_layers", "must be given", None),
    ("model.layer_groups=3", "model.layer_groups", "must be a list", None),
    ("speculative.num_speculative_tokens=3", "speculative.num_speculative_tokens", "needs a", None),
    ("workload.text=a b,c", "workload.text", "add -m", "workload.text=a b"),
    ("workload.text=a:b{", "workload.text", "cannot be read", "workload.text=\"'a:b{'\""),
    ("cache", "cache", "write KEY=VALUE", None),
    ("=3", "=3", "write KEY=VALUE", None),
    ("cache@kv.cache=fp8", "cache@kv.cache", "cannot be moved", "cache=fp8"),
    ("~cache.kv_cache_format", "~cache.kv_cache_format", "cannot be left out", "cache.kv_cache_format=null"),
]


@pytest.mark.parametrize(("override", "key", "rule", "fix"), WRONG, ids=[item[0] for item in WRONG])
def test_wrong_override_is_told_with_key_rule_and_fix(override: str, key: str, rule: str, fix: str | None) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([override])
    problem = caught.value.problems[0]
    assert problem.key == key
    assert rule in problem.rule
    if fix is not None:
        assert problem.fix == fix


@pytest.mark.parametrize("override", [item[0] for item in WRONG])
def test_nothing_of_the_libraries_shows_in_a_message(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([override])
    for word in ("full_key", "object_type", "pydantic", "omegaconf", "hydra", "Error", "ConfigAttribute", "<class"):
        assert word not in str(caught.value)


@pytest.mark.parametrize("fix", sorted({item[3] for item in WRONG if item[3] and "'" not in item[3]}))
def test_offered_override_is_accepted(fix: str) -> None:
    key = fix.partition("=")[0]
    try:
        compose([fix])
    except ConfigError as error:
        assert key not in [problem.key for problem in error.problems]


def test_all_problems_come_in_one_report() -> None:
    overrides = ["cache=fp9", "cahce.kv_cache_format=int8", "devices.count=many", "cache.kv_cache_page_size=0",
                 "workload.max_seq_len=9000", "a b", "speculative.num_speculative_tokens=3"]  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    assert [problem.key for problem in caught.value.problems] == [
        "cache",
        "cahce.kv_cache_format",
        "devices.count",
        "a b",
        "cache.kv_cache_page_size",
        "speculative.num_speculative_tokens",
        "workload.max_seq_len",
    ]


def test_wrong_preset_makes_no_conflict_with_the_default_in_its_place() -> None:
    with pytest.raises(ConfigError) as caught:
        compose(["model=lama-3.1-8b", "devices=h100x8"])
    assert [problem.key for problem in caught.value.problems] == ["model"]


def test_report_has_a_line_for_each_problem() -> None:
    with pytest.raises(ConfigError) as caught:
        compose(["cache.kv_cache_page_size=0", "devices.count=0"])
    assert str(caught.value).splitlines() == [
        "cache.kv_cache_page_size=0: must be a whole number between 1 and 4096. Try: cache.kv_cache_page_size=1",
        "devices.count=0: must be a whole number of at least 1. Try: devices.count=1",
    ]
