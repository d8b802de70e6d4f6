"""What is wrong with a grid, each problem once, with the points that have it."""

from __future__ import annotations

from collections.abc import Sequence

from kvcfg.composition.points import GridPoint


def report(points: Sequence[GridPoint]) -> str:
    """Every problem in one text; of a problem that many points share, how many and the first of them."""
    having: dict[str, list[GridPoint]] = {}
    for point in points:
        for line in dict.fromkeys(str(point.error).splitlines() if point.error else ()):
            having.setdefault(line, []).append(point)
    if len(points) == 1:
        return "\n".join(having)
    lines = [f"{sum(point.error is not None for point in points)} of {len(points)} points cannot be; nothing was run"]
    for line, found in having.items():
        where = "every point" if len(found) == len(points) else f"{len(found)} of {len(points)} points, the first is"
        example = "" if len(found) == len(points) else f" {' '.join(found[0].overrides)}"
        lines += [f"  {line}", f"    in {where}{example}"]
    return "\n".join(lines)
