"""Measures on one number of threads, in a process of its own; `run.py` starts it and reads what it wrote."""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from checks import Check
    from rounds import Variant
    from torch import Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", type=json.loads, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    task = options.task
    # Before torch makes threads: they keep to these cores.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-task["threads"] :])
    options.out.write_text(json.dumps(_measured(task)))


def _measured(task: dict[str, Any]) -> dict[str, Any]:
    import side_vllm
    import torch

    torch.set_num_threads(task["threads"])
    with_vllm = task["vllm"] and side_vllm.installed_version() is not None
    found = [item._asdict() | {"holds": item.holds} for item in _checks(task, with_vllm)]
    rows = [] if task["check_only"] or not all(item["holds"] for item in found) else _rows(task, with_vllm)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"threads": task["threads"], "checks": found, "rows": rows, "peak_gib": round(peak, 2)}


def _checks(task: dict[str, Any], with_vllm: bool) -> list[Check]:
    import append
    import decode
    import prefill
    from shapes import Shape

    found, formats, page_sizes = list[Any](), task["formats"], task["page_sizes"]
    for shape in (Shape(*item) for item in task["shapes"]):
        print(f"checking {shape}", file=sys.stderr)
        if "decode" in task["cases"]:
            found += decode.checks(shape, formats, page_sizes, with_vllm)
        if "append" in task["cases"]:
            found += append.checks(shape, page_sizes)
        if "prefill" in task["cases"]:
            found += prefill.checks(shape, formats, page_sizes, with_vllm)
    return found


def _rows(task: dict[str, Any], with_vllm: bool) -> list[dict[str, Any]]:
    import append
    import decode
    import prefill
    from shapes import WIDE, Point, Shape

    rows, formats, page_sizes = list[dict[str, Any]](), task["formats"], task["page_sizes"]

    def timed(labels: dict[str, Any], variants: list[Variant], memory: Tensor | None) -> list[dict[str, Any]]:
        return _timed({"threads": task["threads"], **labels}, variants, memory, task["rounds"])

    for shape in (Shape(*item) for item in task["shapes"]):
        if "decode" in task["cases"]:
            points = [Point(*item) for item in task["points"]]
            rows += decode.measure(shape, points, formats, page_sizes, with_vllm, timed)
        if shape == WIDE:  # the same KV heads as LARGE
            continue
        if "append" in task["cases"]:
            rows += append.measure(shape, page_sizes, with_vllm, timed)
        if "prefill" in task["cases"]:
            rows += prefill.measure(shape, formats, page_sizes, with_vllm, timed)
    return rows


def _timed(labels: dict[str, Any], variants: list[Variant], memory: Tensor | None, rounds: int) -> list[dict[str, Any]]:
    """Rows of one point: what each variant took, and against the best of vLLM's bf16 in the same rounds."""
    from bandwidth import readers
    from rounds import measure

    reading = [] if memory is None else readers(memory, labels["threads"])
    measure([*variants, *reading], rounds)
    print(" ".join(f"{key}={value}" for key, value in labels.items()), file=sys.stderr)
    bandwidth = max((item.gb_per_s for item in reading), default=None)
    rivals = [item for item in variants if (item.side, item.format) == ("vllm", "bf16")]
    best = {clock: min((getattr(item, clock) for item in rivals), default=None) for clock in ("wall", "cpu")}
    return [
        {
            **labels,
            "side": item.side,
            "format": item.format,
            "page_size": item.page_size,
            "order": item.order,
            "wall_ms": _digits(item.wall * 1e3),
            "cpu_ms": _digits(item.cpu * 1e3),
            "nbytes": item.nbytes,
            "gb_per_s": _digits(item.gb_per_s),
            "read_gb_per_s": _digits(bandwidth),
            "speedup": _digits(best["wall"] and best["wall"] / item.wall),
            "cpu_speedup": _digits(best["cpu"] and best["cpu"] / item.cpu),
            "all_wall_ms": [_digits(value * 1e3) for value in item.wall_s],
        }
        for item in variants
    ]


def _digits(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


if __name__ == "__main__":
    main()
