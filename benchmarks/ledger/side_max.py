"""MAX's BlockManager and JengaBlockManager. Prompts are arrays of int64, inside a context that was made before."""

from __future__ import annotations

import time
from importlib.metadata import version

import numpy as np
from max.nn.kv_cache.cache_params import KVCacheGroupId, KVLeafRegion
from max.pipelines.context import TextContext, TokenBuffer
from max.pipelines.kv_cache.paged_kv_cache.block_manager import BlockManager
from max.pipelines.kv_cache.paged_kv_cache.jenga_block_manager import (
    JengaBlockManager,
    KVLeafInfo,
    create_groups,
    create_pools,
)
from workload import NUM_STEPS, PROMPT_TOKENS, answer

LEAF = "kv"


class Manager:
    manager: BlockManager | JengaBlockManager

    def find_and_allocate(self, context: TextContext) -> None:
        raise NotImplementedError

    def grow(self, context: TextContext) -> None:
        raise NotImplementedError

    def request(self, number: int, prompt: list[int]) -> TextContext:
        tokens = TokenBuffer(np.array(prompt, dtype=np.int64))
        return TextContext(max_length=PROMPT_TOKENS + NUM_STEPS + 2, tokens=tokens)

    def admit(self, context: TextContext) -> int:
        self.manager.claim(context)
        before = context.tokens.processed_length
        self.find_and_allocate(context)
        cached = context.tokens.processed_length - before
        context.update(5)  # only now may the prompt's blocks be committed; its time is taken off again
        self.manager.step(context)
        return cached

    def free(self, context: TextContext) -> None:
        self.manager.release(context)

    def step(self, contexts: list[TextContext]) -> None:
        for context in contexts:
            self.grow(context)
            context.update(7)
            self.manager.step(context)

    def foreign_seconds(self, prompts: list[list[int]]) -> float:
        contexts = [self.request(number, prompt) for number, prompt in enumerate(prompts)]
        start = time.thread_time()
        for context in contexts:
            context.update(5)
        return time.thread_time() - start


class Legacy(Manager):
    def __init__(self, algorithm: str, page_size: int, num_pages: int) -> None:
        self.manager = BlockManager(num_pages, page_size, enable_prefix_caching=True, kv_hash_algo=algorithm)

    def find_and_allocate(self, context: TextContext) -> None:
        self.manager.reuse_blocks_from_prefix_cache(context)
        self.manager.allocate_new_blocks(context)

    def grow(self, context: TextContext) -> None:
        self.manager.allocate_new_blocks(context)


class Jenga(Manager):
    def __init__(self, algorithm: str, page_size: int, num_pages: int) -> None:
        group_id = KVCacheGroupId.full()
        infos = {LEAF: KVLeafInfo(ratio=1, group_id=group_id)}
        pools = create_pools(infos, num_pages)
        self.manager = JengaBlockManager(
            pools,
            page_size,
            True,
            algorithm,
            groups=create_groups(infos, pools, page_size, enable_prefix_caching=True),
            leaves={LEAF: KVLeafRegion(LEAF, group_id, 1 << 16)},
        )

    def find_and_allocate(self, context: TextContext) -> None:
        self.manager.alloc(context)

    grow = find_and_allocate


if __name__ == "__main__":
    answer({"BlockManager": Legacy, "JengaBlockManager": Jenga}, {"max": version("max"), "numpy": np.__version__})
