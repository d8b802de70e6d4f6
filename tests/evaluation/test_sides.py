"""What a word behind `kvcfg diff` may be, and what it is told when it is nothing."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from kvcfg.composition import compose
from kvcfg.config.experiment import ExperimentConfig
from kvcfg.errors import ConfigError, KvcfgError
from kvcfg.evaluation.sides import experiment_of, find_row, preset_overrides, read_side
from kvcfg.results.row import ResultRow
from kvcfg.results.store import ResultStore

INT8 = ("model=tiny", "devices=cpu", "cache.kv_cache_format=int8")


def row_of(overrides: tuple[str, ...], fingerprint: str, **figures: object) -> ResultRow:
    """A row that was never measured."""
    experiment = compose(overrides)
    plain = {
        "model": "tiny", "device": "cpu", "format": "int8", "recipe": "int8", "page_size": 128, "attention": "kvcfg",
        "bytes_per_token_planned": 1.0, "bytes_per_token_allocated": 1.0, "bits_per_element": 8.5,
        "bits_effective": 9.0, "num_predictions": 10, "ppl": 9.3, "ppl_reference": 9.2, "kl": 1e-3,
        "kl_ci": (1e-4, 2e-3), "kl_p99": 1e-2, "noise_floor": 0.0, "top1": 0.99, "decode_tokens_per_s": 10.0,
        "text_sha": "e" * 64, "versions": {"kvcfg": "0"}, "created": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    known = ResultRow.__dataclass_fields__.keys()
    figures = {name: value for name, value in (plain | figures).items() if name in known}
    return ResultRow(
        fingerprint=fingerprint,
        overrides=overrides,
        config=json.loads(experiment.model_dump_json()),
        **figures,  # type: ignore[arg-type]
    )


@pytest.fixture
def store(tmp_path: Path) -> ResultStore:
    made = ResultStore(tmp_path / "rows.jsonl")
    made.append(row_of(INT8, "aaaaaa" + "0" * 58))
    made.append(row_of(INT8, "aaaaab" + "0" * 58, created="2026-02-01T00:00:00+00:00", kl=2e-3))
    return made


def test_overrides_are_a_side_with_the_newest_row_of_their_config(store: ResultStore) -> None:
    side = read_side(" ".join(INT8), store)
    assert side.row is not None and side.row.kl == 2e-3


def test_overrides_without_a_row_are_a_side(store: ResultStore) -> None:
    assert read_side("model=tiny", store, ["devices=cpu"]).row is None


def test_beginning_of_a_fingerprint_is_its_row(store: ResultStore) -> None:
    side = read_side("aaaaaa", store)
    assert side.row is not None and side.experiment == compose(INT8)


def test_row_in_a_file_is_a_side(store: ResultStore, tmp_path: Path) -> None:
    path = tmp_path / "row.json"
    path.write_text(json.dumps(asdict(store.rows()["aaaaaa" + "0" * 58])))
    assert read_side(str(path), store).experiment == compose(INT8)


def test_command_line_of_an_engine_is_a_side(store: ResultStore) -> None:
    side = read_side("vllm serve MODEL --block-size 32", store, ["devices=cpu"])
    assert side.experiment.cache.kv_cache_page_size == 32


def test_preset_is_a_side(store: ResultStore) -> None:
    path = Path(__file__).parents[2] / "conf" / "experiment" / "chat_h100.yaml"
    assert read_side(str(path), store).experiment == compose(["experiment=chat_h100"])


def test_preset_is_its_overrides() -> None:
    path = Path(__file__).parents[2] / "conf" / "experiment" / "rollout_h100x8.yaml"
    assert "devices.reserved_gib=4" in list(preset_overrides(path)) and "model=qwen3-8b" in list(preset_overrides(path))


def test_overrides_do_not_change_a_row(store: ResultStore) -> None:
    with pytest.raises(ConfigError, match="was measured"):
        read_side("aaaaaa", store, ["cache.kv_cache_page_size=64"])


@pytest.mark.parametrize(("start", "part"), [("aaaaa", "2 rows"), ("bbbbbb", "begins no fingerprint of the 2 rows")])
def test_fingerprint_of_no_one_row_is_refused_with_one_that_is(store: ResultStore, start: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part) as caught:
        find_row(store, start)
    assert find_row(store, str(caught.value.problems[0].fix).partition("=")[2])


def test_results_without_rows_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kvcfg eval"):
        find_row(ResultStore(tmp_path / "none.jsonl"), "aaaaaa")


def test_row_of_a_config_that_is_none_any_more_is_told() -> None:
    row = row_of(INT8, "c" * 64)
    broken = ResultRow(**{**asdict(row), "config": {**row.config, "cache": {"gone": 1}}})
    with pytest.raises(KvcfgError, match="whose config differs"):
        experiment_of(broken)


def test_config_of_a_row_is_the_experiment() -> None:
    assert isinstance(experiment_of(row_of(INT8, "d" * 64)), ExperimentConfig)
