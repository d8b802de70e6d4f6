"""What is done to whole sequences of a batch: fork some of them, go back inside a page, copy them elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch

from kvcfg.cache.closing import ClosingStorage
from kvcfg.cache.pages import PageCopy
from kvcfg.cache.replica import CacheReplica
from kvcfg.errors import CapacityError


def fork_sequences(replica: CacheReplica, batch: Sequence[int], rows: Sequence[int], names: Iterator[int]) -> list[int]:
    """Make a new batch of the sequences of an old one; those not chosen are released.

    Args:
        replica: where they are.
        batch: the sequences.
        rows: places in `batch`, any of them several times or never.
        names: of sequences to come.

    Returns:
        The new batch. A sequence that is chosen once stays as it is, the others are forks of it.

    Raises:
        CapacityError: if there are no pages for what forks do not share; nothing changed.
    """
    chosen = Counter(rows)
    _check_pages(replica, batch, chosen)
    for place, sequence in enumerate(batch):
        if place not in chosen:
            replica.release(sequence)
    made = list[int]()
    for number, place in enumerate(rows):
        sequence = batch[place]
        if place in rows[:number]:
            sequence = next(names)
            replica.fork(batch[place], sequence)
        made.append(sequence)
    return made


def cut_back(replica: CacheReplica, sequence: int, length: int) -> None:
    """Take back the last tokens of a sequence, also inside a full page: it gets a page of its own with the same bytes.

    Raises:
        ValueError: if the page is stored in another way since it was full, or a window has moved on; nothing changed.
    """
    ledger, size = replica.ledger, replica.params.page_size
    begin = length // size * size
    stored_anew = any(group.closes_pages for group in replica.params.params)
    if stored_anew or length == begin or length > ledger.num_closed(sequence) * size:
        replica.truncate(sequence, length)
        return
    groups = [group for group, storage in enumerate(replica.storages) if storage is not None]
    befores = [ledger.page_table(sequence, group) for group in groups]
    replica.truncate(sequence, begin)
    replica.alloc_batch([sequence], length - begin)
    copies = [
        PageCopy(group, before.page(begin // size), ledger.page_table(sequence, group).page(begin // size))
        for group, before in zip(groups, befores, strict=True)
    ]
    replica.copy(copies)
    replica.commit([sequence], length - begin)


def copy_sequences(source: CacheReplica, target: CacheReplica, batch: Sequence[int]) -> None:
    """Give another replica of the same groups the sequences of this one, under their names.

    The other one may be able to take back more tokens. Pages that sequences share here are copied for each.

    Raises:
        CapacityError: if they do not fit there.
    """
    for sequence in batch:
        length, closed = source.ledger.length(sequence), source.ledger.num_closed(sequence)
        target.claim(sequence, None)
        whole = closed * source.params.page_size
        if whole:
            target.alloc(sequence, whole)
            target.begin_copied(sequence, target.ledger.commit(sequence, whole, num_drafts=0))
        if length > whole:
            target.alloc(sequence, length - whole)
            target.commit([sequence], length - whole)
        _copy_pages(source, target, sequence)


def _copy_pages(source: CacheReplica, target: CacheReplica, sequence: int) -> None:
    copies = list[PageCopy]()
    for group, storage in enumerate(target.storages):
        if storage is None:
            continue
        old, new = source.ledger.page_table(sequence, group), target.ledger.page_table(sequence, group)
        first, end = max(old.first, new.first), min(old.first + len(old.pages), new.first + len(new.pages))
        copies += [PageCopy(group, old.page(place), new.page(place)) for place in range(first, end)]
        if isinstance(storage, ClosingStorage):
            origin = source.storages[group]
            assert isinstance(origin, ClosingStorage)
            begin = source.ledger.num_closed(sequence) * source.params.page_size
            tokens = torch.arange(begin, source.ledger.length(sequence))
            storage.copy_open(tokens, target.row(sequence), origin, source.row(sequence))
    target.copy(copies, source)


def _check_pages(replica: CacheReplica, batch: Sequence[int], chosen: Counter[int]) -> None:
    """Refuse forks whose open pages do not fit in any pool, once the others are released."""
    groups = [group for group, storage in enumerate(replica.storages) if storage is not None]
    for group in groups:
        storage = replica.storages[group]
        assert storage is not None
        tables = [replica.ledger.page_table(sequence, group) for sequence in batch]
        held = {page for place in chosen for page in tables[place].pages}
        closed = [replica.ledger.num_closed(sequence) for sequence in batch]
        needed = sum(
            (times - 1) * len(tables[place].pages[max(0, closed[place] - tables[place].first) :])
            for place, times in chosen.items()
        )
        free = storage.num_pages - len(held - {storage.num_pages})
        if needed > free:
            raise CapacityError(
                f"{sum(chosen.values())} sequences need {needed} pages of their own beside those they share, and "
                f"{free} of {storage.num_pages} are free. Try: fewer beams, or a larger cache.kv_cache_memory_bytes"
            )
