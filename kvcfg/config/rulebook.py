"""Rules between groups: functions that yield what is wrong, with the keys they read stated above them.

The keys matter when one of their values was refused already: a rule that would judge a stand-in stays silent.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvcfg.errors import Problem

if TYPE_CHECKING:
    from kvcfg.config.experiment import ExperimentConfig

Check = Callable[["ExperimentConfig"], Iterator[Problem]]

FORMAT_KEYS = ("cache.kv_cache_format", "quantization.key_format", "quantization.value_format")
DRAFT_KEYS = ("speculative.draft_layer_groups", "speculative.speculative_method", "model.layer_groups")


@dataclass(frozen=True, slots=True)
class Rule:
    """A check and the keys whose values it reads."""

    reads: tuple[str, ...]
    check: Check

    def reads_any(self, keys: Collection[str]) -> bool:
        """Whether one of the keys is read, holds a key that is read, or lies inside one."""
        return any(_overlap(read, key) for read in self.reads for key in keys)


class Rulebook(list[Rule]):
    """Rules in the order in which they are asked."""

    def rule(self, *reads: str) -> Callable[[Check], Check]:
        """Enter the decorated check, which reads these keys."""

        def add(check: Check) -> Check:
            self.append(Rule(reads, check))
            return check

        return add


def _overlap(one: str, other: str) -> bool:
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")
