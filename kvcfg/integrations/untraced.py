"""Functions that compiled models call and do not trace: they work on page tables and bytes, not on a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def untraced(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """A function at which `torch.compile` breaks the graph and goes on behind it."""
    wrapped: Callable[_Arguments, _Result] = torch.compiler.disable(function)
    return wrapped
