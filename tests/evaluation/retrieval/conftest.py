"""A tokenizer whose tokens can be read."""

from __future__ import annotations

import pytest

BEGINNING = 1


class Letters:
    """A token a character, and one that begins a text."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [BEGINNING] * add_special_tokens + list(map(ord, text))}

    def decode(self, tokens: list[int]) -> str:
        return "".join(map(chr, tokens))


@pytest.fixture
def letters() -> Letters:
    """A tokenizer of characters."""
    return Letters()
