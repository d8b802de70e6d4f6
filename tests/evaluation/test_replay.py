"""A trace replayed for an experiment: capacities, engines, tiers, what is refused, and what a format buys."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kvcfg
from kvcfg.evaluation.replay import Replay
from kvcfg.results.row import ResultRow
from kvcfg.results.store import ResultStore

Talks = Callable[..., list[dict[str, Any]]]
Replayed = Callable[..., Replay]

PAGE_BYTES = 64 * 2**20
"""Of 512 tokens of llama-3.1-8b in bfloat16."""


@pytest.fixture
def path(tmp_path: Path, talks: Talks, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in talks(1)))
    return path


@pytest.fixture
def replayed(path: Path) -> Replayed:
    """Replays the trace for llama-3.1-8b on an H100 with overrides and settings."""

    def run(*overrides: str, **settings: Any) -> Replay:
        base = ["model=llama-3.1-8b", "devices=h100", f"workload.trace={path}", "cache.kv_cache_page_size=512"]
        return kvcfg.replay_trace(kvcfg.compose([*base, *overrides]), **settings)

    return run


def rates(replay: Replay) -> list[float]:
    return [row.hit_rate for row in replay.rows]


def test_capacities_are_tokens_bytes_a_plan_or_all(replayed: Replayed) -> None:
    result = replayed(capacities=[5120, "10k", "1GiB", "plan", "unbounded"])
    pages = [row.num_pages for row in result.rows]
    assert pages[:3] == [10, 20, 2**30 // PAGE_BYTES]
    assert pages[3] == kvcfg.plan(result.job.experiment).num_pages
    assert pages[4] == result.trace.unique_pages
    assert all(
        (row.num_tokens, row.num_bytes) == (512 * row.num_pages, PAGE_BYTES * row.num_pages) for row in result.rows
    )


def test_a_capacity_below_one_page_finds_nothing(replayed: Replayed) -> None:
    (row,) = replayed("cache.eviction=lfu", capacities=[511]).rows
    assert (row.num_pages, row.hit_rate, row.evictions, row.peak_pages) == (0, 0.0, 0, 0)


def test_smaller_format_holds_more_tokens_in_the_same_bytes(replayed: Replayed) -> None:
    wide, narrow = (
        replayed(f"cache.kv_cache_format={name}", capacities=["3GiB"]).rows[0] for name in ("bfloat16", "int8")
    )
    assert 1.9 < narrow.num_pages / wide.num_pages < 2
    assert narrow.hit_rate > wide.hit_rate


def test_both_engines_say_the_same(replayed: Replayed) -> None:
    settings: dict[str, Any] = {"capacities": ["4k", "16k", "64k", "unbounded"]}
    curve, ledger = (replayed(engine=engine, **settings) for engine in ("curve", "ledger"))
    assert [row.engine for row in curve.rows + ledger.rows] == ["curve"] * 4 + ["ledger"] * 4
    for one, two in zip(curve.to_dict()["capacities"], ledger.to_dict()["capacities"], strict=True):
        assert one | {"engine": ""} == two | {"engine": ""}


@pytest.mark.parametrize(
    ("override", "running", "engines"),
    [
        ("cache.eviction=lru", 1, ["curve", "curve"]),
        ("cache.eviction=lru", 2, ["ledger", "ledger"]),
        ("cache.eviction=lfu", 1, ["ledger", "curve"]),
    ],
)
def test_auto_takes_the_curve_where_it_is_exact(
    replayed: Replayed, override: str, running: int, engines: list[str]
) -> None:
    result = replayed(override, capacities=["16k", "unbounded"], running=running)
    assert [row.engine for row in result.rows] == engines


def test_prefixes_that_outlive_their_ends_are_found_more(replayed: Replayed) -> None:
    head, tail = (replayed(capacities=["6k"], release=release) for release in ("head_first", "tail_first"))
    assert rates(tail) > rates(head)


TIERED = (
    "cache.kv_connector=tiered",
    "cache.kv_connector_config.disk_offload_dir=/tmp/kv",
    f"cache.kv_connector_config.host_kvcache_swap_space_gb={20 * PAGE_BYTES / 2**30}",
    f"cache.kv_connector_config.disk_offload_max_gb={60 * PAGE_BYTES / 2**30}",
)


def first_tier_that_has_it(path: Path, sizes: dict[str, int]) -> dict[str, float]:
    """Three caches that each keep the blocks used last, all of them told of every use."""
    caches: dict[str, OrderedDict[int, None]] = {name: OrderedDict() for name in sizes}
    hits = dict.fromkeys(sizes, 0)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for block in blocks_of(lines):
        having = next((name for name, cache in caches.items() if block in cache), None)
        if having is not None:
            hits[having] += 512
        for name, cache in caches.items():
            cache[block] = None
            cache.move_to_end(block)
            if len(cache) > sizes[name]:
                cache.popitem(last=False)
    total = sum(line["input_length"] for line in lines)
    return {name: found / total for name, found in hits.items()}


def blocks_of(lines: list[dict[str, Any]]) -> Iterator[int]:
    return (block for line in lines for block in line["hash_ids"])


@pytest.mark.parametrize("engine", ["curve", "ledger"])
@pytest.mark.parametrize("device", [1, 8, 40, 100])
def test_tiers_find_what_three_caches_behind_each_other_find(
    replayed: Replayed, path: Path, device: int, engine: str
) -> None:
    (row,) = replayed(*TIERED, capacities=[512 * device], engine=engine).rows
    expected = first_tier_that_has_it(path, {"device": device, "host": 20, "disk": 60})
    assert row.hit_rates == pytest.approx(expected)
    assert row.hit_rate == pytest.approx(sum(expected.values()))


def test_tiers_of_the_config_are_counted_in_pages(replayed: Replayed) -> None:
    assert dict(replayed(*TIERED).job.tiers) == {"host": 20, "disk": 60}


def test_more_tiers_never_find_less_under_another_policy(replayed: Replayed) -> None:
    alone, behind = (replayed("cache.eviction=lfu", *tiers, capacities=["4k"]).rows[0] for tiers in ((), TIERED))
    assert behind.hit_rates["device"] == alone.hit_rate < behind.hit_rate
    assert behind.saved_tokens > alone.saved_tokens


def measured(model: str, name: str, recipe: str, kl: float, page_size: int) -> ResultRow:
    known: dict[str, Any] = {field: 1.0 for field in ResultRow.__dataclass_fields__}
    known |= {"model": model, "format": name, "recipe": recipe, "kl": kl, "kl_ci": (kl, kl), "page_size": page_size}
    known |= {"fingerprint": f"{recipe}{kl}", "device": "cpu", "text_sha": "x", "created": "x"}
    known |= {"tasks": None, "stored_error": None}
    return ResultRow(**known | {"overrides": (), "config": {}, "versions": {}})


def test_kl_is_that_of_a_measured_row_of_the_same_model_and_recipe(replayed: Replayed) -> None:
    assert replayed().to_dict()["kl"] is None
    recipe = replayed("cache.kv_cache_format=int8").job.recipe
    store = ResultStore("results/rows.jsonl")
    for row in (
        measured("llama-3.1-8b", "int8", recipe, 0.1, 512),
        measured("llama-3.1-8b", "int8", recipe, 0.2, 128),
        measured("llama-3.1-8b", "int8", "another", 0.3, 512),
        measured("another", "int8", recipe, 0.4, 512),
    ):
        store.append(row)
    assert replayed("cache.kv_cache_format=int8").to_dict()["kl"] == 0.1
    assert replayed("cache.kv_cache_format=int8", "cache.kv_cache_page_size=64").to_dict()["kl"] == 0.2
    assert replayed().to_dict()["kl"] is None


@pytest.mark.parametrize(
    ("override", "settings", "told"),
    [
        (
            "workload.trace=null",
            {},
            r"workload\.trace=null: must be the path of a request trace.*Try: workload\.trace=",
        ),
        ("cache.enable_prefix_caching=false", {}, r"Try: cache\.enable_prefix_caching=true"),
        ("cache.kv_cache_page_size=48", {}, r"Try: cache\.kv_cache_page_size=512"),
        ("model=qwen3-next-80b-a3b", {}, "linear layers"),
        ("cache.eviction=lfu", {"engine": "curve"}, "engine=curve: is exact for .* Try: engine=auto"),
        ("cache.eviction=lru", {"engine": "curve", "running": 2}, "Try: engine=auto"),
        ("cache.eviction=lru", {"engine": "guess"}, "engine=guess: must be one of auto, curve or ledger"),
        ("cache.eviction=lru", {"running": 0}, "running=0: must be"),
        ("cache.eviction=lru", {"release": "now"}, "release=now: must be one of head_first or tail_first"),
        ("cache.eviction=lru", {"capacities": ["1X"]}, r"'1X' is no capacity.*Try: capacities=\["),
        ("cache.eviction=lru", {"capacities": []}, "capacities=.*must be a list"),
    ],
)
def test_what_cannot_be_replayed_is_refused(
    replayed: Replayed, override: str, settings: dict[str, Any], told: str
) -> None:
    with pytest.raises(kvcfg.ConfigError, match=told):
        replayed(override, **settings)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["devices=h100x8_dp8"], "Each of the 8 replicas"),
        (["model=gemma-3-27b"], "windowed layers"),
        (["model=llama-3.1-405b"], "no room for a page"),
        (["cache.kv_connector=dkv", "cache.kv_connector_config.block_store_endpoint=tcp://h:1"], "block store"),
    ],
)
def test_what_to_know_is_noted(replayed: Replayed, overrides: list[str], told: str) -> None:
    assert any(told in note for note in replayed(*overrides).notes)


def test_blocks_without_names_are_noted(replayed: Replayed, path: Path) -> None:
    lines = [{"input_length": 512, "hash_ids": [1]}, {"input_length": 5000, "hash_ids": [1]}]
    path.write_text("\n".join(map(json.dumps, lines)))
    assert replayed().notes == ("4,096 prompt tokens are in full blocks without a hash id and are never found.",)


def test_blocks_of_another_size_are_read_when_told(replayed: Replayed, path: Path) -> None:
    line = json.dumps({"input_length": 64, "hash_ids": [1, 2, 3, 4]})
    path.write_text(f"{line}\n{line}\n")
    assert rates(replayed("workload.trace_block_size=16", "cache.kv_cache_page_size=16"))[-1] == 0.5


def test_result_is_plain_json(replayed: Replayed) -> None:
    data = json.loads(json.dumps(replayed(*TIERED).to_dict()))
    assert (data["model"], data["page_size"], data["trace"]["requests"]) == ("llama-3.1-8b", 512, 150)
    assert set(data["capacities"][0]["hit_rates"]) == {"device", "host", "disk"}


def test_replay_loads_neither_torch_nor_numpy(path: Path) -> None:
    code = f"""
import sys
sys.modules["torch"] = sys.modules["transformers"] = sys.modules["matplotlib"] = None
import kvcfg
experiment = kvcfg.compose(["model=llama-3.1-8b", "devices=h100", "workload.trace={path}", "cache.eviction=lfu"])
print(kvcfg.replay_trace(experiment).rows[-1].hit_rate > 0, "numpy" in sys.modules)
"""
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "True False", run.stderr
