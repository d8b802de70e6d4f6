"""The picture of errors: one map of keys and one of values a row, on one scale."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvcfg.errors import KvcfgError
from kvcfg.evaluation.heat_map import draw_stored_errors
from kvcfg.results.stored_error import StoredError

pytest.importorskip("matplotlib")


def row(name: str, *layers: list[float | None]) -> Any:
    error = StoredError(keys=list(layers), values=list(layers))
    return SimpleNamespace(format=name, model="tiny", stored_error=error)


def texts_of(svg: Path) -> set[str]:
    """Matplotlib names each text it draws as paths in a comment."""
    lines = svg.read_text().splitlines()
    return {line.strip()[5:-4] for line in lines if line.strip().startswith("<!-- ")}


def test_maps_of_all_rows_are_named(tmp_path: Path) -> None:
    draw_stored_errors([row("int8", [0.1, 0.2]), row("int4", [0.3, 0.4])], str(tmp_path / "a.svg"))
    named = {f"{side}, {name} on tiny" for side in ("keys", "values") for name in ("int8", "int4")}
    assert named <= texts_of(tmp_path / "a.svg")


@pytest.mark.parametrize(
    "layers",
    [
        [[0.1, 0.2], [0.1]],
        [[], [0.1, 0.2]],
        [[0.0, 0.0]],
        [[0.1, None]],
        [[None]],
    ],
    ids=["fewer heads", "shared layer", "no error", "a head without numbers", "no numbers"],
)
def test_uneven_layers_are_drawn(tmp_path: Path, layers: list[list[float | None]]) -> None:
    draw_stored_errors([row("int8", *layers)], str(tmp_path / "a.png"))
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KvcfgError, match=r"a\.png cannot be written"):
        draw_stored_errors([row("int8", [0.1])], str(tmp_path / "file" / "a.png"))
