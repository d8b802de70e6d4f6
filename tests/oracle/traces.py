"""Recorded traces of MAX's paged manager, played on the page ledger.

A trace is a list of operations and the state after each. The ledger does the same operations; its state is
written in the record's words and compared. Three faults of MAX show in the states, and nothing else may differ:

    25   One draft of eagle or mtp takes the extra slot of a block drafter. With that slot all must be equal.
    26   26.4 keeps the prefix hit of a refused alloc: its pages stay referenced, its tokens count as processed.
         From such a refusal on the trace is another one.
    29   MAX counts input tokens again each time alloc is called or refused. What it says must be exactly that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from conditions import Difference

from kvcfg.cache.ledger import PageLedger
from kvcfg.cache.replicas import borrow, settle
from kvcfg.errors import CapacityError
from kvcfg.sizing import RequestSlots
from kvcfg.units import ceil_div

State = dict[str, Any]

ERRORS = {CapacityError: "InsufficientBlocksError", ValueError: "ValueError"}


class Outcome(NamedTuple):
    """What became of a trace: "same", "better: 26, 29" or "different"; how many values agree, and which do not."""

    name: str
    same_values: int
    unexplained: tuple[Difference, ...]


def replay(record: Mapping[str, Any]) -> Outcome:
    """Play a recorded trace and compare every state."""
    outcome = compare(record, own_slot=False)
    if outcome.unexplained and record["inputs"].get("num_draft_tokens") == 1:
        generous = compare(record, own_slot=True)
        if not generous.unexplained:
            reasons = {"25", *generous.name.removeprefix("better: ").split(", ")} - {"same"}
            return generous._replace(name=f"better: {', '.join(sorted(reasons))}")
    return outcome


def compare(record: Mapping[str, Any], *, own_slot: bool) -> Outcome:
    """Play a trace.

    Args:
        record: the trace.
        own_slot: whether each request gets the slot that only a block of drafts needs.
    """
    game = Game(record["inputs"], is_new=record["max"].startswith("26.7"), own_slot=own_slot)
    reasons: set[str] = set()
    same_values, unexplained = 0, []
    steps = zip(record["inputs"]["ops"], record["outputs"]["states"], strict=True)
    for number, (operation, theirs) in enumerate(steps):
        ours = game.play(operation)
        if game.spliced(operation, theirs):
            reasons.add("26")
            break
        found = list(differing(theirs, ours))
        same_values += sum(1 for _ in values(theirs)) - len(found)
        for path, left, right in found:
            if path == "input_tokens" and left == game.counted_again:
                reasons.add("29")
            else:
                unexplained.append(Difference(record, f"{number}.{operation['op']}.{path}", left, right))
    if unexplained:
        return Outcome("different", same_values, tuple(unexplained))
    return Outcome(f"better: {', '.join(sorted(reasons))}" if reasons else "same", same_values, ())


def values(state: Any) -> Iterator[Any]:
    """All single values of a state."""
    if isinstance(state, dict | list):
        for item in state.values() if isinstance(state, dict) else state:
            yield from values(item)
    else:
        yield state


def differing(theirs: Any, ours: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two states differ; of errors only the type counts."""
    if path == "error" and isinstance(theirs, dict):
        theirs = theirs["type"]
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted({*theirs, *ours}):
            yield from differing(theirs.get(key), ours.get(key), f"{path}.{key}" if path else key)
    elif isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        for place, (left, right) in enumerate(zip(theirs, ours, strict=True)):
            yield from differing(left, right, f"{path}.{place}")
    elif theirs != ours:
        yield path, theirs, ours


@dataclass
class Request:
    """What the engine around the manager knows of one request."""

    tokens: list[int]
    replica: int
    processed: int = 0
    active: int = 0
    cached_prefix: int | None = None
    to_verify: list[int] = field(default_factory=list)
    maybe_accepted: list[int] = field(default_factory=list)
    refused: bool = False


class Game:
    """The ledgers of one trace, one a replica, and its requests."""

    def __init__(self, inputs: Mapping[str, Any], *, is_new: bool, own_slot: bool) -> None:
        self.inputs, self.is_new, self.own_slot = inputs, is_new, own_slot
        self.page_size, self.total_pages = inputs["page_size"], inputs["total_pages"]
        self.drafts = inputs.get("num_draft_tokens", 0)
        self.ledgers = [
            PageLedger(self.total_pages, self.page_size, enable_prefix_caching=inputs["enable_prefix_caching"])
            for _ in range(inputs.get("replicas", 1))
        ]
        self.requests: dict[str, Request] = {}
        self.claimed: set[str] = set()
        self.counted_again = 0

    def play(self, operation: Mapping[str, Any]) -> State:
        """Do one operation; the state after it."""
        arguments = {key: value for key, value in operation.items() if key not in ("op", "rid", "rids")}
        names = operation.get("rids") or ([operation["rid"]] if "rid" in operation else [])
        guarded = operation["op"] in ("inputs", "update", "step") and self.inputs.get("guard")
        if guarded and any(self.requests[name].refused for name in names):
            return {"skipped": True}
        outcome: State = {}
        try:
            result = getattr(self, f"do_{operation['op']}")(names, **arguments)
            if result is not None:
                outcome["result"] = result
        except (CapacityError, ValueError) as error:
            outcome["error"] = ERRORS[CapacityError if isinstance(error, CapacityError) else ValueError]
        for ledger in self.ledgers:
            ledger.check_integrity()
        return outcome | self.state()

    def spliced(self, operation: Mapping[str, Any], theirs: State) -> bool:
        """Whether MAX refused this alloc but kept the prefix that it had found."""
        if operation["op"] != "alloc" or "error" not in theirs:
            return False
        request = self.requests[operation["rid"]]
        return bool(theirs["reqs"][operation["rid"]]["processed"] > request.processed)

    def state(self) -> State:
        """What a record says of all requests and replicas."""
        metrics = [ledger.metrics() for ledger in self.ledgers]
        total = sum(metrics[1:], metrics[0])
        return {
            "cache_tokens": total.cache_tokens,
            "cached": [item.cached_pages for item in metrics],
            "free": [item.free_pages for item in metrics],
            "input_tokens": total.input_tokens,
            "reqs": {name: self.describe(name, request) for name, request in self.requests.items()},
        }

    def describe(self, name: str, request: Request) -> State:
        """What a record says of one request."""
        ledger = self.ledgers[request.replica]
        held = name in self.claimed
        blocks = list(ledger.page_table(name).pages) if held else []
        closed = ledger.length(name) // self.page_size * self.page_size if held else 0
        return {
            "active": request.active,
            "blocks": blocks,
            "cached_prefix": request.cached_prefix,
            "committed": closed if self.inputs["enable_prefix_caching"] else 0,
            "length": len(request.tokens),
            "processed": request.processed,
        }

    def do_new(self, names: list[str], tokens: list[int], replica: int = 0) -> None:
        """A request arrives."""
        self.requests[names[0]] = Request(list(tokens), replica, active=len(tokens))

    def do_claim(self, names: list[str]) -> None:
        """The manager learns of it."""
        request = self.requests[names[0]]
        self.ledgers[request.replica].claim(names[0], request.tokens)
        self.claimed.add(names[0])

    def do_alloc(self, names: list[str], num_steps: int = 1) -> None:
        """Pages for the coming step."""
        name, request = names[0], self.requests[names[0]]
        ledger = self.ledgers[request.replica]
        end = request.processed + request.active
        slots = self.slots(request, num_steps).slots
        before = ledger.length(name)
        found = ledger.forecast(name, end - before, lookahead=slots - end).cached_tokens
        if slots <= self.total_pages * self.page_size:
            self.counted_again += request.active - found
        if self.inputs["enable_prefix_caching"] and request.active > 1:
            request.cached_prefix = request.cached_prefix or 0
        request.refused = True
        allocation = ledger.alloc(name, end - before, lookahead=slots - end)
        request.refused = False
        if self.is_new and (borrowed := self.borrow(name, request.replica, end - allocation.length)):
            found += borrowed
            self.counted_again -= borrowed
            allocation = allocation._replace(length=allocation.length + borrowed)
        if found:
            request.cached_prefix = found
            request.processed, request.active = allocation.length, end - allocation.length

    def borrow(self, name: str, replica: int, num_new_tokens: int) -> int:
        """Tokens that 26.7 copies from another replica."""
        ledger = self.ledgers[replica]
        loan = borrow(ledger, [peer for peer in self.ledgers if peer is not ledger], name, num_new_tokens)
        if loan is None:
            return 0
        settle(ledger, loan)
        return loan.num_tokens

    def do_chunk(self, names: list[str], n: int) -> None:
        """Only the next n tokens are for the coming step."""
        self.requests[names[0]].active = n

    def do_draft(self, names: list[str], to_verify: list[int], maybe_accepted: list[int] | None = None) -> None:
        """Drafts that the coming step verifies, and some whose verdict is still out."""
        request = self.requests[names[0]]
        request.to_verify, request.maybe_accepted = to_verify, maybe_accepted or []

    def do_inputs(self, names: list[str], num_steps: int = 1) -> list[State]:
        """What the model would be given, per replica."""
        batches: list[list[str]] = [[] for _ in self.ledgers]
        for name in names:
            batches[self.requests[name].replica].append(name)
        return [self.runtime_inputs(replica, batch, num_steps) for replica, batch in enumerate(batches) if batch]

    def runtime_inputs(self, replica: int, batch: list[str], num_steps: int) -> State:
        """Tables and lengths of one replica's batch."""
        slots = [self.slots(self.requests[name], num_steps) for name in batch]
        tables = [list(self.ledgers[replica].page_table(name).pages) for name in batch]
        for name, item, pages in zip(batch, slots, tables, strict=True):
            if item.slots > len(pages) * self.page_size:
                raise ValueError(f"{name} has {len(pages)} pages, {item.slots} slots are needed")
        columns = ceil_div(max(ceil_div(item.slots, self.page_size) for item in slots), 8) * 8 + 16
        width, length = max(item.query_width for item in slots), max(item.valid_length for item in slots)
        result: State = {
            "attention_dispatch_metadata": [len(batch), width, 1, length],
            "cache_lengths": [item.processed + item.maybe_accepted for item in slots],
            "kv_blocks_shape": [self.total_pages + 1, 2, 1, self.page_size, 1, 2],
            "lookup_table": [
                (self.visible(pages, item) + [self.total_pages] * columns)[:columns]
                for item, pages in zip(slots, tables, strict=True)
            ],
        }
        if self.drafts:
            result["draft_attention_dispatch_metadata"] = [len(batch), 1, 1, length]
        if self.is_new:
            return result | {"max_prompt_length": [width], "max_cache_length": [length]}
        return result | {"max_lengths": [[width, length], *([1, length + step] for step in range(1, num_steps))]}

    def visible(self, pages: list[int], item: RequestSlots) -> list[int]:
        """The pages that a table names: 26.7 only those that the step needs, 26.4 all."""
        return pages[: ceil_div(item.slots, self.page_size)] if self.is_new else pages

    def do_update(self, names: list[str], token: int) -> None:
        """The step ran: what was active is processed; the last of the prompt yields a new token."""
        request = self.requests[names[0]]
        request.processed += request.active
        if request.processed == len(request.tokens):
            request.tokens.append(token)
            if names[0] in self.claimed:
                self.ledgers[request.replica].extend(names[0], [token])
        request.active = len(request.tokens) - request.processed

    def do_step(self, names: list[str]) -> None:
        """The manager learns what is stored."""
        for name in names:
            request = self.requests[name]
            ledger = self.ledgers[request.replica]
            ledger.commit(name, request.processed - ledger.length(name))

    def do_release(self, names: list[str]) -> None:
        """The request gives back its pages."""
        request = self.requests[names[0]]
        self.ledgers[request.replica].release(names[0])
        self.claimed.discard(names[0])

    def do_reset_context(self, names: list[str]) -> None:
        """The request starts over: all its tokens are a prompt."""
        request = self.requests[names[0]]
        request.processed, request.active = 0, len(request.tokens)
        request.to_verify, request.maybe_accepted = [], []

    def do_reset_prefix_cache(self, names: list[str]) -> None:
        """Forget what is cached and unused."""
        for ledger in self.ledgers:
            ledger.reset_prefix_cache()

    def do_forget(self, names: list[str]) -> None:
        """The record stops mentioning a request."""
        del self.requests[names[0]]

    def slots(self, request: Request, num_steps: int) -> RequestSlots:
        """What a step of a request needs."""
        return RequestSlots(
            processed=request.processed,
            active=request.active,
            num_draft_tokens=self.drafts,
            is_block_draft=self.inputs.get("speculative_method") == "dflash" or self.own_slot,
            to_verify=len(request.to_verify),
            maybe_accepted=len(request.maybe_accepted),
            num_steps=num_steps,
        )
