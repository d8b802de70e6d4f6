from __future__ import annotations

import json
import subprocess
import sys

PROGRAM = """
import json, sys
from kvcfg.config.experiment import ExperimentConfig
from kvcfg.planning import fit, plan
experiment = ExperimentConfig.model_validate({"devices": {"name": "h100", "kind": "gpu", "memory_gib": 80}})
plan(experiment).table(), plan(experiment).to_dict(), fit(experiment).table()
heavy = ("torch", "hydra", "omegaconf", "transformers", "numpy", "rich")
print(json.dumps([name for name in heavy if name in sys.modules]))
"""


def test_planning_needs_neither_torch_nor_hydra() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
