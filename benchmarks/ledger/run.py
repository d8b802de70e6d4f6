"""kvcfg's ledger beside vLLM's and MAX's: `python benchmarks/ledger/run.py` after `setup.sh`; see README.md.

Every side works in an interpreter of its own, all on one core, and one at a time. A round measures each of them
once under each hash and page size; rounds are repeated and medians compared. Unless every manager finds the same
tokens in its prefix cache, no figures are given.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from workload import HIT_TOKENS

HERE = Path(__file__).resolve().parent
PAGE_SIZES = (16, 128)
POOLS = (1_000, 100_000, 1_000_000)


class Entry(NamedTuple):
    """One manager: the side it belongs to, its name there, its collision-resistant and its fast hash."""

    side: str
    manager: str
    hashes: tuple[str, str]


ENTRIES = (
    Entry("kvcfg", "PageLedger", ("sha256", "xxh3_128")),
    Entry("vllm", "KVCacheManager", ("sha256", "xxhash")),
    Entry("max", "BlockManager", ("sha256", "ahash64")),
    Entry("kvcfg", "PageLedger, lists", ("sha256", "xxh3_128")),
    Entry("max", "JengaBlockManager", ("sha256", "ahash64")),
)
GOALS = {("sha256", 16): 1.5, ("sha256", 128): 1.5, ("fast", 16): 3.0, ("fast", 128): 2.0}
DECODE_GOAL = 10.0


@dataclass
class Side:
    """An interpreter that measures on request."""

    name: str
    process: subprocess.Popen[str]
    versions: dict[str, str]

    @classmethod
    def start(cls, name: str, python: Path) -> Side:
        environment = {
            **os.environ,
            "PYTHONPATH": str(HERE.parent.parent),
            "OMP_NUM_THREADS": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
        }
        pipe = subprocess.PIPE
        command = [str(python), str(HERE / f"side_{name}.py")]
        process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True, bufsize=1)
        return cls(name, process, read(process))

    def ask(self, **question: Any) -> dict[str, float]:
        assert self.process.stdin is not None
        print(json.dumps(question), file=self.process.stdin, flush=True)
        return read(self.process)


def read(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        sys.exit(f"{process.args[1]} ended with {process.wait()}; what it said is above")
    reply: dict[str, Any] = json.loads(line)
    return reply


def measure(sides: dict[str, Side], rounds: int) -> list[dict[str, Any]]:
    """All rows: per manager, hash and page size the median of the rounds, and the values."""
    rows: dict[tuple[Entry, int, int], list[dict[str, float]]] = {}
    for number in range(rounds):
        for page_size in PAGE_SIZES:
            for kind in range(2):
                for entry in ENTRIES:
                    figures = sides[entry.side].ask(
                        manager=entry.manager, algorithm=entry.hashes[kind], page_size=page_size
                    )
                    rows.setdefault((entry, kind, page_size), []).append(figures)
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    return [
        {
            "side": entry.side,
            "manager": entry.manager,
            "hash": entry.hashes[kind],
            "kind": ("sha256", "fast")[kind],
            "page_size": page_size,
            "hit_tokens": int(found[0]["hit_tokens"]),
            "requests_per_s": round(median(item["requests_per_s"] for item in found)),
            "decode_us": round(median(item["decode_us"] for item in found), 3),
            "all_requests_per_s": [round(item["requests_per_s"]) for item in found],
            "all_decode_us": [round(item["decode_us"], 3) for item in found],
        }
        for (entry, kind, page_size), found in rows.items()
    ]


def measure_pools(sides: dict[str, Side], rounds: int) -> list[dict[str, Any]]:
    """What a request costs by the size of the pool, under sha256."""
    rows = []
    for entry in ENTRIES:
        if entry.manager != "PageLedger, lists":
            row: dict[str, Any] = {"side": entry.side, "manager": entry.manager, "us_per_request": {}}
            for num_pages in POOLS:
                question = {"manager": entry.manager, "algorithm": "sha256", "num_pages": num_pages}
                costs = [sides[entry.side].ask(**question)["us_per_request"] for _ in range(rounds)]
                row["us_per_request"][num_pages] = round(median(costs), 1)
            rows.append(row)
    return rows


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """PageLedger against the best of the others in the same rounds, with the goals."""
    found = []
    for (kind, page_size), goal in GOALS.items():
        alike = [row for row in rows if (row["kind"], row["page_size"]) == (kind, page_size)]
        (ours,) = [row for row in alike if row["manager"] == "PageLedger"]
        # Under a fast hash the best of all counts, whatever it hashes with.
        others = [row for row in rows if row["side"] != "kvcfg" and row["page_size"] == page_size]
        others = others if kind == "fast" else [row for row in others if row["kind"] == kind]
        best = max(others, key=lambda row: row["requests_per_s"])
        quickest = min(others, key=lambda row: row["decode_us"])
        found += [
            {
                "what": f"requests/s, {kind}, page {page_size}",
                "ours": ours["requests_per_s"],
                "best": best["requests_per_s"],
                "of": f"{best['manager']} {best['hash']}",
                "ratio": round(ours["requests_per_s"] / best["requests_per_s"], 2),
                "goal": goal,
            },
            {
                "what": f"decode us, {kind}, page {page_size}",
                "ours": ours["decode_us"],
                "best": quickest["decode_us"],
                "of": f"{quickest['manager']} {quickest['hash']}",
                "ratio": round(quickest["decode_us"] / ours["decode_us"], 2),
                "goal": DECODE_GOAL,
            },
        ]
    return found


def table(lines: list[list[Any]]) -> str:
    """Lines of cells as a Markdown table, the first line its head."""
    head, *body = [[str(cell) for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body))


def report(result: dict[str, Any]) -> str:
    """All tables."""
    rows, pools = result["rows"], result["pools"]
    speeds = [["manager", "hash", "page", "requests/s", "decode µs per sequence and step"]]
    speeds += [
        [row["manager"], row["hash"], row["page_size"], f"{row['requests_per_s']:,}", row["decode_us"]] for row in rows
    ]
    against = [["", "kvcfg", "best peer", "which", "ratio", "goal"]]
    against += [
        [item["what"], item["ours"], item["best"], item["of"], item["ratio"], item["goal"]] for item in result["ratios"]
    ]
    sizes = [["µs per request, by pages", *[f"{num_pages:,}" for num_pages in POOLS]]]
    sizes += [[row["manager"], *row["us_per_request"].values()] for row in pools]
    parts = [table(against), table(speeds)] + ([table(sizes)] if pools else [])
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, default=Path(".peers"), help="the folder that setup.sh filled")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pool-rounds", type=int, default=3, help="0 leaves the pool sizes out")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    options = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    pythons = {name: options.peers / name / "bin" / "python" for name in ("vllm", "max")}
    sides = {name: Side.start(name, python) for name, python in {"kvcfg": Path(sys.executable), **pythons}.items()}
    rows = measure(sides, options.rounds)
    if wrong := [row for row in rows if row["hit_tokens"] != HIT_TOKENS]:
        sys.exit(f"{HIT_TOKENS} tokens of the prompts are shared, but these found others: {wrong}")
    result = {
        "date": datetime.date.today().isoformat(),
        "cpu": next(
            (line.split(": ")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ""
        ),
        "python": platform.python_version(),
        "versions": {name: version for side in sides.values() for name, version in side.versions.items()},
        "rounds": options.rounds,
        "ratios": ratios(rows),
        "pools": measure_pools(sides, options.pool_rounds) if options.pool_rounds else [],
        "rows": rows,
    }
    print(report(result))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
