"""`kvcfg bench` as a Hydra application: how fast the kernels are, and a model with the cache."""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from kvcfg.cli import main
from kvcfg.cli.hydra_app import run_job
from kvcfg.composition.composer import CONFIG_PATH, VERSION_BASE
from kvcfg.config.structured import register

register("bench")


@hydra.main(config_path=CONFIG_PATH, config_name="bench", **VERSION_BASE)
def app(config: DictConfig) -> None:
    """One job: time one point and print it."""
    run_job("bench", config)


if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
