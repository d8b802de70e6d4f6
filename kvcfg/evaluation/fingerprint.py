"""What makes two measurements the same: everything that was asked for, and everything it was asked of."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from kvcfg.config.experiment import ExperimentConfig
from kvcfg.evaluation.text import text_sha
from kvcfg.version import __version__


def fingerprint(experiment: ExperimentConfig, verb: str = "eval") -> str:
    """Identity of a measurement: sha256 of the requested config, kvcfg's version, the weights and the text.

    It is known before anything is loaded, needs no torch, and is the same in every process.
    """
    parts = {
        "verb": verb,
        "kvcfg": __version__,
        "config": experiment.model_dump(mode="json"),
        "text": text_sha(experiment.workload),
        "weights": _weights_identity(experiment),
    }
    return hashlib.sha256(_canonical(parts)).hexdigest()


def _weights_identity(experiment: ExperimentConfig) -> Any:
    """Pinned packages are their name; folders are the names, sizes and times of their files."""
    model = experiment.model
    if model.path is None:
        return model.package or model.id
    files = sorted(Path(model.path).expanduser().glob("*"))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
