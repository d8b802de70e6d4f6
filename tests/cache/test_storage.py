"""Pages as bytes: what is written is read back, wherever it lies, and the bytes are those of the plan."""

from __future__ import annotations

import pytest
import torch

from kvcfg.cache.storage import PagedStorage
from kvcfg.dtypes import DeviceRef, DType
from kvcfg.errors import ShapeError
from kvcfg.formats import FORMATS, Recipe
from kvcfg.formats.codec import Codec
from kvcfg.params import KVCacheParams

CPU = torch.device("cpu")
RECIPES = {
    **{
        name: Recipe(item, item, "token_head" if item.scaled else "none", "dynamic", DType.float32)
        for name, item in FORMATS.items()
        if not item.is_packed
    },
    "int8 in blocks": Recipe(FORMATS["int8"], FORMATS["int8"], "block", "dynamic", DType.bfloat16, 8),
    "int8 keys, bfloat16 values": Recipe(FORMATS["int8"], FORMATS["bfloat16"], "token_head", "dynamic", DType.float16),
    "fp8 at unit scale": Recipe(FORMATS["float8_e4m3fn"], FORMATS["float8_e4m3fn"], "tensor", "unit", DType.float32),
}


def params_of(recipe: Recipe, **changes: object) -> KVCacheParams:
    base: dict[str, object] = {
        "dtype": recipe.key_format.dtype,
        "n_kv_heads": 2,
        "head_dim": 16,
        "num_layers": 2,
        "devices": [DeviceRef.CPU()],
        "page_size": 4,
        "recipe": recipe,
    }
    return KVCacheParams(**{**base, **changes})  # type: ignore[arg-type]


def storage_of(params: KVCacheParams, num_pages: int = 5) -> PagedStorage:
    return PagedStorage(params, num_pages, [CPU] * params.tensor_parallel_degree)


def tokens_of(num_tokens: int, n_heads: int = 2, k_dim: int = 16, v_dim: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    keys = torch.randn(num_tokens, n_heads, k_dim, generator=generator)
    return keys, torch.randn(num_tokens, n_heads, v_dim, generator=generator)


def as_stored(recipe: Recipe, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    key_codec = Codec(recipe.keys, keys.shape[1], keys.shape[2])
    value_codec = Codec(recipe.values, values.shape[1], values.shape[2])
    return (
        key_codec.decode(key_codec.encode(keys), torch.float32),
        value_codec.decode(value_codec.encode(values), torch.float32),
    )


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_tokens_are_read_back_from_scattered_slots(recipe: Recipe) -> None:
    storage = storage_of(params_of(recipe))
    keys, values = tokens_of(8)
    pages = torch.tensor([3, 0])
    slots = (pages[:, None] * 4 + torch.arange(4)).flatten()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    storage.store(1, storage.encode(1, keys[order], values[order]), slots[order])
    read = storage.read(1, pages, torch.float32)
    stored_keys, stored_values = as_stored(recipe, keys, values)
    assert torch.equal(read.keys, stored_keys)
    assert torch.equal(read.values, stored_values)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_writing_touches_no_other_slot_and_no_other_layer(recipe: Recipe) -> None:
    storage = storage_of(params_of(recipe))
    arena = storage.shards[0].arena
    arena.fill_(0xA5)
    keys, values = tokens_of(1)
    storage.store(1, storage.encode(1, keys, values), torch.tensor([2 * 4 + 3]))
    changed = (arena != 0xA5).nonzero()
    assert set(changed[:, 0].tolist()) == {1} and set(changed[:, 1].tolist()) == {2}
    assert len(changed) <= params_of(recipe).bytes_per_layer_page / 4


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize(
    ("page_size", "n_kv_heads", "k_dim", "v_dim"), [(1, 1, 8, 8), (16, 3, 24, 8), (128, 8, 128, 128)]
)
def test_allocation_equals_the_plan_to_the_byte(
    recipe: Recipe, page_size: int, n_kv_heads: int, k_dim: int, v_dim: int
) -> None:
    params = params_of(recipe, page_size=page_size, n_kv_heads=n_kv_heads, head_dim=k_dim, value_head_dim=v_dim)
    assert storage_of(params, 3).nbytes == (3 + 1) * params.bytes_per_block


def test_pages_with_odd_widths_need_no_alignment() -> None:
    recipe = RECIPES["int8"]
    params = params_of(recipe, page_size=1, n_kv_heads=1, head_dim=3, value_head_dim=5)
    storage = storage_of(params)
    keys, values = tokens_of(5, 1, 3, 5)
    storage.store(0, storage.encode(0, keys, values), torch.arange(5))
    read = storage.read(0, torch.arange(5), torch.float32)
    assert torch.equal(read.keys, as_stored(recipe, keys, values)[0])
    assert torch.equal(read.values, as_stored(recipe, keys, values)[1])


@pytest.mark.parametrize("num_shards", [2, 4, 8])
def test_shards_together_hold_what_one_device_would(num_shards: int) -> None:
    recipe = RECIPES["int8"]
    devices = [DeviceRef.CPU(index) for index in range(num_shards)]
    params = params_of(recipe, n_kv_heads=4, devices=devices, allow_kv_head_replication=True)
    storage = storage_of(params)
    keys, values = tokens_of(8, n_heads=4)
    storage.store(0, storage.encode(0, keys, values), torch.arange(8))
    read = storage.read(0, torch.tensor([0, 1]), torch.float32)
    assert torch.equal(read.keys, as_stored(recipe, keys, values)[0])
    assert storage.nbytes == (5 + 1) * params.bytes_per_block
    assert len({shard.arena.data_ptr() for shard in storage.shards}) == num_shards


def test_a_page_moves_as_bytes() -> None:
    storage = storage_of(params_of(RECIPES["int8"]))
    keys, values = tokens_of(4)
    for layer in range(2):
        storage.store(layer, storage.encode(layer, keys * (layer + 1), values), torch.arange(4))
    storage.copy_pages(torch.tensor([0]), torch.tensor([4]))
    for layer in range(2):
        before, after = (storage.read(layer, torch.tensor([page]), torch.float32) for page in (0, 4))
        assert torch.equal(before.keys, after.keys) and torch.equal(before.values, after.values)


@pytest.mark.parametrize(("shape", "name"), [((2, 3, 16), "keys"), ((2, 2, 17), "keys"), ((2, 16), "keys")])
def test_wrong_shape_is_refused_with_both_shapes(shape: tuple[int, ...], name: str) -> None:
    storage = storage_of(params_of(RECIPES["int8"]))
    with pytest.raises(ShapeError, match=rf"{name} must be \[num_tokens, 2, 16\], got \[2"):
        storage.encode(0, torch.zeros(shape), tokens_of(2)[1])
