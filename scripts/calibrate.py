"""`kvcfg calibrate` as a Hydra application: measure a model's keys for calibrated recipes."""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from kvcfg.cli import main
from kvcfg.cli.hydra_app import run_job
from kvcfg.composition.composer import CONFIG_PATH, VERSION_BASE
from kvcfg.config.structured import register

register("calibrate")


@hydra.main(config_path=CONFIG_PATH, config_name="calibrate", **VERSION_BASE)
def app(config: DictConfig) -> None:
    """One job: calibrate one model and write its file."""
    run_job("calibrate", config)


if __name__ == "__main__":
    sys.exit(main(["calibrate", *sys.argv[1:]]))
