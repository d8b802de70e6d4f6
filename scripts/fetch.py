"""`kvcfg fetch` as a Hydra application: bring a model's weights to this machine."""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from kvcfg.cli import main
from kvcfg.cli.hydra_app import run_job
from kvcfg.composition.composer import CONFIG_PATH, VERSION_BASE
from kvcfg.config.structured import register

register("fetch")


@hydra.main(config_path=CONFIG_PATH, config_name="fetch", **VERSION_BASE)
def app(config: DictConfig) -> None:
    """One job: fetch one model."""
    run_job("fetch", config)


if __name__ == "__main__":
    sys.exit(main(["fetch", *sys.argv[1:]]))
