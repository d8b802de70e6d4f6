"""From a calibration file to what the cache of one experiment reads of it, once it is known to be this model's."""

from __future__ import annotations

from typing import Any

import torch

from kvcfg.composition import overrides_of
from kvcfg.config.devices import DevicesConfig
from kvcfg.config.experiment import ExperimentConfig
from kvcfg.config.presets import preset_values
from kvcfg.config.quantization import QuantizationConfig
from kvcfg.config.recipes import StoredLayers, balances_rope, layers_of, needs_calibration, stored_layers
from kvcfg.formats import Recipe
from kvcfg.formats.codec import Calibrated, LayerCalibration
from kvcfg.integrations.calibration import Calibration, load_calibration, refusal
from kvcfg.integrations.calibration_files import calibration_path
from kvcfg.integrations.weights_digest import model_fingerprint


def calibrated_groups(experiment: ExperimentConfig, model: Any) -> list[list[LayerCalibration] | None] | None:
    """What the caches of an experiment's layer groups read of its calibration; reads no file where none is needed.

    Args:
        experiment: what is built.
        model: the causal language model of transformers that will run, as it is loaded.

    Returns:
        For every group of `experiment.to_params()` its layers in order, or None where its recipe reads nothing; None
        where that is so for all.

    Raises:
        ConfigError: if the file is not there, broken, or of another model; it names the command that makes one.
    """
    groups = [layers for layers in stored_layers(experiment) if layers.group.kind != "shared"]
    if not any(_reads(layers) for layers in groups):
        return None
    calibration = load_calibration(calibration_path(experiment), mend=calibrate_command(experiment))
    check_calibration(calibration, experiment, model)
    found = [_layers(calibration, layers) if _reads(layers) else None for layers in groups]
    num_drafted = len(experiment.to_params().params) - len(groups)
    return [*found, *[None] * num_drafted]


def check_calibration(calibration: Calibration, experiment: ExperimentConfig, model: Any) -> None:
    """Raise ConfigError unless a calibration is of these layers and these weights; its page size does not matter."""
    path, mend, made = calibration_path(experiment), calibrate_command(experiment), calibration.provenance
    balanced = balances_rope(experiment)
    if made.balance_rope != balanced:
        keys = ["as the model makes them", "with balanced RoPE pairs"]
        rule = f"was made of keys {keys[made.balance_rope]}, here they come {keys[balanced]}"
        raise refusal(path, rule, mend)
    if problem := _other_layers(calibration, experiment):
        raise refusal(path, problem, mend)
    if made.model_fingerprint != model_fingerprint(model):
        raise refusal(
            path,
            f"was made of other weights of {made.model} (another checkpoint, dtype or config; for a model of your "
            f"own: kvcfg.calibrate(experiment, model).save(path))",
            mend,
        )


def calibrate_command(experiment: ExperimentConfig) -> str:
    """The command that writes the calibration an experiment reads."""
    given = [word for word in overrides_of(experiment) if not word.startswith(("workload.", "speculative."))]
    asked = experiment.quantization
    plain = asked.model_copy(update={"calibration": None})
    for name, values in preset_values("quantization").items():
        if QuantizationConfig.model_validate(values) == plain != QuantizationConfig():
            own = [word for word in given if word.startswith("quantization.calibration=")]
            given = [word for word in given if not word.startswith("quantization.")] + [f"quantization={name}", *own]
            break
    default = f"devices={DevicesConfig().name}"
    return " ".join(["kvcfg calibrate", *(word for word in given if word != default)])


def _reads(layers: StoredLayers) -> bool:
    return bool(layers.group.elements_per_token) and needs_calibration(layers.recipe)


def _layers(calibration: Calibration, layers: StoredLayers) -> list[LayerCalibration]:
    return [_layer(calibration, layer, layers.recipe) for layer in layers_of(layers.group)]


def _layer(calibration: Calibration, layer: int, recipe: Recipe) -> LayerCalibration:
    static = recipe.scale_source == "static"
    keys = Calibrated(
        calibration.key_transforms[layer] if recipe.transform == "balanced" else None,
        calibration.key_amax[layer] if static else None,
    )
    return LayerCalibration(keys, Calibrated(None, calibration.value_amax[layer] if static else None))


def _other_layers(calibration: Calibration, experiment: ExperimentConfig) -> str | None:
    """How the layers of a calibration differ from those that read it, or None."""
    transforms = calibration.key_transforms
    if len(transforms) != experiment.model.num_layers:
        return f"is of a model of {len(transforms)} layers, {experiment.model.name} has {experiment.model.num_layers}"
    for layers in stored_layers(experiment):
        if not _reads(layers):
            continue
        for layer in layers_of(layers.group):
            found, planned = transforms[layer], (layers.group.n_kv_heads, layers.group.head_dim)
            if found is None:
                return f"has nothing of layer {layer}, whose recipe is {layers.recipe}"
            if found.shape[:2] != torch.Size(planned):
                has = f"{found.shape[0]} KV heads of width {found.shape[1]}"
                return f"has {has} in layer {layer}, {experiment.model.name} has {planned[0]} of {planned[1]}"
    return None
