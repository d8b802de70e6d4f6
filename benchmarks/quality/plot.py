"""Bits of a stored number against KL, one panel a model: recipes and peers as points, and the line of the best."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from parts import PartStore
from rows import Row, rows_of

from kvcfg.evaluation.plot_files import check_plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK = "#444444"
_PLAIN, _CALIBRATED, _PUBLISHED, _PEER = "#0072B2", "#009E73", "#E69F00", "#D55E00"
"""Told apart by people who see fewer colours too (Okabe and Ito)."""

_LABEL_POINTS = 9.5
"""Height of a name, in points."""

_WIDEST = 10.2
"""Bits at the right edge: what stores more is no quantized cache."""


def draw(rows: Sequence[Row], path: Path, page_size: int = 64) -> None:
    """Write the picture of one page size; peers stand in the picture of any.

    Raises:
        ConfigError: if the name is not one of a picture.
        BackendUnavailable: if matplotlib is not installed.
    """
    check_plot(str(path))
    from matplotlib.figure import Figure

    shown = [
        row for row in rows if row.bits < _WIDEST and row.kl > 0 and (row.kind == "peer" or row.page_size == page_size)
    ]
    models = list(dict.fromkeys(row.model for row in shown))
    figure = Figure(figsize=(7.2 * max(len(models), 1), 7.2), layout="constrained")
    panels = figure.subplots(1, max(len(models), 1), sharex=True, sharey=True, squeeze=False)[0]
    low, high = (limit(row.kl for row in shown) for limit in (min, max))
    for axes, model in zip(panels, models, strict=True):
        own = [row for row in shown if row.model == model]
        _frame(axes, model, low, high)
        _points(axes, own)
    panels[0].set_ylabel("KL to the full-precision cache, nats per prediction (log)", color=_INK)
    panels[0].legend(frameon=False, fontsize=9, loc="lower left", labelcolor=_INK)
    counts = sorted({row.num_predictions for row in shown}) or [0]
    predictions = " to ".join(f"{count:,}" for count in dict.fromkeys((counts[0], counts[-1])))
    figure.suptitle(
        f"Loss and size of KV caches, pages of {page_size}, {predictions} predictions a point; lower left is better",
        x=0.01, ha="left", fontsize=11, color=_INK,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _points(axes: Axes, rows: Sequence[Row]) -> None:
    front = _front(rows)
    axes.plot(
        [row.bits for row in front], [row.kl for row in front], color="#cccccc", linewidth=5, zorder=1,
        solid_joinstyle="round", label="best at its size",
    )  # fmt: skip
    sorts = (
        ("kvcfg, no calibration", _PLAIN, "o", [r for r in rows if r.kind == "recipe" and not _is_calibrated(r)]),
        ("kvcfg, calibrated", _CALIBRATED, "s", [r for r in rows if r.kind == "recipe" and _is_calibrated(r)]),
        ("published methods in kvcfg's pages", _PUBLISHED, "^", [r for r in rows if r.kind == "experimental"]),
        ("shipped by transformers", _PEER, "D", [r for r in rows if r.kind == "peer"]),
    )
    colours = {}
    for name, colour, marker, own in sorts:
        if own:
            xs, ys = [row.bits for row in own], [row.kl for row in own]
            below, above = ([row.kl - row.kl_ci[0] for row in own], [row.kl_ci[1] - row.kl for row in own])
            axes.errorbar(
                xs, ys, yerr=[[max(gap, 0) for gap in gaps] for gaps in (below, above)], color=colour, marker=marker,
                linestyle="none", markersize=6, markeredgecolor="white", elinewidth=1, label=name, zorder=3,
            )  # fmt: skip
        colours |= {row.candidate: colour for row in own}
    _name(axes, rows, colours)


def _is_calibrated(row: Row) -> bool:
    return row.candidate.endswith("_calibrated")


def _front(rows: Sequence[Row]) -> list[Row]:
    """Rows than which none is both smaller and better."""
    kept: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.bits, row.kl)):
        if not kept or row.kl < kept[-1].kl:
            kept.append(row)
    return kept


def _name(axes: Axes, rows: Sequence[Row], colours: dict[str, str]) -> None:
    """The name of each point on its right, or on its left, moved up or down where names would lie on each other."""
    figure = axes.get_figure()
    assert figure is not None
    figure.canvas.draw()
    scale = figure.dpi / 72
    taken = [_box(*axes.transData.transform((row.bits, row.kl)), 7 * scale, 7 * scale) for row in rows]
    for row in sorted(rows, key=lambda row: -row.kl):
        x, y = axes.transData.transform((row.bits, row.kl))
        text = axes.annotate(
            row.candidate, (row.bits, row.kl), fontsize=8, color=colours[row.candidate], va="center",
            xytext=(0, 0), textcoords="offset points", zorder=4,
        )  # fmt: skip
        width, height = text.get_window_extent().width, _LABEL_POINTS * scale
        steps = [step * sign for step in range(12) for sign in ((1, -1) if step else (1,))]
        places = [(side, step) for step in steps for side in (1, -1)]
        for side, step in places:
            middle = x + side * (6 * scale + width / 2)
            box = _box(middle, y + step * height / 2, width, height)
            if _is_inside(axes, box) and not any(_overlap(box, other) for other in taken):
                break
        taken.append(box)
        text.set_ha("left" if side > 0 else "right")
        text.set_position((6 * side, step * height / 2 / scale))


def _box(x: float, y: float, width: float, height: float) -> tuple[float, float, float, float]:
    return (x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def _overlap(one: tuple[float, ...], two: tuple[float, ...]) -> bool:
    return one[0] < two[2] and two[0] < one[2] and one[1] < two[3] and two[1] < one[3]


def _is_inside(axes: Axes, box: tuple[float, ...]) -> bool:
    whole = axes.get_window_extent()
    return whole.x0 < box[0] and box[2] < whole.x1 and whole.y0 < box[1] and box[3] < whole.y1


def _frame(axes: Axes, model: str, low: float, high: float) -> None:
    axes.set_yscale("log")
    axes.set_xlim(1.8, _WIDEST)
    axes.set_ylim(low / 3, high * 2)
    axes.set_xlabel("bits of a stored number (scales, zeros, means and sinks counted)", color=_INK)
    axes.set_title(model, loc="left", fontsize=10, color=_INK)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", color="#bbbbbb", labelcolor=_INK)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#bbbbbb")


def main() -> None:
    """Draw what a results file holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("results/quality.jsonl"))
    parser.add_argument("--window-tokens", type=int, default=1024)
    parser.add_argument("--page", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("results/quality.png"))
    options = parser.parse_args()
    rows, _ = rows_of(PartStore(options.results).parts(), options.window_tokens)
    if not rows:
        sys.exit(f"{options.results} holds no figures")
    draw(rows, options.out, options.page)


if __name__ == "__main__":
    main()
