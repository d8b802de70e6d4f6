from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from kvcfg.config.speculative import SpeculativeConfig


def test_nobody_drafts_by_default() -> None:
    config = SpeculativeConfig()
    assert (config.speculative_method, config.num_speculative_tokens, config.num_draft_tokens) == (None, None, 0)


@pytest.mark.parametrize("method", ["standalone", "eagle", "mtp", "dflash"])
def test_method_drafts_two_tokens_unless_told_otherwise(method: Any) -> None:
    assert SpeculativeConfig(speculative_method=method).num_draft_tokens == 2


def test_given_number_of_drafts_is_taken() -> None:
    assert SpeculativeConfig(speculative_method="dflash", num_speculative_tokens=8).num_draft_tokens == 8


def test_drafts_that_nobody_makes_are_refused_with_a_method_to_try() -> None:
    with pytest.raises(ValidationError) as error:
        SpeculativeConfig(num_speculative_tokens=3)
    (problem,) = error.value.errors()[0]["ctx"]["problems"]
    assert (problem.key, problem.fix) == ("num_speculative_tokens", "speculative_method=eagle")


FULL = {"kind": "full", "num_layers": 1, "head_dim": 64}


def test_layers_of_a_drafter_that_is_not_there_are_refused() -> None:
    with pytest.raises(ValidationError) as error:
        SpeculativeConfig(draft_layer_groups=(FULL,))  # type: ignore[arg-type]
    (problem,) = error.value.errors()[0]["ctx"]["problems"]
    assert (problem.key, problem.fix) == ("draft_layer_groups", "speculative_method=standalone")


@pytest.mark.parametrize("kind", [{"kind": "sliding_window", "window": 64}, {"kind": "linear", "state_bytes": 64}])
def test_drafter_that_forgets_is_refused(kind: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as error:
        SpeculativeConfig(speculative_method="eagle", draft_layer_groups=(FULL, FULL | kind))  # type: ignore[arg-type]
    (problem,) = error.value.errors()[0]["ctx"]["problems"]
    assert (problem.key, problem.fix) == ("draft_layer_groups", "draft_layer_groups=null")


@pytest.mark.parametrize(
    "values",
    [
        {"speculative_method": "medusa"},
        {"speculative_method": "eagle", "num_speculative_tokens": 0},
        {"rejection_sampling_strategy": "typical_acceptance"},
        {"synthetic_acceptance_rate": float("nan")},
        {"synthetic_acceptance_rate": 1.5},
        {"relaxed_topk": 0},
        {"relaxed_delta": -0.1},
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as error:
        SpeculativeConfig(**values)
    assert error.value.errors()[0]["loc"] == (list(values)[-1],)


@pytest.mark.parametrize("method", ["standalone", "eagle", "mtp", "dflash"])
def test_exactly_one_method_answers_to_its_name(method: Any) -> None:
    config = SpeculativeConfig(speculative_method=method)
    named = {name: getattr(config, f"is_{name}")() for name in ("standalone", "eagle", "mtp", "dflash")}
    assert [name for name, answer in named.items() if answer] == [method]
