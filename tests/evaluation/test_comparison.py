"""What two sides differ in, and only that."""

from __future__ import annotations

from pathlib import Path

from kvcfg.composition import compose
from kvcfg.evaluation.comparison import Comparison, compare_sides
from kvcfg.evaluation.sides import Side
from tests.evaluation.test_sides import INT8, row_of

LLAMA = ("model=llama-3.1-8b", "devices=h100")


def compared(a: tuple[str, ...], b: tuple[str, ...]) -> Comparison:
    return compare_sides(Side("a", compose(a), None), Side("b", compose(b), None))


def test_equal_sides_differ_in_nothing() -> None:
    made = compared(LLAMA, LLAMA)
    assert not (made.config or made.planned or made.engines or made.measured)
    assert "Nothing differs." in made.table()


def test_differing_keys_are_named_with_both_values() -> None:
    made = compared(LLAMA, (*LLAMA, "cache.kv_cache_page_size=64"))
    assert [(item.name, item.a, item.b) for item in made.config] == [("cache.kv_cache_page_size", 128, 64)]


def test_bytes_and_capacity_are_those_of_the_plans() -> None:
    made = compared(LLAMA, (*LLAMA, "cache.kv_cache_format=int8"))
    figures = {item.name: (item.a, item.b) for item in made.planned}
    assert figures["bytes_per_token"] == (131072, 67584)
    assert "fits" not in figures


def test_flags_of_engines_are_compared() -> None:
    made = compared(LLAMA, (*LLAMA, "cache.enable_prefix_caching=false"))
    assert [item.name for item in made.engines["sglang"]] == ["disable-radix-cache"]


def test_refusal_of_one_side_is_its_reason() -> None:
    [item] = compared(LLAMA, (*LLAMA, "cache.kv_cache_format=int8")).engines["max"]
    assert (item.name, item.a) == ("refused", None) and "int8" in item.b


def test_refusal_of_both_sides_is_one_note() -> None:
    made = compared((*LLAMA, "cache.kv_cache_format=int8"), (*LLAMA, "cache.kv_cache_format=int6"))
    assert "sglang" not in made.engines
    assert any("Neither can be exported to sglang" in note for note in made.notes)


def test_figures_of_rows_are_compared() -> None:
    a, b = row_of(INT8, "a" * 64), row_of(INT8, "b" * 64, kl=2e-3)
    made = compare_sides(Side("a", compose(INT8), a), Side("b", compose(INT8), b))
    assert [(item.name, item.a, item.b) for item in made.measured] == [("kl", 1e-3, 2e-3)]
    assert "× 2" in made.table()


def test_rows_of_different_text_are_warned_of() -> None:
    a, b = row_of(INT8, "a" * 64), row_of(INT8, "b" * 64, text_sha="f" * 64)
    notes = compare_sides(Side("a", compose(INT8), a), Side("b", compose(INT8), b)).notes
    assert any("different text" in note for note in notes)


def test_missing_row_is_told() -> None:
    assert sum("There is no row of" in note for note in compared(LLAMA, LLAMA).notes) == 2


def test_hit_rates_are_compared_where_both_name_a_trace(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    line = '{"text": "' + "You are a helpful assistant. " * 20 + '"}\n'
    trace.write_text(line * 3)
    both = (*LLAMA, f"workload.trace={trace}")
    made = compared((*both, "cache.kv_cache_page_size=8"), (*both, "cache.kv_cache_page_size=512"))
    [item] = [item for item in made.measured if item.name == "hit_rate"]
    assert item.a > item.b
