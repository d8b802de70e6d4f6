"""The quality benchmark: what was measured is not measured again, and its table says what the figures say."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from kvcfg.config.presets import preset_values

torch = pytest.importorskip("torch")

Script = Callable[[str], ModuleType]
MakePart = Callable[..., Any]


@pytest.fixture
def part(quality: Script) -> MakePart:
    """Makes parts: 64 predictions that all have one KL."""
    parts = quality("parts")

    def make(candidate: str = "bits4", kl: float = 0.01, first_token: int = 8192, **changes: Any) -> Any:
        figures = parts.Figures(
            kl=np.full(64, kl, dtype=np.float32),
            nll=3.0,
            nll_reference=2.5,
            top1=0.875,
            bits=4.25,
            bits_effective=4.5,
            clip_rate=0.0,
            note=changes.pop("note", ""),
        )
        plain = {
            "model": "m",
            "kind": "recipe",
            "page_size": 64,
            "identity": "now",
            "text": "book",
            "text_sha": "b0",
            "window_tokens": 65,
            "outcome": figures,
        }
        return parts.Part(candidate=candidate, first_token=first_token, **(plain | changes))

    return make


@pytest.fixture
def store(quality: Script, tmp_path: Path) -> Any:
    return quality("parts").PartStore(tmp_path / "deep" / "parts.jsonl")


def rows_of(quality: Script, *parts: Any) -> dict[tuple[str, str], Any]:
    rows, _ = quality("rows").rows_of(parts, 65)
    return {(row.model, row.candidate): row for row in rows}


def test_a_part_comes_back_from_the_file_as_it_was(store: Any, part: MakePart) -> None:
    store.append(part(kl=0.0123))
    (read,) = store.parts()
    assert dataclasses.replace(read, outcome="") == dataclasses.replace(part(), outcome="")
    assert read.outcome.kl.tolist() == part(kl=0.0123).outcome.kl.tolist()


def test_a_window_that_was_measured_is_known(store: Any, part: MakePart) -> None:
    store.append(part(first_token=8192))
    assert part(first_token=8192).key in store.measured()
    assert part(first_token=9216).key not in store.measured()


def test_a_recipe_that_changed_is_measured_again(store: Any, part: MakePart) -> None:
    store.append(part(identity="before"))
    assert part(identity="now").key not in store.measured()


def test_a_failure_is_tried_again(store: Any, part: MakePart) -> None:
    store.append(part(outcome="ImportError: not here"))
    assert store.measured() == set()


def test_a_line_that_was_cut_off_costs_only_itself(store: Any, part: MakePart) -> None:
    store.append(part(first_token=0))
    store.append(part(first_token=1024))
    store.path.write_bytes(store.path.read_bytes()[:-40])
    store.append(part(first_token=2048))
    assert [item.first_token for item in store.parts()] == [0, 2048]


def test_figures_of_a_recipe_as_it_was_are_left_out(quality: Script, part: MakePart) -> None:
    rows = rows_of(quality, part(kl=0.5, identity="before"), part(kl=0.25, identity="now"))
    assert rows["m", "bits4"].kl == 0.25


def test_a_row_is_the_mean_of_its_windows(quality: Script, part: MakePart) -> None:
    row = rows_of(quality, part(kl=0.25, first_token=0), part(kl=0.75, first_token=65))["m", "bits4"]
    assert (row.kl, row.num_predictions, row.top1) == (0.5, 128, 0.875)
    assert row.kl_ci[0] < 0.5 < row.kl_ci[1]
    assert row.ppl == pytest.approx(np.exp(3.0))


def test_windows_of_another_length_are_left_out(quality: Script, part: MakePart) -> None:
    assert rows_of(quality, part(window_tokens=33)) == {}


def test_the_ratio_counts_only_windows_that_both_were_measured_on(quality: Script, part: MakePart) -> None:
    yardstick = [part("fp8_unit", kl=0.5, first_token=0)]
    rows = rows_of(quality, *yardstick, part(kl=0.25, first_token=0), part(kl=8.0, first_token=65))
    assert rows["m", "bits4"].ratio == 0.5


def test_the_model_with_outliers_is_compared_with_the_plain_one(quality: Script, part: MakePart) -> None:
    rows = rows_of(quality, part(kl=0.25), part(kl=0.375, model="m-outlier"))
    assert rows["m-outlier", "bits4"].twin_ratio == 1.5
    assert np.isnan(rows["m", "bits4"].twin_ratio)


def test_the_noise_floor_is_beneath_the_table_and_no_row_of_it(quality: Script, part: MakePart) -> None:
    rows, failures = quality("rows").rows_of([part("floor", kl=2**-30, kind="floor"), part()], 65)
    text = quality("table").markdown(rows, failures)
    assert "| floor |" not in text
    assert "noise floor 9.3e-10" in text


def test_the_table_tells_a_peer_with_its_note_and_a_failure_with_its_reason(quality: Script, part: MakePart) -> None:
    parts = [
        part("fp8_unit", kl=0.5),
        part("quanto int4", kl=0.25, kind="peer", note="newest tokens are read in full precision"),
        part("hqq int4", kind="peer", outcome="ImportError: not here"),
    ]
    text = quality("table").markdown(*quality("rows").rows_of(parts, 65))
    assert "| m | 64 | **quanto int4** [1] | 4.25 | 4.50 | 2.50e-01 |" in text
    assert "| 0.5 |" in text
    assert "[1] newest tokens are read in full precision." in text
    assert "- m, page 64, hqq int4: ImportError: not here" in text


def test_paragraphs_become_lines_and_the_publishers_note_goes(quality: Script) -> None:
    text = "One\ntwo.\n\nThree\nfour.\n\nEnd of the Project Gutenberg EBook"
    assert quality("books").prepared(text) == "One two.\n\nThree four.\n\n"


def test_books_are_found_among_pieces_of_the_same_name(
    quality: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    books = quality("books")
    for folder, text in (("a", "a piece"), ("b", "the whole\nbook")):
        (tmp_path / "copies" / folder).mkdir(parents=True)
        (tmp_path / "copies" / folder / "book.txt").write_text(text)
    sha = hashlib.sha256(b"the whole\nbook").hexdigest()
    monkeypatch.setattr(books, "BOOKS", (books.Book("it", "package", "book.txt", sha),))
    paths = books.prepared_books(tmp_path / "copies", tmp_path / "kept")
    assert paths["it"].read_text() == "the whole book"


def test_every_recipe_of_conf_is_a_candidate(quality: Script) -> None:
    candidates = quality("candidates").recipes("smollm2-135m", 64, 128)
    found = {item.name for item in candidates if item.kind == "recipe"}
    assert found == set(preset_values("quantization")) - {"default", "auto"}


@pytest.fixture
def parse(quality: Script, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The options that scripts take alike, from a command line; afterwards the path is as it was."""
    monkeypatch.setattr("sys.path", list(sys.path))

    def run(*words: str) -> Any:
        monkeypatch.setattr("sys.argv", ["script", *words])
        return quality("options").parsed(argparse.ArgumentParser(), pages=[64], results="results/x.jsonl")

    return run


def test_peers_can_be_imported_once_options_are_read(parse: Callable[..., Any], tmp_path: Path) -> None:
    parse("--peers", str(tmp_path))
    assert sys.path[-1] == str(tmp_path)


def test_peers_are_left_alone_where_nothing_is_measured(parse: Callable[..., Any], tmp_path: Path) -> None:
    parse("--peers", str(tmp_path), "--markdown")
    assert str(tmp_path) not in sys.path


def test_pages_and_results_are_the_scripts_own_unless_given(parse: Callable[..., Any]) -> None:
    assert (parse().pages, str(parse().results)) == ([64], "results/x.jsonl")
    assert parse("--pages", "16", "32").pages == [16, 32]
