"""Every device preset: composes, is what its name says, and adds nothing to the facts of one device."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from kvcfg import composition
from kvcfg.config.devices import DevicesConfig

PRESETS = sorted(path.stem for path in (Path(__file__).parents[2] / "conf" / "devices").glob("*.yaml"))
GPUS = ("rtx4090", "l40s", "a100-80g", "h100", "h200", "b200", "mi300x")
LAYOUTS = {"": (1, 1, 1), "x8": (8, 1, 8), "x8_dp8": (8, 8, 1), "x8_dp2tp4": (8, 2, 4)}


@cache
def preset(name: str) -> DevicesConfig:
    return composition.compose(["model=llama-3.1-8b", f"devices={name}"]).devices


def test_every_gpu_comes_in_every_layout() -> None:
    assert set(PRESETS) == {gpu + layout for gpu in GPUS for layout in LAYOUTS} | {"auto", "cpu"}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gpu", GPUS)
class TestLayout:
    def test_is_what_its_name_says(self, gpu: str, layout: str) -> None:
        found = preset(gpu + layout)
        assert (found.count, found.data_parallel_degree, found.tensor_parallel_degree) == LAYOUTS[layout]

    def test_is_made_of_the_same_device(self, gpu: str, layout: str) -> None:
        one = preset(gpu).model_dump(exclude={"count", "data_parallel_degree"})
        assert preset(gpu + layout).model_dump(exclude={"count", "data_parallel_degree"}) == one


@pytest.mark.parametrize("gpu", GPUS)
def test_memory_and_bandwidth_of_a_gpu_are_stated(gpu: str) -> None:
    found = preset(gpu)
    assert found.kind == "gpu"
    assert found.memory_gib is not None
    assert found.bandwidth_gb_s is not None


@pytest.mark.parametrize(
    ("gpu", "terabytes_per_second"), [("l40s", 0.864), ("h100", 3.35), ("h200", 4.8), ("b200", 8), ("mi300x", 5.3)]
)
def test_bandwidth_is_that_of_the_datasheet(gpu: str, terabytes_per_second: float) -> None:
    assert preset(gpu).bandwidth_gb_s == pytest.approx(terabytes_per_second * 1000)


def test_auto_equals_the_defaults_of_the_devices() -> None:
    assert preset("auto") == DevicesConfig()


def test_cpu_leaves_its_memory_to_the_machine() -> None:
    assert (preset("cpu").kind, preset("cpu").memory_gib) == ("cpu", None)
