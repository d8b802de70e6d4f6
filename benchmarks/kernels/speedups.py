"""What the rows come to: tables in Markdown."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from math import exp, log
from typing import Any

Row = dict[str, Any]

DECODE_GOALS = {"int8": (4.5, 3.5), "fp8": (4.5, 3.5), "bf16": (2.5, 2.0)}
"""Times vLLM's best bf16: in the geometric mean, and at every point."""

_POINT = ("threads", "shape", "batch", "context", "page_size", "order")


def geometric_mean(numbers: Iterable[float]) -> float:
    """Of numbers above 0, at least one."""
    logs = [log(number) for number in numbers]
    return exp(sum(logs) / len(logs))


def report(result: dict[str, Any]) -> str:
    """All tables of a result."""
    rows = result["rows"]
    parts = [_checks(result["checks"])]
    parts += [part(rows) for part in (_decode, _decode_points, _append, _prefill)]
    return "\n\n".join(part for part in parts if part)


def decode_summary(rows: list[Row]) -> list[Row]:
    """Over all decode points, for each number of threads, format, page size and order of kvcfg.

    `speedup` is the geometric mean over vLLM's best bf16 and `least` the smallest, at point `where`; `share` that of
    the read bandwidth; `own_bf16` the geometric mean over kvcfg's own bf16 at the same point.
    """
    ours = [row for row in rows if (row["case"], row["side"]) == ("decode", "kvcfg")]
    own = {_key(row): row["wall_ms"] for row in ours if row["format"] == "bf16"}
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in ours:
        groups[row["threads"], row["format"], row["page_size"], row["order"]].append(row)
    found = []
    for (threads, name, page_size, order), same in groups.items():
        slowest = min(same, key=lambda row: row["speedup"] or 0)
        compared = [own[_key(row)] / row["wall_ms"] for row in same if _key(row) in own]
        found.append(
            {
                "threads": threads,
                "format": name,
                "page_size": page_size,
                "order": order,
                "points": len(same),
                "speedup": geometric_mean(row["speedup"] for row in same) if slowest["speedup"] else None,
                "least": slowest["speedup"],
                "where": f"{slowest['shape']}, {slowest['batch']} × {slowest['context']:,}",
                "share": geometric_mean(row["gb_per_s"] / row["read_gb_per_s"] for row in same),
                "own_bf16": geometric_mean(compared) if compared else None,
            }
        )
    return found


def table(head: list[str], body: Iterable[list[Any]]) -> str:
    """A Markdown table; nothing if it has no lines."""
    lines = [[str(cell) for cell in line] for line in body]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)) if lines else ""


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in _POINT)


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}×"


def _checks(checks: list[Row]) -> str:
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for item in checks:
        groups[item["case"], item["side"], item["format"]].append(item)
    return table(
        ["largest error against float64", "kernels", "error", "bound", ""],
        [
            [" ".join(key), len(same), f"{largest['error']:.1e}", largest["bound"], _verdict(same)]
            for key, same in groups.items()
            for largest in [max(same, key=lambda item: item["error"])]
        ],
    )


def _verdict(same: list[Row]) -> str:
    wrong = [f"{item['shape']} page {item['page_size']}" for item in same if not item["holds"]]
    return f"WRONG at {', '.join(wrong)}" if wrong else ""


def _decode(rows: list[Row]) -> str:
    head = ["decode, kvcfg", "threads", "page", "order", "× vLLM's best bf16", "least", "where", "goal"]
    body = []
    for item in decode_summary(rows):
        goal = DECODE_GOALS.get(item["format"])
        body.append(
            [
                item["format"],
                item["threads"],
                item["page_size"],
                item["order"],
                _times(item["speedup"]),
                _times(item["least"]),
                item["where"],
                "" if goal is None else f"{goal[0]}×, {goal[1]}×",
                f"{item['share']:.0%}",
                _times(item["own_bf16"]),
            ]
        )
    return table([*head, "of read bandwidth", "× own bf16"], body)


def _decode_points(rows: list[Row]) -> str:
    """Every point: vLLM's best, and kvcfg's largest pages in random order."""
    points: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if row["case"] == "decode":
            points[row["threads"], row["shape"], row["batch"], row["context"]].append(row)
    size = max((row["page_size"] for row in rows if row["case"] == "decode"), default=0)
    ours = dict.fromkeys(
        row["format"] for same in points.values() for row in same if row["side"] == "kvcfg" and row["page_size"] == size
    )
    head = ["decode, ms", "threads", "GB/s read", "vLLM bf16", "vLLM fp8", "torch float32"]
    body = []
    for (threads, shape, batch, context), same in points.items():
        cells = [f"{shape}, {batch} × {context:,}", threads, f"{max(row['read_gb_per_s'] for row in same):.1f}"]
        for side, name in (("vllm", "bf16"), ("vllm", "fp8"), ("torch", "float32")):
            cells.append(min((r["wall_ms"] for r in same if (r["side"], r["format"]) == (side, name)), default=""))
        for name in ours:
            (row,) = [
                row
                for row in same
                if (row["side"], row["format"], row["page_size"], row["order"]) == ("kvcfg", name, size, "random")
            ]
            cells.append(f"{row['wall_ms']} ({row['gb_per_s'] / row['read_gb_per_s']:.0%}) {_times(row['speedup'])}")
        body.append(cells)
    return table([*head, *(f"kvcfg {name}, page {size}" for name in ours)], body)


def _append(rows: list[Row]) -> str:
    body = []
    for same in _by_labels(rows, "append", ("threads", "shape", "batch", "tokens")):
        fp8 = min((row["wall_ms"] for row in same if (row["side"], row["format"]) == ("vllm", "fp8")), default=None)
        for row in same:
            what = f"{row['tokens']:,} tokens" if row["batch"] == 1 else f"{row['batch']} sequences"
            body.append(
                [
                    f"{what}, {row['shape']}",
                    row["threads"],
                    f"{row['side']} {row['format']} page {row['page_size']}",
                    f"{row['wall_ms'] * 1e3:.1f}",
                    _times(row["speedup"]),
                    _times(fp8 and fp8 / row["wall_ms"]),
                ]
            )
    return table(["append", "threads", "kernel", "µs", "× vLLM's best bf16", "× vLLM's best fp8"], body)


def _prefill(rows: list[Row]) -> str:
    body = []
    for same in _by_labels(rows, "prefill", ("threads", "shape", "past", "tokens")):
        for row in same:
            over = f" over {row['past']:,} cached" if row["past"] else ""
            page = "" if row["page_size"] is None else f" page {row['page_size']}"
            body.append(
                [
                    f"{row['tokens']:,} tokens{over}, {row['shape']}",
                    row["threads"],
                    f"{row['side']} {row['format']}{page}",
                    f"{row['wall_ms']:.1f}",
                    _times(row["speedup"] and 1 / row["speedup"]),
                ]
            )
    return table(["prefill attention", "threads", "kernel", "ms", "time over vLLM's best bf16"], body)


def _by_labels(rows: list[Row], case: str, labels: tuple[str, ...]) -> Iterable[list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if row["case"] == case:
            groups[tuple(row[label] for label in labels)].append(row)
    return groups.values()
