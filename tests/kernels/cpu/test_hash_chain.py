"""The compiled chain gives what the Python one gives."""

from __future__ import annotations

import random
from array import array

import pytest

from kvcfg.cache.prefix import PageHasher
from kvcfg.errors import BackendUnavailable
from kvcfg.kernels.cpu.hash_chain import NAME_BYTES, compiled_chain, narrowed

PAGE_SIZES = [*range(1, 70), 100, 127, 128, 129, 255, 256, 257, 300, 511, 512, 513, 1024, 4096]
VARIANTS = [("sha256", False), ("sha256", True), ("xxh3_128", False)]


def chains(algorithm: str, plain: bool) -> tuple[PageHasher, object]:
    try:
        hasher = PageHasher(algorithm)
    except BackendUnavailable as error:
        pytest.skip(str(error))
    compiled = compiled_chain(algorithm, plain=plain)
    if compiled is None:
        pytest.skip("no C++ compiler")
    return hasher, compiled


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize(("algorithm", "plain"), VARIANTS)
def test_compiled_names_are_those_of_the_library(algorithm: str, plain: bool, page_size: int) -> None:
    hasher, compiled = chains(algorithm, plain)
    rng = random.Random(page_size)
    ids = array("i", [rng.randrange(-(2**31), 2**31) for _ in range(3 * page_size + 1)])
    one_by_one = []
    parent = hasher.root(b"")
    for page in range(3):
        one_by_one += hasher.chain(one_by_one[-1] if one_by_one else parent, ids, page_size, page, page + 1)
    assert compiled(parent, ids, page_size, 0, 3) == one_by_one  # type: ignore[operator]
    assert compiled(one_by_one[0], ids, page_size, 1, 2) == one_by_one[1:]  # type: ignore[operator]


@pytest.mark.parametrize("algorithm", NAME_BYTES)
def test_pages_beyond_the_ids_are_refused(algorithm: str) -> None:
    _, compiled = chains(algorithm, False)
    with pytest.raises(ValueError, match="do not follow"):
        compiled(bytes(NAME_BYTES[algorithm]), array("i", range(15)), 4, 1, 3)  # type: ignore[operator]


def test_an_algorithm_that_is_not_compiled_has_no_chain() -> None:
    assert compiled_chain("blake3") is None


def test_wide_ids_are_narrowed_or_refused() -> None:
    if narrowed(bytes(8)) is None:
        pytest.skip("no C++ compiler")
    assert narrowed(array("q", [0, -1, 2**31 - 1, -(2**31)]).tobytes()) == array("i", [0, -1, 2**31 - 1, -(2**31)])
    for number in (2**31, -(2**31) - 1, 2**32, 2**63 - 1):
        assert narrowed(array("q", [5, number]).tobytes()) is None
