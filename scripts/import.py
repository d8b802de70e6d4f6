"""`kvcfg import` as a Hydra application: an engine's settings as a config of kvcfg."""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from kvcfg.cli import main
from kvcfg.cli.hydra_app import run_job
from kvcfg.composition.composer import CONFIG_PATH, VERSION_BASE
from kvcfg.config.structured import register

register("import")


@hydra.main(config_path=CONFIG_PATH, config_name="import", **VERSION_BASE)
def app(config: DictConfig) -> None:
    """One job: read one command line or file and print its config."""
    run_job("import", config)


if __name__ == "__main__":
    sys.exit(main(["import", *sys.argv[1:]]))
