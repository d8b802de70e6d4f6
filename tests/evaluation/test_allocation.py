"""Formats of each layer, found on a small random model with a tokenizer of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import kvcfg
from kvcfg.config.experiment import ExperimentConfig
from kvcfg.evaluation import allocation
from kvcfg.evaluation.allocation import FoundFormats, find_formats
from kvcfg.evaluation.allocation_probes import squared_errors
from kvcfg.evaluation.allocation_text import recipe_overrides
from kvcfg.planning.layer_formats import FOUND_FORMATS, starting_point

transformers = pytest.importorskip("transformers")

NUM_LAYERS = 3
QUIET = 1


@pytest.fixture(scope="module")
def model() -> Any:
    """A random model in which what one layer reads of its cache decides little."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": NUM_LAYERS}
    config = transformers.LlamaConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.25, max_position_embeddings=256
    )
    made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        made.model.layers[QUIET].self_attn.o_proj.weight.mul_(0.02)
    return made


@pytest.fixture
def small(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Overrides that name the model, and a text that its tokenizer reads as one token a word."""
    model.config.save_pretrained(tmp_path)
    numbers = torch.randint(1, 97, (600,), generator=torch.Generator().manual_seed(0)).tolist()
    (tmp_path / "text.txt").write_text(" ".join("x" * number for number in numbers))

    def tokenizer(text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}

    monkeypatch.setattr(allocation, "load_tokenizer", lambda experiment: tokenizer)
    monkeypatch.setattr("kvcfg.evaluation.measure.load_tokenizer", lambda experiment: tokenizer)
    text = [f"workload.text={tmp_path}/text.txt", "workload.first_token=0", "workload.window_tokens=96"]
    fed = ["workload.decode_tokens=2", "cache.kv_cache_page_size=16"]
    return ["model=hf", f"model.path={tmp_path}", "devices=cpu", *text, *fed]


def found_with(model: Any, words: list[str], max_kl: float | None = None) -> FoundFormats:
    return find_formats(kvcfg.compose(["quantization=auto", *words]), model, max_kl=max_kl)


def test_layer_that_decides_little_gets_the_fewest_bits(model: Any, small: list[str]) -> None:
    formats = found_with(model, small, max_kl=0.05).formats
    assert len(formats) == 2 * NUM_LAYERS
    fewest = {side.layer for side, name in formats.items() if name == FOUND_FORMATS[0]}
    assert fewest == {QUIET}


def test_prediction_keeps_to_the_gate_and_is_near_what_is_measured(model: Any, small: list[str]) -> None:
    found = found_with(model, small, max_kl=0.05)
    assert 0.03 < found.kl_predicted <= 0.05
    assert found.row.kl == pytest.approx(found.kl_predicted, rel=0.5)


def test_overrides_compose_to_what_was_measured(model: Any, small: list[str]) -> None:
    found = found_with(model, small, max_kl=0.05)
    assert kvcfg.compose([*small, *found.overrides]) == found.experiment


def test_a_stricter_gate_takes_more_bytes(model: Any, small: list[str]) -> None:
    loose, strict = (found_with(model, small, max_kl=max_kl).row for max_kl in (0.5, 0.04))
    assert strict.bytes_per_token_planned > loose.bytes_per_token_planned
    assert strict.kl < loose.kl


def test_budget_is_used_and_kept_to(model: Any, small: list[str]) -> None:
    sequences = [*small, "workload.max_batch_size=2", "workload.max_seq_len=160"]
    start = kvcfg.compose(["quantization=bits3", *sequences])
    budget = f"cache.kv_cache_memory_bytes={kvcfg.plan(start).kv_bytes}"
    found = found_with(model, [*sequences, budget])
    assert kvcfg.plan(found.experiment).fits
    assert found.row.kl < kvcfg.evaluate(start, model).kl


def test_formats_are_judged_on_windows_that_they_were_not_found_on(model: Any, small: list[str]) -> None:
    found = found_with(model, small, max_kl=0.05)
    assert found.found_from == 2 * 96
    assert found.row.num_predictions == 2 * 95


def test_text_that_leaves_no_window_to_find_them_on_is_refused(model: Any, small: list[str]) -> None:
    with pytest.raises(kvcfg.ConfigError, match="the text has 600 tokens"):
        found_with(model, [*small, "workload.num_windows=6"], max_kl=0.05)


def test_gate_below_what_the_finest_format_loses_is_refused(model: Any, small: list[str]) -> None:
    with pytest.raises(kvcfg.errors.GateError, match=r"all layers in int8 KL is .* Try: gate\.max_kl="):
        found_with(model, small, max_kl=1e-9)


def test_gate_that_the_budget_cannot_keep_is_refused(model: Any, small: list[str]) -> None:
    sequences = [*small, "workload.max_batch_size=2", "workload.max_seq_len=160"]
    planned = kvcfg.plan(kvcfg.compose(["quantization=bits2", *sequences]))
    with pytest.raises(kvcfg.errors.GateError, match="in the memory given"):
        found_with(model, [*sequences, f"cache.kv_cache_memory_bytes={planned.kv_bytes}"], max_kl=0.04)


def test_budget_below_the_smallest_formats_is_refused_before_anything_runs(small: list[str]) -> None:
    words = [*small, "workload.max_batch_size=2", "cache.kv_cache_memory_bytes=1000"]
    with pytest.raises(kvcfg.CapacityError, match="all layers in gauss2"):
        found_with(None, words)


def test_neither_gate_nor_budget_is_refused(small: list[str]) -> None:
    with pytest.raises(kvcfg.ConfigError, match=r"Try: gate\.max_kl=0\.005"):
        found_with(None, small)


def test_errors_of_formats_are_those_of_the_best_levels_for_normal_numbers() -> None:
    """Max's table of 1960, where one scale serves all numbers; that of a single head suits its numbers better."""
    errors = squared_errors(starting_point(kvcfg.compose(["quantization=auto"])))
    for name, published in {"gauss2": 0.1175, "gauss3": 0.03454, "gauss4": 0.009497, "gauss5": 0.002499}.items():
        assert 0.6 * published < errors[name] < published
    assert list(errors.values()) == sorted(errors.values(), reverse=True)


@pytest.mark.parametrize(
    "own",
    [
        [],
        ["quantization.transform=hadamard", "quantization.sink_tokens=0"],
        ["quantization.transform=balanced", "quantization.calibration='a file.safetensors'"],
        ["quantization.granularity=block", "quantization.quantization_granularity=32"],
    ],
)
def test_recipe_of_ones_own_is_kept_in_the_overrides(own: list[str]) -> None:
    start: ExperimentConfig = starting_point(kvcfg.compose(["quantization=auto", *own]))
    words = recipe_overrides(start)
    assert words[0] == "quantization=bits4"
    assert kvcfg.compose(words) == start
