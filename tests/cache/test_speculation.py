"""Drafting, verifying and rejecting on real pages gives the text that the model writes alone.

The model here reads its cache: its next token is a digest of all keys and values that a query sees, so one stale
or misplaced slot changes the text. Keys and values depend on all tokens up to theirs.
"""

from __future__ import annotations

import hashlib
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvcfg
from kvcfg.cache.building import build_manager
from kvcfg.cache.manager import KVCacheManager
from kvcfg.sizing import RequestSlots

METHODS = ("standalone", "eagle", "mtp", "dflash")
HEADS = "num_layers:1,n_kv_heads:2,head_dim:16"
WINDOWS = f"model.layer_groups=[{{kind:full,{HEADS}}},{{kind:sliding_window,window:5,{HEADS}}}]"
WORDS = 7


class Speaker:
    """A target and a drafter on one cache.

    Args:
        manager: the cache.
        skill: how often a draft is what the target would say.
        seed: for the drafts that are not.
    """

    def __init__(self, manager: KVCacheManager, skill: float = 0.0, seed: int = 0) -> None:
        self.manager, self.skill, self.dice = manager, skill, random.Random(seed)
        params = manager.params
        self.layers = {
            role: [
                layer
                for layer, group in enumerate(group for group in params.params for _ in range(group.num_layers))
                if group.role == role
            ]
            for role in ("target", "draft")
        }
        self.group_of = [group for group in params.params for _ in range(group.num_layers)]

    def numbers(self, ids: list[int], layer: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of tokens `[start, stop)` in a layer."""
        group = self.group_of[layer]
        rows = []
        for end in range(start, stop):
            digest = hashlib.sha256(repr((ids[: end + 1], layer)).encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:6], "little"))
            rows.append(torch.randn(2, group.n_kv_heads, group.head_dim, generator=generator))
        keys, values = torch.stack(rows, dim=1)
        return keys, values

    def run(self, name: object, ids: list[int], role: str, count: int, ahead: int = 0) -> list[int]:
        """A forward pass over `count` tokens: the word that each query would say next."""
        manager = self.manager
        start = manager.length(name) + ahead
        step = manager.lay_out([name], [count], ahead=ahead)
        digests = [hashlib.sha256() for _ in range(count)]
        for layer in self.layers[role]:
            seen = manager.append(step, layer, *self.numbers(ids, layer, start, start + count))
            window = self.group_of[layer].window
            first = start + count - seen.lengths[0]
            for query, digest in enumerate(digests):
                position = start + query
                begin = 0 if window is None else max(0, position - window + 1)
                visible = slice(begin - first, position + 1 - first)
                digest.update(seen.keys[visible].contiguous().numpy().tobytes())
                digest.update(seen.values[visible].contiguous().numpy().tobytes())
        return [int.from_bytes(digest.digest()[:4], "little") % WORDS for digest in digests]

    def prefill(self, name: object, ids: list[int]) -> None:
        """Store all tokens but the last."""
        manager = self.manager
        manager.claim(name, ids)
        done = manager.alloc(name, len(ids) - 1)
        count = len(ids) - 1 - done.cached_tokens
        if count:
            for role in ("target", "draft"):
                if self.layers[role]:
                    self.run(name, ids, role, count)
        manager.commit(name, count)

    def speak(self, name: object, ids: list[int], length: int) -> None:
        """Write until there are `length` tokens, as many drafts a round as the cache was made for."""
        manager, drafts = self.manager, self.manager.params.num_draft_tokens
        while len(ids) < length:
            manager.alloc(name, 1)
            stored = len(ids) - 1
            guess = list(ids)
            if manager.params.speculative_method == "dflash":
                guess += [self.draft(guess) for _ in range(drafts)]
                self.run(name, guess, "draft", drafts)
            else:
                for ahead in range(drafts):
                    self.run(name, guess, "draft", 1, ahead)
                    guess.append(self.draft(guess))
            said = self.run(name, guess, "target", 1 + drafts)
            accepted = 0
            while accepted < drafts and guess[stored + 1 + accepted] == said[accepted]:
                accepted += 1
            if drafts:
                self.run(name, guess, "draft", 1 + accepted)
            new = said[: accepted + 1]
            manager.extend(name, new)
            manager.commit(name, accepted + 1)
            ids += new
            assert manager.length(name) == len(ids) - 1
            manager.check_integrity()

    def draft(self, ids: list[int]) -> int:
        """A guess of the word after these, right as often as the skill says."""
        return self.truth(ids) if self.dice.random() < self.skill else self.dice.randrange(WORDS)

    def truth(self, ids: list[int]) -> int:
        """The word that the target says after these, from scratch."""
        digest = hashlib.sha256()
        for layer in self.layers["target"]:
            window = self.group_of[layer].window
            begin = 0 if window is None else max(0, len(ids) - window)
            keys, values = self.numbers(ids, layer, begin, len(ids))
            digest.update(keys.contiguous().numpy().tobytes())
            digest.update(values.contiguous().numpy().tobytes())
        return int.from_bytes(digest.digest()[:4], "little") % WORDS


def manager_for(method: str | None, drafts: int, page_size: int, *, windows: bool = False) -> KVCacheManager:
    overrides = ["model=tiny", "devices=cpu", "cache.kv_cache_format=float32", f"cache.kv_cache_page_size={page_size}"]
    overrides += ["workload.max_batch_size=2", "workload.max_seq_len=48", "model.dtype=float32"]
    if windows:
        overrides.append(WINDOWS)
    if method:
        overrides += [f"speculative={method}", f"speculative.num_speculative_tokens={drafts}"]
    return build_manager(kvcfg.compose(overrides))


@pytest.mark.parametrize("windows", [False, True], ids=["full", "windows"])
@pytest.mark.parametrize("method", METHODS)
@given(
    seed=st.integers(0, 1000),
    skill=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    drafts=st.integers(1, 4),
    page_size=st.sampled_from([1, 3, 4, 16]),
    prompt=st.lists(st.integers(0, WORDS - 1), min_size=1, max_size=12),
)
@settings(deadline=None, max_examples=12)
def test_random_accepts_and_rejects_leave_the_text_of_the_model_alone(
    method: str, windows: bool, seed: int, skill: float, drafts: int, page_size: int, prompt: list[int]
) -> None:
    fast = Speaker(manager_for(method, drafts, page_size, windows=windows), skill, seed)
    alone = Speaker(manager_for(None, 0, page_size, windows=windows))
    texts = []
    for speaker in (fast, alone):
        ids = list(prompt)
        speaker.prefill("a", ids)
        speaker.speak("a", ids, 30)
        texts.append(ids[:30])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("method", METHODS)
def test_rejected_drafts_are_never_found_by_others(method: str) -> None:
    speaker = Speaker(manager_for(method, 3, 2), skill=0.4, seed=1)
    first = [1, 2, 3]
    speaker.prefill("first", first)
    speaker.speak("first", first, 24)
    again = first[:20]
    speaker.prefill("second", again)
    assert speaker.manager.metrics().cache_tokens >= 18
    speaker.speak("second", again, 24)
    assert again[:24] == first[:24]


@pytest.mark.parametrize("method", METHODS)
def test_the_drafter_shares_pages_and_tables_with_the_target(method: str) -> None:
    manager = manager_for(method, 2, 4)
    manager.claim("a", range(5))
    manager.alloc("a", 5)
    step = manager.lay_out(["a"])
    roles = [group.role for group in manager.params.params]
    target, draft = roles.index("target"), roles.index("draft")
    assert step.groups[target] is step.groups[draft]
    assert step.shards[0].lookup[target] is step.shards[0].lookup[draft]


@pytest.mark.parametrize(("method", "slots"), [("standalone", 4), ("eagle", 4), ("mtp", 4), ("dflash", 5)])
def test_a_request_gets_the_slots_of_its_method(method: str, slots: int) -> None:
    manager = manager_for(method, 2, 1)
    manager.claim("a", range(6))
    manager.alloc("a", 6)
    wanted = RequestSlots(processed=0, active=6, num_draft_tokens=2, is_block_draft=method == "dflash").slots
    assert (manager.replicas[0].ledger.room("a"), wanted) == (6 + slots, 6 + slots)


@pytest.mark.parametrize(("method", "each"), [("standalone", 1), ("eagle", 1), ("mtp", 1), ("dflash", 3)])
def test_drafts_are_made_one_by_one_but_for_a_block_drafter(method: str, each: int) -> None:
    assert manager_for(method, 3, 4).params.num_draft_tokens_per_step == each
