"""Closed pages by name: what a prefix look-up finds.

A name has at most one page. A page keeps its name while it is in use and after, until it is handed out for
something else (evicted) or forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence

PageIds = Callable[[int], bytes]
"""The token ids of the n-th page of a sequence."""


class PrefixIndex:
    """Names of the pages of one pool.

    Args:
        num_pages: pages of the pool.
        verify: keep the token ids of each page and compare them before a name is believed.

    Attributes:
        keys: per page its name, or None.
        verifies: whether token ids are kept.
    """

    def __init__(self, num_pages: int, *, verify: bool = False) -> None:
        self.keys: list[Hashable | None] = [None] * num_pages
        self._pages: dict[Hashable, int] = {}
        self.verifies = verify
        self._ids: dict[int, bytes] | None = {} if verify else None
        self._named_at = [0.0] * num_pages

    def __len__(self) -> int:
        return len(self._pages)

    def pages(self) -> Iterable[int]:
        """All pages that have a name."""
        return self._pages.values()

    def run(self, keys: Sequence[Hashable], first: int = 0, ids: PageIds | None = None) -> list[int]:
        """Pages of the longest run of known names.

        Args:
            keys: names to look for, in order.
            first: which page of its sequence the first name is.
            ids: token ids to compare with; None if there are none.
        """
        pages = list(iter(map(self._pages.get, keys).__next__, None))
        if self._ids is not None and ids is not None:
            for place, page in enumerate(pages):
                if self._ids[page] != ids(first + place):
                    return pages[:place]
        return pages

    def name(
        self, pages: Sequence[int], keys: Sequence[Hashable], now: float, contents: Sequence[bytes] | None = None
    ) -> list[int]:
        """Give pages their names, where no other page has them.

        Args:
            pages: full pages that nobody writes any more.
            keys: their names.
            now: the time, in seconds.
            contents: their token ids, to be compared with later; None if they are not known.

        Returns:
            For each of `pages` the page that holds this content: itself, or the one that had the name before.
        """
        owners = list(map(self._pages.setdefault, keys, pages))
        named, named_at = self.keys, self._named_at
        if owners == pages:
            for page, key in zip(pages, keys, strict=True):
                named[page] = key
                named_at[page] = now
        else:
            for page, key, owner in zip(pages, keys, owners, strict=True):
                if owner == page:
                    named[page], named_at[page] = key, now
        if self._ids is not None and contents is not None:
            self._compare(pages, owners, contents)
        return owners

    def _compare(self, pages: Sequence[int], owners: list[int], contents: Sequence[bytes]) -> None:
        """Keep the ids of pages that got their name; a page whose name means other ids stays without."""
        assert self._ids is not None
        for place, (page, owner, content) in enumerate(zip(pages, owners, contents, strict=True)):
            if owner == page:
                self._ids[page] = content
            elif self._ids.get(owner) != content:
                owners[place] = page

    def forget(self, pages: Sequence[int]) -> list[float]:
        """Take away the names of those pages that have one; when each of them had got it."""
        named, named_at, by_key = self.keys, self._named_at, self._pages
        births = []
        for page in pages:
            key = named[page]
            if key is not None:
                del by_key[key]
                named[page] = None
                births.append(named_at[page])
        if self._ids is not None:
            for page in pages:
                self._ids.pop(page, None)
        return births

    def check_integrity(self) -> None:
        """Compare names with pages and pages with names.

        Raises:
            AssertionError: if they differ.
        """
        named = {page: key for page, key in enumerate(self.keys) if key is not None}
        assert named == {page: key for key, page in self._pages.items()}, "index and page names differ"
