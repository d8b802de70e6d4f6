"""kvcfg's PageLedger. Prompts are arrays of int64, as tokenizers give them, or lists of int."""

from __future__ import annotations

from typing import Any

import numpy as np
from workload import NUM_RUNNING, PROMPT_TOKENS, Make, answer

from kvcfg.cache.ledger import PageLedger
from kvcfg.cache.prefix import PageHasher
from kvcfg.version import __version__

Request = tuple[int, Any]


class Ledger:
    def __init__(self, algorithm: str, page_size: int, num_pages: int) -> None:
        self.ledger = PageLedger(num_pages, page_size, hasher=PageHasher(algorithm))
        self.tokens = [7] * NUM_RUNNING

    def request(self, number: int, prompt: list[int]) -> Request:
        return number, np.array(prompt, dtype=np.int64)

    def admit(self, request: Request) -> int:
        number, prompt = request
        self.ledger.claim(number, prompt)
        cached = self.ledger.alloc(number, PROMPT_TOKENS).cached_tokens
        self.ledger.commit(number, PROMPT_TOKENS - cached)
        return cached

    def free(self, request: Request) -> None:
        self.ledger.release(request[0])

    def step(self, requests: list[Request]) -> None:
        batch = [request[0] for request in requests]
        self.ledger.alloc_batch(batch, tokens=self.tokens)
        self.ledger.commit_batch(batch)

    def foreign_seconds(self, prompts: list[list[int]]) -> float:
        return 0.0


class ListLedger(Ledger):
    def request(self, number: int, prompt: list[int]) -> Request:
        return number, prompt


if __name__ == "__main__":
    makers: dict[str, Make] = {"PageLedger": Ledger, "PageLedger, lists": ListLedger}
    answer(makers, {"kvcfg": __version__, "numpy": np.__version__})
