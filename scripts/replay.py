"""`kvcfg replay` as a Hydra application: what a prefix cache is worth on a trace of requests."""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from kvcfg.cli import main
from kvcfg.cli.hydra_app import run_job
from kvcfg.composition.composer import CONFIG_PATH, VERSION_BASE
from kvcfg.config.structured import register

register("replay")


@hydra.main(config_path=CONFIG_PATH, config_name="replay", **VERSION_BASE)
def app(config: DictConfig) -> None:
    """One job: replay a trace for one cache and print what it found."""
    run_job("replay", config)


if __name__ == "__main__":
    sys.exit(main(["replay", *sys.argv[1:]]))
