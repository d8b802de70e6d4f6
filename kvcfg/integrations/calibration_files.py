"""Where the calibration of an experiment is, and which it is; known without torch."""

from __future__ import annotations

import hashlib
from pathlib import Path

from kvcfg.config.experiment import ExperimentConfig
from kvcfg.config.recipes import needs_calibration, resolve_recipe
from kvcfg.integrations.weights import cache_folder


def calibration_path(experiment: ExperimentConfig) -> Path:
    """The file that an experiment names, or the one beside the weights under the model's name."""
    asked = experiment.quantization.calibration
    if asked is not None:
        return Path(asked).expanduser()
    return cache_folder() / "calibrations" / f"{experiment.model.name}.safetensors"


def calibration_sha(experiment: ExperimentConfig) -> str | None:
    """sha256 of the file that an experiment reads; None if its recipe reads none, or it is not there yet."""
    path = calibration_path(experiment)
    if not needs_calibration(resolve_recipe(experiment)) or not path.is_file():
        return None
    return hashlib.sha256(path.read_bytes()).hexdigest()
