"""Resolution: what was left open gets a value, and the value a reason."""

from __future__ import annotations

import pytest

from kvcfg.composition import compose
from kvcfg.config.recipes import balances_rope
from kvcfg.config.resolution import Choice, resolve

KEY = "quantization.balance_rope"
CASES = [
    ([], False),
    (["cache=int8"], True),
    (["cache=fp8"], True),
    (["quantization=fp8_unit"], False),
    (["cache=int8", f"{KEY}=false"], False),
    ([f"{KEY}=true"], True),
    (["quantization.key_format=int8", "quantization.value_format=bfloat16"], True),
    (["quantization.key_format=bfloat16", "quantization.value_format=int8"], False),
    (["model=deepseek-v3", "devices=h200x8", "cache=fp8"], False),
    (["model=qwen3-next-80b-a3b", "devices=h100x8", "cache=fp8"], True),
]


def balance_choice(*overrides: str) -> Choice | None:
    return next((item for item in resolve(compose([*overrides])).choices if item.key == KEY), None)


@pytest.mark.parametrize(("overrides", "balanced"), CASES)
def test_keys_are_balanced_where_several_channels_share_a_scale(overrides: list[str], balanced: bool) -> None:
    assert balances_rope(compose(overrides)) is balanced


@pytest.mark.parametrize(("overrides", "balanced"), [case for case in CASES if KEY not in "".join(case[0])])
def test_open_balancing_is_a_choice_with_its_reason(overrides: list[str], balanced: bool) -> None:
    choice = balance_choice(*overrides)
    assert choice is not None and choice.why
    assert (choice.requested, choice.resolved) == (None, balanced)


def test_balancing_that_was_asked_for_is_no_choice() -> None:
    assert balance_choice("cache=int8", f"{KEY}=true") is None
