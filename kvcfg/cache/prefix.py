"""What pages are called: names chained over token ids, so that equal names mean equal prefixes.

The name of a page is a digest of the name before it and of its own token ids. The chain starts from a root
that stands for everything else the content depends on: the namespace (model, adapter, RoPE scaling, format,
recipe, source dtype, layout), the seed, and the salt of the request.

    root   = H("kvcfg " algorithm, then namespace, seed and salt, each after its length)
    name_i = H(name_{i-1}, ids of page i as little-endian int32),  name_{-1} = root

    sha256     collision resistant, in the standard library
    blake3     collision resistant, needs the blake3 package
    xxh3_128   several times faster; who chooses the tokens can make two prefixes collide, so it is not for
               strangers that share a pool

Nothing enters that differs between processes: names can be compared between replicas, and stored.
"""

from __future__ import annotations

import hashlib
import json
import struct
import warnings
from array import array
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import NamedTuple

from kvcfg.errors import BackendUnavailable, ConfigError, Problem, one_of
from kvcfg.kernels.cpu.hash_chain import HashChain, compiled_chain, narrowed

HASH_KEY = "cache.kv_cache_hash_algo"
"""The configuration key that names an algorithm, for error messages."""

_FEW_PAGES = 2
"""Up to this many pages the standard library is faster than a call into compiled code."""

_FEW_TOKENS = 64
"""Up to this many token ids are converted one by one."""

_REMEMBERED_ROOTS = 4096
"""Salts whose roots are kept; more are computed anew each time."""


class _Algorithm(NamedTuple):
    module: str
    function: str
    collision_resistant: bool


ALGORITHMS: dict[str, _Algorithm] = {
    "sha256": _Algorithm("hashlib", "sha256", True),
    "xxh3_128": _Algorithm("xxhash", "xxh3_128", False),
    "blake3": _Algorithm("blake3", "blake3", True),
}
"""Hash algorithms by name."""


class PageHasher:
    """Names pages by their content and all that comes before it.

    Args:
        algorithm: a name in `ALGORITHMS`.
        seed: part of every name; unknown to outsiders, it keeps them from guessing names.
        namespace: stands for all that decides what a page holds besides tokens (`fingerprint`).

    Raises:
        ConfigError: if the algorithm is unknown.
        BackendUnavailable: if it needs a package that is not installed.
    """

    def __init__(self, algorithm: str = "sha256", *, seed: bytes = b"", namespace: bytes = b"") -> None:
        self.algorithm, self.seed, self.namespace = algorithm, seed, namespace
        self._hash = _find(algorithm)
        self._compiled: HashChain | None = None
        self._looked = False
        self._roots: dict[bytes, bytes] = {}

    def root(self, salt: bytes = b"") -> bytes:
        """The name before the first page of sequences with this salt.

        Warns:
            UserWarning: if a salt keeps tenants apart but the algorithm does not withstand them.
        """
        root = self._roots.get(salt)
        if root is None:
            if salt and not ALGORITHMS[self.algorithm].collision_resistant:
                warnings.warn(
                    f"salted sequences share a pool under {self.algorithm}, which a tenant can make collide. "
                    f"Try: {HASH_KEY}=sha256",
                    stacklevel=2,
                )
            parts = (self.namespace, self.seed, salt)
            framed = b"".join(struct.pack("<Q", len(part)) + part for part in parts)
            root = self._hash(f"kvcfg {self.algorithm}".encode() + framed)
            if len(self._roots) < _REMEMBERED_ROOTS:
                self._roots[salt] = root
        return root

    def chain(self, parent: bytes, ids: array[int], page_size: int, first: int, end: int) -> list[bytes]:
        """Names of the pages `[first, end)` of a sequence.

        Args:
            parent: name of the page before `first`, or the root.
            ids: token ids of the sequence from its start, as `token_ids` returns them.
            page_size: tokens in a page.
            first: index of the first page to name.
            end: index of the page after the last; all of them are full.
        """
        count = end - first
        if count > _FEW_PAGES:
            if not self._looked:
                self._compiled, self._looked = compiled_chain(self.algorithm), True
            if self._compiled is not None:
                return self._compiled(parent, ids, page_size, first, count)
        name, digest, names = parent, self._hash, []
        data, width = memoryview(ids).cast("B"), page_size * ids.itemsize
        for start in range(first * width, end * width, width):
            name = digest(name + data[start : start + width])
            names.append(name)
        return names


def fingerprint(facts: Mapping[str, object]) -> bytes:
    """A namespace from named facts (JSON values), independent of their order."""
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).digest()


def token_ids(tokens: Iterable[int]) -> array[int]:
    """Token ids as an array of int32, the form that is hashed, from a list, array or tensor of integers.

    Raises:
        ValueError: if an id is no integer that int32 holds.
    """
    if isinstance(tokens, array) and tokens.typecode == "i":
        return tokens[:]
    wide = None if isinstance(tokens, list) else wide_ids(tokens)
    ids = None if wide is None else narrowed(wide)
    if ids is not None:
        return ids
    try:
        listed = tokens.tolist() if hasattr(tokens, "tolist") else tokens
        numbers = listed if isinstance(listed, list) else list(listed)
        return array("i", struct.pack(f"{len(numbers)}i", *numbers))
    except (struct.error, TypeError) as error:
        raise ValueError(f"token ids must be integers below 2**31, in one dimension: {error}") from None


def wide_ids(tokens: object) -> bytes | None:
    """The bytes of a buffer of int64, not a short one: it is narrowed without a Python integer per token."""
    try:
        view = memoryview(tokens)  # type: ignore[arg-type]
    except TypeError:
        return None
    is_wide = view.ndim == 1 and view.format in ("q", "l") and view.itemsize == 8
    return view.tobytes() if is_wide and len(view) > _FEW_TOKENS else None


def _find(algorithm: str) -> Callable[[bytes], bytes]:
    """The digest function of an algorithm."""
    if algorithm not in ALGORITHMS:
        rule = one_of(list(ALGORITHMS))
        if algorithm == "ahash64":
            rule = "has 64 bits, too few to tell all pages apart, and differs between processes; " + rule
        raise ConfigError(Problem(HASH_KEY, rule, algorithm, f"{HASH_KEY}=sha256"))
    module, function, _ = ALGORITHMS[algorithm]
    try:
        new = getattr(import_module(module), function)
    except ImportError:
        raise BackendUnavailable(
            f"{HASH_KEY}={algorithm} needs the {module} package: pip install {module}. Try: {HASH_KEY}=sha256"
        ) from None
    return lambda data: new(data).digest()
