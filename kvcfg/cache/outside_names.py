"""Names of pages that come from outside, as bytes of one width.

Each gets a number, for as long as a sequence has the name or its page is cached.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence

from kvcfg.cache.pages import SeqId

_FEW = 1024


class OutsideNames:
    """The numbers of names, and the sequences that have them.

    Args:
        width: bytes of a number; names that are as many bytes are left as they are.
        num_pages: after as many new names, those that nobody has any more are forgotten.

    Attributes:
        of: the names of the sequences that were given some.
    """

    def __init__(self, width: int, num_pages: int) -> None:
        self.of: dict[SeqId, list[Hashable]] = {}
        self._width, self._patience = width, num_pages + _FEW
        self._numbers: dict[Hashable, bytes] = {}
        self._last, self._clear_at = 0, self._patience
        self._mark = os.urandom(max(0, width - 8))  # so that no name of this width is likely to be a number

    def __len__(self) -> int:
        return len(self._numbers)

    def known(self, name: Hashable) -> bytes:
        """The number of a name; empty if it has none."""
        if isinstance(name, bytes) and len(name) == self._width:
            return name
        return self._numbers.get(name, b"")

    def numbered(self, names: Sequence[Hashable], cached: Callable[[], set[bytes]]) -> bytes:
        """The numbers of names, new ones where they have none, one after the other.

        Args:
            names: the names.
            cached: tells the numbers of the pages that are cached.
        """
        if len(self._numbers) > self._clear_at:
            self._forget(cached())
        numbers = []
        for name in names:
            number = self.known(name)
            if not number:
                self._last += 1
                number = self._numbers[name] = self._last.to_bytes(8, "little") + self._mark
            numbers.append(number)
        return b"".join(numbers)

    def _forget(self, cached: set[bytes]) -> None:
        given = {name for names in self.of.values() for name in names}
        self._numbers = {name: number for name, number in self._numbers.items() if number in cached or name in given}
        self._clear_at = len(self._numbers) + self._patience
