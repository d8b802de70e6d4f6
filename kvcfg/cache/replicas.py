"""A prefix that another replica holds is copied instead of computed.

Each replica has its own pages. `borrow` finds the replica that holds most of what a sequence needs next, pins
it there and says which pages to copy where; once the bytes are there, `settle` counts them as stored.

    allocation = ledger.alloc(seq_id, num_new_tokens)
    loan = borrow(ledger, peers, seq_id, num_new_tokens)
    … copy loan.copies …
    settle(ledger, loan)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvcfg.cache.ledger import PageLedger
from kvcfg.cache.pages import PAGELESS, Commit, PageCopy, SeqId


class Loan(NamedTuple):
    """Pages of one replica that another is about to copy.

    Attributes:
        seq_id: the sequence that needs them.
        lender: the ledger that holds them pinned.
        copies: for every group with pages, the lender's page and the borrower's.
        num_tokens: tokens that are stored once they are copied.
    """

    seq_id: SeqId
    lender: PageLedger
    copies: tuple[PageCopy, ...]
    num_tokens: int


def borrow(ledger: PageLedger, peers: Sequence[PageLedger], seq_id: SeqId, num_new_tokens: int) -> Loan | None:
    """The longest continuation of a sequence that another replica holds; None if there is none.

    Args:
        ledger: the sequence's own replica, where it has been allocated.
        peers: ledgers of the other replicas, with the same groups, page size and hasher.
        seq_id: the sequence.
        num_new_tokens: as they were allocated, less the tokens found.
    """
    size = ledger.page_size
    names = ledger.page_names(seq_id, num_new_tokens)
    start = ledger.length(seq_id) // size
    best: tuple[PageLedger, tuple[int, ...]] | None = None
    for peer in peers:
        pages = peer.lend((id(ledger), seq_id), names)
        if len(pages) > (len(best[1]) if best else 0):
            if best:
                best[0].unpin((id(ledger), seq_id))
            best = peer, pages
        else:
            peer.unpin((id(ledger), seq_id))
    if best is None:
        return None
    lender, pages = best
    copies = [
        PageCopy(group, source, target)
        for group, item in enumerate(ledger.groups)
        if item.kind not in PAGELESS
        for source, target in zip(pages, ledger.page_table(seq_id, group).pages[start:], strict=False)
    ]
    return Loan(seq_id, lender, tuple(copies), (start + len(pages)) * size - ledger.length(seq_id))


def settle(ledger: PageLedger, loan: Loan) -> Commit:
    """Count copied pages as stored, and let the lender have its pages back."""
    loan.lender.unpin((id(ledger), loan.seq_id))
    return ledger.commit(loan.seq_id, loan.num_tokens, num_drafts=0, copied=True)
