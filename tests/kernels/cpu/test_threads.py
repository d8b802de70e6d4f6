"""Items are spread over the threads that torch has, or over the library's own, and each is done once."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from threading import Barrier, Thread
from typing import Any

import pytest

from kvcfg.kernels.cpu.threads import share_threads

# What C++ calls `parallel_for` is looked up under its compiled name, as Python has no other use for it.
LOOP = """
import ctypes, os, signal, sys, threading, time
import torch
from kvcfg.kernels.cpu.loader import load_kernel
from kvcfg.kernels.cpu.threads import share_threads

library = load_kernel("pages")
BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)
loop_ = library._ZN5kvcfg12parallel_forEllPFvPvlES0_
loop_.argtypes, loop_.restype = [ctypes.c_int64, ctypes.c_int64, BODY, ctypes.c_void_p], None

def loop(count, threads, body):
    loop_(count, threads, BODY(lambda _, item: body(item)), None)

def who(count, threads):
    "Threads of the system that took part; each item takes long enough for all to come."
    ids = []
    loop(count, threads, lambda item: (time.sleep(0.02), ids.append(threading.get_native_id())))
    return set(ids)

def all_threads():
    return {int(name) for name in os.listdir("/proc/self/task")}
"""
TORCH = "torch.set_num_threads(3)\ntorch.ones(1 << 22).exp_()\n"
OWN = "library.kvcfg_share_threads(None)\n"
POOLS = pytest.mark.parametrize("pool", ["", OWN], ids=["torch's threads", "own threads"])

Loop = Callable[[int, int, Callable[[int], object]], None]


def run(code: str) -> str:
    """What a new process prints after `code`, which finds everything of LOOP, and torch's three threads."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", LOOP + TORCH + code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(params=["", OWN], ids=["torch's threads", "own threads"])
def loop(request: pytest.FixtureRequest) -> Iterator[Loop]:
    names: dict[str, Any] = {}
    exec(LOOP + request.param, names)
    yield names["loop"]
    exec("share_threads(library)", names)


pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
linux = pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")


@pytest.mark.parametrize("count", [0, 1, 2, 7, 1000])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_each_item_is_done_once(loop: Loop, count: int, threads: int) -> None:
    done: list[int] = []
    loop(count, threads, done.append)
    assert sorted(done) == list(range(count))


def test_a_loop_inside_a_loop_is_done_by_the_thread_that_has_the_item(loop: Loop) -> None:
    pairs: list[tuple[int, int]] = []
    loop(6, 2, lambda outer: loop(5, 2, lambda inner: pairs.append((outer, inner))))
    assert sorted(pairs) == [(outer, inner) for outer in range(6) for inner in range(5)]


def test_loops_of_several_python_threads_do_not_mix(loop: Loop) -> None:
    together = Barrier(4)
    done: list[list[int]] = [[] for _ in range(4)]

    def work(mine: list[int]) -> None:
        together.wait()
        for _ in range(20):
            loop(50, 2, mine.append)

    threads = [Thread(target=work, args=(mine,)) for mine in done]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [sorted(mine) for mine in done] == [sorted(list(range(50)) * 20)] * 4


@linux
def test_torchs_threads_do_the_work_and_none_is_started() -> None:
    assert run(
        "before = all_threads(); took = who(12, 3); print(len(took), took <= before, all_threads() == before)"
    ) == ("3 True True")


@linux
def test_own_threads_are_started_once() -> None:
    code = "before = all_threads(); took = who(12, 3); print(len(took), len(all_threads() - before))\n"
    assert run(OWN + code + code).splitlines() == ["3 2", "3 0"]


@linux
def test_one_thread_stays_on_the_callers() -> None:
    assert run("print(who(3, 1) == {threading.get_native_id()})") == "True"


@linux
@POOLS
def test_a_child_of_a_fork_has_threads_of_its_own(pool: str) -> None:
    child = "signal.alarm(30); took = who(12, 3); print(len(took), took == all_threads(), flush=True); os._exit(0)"
    code = f"who(12, 3)\nif pid := os.fork():\n    print(os.waitpid(pid, 0)[1])\nelse:\n    {child}"
    assert run(pool + code).splitlines() == ["3 True", "0"]


@linux
def test_a_library_loaded_in_a_child_of_a_fork_keeps_to_its_own_threads() -> None:
    """OpenMP was used before the fork, so its threads are missing in the child."""
    child = "signal.alarm(30); share_threads(library); print(len(who(12, 3)), flush=True); os._exit(0)"
    code = f"who(12, 3)\nif pid := os.fork():\n    print(os.waitpid(pid, 0)[1])\nelse:\n    {child}"
    assert run(code).splitlines() == ["3", "0"]


def test_a_library_that_splits_nothing_is_left_alone() -> None:
    share_threads(ctypes.CDLL(None))
