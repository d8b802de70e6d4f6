"""What one call of the ledger does, and what it refuses."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from typing import Any

import pytest

from kvcfg.cache.ledger import PageCopy, PageGroup, PageLedger, PageTable
from kvcfg.errors import CapacityError, ConfigError

SIZE = 4
DEFAULTS: dict[str, Any] = {}


@pytest.fixture(autouse=True, params=[False, True], ids=["python", "compiled"])
def _engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DEFAULTS, "compiled", request.param)


def ledger_of(num_pages: int = 8, **options: Any) -> PageLedger:
    return PageLedger(num_pages, SIZE, **DEFAULTS, **options)


def serve(ledger: PageLedger, name: Any, count: int, **options: Any) -> int:
    """Claim, allocate and store `count` tokens 0, 1, 2, …; the cached ones."""
    ledger.claim(name, range(count), **options)
    done = ledger.alloc(name, count)
    ledger.commit(name, count - done.cached_tokens)
    return done.cached_tokens


def test_a_second_sequence_shares_full_pages_and_computes_the_last_token() -> None:
    ledger = ledger_of()
    assert serve(ledger, "a", 8) == 0
    assert serve(ledger, "b", 8) == 4
    assert ledger.page_table("a").pages[0] == ledger.page_table("b").pages[0]


def test_a_page_found_twice_ends_up_once() -> None:
    ledger = ledger_of()
    serve(ledger, "a", 8)
    ledger.claim("b", range(8))
    ledger.alloc("b", 8)
    (moved,) = ledger.commit("b", 4).moved
    assert (moved.first, moved.pages) == (1, ledger.page_table("a").pages[1:])
    assert ledger.page_table("b") == ledger.page_table("a")
    assert ledger.metrics().used_pages == 2


def test_tenants_share_nothing() -> None:
    ledger = ledger_of(16)
    serve(ledger, "a", 9, salt=b"one")
    assert serve(ledger, "b", 9, salt=b"two") == 0
    assert serve(ledger, "c", 9, salt=b"one") == 8


def test_without_ids_nothing_is_cached() -> None:
    ledger = ledger_of()
    ledger.claim("a")
    ledger.alloc("a", 9)
    ledger.commit("a", 9)
    assert ledger.metrics().cached_pages == 0
    with pytest.raises(ValueError, match="claimed without token ids"):
        ledger.extend("a", [1])


def test_names_given_from_outside_are_found_to_the_last() -> None:
    ledger = ledger_of()
    for name, cached in (("a", 0), ("b", 8)):
        ledger.claim(name, names=["x", "y"])
        assert ledger.alloc(name, 8).cached_tokens == cached
        ledger.commit(name, 8 - cached)
        ledger.release(name)


def test_a_conversation_goes_on_from_its_last_turn() -> None:
    ledger = ledger_of(16)
    serve(ledger, "first turn", 10)
    ledger.extend("first turn", [50, 51])
    ledger.alloc("first turn", 2)
    ledger.commit("first turn", 2)
    ledger.release("first turn")
    ledger.claim("second turn", [*range(10), 50, 51, 60, 61, 62])
    assert ledger.alloc("second turn", 15).cached_tokens == 12


def test_the_prefix_of_a_sequence_that_waited_is_found_later() -> None:
    ledger = ledger_of()
    ledger.claim("late", range(9))
    ledger.alloc("late", 9)
    serve(ledger, "early", 9)
    done = ledger.alloc("late", 9)
    assert (done.cached_tokens, done.length) == (8, 8)
    assert ledger.page_table("late").pages[:2] == ledger.page_table("early").pages[:2]
    ledger.check_integrity()


def test_alloc_again_takes_nothing_more() -> None:
    ledger = ledger_of()
    ledger.claim("a", range(9))
    assert len(ledger.alloc("a", 9, lookahead=3).new_pages) == 1
    assert ledger.alloc("a", 9, lookahead=3).new_pages == ()


def test_a_refused_alloc_changes_nothing_even_after_a_hit() -> None:
    ledger = ledger_of(6)
    serve(ledger, "a", 9)
    ledger.claim("b", range(20))
    before = ledger.page_table("b"), ledger.length("b"), ledger.metrics().free_pages, ledger.metrics().input_tokens
    with pytest.raises(CapacityError):
        ledger.alloc("b", 20, lookahead=10)
    after = ledger.page_table("b"), ledger.length("b"), ledger.metrics().free_pages, ledger.metrics().input_tokens
    assert before == after
    ledger.check_integrity()


def test_a_refusal_names_need_free_evictable_and_the_way_out() -> None:
    ledger = ledger_of(6, bytes_for_pages=lambda pages: 1000 * pages)
    serve(ledger, "a", 9)
    serve(ledger, "gone", 5, salt=b"x")
    ledger.release("gone")
    ledger.claim("b", range(100, 116))
    with pytest.raises(CapacityError) as caught:
        ledger.alloc("b", 16)
    assert str(caught.value) == (
        "out of pages: sequence 'b' needs 4 pages of 4 tokens in kv, 3 of 6 are free, 1 of those evictable; "
        "1 other sequence holds pages. Try: cache.kv_cache_memory_bytes=7000 or workload.max_batch_size=1"
    )


def test_a_sequence_that_never_fits_is_told_what_would() -> None:
    ledger = ledger_of(2)
    ledger.claim("a", range(20))
    with pytest.raises(CapacityError, match=r"Try: workload\.max_seq_len=8$"):
        ledger.alloc("a", 20)


def test_refusals_do_not_count_as_input() -> None:
    ledger = ledger_of(2)
    ledger.claim("a", range(20))
    with pytest.raises(CapacityError):
        ledger.alloc("a", 20)
    assert (ledger.metrics().input_tokens, ledger.metrics().refusals) == (0, 1)


def test_each_token_counts_once_however_often_and_in_whatever_chunks_it_is_allocated() -> None:
    ledger = ledger_of()
    ledger.claim("a", range(14))
    for chunk in (14, 3):
        ledger.alloc("a", chunk)
    ledger.commit("a", 3)
    ledger.alloc("a", 11)
    assert ledger.metrics().input_tokens == 14


def test_a_released_sequence_leaves_no_trace() -> None:
    ledger = ledger_of()
    serve(ledger, "a", 9)
    ledger.release("a")
    assert "a" not in ledger
    with pytest.raises(ValueError, match="sequence 'a' is not claimed"):
        ledger.length("a")
    serve(ledger, "a", 9)


def test_forecast_counts_hits_that_are_free_and_stops_at_a_gap() -> None:
    ledger = ledger_of(6)
    serve(ledger, "a", 13)
    ledger.release("a")
    ledger.claim("b", range(13))
    assert ledger.forecast("b", 13).cached_tokens == 12
    ledger.claim("other")
    ledger.alloc("other", 16)
    forecast = ledger.forecast("b", 13)
    assert (forecast.cached_tokens, forecast.pages, forecast.fits) == (8, 4, False)


def test_a_page_closes_only_past_the_drafts() -> None:
    ledger = ledger_of(num_draft_tokens=2)
    ledger.claim("a", range(20))
    ledger.alloc("a", 5)
    assert ledger.commit("a", 5).closed == ()
    ledger.alloc("a", 1)
    (run,) = ledger.commit("a", 1).closed
    assert (run.first, run.pages) == (0, (0,))


def test_a_commit_without_drafts_closes_at_once() -> None:
    ledger = ledger_of(num_draft_tokens=2)
    ledger.claim("a", range(20))
    ledger.alloc("a", 5)
    assert len(ledger.commit("a", 5, num_drafts=0).closed) == 1


def test_rejected_drafts_give_back_pages_and_ids() -> None:
    ledger = ledger_of(num_draft_tokens=3)
    ledger.claim("a", range(7))
    ledger.alloc("a", 7)
    ledger.commit("a", 7)
    ledger.extend("a", [90, 91, 92])
    ledger.alloc("a", 3)
    ledger.commit("a", 3)
    ledger.truncate("a", 8)
    assert (ledger.length("a"), len(ledger.page_table("a").pages)) == (8, 2)
    with pytest.raises(ValueError, match="ids of 8 are known; extend it first"):
        ledger.alloc("a", 1)
        ledger.commit("a", 1)


@pytest.mark.parametrize("caching", [False, True])
def test_a_closed_page_is_not_opened_again(caching: bool) -> None:
    ledger = ledger_of(enable_prefix_caching=caching)
    serve(ledger, "a", 9)
    with pytest.raises(ValueError, match=r"cannot cut sequence 'a' of 9 tokens to 6: .* or cut to 4$"):
        ledger.truncate("a", 6)
    ledger.truncate("a", 4)
    assert ledger.page_table("a").pages == (0,)


def test_what_a_commit_says_may_be_taken_back_can_be() -> None:
    ledger = ledger_of()
    ledger.claim("a", range(9))
    ledger.alloc("a", 9)
    assert ledger.commit("a", 9, num_drafts=9).closed == ()
    ledger.truncate("a", 3)
    assert (ledger.length("a"), ledger.page_table("a").pages) == (3, (0,))
    ledger.check_integrity()


def test_a_fork_shares_closed_pages_and_copies_the_open_one() -> None:
    ledger = ledger_of()
    serve(ledger, "a", 6)
    assert ledger.fork("a", "b") == (PageCopy(0, source=1, target=2),)
    assert ledger.page_table("b") == PageTable(0, (0, 2))
    ledger.release("a")
    ledger.check_integrity()
    assert ledger.metrics().used_pages == 2


def test_a_fork_on_a_page_boundary_copies_nothing() -> None:
    ledger = ledger_of()
    serve(ledger, "a", 8)
    assert ledger.fork("a", "b") == ()


def test_a_fork_without_room_changes_nothing() -> None:
    ledger = ledger_of(2)
    serve(ledger, "a", 6)
    with pytest.raises(CapacityError, match="needs 1 page"):
        ledger.fork("a", "b")
    assert "b" not in ledger
    ledger.check_integrity()


def test_a_batch_grows_together_or_not_at_all() -> None:
    ledger = ledger_of(3)
    for name in "ab":
        ledger.claim(name)
        ledger.alloc(name, 4)
        ledger.commit(name, 4)
    with pytest.raises(CapacityError, match="a batch of 2 sequences needs 2 pages"):
        ledger.alloc_batch(["a", "b"])
    assert [len(ledger.page_table(name).pages) for name in "ab"] == [1, 1]


def test_a_decode_step_is_alloc_and_commit_for_each() -> None:
    batched, single = ledger_of(40), ledger_of(40)
    for ledger in (batched, single):
        for name in range(4):
            serve(ledger, name, 5 + name, salt=bytes([name]))
    for step in range(12):
        tokens = [step, step, step + 1, step]
        batched.alloc_batch(range(4), tokens=tokens)
        batched.commit_batch(range(4))
        for name in range(4):
            single.extend(name, [tokens[name]])
            single.alloc(name, 1)
        for name in range(4):
            single.commit(name, 1)
    assert [batched.page_table(name) for name in range(4)] == [single.page_table(name) for name in range(4)]
    assert batched.metrics() == single.metrics()


@pytest.mark.parametrize("tokens", [[1], [1, 2, 3]])
def test_a_batch_needs_one_id_each(tokens: list[int]) -> None:
    ledger = ledger_of()
    for name in "ab":
        ledger.claim(name, [1])
    with pytest.raises(ValueError, match="do not make 1 for each of 2 sequences"):
        ledger.alloc_batch(["a", "b"], tokens=tokens)


def test_a_sequence_cannot_be_in_a_batch_twice() -> None:
    ledger = ledger_of()
    ledger.claim("a")
    with pytest.raises(ValueError, match="named twice"):
        ledger.alloc_batch(["a", "a"])


def test_commits_need_slots_and_ids() -> None:
    ledger = ledger_of()
    ledger.claim("a", range(3))
    ledger.alloc("a", 4)
    with pytest.raises(ValueError, match="ids of 3 are known"):
        ledger.commit("a", 4)
    with pytest.raises(ValueError, match="it has slots for 4; alloc them first"):
        ledger.commit("a", 5)


@pytest.mark.parametrize(
    "call",
    [
        lambda ledger: ledger.alloc("a", -1),
        lambda ledger: ledger.alloc("a", 1, lookahead=-1),
        lambda ledger: ledger.alloc_batch(["a"], -1),
        lambda ledger: ledger.commit("a", -1),
        lambda ledger: ledger.commit("a", 1, num_drafts=-1),
    ],
)
def test_negative_numbers_are_refused(call: Any) -> None:
    ledger = ledger_of()
    ledger.claim("a")
    ledger.alloc("a", 4)
    ledger.commit("a", 3)
    with pytest.raises(ValueError, match="must be at least 0"):
        call(ledger)
    assert ledger.length("a") == 3


@pytest.mark.parametrize("call", [lambda ledger: ledger.claim("a"), lambda ledger: ledger.fork("a", "a")])
def test_a_name_in_use_is_refused(call: Any) -> None:
    ledger = ledger_of()
    ledger.claim("a")
    with pytest.raises(ValueError, match="is claimed already"):
        call(ledger)


def test_a_reset_forgets_what_is_unused_and_keeps_the_rest() -> None:
    ledger = ledger_of(16)
    serve(ledger, "used", 9)
    serve(ledger, "gone", 9, salt=b"x")
    ledger.release("gone")
    assert ledger.reset_prefix_cache() == 2
    assert serve(ledger, "again", 9) == 8
    assert ledger.metrics().evictions == 0


def test_metrics_are_a_frozen_snapshot_and_add_up() -> None:
    ledger = ledger_of()
    serve(ledger, "a", 9)
    before = ledger.metrics()
    serve(ledger, "b", 9)
    after = ledger.metrics()
    assert (before.cache_hit_rate, after.cache_hit_rate) == (0.0, 8 / 18)
    assert after.occupancy == 4 / 8
    total = before + after
    assert (total.prompt_tokens, total.num_pages, total.free_pages) == (27, 16, 5 + 4)


def test_lifetimes_of_evicted_pages_are_told_in_powers_of_two() -> None:
    now = [100.0]
    ledger = ledger_of(2, clock=lambda: now[0])
    serve(ledger, "a", 4)
    now[0] = 103.0
    ledger.claim("no ids")
    ledger.release("a")
    ledger.alloc("no ids", 8)
    assert ledger.metrics().page_lifetimes == {4.0: 1}
    ledger.reset_metrics()
    assert ledger.metrics().page_lifetimes == {}


def test_slots_beyond_the_length_are_room() -> None:
    ledger = ledger_of()
    ledger.claim("a", range(5))
    ledger.alloc("a", 5, lookahead=4)
    ledger.commit("a", 5)
    assert ledger.room("a") == 7


def test_the_longest_run_of_cached_names_is_counted() -> None:
    ledger = ledger_of(16)
    serve(ledger, "a", 13)
    ledger.claim("b", [*range(8), 90, 91, 92, 93, 94])
    names = ledger.page_names("b", 13)
    assert (len(names), ledger.num_cached(names), ledger.num_cached(names[2:])) == (3, 2, 0)


def test_the_common_beginning_of_a_page_is_copied_if_asked_for() -> None:
    found = []
    for reuse in (False, True):
        ledger = ledger_of(16, reuse_partial_pages=reuse)
        serve(ledger, "a", 13)
        ledger.claim("b", [0, 1, 2, 3, 4, 5, 90, 91, 92])
        done = ledger.alloc("b", 9)
        found.append((done.cached_tokens, done.copies, ledger.metrics().cache_tokens))
        ledger.check_integrity()
    assert found == [(4, (), 4), (6, (PageCopy(0, source=1, target=4),), 6)]


def test_the_last_token_is_computed_even_if_it_could_be_copied() -> None:
    ledger = ledger_of(reuse_partial_pages=True)
    serve(ledger, "a", 9)
    ledger.claim("b", range(7))
    assert ledger.alloc("b", 7).cached_tokens == 6
    ledger.claim("c", range(5))
    assert ledger.alloc("c", 5).cached_tokens == 4


def test_a_page_is_not_copied_where_it_would_have_to_be_handed_out() -> None:
    ledger = ledger_of(3, reuse_partial_pages=True)
    serve(ledger, "a", 9)
    ledger.release("a")
    ledger.claim("b", [0, 1, 90, 91, 92, 93, 94, 95, 96])
    forecast = ledger.forecast("b", 9)
    assert (forecast.cached_tokens, forecast.fits) == (0, True)
    done = ledger.alloc("b", 9)
    assert (done.cached_tokens, done.copies) == (0, ())


def test_tenants_copy_nothing_from_each_other() -> None:
    ledger = ledger_of(reuse_partial_pages=True)
    serve(ledger, "a", 9, salt=b"one")
    ledger.claim("b", range(7), salt=b"two")
    assert ledger.alloc("b", 7).cached_tokens == 0


def test_with_windows_no_page_is_copied() -> None:
    groups = [PageGroup("full"), PageGroup("window", "sliding_window", 4, 8)]
    ledger = ledger_of(groups=groups, reuse_partial_pages=True)
    ledger.claim("a", range(12))
    for count in (8, 4):
        ledger.alloc("a", count)
        ledger.commit("a", count)
    ledger.claim("b", [*range(10), 90, 91])
    done = ledger.alloc("b", 12)
    assert (done.cached_tokens, done.copies) == (8, ())


def test_tokens_are_compared_on_a_hit_if_asked_for() -> None:
    class Weak:
        def root(self, salt: bytes = b"") -> bytes:
            return b""

        def chain(self, parent: bytes, ids: Any, page_size: int, first: int, end: int) -> list[bytes]:
            return [bytes([page]) for page in range(first, end)]

    hits = []
    for verify in (False, True):
        ledger = ledger_of(hasher=Weak(), verify_tokens=verify)  # type: ignore[arg-type]
        serve(ledger, "a", 9)
        ledger.claim("b", range(100, 109))
        hits.append(ledger.alloc("b", 9).cached_tokens)
        ledger.commit("b", 9 - hits[-1])
        ledger.check_integrity()
    assert hits == [8, 0]


@pytest.mark.parametrize("options", [{"num_pages": -1, "page_size": 4}, {"num_pages": 4, "page_size": 0}])
def test_impossible_numbers_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="must be at least"):
        PageLedger(**options)


def test_threads_share_a_ledger() -> None:
    ledger = ledger_of(64)
    errors: list[BaseException] = []

    def work(worker: int) -> None:
        rng = random.Random(worker)
        try:
            for turn in range(150):
                name = (worker, turn)
                ids = [0] * rng.randrange(1, 30) + [rng.randrange(2) for _ in range(rng.randrange(1, 6))]
                ledger.claim(name, ids)
                try:
                    done = ledger.alloc(name, len(ids))
                    ledger.commit(name, len(ids) - done.cached_tokens)
                    for _ in range(rng.randrange(4)):
                        ledger.alloc_batch([name], tokens=[7])
                        ledger.commit_batch([name])
                    if turn % 5 == 0:
                        ledger.fork(name, (name, "copy"))
                        ledger.release((name, "copy"))
                    if turn % 50 == 0:
                        ledger.check_integrity()
                        ledger.reset_prefix_cache()
                except CapacityError:
                    pass
                ledger.release(name)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(8)]
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(switch)
    assert not errors
    ledger.check_integrity()
    assert ledger.metrics().used_pages == 0


def test_the_ledger_needs_neither_torch_nor_numpy() -> None:
    code = "import kvcfg.cache.ledger, sys; print([name for name in ('torch', 'numpy') if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
