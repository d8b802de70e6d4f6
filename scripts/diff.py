"""`kvcfg diff` as a Hydra application: what differs between two configs."""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from kvcfg.cli import main
from kvcfg.cli.hydra_app import run_job
from kvcfg.composition.composer import CONFIG_PATH, VERSION_BASE
from kvcfg.config.structured import register

register("diff")


@hydra.main(config_path=CONFIG_PATH, config_name="diff", **VERSION_BASE)
def app(config: DictConfig) -> None:
    """One job: compare two configs and print what differs."""
    run_job("diff", config)


if __name__ == "__main__":
    sys.exit(main(["diff", *sys.argv[1:]]))
