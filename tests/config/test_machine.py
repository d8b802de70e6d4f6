"""Reading GPUs and memory limits, from files and programs made up for the purpose."""

from __future__ import annotations

import stat
from pathlib import Path

import psutil
import pytest

from kvcfg.config import machine
from kvcfg.config.machine import GPU, available_memory, visible_gpus
from kvcfg.units import GIB, MIB

TABLE = """0, GPU-aaaa-1, 81000, NVIDIA H100 80GB HBM3
1, GPU-bbbb-2, 40000, NVIDIA H100 80GB HBM3
2, GPU-cccc-3, 500, NVIDIA RTX 6000, Ada
"""


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program called nvidia-smi that prints TABLE."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{TABLE}END\n")
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return program


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cgroup tree of version 2 in which this process is in /outer/inner, without limits."""
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    membership = tmp_path / "membership"
    membership.write_text("0::/outer/inner\n")
    monkeypatch.setattr(machine, "CGROUP_ROOT", tmp_path)
    monkeypatch.setattr(machine, "CGROUP_MEMBERSHIP", membership)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 64 * GIB}))
    return tmp_path


def limit(folder: Path, most: str, used: int, reclaimable: int = 0) -> None:
    (folder / "memory.max").write_text(f"{most}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {reclaimable}\n")


def test_gpus_are_read_with_name_and_free_memory(smi: Path) -> None:
    assert visible_gpus()[0] == GPU("NVIDIA H100 80GB HBM3", 81000 * MIB)


def test_a_comma_in_a_name_belongs_to_the_name(smi: Path) -> None:
    assert visible_gpus()[2].name == "NVIDIA RTX 6000, Ada"


@pytest.mark.parametrize(
    ("visible", "free"),
    [("1,0", [40000, 81000]), ("GPU-bb", [40000]), ("", []), ("-1", []), ("0,7,1", [81000])],
    ids=["numbers, in their order", "start of a uuid", "empty", "none", "up to the first unknown"],
)
def test_gpus_that_cuda_would_not_see_are_left_out(
    smi: Path, monkeypatch: pytest.MonkeyPatch, visible: str, free: list[int]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.free_bytes // MIB for gpu in visible_gpus()] == free


def test_a_driver_that_fails_means_no_gpus(smi: Path) -> None:
    smi.write_text("#!/bin/sh\necho 'no devices were found'\nexit 9\n")
    assert visible_gpus() == []


def test_nothing_is_started_without_a_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(machine.subprocess, "run", lambda *_, **__: pytest.fail("a program was started"))
    assert visible_gpus() == []


def test_memory_without_a_limit_is_what_the_machine_has(cgroup: Path) -> None:
    limit(cgroup / "outer" / "inner", "max", 2 * GIB)
    assert available_memory() == 64 * GIB


def test_a_lower_limit_of_the_container_holds(cgroup: Path) -> None:
    limit(cgroup / "outer" / "inner", str(8 * GIB), 3 * GIB)
    assert available_memory() == 5 * GIB


def test_a_limit_on_an_outer_group_holds(cgroup: Path) -> None:
    limit(cgroup / "outer", str(4 * GIB), 3 * GIB)
    assert available_memory() == 1 * GIB


def test_file_cache_that_can_be_given_back_counts_as_free(cgroup: Path) -> None:
    limit(cgroup / "outer" / "inner", str(8 * GIB), 7 * GIB, reclaimable=2 * GIB)
    assert available_memory() == 3 * GIB


def test_limits_of_version_1_hold(cgroup: Path) -> None:
    (cgroup / "membership").write_text("4:memory:/outer\n1:cpu:/\n0::/\n")
    folder = cgroup / "memory" / "outer"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text(str(2 * GIB))
    (folder / "memory.usage_in_bytes").write_text(str(1 * GIB))
    assert available_memory() == 1 * GIB


def test_a_machine_without_cgroups_has_what_it_says(cgroup: Path) -> None:
    (cgroup / "membership").unlink()
    assert available_memory() == 64 * GIB
