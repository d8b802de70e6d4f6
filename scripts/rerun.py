"""`kvcfg rerun` as a Hydra application: a measured row once more."""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from kvcfg.cli import main
from kvcfg.cli.hydra_app import run_job
from kvcfg.composition.composer import CONFIG_PATH, VERSION_BASE
from kvcfg.config.structured import register

register("rerun")


@hydra.main(config_path=CONFIG_PATH, config_name="rerun", **VERSION_BASE)
def app(config: DictConfig) -> None:
    """One job: measure one row again and say whether its figures repeat."""
    run_job("rerun", config)


if __name__ == "__main__":
    sys.exit(main(["rerun", *sys.argv[1:]]))
