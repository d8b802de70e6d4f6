"""Capacities as people write them."""

from __future__ import annotations

import pytest

from kvcfg.config.cache_sizes import CacheSize


@pytest.mark.parametrize(
    ("written", "unit", "amount"),
    [
        (16384, "tokens", 16384),
        ("16k", "tokens", 16384),
        ("1M", "tokens", 2**20),
        ("1.5M", "tokens", 3 * 2**19),
        ("2G", "tokens", 2**31),
        ("8GiB", "bytes", 8 * 2**30),
        ("8GB", "bytes", 8 * 10**9),
        ("512 b", "bytes", 512),
        ("plan", "plan", 0),
        ("Unbounded", "unbounded", 0),
    ],
)
def test_unit_decides_what_is_counted(written: str | int, unit: str, amount: int) -> None:
    size = CacheSize.parse(written)
    assert (size.unit, size.amount) == (unit, amount)


@pytest.mark.parametrize("written", ["", "0", 0, -4, "1X", "k", "1.0001k", "8 GiB more", "planned"])
def test_what_is_no_capacity_is_refused(written: str | int) -> None:
    with pytest.raises(ValueError, match="is no"):
        CacheSize.parse(written)
