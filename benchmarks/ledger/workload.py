"""The workload, and the loop that every manager goes through in its own interpreter.

2,000 prompts of 2,048 tokens, the first half of each shared by the prompts of its group (10 groups). 64 run at
a time: the oldest is freed before the next is admitted. 524,288 slots, so that most admissions evict. Then 128
decode steps of the 64 that are left. Only the managers' work is timed; prompts are made before.
"""

from __future__ import annotations

import gc
import json
import os
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol

NUM_PROMPTS, PROMPT_TOKENS, NUM_GROUPS, NUM_RUNNING = 2_000, 2_048, 10, 64
NUM_STEPS, NUM_SLOTS, VOCABULARY = 128, 524_288, 32_000
HIT_TOKENS = (NUM_PROMPTS - NUM_GROUPS) * PROMPT_TOKENS // 2
POOL_PAGE_SIZE, POOL_RUNNING, POOL_PROMPTS = 16, 4, 300


class Manager(Protocol):
    """What is measured. A request is whatever the manager wants to be given for a prompt."""

    def request(self, number: int, prompt: list[int]) -> Any:
        """A prompt in the form in which the manager gets it; not timed."""

    def admit(self, request: Any) -> int:
        """Hash, look up, allocate and commit a prompt; how many of its tokens were cached."""

    def free(self, request: Any) -> None:
        """End a request."""

    def step(self, requests: list[Any]) -> None:
        """One decode step: one new token for each request, its id, slot and commit."""

    def foreign_seconds(self, prompts: list[list[int]]) -> float:
        """CPU time of these admissions that is not the manager's work."""


Make = Callable[[str, int, int], Manager]
"""(hash algorithm, page size, pages in the pool) -> an empty manager."""


def prompts() -> list[list[int]]:
    """The prompts of the workload; the same in every process."""
    rng, half = random.Random(0), PROMPT_TOKENS // 2
    heads = [rng.choices(range(VOCABULARY), k=half) for _ in range(NUM_GROUPS)]
    return [heads[i % NUM_GROUPS] + rng.choices(range(VOCABULARY), k=half) for i in range(NUM_PROMPTS)]


def distinct_prompts() -> Iterator[list[int]]:
    """Prompts that share nothing."""
    rng = random.Random(1)
    while True:
        yield rng.choices(range(VOCABULARY), k=PROMPT_TOKENS)


def measure(make: Make, algorithm: str, page_size: int) -> dict[str, float]:
    """The workload once."""
    texts = prompts()
    manager = make(algorithm, page_size, NUM_SLOTS // page_size)
    requests = [manager.request(number, text) for number, text in enumerate(texts)]
    running, hit_tokens = deque[Any](), 0
    settle()
    start = time.thread_time()
    for request in requests:
        if len(running) == NUM_RUNNING:
            manager.free(running.popleft())
        hit_tokens += manager.admit(request)
        running.append(request)
    admitted = time.thread_time() - start
    batch = list(running)
    start = time.thread_time()
    for _ in range(NUM_STEPS):
        manager.step(batch)
    decoded = time.thread_time() - start
    return {
        "requests_per_s": NUM_PROMPTS / (admitted - manager.foreign_seconds(texts)),
        "decode_us": 1e6 * decoded / (NUM_STEPS * NUM_RUNNING),
        "hit_tokens": hit_tokens,
    }


def measure_pool(make: Make, algorithm: str, num_pages: int) -> dict[str, float]:
    """What a request costs in a full pool, where it evicts as many pages as it takes."""
    manager, texts = make(algorithm, POOL_PAGE_SIZE, num_pages), distinct_prompts()
    for number in range(num_pages * POOL_PAGE_SIZE // PROMPT_TOKENS + 1):
        request = manager.request(number, next(texts))
        manager.admit(request)
        manager.free(request)
    timed = [next(texts) for _ in range(POOL_PROMPTS)]
    requests = [manager.request(-1 - number, text) for number, text in enumerate(timed)]
    running = deque[Any]()
    settle()
    start = time.thread_time()
    for request in requests:
        if len(running) == POOL_RUNNING:
            manager.free(running.popleft())
        manager.admit(request)
        running.append(request)
    seconds = time.thread_time() - start - manager.foreign_seconds(timed)
    return {"us_per_request": 1e6 * seconds / POOL_PROMPTS}


def settle() -> None:
    """Collect garbage, and leave what exists out of later collections, as servers do."""
    gc.collect()
    gc.freeze()


def answer(makers: dict[str, Make], versions: dict[str, str]) -> None:
    """Measure what is asked for on stdin, a JSON line each; a JSON line of figures each on stdout."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print does not belong among the replies
    print(json.dumps(versions), file=replies)
    for line in sys.stdin:
        asked = json.loads(line)
        make, algorithm = makers[asked["manager"]], asked["algorithm"]
        if "num_pages" in asked:
            figures = measure_pool(make, algorithm, asked["num_pages"])
        else:
            figures = measure(make, algorithm, asked["page_size"])
        gc.unfreeze()
        print(json.dumps(figures), file=replies)
