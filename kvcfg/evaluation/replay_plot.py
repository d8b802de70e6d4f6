"""Hit rate over capacity as a picture: a line a replay, its name at its end, a dot where a device's plan lies.

Replays that differ nowhere by a point, like those of several page sizes often do, are one line with all their names.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple

from kvcfg.evaluation.plot_files import save_plot
from kvcfg.evaluation.replay import Replay
from kvcfg.evaluation.replay_text import point_labels
from kvcfg.units import readable_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#888888")
"""Told apart by people who see fewer colours too (Okabe and Ito)."""

_DASHES = {"lru": "-", "lfu": "--", "fifo": ":", "priority": "-."}

_INK = "#444444"

_LABEL_INCHES = 0.17
"""Height of a line's name."""


class Dot(NamedTuple):
    """What a plan holds.

    Attributes:
        x: capacity, in tokens or bytes.
        y: hit rate there, in percent.
        name: of the replay.
    """

    x: float
    y: float
    name: str


class Line(NamedTuple):
    """One replay as it is drawn.

    Attributes:
        label: what tells it from the others, by kind.
        policy: decides the dashes.
        xs: capacities, ascending, in tokens or bytes.
        ys: hit rates there, in percent.
        is_steps: whether every capacity is known: the rate stays until the next one.
        dots: the capacities that were planned, if that was asked for.
        colour: the same for lines that only their policies tell apart.
    """

    label: Mapping[str, str]
    policy: str
    xs: tuple[float, ...]
    ys: tuple[float, ...]
    is_steps: bool
    dots: tuple[Dot, ...]
    colour: str = _COLOURS[0]


def draw_replays(
    points: Sequence[tuple[Sequence[str], Replay]],
    path: str,
    axis: Literal["auto", "tokens", "bytes"] = "auto",
) -> None:
    """Write the picture.

    Args:
        points: the overrides of a point and its replay.
        path: where to; its suffix says which kind of picture.
        axis: what capacity is counted in; auto = bytes where a token takes different bytes, else tokens.

    Raises:
        KvcfgError: if the file cannot be written.
    """
    from matplotlib.figure import Figure

    in_bytes = axis == "bytes" or (
        axis == "auto" and len({replay.job.plan.bytes_per_token for _, replay in points}) > 1
    )
    lines = _coloured(_as_one(_lines(points, in_bytes)))
    height = max(4.2, 1.4 + _LABEL_INCHES * len(lines))
    figure = Figure(figsize=(8.4, height), layout="constrained")
    axes = figure.add_subplot()
    for line in lines:
        _draw(axes, line)
    _frame(axes, lines, in_bytes)
    _name_ends(axes, lines, height - 1.2)
    trace = points[0][1]
    axes.set_title(
        f"Prefix cache hit rate, {trace.path.rpartition('/')[2]} ({len(trace.trace.requests):,} requests)",
        loc="left", fontsize=11, color=_INK,
    )  # fmt: skip
    save_plot(figure, path)


def _lines(points: Sequence[tuple[Sequence[str], Replay]], in_bytes: bool) -> list[Line]:
    labels = point_labels(points)
    lines = []
    for label, (_, replay) in zip(labels, points, strict=True):
        unit = replay.job.bytes_per_page if in_bytes else replay.job.page_size
        enough = max(replay.trace.unique_pages, 1)
        bounded = sorted({(min(row.num_pages, enough), row.hit_rate) for row in replay.rows if row.num_pages})
        if replay.curve is not None and not replay.job.tiers:
            corners = replay.curve.corners()
            whole = [(bounded[0][0], replay.curve.hit_rate(bounded[0][0]))] if bounded else []
            bounded = [*whole, *(corner for corner in corners if not whole or corner[0] > whole[0][0])]
            bounded = [*_thinned(bounded), (enough, replay.curve.hit_rate(None))]
        planned = [row for row in replay.rows if row.capacity == "plan" and row.num_pages]
        lines.append(
            Line(
                label=label,
                policy=replay.job.experiment.cache.eviction,
                xs=tuple(pages * unit for pages, _ in bounded),
                ys=tuple(100 * rate for _, rate in bounded),
                is_steps=replay.curve is not None and not replay.job.tiers,
                dots=tuple([Dot(row.num_pages * unit, 100 * row.hit_rate, _name(label)) for row in planned]),
            )
        )
    return lines


def _thinned(corners: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Corners without those that are closer to the one before than a line is wide."""
    kept = list(corners[:1])
    for corner in corners[1:]:
        if corner[0] > 1.003 * kept[-1][0]:
            kept.append(corner)
    return kept


def _as_one(lines: Sequence[Line]) -> list[Line]:
    """The first of each set of lines that lie on each other, under the names of all."""
    kept: list[Line] = []
    for line in lines:
        place = next((index for index, other in enumerate(kept) if _coincide(line, other)), None)
        if place is None:
            kept.append(line)
        else:
            other = kept[place]
            kept[place] = other._replace(label=_both(other.label, line.label), dots=_apart_dots(other.dots + line.dots))
    return kept


def _apart_dots(dots: Sequence[Dot]) -> tuple[Dot, ...]:
    """Dots without those that an earlier one covers."""
    kept: list[Dot] = []
    for dot in dots:
        if not any(0.95 < dot.x / other.x < 1.05 for other in kept):
            kept.append(dot)
    return tuple(kept)


def _coincide(one: Line, two: Line) -> bool:
    if one.policy != two.policy or not one.xs or not two.xs or not 0.8 < one.xs[-1] / two.xs[-1] < 1.25:
        return False
    low, high = max(one.xs[0], two.xs[0]), min(one.xs[-1], two.xs[-1])
    places = [low * (high / low) ** (step / 99) for step in range(100)]
    return all(abs(_rate_at(one, place) - _rate_at(two, place)) < 1 for place in places)


def _rate_at(line: Line, place: float) -> float:
    after = bisect_right(line.xs, place)
    if after == 0 or after == len(line.xs) or line.is_steps:
        return line.ys[max(after - 1, 0)]
    (x0, x1), (y0, y1) = line.xs[after - 1 : after + 1], line.ys[after - 1 : after + 1]
    return y0 + (y1 - y0) * math.log(place / x0) / math.log(x1 / x0)


def _both(one: Mapping[str, str], two: Mapping[str, str]) -> dict[str, str]:
    """Two labels as one: values that differ stand beside each other."""
    return {key: "/".join(dict.fromkeys([*value.split("/"), two[key]])) for key, value in one.items()}


def _coloured(lines: Sequence[Line]) -> list[Line]:
    hues = [tuple(value for key, value in line.label.items() if key != "policy") for line in lines]
    order = list(dict.fromkeys(hues))
    return [
        line._replace(colour=_COLOURS[order.index(hue) % len(_COLOURS)]) for line, hue in zip(lines, hues, strict=True)
    ]


def _name(label: Mapping[str, str]) -> str:
    return " ".join(f"{key} {value}" if value[:1].isdigit() else value for key, value in label.items())


def _draw(axes: Axes, line: Line) -> None:
    style = "steps-post" if line.is_steps else "default"
    marker = "" if line.is_steps else "."
    beyond = sorted(dot for dot in line.dots if line.xs and dot.x > line.xs[-1])
    xs, ys = [*line.xs, *(dot.x for dot in beyond)], [*line.ys, *(dot.y for dot in beyond)]
    axes.plot(
        xs, ys, color=line.colour, linestyle=_DASHES.get(line.policy, "-"), drawstyle=style,
        marker=marker, markersize=5, linewidth=1.6, solid_joinstyle="round",
    )  # fmt: skip
    for dot in line.dots:
        axes.plot(dot.x, dot.y, "o", color=line.colour, markersize=6.5, markeredgecolor="white", zorder=5)
        if len(line.dots) > 1:
            axes.annotate(
                dot.name, (dot.x, dot.y), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8,
                color=line.colour,
            )  # fmt: skip


def _frame(axes: Axes, lines: Sequence[Line], in_bytes: bool) -> None:
    """Axes, their ticks, and what the dots are."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=4, numticks=14))
    axes.xaxis.set_minor_locator(NullLocator())
    written = readable_bytes if in_bytes else _tokens
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: written(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    dots = "  (dot: what the plan of the device holds)" if any(line.dots for line in lines) else ""
    axes.set_xlabel(f"cache of one replica, {'bytes' if in_bytes else 'tokens'}{dots}", color=_INK)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(color="#bbbbbb", labelcolor=_INK)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#bbbbbb")


def _name_ends(axes: Axes, lines: Sequence[Line], inches: float) -> None:
    """The name of each line right of its end, moved apart where ends are close."""
    low, high = axes.get_ylim()
    ended = sorted((line for line in lines if line.xs), key=lambda line: (round(line.ys[-1], 1), -_half_way(line)))
    heights = _apart([line.ys[-1] for line in ended], (high - low) * _LABEL_INCHES / inches, high)
    right = max((x for line in ended for x in (line.xs[-1], *(dot.x for dot in line.dots))), default=1.0)
    for line, height in zip(ended, heights, strict=True):
        axes.annotate(
            f"{_name(line.label)}  {line.ys[-1]:.1f} %", (right, height), xytext=(8, 0), textcoords="offset points",
            va="center", fontsize=9, color=line.colour, annotation_clip=False,
        )  # fmt: skip


def _half_way(line: Line) -> float:
    """The capacity at which a line has half of what it ends with: the name of a line on the left stands above."""
    return next(x for x, y in zip(line.xs, line.ys, strict=True) if y >= line.ys[-1] / 2)


def _apart(heights: Sequence[float], gap: float, top: float) -> list[float]:
    """Heights, nearly ascending, moved until neighbours are `gap` apart and the last is no higher than `top`."""
    groups = [[height] for height in heights]
    while (
        close := next((i for i, (one, two) in enumerate(pairwise(groups)) if _touch(one, two, gap)), None)
    ) is not None:
        groups[close : close + 2] = [groups[close] + groups[close + 1]]
    spread = [place for group in groups for place in _around_middle(group, gap)]
    for index in range(len(spread) - 1, -1, -1):
        spread[index] = min(spread[index], top - gap * (len(spread) - index - 0.5))
    return spread


def _touch(one: Sequence[float], two: Sequence[float], gap: float) -> bool:
    return _around_middle(two, gap)[0] - _around_middle(one, gap)[-1] < gap * 0.999


def _around_middle(group: Sequence[float], gap: float) -> list[float]:
    middle = sum(group) / len(group)
    return [middle + gap * (place - (len(group) - 1) / 2) for place in range(len(group))]


def _tokens(count: float) -> str:
    for unit, name in ((2**30, "G"), (2**20, "M"), (2**10, "k")):
        if count >= unit:
            return f"{count / unit:g}{name}"
    return f"{count:g}"
