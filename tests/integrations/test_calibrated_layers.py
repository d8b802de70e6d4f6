"""A calibration is read only by the model it was made of; anything else is refused with the command that mends it."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import kvcfg
from kvcfg.cli.arguments import read_arguments
from kvcfg.errors import ConfigError
from kvcfg.evaluation.fingerprint import fingerprint
from kvcfg.integrations.calibrated_layers import calibrate_command, calibrated_groups, check_calibration
from kvcfg.integrations.calibration import Calibration, Provenance
from kvcfg.integrations.calibration_files import calibration_path
from kvcfg.integrations.weights_digest import model_fingerprint

transformers = pytest.importorskip("transformers")

BALANCED = ["quantization=bits4_calibrated"]
STATIC = ["cache.kv_cache_format=int8", "quantization.granularity=head", "quantization.scale_source=static"]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A small model, saved in a folder; nothing is kept in the user's own cache folder."""
    monkeypatch.setenv("KVCFG_HOME", str(tmp_path / "home"))
    sizes = {"vocab_size": 31, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 3}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    made.save_pretrained(tmp_path / "small")
    return made


def experiment_of(folder: Path, *overrides: str) -> kvcfg.ExperimentConfig:
    sizes = ["devices=cpu", "workload.max_seq_len=64", "workload.max_batch_size=1"]
    return kvcfg.compose(["model=hf", f"model.path={folder / 'small'}", *sizes, *(overrides or BALANCED)])


def calibration_of(model: Any, *, heads: int = 2, dim: int = 8, num_layers: int = 3, **changes: Any) -> Calibration:
    known = {name: "" for name in ("kvcfg_version", "text_sha", "created")}
    made = Provenance(
        **known,
        model="small",
        model_fingerprint=model_fingerprint(model),
        balance_rope=True,
        num_layers=num_layers,
        first_token=0,
        num_tokens=64,
        page_size=64,
    )
    matrices = tuple((layer + 1.0) * torch.eye(dim).repeat(heads, 1, 1) for layer in range(num_layers))
    keys, values, gains = (tuple(size + torch.arange(heads).float() for _ in matrices) for size in (1.0, 5.0, 0.5))
    return Calibration(matrices, keys, values, gains, replace(made, **changes))


def test_layers_get_their_matrices(model: Any, tmp_path: Path) -> None:
    experiment = experiment_of(tmp_path)
    calibration_of(model).save(calibration_path(experiment))
    groups = calibrated_groups(experiment, model)
    assert groups is not None and groups[0] is not None
    found = [layer.keys.matrices for layer in groups[0]]
    assert [matrix[0, 0, 0].item() for matrix in found if matrix is not None] == [1, 2, 3]
    assert all(layer.keys.amax is layer.values.amax is layer.values.matrices is None for layer in groups[0])


def test_layers_get_their_magnitudes_where_scales_are_static(model: Any, tmp_path: Path) -> None:
    experiment = experiment_of(tmp_path, *STATIC)
    calibration_of(model).save(calibration_path(experiment))
    groups = calibrated_groups(experiment, model)
    assert groups is not None and groups[0] is not None
    keys, values = groups[0][2]
    assert keys.matrices is None and keys.amax is not None and values.amax is not None
    assert (keys.amax.tolist(), values.amax.tolist()) == ([1, 2], [5, 6])


def test_layers_with_a_format_of_their_own_get_those_of_their_place(model: Any, tmp_path: Path) -> None:
    experiment = experiment_of(tmp_path, *BALANCED, "quantization.layers=[{layers:[1],format:bfloat16}]")
    calibration_of(model).save(calibration_path(experiment))
    groups = calibrated_groups(experiment, model)
    assert groups is not None
    found = [None if group is None else [layer.keys.matrices[0, 0, 0].item() for layer in group] for group in groups]
    assert found == [[1, 3], None]


def test_no_file_is_needed_where_nothing_is_read(model: Any, tmp_path: Path) -> None:
    assert calibrated_groups(experiment_of(tmp_path, "cache.kv_cache_format=int8"), model) is None


def test_file_lies_beside_the_weights_unless_told_otherwise(model: Any, tmp_path: Path) -> None:
    assert calibration_path(experiment_of(tmp_path)) == tmp_path / "home" / "calibrations" / "small.safetensors"
    told = experiment_of(tmp_path, *BALANCED, f"quantization.calibration={tmp_path}/own.st")
    assert calibration_path(told) == tmp_path / "own.st"


def test_page_size_does_not_matter(model: Any, tmp_path: Path) -> None:
    check_calibration(calibration_of(model, page_size=16), experiment_of(tmp_path), model)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "balance": ({"balance_rope": False}, "was made of keys as the model makes them, here they come with balanced RoPE"),
    "layers": ({"num_layers": 4}, "is of a model of 4 layers, small has 3"),
    "heads": ({"heads": 3}, "has 3 KV heads of width 8 in layer 0, small has 2 of 8"),
    "width": ({"dim": 16}, "has 2 KV heads of width 16 in layer 0, small has 2 of 8"),
    "weights": ({"model_fingerprint": "0"}, "was made of other weights of small"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_calibration_of_another_model_is_refused(reason: str, model: Any, tmp_path: Path) -> None:
    changes, message = REFUSED[reason]
    experiment = experiment_of(tmp_path)
    calibration_of(model, **changes).save(calibration_path(experiment))
    with pytest.raises(ConfigError, match=message) as caught:
        calibrated_groups(experiment, model)
    assert caught.value.problems[0].fix == calibrate_command(experiment)


def test_layer_that_has_nothing_is_refused(model: Any, tmp_path: Path) -> None:
    calibration = calibration_of(model)
    without = replace(calibration, key_transforms=(*calibration.key_transforms[:2], None))
    with pytest.raises(ConfigError, match="has nothing of layer 2"):
        check_calibration(without, experiment_of(tmp_path), model)


@torch.no_grad()
def test_one_weight_that_changed_is_refused(model: Any, tmp_path: Path) -> None:
    calibration, experiment = calibration_of(model), experiment_of(tmp_path)
    check_calibration(calibration, experiment, model)
    model.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-3
    with pytest.raises(ConfigError, match="another checkpoint"):
        check_calibration(calibration, experiment, model)


def test_missing_file_is_refused_with_the_command_that_makes_it(model: Any, tmp_path: Path) -> None:
    experiment = experiment_of(tmp_path)
    with pytest.raises(
        ConfigError, match=r"small\.safetensors: is not there\. Try: kvcfg calibrate .*bits4_calibrated"
    ):
        calibrated_groups(experiment, model)


@pytest.mark.parametrize(
    "overrides",
    [
        BALANCED,
        STATIC,
        [*BALANCED, "quantization.calibration=/tmp/own file.st"],
        [*BALANCED, "quantization.balance_rope=false"],
        [*BALANCED, "cache.kv_cache_page_size=32", "workload.num_windows=1"],
    ],
    ids=" ".join,
)
def test_command_makes_what_the_experiment_reads(overrides: list[str], model: Any, tmp_path: Path) -> None:
    experiment = experiment_of(tmp_path, *overrides)
    program, *argv = shlex.split(calibrate_command(experiment))
    arguments = read_arguments(argv)
    again = kvcfg.compose(arguments.overrides, config_name="calibrate")
    assert (program, arguments.verb) == ("kvcfg", "calibrate")
    assert calibration_path(again) == calibration_path(experiment)
    assert (again.quantization, again.model) == (experiment.quantization, experiment.model)


def test_command_for_a_preset_is_short() -> None:
    assert calibrate_command(kvcfg.compose(BALANCED)) == (
        "kvcfg calibrate model=smollm2-135m quantization=bits4_calibrated"
    )


def test_figures_with_another_calibration_are_another_measurement(model: Any, tmp_path: Path) -> None:
    experiment, plain = experiment_of(tmp_path, *BALANCED), experiment_of(tmp_path, "quantization=bits4")
    names, plain_names = {fingerprint(experiment)}, {fingerprint(plain)}
    for page_size in (16, 32):
        calibration_of(model, page_size=page_size).save(calibration_path(experiment))
        names.add(fingerprint(experiment))
        plain_names.add(fingerprint(plain))
    assert (len(names), len(plain_names)) == (3, 1)
