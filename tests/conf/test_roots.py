"""The root configs: one a verb, typed first, with the defaults of the models; and the experiments' first lines."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml

from kvcfg.cli.arguments import read_arguments
from kvcfg.composition import compose, grid
from kvcfg.config.experiment import ExperimentConfig
from kvcfg.config.verbs import VERBS

CONF = Path(__file__).parents[2] / "conf"
EXPERIMENTS = sorted(CONF.glob("experiment/*.yaml"))


def defaults_of(path: Path) -> list[object]:
    return list((yaml.safe_load(path.read_text()) or {}).get("defaults", []))


@pytest.mark.parametrize("verb", VERBS)
def test_options_in_the_yaml_are_the_defaults_of_the_model(verb: str) -> None:
    [point] = grid([], config_name=verb)
    assert (point.experiment, point.options) == (ExperimentConfig(), VERBS[verb]())


@pytest.mark.parametrize("verb", VERBS)
def test_root_lists_its_schema_first_and_itself_last(verb: str) -> None:
    defaults = defaults_of(CONF / f"{verb}.yaml")
    assert (defaults[0], defaults[-1]) == (f"kvcfg_{verb}_schema", "_self_")


@pytest.mark.parametrize("verb", VERBS)
def test_root_of_a_verb_says_every_option(verb: str) -> None:
    written = yaml.safe_load((CONF / f"{verb}.yaml").read_text())
    assert set(written) - {"defaults"} == set(VERBS[verb].model_fields)


def test_groups_need_no_schema_so_that_any_application_can_use_them() -> None:
    for path in CONF.glob("*/*.yaml"):
        assert not any("schema" in str(item) for item in defaults_of(path)), path


def test_every_group_is_a_folder_with_a_default_choice() -> None:
    chosen = {key for item in defaults_of(CONF / "groups.yaml") if isinstance(item, dict) for key in item}
    folders = {path.name for path in CONF.iterdir() if path.is_dir() and path.name not in ("hydra", "__pycache__")}
    assert chosen == folders == {*ExperimentConfig.model_fields, "experiment"}


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiment_begins_with_the_command_that_runs_it(path: Path) -> None:
    package, command = path.read_text().splitlines()[:2]
    program, *argv = shlex.split(command.removeprefix("# "))
    arguments = read_arguments(argv)
    assert (package, program) == ("# @package _global_", "kvcfg")
    assert f"experiment={path.stem}" in arguments.overrides
    assert compose(arguments.overrides, config_name=str(arguments.verb)) != ExperimentConfig()
