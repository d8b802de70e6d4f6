"""The kernel benchmark: its reference is attention, its page tables meet every page, its ratios are what they say."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch")

FOLDER = Path(__file__).parents[2] / "benchmarks" / "kernels"

Script = Callable[[str], ModuleType]


@pytest.fixture(scope="module")
def kernels() -> Iterator[Script]:
    """Imports a script of benchmarks/kernels."""
    # Other benchmarks have scripts of the same names.
    names = [script.stem for script in FOLDER.glob("*.py")]
    others = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module
    sys.path.remove(str(FOLDER))
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(others)


def row(**changes: Any) -> dict[str, Any]:
    plain = {
        "case": "decode",
        "threads": 1,
        "shape": "32/8/128",
        "batch": 8,
        "context": 4096,
        "side": "kvcfg",
        "format": "int8",
        "page_size": 128,
        "order": "random",
        "wall_ms": 4.0,
        "gb_per_s": 15.0,
        "read_gb_per_s": 30.0,
        "speedup": 4.0,
    }
    return plain | changes


def test_reference_is_torchs_attention_where_every_query_sees_its_past(kernels: Script) -> None:
    shape = kernels("shapes").Shape(6, 2, 16)
    generator = torch.Generator().manual_seed(0)
    queries, keys, values = (torch.randn(9, heads, 16, generator=generator).double() for heads in (6, 2, 2))
    found = kernels("reference").attention(queries, keys, values, range(1, 10), shape)
    heads = (item.transpose(0, 1) for item in (queries, keys, values))
    wanted = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
    assert torch.allclose(found, wanted.transpose(0, 1), atol=1e-12)


@pytest.mark.parametrize("order", ["random", "consecutive"])
def test_page_tables_meet_every_page_before_any_again(kernels: Script, order: str) -> None:
    tables = kernels("memory").page_tables(60, 2, 5, order, columns=8, seed=3)
    met = torch.cat([table[:, :5].flatten() for table in islice(tables, 6)])
    assert sorted(met.tolist()) == list(range(60))


def test_page_tables_of_consecutive_pages_have_one_jump_at_most(kernels: Script) -> None:
    tables = kernels("memory").page_tables(60, 2, 5, "consecutive", columns=5, seed=3)
    steps = torch.cat([table.flatten() for table in islice(tables, 6)]).diff()
    assert sorted(set(steps.tolist())) == [-59, 1]


def test_page_tables_of_a_call_larger_than_the_pool_repeat_it_evenly(kernels: Script) -> None:
    table = next(kernels("memory").page_tables(10, 4, 5, "random", columns=5, seed=3))
    assert table.flatten().bincount().tolist() == [2] * 10


def test_a_kernel_that_gives_nan_does_not_pass(kernels: Script) -> None:
    checks = kernels("checks")
    error = checks.worst([1e-4, float("nan"), 1e-4])
    assert not checks.Check("decode", "kvcfg", "int8", 128, "32/8/128", error, 4e-3).holds


def test_the_worst_sequence_counts(kernels: Script) -> None:
    shape = kernels("shapes").Shape(2, 1, 4)
    queries, keys = torch.ones(2, 2, 4), torch.ones(3, 1, 4)
    found = torch.stack([torch.full((2, 4), 1.0), torch.full((2, 4), 1.5)])
    check = kernels("checks").check("decode", "kvcfg", "int8", 16, shape, found, queries, [(keys, keys), (keys, keys)])
    assert check.error == pytest.approx(0.5)


def test_every_variant_has_a_turn_in_every_round(kernels: Script) -> None:
    rounds = kernels("rounds")
    variants = [rounds.Variant("kvcfg", name, lambda: None, 1) for name in ("int8", "bf16", "fp8")]
    rounds.measure(variants, 4)
    assert [len(variant.wall_s) for variant in variants] == [4, 4, 4]


def test_summary_takes_the_geometric_mean_and_names_the_slowest_point(kernels: Script) -> None:
    rows = [row(speedup=2.0, batch=1), row(speedup=8.0)]
    (found,) = kernels("speedups").decode_summary(rows)
    assert (found["speedup"], found["least"], found["where"]) == (pytest.approx(4.0), 2.0, "32/8/128, 1 × 4,096")


def test_summary_compares_with_own_bf16_of_the_same_point_only(kernels: Script) -> None:
    rows = [row(), row(format="bf16", wall_ms=8.0), row(format="bf16", wall_ms=80.0, page_size=16)]
    found = kernels("speedups").decode_summary(rows)
    assert [item["own_bf16"] for item in found if item["format"] == "int8"] == [pytest.approx(2.0)]


def test_report_needs_no_vllm(kernels: Script) -> None:
    text = kernels("speedups").report({"checks": [], "rows": [row(speedup=None)]})
    assert "| int8 | 1 | 128 | random |  |  |" in text
