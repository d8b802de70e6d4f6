"""A batch that grows together whose pages later batches find again.

pages.begin(prompts, salts)     what the prefix cache has of all of them is stored already
…                               steps, as for any `PagedKVCache`; the prompts' full pages stay cached
pages.keep(tokens, salts)       the pages of what followed stay too
pages.release()
"""

from __future__ import annotations

from collections.abc import Sequence

from kvcfg.cache.paged import PagedKVCache
from kvcfg.cache.pages import PageCopy
from kvcfg.cache.prefix import PageHasher, token_ids
from kvcfg.errors import CapacityError, ShapeError


class PrefixPages(PagedKVCache):
    """`PagedKVCache` that is made with `options` for prefix caching.

    A batch may also be begun without its prompts, by its first step, and shares nothing then.
    """

    def begin(self, prompts: Sequence[Sequence[int]], salts: Sequence[bytes], *, find: bool = True) -> int:
        """Begin a batch of prompts of one length.

        Args:
            prompts: token ids of each sequence.
            salts: of each sequence; pages are shared only under equal ones.
            find: whether to look for what is cached; else all is computed.

        Returns:
            Tokens of each sequence that need not be computed; at least one of each is left.

        Raises:
            CapacityError: if the cache was not built for so many sequences.
            ShapeError: if a batch is under way, or prompts are empty or differ in length.
        """
        if self.batch_size:
            raise ShapeError(f"{self.batch_size} sequences are under way: reset the cache before another prompt")
        lengths = {len(prompt) for prompt in prompts}
        if len(lengths) != 1 or 0 in lengths:
            raise ShapeError("the prompts of a batch must be padded to one length of at least 1")
        self._check_batch(len(prompts))
        for prompt, salt in zip(prompts, salts, strict=True):
            self._claim(self._page_names(prompt, salt, len(prompt)))
        ledger, most = self.replica.ledger, lengths.pop() - 1
        found = min(ledger.forecast(sequence, most).cached_tokens for sequence in self._sequences)
        if find and found > 1:
            # A step takes as many tokens of every sequence, so all of them begin where the first one must.
            for sequence in self._sequences:
                self.replica.alloc(sequence, found)
            self._stored = [found] * len(self.layers)
            return found
        return 0

    def keep(self, tokens: Sequence[Sequence[int]], salts: Sequence[bytes]) -> int:
        """Let the full pages of all that is stored be found by later batches, not those of the prompts alone.

        The batch ends with that.

        Args:
            tokens: ids of each sequence, of those that are stored and one more; of drafts at the end none.
            salts: as for `begin`.

        Returns:
            Tokens that can be found now, over all sequences. A sequence is left out whose pages do not fit a second
            time, or whose windows have moved on too far.

        Raises:
            ShapeError: if there are not as many rows as sequences.
        """
        if len(tokens) != self.batch_size:
            raise ShapeError(f"{self.batch_size} sequences are stored, got the tokens of {len(tokens)}")
        kept, sequences = 0, self._sequences
        self._sequences = []
        for sequence, row, salt in zip(sequences, tokens, salts, strict=True):
            # What stands after the tokens that were chosen, or in place of the last one, may be a rejected draft.
            kept += self._keep_one(sequence, row[:-1], salt)
        self.release()
        return kept

    def _keep_one(self, sequence: int, tokens: Sequence[int], salt: bytes) -> int:
        """Exchange a sequence for one that names its pages: what is not cached yet is copied."""
        replica, ledger = self.replica, self.replica.ledger
        size = self.params.page_size
        whole = min(ledger.num_closed(sequence), len(tokens) // size) * size
        groups = [group for group, storage in enumerate(replica.storages) if storage is not None]
        befores = {group: ledger.page_table(sequence, group) for group in groups}
        pin = ("kept", sequence)
        ledger.pin(pin, sequence)
        replica.release(sequence)
        made = self._claim(self._page_names(tokens, salt, whole))
        try:
            found = replica.alloc(made, whole).length if whole > 1 else 0
            copies = list[PageCopy]()
            for group, before in befores.items():
                table = ledger.page_table(made, group)
                for place in range(max(table.first, found // size), table.first + len(table.pages)):
                    if not before.first <= place < before.first + len(before.pages):
                        return 0
                    copies.append(PageCopy(group, before.page(place), table.page(place)))
            replica.copy(copies)
            replica.begin_copied(made, ledger.commit(made, whole - found, num_drafts=0, copied=True))
        except CapacityError:
            return 0
        finally:
            ledger.unpin(pin)
        return whole

    def _claim(self, names: Sequence[bytes]) -> int:
        sequence = next(self._names)
        self.replica.claim(sequence, None, names=names)
        self._sequences.append(sequence)
        return sequence

    def _page_names(self, tokens: Sequence[int], salt: bytes, length: int) -> list[bytes]:
        """Names of the full pages among the first `length` tokens."""
        hasher, size = self._options.hasher or PageHasher(), self.params.page_size
        return hasher.chain(hasher.root(salt), token_ids(list(tokens[:length])), size, 0, length // size)
