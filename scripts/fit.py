"""`kvcfg fit` as a Hydra application: what would make a workload fit."""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from kvcfg.cli import main
from kvcfg.cli.hydra_app import run_job
from kvcfg.composition.composer import CONFIG_PATH, VERSION_BASE
from kvcfg.config.structured import register

register("fit")


@hydra.main(config_path=CONFIG_PATH, config_name="fit", **VERSION_BASE)
def app(config: DictConfig) -> None:
    """One job: print what would make one workload fit."""
    run_job("fit", config)


if __name__ == "__main__":
    sys.exit(main(["fit", *sys.argv[1:]]))
