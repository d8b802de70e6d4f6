"""What pages are called."""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
import sys
import warnings
from array import array

import pytest

from kvcfg.cache.index import PrefixIndex
from kvcfg.cache.prefix import ALGORITHMS, PageHasher, fingerprint, token_ids
from kvcfg.errors import BackendUnavailable, ConfigError

torch = pytest.importorskip("torch")
numpy = pytest.importorskip("numpy")

IDS = array("i", range(1000, 1064))


def hasher_of(algorithm: str, seed: bytes = b"", namespace: bytes = b"") -> PageHasher:
    try:
        return PageHasher(algorithm, seed=seed, namespace=namespace)
    except BackendUnavailable as error:
        pytest.skip(str(error))


def names(hasher: PageHasher, ids: array[int] = IDS, page_size: int = 16, salt: bytes = b"") -> list[bytes]:
    return hasher.chain(hasher.root(salt), ids, page_size, 0, len(ids) // page_size)


def test_a_name_is_the_digest_of_the_name_before_and_the_ids() -> None:
    framed = b"".join(struct.pack("<Q", len(part)) + part for part in (b"space", b"seed", b"salt"))
    expected = hashlib.sha256(b"kvcfg sha256" + framed).digest()
    for start in range(0, 64, 16):
        expected = hashlib.sha256(expected + struct.pack("<16i", *IDS[start : start + 16])).digest()
    assert names(PageHasher(seed=b"seed", namespace=b"space"), salt=b"salt")[-1] == expected


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_chain_can_be_continued(algorithm: str) -> None:
    hasher = hasher_of(algorithm)
    whole = names(hasher)
    first = hasher.chain(hasher.root(), IDS, 16, 0, 1)
    assert first + hasher.chain(first[-1], IDS, 16, 1, 4) == whole


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_equal_pages_after_different_prefixes_have_different_names(algorithm: str) -> None:
    hasher = hasher_of(algorithm)
    changed = IDS[:]
    changed[0] += 1
    assert not {*names(hasher)} & {*names(hasher, changed)}


@pytest.mark.parametrize("other", [{"seed": b"x"}, {"namespace": b"x"}, {"namespace": b"x", "seed": b"y"}])
def test_seed_and_namespace_change_every_name(other: dict[str, bytes]) -> None:
    assert not {*names(PageHasher())} & {*names(PageHasher(**other))}


def test_seed_salt_and_namespace_cannot_stand_for_each_other() -> None:
    roots = {
        PageHasher(seed=b"ab").root(),
        PageHasher(namespace=b"ab").root(),
        PageHasher().root(b"ab"),
        PageHasher(seed=b"a").root(b"b"),
        PageHasher(namespace=b"a", seed=b"b").root(),
    }
    assert len(roots) == 5


def test_each_salt_has_names_of_its_own() -> None:
    hasher = PageHasher()
    assert not {*names(hasher, salt=b"a")} & {*names(hasher, salt=b"b")}


def test_algorithms_do_not_share_names() -> None:
    roots = [hasher_of(algorithm).root() for algorithm in ("sha256", "blake3")]
    assert roots[0] != roots[1]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_other_processes_give_the_same_names(algorithm: str) -> None:
    hasher = hasher_of(algorithm, seed=b"seed", namespace=fingerprint({"model": "tiny", "rope": {"factor": 8.0}}))
    code = (
        "from kvcfg.cache.prefix import *\n"
        "space = fingerprint({'rope': {'factor': 8.0}, 'model': 'tiny'})\n"
        f"hasher = PageHasher({algorithm!r}, seed=b'seed', namespace=space)\n"
        "ids = token_ids(range(1000, 1064))\n"
        "print(hasher.chain(hasher.root(), ids, 16, 0, 4)[-1].hex())"
    )
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert run.stdout.strip() == names(hasher)[-1].hex()


def test_fingerprints_differ_with_any_fact() -> None:
    facts = {"model": "a", "adapter": None, "format": "int8"}
    assert fingerprint(facts) == fingerprint(dict(reversed(facts.items())))
    assert fingerprint(facts) != fingerprint(facts | {"adapter": "b"})


def test_a_64_bit_hash_is_refused_with_a_pointer() -> None:
    with pytest.raises(
        ConfigError, match=r"ahash64: has 64 bits.*must be one of sha256, xxh3_128 or blake3\. Try: .*=sha256"
    ):
        PageHasher("ahash64")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "blake3", None)
    with pytest.raises(BackendUnavailable, match="pip install blake3"):
        PageHasher("blake3")


def test_salts_under_a_weak_hash_are_warned_about() -> None:
    hasher = hasher_of("xxh3_128")
    with pytest.warns(UserWarning, match="make collide"):
        hasher.root(b"tenant")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hasher.root()
        hasher.root(b"tenant")


@pytest.mark.parametrize(
    "tokens",
    [
        [1, 2**31 - 1, 0],
        (1, 2**31 - 1, 0),
        array("q", [1, 2**31 - 1, 0]),
        array("i", [1, 2**31 - 1, 0]),
        numpy.array([1, 2**31 - 1, 0]),
        numpy.array([1, 0, 2**31 - 1, 0, 0, 0])[::2] * 0 + numpy.array([1, 2**31 - 1, 0]),
        numpy.array([1, 2**31 - 1, 0], dtype=numpy.int32),
        numpy.array([1, 2**31 - 1, 0], dtype=numpy.uint64),
        torch.tensor([1, 2**31 - 1, 0]),
        iter([1, 2**31 - 1, 0]),
    ],
)
def test_all_kinds_of_integers_become_the_same_ids(tokens: object) -> None:
    assert token_ids(tokens) == array("i", [1, 2**31 - 1, 0])


@pytest.mark.parametrize("tokens", [numpy.array([5, -7]), [5, -7]])
def test_negative_ids_are_kept(tokens: object) -> None:
    assert token_ids(tokens) == array("i", [5, -7])


@pytest.mark.parametrize(
    "tokens",
    [[2**31], numpy.array([2**31]), numpy.array([2**40]), [1.5], [[1, 2]], torch.zeros(2, 2, dtype=torch.int64)],
)
def test_ids_that_do_not_fit_are_refused(tokens: object) -> None:
    with pytest.raises(ValueError, match="token ids must be integers below"):
        token_ids(tokens)


def test_ids_are_copied() -> None:
    given = array("i", [1, 2])
    kept = token_ids(given)
    given[0] = 9
    assert kept == array("i", [1, 2])


def test_verified_names_are_believed_only_with_the_right_ids() -> None:
    index = PrefixIndex(4, verify=True)
    assert index.name([2, 3], ["a", "b"], 0.0, [b"zero", b"one"]) == [2, 3]
    assert index.run(["a", "b"], 0, {0: b"zero", 1: b"one"}.__getitem__) == [2, 3]
    assert index.run(["a", "b"], 0, {0: b"zero", 1: b"uno"}.__getitem__) == [2]


def test_under_a_collision_the_newcomer_keeps_its_own_page() -> None:
    index = PrefixIndex(4, verify=True)
    index.name([2], ["a"], 0.0, [b"first"])
    assert index.name([3], ["a"], 0.0, [b"second"]) == [3]
    assert index.run(["a"], 0, lambda page: b"second") == []
    index.check_integrity()
