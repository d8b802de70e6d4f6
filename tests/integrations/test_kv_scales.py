"""Static scales as checkpoints have them: names, shapes and values, written and read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from kvcfg.composition import compose
from kvcfg.errors import ConfigError
from kvcfg.integrations.calibration import Calibration
from kvcfg.integrations.kv_scales import CONFIG_FILE, KVScales, read_scales, write_scales
from tests.integrations.test_calibration import MADE, calibration_of

STATIC = ("model=tiny", "devices=cpu", "cache.kv_cache_format=float8_e4m3fn", "quantization.scale_source=static")


@pytest.fixture
def calibration() -> Calibration:
    return calibration_of(replace(MADE, balance_rope=False))


def test_scale_is_the_largest_magnitude_over_the_largest_number(calibration: Calibration) -> None:
    scales = KVScales.of(calibration)
    amax = calibration.key_amax[0]
    assert amax is not None and scales.keys[0] is not None
    assert scales.keys[0].item() == pytest.approx(amax.max().item() / 448)
    assert scales.keys[1] is None and not scales.per_head


def test_names_and_shapes_are_those_of_checkpoints(calibration: Calibration, tmp_path: Path) -> None:
    with safe_open(KVScales.of(calibration).save(tmp_path / "new"), "pt") as file:
        shapes = {name: tuple(file.get_tensor(name).shape) for name in file.keys()}  # noqa: SIM118
    names = {f"model.layers.{layer}.self_attn.{side}_scale" for layer in (0, 2) for side in "kv"}
    assert shapes == dict.fromkeys(names, (1,))


def test_scales_of_heads_have_three_axes_as_llm_compressor_writes_them(calibration: Calibration) -> None:
    tensors = KVScales.of(calibration, per_head=True).tensors()
    assert {tuple(tensor.shape) for tensor in tensors.values()} == {(2, 1, 1)}


@pytest.mark.parametrize("per_head", [False, True])
def test_what_is_written_is_read(calibration: Calibration, per_head: bool, tmp_path: Path) -> None:
    scales = KVScales.of(calibration, per_head=per_head)
    found = read_scales(scales.save(tmp_path).parent)
    for mine, its in zip((*scales.keys, *scales.values), (*found.keys, *found.values), strict=True):
        assert mine is its is None or torch.equal(mine, its)


def test_config_section_says_how_scales_are_shared(calibration: Calibration, tmp_path: Path) -> None:
    KVScales.of(calibration, per_head=True).save(tmp_path)
    scheme = json.loads((tmp_path / CONFIG_FILE).read_text())["kv_cache_scheme"]
    assert (scheme["strategy"], scheme["num_bits"], scheme["type"], scheme["dynamic"]) == (
        "attn_head",
        8,
        "float",
        False,
    )


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.3.self_attn.k_proj.k_scale",
        "model.layers.3.self_attn.attn.k_scale",
        "model.layers.3.self_attn.k_scale",
    ],
)
def test_names_of_other_tools_are_read(name: str, tmp_path: Path) -> None:
    save_file(
        {name: torch.tensor(0.5), "model.layers.3.self_attn.k_proj.weight_scale": torch.ones(1)},
        tmp_path / "a.safetensors",
    )
    scales = read_scales(tmp_path)
    assert len(scales.keys) == 4 and scales.keys[3] is not None and scales.keys[3].tolist() == [0.5]
    assert scales.values[3] is None


def test_read_scales_become_a_calibration_with_the_same_scales(calibration: Calibration, tmp_path: Path) -> None:
    scales = read_scales(KVScales.of(calibration).save(tmp_path).parent)
    back = scales.to_calibration((4, 4, 4), (2, 2, 2), calibration.provenance)
    again = KVScales.of(back)
    for mine, its in zip(scales.keys, again.keys, strict=True):
        assert mine is its is None or torch.allclose(mine, its)


def test_experiment_writes_the_scales_of_its_calibration(calibration: Calibration, tmp_path: Path) -> None:
    path = calibration.save(tmp_path / "own.safetensors")
    experiment = compose([*STATIC, f"quantization.calibration={path}"])
    assert read_scales(write_scales(experiment, tmp_path / "scales")).keys[0] is not None


def test_scales_of_balanced_keys_are_refused(tmp_path: Path) -> None:
    """Engines load weights as they are, so those scales would be of other keys."""
    path = calibration_of().save(tmp_path / "own.safetensors")
    with pytest.raises(ConfigError, match="balance_rope=false"):
        write_scales(compose([*STATIC, f"quantization.calibration={path}"]), tmp_path)


@pytest.mark.parametrize("overrides", [["cache.kv_cache_format=bfloat16"], ["cache.kv_cache_format=int8", STATIC[-1]]])
def test_recipe_without_such_scales_is_refused(overrides: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        write_scales(compose(["model=tiny", "devices=cpu", *overrides]), tmp_path)


def test_file_without_scales_is_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match="no k_scale"):
        read_scales(tmp_path)
