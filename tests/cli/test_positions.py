"""Words behind a verb that are no overrides."""

from __future__ import annotations

import pytest

from kvcfg.cli.arguments import read_arguments
from kvcfg.errors import ConfigError


def test_first_words_are_what_the_verb_is_about() -> None:
    overrides = read_arguments(["diff", "cache=fp8", "cache=int8 model=tiny", "devices=h100", "output=json"]).overrides
    assert overrides == ("a='cache=fp8'", "b='cache=int8 model=tiny'", "output=json", "beside=['devices=h100']")


def test_option_that_is_spelled_out_takes_no_word() -> None:
    assert read_arguments(["import", "source=a.yaml", "devices=h100"]).overrides == (
        "source=a.yaml",
        "beside=['devices=h100']",
    )


def test_quotes_in_a_command_line_stay() -> None:
    from kvcfg.composition import grid

    line = """vllm serve x --speculative-config '{"method": "mtp"}' --y \\'z"""
    [point] = grid(read_arguments(["import", line]).overrides, config_name="import")
    assert point.options.source == line


@pytest.mark.parametrize("words", [["import"], ["diff", "cache=fp8"], ["rerun"], ["rerun", "a", "b"]])
def test_wrong_number_of_words_is_told_with_an_example(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=f"kvcfg {words[0]}"):
        read_arguments(words)


def test_other_verbs_take_words_as_they_are() -> None:
    assert read_arguments(["plan", "cache=fp8"]).overrides == ("cache=fp8",)
