"""What attention layers of transformers are given: queries, keys and values, after RoPE.

Models look their attention function up by name, so a name of our own, for the time of a run, sees all that goes in,
whatever the family; it hands on to the function that the model had before, with the mask that this one takes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

OnAttention = Callable[[int, Tensor, Tensor, Tensor], None]
"""Takes the layer, queries `[batch, n_q_heads, tokens, head_dim]`, keys and values `[batch, n_kv_heads, …]`."""


@contextmanager
def attention_recorded(decoder: Any, on_attention: OnAttention) -> Iterator[None]:
    """Call `on_attention` before every attention of a decoder of transformers; the decoder computes the same.

    Args:
        decoder: what `get_decoder()` of a causal language model gives.
        on_attention: must change nothing.
    """
    before = decoder.config._attn_implementation
    name = f"recorded_{before}"

    def record_and_attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
    ) -> Any:
        on_attention(module.layer_idx, query, key, value)
        if before == "eager":
            attend = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
        else:
            attend = ALL_ATTENTION_FUNCTIONS[before]
        return attend(module, query, key, value, attention_mask, **settings)

    if before in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[before])
    ALL_ATTENTION_FUNCTIONS[name] = record_and_attend
    try:
        decoder.set_attn_implementation(name)
        yield
    finally:
        decoder.set_attn_implementation(before)
        del ALL_ATTENTION_FUNCTIONS[name]
