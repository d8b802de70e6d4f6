"""The verbs as Hydra applications: what Hydra's own options and its launchers need."""

from __future__ import annotations

import sys
import tempfile
from importlib import import_module
from importlib.util import find_spec

from omegaconf import DictConfig

from kvcfg.cli.arguments import Arguments
from kvcfg.composition.composer import Composer
from kvcfg.composition.points import read_point
from kvcfg.errors import ConfigError, KvcfgError

SCRIPTS = "kvcfg.scripts" if find_spec("kvcfg.scripts") else "scripts"


def run_app(arguments: Arguments) -> int:
    """Hand a command line over to Hydra and return the exit code.

    Raises:
        ConfigError: if the overrides cannot be composed; what they mean together is not checked, so that
            `--cfg job` can show a config that is wrong.
    """
    composer = Composer(str(arguments.verb), arguments.config_dir)
    parsed, problems = composer.parse(arguments.overrides)
    if not arguments.is_sweep:
        problems |= composer.load(parsed).problems
    if problems:
        raise ConfigError(problems[index] for index in sorted(problems))
    app = import_module(f"{SCRIPTS}.{arguments.verb}").app
    with tempfile.TemporaryDirectory(prefix="kvcfg-") as folder:
        before, sys.argv = sys.argv, [f"kvcfg {arguments.verb}", *_argv(arguments, folder)]
        try:
            app()
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        finally:
            sys.argv = before
    return 0


def run_job(verb: str, config: DictConfig) -> None:
    """One job of a Hydra application: check what Hydra composed, and do what the verb does."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from kvcfg.cli.verbs import JOBS

    hydra = HydraConfig.get()
    try:
        point = read_point(config, verb, list(hydra.overrides.task))
        if point.error is not None:
            raise point.error
        JOBS[verb](Arguments(verb, point.overrides), [point])
    except KvcfgError as error:
        print(f"kvcfg {verb} {' '.join(hydra.overrides.task)}: {error}", file=sys.stderr)
        if hydra.mode != RunMode.MULTIRUN:  # the other jobs of a sweep go on; what has no row is told at the end
            sys.exit(2 if isinstance(error, ConfigError) else 1)


def _argv(arguments: Arguments, folder: str) -> list[str]:
    """The command line as Hydra takes it; its notes about a sweep go to a folder that is thrown away."""
    options = list(arguments.hydra_options)
    if arguments.config_dir is not None:
        options += ["--config-dir", arguments.config_dir]
    if not arguments.is_sweep:
        return [*arguments.overrides, *options]
    asked = any(override.startswith("hydra.sweep.dir=") for override in arguments.overrides)
    return [*arguments.overrides, *([] if asked else [f"hydra.sweep.dir={folder}"]), *options, "--multirun"]
