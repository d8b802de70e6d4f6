"""The file of a calibration: what goes in comes out, and what is no calibration is refused with its mend."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvcfg.errors import ConfigError
from kvcfg.integrations.calibration import Calibration, Provenance, load_calibration

MADE = Provenance(
    kvcfg_version="0.1.0",
    model="small",
    model_fingerprint="f" * 64,
    balance_rope=True,
    num_layers=3,
    text_sha="e" * 64,
    first_token=512,
    num_tokens=1024,
    page_size=64,
    created="2025-01-01T00:00:00+00:00",
)


def calibration_of(provenance: Provenance = MADE) -> Calibration:
    """Three layers, the second of which keeps no keys of heads."""
    chooser = torch.Generator().manual_seed(0)

    def column(*shape: int) -> tuple[Tensor | None, ...]:
        return torch.rand(shape, generator=chooser), None, torch.rand(shape, generator=chooser)

    return Calibration(column(2, 4, 4), column(2), column(2), column(2), provenance)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    calibration = calibration_of()
    loaded = load_calibration(calibration.save(tmp_path / "new" / "folder" / "file.safetensors"))
    assert loaded.provenance == calibration.provenance
    for name in ("key_transforms", "key_amax", "value_amax", "key_gains"):
        for found, expected in zip(getattr(loaded, name), getattr(calibration, name), strict=True):
            assert found is expected is None or torch.equal(found, expected)


def test_file_names_its_tensors_and_says_where_they_come_from(tmp_path: Path) -> None:
    path = calibration_of().save(tmp_path / "file.safetensors")
    with safe_open(path, "pt") as file:
        names, metadata = set(file.keys()), file.metadata()
    parts = ("key_transform", "key_amax", "value_amax", "key_gain")
    assert names == {f"layers.{layer}.{part}" for layer in (0, 2) for part in parts}
    assert metadata["model_fingerprint"] == "f" * 64 and metadata["balance_rope"] == "true"


def test_older_file_is_replaced_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    calibration_of().save(path)
    calibration_of(replace(MADE, page_size=16)).save(path)
    assert load_calibration(path).provenance.page_size == 16
    assert list(tmp_path.iterdir()) == [path]


def test_older_file_stays_if_the_new_one_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = calibration_of().save(tmp_path / "file.safetensors")
    monkeypatch.setattr("kvcfg.integrations.calibration.os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        calibration_of(replace(MADE, page_size=16)).save(path)
    assert load_calibration(path).provenance.page_size == 64
    assert list(tmp_path.iterdir()) == [path]


def test_figures_are_plain_data(tmp_path: Path) -> None:
    data = json.loads(json.dumps(calibration_of().to_dict()))
    assert data["model"] == "small"
    assert [layer["layer"] for layer in data["layers"]] == [0, 2]
    assert len(data["layers"][0]["key_gain"]) == 2


def test_missing_file_is_refused_with_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.st: is not there\. Try: kvcfg calibrate model=small"):
        load_calibration(tmp_path / "none.st", mend="kvcfg calibrate model=small")


Damage = Callable[[dict[str, Tensor], dict[str, str]], None]

DAMAGE: dict[str, tuple[Damage, str]] = {
    "part": (lambda tensors, _: tensors.pop("layers.2.value_amax"), "layers.2.value_amax is missing"),
    "provenance": (lambda _, said: said.pop("text_sha"), "text_sha is missing"),
    "number": (lambda _, said: said.update(num_layers="many"), "Expecting value"),
    "type": (lambda _, said: said.update(balance_rope="1"), "balance_rope=1 is no bool"),
    "shape": (
        lambda tensors, _: tensors.update({"layers.0.key_transform": torch.ones(2, 4, 5)}),
        r"layers.0.key_transform is torch.float32 \[2, 4, 5\], not float32 \[2, 5, 5\]",
    ),
    "axes": (lambda tensors, _: tensors.update({"layers.0.key_transform": torch.ones(4)}), "layers.0.key_transform is"),
    "heads": (lambda tensors, _: tensors.update({"layers.0.key_amax": torch.ones(3)}), "layers.0.key_amax is"),
    "dtype": (lambda tensors, _: tensors.update({"layers.0.key_gain": torch.ones(2).half()}), "torch.float16"),
    "nan": (lambda tensors, _: tensors["layers.0.key_transform"].fill_(torch.nan), "numbers that are not finite"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_file_is_refused(damage: str, tmp_path: Path) -> None:
    path = calibration_of().save(tmp_path / "file.safetensors")
    with safe_open(path, "pt") as file:
        names = file.keys()
        tensors, said = {name: file.get_tensor(name) for name in names}, file.metadata()
    change, reason = DAMAGE[damage]
    change(tensors, said)
    save_file(tensors, path, said)
    with pytest.raises(ConfigError, match=rf"is no file that kvcfg calibrate wrote \(.*{reason}.*Try: kvcfg calibrate"):
        load_calibration(path)


@pytest.mark.parametrize("content", [b"", b"not a calibration", b"\xff" * 64])
def test_file_of_another_kind_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="is no file that kvcfg calibrate wrote"):
        load_calibration(path)


def test_file_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    path = calibration_of().save(tmp_path / "file.safetensors")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ConfigError, match="is no file that kvcfg calibrate wrote"):
        load_calibration(path)
