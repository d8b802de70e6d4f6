"""`kvcfg export` as a Hydra application: a config as an inference engine takes it."""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from kvcfg.cli import main
from kvcfg.cli.hydra_app import run_job
from kvcfg.composition.composer import CONFIG_PATH, VERSION_BASE
from kvcfg.config.structured import register

register("export")


@hydra.main(config_path=CONFIG_PATH, config_name="export", **VERSION_BASE)
def app(config: DictConfig) -> None:
    """One job: export one config and print it."""
    run_job("export", config)


if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
