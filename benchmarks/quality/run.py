"""Every recipe of kvcfg and every peer on the same windows: `python benchmarks/quality/run.py`; see README.md.

First it is checked that a float32 cache loses nothing; unless it does so there are no figures. Each window is run
through the model once in full precision and once with every candidate. Figures are added to a JSONL file window by
window, and a later run goes on where one ended. Then the table is printed and the picture drawn.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from books import prepared_books
from measuring import Task, measure_all
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
    parser.add_argument("--pages", nargs="+", type=int, default=[64, 128], help="page sizes")
    parser.add_argument("--recipes", nargs="+", help="names of candidates, peers too; all of them unless given")
    parser.add_argument("--books", type=Path, help="folder with the books as their packages have them")
    parser.add_argument("--peers", type=Path, default=Path(".peers/quality"), help="the folder that setup.sh filled")
    parser.add_argument("--results", type=Path, default=Path("results/quality.jsonl"), help="a JSONL file to add to")
    parser.add_argument("--plot", type=Path, help="the picture to draw; beside the results unless given")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--markdown", action="store_true", help="measure nothing, print the table of what there is")
    options = parser.parse_args()
    store = PartStore(options.results)
    if not options.markdown:
        # Before transformers is imported, which looks for its backends then.
        sys.path.append(str(options.peers.resolve()))
        if options.threads:
            torch.set_num_threads(options.threads)
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
