"""A compiled forward: the graph breaks where pages are stored and read, and tokens are the same."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kvcfg.integrations import paged_attention
from tests.integrations.cache_contract.models import generate, prompts, tiny


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("recipe", "attention"), [("cache.kv_cache_format=float32", "gathered"), ("quantization=bits4", "kvcfg")]
)
def test_compiled_steps_give_the_tokens_of_plain_ones(
    recipe: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, read = tiny("llama"), list[int]()
    model.set_attention(attention)
    expected = generate(model, model.cache(recipe), prompts(2, 10))
    attend = paged_attention.attend

    def counted(queries: torch.Tensor, *args: object, **settings: object) -> torch.Tensor:
        read.append(len(queries))
        return attend(queries, *args, **settings)

    monkeypatch.setattr(paged_attention, "attend", counted)
    monkeypatch.setattr(model.model, "forward", torch.compile(model.model.forward, backend="eager"))
    assert torch.equal(generate(model, model.cache(recipe), prompts(2, 10)), expected)
    assert read == ([20] * 2 + [2] * 2 * 11 if attention == "kvcfg" else [])
