"""A file of result rows, one JSON object a line, safe to append to from several processes."""

from __future__ import annotations

import os
from pathlib import Path

from kvcfg.results.row import ResultRow


class ResultStore:
    """Rows in a JSONL file. Rows are only ever added; of two with one fingerprint the later one counts."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def rows(self) -> dict[str, ResultRow]:
        """All rows by fingerprint, in the order in which they were first added.

        Raises:
            KvcfgError: if a line is no row; it names the line.
        """
        if not self.path.exists():
            return {}
        lines = self.path.read_text(encoding="utf-8").splitlines()
        rows = [
            ResultRow.from_json(line, f"{self.path}:{number}") for number, line in enumerate(lines, 1) if line.strip()
        ]
        return {row.fingerprint: row for row in rows}

    def find(self, fingerprint: str) -> ResultRow | None:
        """The row with that fingerprint, if there is one."""
        return self.rows().get(fingerprint)

    def append(self, row: ResultRow) -> None:
        """Add a row, in one write, so that lines of several processes never mix."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = (row.to_json() + "\n").encode()
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(handle, line)
        finally:
            os.close(handle)
