"""The reader of memory reads all of it, and there is more of it than caches hold."""

from __future__ import annotations

import os

import pytest
import torch

from kvcfg.evaluation import memory_reader


def test_all_of_the_memory_is_read(small_memory: int) -> None:
    reader = memory_reader.MemoryReader()
    assert reader.memory.nbytes == small_memory
    before = int(reader())
    reader.memory.view(torch.int64)[-1] += 1
    assert int(reader()) == before + 1


def test_memory_is_normal_numbers_to_the_end(small_memory: int) -> None:
    numbers = memory_reader.MemoryReader().memory.view(torch.bfloat16).float()
    assert numbers.isfinite().all() and abs(float(numbers[-10000:].std()) - 1) < 0.1


def test_more_than_the_last_level_cache_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    memory_reader.cold_bytes.cache_clear()
    monkeypatch.setattr(os, "sysconf", lambda name: 400 << 20)
    assert memory_reader.cold_bytes() >= 2 * (400 << 20)
    memory_reader.cold_bytes.cache_clear()


def test_system_that_does_not_tell_its_caches_is_read_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> int:
        raise ValueError("unrecognized configuration name")

    memory_reader.cold_bytes.cache_clear()
    monkeypatch.setattr(os, "sysconf", refuse)
    assert memory_reader.cold_bytes() >= 512 << 20
    memory_reader.cold_bytes.cache_clear()
