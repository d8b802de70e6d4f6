"""Every recipe of kvcfg and every peer on the same windows: `python benchmarks/quality/run.py`; see README.md.

First it is checked that a float32 cache loses nothing; unless it does so there are no figures. Each window is run
through the model once in full precision and once with every candidate. Figures are added to a JSONL file window by
window, and a later run goes on where one ended. Then the table is printed and the picture drawn.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from books import prepared_books
from measuring import Task, measure_all
from options import parsed
from parts import PartStore
from plot import draw
from rows import rows_of
from table import markdown

from kvcfg.errors import BackendUnavailable


def main() -> None:
    """Measure what is missing, print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2-135m", "smollm2-135m-outlier"])
    parser.add_argument("--windows", type=int, default=16, help="of each book")
    parser.add_argument("--window-tokens", type=int, default=1024)
    parser.add_argument("--plot", type=Path, help="the picture to draw; beside the results unless given")
    options = parsed(parser, pages=[64, 128], results="results/quality.jsonl")
    store = PartStore(options.results)
    if not options.markdown:
        books = prepared_books(options.books)
        for model in options.models:
            measure_all(
                Task(model, options.pages, options.recipes, options.windows, options.window_tokens), books, store
            )
    rows, failures = rows_of(store.parts(), options.window_tokens)
    print(markdown(rows, failures))
    if rows and not options.markdown:
        try:
            draw(rows, options.plot or options.results.with_suffix(".png"), options.pages[0])
        except BackendUnavailable as error:
            print(error, file=sys.stderr)


if __name__ == "__main__":
    main()
