"""How large a cache is, as people say it: in tokens, in bytes, as a plan has it, or without bound.

16384, 16k, 1M, 2G       tokens; k, M and G are powers of 1024, as contexts are counted (128k = 131,072)
512MiB, 8GiB, 8GB        bytes of one replica, over all of its devices
plan                     the pages that `kvcfg plan` gives a replica
unbounded                nothing is ever given up
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from kvcfg.units import parse_bytes

SizeUnit = Literal["tokens", "bytes", "plan", "unbounded"]

_TOKENS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}


@dataclass(frozen=True, slots=True)
class CacheSize:
    """A capacity that was asked for.

    Attributes:
        text: as it was written.
        unit: what `amount` counts; of `plan` and `unbounded` there is none.
        amount: tokens or bytes.
    """

    text: str
    unit: SizeUnit
    amount: int = 0

    @classmethod
    def parse(cls, written: str | int) -> CacheSize:
        """Read one capacity.

        Raises:
            ValueError: if it is none.
        """
        text = str(written).strip()
        if text.lower() in ("plan", "unbounded"):
            return cls(text.lower(), "plan" if text.lower() == "plan" else "unbounded")
        if match := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([kmg]?)", text.lower()):
            return cls(text, "tokens", _whole(text, float(match[1]) * _TOKENS[match[2]]))
        try:
            return cls(text, "bytes", _whole(text, parse_bytes(text)))
        except ValueError:
            rule = f"{text!r} is no capacity: write tokens (16k, 1M), bytes (8GiB), plan or unbounded"
            raise ValueError(rule) from None


def _whole(text: str, amount: float) -> int:
    if amount < 1 or amount != int(amount):
        raise ValueError(f"{text!r} is no whole number of at least 1")
    return int(amount)
