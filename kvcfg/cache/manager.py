"""The cache engine: sequences of any lengths over all data parallel replicas, from claim to release.

    manager.claim("a", prompt)                    a row on the replica that has most of the prompt
    manager.alloc("a", len(prompt))               pages, whole or unchanged; a cached prefix is found, not computed
    step = manager.lay_out(["a", "b"])            one forward pass: what it reads, where it writes
    keys, values = manager.append(step, 0, k, v)  every layer: store the new tokens, get all that is seen
    manager.commit("a", n)                        the tokens count; pages that are full and final are shared
    manager.release("a")                          pages are free again, their content stays until they are needed

Every method that changes who holds what takes the manager's lock. Reading and writing tensors does not: a step
touches only pages of its own sequences.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from threading import RLock

import torch
from torch import Tensor

from kvcfg.cache.closing_step import ClosingStep
from kvcfg.cache.ledger import LedgerMetrics
from kvcfg.cache.packed import Packed, joined
from kvcfg.cache.pages import Allocation, Commit, SeqId
from kvcfg.cache.prefix import token_ids
from kvcfg.cache.refusal import in_use, not_pinned, pin_in_use, unclaimed
from kvcfg.cache.replica import CacheOptions, CacheReplica, Calibration
from kvcfg.cache.replicas import borrow, settle
from kvcfg.cache.step import GroupStep, Step
from kvcfg.cache.storage import KeysValues, PagedStorage
from kvcfg.cache.view import LayerView
from kvcfg.errors import ShapeError
from kvcfg.group_params import split_into_groups
from kvcfg.params import MultiKVCacheParams
from kvcfg.sizing import RequestSlots


class KVCacheManager:
    """The paged KV cache of all replicas.

    Layers are numbered through the groups in order, the drafter's after the target's.

    Args:
        params: what each layer group stores.
        num_pages: pages per replica that growing groups share; null pages come on top.
        max_batch_size: sequences that a replica holds at the same time.
        max_seq_len: tokens of the longest one.
        devices: one device per shard, replica after replica; None = the CPU for all.
        options: prefix caching, eviction, copies between replicas.
        calibrated: what was measured beforehand, for recipes that ask for it.

    Attributes:
        replicas: pages and tables of each replica.

    Raises:
        ShapeError: if devices do not match the parameters.
    """

    def __init__(
        self,
        params: MultiKVCacheParams,
        *,
        num_pages: int,
        max_batch_size: int,
        max_seq_len: int,
        devices: Sequence[torch.device] | None = None,
        options: CacheOptions | None = None,
        calibrated: Calibration | None = None,
    ) -> None:
        options = options or CacheOptions(enable_prefix_caching=params.enable_prefix_caching)
        devices = [torch.device("cpu")] * params.n_devices if devices is None else devices
        if len(devices) != params.n_devices:
            raise ShapeError(f"{params.n_devices} shards need as many devices, got {len(devices)}")
        self.params, self.max_batch_size, self.max_seq_len = params, max_batch_size, max_seq_len
        self.replicas = tuple(
            CacheReplica(
                params,
                num_pages=num_pages,
                max_batch_size=max_batch_size,
                max_seq_len=max_seq_len,
                devices=part,
                options=options,
                calibrated=calibrated,
            )
            for part in split_into_groups(devices, params.data_parallel_degree)
        )
        self._layers = [(group, place) for group, item in enumerate(params.params) for place in range(item.num_layers)]
        self._copies_between_replicas = options.enable_dp_cross_replica_prefix_copy
        self._homes: dict[SeqId, CacheReplica] = {}
        self._allocated: dict[SeqId, int] = {}
        self._pins: dict[Hashable, CacheReplica] = {}
        self._lock = RLock()

    @property
    def nbytes(self) -> int:
        """Bytes of all replicas: pages, states and tables; as planned, times the replicas."""
        return sum(replica.nbytes for replica in self.replicas)

    @property
    def num_layers(self) -> int:
        """Layers of all groups, the drafter's included."""
        return len(self._layers)

    # Life of a sequence

    def claim(
        self,
        seq_id: SeqId,
        tokens: Iterable[int] | None = None,
        *,
        replica: int | None = None,
        salt: bytes = b"",
        priority: int = 0,
    ) -> int:
        """Begin a sequence; it has no pages yet.

        Args:
            seq_id: any hashable name that is not in use.
            tokens: ids known so far; None = never known, then the sequence is neither looked up nor cached.
            replica: where it lives; None = where most of its prompt is cached, else where the fewest sequences are.
            salt: sequences share pages only under equal salts (one per tenant).
            priority: for `eviction=priority`: pages of lower priority go first.

        Returns:
            The replica.

        Raises:
            CapacityError: if the replica has `max_batch_size` sequences already.
            ValueError: if the name is in use, the replica does not exist or an id does not fit in int32.
        """
        with self._lock:
            if seq_id in self._homes:
                raise in_use(seq_id)
            if replica is not None and not 0 <= replica < len(self.replicas):
                raise ValueError(f"replica must be from 0 to {len(self.replicas) - 1}, got {replica}")
            ids = None if tokens is None else token_ids(tokens)
            home = self._freest() if replica is None else self.replicas[replica]
            home.claim(seq_id, ids, salt=salt, priority=priority)
            if replica is None and ids and (better := self._better_home(home, seq_id, len(ids))):
                home.release(seq_id)
                home = better
                home.claim(seq_id, ids, salt=salt, priority=priority)
            self._homes[seq_id] = home
            return self.replicas.index(home)

    def extend(self, seq_id: SeqId, tokens: Iterable[int]) -> None:
        """Add ids of tokens that follow (sampled, drafted, the next turn's) before they are committed."""
        with self._lock:
            self._home(seq_id).ledger.extend(seq_id, tokens)

    def alloc(self, seq_id: SeqId, num_new_tokens: int, *, num_draft_tokens: int | None = None) -> Allocation:
        """Make room for tokens of one sequence and for the drafts that go with them: whole, or nothing changed.

        A prefix that is cached on the sequence's replica is found; one that another replica has is copied.

        Args:
            seq_id: a claimed sequence.
            num_new_tokens: tokens to come.
            num_draft_tokens: drafts of a step; None = as configured. They are written once to be verified and
                once to be made, and a block drafter needs a slot more.

        Raises:
            CapacityError: if pages do not suffice; it names need, free, evictable and an override that helps.
            ValueError: if the sequence is unknown or a number is negative.
        """
        with self._lock:
            home = self._home(seq_id)
            done = home.alloc(seq_id, num_new_tokens, self._lookahead(num_new_tokens, num_draft_tokens))
            remaining = num_new_tokens - done.cached_tokens
            if remaining > 1 and len(self.replicas) > 1 and self._copies_between_replicas:
                copied = self._copy_from_peers(home, seq_id, remaining)
                remaining -= copied
                done = done._replace(cached_tokens=done.cached_tokens + copied, length=done.length + copied)
            self._allocated[seq_id] = remaining
            return done

    def alloc_batch(
        self, seq_ids: Sequence[SeqId], num_new_tokens: int = 1, *, num_draft_tokens: int | None = None
    ) -> None:
        """The same room for every sequence of a replica's batch, or for none; the prefix cache is not asked.

        Raises:
            CapacityError: if pages do not suffice for all.
            ValueError: if a sequence is unknown, named twice, or lives on another replica.
        """
        with self._lock:
            home = self._common_home(seq_ids)
            home.alloc_batch(seq_ids, num_new_tokens, self._lookahead(num_new_tokens, num_draft_tokens))
            self._allocated.update(dict.fromkeys(seq_ids, num_new_tokens))

    def commit(self, seq_id: SeqId, num_tokens: int, *, num_drafts: int | None = None) -> Commit:
        """Count tokens of one sequence as stored; see `commit_batch`."""
        return self.commit_batch([seq_id], num_tokens, num_drafts=num_drafts)

    def commit_batch(self, seq_ids: Sequence[SeqId], num_tokens: int = 1, *, num_drafts: int | None = None) -> Commit:
        """Count tokens as stored: lengths advance, pages that are full and final close and can be shared.

        Args:
            seq_ids: sequences of one replica.
            num_tokens: tokens of each that every layer has stored since the last commit. Rejected drafts are simply
                left out; what follows overwrites them.
            num_drafts: how many of the last tokens `truncate` may take back; None = the configured drafts, less
                those that were left out.

        Raises:
            ValueError: if a sequence is unknown, or has no slots or ids for as many tokens.
        """
        with self._lock:
            if num_drafts is None:
                left_out = max(self._allocated.get(seq_id, num_tokens) for seq_id in seq_ids) - num_tokens
                num_drafts = max(0, self.params.num_draft_tokens - max(0, left_out))
            done = self._common_home(seq_ids).commit(seq_ids, num_tokens, num_drafts=num_drafts)
            for seq_id in seq_ids:
                self._allocated.pop(seq_id, None)
            return done

    def truncate(self, seq_id: SeqId, length: int) -> None:
        """Take back committed tokens, so that `length` are left; see `PageLedger.truncate`.

        Raises:
            ValueError: if the sequence is shorter, the tokens cannot be taken back any more, or a linear layer's
                state holds them.
        """
        with self._lock:
            self._home(seq_id).truncate(seq_id, length)
            self._allocated.pop(seq_id, None)

    def fork(self, parent: SeqId, child: SeqId) -> None:
        """Begin `child` as a copy of `parent` on its replica: closed pages are shared, open ones copied.

        Raises:
            CapacityError: if there is no page or no row for the child; nothing changed.
            ValueError: if the parent is unknown or the child's name is in use.
        """
        with self._lock:
            home = self._home(parent)
            if child in self._homes:
                raise in_use(child)
            home.fork(parent, child)
            self._homes[child] = home

    def release(self, seq_id: SeqId) -> None:
        """End a sequence. Its pages are free again; what they hold stays cached until they are handed out."""
        with self._lock:
            self._home(seq_id).release(seq_id)
            del self._homes[seq_id]
            self._allocated.pop(seq_id, None)

    # Tensors

    def lay_out(
        self,
        seq_ids: Sequence[SeqId],
        num_tokens: Sequence[int] | None = None,
        *,
        ahead: int = 0,
        max_cache_length: int | None = None,
    ) -> Step:
        """Lay out one forward pass: what its queries see, where its tokens go, page tables for kernels.

        Args:
            seq_ids: allocated sequences of one replica.
            num_tokens: tokens of each in this step; None = those it was allocated for. Drafts to be verified count.
            ahead: tokens of each that a drafter has stored and nobody has committed yet; the step follows them.
                Windowed groups take no part in such a step.
            max_cache_length: tokens that the page tables are to cover, the same for every step where kernels
                want fixed shapes; None = as many as the batch needs.

        Raises:
            ValueError: if a sequence is unknown or lives on another replica, room is missing, or
                `max_cache_length` does not cover the batch or exceeds the longest sequence.
        """
        with self._lock:
            home = self._common_home(seq_ids)
            counts = [self._allocated.get(seq_id, 0) for seq_id in seq_ids] if num_tokens is None else num_tokens
            for seq_id, count in zip(seq_ids, counts, strict=True):
                room = home.ledger.room(seq_id) - ahead
                if count > room:
                    raise ValueError(f"sequence {seq_id!r} has room for {room} more tokens, not {count}: alloc first")
            return home.lay_out(seq_ids, counts, ahead=ahead, max_cache_length=max_cache_length)

    def step_limit(self, seq_id: SeqId) -> int | None:
        """The most tokens of a sequence that can read the same bytes, so go in one step; None = any number.

        Formats whose pages close read the page of a query open and earlier ones closed, so a step ends with a page.
        """
        with self._lock:
            return self._home(seq_id).step_limit(seq_id)

    def append(self, step: Step, layer: int, keys: Tensor, values: Tensor | None = None) -> Packed:
        """Store a step's tokens in one layer and return all that its queries may see, themselves included.

        Args:
            step: from `lay_out`.
            layer: index over all groups.
            keys: `[sum(step.num_tokens), n_kv_heads, head_dim]`, any float dtype, one sequence after the other;
                for MLA the latent, `[…, 1, rank + rope]`.
            values: `[sum(step.num_tokens), n_kv_heads, value_dim]`; None for MLA.

        Returns:
            Per sequence its past, then its new tokens, as they are stored, in the dtype of `keys`.

        Raises:
            ShapeError: if heads, widths or tokens are not those of the step, the layer keeps no pages, or the step
                goes on over the end of a page that closes (`step_limit`).
        """
        storage, place, layout = self._target(step, layer, keys)
        if isinstance(layout, ClosingStep) and any(len(parts) > 1 for parts in layout.segments):
            raise ShapeError(
                f"layer {layer} closes pages, and queries after the end of one read it closed: give each sequence at "
                "most step_limit(seq_id) tokens a step"
            )
        return joined(storage.append(place, layout, keys, keys[..., :0] if values is None else values))

    def write(self, step: Step, layer: int, keys: Tensor, values: Tensor | None = None) -> None:
        """Store a step's tokens in one layer, for kernels that read pages themselves; arguments as for `append`.

        With windows, read the past of a layer before its new tokens are stored: they may take over its old pages.
        """
        storage, place, layout = self._target(step, layer, keys)
        storage.write(place, layout, keys, keys[..., :0] if values is None else values)

    def layer_view(self, step: Step, layer: int, *, shard: int = 0, value_dim: int | None = None) -> LayerView:
        """What attention may read in place of a layer, once `write` has stored the step's tokens in it.

        Args:
            step: from `lay_out`.
            layer: index over all groups.
            shard: tensor parallel shard, whose heads are seen.
            value_dim: for MLA, how many numbers of the latent are read as value (its rank).

        Returns:
            A view that is good until the layer's next tokens are stored. Ask for it before, and use `append` if it is
            not `in_place`.

        Raises:
            ShapeError: if the layer keeps no pages or takes no part in the step, or a latent's rank is missing.
        """
        group, place = self._place(layer)
        storage, layout = self._stored_in(step, layer)
        tables = step.shards[shard].lookup[group]
        assert tables is not None
        return storage.view(place, layout, tables.view(torch.int32), shard=shard, value_dim=value_dim)

    def view(self, seq_id: SeqId, layer: int, dtype: torch.dtype = torch.float32) -> KeysValues:
        """What the next query of a sequence sees of its committed tokens in one layer, as stored.

        Returns:
            Keys `[num_tokens, n_kv_heads, head_dim]` and values `[num_tokens, n_kv_heads, value_dim]`; of a windowed
            group the last tokens only.
        """
        group, place = self._place(layer)
        with self._lock:
            home = self._home(seq_id)
            layout = home.lay_out_group(group, [seq_id], [home.ledger.length(seq_id)], [0])
            storage = home.storages[group]
        assert storage is not None
        seen = joined(storage.past(place, layout, dtype))
        return KeysValues(seen.keys, seen.values)

    def state(self, seq_id: SeqId, layer: int) -> tuple[Tensor, ...]:
        """A sequence's state in a linear layer: per shard its bytes, read and overwritten in place by the layer."""
        group, place = self._layers[layer]
        if self.params.params[group].kind != "linear":
            raise ShapeError(f"layer {layer} is {self.params.params[group].kind}; only linear layers keep a state")
        with self._lock:
            return self._home(seq_id).state(seq_id, group, place)

    # The prefix cache, and the whole

    def pin(self, name: Hashable, seq_id: SeqId) -> int:
        """Keep the closed pages of a sequence from eviction until `unpin(name)`, whatever becomes of the sequence.

        Returns:
            Pages held, over all pools of its replica.

        Raises:
            ValueError: if the name is in use or the sequence unknown.
        """
        with self._lock:
            if name in self._pins:
                raise pin_in_use(name)
            home = self._home(seq_id)
            held = home.ledger.pin(name, seq_id)
            self._pins[name] = home
            return held

    def unpin(self, name: Hashable) -> None:
        """Let go of pinned pages.

        Raises:
            ValueError: if nothing is pinned under the name.
        """
        with self._lock:
            if name not in self._pins:
                raise not_pinned(name)
            self._pins.pop(name).ledger.unpin(name)

    def reset_prefix_cache(self) -> int:
        """Forget the cached pages of all replicas that no sequence uses; how many there were."""
        with self._lock:
            return sum(replica.ledger.reset_prefix_cache() for replica in self.replicas)

    def check_integrity(self) -> None:
        """Recount every replica from its sequences.

        Raises:
            AssertionError: if something disagrees.
        """
        with self._lock:
            for replica in self.replicas:
                replica.check_integrity()

    def metrics(self) -> LedgerMetrics:
        """The counters of all replicas together, as they are now."""
        with self._lock:
            first, *others = [replica.ledger.metrics() for replica in self.replicas]
            return sum(others, first)

    def length(self, seq_id: SeqId) -> int:
        """Tokens of a sequence that are stored."""
        with self._lock:
            return self._home(seq_id).ledger.length(seq_id)

    def __contains__(self, seq_id: object) -> bool:
        return seq_id in self._homes

    def _home(self, seq_id: SeqId) -> CacheReplica:
        home = self._homes.get(seq_id)
        if home is None:
            raise unclaimed(seq_id)
        return home

    def _common_home(self, seq_ids: Sequence[SeqId]) -> CacheReplica:
        if not seq_ids:
            raise ValueError("a batch needs at least one sequence")
        homes = {id(home): home for home in map(self._home, seq_ids)}
        if len(homes) > 1:
            raise ValueError("the sequences of a batch must live on one replica; each replica runs its own")
        return next(iter(homes.values()))

    def _place(self, layer: int) -> tuple[int, int]:
        group, place = self._layers[layer]
        if not self.params.params[group].stores_pages:
            raise ShapeError(f"layer {layer} is {self.params.params[group].kind} and keeps no keys and values")
        return group, place

    def _target(self, step: Step, layer: int, keys: Tensor) -> tuple[PagedStorage, int, GroupStep]:
        """Where a step meets a layer: the bytes of its group, its place there, and the layout of the step in it."""
        storage, layout = self._stored_in(step, layer)
        if len(keys) != sum(step.num_tokens):
            raise ShapeError(f"the step has {sum(step.num_tokens)} tokens, got {len(keys)}")
        return storage, self._place(layer)[1], layout

    def _stored_in(self, step: Step, layer: int) -> tuple[PagedStorage, GroupStep]:
        """The bytes of a layer's group, and the layout of a step in it."""
        group, _ = self._place(layer)
        storage, layout = self._home(step.seq_ids[0]).storages[group], step.groups[group]
        if layout is None:
            raise ShapeError(f"layer {layer} has a window and takes no part in a step ahead of what is committed")
        assert storage is not None
        return storage, layout

    def _lookahead(self, num_new_tokens: int, num_draft_tokens: int | None) -> int:
        drafts = self.params.num_draft_tokens if num_draft_tokens is None else num_draft_tokens
        is_block = self.params.speculative_method == "dflash"
        slots = RequestSlots(processed=0, active=num_new_tokens, num_draft_tokens=drafts, is_block_draft=is_block).slots
        return slots - num_new_tokens

    def _freest(self) -> CacheReplica:
        """The replica with the fewest sequences."""
        return min(self.replicas, key=lambda replica: len(replica.ledger))

    def _better_home(self, home: CacheReplica, seq_id: SeqId, num_tokens: int) -> CacheReplica | None:
        """A replica with a free row that has more of a sequence cached than the one where it was claimed."""
        names = home.ledger.page_names(seq_id, num_tokens) if len(self.replicas) > 1 else ()
        best, most = None, home.ledger.num_cached(names)
        for replica in self.replicas if names else ():
            found = replica.ledger.num_cached(names)
            if found > most and len(replica.ledger) < self.max_batch_size:
                best, most = replica, found
        return best

    def _copy_from_peers(self, home: CacheReplica, seq_id: SeqId, num_new_tokens: int) -> int:
        """Copy what another replica has of a sequence's next tokens; how many there were."""
        owners = {id(replica.ledger): replica for replica in self.replicas if replica is not home}
        loan = borrow(home.ledger, [replica.ledger for replica in owners.values()], seq_id, num_new_tokens)
        if loan is None:
            return 0
        home.copy(loan.copies, origin=owners[id(loan.lender)])
        home.begin_copied(seq_id, settle(home.ledger, loan))
        return loan.num_tokens
