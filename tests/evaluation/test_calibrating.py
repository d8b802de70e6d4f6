"""Calibrating small random models from end to end: what comes out is theirs, and is worth what it says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kvcfg
from kvcfg.errors import ConfigError, ShapeError
from kvcfg.evaluation import calibrating
from kvcfg.evaluation.key_balance import gained_bits
from kvcfg.evaluation.key_moments import MomentCollector
from kvcfg.integrations import loading
from kvcfg.integrations.calibration import Calibration
from kvcfg.integrations.rope_balance import balance_rope_pairs

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}


@pytest.fixture(autouse=True)
def text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random tokens in place of a text, so that no tokenizer is needed."""
    for module in (calibrating, loading):
        monkeypatch.setattr(module, "load_tokenizer", lambda experiment: None)
    monkeypatch.setattr(calibrating, "text_windows", lambda workload, _: windows_of(workload))


def windows_of(workload: Any) -> Tensor:
    chooser = torch.Generator().manual_seed(workload.first_token)
    return torch.randint(1, 97, (workload.num_windows, workload.window_tokens), generator=chooser)


def model_of(folder: Path, family: str = "llama") -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **SIZES)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(folder)
    return model


def experiment_of(folder: Path, *overrides: str) -> kvcfg.ExperimentConfig:
    small = ["devices=cpu", "workload.window_tokens=256", "cache.kv_cache_page_size=32"]
    return kvcfg.compose(["model=hf", f"model.path={folder}", *small, *overrides])


def transforms_of(calibration: Calibration) -> Tensor:
    return torch.stack([transform for transform in calibration.key_transforms if transform is not None])


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_matrices_gain_on_tokens_they_were_not_made_from(family: str, tmp_path: Path) -> None:
    model, experiment = model_of(tmp_path, family), experiment_of(tmp_path)
    calibration = kvcfg.calibrate(experiment, model)
    collector = MomentCollector(experiment.model.layer_groups, 32)
    collector.run(model, windows_of(replace_token(experiment, 999).workload)[0])
    for layer, moments in collector.layers.items():
        transform, said = calibration.key_transforms[layer], calibration.key_gains[layer]
        assert transform is not None and said is not None
        gains = gained_bits(moments.keys, moments.queries, transform.double())
        assert gains.min() > 0
        torch.testing.assert_close(gains, said.double(), rtol=0.3, atol=0.02)


def replace_token(experiment: kvcfg.ExperimentConfig, first_token: int) -> kvcfg.ExperimentConfig:
    workload = experiment.workload.model_copy(update={"first_token": first_token})
    return experiment.model_copy(update={"workload": workload})


def test_file_says_what_it_was_made_from(tmp_path: Path) -> None:
    model = model_of(tmp_path / "small")
    made = kvcfg.calibrate(experiment_of(tmp_path / "small"), model).provenance
    assert (made.model, made.num_layers, made.num_tokens, made.page_size) == ("small", 2, 512, 32)
    assert (made.kvcfg_version, made.first_token, made.balance_rope) == (kvcfg.__version__, 8192, False)


def test_same_model_and_text_give_the_same(tmp_path: Path) -> None:
    model, experiment = model_of(tmp_path), experiment_of(tmp_path)
    one, two = kvcfg.calibrate(experiment, model), kvcfg.calibrate(experiment, model)
    assert torch.equal(transforms_of(one), transforms_of(two))
    assert replace(one.provenance, created="") == replace(two.provenance, created="")


@torch.no_grad()
def test_provenance_differs_when_one_weight_changes(tmp_path: Path) -> None:
    model, experiment = model_of(tmp_path), experiment_of(tmp_path)
    before = kvcfg.calibrate(experiment, model).provenance.model_fingerprint
    model.lm_head.weight[5, 6] += 1e-3
    assert kvcfg.calibrate(experiment, model).provenance.model_fingerprint != before


def test_model_is_loaded_with_balanced_pairs_where_the_recipe_asks(tmp_path: Path) -> None:
    model = model_of(tmp_path)
    loaded = kvcfg.calibrate(experiment_of(tmp_path, "quantization=bits4_calibrated"))
    balance_rope_pairs(model)
    own = kvcfg.calibrate(experiment_of(tmp_path, "quantization=bits4_calibrated"), model)
    assert loaded.provenance.balance_rope is True
    assert loaded.provenance.model_fingerprint == own.provenance.model_fingerprint
    assert torch.equal(transforms_of(loaded), transforms_of(own))


def test_training_model_is_run_without_dropout_and_left_training(tmp_path: Path) -> None:
    model, experiment = model_of(tmp_path), experiment_of(tmp_path)
    expected = transforms_of(kvcfg.calibrate(experiment, model))
    model.config.attention_dropout = 0.5
    model.model.layers[0].self_attn.attention_dropout = 0.5
    model.train()
    assert torch.equal(transforms_of(kvcfg.calibrate(experiment, model)), expected)
    assert model.training


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("workload.window_tokens=8", "must be at least 16 to calibrate on.*Try: workload.window_tokens=1024"),
        ("workload.window_tokens=4096", "must fit in the model's context of 2048. Try: workload.window_tokens=2048"),
    ],
)
def test_windows_that_cannot_be_are_refused(override: str, message: str, tmp_path: Path) -> None:
    model_of(tmp_path)
    with pytest.raises(ConfigError, match=message):
        kvcfg.calibrate(experiment_of(tmp_path, override))


@torch.no_grad()
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = model_of(tmp_path)
    model.model.layers[1].self_attn.k_proj.weight[0] = torch.nan
    with pytest.raises(ConfigError, match="in layer 1 that are no finite numbers"):
        kvcfg.calibrate(experiment_of(tmp_path), model)


def test_model_of_another_shape_is_refused(tmp_path: Path) -> None:
    model_of(tmp_path)
    with pytest.raises(ShapeError, match="the model has 2 layers of 6 query heads"):
        kvcfg.calibrate(kvcfg.compose(["model=tiny", "workload.window_tokens=64"]), model_of(tmp_path))
