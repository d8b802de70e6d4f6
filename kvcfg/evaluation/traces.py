"""Request traces, read from files of JSON lines, also gzipped, in the order in which requests arrive.

Two forms, of which a file has one:

    Mooncake   {"timestamp": 0, "input_length": 700, "output_length": 5, "hash_ids": [0, 14]}
               each id, an integer or text, names a block of tokens (512 unless the config says otherwise)
    plain      {"tokens": [1, 2, 3]} or {"text": "…"}, whose UTF-8 bytes are its tokens; "salt" keeps tenants apart

Prompts are what counts. Answers are not part of a trace: `output_length` and `timestamp` are not read, and what an
answer left in the cache is first seen when a later prompt repeats it. Ids may also name the block at a prompt's end
that is not full. Tokens beyond the blocks that are named count as input and are never found.

A block is known by its id and all ids before it, whether or not ids of the trace imply what precedes them.
"""

from __future__ import annotations

import gzip
import json
import zlib
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcfg.cache.prefix import token_ids
from kvcfg.errors import ConfigError, Problem
from kvcfg.units import ceil_div

BLOCK_TOKENS = 512
"""Tokens that a hash id of a Mooncake trace stands for."""

TRACE_KEY = "workload.trace"
BLOCK_KEY = "workload.trace_block_size"

_GZIP = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class BlockPrompt:
    """A prompt of which blocks are named.

    Attributes:
        input_tokens: its length.
        blocks: a number for each block, the same in all prompts that agree up to the block's end.
    """

    input_tokens: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """A prompt whose tokens are known.

    Attributes:
        ids: int32 token ids.
        salt: prompts of different salts share nothing.
    """

    ids: array[int]
    salt: bytes = b""

    @property
    def input_tokens(self) -> int:
        """Its length."""
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Trace:
    """The prompts of a trace file.

    Attributes:
        path: where it was read from.
        block_size: tokens of a named block.
        prompts: all of one form.
    """

    path: str
    block_size: int
    prompts: tuple[BlockPrompt, ...] | tuple[TokenPrompt, ...]

    @classmethod
    def read(cls, path: str | Path, block_size: int = BLOCK_TOKENS) -> Trace:
        """Read a trace file.

        Args:
            path: of the file.
            block_size: tokens that one of its hash ids names.

        Raises:
            ConfigError: if there is no such file, it holds no request, or a line cannot be; it names the line.
        """
        prompts: list[Any] = []
        numbers: dict[tuple[int, int | str], int] = {}
        for line, where in _objects(path):
            is_blocks = "hash_ids" in line
            prompts.append(_blocks(line, where, block_size, numbers) if is_blocks else _tokens(line, where))
            if not isinstance(prompts[-1], type(prompts[0])):
                found, before = ("hash_ids", "tokens") if is_blocks else ("tokens", "hash_ids")
                raise _refused(f"{where} has {found} and the lines before have {before}; a trace has one form")
        if not prompts:
            raise _refused("holds no request", str(path))
        trace = cls(str(path), block_size, tuple(prompts))
        trace._check_coverage()
        return trace

    @property
    def input_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum([prompt.input_tokens for prompt in self.prompts])

    @property
    def unnamed_tokens(self) -> int:
        """Tokens of blocks that are full and have no name; they are never found."""
        size = self.block_size
        return sum(
            [
                max(prompt.input_tokens // size - len(prompt.blocks), 0) * size
                for prompt in self.prompts
                if isinstance(prompt, BlockPrompt)
            ]
        )

    def _check_coverage(self) -> None:
        """Refuse a trace of which no prompt has as many names as it has full blocks: its blocks must be larger."""
        size = self.block_size
        full = [item for item in self.prompts if isinstance(item, BlockPrompt) and item.input_tokens >= size]
        if full and all(len(item.blocks) < item.input_tokens // size for item in full):
            first = max(full, key=lambda item: item.input_tokens)
            rule = (
                f"blocks must be larger: a prompt of {first.input_tokens:,} tokens has {len(first.blocks):,} hash_ids, "
                f"and no prompt has one for each full block"
            )
            raise ConfigError(Problem(BLOCK_KEY, rule, size, _fitting_block(first.input_tokens, len(first.blocks))))


def _objects(path: str | Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Each line that is not blank as an object, with the words that say where it is."""
    try:
        data = Path(path).expanduser().read_bytes()
        text = (gzip.decompress(data) if data.startswith(_GZIP) else data).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise _refused(f"cannot be read: {error}", str(path)) from None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _refused(f"{where} is not JSON: {error}") from None
        forms = () if not isinstance(found, dict) else [key for key in ("hash_ids", "tokens", "text") if key in found]
        if len(forms) != 1:
            has = f"; it has {' and '.join(forms)}" if forms else ""
            raise _refused(f"{where} must be an object with hash_ids, tokens or text{has}")
        yield found, where


def _blocks(
    line: Mapping[str, Any], where: str, block_size: int, numbers: dict[tuple[int, int | str], int]
) -> BlockPrompt:
    tokens, ids = line.get("input_length"), line["hash_ids"]
    if type(tokens) is not int or tokens < 0:
        raise _refused(f"{where}: input_length must be the prompt's length in tokens", tokens)
    if not isinstance(ids, list) or not all(type(item) in (int, str) for item in ids):
        raise _refused(f"{where}: hash_ids must be a list of integers or texts")
    if len(ids) > (filled := ceil_div(tokens, block_size)):
        rule = f"{where} names {len(ids):,} blocks for {tokens:,} tokens, which fill {filled:,} of that size"
        raise ConfigError(Problem(BLOCK_KEY, rule, block_size, _fitting_block(tokens, len(ids))))
    chain, last = [], -1
    for item in ids:
        last = numbers.setdefault((last, item), len(numbers))
        chain.append(last)
    return BlockPrompt(tokens, tuple(chain))


def _tokens(line: Mapping[str, Any], where: str) -> TokenPrompt:
    tokens, salt = line.get("tokens"), line.get("salt", "")
    if not isinstance(salt, str | int):
        raise _refused(f"{where}: salt must be text or a number", salt)
    if "text" in line:
        if not isinstance(line["text"], str):
            raise _refused(f"{where}: text must be text", line["text"])
        tokens = line["text"].encode("utf-8", "surrogatepass")
    elif not isinstance(tokens, list):
        raise _refused(f"{where}: tokens must be a list of token ids", tokens)
    try:
        ids = token_ids(tokens)
    except ValueError as error:
        raise _refused(f"{where}: {error}") from None
    if ids and min(ids) < 0:
        raise _refused(f"{where}: token ids must not be negative", min(ids))
    return TokenPrompt(ids, str(salt).encode("utf-8", "surrogatepass"))


def _fitting_block(tokens: int, blocks: int) -> str | None:
    """The override of a power of two that makes so many blocks of so many tokens, if there is one."""
    fits: Callable[[int], bool] = lambda size: blocks in (tokens // size, ceil_div(tokens, size))  # noqa: E731
    size = next((size for size in (2**power for power in range(16)) if blocks and fits(size)), None)
    return None if size is None else f"{BLOCK_KEY}={size}"


def _refused(rule: str, value: object = ...) -> ConfigError:
    return ConfigError(Problem(TRACE_KEY, rule, value))
