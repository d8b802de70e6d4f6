"""The measurement cannot fool itself: known differences come out as they are, and a crippled cache shows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import kvcfg
from kvcfg.evaluation import quality
from kvcfg.evaluation.text import read_text, text_windows
from kvcfg.integrations.transformers import TransformersCache

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return torch.randint(1, 97, (2, 96), generator=torch.Generator().manual_seed(0))


def cache_maker(model: Any, folder: Path, *overrides: str) -> quality.CacheMaker:
    model.config.save_pretrained(folder)
    sizes = ["devices=cpu", "workload.max_batch_size=1", "workload.max_seq_len=96"]
    experiment = kvcfg.compose(["model=hf", f"model.path={folder}", *sizes, *overrides])
    return lambda batch_size: TransformersCache(kvcfg.build(experiment, model))


def kl_of(model: Any, windows: torch.Tensor, folder: Path, *overrides: str) -> float:
    return quality.compare(model, windows, cache_maker(model, folder, *overrides), lambda: None).kl.mean().item()


def test_kl_of_known_distributions_is_exact() -> None:
    reference = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    candidate = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    got = quality.agreement(reference.repeat(1, 1), candidate, torch.tensor([0, 1]))
    assert got.kl.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-6)
    assert got.nll.item() == pytest.approx(-math.log(0.75), rel=1e-6)
    assert got.nll_reference.item() == pytest.approx(-math.log(0.5), rel=1e-6)


def test_float32_pages_agree_with_dynamic_cache_to_rounding(model: Any, windows: torch.Tensor, tmp_path: Path) -> None:
    assert kl_of(model, windows, tmp_path, "cache.kv_cache_format=float32") < 1e-10


def test_coarser_formats_lose_more(model: Any, windows: torch.Tensor, tmp_path: Path) -> None:
    names = ("float32", "float16", "bfloat16", "int8", "float8_e4m3fn")
    losses = [kl_of(model, windows, tmp_path, f"cache.kv_cache_format={name}") for name in names]
    assert losses == sorted(losses)
    assert losses[-1] > 10 * losses[1]


def test_crippled_format_shows_a_large_kl(
    model: Any, windows: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvcfg.formats.int8 import Int8

    honest = kl_of(model, windows, tmp_path, "cache.kv_cache_format=int8")
    monkeypatch.setattr(Int8, "from_elements", lambda self, elements: elements.sign().to(torch.float32) * 64)
    assert kl_of(model, windows, tmp_path, "cache.kv_cache_format=int8") > 50 * honest


def test_interval_holds_the_mean_and_narrows_with_more_predictions() -> None:
    generator = torch.Generator().manual_seed(0)

    def width(count: int) -> float:
        kl = torch.rand(count, generator=generator, dtype=torch.float64)
        item = quality.Agreement(kl, kl, kl, kl > 0.5)
        low, high = item.kl_interval()
        assert low < kl.mean() < high
        return high - low

    assert width(32 * 256) < 0.5 * width(32 * 8)


def by_depth(kl: list[float], num_windows: int) -> list[float]:
    values = torch.tensor(kl, dtype=torch.float64)
    return quality.Agreement(values, values, values, values > 0).kl_by_depth(num_windows)


def test_kl_by_depth_is_the_mean_of_eighths_over_all_windows() -> None:
    first, second = [float(position // 4) for position in range(32)], [10.0] * 32
    assert by_depth(first + second, num_windows=2) == [5 + part / 2 for part in range(8)]


def test_kl_by_depth_has_no_empty_parts_where_windows_are_short() -> None:
    assert by_depth([1.0, 2.0, 3.0], num_windows=1) == [1.0, 2.0, 3.0]


def test_noise_floor_is_far_below_any_quantized_format(model: Any, windows: torch.Tensor, tmp_path: Path) -> None:
    floor = quality.noise_floor(model, windows[0])
    assert 0 <= floor < 1e-3 * kl_of(model, windows, tmp_path, "cache.kv_cache_format=int8")


def word_tokenizer(text: str, **options: Any) -> dict[str, list[int]]:
    return {"input_ids": [len(word) for word in text.split()]}


def test_default_text_comes_with_python() -> None:
    assert len(read_text(kvcfg.ExperimentConfig().workload)) > 300_000


def test_windows_follow_each_other(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(" ".join("x" * length for length in range(1, 50)))
    changes = {"text": str(tmp_path / "text.txt"), "first_token": 10, "num_windows": 3, "window_tokens": 4}
    workload = kvcfg.ExperimentConfig(workload=changes).workload
    assert text_windows(workload, word_tokenizer).tolist() == [[11, 12, 13, 14], [15, 16, 17, 18], [19, 20, 21, 22]]


def test_short_text_is_refused_with_a_start_that_fits(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("word " * 3000)
    workload = kvcfg.ExperimentConfig(workload={"text": str(tmp_path / "text.txt")}).workload
    with pytest.raises(
        kvcfg.ConfigError, match=r"3,000 tokens, the windows end at 10,240\. Try: workload\.first_token=952"
    ):
        text_windows(workload, word_tokenizer)


def test_missing_text_is_refused_by_name() -> None:
    workload = kvcfg.ExperimentConfig(workload={"text": "/no/such/file.txt"}).workload
    with pytest.raises(kvcfg.ConfigError, match=r"workload\.text=/no/such/file\.txt: must be a readable UTF-8 file"):
        read_text(workload)
