"""What all configuration models share: frozen, no unknown keys, documented by the string under a field."""

from __future__ import annotations

from typing import Annotated, NoReturn

from pydantic import BaseModel, BeforeValidator, ConfigDict
from pydantic_core import PydanticCustomError

from kvcfg.errors import Problem
from kvcfg.units import parse_bytes


class Config(BaseModel):
    """A group of settings. Frozen: derive a changed copy with `model_copy(update=...)` or compose anew."""

    model_config = ConfigDict(extra="forbid", strict=False, frozen=True, use_attribute_docstrings=True)


ByteCount = Annotated[int, BeforeValidator(lambda value: parse_bytes(value) if isinstance(value, str) else value)]
"""Bytes, also written with a unit: 8GiB."""


def refuse(*problems: Problem) -> NoReturn:
    """Reject a value from inside a validator; keys and fixes are relative to the model being validated."""
    text = "; ".join(str(problem) for problem in problems)
    raise PydanticCustomError("kvcfg", "{text}", {"problems": problems, "text": text})
