"""The core's own index and its line of free pages, against a dict and a list."""

from __future__ import annotations

import random
from array import array
from ctypes import string_at

import pytest

from kvcfg.kernels.cpu.page_core import NO_IDS, CoreFunctions, CoreHead, RowHead, core_functions, hashing_addresses

WIDTH, PAGES = 32, 40


@pytest.fixture
def do() -> CoreFunctions:
    functions = core_functions()
    if functions is None:
        pytest.skip("no C++ compiler")
    return functions


def out(core: int) -> list[int]:
    head = CoreHead.from_address(core)
    return array("i", string_at(head.out, 4 * head.out_size)).tolist() if head.out_size else []


@pytest.mark.parametrize("homes", [1, 3, 1000])
def test_names_are_found_however_many_share_a_place_in_the_table(do: CoreFunctions, homes: int) -> None:
    rng = random.Random(homes)
    core = do.new(PAGES, 1, WIDTH, *hashing_addresses("sha256"))
    free, named = list(range(PAGES)), dict[bytes, int]()
    for step in range(2000):
        name = rng.randrange(homes).to_bytes(8, "little") + rng.randrange(100).to_bytes(WIDTH - 8, "little")
        row = do.claim(core, None, NO_IDS, False, None, name, 1)
        assert row is not None
        do.alloc(core, row, 2, 0, float(step))
        found = CoreHead.from_address(core).cached
        assert found == (name in named), step
        pages = out(core)
        for page in pages:
            free.remove(page)
            if not found or page != named[name]:
                named = {key: other for key, other in named.items() if other != page}
        do.commit(core, array("Q", [row]).tobytes(), 1, 2 - found, 0, float(step))
        named.setdefault(name, pages[0])
        do.release(core, row, False)
        free += pages[::-1]
        do.free_pages(core)
        assert out(core) == free
    do.run(core, b"".join(named), len(named))
    assert out(core) == list(named.values())
    do.delete(core)


def test_lifetimes_are_counted_by_the_power_of_two_above(do: CoreFunctions) -> None:
    core = do.new(1, 1, WIDTH, *hashing_addresses("sha256"))
    births = [0.0, 0.0, 4.0, 9.0, 9.0 + 1e-30, 1e30]
    for place, now in enumerate(births):
        row = do.claim(core, None, NO_IDS, False, None, place.to_bytes(WIDTH, "little"), 1)
        assert row is not None
        do.alloc(core, row, 1, 0, now)
        do.commit(core, array("Q", [row]).tobytes(), 1, 1, 0, now)
        do.release(core, row, False)
    counts = {place - 65: count for place, count in enumerate(CoreHead.from_address(core).lifetimes) if count}
    assert counts == {-65: 2, 2: 1, 3: 1, 63: 1}
    do.delete(core)


def test_ids_that_do_not_fit_make_no_sequence(do: CoreFunctions) -> None:
    core = do.new(1, 1, WIDTH, *hashing_addresses("sha256"))
    assert do.claim(core, array("q", [1, 2**31]).tobytes(), 2, True, None, None, 0) is None
    row = do.claim(core, array("q", [1, -(2**31)]).tobytes(), 2, True, None, None, 0)
    assert row is not None
    assert RowHead.from_address(row).num_ids == 2
    do.delete_row(row)
    do.delete(core)
