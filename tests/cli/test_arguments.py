"""The command line apart: verb, overrides, options."""

from __future__ import annotations

import pytest

from kvcfg.cli.arguments import HELP, Arguments, read_arguments
from kvcfg.config.verbs import VERBS
from kvcfg.errors import ConfigError


def test_verb_overrides_and_options_are_told_apart_wherever_they_stand() -> None:
    argv = ["-m", "eval", "cache=fp8,int8", "--config-dir", "mine", "force=true"]
    assert read_arguments(argv) == Arguments("eval", ("cache=fp8,int8", "force=true"), True, "mine")


@pytest.mark.parametrize("argv", [["plan", "--config-dir=mine"], ["plan", "-cd", "mine"], ["-cd", "mine", "plan"]])
def test_folder_of_presets_is_read_in_every_spelling(argv: list[str]) -> None:
    assert read_arguments(argv).config_dir == "mine"


def test_options_of_hydra_are_kept_with_their_values() -> None:
    argv = ["plan", "--cfg", "job", "-p", "cache", "--resolve", "cache=fp8"]
    assert read_arguments(argv) == Arguments(
        "plan", ("cache=fp8",), hydra_options=("--cfg", "job", "-p", "cache", "--resolve")
    )


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_help_is_asked_for(argv: list[str]) -> None:
    assert read_arguments(argv).verb is None


def test_help_of_a_verb_is_left_to_hydra() -> None:
    assert read_arguments(["plan", "--help"]) == Arguments("plan", hydra_options=("--help",))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["plam"], "Try: kvcfg plan"),
        (["zzzz"], "must be one of plan, fit, eval, bench, replay, calibrate, fetch, export, import, diff or rerun"),
        (["cache=fp8"], "Try: kvcfg plan cache=fp8"),
        (["plan", "--config-dir"], "--config-dir: needs a value"),
    ],
)
def test_what_cannot_be_read_is_told(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_arguments(argv)


@pytest.mark.parametrize("verb", VERBS)
def test_help_names_every_verb(verb: str) -> None:
    assert f"\n  {verb} " in HELP


def test_help_fits_a_screen() -> None:
    assert len(HELP.splitlines()) <= 30
    assert max(map(len, HELP.splitlines())) <= 100
