"""`kvcfg eval` as a Hydra application: what a cache loses, on a real model."""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from kvcfg.cli import main
from kvcfg.cli.hydra_app import run_job
from kvcfg.composition.composer import CONFIG_PATH, VERSION_BASE
from kvcfg.config.structured import register

register("eval")


@hydra.main(config_path=CONFIG_PATH, config_name="eval", **VERSION_BASE)
def app(config: DictConfig) -> None:
    """One job: measure one cache and add its row to the results."""
    run_job("eval", config)


if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))
