"""Every export of a few configs, word for word. KVCFG_WRITE_GOLDENS=1 writes them anew: read the diff then."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from kvcfg.composition import compose
from kvcfg.exporters import export_all
from kvcfg.exporters.engines import as_dicts
from kvcfg.exporters.engines_text import engines_table
from tests.exporters.cases import CASES

GOLDENS = Path(__file__).parent / "goldens"


@pytest.mark.parametrize("case", CASES)
def test_exports_are_the_goldens(case: str) -> None:
    made = export_all(compose(CASES[case]))
    found = json.loads(json.dumps(as_dicts(made)))
    path = GOLDENS / f"{case}.json"
    if os.environ.get("KVCFG_WRITE_GOLDENS"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    assert found == json.loads(path.read_text(encoding="utf-8"))


def test_table_of_all_engines_is_the_golden() -> None:
    text = engines_table(export_all(compose(CASES["reference"]))) + "\n"
    path = GOLDENS / "reference.txt"
    if os.environ.get("KVCFG_WRITE_GOLDENS"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")
