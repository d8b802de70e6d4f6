"""Ask kvcfg what MAX was asked: `python tests/oracle/replay.py FILE.jsonl.gz …`

Prints a line per kind and exits 1 if kvcfg answers anything differently that `differences.py` does not
explain. Of those it does, `better` mends a fault of MAX, and `other scope` is a field, name or layout that
only one side has.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))  # the kvcfg of this checkout

import traces
from answers import RAISED, REFUSALS, same_cpus
from conditions import MISSING, Difference
from differences import explain
from engine_answers import answer
from pydantic import ValidationError

from kvcfg.errors import ConfigError

SHOWN = 20


class Verdict(NamedTuple):
    """What became of a record: its column, how many values agree, and the differences that nothing explains."""

    name: str
    same_values: int = 0
    unexplained: tuple[Difference, ...] = ()


def main(files: list[str]) -> int:
    """Replay record files and print the counts; 1 if anything is different, 2 without files."""
    if not files:
        print(__doc__, file=sys.stderr)
        return 2
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    unexplained: list[Difference] = []
    same_values = 0
    for record in read(files):
        verdict = judge(record)
        counts[record["kind"]][verdict.name] += 1
        same_values += verdict.same_values
        unexplained += verdict.unexplained
    print(table(counts))
    print(f"{same_values} single values are the same, {len(unexplained)} are different and unexplained")
    for difference in unexplained[:SHOWN]:
        print(difference)
    if len(unexplained) > SHOWN:
        print(f"... and {len(unexplained) - SHOWN} more")
    return 1 if unexplained else 0


def read(files: list[str]) -> Iterator[dict[str, Any]]:
    """The records of these files, one JSON object a line."""
    for file in files:
        raw = Path(file).read_bytes()
        text = gzip.decompress(raw) if file.endswith(".gz") else raw
        yield from map(json.loads, text.splitlines())


def judge(record: Mapping[str, Any]) -> Verdict:
    """Ask kvcfg the record's question and compare."""
    if record["kind"] == "manager_trace":
        return Verdict(*traces.replay(record))
    same_values = 0
    try:
        ours = answer(record)
    except REFUSALS as error:
        if not record["ok"]:
            return Verdict("both refuse")
        found = [Difference(record, key, "accepted", value) for key, value in refused(error)]
    else:
        if ours is None:
            return Verdict("not built yet")
        found, same_values = compare(record, ours)
    if not found:
        return Verdict("same", same_values)
    reasons = [explain(item) for item in found]
    if unexplained := tuple(item for item, reason in zip(found, reasons, strict=True) if reason is None):
        return Verdict("different", same_values, unexplained)
    named = sorted({reason for reason in reasons if reason}, key=in_order)
    column = "better" if named[0].isdigit() else "other scope"
    return Verdict(f"{column}: {', '.join(named)}", same_values)


def refused(error: Exception) -> Iterator[tuple[str, Any]]:
    """What kvcfg refused: `refused.KEY` or `unknown.KEY`, with the value."""
    if isinstance(error, ConfigError):
        yield from ((f"refused.{problem.key}", problem.value) for problem in error.problems)
    elif isinstance(error, ValidationError):
        for item in error.errors():
            place = [str(part) for part in item["loc"]]
            if item["type"] != "kvcfg":
                verb = "unknown" if item["type"] == "extra_forbidden" else "refused"
                yield ".".join([verb, *place]), item["input"]
                continue
            for problem in item["ctx"]["problems"]:
                is_field = bool(place) and problem.key.split(".")[0] == place[-1]
                yield ".".join(["refused", *(place[:-1] if is_field else place), problem.key]), problem.value
    else:
        yield "refused.capacity", str(error)


def compare(record: Mapping[str, Any], ours: dict[str, Any]) -> tuple[list[Difference], int]:
    """Where kvcfg's answer is not the record's, and in how many values it is."""
    if not record["ok"]:
        return [Difference(record, "accepted", record["error"], ours)], 0
    raised = dict.fromkeys(record.get("output_errors", {}), RAISED)
    theirs = dict(leaves(same_cpus({**record["outputs"], **raised})))
    right = dict(leaves(ours))
    differing = {path: value for path, value in theirs.items() if right.get(path, MISSING) != value}
    found = [Difference(record, path, value, right.get(path, MISSING)) for path, value in differing.items()]
    return found, len(theirs) - len(found)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a nested dict under its dotted path; lists of plain values stay whole."""
    if isinstance(value, dict) and value:
        items: Any = value.items()
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        items = enumerate(value)
    else:
        yield path, value
        return
    for key, item in items:
        yield from leaves(item, f"{path}.{key}" if path else str(key))


def in_order(reason: str) -> tuple[int, str]:
    """Fault numbers first, by number; then scopes by name."""
    return (int(reason), "") if reason.isdigit() else (1000, reason)


def table(counts: Mapping[str, Counter[str]]) -> str:
    """Counts by kind; below each, the reasons of what is better or of another scope."""
    columns = ("same", "both refuse", "better", "other scope", "different", "not built yet")
    lines = [f"{'kind':22}" + "".join(f"{name:>15}" for name in columns)]
    total: Counter[str] = Counter()
    for kind, verdicts in sorted(counts.items()):
        row: Counter[str] = Counter()
        for verdict, count in verdicts.items():
            row[verdict.split(":")[0]] += count
        total += row
        lines.append(f"{kind:22}" + "".join(f"{row[name] or '-':>15}" for name in columns))
        lines += [f"    {count:6} {verdict}" for verdict, count in sorted(verdicts.items()) if ":" in verdict]
    lines.append(f"{'all':22}" + "".join(f"{total[name] or '-':>15}" for name in columns))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
