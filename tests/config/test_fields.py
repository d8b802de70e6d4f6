"""What fields take, in words, and the nearest value that is taken."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from pydantic import Field

from kvcfg.config.base import Config
from kvcfg.config.fields import NOTHING, accepted, field_at, path_of


class Item(Config):
    kind: Literal["a", "b"]


class Model(Config):
    page: int = Field(128, ge=1, le=4096)
    count: int | None = Field(None, gt=0)
    share: float = Field(0.9, gt=0, le=1)
    rate: float | None = Field(None, ge=0)
    degree: int = Field(1, lt=10)
    mode: Literal["slow", "fast"] = "slow"
    choice: Literal["x", "null"] | None = None
    flag: bool = True
    text: str = "t"
    items: tuple[Item, ...] = ()
    needed: int = Field(ge=5)


RULES = {
    "page": "must be a whole number between 1 and 4096",
    "count": "must be a whole number of at least 1 or null",
    "share": "must be a number above 0 and at most 1",
    "rate": "must be a number of at least 0 or null",
    "degree": "must be a whole number of at most 9",
    "mode": "must be one of slow or fast",
    "choice": "must be one of x or null",
    "flag": "must be true or false",
    "text": "must be text",
    "items": "must be a list, like [a,b]",
}

NEAREST = [
    ("page", 5000, 4096),
    ("page", 0, 1),
    ("page", 64.0, 64),
    ("page", "64", 64),
    ("page", "many", 128),
    ("page", None, 128),
    ("page", float("nan"), 128),
    ("page", float("inf"), 4096),
    ("page", True, 128),
    ("count", -3, 1),
    ("count", "many", None),
    ("share", 1.5, 1),
    ("share", 0.0, 0.9),
    ("degree", 12, 9),
    ("mode", "fats", "fast"),
    ("mode", "zzzz", "slow"),
    ("choice", "y", None),
    ("flag", "ture", "true"),
    ("items", 3, NOTHING),
    ("needed", NOTHING, 5),
]


@pytest.mark.parametrize(("name", "rule"), RULES.items())
def test_rule_says_what_is_taken(name: str, rule: str) -> None:
    assert accepted(Model.model_fields[name]).rule == rule


@pytest.mark.parametrize(("name", "value", "expected"), NEAREST)
def test_nearest_value_is_one_that_is_taken(name: str, value: Any, expected: Any) -> None:
    assert accepted(Model.model_fields[name]).nearest_to(value) == expected


@pytest.mark.parametrize("key", ["page", "items.0.kind"])
def test_field_is_found_by_its_path(key: str) -> None:
    assert field_at(Model, path_of(key)) is not None


@pytest.mark.parametrize("key", ["pages", "items.0.knid", "page.more", "items.kind.more"])
def test_no_field_is_found_where_there_is_none(key: str) -> None:
    assert field_at(Model, path_of(key)) is None
