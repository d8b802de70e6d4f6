"""The cache contract of transformers 5.23, held by `TransformersCache`: what its own cache and generation tests ask.

    test_generation   every way of generating gives token for token what DynamicCache gives, on every family
    test_quantized    quantized formats go through all of them, and pages that close are fed whole prompts
    test_members      what a cache must answer, one member at a time, and what it must refuse
    test_training     gradients of a forward that fills the cache
    test_compiled     a compiled forward
    test_smollm2      the same with a real model

What of transformers' own tests cannot apply:

- Offloaded and multi-GPU caches, CUDA graphs, `cache_implementation="static"` by name: pages lie on one device, and
  `generate(cache_implementation=…)` is a closed list, to which no other library can add.
- `is_compileable`: a compileable cache has fixed shapes and the whole length as its mask; pages have neither. A model
  may be compiled all the same, with the graph broken where pages are stored and read.
- Export (ExecuTorch): exported graphs hold the cache's tensors as buffers of a static shape.
- `keys` and `values` of a layer, `DynamicCache.__iter__` and legacy tuples: there is no tensor of all keys.
- `generate_batch` builds its own cache and takes none.
- The literal strings of the hub's checkpoints: results are compared with DynamicCache on the same weights.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Without what transformers logs of right padding and candidates."""
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)
