"""What makes two measurements the same: everything that was asked for, and everything it was asked of."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from kvcfg.cache.namespace import model_identity
from kvcfg.config.experiment import ExperimentConfig
from kvcfg.evaluation.text import text_sha
from kvcfg.integrations.calibration_files import calibration_sha
from kvcfg.version import __version__


def fingerprint(experiment: ExperimentConfig, verb: str = "eval") -> str:
    """Identity of a measurement: sha256 of the requested config, kvcfg's version, weights, calibration and text.

    It is known before anything is loaded, needs no torch, and is the same in every process.
    """
    parts = {
        "verb": verb,
        "kvcfg": __version__,
        "config": experiment.model_dump(mode="json"),
        "text": text_sha(experiment.workload),
        "weights": model_identity(experiment.model),
        "calibration": calibration_sha(experiment),
    }
    return hashlib.sha256(_canonical(parts)).hexdigest()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
