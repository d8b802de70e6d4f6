from __future__ import annotations

from collections.abc import Callable

from kvcfg.planning import Plan
from kvcfg.planning.plan_dict import per_device
from kvcfg.units import GIB, MIB

Planned = Callable[..., Plan]
LLAMA = "model=llama-3.1-8b"


def test_weights_are_split_over_the_devices_of_a_replica(planned: Planned) -> None:
    one, eight = planned(LLAMA, "devices=h100"), planned(LLAMA, "devices=h100x8")
    assert eight.budget.weights * 8 == one.budget.weights == one.experiment.model.weight_bytes


def test_weights_are_repeated_by_each_replica(planned: Planned) -> None:
    assert planned(LLAMA, "devices=h100x8_dp8").budget.weights == planned(LLAMA, "devices=h100").budget.weights


def test_available_is_the_share_of_memory_without_weights_and_reserve(planned: Planned) -> None:
    plan = planned(LLAMA, "devices=h100", "devices.reserved_gib=3", "cache.device_memory_utilization=0.5")
    assert plan.budget.available == 40 * GIB - 3 * GIB - plan.experiment.model.weight_bytes


def test_explicit_budget_holds_for_each_device_and_takes_the_place_of_the_share(planned: Planned) -> None:
    words = ("cache.kv_cache_memory_bytes=60GiB", "cache.device_memory_utilization=0.1")
    plan = planned(LLAMA, "devices=h100x8", *words)
    assert plan.budget.available == 60 * GIB
    assert 60 * GIB - 2 * MIB < plan.kv_bytes_per_device <= 60 * GIB


def test_explicit_budget_beyond_the_device_is_lowered_and_said_so(planned: Planned) -> None:
    plan = planned(LLAMA, "devices=h100", "cache.kv_cache_memory_bytes=100GiB")
    assert plan.budget.available == 80 * GIB - plan.experiment.model.weight_bytes
    choice = next(choice for choice in plan.choices if choice.key == "cache.kv_cache_memory_bytes")
    assert (choice.requested, choice.resolved) == (100 * GIB, plan.budget.available)


def test_items_of_a_device_add_up_to_its_memory(planned: Planned) -> None:
    for words in (
        (LLAMA, "devices=h100x8_dp2tp4", "workload=chat"),
        (LLAMA, "devices=rtx4090", "workload=rag"),
        (LLAMA, "devices=h100", "cache.kv_cache_memory_bytes=5GiB", "devices.reserved_gib=2"),
        ("model=gemma-3-27b", "devices=rtx4090"),
    ):
        items = per_device(planned(*words))
        assert items.pop("memory") == sum(items.values())
