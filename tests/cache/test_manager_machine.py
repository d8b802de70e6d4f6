"""Random lives of sequences with real bytes: what is read is what a model of plain lists says, in every format.

Keys and values of a token depend on all tokens up to it, as in a model, so a page that is shared wrongly, copied
to the wrong place or read from the wrong window gives other numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from kvcfg.cache.closing import ClosingStorage
from kvcfg.cache.closing_step import closing_step
from kvcfg.cache.manager import KVCacheManager
from kvcfg.cache.replica import CacheOptions
from kvcfg.cache.step import first_seen
from kvcfg.cache.storage import KeysValues
from kvcfg.dtypes import DeviceRef, DType
from kvcfg.errors import CapacityError
from kvcfg.formats import FORMATS, Recipe
from kvcfg.params import KVCacheParams, MultiKVCacheParams

SIZE, PAGES, ROWS, MAX_LEN = 3, 14, 4, 30
HEADS, WIDTH = 2, 8
MANY = settings(
    max_examples=15,
    stateful_step_count=30,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TRUNKS = ([0] * 20, [0, 1] * 10)
prompts = st.builds(
    lambda trunk, length, tail: TRUNKS[trunk][:length] + tail,
    st.integers(0, 1),
    st.integers(0, 16),
    st.lists(st.integers(0, 1), min_size=1, max_size=2),
)


def recipe_of(name: str) -> Recipe:
    element = FORMATS[name]
    granularity = "token_head" if element.scaled else "none"
    scale_dtype = DType.float16 if element.is_packed else DType.float32
    return Recipe(element, element, granularity, "dynamic" if element.scaled else "unit", scale_dtype)


def group_of(recipe: Recipe, **changes: object) -> KVCacheParams:
    base: dict[str, object] = {
        "dtype": recipe.key_format.dtype,
        "n_kv_heads": HEADS,
        "head_dim": WIDTH,
        "num_layers": 2,
        "devices": [DeviceRef.CPU()],
        "page_size": SIZE,
        "recipe": recipe,
        "enable_prefix_caching": True,
    }
    return KVCacheParams(**{**base, **changes})  # type: ignore[arg-type]


@lru_cache(maxsize=100_000)
def token(prefix: tuple[int, ...], salt: bytes, layer: int) -> torch.Tensor:
    """Key and value of the last token of a prefix, `[2, HEADS, WIDTH]`."""
    digest = hashlib.sha256(repr((prefix, salt, layer)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:6], "little"))
    return torch.randn((2, HEADS, WIDTH), generator=generator)


def closed_alone(storage: ClosingStorage, layer: int, numbers: list[torch.Tensor]) -> KeysValues:
    """Whole pages of tokens as they are read closed, made at once in a storage of their own."""
    count = len(numbers[0]) // SIZE
    devices = [torch.device("cpu")] * storage.params.tensor_parallel_degree
    own, pages = ClosingStorage(storage.params, count, 1, devices), torch.arange(count)
    places = {"page_size": SIZE, "ring_pages": own.ring_pages, "horizon": 0}
    own.write(layer, closing_step(pages.unsqueeze(0), [0], [0], [count * SIZE], [0], **places), *numbers)
    return own.read(layer, pages, torch.float32)


@dataclass
class Row:
    """A sequence of the model."""

    ids: list[int]
    salt: bytes
    replica: int
    length: int = 0
    firm: int = field(default=0)
    """Tokens that cannot be taken back."""


def machine(
    groups: list[KVCacheParams], options: CacheOptions, num_drafts: int = 0, replicas: int = 1
) -> type[RuleBasedStateMachine]:
    params = MultiKVCacheParams.from_params(*groups)

    class Lives(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.manager = KVCacheManager(
                params, num_pages=PAGES, max_batch_size=ROWS, max_seq_len=MAX_LEN, options=options
            )
            self.rows: dict[int, Row] = {}
            self.serial = 0

        def numbers(self, row: Row, layer: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
            """Keys and values of a row's tokens as a model would compute them."""
            group = params.params[layer // 2]
            heads, value = (1, 0) if group.is_mla else (HEADS, WIDTH)
            pairs = [token(tuple(row.ids[: end + 1]), row.salt, layer) for end in range(start, stop)]
            keys, values = torch.stack(pairs, dim=1) if pairs else torch.zeros((2, 0, HEADS, WIDTH))
            return keys[:, :heads], values[:, :heads, :value]

        def stored(self, row: Row, layer: int, start: int, stop: int, query: int) -> torch.Tensor:
            """What a query at a position must read, keys and values joined."""
            group, place = divmod(layer, 2)
            storage = self.manager.replicas[0].storages[group]
            numbers = self.numbers(row, layer, start, stop)
            if not isinstance(storage, ClosingStorage):
                assert storage is not None
                states = storage.decode(place, storage.encode(place, *numbers), torch.float32)
                return torch.cat(states, -1)
            opened = storage.opened
            states = opened.decode(place, opened.encode(place, *numbers), torch.float32)
            closed = max(query - num_drafts, row.firm) // SIZE
            if not closed:
                return torch.cat(states, -1)
            whole = closed_alone(storage, place, [item[: closed * SIZE] for item in numbers])
            return torch.cat(
                [torch.cat((old, new[closed * SIZE :])) for old, new in zip(whole, states, strict=True)], -1
            )

        @rule(ids=prompts, salt=st.sampled_from([b"", b"", b"other"]), replica=st.integers(0, replicas))
        def claim(self, ids: list[int], salt: bytes, replica: int) -> None:
            self.serial += 1
            try:
                home = self.manager.claim(self.serial, ids, salt=salt, replica=None if replica == replicas else replica)
            except CapacityError:
                return
            self.rows[self.serial] = Row(list(ids), salt, home)

        @rule(which=st.sets(st.integers(0, 9), min_size=1, max_size=3), chunk=st.integers(1, 8), data=st.data())
        def step(self, which: set[int], chunk: int, data: st.DataObject) -> None:
            chosen = sorted({sorted(self.rows)[number % len(self.rows)] for number in which}) if self.rows else []
            chosen = [name for name in chosen if self.rows[name].replica == self.rows[chosen[0]].replica]
            batch, drafted = [], {}
            for name in chosen:
                row = self.rows[name]
                left = len(row.ids) - row.length
                limit = self.manager.step_limit(name) or MAX_LEN
                fresh = [] if left else [data.draw(st.integers(0, 1)) for _ in range(min(1 + num_drafts, limit))]
                count = min(left, chunk, limit) or len(fresh)
                if row.length + count > MAX_LEN:
                    continue
                self.manager.extend(name, fresh)
                row.ids += fresh
                try:
                    done = self.manager.alloc(name, count)
                except CapacityError:
                    self.manager.truncate(name, row.length)
                    self.manager.extend(name, row.ids[row.length : len(row.ids) - len(fresh)])
                    del row.ids[len(row.ids) - len(fresh) :]
                    continue
                assert done.length == row.length + done.cached_tokens
                assert done.cached_tokens < count
                row.length = done.length
                if done.cached_tokens:
                    row.firm = row.length
                batch.append((name, count - done.cached_tokens))
                drafted[name] = len(fresh)
            if batch:
                self.run_step(batch)
            for name, count in batch:
                row = self.rows[name]
                accepted = count - (data.draw(st.integers(0, min(num_drafts, count - 1))) if drafted[name] else 0)
                self.manager.commit(name, accepted)
                row.length += accepted
                row.firm = max(row.firm, row.length - max(0, num_drafts - (count - accepted)))
                if accepted < count:
                    self.manager.truncate(name, row.length)
                    del row.ids[row.length :]

        def run_step(self, batch: list[tuple[int, int]]) -> None:
            step = self.manager.lay_out([name for name, _ in batch], [count for _, count in batch])
            rows = [(self.rows[name], count) for name, count in batch]
            for layer in range(self.manager.num_layers):
                new = [self.numbers(row, layer, row.length, row.length + count) for row, count in rows]
                keys, values = (torch.cat(parts) for parts in zip(*new, strict=True))
                seen = self.manager.append(step, layer, keys, values)
                first = [first_seen(params.params[layer // 2], row.length) for row, _ in rows]
                wanted = [
                    self.stored(row, layer, start, row.length + count, row.length)
                    for start, (row, count) in zip(first, rows, strict=True)
                ]
                assert torch.equal(torch.cat([seen.keys, seen.values], -1), torch.cat(wanted))
                assert seen.lengths == tuple(map(len, wanted))

        @rule(number=st.integers(0, 9), back=st.integers(0, 3))
        def truncate(self, number: int, back: int) -> None:
            if not self.rows:
                return
            name = sorted(self.rows)[number % len(self.rows)]
            row = self.rows[name]
            length = max(row.length - back, row.firm)
            if length < row.length:
                self.manager.truncate(name, length)
                row.length = length
                del row.ids[length:]

        @rule(number=st.integers(0, 9))
        def fork(self, number: int) -> None:
            if not self.rows:
                return
            parent = sorted(self.rows)[number % len(self.rows)]
            self.serial += 1
            try:
                self.manager.fork(parent, self.serial)
            except CapacityError:
                return
            row = self.rows[parent]
            self.rows[self.serial] = Row(list(row.ids), row.salt, row.replica, row.length, row.firm)

        @rule(number=st.integers(0, 9))
        def release(self, number: int) -> None:
            if self.rows:
                name = sorted(self.rows)[number % len(self.rows)]
                self.manager.release(name)
                del self.rows[name]

        @rule()
        def reset(self) -> None:
            self.manager.reset_prefix_cache()

        @invariant()
        def counts_add_up(self) -> None:
            self.manager.check_integrity()

        @invariant()
        def every_sequence_reads_what_it_wrote(self) -> None:
            for name, row in self.rows.items():
                for layer in range(self.manager.num_layers):
                    start = first_seen(params.params[layer // 2], row.length)
                    wanted = self.stored(row, layer, start, row.length, row.length)
                    assert torch.equal(torch.cat(self.manager.view(name, layer), -1), wanted)

        def teardown(self) -> None:
            for name in self.rows:
                self.manager.release(name)
            self.manager.reset_prefix_cache()
            assert self.manager.metrics().used_pages == 0

    return Lives


PLAIN = recipe_of("float32")
CHANNELS = replace(recipe_of("uint4"), key_granularity="channel", transform="hadamard")
CENTRED = replace(recipe_of("gauss4"), transform="centred", sink_tokens=1)
DRAFTS = {"speculative_method": "mtp", "num_draft_tokens": 2}


@pytest.mark.parametrize("name", list(FORMATS))
def test_every_format_reads_back_what_it_stored(name: str) -> None:
    run_state_machine_as_test(machine([group_of(recipe_of(name))], CacheOptions()), settings=MANY)


LAYOUTS: dict[str, Callable[[], list[KVCacheParams]]] = {
    "window": lambda: [group_of(PLAIN), group_of(PLAIN, kind="sliding_window", window=4)],
    "window first": lambda: [group_of(PLAIN, kind="sliding_window", window=3), group_of(PLAIN)],
    "chunks": lambda: [group_of(PLAIN, kind="chunked", window=5), group_of(PLAIN)],
    "windows alone": lambda: [group_of(PLAIN, kind="sliding_window", window=w) for w in (1, 7)],
    "channels": lambda: [group_of(CHANNELS)],
    "centred": lambda: [group_of(CENTRED)],
    "open pages finer": lambda: [group_of(replace(recipe_of("int8"), open_page_format=FORMATS["bfloat16"]))],
    "closing beside a window": lambda: [group_of(CHANNELS), group_of(PLAIN, kind="sliding_window", window=4)],
    "closing beside plain": lambda: [group_of(PLAIN), group_of(recipe_of("gauss3"))],
    "closing latents": lambda: [group_of(recipe_of("int4"), kind="mla", num_q_heads=4)],
    "latents": lambda: [group_of(recipe_of("int8"), kind="mla", num_q_heads=4)],
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_every_layer_group_reads_what_it_can_see(layout: str) -> None:
    run_state_machine_as_test(machine(LAYOUTS[layout](), CacheOptions()), settings=MANY)


@pytest.mark.parametrize("name", ["float32", "int4"])
@pytest.mark.parametrize("window", [None, 4])
def test_rejected_drafts_leave_no_trace(window: int | None, name: str) -> None:
    groups = [group_of(recipe_of(name), **DRAFTS)]
    if window:
        groups.append(group_of(PLAIN, kind="sliding_window", window=window, **DRAFTS))
    run_state_machine_as_test(machine(groups, CacheOptions(), num_drafts=2), settings=MANY)


@pytest.mark.parametrize("name", ["int8", "gauss4"])
@pytest.mark.parametrize("copies", [True, False])
def test_replicas_read_what_was_copied_between_them(copies: bool, name: str) -> None:
    devices = [DeviceRef.CPU(index) for index in range(4)]
    groups = [group_of(recipe_of(name), devices=devices, data_parallel_degree=2)]
    options = CacheOptions(enable_dp_cross_replica_prefix_copy=copies)
    run_state_machine_as_test(machine(groups, options, replicas=2), settings=MANY)


@pytest.mark.parametrize("eviction", ["lfu", "fifo", "priority"])
def test_every_eviction_policy_keeps_content_apart(eviction: str) -> None:
    run_state_machine_as_test(machine([group_of(PLAIN)], CacheOptions(eviction=eviction)), settings=MANY)


@pytest.mark.parametrize("name", ["float32", "int8"])
def test_pages_reused_in_part_hold_what_was_copied(name: str) -> None:
    options = CacheOptions(reuse_partial_pages=True)
    run_state_machine_as_test(machine([group_of(recipe_of(name))], options), settings=MANY)


def test_verified_hits_read_the_same() -> None:
    run_state_machine_as_test(machine([group_of(PLAIN)], CacheOptions(verify_prefix_tokens=True)), settings=MANY)


def test_nothing_is_shared_without_prefix_caching() -> None:
    options = CacheOptions(enable_prefix_caching=False)
    run_state_machine_as_test(machine([group_of(PLAIN)], options), settings=MANY)
