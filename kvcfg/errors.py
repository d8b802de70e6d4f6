"""Every error kvcfg raises, and the one form in which a problem with a value is told.

KvcfgError
├── ConfigError(ValueError)            one or more values that cannot be; carries every problem found
├── ShapeError(ValueError)             a tensor does not have the shape that the parameters ask for
├── CapacityError(RuntimeError)        pages or bytes ran out; nothing was changed
├── GateError(RuntimeError)            a measured figure is worse than the gate allows
└── BackendUnavailable(RuntimeError)   an optional package, device or connector is missing
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


class KvcfgError(Exception):
    """Base of all errors raised by kvcfg."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One value that cannot be: where, what, why, and how to mend it.

    Attributes:
        key: full path of the value, as written on a command line (`cache.kv_cache_page_size`).
        rule: what must hold, in plain words ("must be between 1 and 4096 tokens").
        value: the value that was given; `...` when there is none to show.
        fix: an override that would be accepted (`cache.kv_cache_page_size=64`), or None.
    """

    key: str
    rule: str
    value: Any = ...
    fix: str | None = None

    def __str__(self) -> str:
        given = "" if self.value is ... else f"={show(self.value)}"
        mend = "" if self.fix is None else f". Try: {self.fix}"
        return f"{self.key}{given}: {self.rule}{mend}"

    def under(self, prefix: str) -> Problem:
        """The same problem seen from a configuration that holds this one under `prefix`."""
        if not prefix:
            return self
        fix = None if self.fix is None else f"{prefix}.{self.fix}"
        return Problem(f"{prefix}.{self.key}", self.rule, self.value, fix)


class ConfigError(KvcfgError, ValueError):
    """Values that cannot be, all of them at once, a line each."""

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        self.problems = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[Problem, ...]]]:
        return type(self), (self.problems,)

    def under(self, prefix: str) -> ConfigError:
        """The same error seen from a configuration that holds this one under `prefix`."""
        return type(self)(problem.under(prefix) for problem in self.problems)


class ShapeError(KvcfgError, ValueError):
    """A tensor does not have the shape that the parameters ask for."""


class CapacityError(KvcfgError, RuntimeError):
    """Pages or bytes ran out; the call changed nothing."""


class GateError(KvcfgError, RuntimeError):
    """A measured figure is worse than the gate allows."""


class BackendUnavailable(KvcfgError, RuntimeError):
    """An optional package, device or connector is missing; the message says how to get it."""


def show(value: Any) -> str:
    """A value as it would be written in an override."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return f"[{','.join(show(item) for item in value)}]"
    return str(value)


def nearest(name: object, known: Sequence[str]) -> str | None:
    """The known name closest to a mistyped one, or None if nothing comes near."""
    close = difflib.get_close_matches(str(name).lower(), [item.lower() for item in known], n=1, cutoff=0.5)
    return next((item for item in known if item.lower() == close[0]), None) if close else None


def one_of(known: Sequence[str]) -> str:
    """The rule "must be one of a, b or c"."""
    names = list(known)
    return f"must be {names[0]}" if len(names) == 1 else f"must be one of {', '.join(names[:-1])} or {names[-1]}"
