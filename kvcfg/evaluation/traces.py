"""Request traces, as lists of the pages that each request's prompt is made of.

Two forms, one JSON object a line:

    Mooncake   {"timestamp": 0, "input_length": 700, "output_length": 5, "hash_ids": [0, 14]}
               each id names a block of 512 tokens and all blocks before it; the last one may be part of a block
    plain      {"tokens": [1, 2, 3]} or {"text": "…"}, whose bytes are its tokens; "salt" keeps tenants apart

A page that is smaller than a block is a numbered part of it; a larger one is named by its last block. A trace
names the block at a prompt's end, so that is a page like the others, counted whole. Of plain prompts the full
pages are named, as the engine does it, and the last token is always computed.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kvcfg.cache.prefix import PageHasher, token_ids
from kvcfg.errors import ConfigError, Problem
from kvcfg.units import ceil_div

BLOCK_TOKENS = 512
"""Tokens that a hash id of a Mooncake trace stands for."""

TRACE_KEY = "workload.trace"
PAGE_KEY = "cache.kv_cache_page_size"


class NamedPages(NamedTuple):
    """Neighbouring pages that are always used together.

    Attributes:
        name: stands for their content and all before it.
        num_pages: how many.
    """

    name: Hashable
    num_pages: int


@dataclass(frozen=True, slots=True)
class PagedRequest:
    """One request: its prompt in tokens, and in pages."""

    input_tokens: int
    pages: tuple[NamedPages, ...]

    @property
    def num_pages(self) -> int:
        """Pages of the prompt."""
        return sum([item.num_pages for item in self.pages])

    def page_names(self) -> list[Hashable]:
        """A name for every single page."""
        names: list[Hashable] = []
        for name, count in self.pages:
            names += [name] if count == 1 else [(name, part) for part in range(count)]
        return names


@dataclass(frozen=True, slots=True)
class Trace:
    """The lines of a trace file, in the order in which requests arrive."""

    path: str
    lines: tuple[Mapping[str, Any], ...]

    @classmethod
    def read(cls, path: str | Path) -> Trace:
        """Read a trace file.

        Raises:
            ConfigError: if there is no such file, a line is no JSON object, or it holds neither form.
        """
        try:
            texts = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(Problem(TRACE_KEY, f"cannot be read: {error}", str(path))) from None
        return cls(
            str(path), tuple(_checked(path, number, text) for number, text in enumerate(texts, 1) if text.strip())
        )

    def paged(self, page_size: int, hasher: PageHasher | None = None) -> list[PagedRequest]:
        """The requests in pages of that size.

        Args:
            page_size: tokens in a page. For a Mooncake trace it must divide 512 or be a multiple of it.
            hasher: names the pages of plain prompts; None = sha256.

        Raises:
            ConfigError: if the page size does not fit.
        """
        if any("hash_ids" in line for line in self.lines) and BLOCK_TOKENS % page_size and page_size % BLOCK_TOKENS:
            rule = f"must divide {BLOCK_TOKENS} or be a multiple of it: the trace names blocks of {BLOCK_TOKENS} tokens"
            raise ConfigError(Problem(PAGE_KEY, rule, page_size, f"{PAGE_KEY}={BLOCK_TOKENS}"))
        hasher = hasher or PageHasher()
        return [
            _paged_blocks(line, page_size) if "hash_ids" in line else _paged_tokens(line, page_size, hasher)
            for line in self.lines
        ]


def _checked(path: str | Path, number: int, text: str) -> Mapping[str, Any]:
    where = f"{path}, line {number}"
    try:
        line = json.loads(text)
    except ValueError as error:
        raise ConfigError(Problem(TRACE_KEY, f"{where} is not JSON: {error}")) from None
    if not isinstance(line, dict):
        raise ConfigError(Problem(TRACE_KEY, f"{where} must be an object with hash_ids, tokens or text"))
    if isinstance(ids := line.get("hash_ids"), list):
        tokens = line.get("input_length")
        if not isinstance(tokens, int) or not ids or ceil_div(tokens, BLOCK_TOKENS) != len(ids):
            rule = f"{where}: input_length must need as many blocks of {BLOCK_TOKENS} tokens as there are hash_ids"
            raise ConfigError(Problem(TRACE_KEY, rule, tokens))
    elif not isinstance(line.get("tokens"), list) and not isinstance(line.get("text"), str):
        raise ConfigError(Problem(TRACE_KEY, f"{where} must have hash_ids, tokens or text"))
    return line


def _paged_blocks(line: Mapping[str, Any], page_size: int) -> PagedRequest:
    tokens, ids = line["input_length"], line["hash_ids"]
    if page_size > BLOCK_TOKENS:
        step = page_size // BLOCK_TOKENS
        last_of_each = [ids[min(end, len(ids)) - 1] for end in range(step, len(ids) + step, step)]
        return PagedRequest(tokens, tuple([NamedPages(name, 1) for name in last_of_each]))
    whole = BLOCK_TOKENS // page_size
    pages = [NamedPages(name, whole) for name in ids[:-1]]
    rest = tokens - BLOCK_TOKENS * (len(ids) - 1)
    return PagedRequest(tokens, (*pages, NamedPages(ids[-1], ceil_div(rest, page_size))))


def _paged_tokens(line: Mapping[str, Any], page_size: int, hasher: PageHasher) -> PagedRequest:
    try:
        ids = token_ids(line["tokens"] if "tokens" in line else line["text"].encode())
    except ValueError as error:
        raise ConfigError(Problem(TRACE_KEY, str(error))) from None
    count = max(len(ids) - 1, 0) // page_size
    root = hasher.root(str(line.get("salt", "")).encode())
    return PagedRequest(len(ids), tuple([NamedPages(name, 1) for name in hasher.chain(root, ids, page_size, 0, count)]))
