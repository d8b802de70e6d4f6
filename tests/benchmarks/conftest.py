"""The scripts of a benchmark import each other by bare names, as scripts do."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="session")
def quality() -> Iterator[Callable[[str], ModuleType]]:
    """Imports a script of benchmarks/quality."""
    folder = BENCHMARKS / "quality"
    sys.path.insert(0, str(folder))
    yield importlib.import_module
    sys.path.remove(str(folder))
    for script in folder.glob("*.py"):
        sys.modules.pop(script.stem, None)
