"""The engine by single claims: transactions, sharing, steps of many sequences, shards, threads."""

from __future__ import annotations

import random
import threading

import pytest
import torch

import kvcfg
from kvcfg.cache.building import build_manager
from kvcfg.cache.manager import KVCacheManager
from kvcfg.cache.replica import CacheOptions
from kvcfg.cache.step import Step
from kvcfg.dtypes import DeviceRef, DType
from kvcfg.errors import BackendUnavailable, CapacityError, ConfigError, ShapeError
from kvcfg.formats import FORMATS, Recipe
from kvcfg.params import KVCacheParams, MultiKVCacheParams
from kvcfg.symbolic import symbolic_inputs

FLOAT32 = Recipe(FORMATS["float32"], FORMATS["float32"], "none", "unit", DType.float32)


def group_of(**changes: object) -> KVCacheParams:
    base: dict[str, object] = {
        "dtype": DType.float32,
        "n_kv_heads": 2,
        "head_dim": 4,
        "num_layers": 2,
        "devices": [DeviceRef.CPU()],
        "page_size": 4,
        "recipe": FLOAT32,
        "enable_prefix_caching": True,
    }
    return KVCacheParams(**{**base, **changes})  # type: ignore[arg-type]


def manager_of(
    *groups: KVCacheParams, num_pages: int = 16, max_batch_size: int = 4, max_seq_len: int = 32, **options: object
) -> KVCacheManager:
    return KVCacheManager(
        MultiKVCacheParams.from_params(*(groups or (group_of(),))),
        num_pages=num_pages,
        max_batch_size=max_batch_size,
        max_seq_len=max_seq_len,
        options=CacheOptions(**options),  # type: ignore[arg-type]
    )


def numbers(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 2, 4, generator=generator), torch.randn(count, 2, 4, generator=generator)


def serve(manager: KVCacheManager, seq_id: object, count: int, seed: int = 0) -> Step:
    """Prefill or decode `count` tokens of one sequence; layer n is written with seed + n."""
    done = manager.alloc(seq_id, count)
    step = manager.lay_out([seq_id])
    for layer in range(manager.num_layers):
        manager.append(step, layer, *numbers(count - done.cached_tokens, seed + layer))
    manager.commit(seq_id, count - done.cached_tokens)
    return step


def test_a_shared_prefix_is_read_from_the_pages_of_who_wrote_it() -> None:
    manager = manager_of()
    manager.claim("first", range(9))
    serve(manager, "first", 9, seed=1)
    manager.claim("second", [*range(8), 99, 98])
    done = manager.alloc("second", 10)
    manager.commit("second", 2)
    assert done.cached_tokens == 8
    assert torch.equal(manager.view("second", 1).keys[:8], numbers(9, 2)[0][:8])


def test_the_last_prompt_token_is_always_computed() -> None:
    manager = manager_of()
    manager.claim("first", range(8))
    serve(manager, "first", 8)
    manager.claim("second", range(8))
    assert manager.alloc("second", 8).cached_tokens == 4


def test_other_salts_share_nothing() -> None:
    manager = manager_of()
    manager.claim("first", range(9), salt=b"one")
    serve(manager, "first", 9)
    manager.claim("second", range(9), salt=b"two")
    assert manager.alloc("second", 9).cached_tokens == 0


def test_a_refused_alloc_changes_nothing_although_its_prefix_was_found() -> None:
    manager = manager_of(num_pages=5)
    manager.claim("first", range(9))
    serve(manager, "first", 9)
    manager.claim("second", [*range(8), *[7] * 13])
    before = manager.metrics()
    with pytest.raises(CapacityError, match=r"cache\.kv_cache_memory_bytes=\d+"):
        manager.alloc("second", 21)
    after = manager.metrics()
    assert (after.used_pages, after.evictable_pages) == (before.used_pages, before.evictable_pages)
    assert (after.input_tokens, after.refusals) == (before.input_tokens, before.refusals + 1)
    assert manager.length("second") == 0
    manager.check_integrity()


def test_sequences_of_different_lengths_share_a_step() -> None:
    manager = manager_of()
    for name, length in (("long", 7), ("short", 2)):
        manager.claim(name, range(length))
        manager.alloc(name, length)
    step = manager.lay_out(["long", "short"])
    seen = manager.append(step, 0, *numbers(9))
    assert seen.lengths == (7, 2)
    assert torch.equal(seen.keys, numbers(9)[0])


def test_tables_are_padded_with_the_null_page_as_wide_as_kernels_read() -> None:
    manager = manager_of(num_pages=16)
    manager.claim("a", range(9))
    manager.alloc("a", 9)
    table = manager.lay_out(["a"]).shards[0].lookup[0]
    assert table is not None
    assert table.tolist() == [[0, 1, 2, *[16] * 21]]


def test_lengths_are_those_before_the_step_and_max_lengths_those_after() -> None:
    manager = manager_of()
    for name, length in (("a", 5), ("b", 3)):
        manager.claim(name)
        serve(manager, name, length)
    manager.alloc_batch(["a", "b"], 2)
    step = manager.lay_out(["a", "b"])
    assert step.shards[0].lengths.tolist() == [5, 3]
    assert step.max_lengths.tolist() == [[2, 7]]


def test_kernels_are_given_what_the_symbolic_inputs_promise() -> None:
    group = group_of()
    manager = manager_of(group)
    for name in "ab":
        manager.claim(name)
        manager.alloc(name, 5)
    step = manager.lay_out(["a", "b"])
    (promised,) = symbolic_inputs(group)
    lookup, lengths = step.shards[0].lookup[0], step.shards[0].lengths
    assert lookup is not None
    sizes = {"replica_0_batch_size": 2, "replica_0_max_num_pages": lookup.shape[1], "replica_0_steps_remaining": 1}
    for spec, tensor in (
        (promised.lookup_table, lookup),
        (promised.cache_lengths, lengths),
        (promised.max_lengths, step.max_lengths),
    ):
        assert tensor.dtype is spec.dtype.to_torch()
        assert tuple(tensor.shape) == tuple(sizes.get(str(size), size) for size in spec.shape)


def test_the_next_step_leaves_the_tables_of_the_last_one_alone() -> None:
    manager = manager_of()
    for name in "ab":
        manager.claim(name)
        manager.alloc(name, 5)
    first = manager.lay_out(["a"]).shards[0].lookup[0]
    assert first is not None
    before = first.clone()
    manager.lay_out(["b"])
    assert torch.equal(first, before)


@pytest.mark.parametrize("length", [4, 33])
def test_a_table_that_cannot_cover_the_batch_names_both_bounds(length: int) -> None:
    manager = manager_of()
    manager.claim("a")
    manager.alloc("a", 5)
    with pytest.raises(ValueError, match=f"max_cache_length={length} must be from 5, .* to 32"):
        manager.lay_out(["a"], max_cache_length=length)


def test_a_table_can_be_as_wide_as_every_later_step_needs() -> None:
    manager = manager_of()
    manager.claim("a")
    manager.alloc("a", 5)
    table = manager.lay_out(["a"], max_cache_length=32).shards[0].lookup[0]
    assert table is not None and table.shape == (1, 24)


def test_a_step_without_room_says_to_allocate_first() -> None:
    manager = manager_of()
    manager.claim("a")
    with pytest.raises(ValueError, match="room for 0 more tokens, not 3: alloc first"):
        manager.lay_out(["a"], [3])


def test_a_step_of_two_replicas_is_refused() -> None:
    group = group_of(devices=[DeviceRef.CPU(0), DeviceRef.CPU(1)], data_parallel_degree=2)
    manager = manager_of(group)
    for name, replica in (("a", 0), ("b", 1)):
        manager.claim(name, replica=replica)
        manager.alloc(name, 1)
    with pytest.raises(ValueError, match="must live on one replica"):
        manager.lay_out(["a", "b"])


def test_a_step_that_leaves_out_a_windowed_sequence_is_refused() -> None:
    manager = manager_of(group_of(kind="sliding_window", window=4))
    for name in "ab":
        manager.claim(name)
        manager.alloc(name, 6)
    with pytest.raises(ValueError, match="'b' was allocated too"):
        manager.lay_out(["a"])


def test_more_tokens_than_the_step_has_are_refused() -> None:
    manager = manager_of()
    manager.claim("a")
    manager.alloc("a", 3)
    with pytest.raises(ShapeError, match="the step has 3 tokens, got 4"):
        manager.append(manager.lay_out(["a"]), 0, *numbers(4))


def test_one_sequence_too_many_names_the_override_that_helps() -> None:
    manager = manager_of(max_batch_size=2)
    for name in "ab":
        manager.claim(name)
    with pytest.raises(CapacityError, match=r"Try: workload\.max_batch_size=3"):
        manager.claim("c")
    manager.release("a")
    manager.claim("c")


def test_a_sequence_is_claimed_once() -> None:
    manager = manager_of()
    manager.claim("a")
    with pytest.raises(ValueError, match="'a' is claimed already; release it first"):
        manager.claim("a")


def test_a_fork_copies_the_open_page_and_shares_the_others() -> None:
    manager = manager_of()
    manager.claim("a", range(6))
    serve(manager, "a", 6, seed=3)
    used = manager.metrics().used_pages
    manager.fork("a", "b")
    assert manager.metrics().used_pages == used + 1
    for name, seed in (("a", 10), ("b", 20)):
        manager.extend(name, [seed])
        serve(manager, name, 1, seed)
    wanted = torch.cat([numbers(6, 3)[0], numbers(1, 20)[0]])
    assert torch.equal(manager.view("b", 0).keys, wanted)
    assert torch.equal(manager.view("a", 0).keys[:6], wanted[:6])


def test_what_was_written_without_reading_is_read_back() -> None:
    manager = manager_of()
    manager.claim("a")
    manager.alloc("a", 6)
    step = manager.lay_out(["a"])
    keys, values = numbers(6)
    manager.write(step, 1, keys, values)
    manager.commit("a", 6)
    seen = manager.view("a", 1)
    assert torch.equal(seen.keys, keys) and torch.equal(seen.values, values)


def test_tensor_parallel_shards_each_hold_their_heads() -> None:
    devices = [DeviceRef.CPU(0), DeviceRef.CPU(1)]
    whole, halves = manager_of(), manager_of(group_of(devices=devices))
    for manager in (whole, halves):
        manager.claim("a")
        serve(manager, "a", 6)
    storage = halves.replicas[0].storages[0]
    assert storage is not None
    assert [shard.arena.nbytes * 2 for shard in storage.shards] == [whole.replicas[0].storages[0].nbytes] * 2  # type: ignore[union-attr]
    assert torch.equal(halves.view("a", 1).values, whole.view("a", 1).values)


def test_a_prefix_of_another_replica_is_copied_with_its_bytes() -> None:
    group = group_of(devices=[DeviceRef.CPU(0), DeviceRef.CPU(1)], data_parallel_degree=2)
    manager = manager_of(group)
    manager.claim("a", range(9), replica=0)
    serve(manager, "a", 9, seed=5)
    manager.claim("b", range(9), replica=1)
    assert manager.alloc("b", 9).cached_tokens == 8
    assert torch.equal(manager.view("b", 1).values, numbers(9, 6)[1][:8])
    assert manager.metrics().cache_tokens == 8


def test_a_prompt_goes_to_the_replica_that_has_it() -> None:
    group = group_of(devices=[DeviceRef.CPU(0), DeviceRef.CPU(1)], data_parallel_degree=2)
    manager = manager_of(group, enable_dp_cross_replica_prefix_copy=False)
    manager.claim("a", range(9), replica=1)
    serve(manager, "a", 9)
    assert manager.claim("b", range(9)) == 1
    assert manager.claim("c", [5] * 9) == 0


def test_a_page_left_in_its_middle_is_copied_up_to_there() -> None:
    manager = manager_of(reuse_partial_pages=True)
    manager.claim("a", range(9))
    serve(manager, "a", 9, seed=5)
    manager.claim("b", [0, 1, 2, 3, 4, 5, 99, 98])
    done = manager.alloc("b", 8)
    assert done.cached_tokens == 6
    assert torch.equal(manager.view("b", 1).keys, numbers(9, 6)[0][:6])
    step = manager.lay_out(["b"])
    for layer in range(2):
        manager.append(step, layer, *numbers(2, 50))
    manager.commit("b", 2)
    assert torch.equal(manager.view("a", 1).keys, numbers(9, 6)[0])


def test_a_linear_layer_keeps_a_state_that_a_fork_copies_and_a_release_clears() -> None:
    linear = group_of(kind="linear", state_bytes=6, num_layers=1)
    manager = manager_of(group_of(), linear, enable_prefix_caching=True)
    manager.claim("a")
    serve_state = manager.state("a", 2)[0]
    serve_state.copy_(torch.arange(6, dtype=torch.uint8))
    manager.fork("a", "b")
    assert manager.state("b", 2)[0].tolist() == [0, 1, 2, 3, 4, 5]
    manager.release("a")
    manager.claim("c")
    assert manager.state("c", 2)[0].tolist() == [0] * 6


def test_a_linear_state_cannot_be_taken_back() -> None:
    manager = manager_of(group_of(), group_of(kind="linear", state_bytes=6, num_layers=1))
    manager.claim("a")
    manager.alloc("a", 3)
    step = manager.lay_out(["a"])
    for layer in range(2):
        manager.append(step, layer, *numbers(3))
    manager.commit("a", 3, num_drafts=3)
    with pytest.raises(ValueError, match="state cannot be taken back"):
        manager.truncate("a", 2)


def test_layers_without_pages_are_refused_by_what_they_are() -> None:
    manager = manager_of(group_of(), group_of(kind="linear", state_bytes=6, num_layers=1))
    manager.claim("a")
    with pytest.raises(ShapeError, match="layer 2 is linear and keeps no keys and values"):
        manager.view("a", 2)
    with pytest.raises(ShapeError, match="layer 0 is full; only linear layers keep a state"):
        manager.state("a", 0)


@pytest.mark.parametrize(
    "overrides", [["model=tiny"], ["model=tiny", "devices.count=2", "devices.data_parallel_degree=2"]]
)
def test_what_is_built_takes_the_bytes_that_were_planned(overrides: list[str]) -> None:
    experiment = kvcfg.compose(
        [
            *overrides,
            "devices=cpu",
            "cache.kv_cache_format=int8",
            "workload.max_batch_size=3",
            "workload.max_seq_len=64",
        ]
    )
    manager = build_manager(experiment)
    assert manager.nbytes == kvcfg.plan(experiment).kv_bytes * len(manager.replicas)


def test_gpus_that_are_not_here_are_named() -> None:
    experiment = kvcfg.compose(
        ["model=tiny", "devices=h100x8", "workload.max_batch_size=1", "workload.max_seq_len=64", "devices.count=1"]
    )
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(BackendUnavailable, match=r"gpu:0 is not on this machine, which has 0 GPUs\. Try: devices=cpu"):
        build_manager(experiment)


SMALL = ["model=tiny", "devices=cpu", "cache.kv_cache_page_size=16", "workload.max_batch_size=3"]
SMALL += ["workload.max_seq_len=64"]


@pytest.mark.parametrize("name", ["bits8", "bits6", "bits5", "bits4", "bits3", "bits2"])
@pytest.mark.parametrize("own", [None, "quantization.layers=[{layers:[1],key_format:bfloat16,value_format:bfloat16}]"])
def test_every_recipe_is_allocated_as_planned(name: str, own: str | None) -> None:
    experiment = kvcfg.compose([*SMALL, f"quantization={name}", *([] if own is None else [own])])
    manager = build_manager(experiment)
    assert manager.nbytes == kvcfg.plan(experiment).kv_bytes
    assert len(manager.params.params) == (1 if own is None else 2)


def test_recipe_that_nobody_measured_runs_only_when_told_so() -> None:
    unmeasured = [*SMALL, "cache.kv_cache_format=int4"]
    with pytest.raises(ConfigError, match=r"no file of conf/quantization .* Try: quantization\.experimental=true"):
        build_manager(kvcfg.compose(unmeasured))
    assert build_manager(kvcfg.compose([*unmeasured, "quantization.experimental=true"])).nbytes > 0


def test_calibrated_recipe_is_not_built_without_its_calibration() -> None:
    with pytest.raises(ShapeError, match="calibrated_groups"):
        build_manager(kvcfg.compose([*SMALL, "quantization=bits4_calibrated"]))


def test_tiers_that_cannot_be_built_yet_say_so() -> None:
    tier = ["cache.kv_connector=local", "cache.kv_connector_config.host_kvcache_swap_space_gb=1"]
    with pytest.raises(BackendUnavailable, match=r"planned and replayed, .* Try: cache\.kv_connector=null"):
        build_manager(kvcfg.compose(["model=tiny", "devices=cpu", "workload.max_batch_size=1", *tier]))


def test_many_threads_leave_counts_and_contents_whole() -> None:
    manager = manager_of(num_pages=40, max_batch_size=6)
    failures: list[BaseException] = []

    def live(worker: int) -> None:
        dice = random.Random(worker)
        try:
            for turn in range(40):
                name = (worker, turn)
                length = dice.randrange(5, 20)
                manager.claim(name, [worker] * length)
                done = manager.alloc(name, length)
                step = manager.lay_out([name])
                fresh = length - done.cached_tokens
                tokens = torch.full((fresh, 2, 4), float(worker))
                for layer in range(2):
                    manager.append(step, layer, tokens, tokens)
                manager.commit(name, fresh)
                assert torch.equal(manager.view(name, 1).keys, torch.full((length, 2, 4), float(worker)))
                if turn % 10 == 0:
                    manager.check_integrity()
                manager.release(name)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=live, args=(worker,)) for worker in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    manager.check_integrity()
    assert manager.metrics().used_pages == 0


def test_pinned_pages_outlive_their_sequence_under_pressure() -> None:
    manager = manager_of(num_pages=5)
    manager.claim("a", range(9))
    serve(manager, "a", 9)
    assert manager.pin("system prompt", "a") == 2
    manager.release("a")
    manager.claim("b", [7] * 12)
    serve(manager, "b", 12)
    manager.release("b")
    manager.claim("c", range(9))
    assert manager.alloc("c", 9).cached_tokens == 8
    manager.release("c")
    manager.unpin("system prompt")
    manager.check_integrity()
    assert manager.metrics().used_pages == 0


def test_a_pin_has_a_name_of_its_own() -> None:
    manager = manager_of()
    manager.claim("a", range(9))
    serve(manager, "a", 9)
    manager.pin("x", "a")
    with pytest.raises(ValueError, match="pin 'x' is in use"):
        manager.pin("x", "a")
    with pytest.raises(ValueError, match="nothing is pinned as 'y'"):
        manager.unpin("y")
