"""`kvcfg plan` as a Hydra application: what a cache costs."""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from kvcfg.cli import main
from kvcfg.cli.hydra_app import run_job
from kvcfg.composition.composer import CONFIG_PATH, VERSION_BASE
from kvcfg.config.structured import register

register("plan")


@hydra.main(config_path=CONFIG_PATH, config_name="plan", **VERSION_BASE)
def app(config: DictConfig) -> None:
    """One job: plan one cache and print it."""
    run_job("plan", config)


if __name__ == "__main__":
    sys.exit(main(["plan", *sys.argv[1:]]))
