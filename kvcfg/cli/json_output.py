"""What `output=json` prints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from kvcfg.cli.arguments import Arguments


def print_json(arguments: Arguments, rows: Sequence[Any]) -> None:
    """One line: the rows of a sweep as a list, or that of the only point."""
    print(json.dumps(rows if arguments.is_sweep else rows[0]))
