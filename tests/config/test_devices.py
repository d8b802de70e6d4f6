"""Device layouts, and what is filled in from the machine."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from kvcfg.config import devices as module
from kvcfg.config.devices import DevicesConfig, detect
from kvcfg.config.machine import GPU
from kvcfg.dtypes import DeviceRef
from kvcfg.errors import ConfigError
from kvcfg.units import GIB


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [GPU("NVIDIA H100 80GB HBM3", 70 * GIB), GPU("NVIDIA H100 80GB HBM3", 60 * GIB)]
    monkeypatch.setattr(module, "visible_gpus", lambda: gpus)


@pytest.fixture
def no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "visible_gpus", list)
    monkeypatch.setattr(module, "available_memory", lambda: 12 * GIB)


@pytest.mark.parametrize(("count", "replicas", "degree"), [(8, 1, 8), (8, 2, 4), (8, 8, 1), (1, 1, 1)])
def test_tensor_parallel_degree_is_what_is_left_of_a_replica(count: int, replicas: int, degree: int) -> None:
    assert DevicesConfig(count=count, data_parallel_degree=replicas).tensor_parallel_degree == degree


@pytest.mark.parametrize(("count", "replicas", "fix"), [(8, 3, 2), (8, 16, 8), (6, 4, 3), (7, 2, 1)])
def test_replicas_that_do_not_divide_the_devices_are_refused_with_a_divisor(
    count: int, replicas: int, fix: int
) -> None:
    with pytest.raises(ValidationError, match=rf"must divide devices.count.*Try: data_parallel_degree={fix}\b"):
        DevicesConfig(count=count, data_parallel_degree=replicas)


def test_reserving_more_than_there_is_is_refused() -> None:
    with pytest.raises(ValidationError, match="must be less than the memory of one device"):
        DevicesConfig(memory_gib=24, reserved_gib=24)


def test_refs_name_one_device_each() -> None:
    assert DevicesConfig(kind="gpu", count=2).refs() == (DeviceRef.GPU(0), DeviceRef.GPU(1))


def test_refs_of_a_cpu_name_its_shards() -> None:
    assert DevicesConfig(kind="cpu", count=2).refs() == (DeviceRef.CPU(0), DeviceRef.CPU(1))


def test_refs_before_the_kind_is_decided_are_refused() -> None:
    with pytest.raises(ConfigError, match="kind=auto: must be cpu or gpu"):
        DevicesConfig(kind="auto").refs()


def test_stated_devices_are_left_as_they_are(two_gpus: None) -> None:
    stated = DevicesConfig(name="h200", kind="gpu", count=8, memory_gib=141)
    assert detect(stated) is stated


def test_auto_becomes_the_first_gpu(two_gpus: None) -> None:
    found = detect(DevicesConfig())
    assert (found.kind, found.count, found.name, found.memory_gib) == ("gpu", 1, "NVIDIA H100 80GB HBM3", 70.0)


def test_several_gpus_have_the_memory_of_the_fullest(two_gpus: None) -> None:
    assert detect(DevicesConfig(count=2)).memory_gib == 60.0


def test_stated_memory_wins_over_what_is_free(two_gpus: None) -> None:
    found = detect(DevicesConfig(memory_gib=40))
    assert (found.kind, found.memory_gib) == ("gpu", 40.0)


def test_more_gpus_than_there_are_are_refused(two_gpus: None) -> None:
    with pytest.raises(ConfigError, match=r"count=8: .*this machine shows 2.*Try: count=2"):
        detect(DevicesConfig(count=8))


def test_a_gpu_of_unknown_memory_is_refused_where_there_is_none(no_gpus: None) -> None:
    with pytest.raises(ConfigError, match=r"this machine shows 0.*Try: memory_gib=80"):
        detect(DevicesConfig(kind="gpu"))


def test_auto_becomes_the_cpu_where_there_is_no_gpu(no_gpus: None) -> None:
    found = detect(DevicesConfig())
    assert (found.kind, found.name, found.memory_gib) == ("cpu", "cpu", 12.0)


def test_shards_on_a_cpu_divide_its_memory(no_gpus: None) -> None:
    assert detect(DevicesConfig(kind="cpu", count=4)).memory_gib == 3.0


def test_this_machine_is_detected_as_it_is() -> None:
    found = detect(DevicesConfig())
    assert found.kind in ("cpu", "gpu")
    assert found.memory_gib
