"""What storing does to keys and values as a picture: a row of maps a cache, a column a layer, a line a head."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan
from typing import TYPE_CHECKING

from kvcfg.evaluation.plot_files import save_plot
from kvcfg.results.row import ResultRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK = "#444444"


def draw_stored_errors(rows: Sequence[ResultRow], path: str) -> None:
    """Write the picture; all maps have one scale of colours.

    Args:
        rows: rows that say it.
        path: where to; its suffix says which kind of picture.

    Raises:
        KvcfgError: if the file cannot be written.
    """
    from matplotlib.figure import Figure

    errors = [row.stored_error for row in rows if row.stored_error is not None]
    maps = [(error.keys, error.values) for error in errors]
    heads = max((len(layer) for pair in maps for side in pair for layer in side), default=1)
    largest = max((item for pair in maps for side in pair for layer in side for item in layer if item), default=0.01)
    figure = Figure(figsize=(10, len(rows) * max(1.9, 1.2 + 0.12 * heads)), layout="constrained")
    grid = figure.subplots(len(rows), 2, squeeze=False)
    for row, pair, places in zip(rows, maps, grid, strict=True):
        for name, side, axes in zip(("keys", "values"), pair, places, strict=True):
            _draw(axes, side, 100 * largest)
            axes.set_title(f"{name}, {row.format} on {row.model}", loc="left", fontsize=10, color=_INK)
    bar = figure.colorbar(grid[0, 0].images[0], ax=grid, shrink=0.9)
    bar.set_label("relative error, %", color=_INK)
    save_plot(figure, path)


def _draw(axes: Axes, layers: Sequence[Sequence[float | None]], largest: float) -> None:
    """One map; white where a layer has fewer heads."""
    from matplotlib.ticker import MaxNLocator

    heads = max(map(len, layers), default=0)
    cells = [
        [nan if head >= len(layer) or (error := layer[head]) is None else 100 * error for layer in layers]
        for head in range(heads)
    ]
    axes.imshow(cells, aspect="auto", cmap="viridis", vmin=0, vmax=largest, interpolation="nearest")
    axes.set_xlabel("layer", color=_INK)
    axes.set_ylabel("head", color=_INK)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(color="#bbbbbb", labelcolor=_INK)
    for side in axes.spines.values():
        side.set_visible(False)
