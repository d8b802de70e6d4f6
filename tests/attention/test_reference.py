"""The reference against torch's own attention, on caches that keep numbers as they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvcfg.attention import attend, causal
from kvcfg.cache.manager import KVCacheManager
from kvcfg.cache.paged import PagedKVCache
from kvcfg.dtypes import DeviceRef, DType
from kvcfg.errors import ConfigError, ShapeError
from kvcfg.formats import FORMATS, Recipe
from kvcfg.params import KVCacheParams, MultiKVCacheParams

FLOAT32 = Recipe(FORMATS["float32"], FORMATS["float32"], "none", "unit", DType.float32)
GAUSS4 = Recipe(FORMATS["gauss4"], FORMATS["gauss4"], "token_head", "dynamic", DType.float16, transform="hadamard")
HEADS, KV_HEADS, DIM, PAGE = 6, 2, 8, 4


def manager_of(recipe: Recipe = FLOAT32, **changes: object) -> KVCacheManager:
    base: dict[str, object] = {
        "dtype": recipe.key_format.dtype,
        "n_kv_heads": KV_HEADS,
        "head_dim": DIM,
        "num_layers": 1,
        "devices": [DeviceRef.CPU()],
        "page_size": PAGE,
        "recipe": recipe,
    }
    group = KVCacheParams(**{**base, **changes})  # type: ignore[arg-type]
    manager = KVCacheManager(MultiKVCacheParams.from_params(group), num_pages=40, max_batch_size=3, max_seq_len=60)
    for storage in manager.replicas[0].storages:
        assert storage is not None
        storage.shards[0].arena.fill_(0xFF)  # as float32 every slot is NaN until it is written
    return manager


class Fed:
    """Some sequences fed to one layer; `step` is the last one, its queries made, nothing committed of it."""

    def __init__(self, manager: KVCacheManager, chunks: list[list[int]], value_dim: int | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        group = manager.params.params[0]
        names = list(range(len(chunks[0])))
        nothing = torch.empty(0, group.n_kv_heads_per_device, group.head_dim)
        self.keys = [nothing] * len(names)
        self.values = [nothing[..., : group.value_dim]] * len(names)
        for name in names:
            manager.claim(name)
        for number, counts in enumerate(chunks, start=1):
            self.starts = [manager.length(name) for name in names]
            self.counts = counts
            for name, count in zip(names, counts, strict=True):
                manager.alloc(name, count)
            step = manager.lay_out(names)
            keys = torch.randn(sum(counts), group.n_kv_heads_per_device, group.head_dim, generator=generator)
            values = torch.randn(sum(counts), group.n_kv_heads_per_device, group.value_dim, generator=generator)
            self.view = manager.layer_view(step, 0, value_dim=value_dim)
            manager.write(step, 0, keys, values)
            for name, new_keys, new_values in zip(names, keys.split(counts), values.split(counts), strict=True):
                self.keys[name] = torch.cat([self.keys[name], new_keys])
                self.values[name] = torch.cat([self.values[name], new_values])
            if number < len(chunks):
                for name, count in zip(names, counts, strict=True):
                    manager.commit(name, count)
        self.queries = torch.randn(sum(self.counts), HEADS, group.head_dim, generator=generator)


def expected(fed: Fed, masks: list[Tensor], values: list[Tensor] | None = None) -> Tensor:
    """What torch makes of the numbers that were fed; `masks[s]` is `[queries, tokens]`, True where one is seen."""
    outputs = []
    for number, queries in enumerate(fed.queries.split(fed.counts)):
        keys, own_values = fed.keys[number], (values or fed.values)[number]
        found = scaled_dot_product_attention(
            *(item.transpose(0, 1).unsqueeze(0) for item in (queries, keys, own_values)),
            attn_mask=masks[number],
            enable_gqa=True,
        )
        outputs.append(found[0].transpose(0, 1))
    return torch.cat(outputs)


def seen(fed: Fed, window: int | None = None, *, chunked: bool = False) -> list[Tensor]:
    masks = []
    for start, count in zip(fed.starts, fed.counts, strict=True):
        query, token = torch.arange(start, start + count).unsqueeze(1), torch.arange(start + count)
        mask = token <= query
        if window is not None:
            mask &= token >= query // window * window if chunked else token > query - window
        masks.append(mask)
    return masks


def by_reference(fed: Fed, *arguments: object, **options: object) -> Tensor:
    reach = causal(fed.starts, fed.counts, *arguments, **options)  # type: ignore[arg-type]
    return attend(fed.queries, fed.view, reach, scale=DIM**-0.5, backend="reference")


@pytest.mark.parametrize("chunks", [[[5, 9, 1]], [[5, 9, 1], [1, 1, 1]], [[5, 9, 1], [3, 1, 7], [2, 4, 1]]])
def test_ragged_batches_agree_with_torch(chunks: list[list[int]]) -> None:
    fed = Fed(manager_of(), chunks)
    assert torch.allclose(by_reference(fed), expected(fed, seen(fed)), atol=1e-6)


@pytest.mark.parametrize("kind", ["sliding_window", "chunked"])
@pytest.mark.parametrize("chunks", [[[5, 9, 1], [1, 1, 1]], [[3, 2, 1], [2, 3, 4]]])
def test_windows_agree_with_torch(kind: str, chunks: list[list[int]]) -> None:
    fed = Fed(manager_of(kind=kind, window=7), chunks)
    assert fed.view.in_place
    chunked = kind == "chunked"
    assert torch.allclose(
        by_reference(fed, 7, chunked=chunked), expected(fed, seen(fed, 7, chunked=chunked)), atol=1e-6
    )


def test_windowed_layer_is_right_in_every_step_that_can_be_read_in_place() -> None:
    manager, window = manager_of(kind="sliding_window", window=6), 6
    in_place = 0
    for length in range(1, 40):
        fed = Fed(manager, [[1, 1]] * length)
        if fed.view.in_place:
            in_place += 1
            assert torch.allclose(by_reference(fed, window), expected(fed, seen(fed, window)), atol=1e-6)
        for name in range(2):
            manager.release(name)
    assert in_place > 20


def test_step_that_gives_up_what_it_sees_is_refused() -> None:
    fed = Fed(manager_of(kind="sliding_window", window=6), [[20, 20, 20], [20, 20, 20]])
    with pytest.raises(ShapeError, match="append"):
        by_reference(fed, 6)


def test_latent_is_read_as_key_and_as_value() -> None:
    fed = Fed(manager_of(is_mla=True, num_q_heads=HEADS, n_kv_heads=1), [[5, 9, 1], [2, 1, 3]], value_dim=6)
    values = [keys[..., :6] for keys in fed.keys]
    assert torch.allclose(by_reference(fed), expected(fed, seen(fed), values), atol=1e-6)


def test_latent_without_its_rank_is_refused() -> None:
    with pytest.raises(ShapeError, match="kv_lora_rank"):
        Fed(manager_of(is_mla=True, num_q_heads=HEADS, n_kv_heads=1), [[1]])


def test_softcap_bounds_scores() -> None:
    fed = Fed(manager_of(), [[7]])
    reach = causal(fed.starts, fed.counts)
    found = attend(fed.queries, fed.view, reach, scale=3.0, softcap=2.0, backend="reference")
    keys, values = (item.repeat_interleave(HEADS // KV_HEADS, 1) for item in (fed.keys[0], fed.values[0]))
    scores = 2.0 * torch.tanh(3.0 * torch.einsum("qhd,thd->hqt", fed.queries, keys) / 2.0)
    weights = scores.masked_fill(~seen(fed)[0], -torch.inf).softmax(-1)
    assert torch.allclose(found, torch.einsum("hqt,thd->qhd", weights, values), atol=1e-6)


def test_sinks_take_part_in_the_sum_alone() -> None:
    fed = Fed(manager_of(), [[7]])
    sinks = torch.linspace(-2, 5, HEADS)
    found = attend(fed.queries, fed.view, causal([0], [7]), scale=DIM**-0.5, sinks=sinks, backend="reference")
    keys = fed.keys[0].repeat_interleave(HEADS // KV_HEADS, 1)
    scores = DIM**-0.5 * torch.einsum("qhd,thd->qht", fed.queries, keys)
    total = scores.masked_fill(~seen(fed)[0].unsqueeze(1), -torch.inf).exp().sum(-1)
    share = total / (total + sinks.exp())
    assert torch.allclose(found, expected(fed, seen(fed)) * share.unsqueeze(-1), atol=1e-6)


@pytest.mark.parametrize("sinks", [None, torch.zeros(HEADS)])
def test_query_that_sees_nothing_gives_zeros(sinks: Tensor | None) -> None:
    fed = Fed(manager_of(), [[5, 3]])
    reach = causal(fed.starts, fed.counts, skip=[0, 2])
    found = attend(fed.queries, fed.view, reach, scale=1.0, sinks=sinks, backend="reference")
    assert not found[5:7].any() and found[7].any()


def test_skipped_tokens_are_not_seen() -> None:
    fed = Fed(manager_of(), [[6, 7, 1], [1, 1, 1]])
    masks = [mask & (torch.arange(mask.shape[1]) >= 3) for mask in seen(fed)]
    found = by_reference(fed, skip=[3, 3, 0])
    assert torch.allclose(found[:2], expected(fed, masks)[:2], atol=1e-6)


def test_float64_queries_are_computed_in_float64() -> None:
    fed = Fed(manager_of(), [[9]])
    exact = scaled_dot_product_attention(
        *(item.double().transpose(0, 1).unsqueeze(0) for item in (fed.queries, fed.keys[0], fed.values[0])),
        is_causal=True,
        enable_gqa=True,
    )[0].transpose(0, 1)
    found = attend(fed.queries.double(), fed.view, causal([0], [9]), scale=DIM**-0.5, backend="reference")
    assert torch.allclose(found, exact, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("chunks", [[1] * 14, [4, 4, 3], [3, 1, 4, 4, 2], [4, 4, 4]])
def test_closing_pages_are_read_as_append_reads_them(chunks: list[int]) -> None:
    """A page that closes in the step is read open by its queries, and closed by those of the next one."""
    torch.manual_seed(0)
    caches = [_closing_cache(), _closing_cache()]
    start = 0
    for size in chunks:
        keys, values = torch.randn(2, KV_HEADS, size, DIM), torch.randn(2, KV_HEADS, size, DIM)
        queries = torch.randn(2, HEADS, size, DIM)
        view, read = caches[0].write(0, keys, values), caches[1].append(0, keys, values)
        mask = torch.arange(start + size) <= torch.arange(start, start + size).unsqueeze(1)
        wanted = scaled_dot_product_attention(queries, *read, attn_mask=mask, enable_gqa=True)
        reach = causal([start] * 2, [size] * 2)
        packed = queries.transpose(1, 2).flatten(0, 1)
        found = attend(packed, view, reach, scale=DIM**-0.5, backend="reference")  # type: ignore[arg-type]
        assert torch.allclose(found, wanted.transpose(1, 2).flatten(0, 1), atol=1e-5)
        start += size


def _closing_cache() -> PagedKVCache:
    params = KVCacheParams(
        dtype=DType.uint8,
        n_kv_heads=KV_HEADS,
        head_dim=DIM,
        num_layers=1,
        devices=[DeviceRef.CPU()],
        page_size=PAGE,
        recipe=GAUSS4,
    )
    return PagedKVCache(
        MultiKVCacheParams.from_params(params),
        num_pages=12,
        max_batch_size=2,
        max_seq_len=20,
        layers=[(0, 0)],
        devices=[torch.device("cpu")],
    )


def test_unknown_backend_is_refused_with_the_list() -> None:
    fed = Fed(manager_of(), [[2]])
    with pytest.raises(ConfigError, match="must be one of reference or cpu"):
        attend(fed.queries, fed.view, causal([0], [2]), scale=1.0, backend="gpu")
