"""Sizes as people write them: "8GiB" to bytes and back, and rounding up."""

from __future__ import annotations

import re

KIB, MIB, GIB, TIB = (2 ** (10 * power) for power in range(1, 5))

_UNITS = {
    "": 1, "b": 1,
    "kib": KIB, "mib": MIB, "gib": GIB, "tib": TIB,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
}  # fmt: skip


def ceil_div(numerator: int, denominator: int) -> int:
    """Integer division that rounds up."""
    return -(-numerator // denominator)


def parse_bytes(text: str | int) -> int:
    """Bytes from a count or a size with a unit: 1024, "8GiB", "1.5 GB".

    Units are binary with an i (GiB = 2**30) and decimal without (GB = 10**9).

    Raises:
        ValueError: if the text is no size, or no whole number of bytes.
    """
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{text!r} is no size: write bytes or a unit, like 8589934592, 8GiB or 8GB")
    size = float(match[1]) * _UNITS[match[2]]
    if size != int(size):
        raise ValueError(f"{text!r} is no whole number of bytes")
    return int(match[1]) if match[1].isdigit() and _UNITS[match[2]] == 1 else int(size)


def readable_bytes(size: float) -> str:
    """A size in the largest binary unit that leaves at least 1: 67584 -> "66 KiB"."""
    for unit, name in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(size) >= unit:
            return f"{_three_digits(size / unit)} {name}"
    return f"{_three_digits(size)} B"


def readable_count(count: float) -> str:
    """A count with thousands separators, or in millions when it is long: 12,031; 3.4M."""
    return f"{count:,.0f}" if abs(count) < 10_000_000 else f"{count / 1e6:,.1f}M"


def _three_digits(number: float) -> str:
    return f"{number:.0f}" if number == int(number) or abs(number) >= 100 else f"{number:.3g}"
