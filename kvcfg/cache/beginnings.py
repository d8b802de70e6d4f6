"""Cached pages of which a sequence shares only the beginning: they can be copied instead of computed.

Pages that follow the same page are sorted by their token ids. The ids that agree longest with those of a
sequence are then next to where its own would stand.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Hashable, Iterable
from typing import NamedTuple


class Beginning(NamedTuple):
    """A cached page, and how many of its first tokens are those of a sequence's next page."""

    page: int
    num_tokens: int


class Beginnings:
    """Cached pages of one pool by the name of the page before them."""

    def __init__(self) -> None:
        self._after: dict[Hashable, list[tuple[bytes, int]]] = {}
        self._entries: dict[int, tuple[Hashable, bytes]] = {}

    def add(self, page: int, parent: Hashable, ids: bytes) -> None:
        """Keep the ids (int32) of a page that has just been cached."""
        self._entries[page] = parent, ids
        insort(self._after.setdefault(parent, []), (ids, page))

    def forget(self, pages: Iterable[int]) -> None:
        """Forget those of the pages that are kept."""
        for page in pages:
            if page in self._entries:
                parent, ids = self._entries.pop(page)
                line = self._after[parent]
                del line[bisect_left(line, (ids, page))]
                if not line:
                    del self._after[parent]

    def longest(self, parent: Hashable, ids: bytes) -> Beginning | None:
        """The page that begins with most of these ids after that parent; None if none has the first."""
        line = self._after.get(parent, [])
        place = bisect_left(line, (ids,))
        near = [Beginning(page, _common(ids, other)) for other, page in line[max(place - 1, 0) : place + 1][::-1]]
        best = max(near, key=lambda item: item.num_tokens, default=None)
        return best if best and best.num_tokens else None


def _common(left: bytes, right: bytes) -> int:
    """How many first ids are equal."""
    pairs = zip(array("i", left), array("i", right), strict=False)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(left), len(right)) // 4)
