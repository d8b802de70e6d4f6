"""What the scripts here take alike on the command line, and what follows from it before anything is measured."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch


def parsed(parser: argparse.ArgumentParser, *, pages: list[int], results: str) -> argparse.Namespace:
    """The options of a script; its peers can be imported then, unless it only prints what there is.

    Args:
        parser: knows what the script alone takes.
        pages: page sizes unless given.
        results: the JSONL file unless given.
    """
    parser.add_argument("--pages", nargs="+", type=int, default=pages, help="page sizes")
    parser.add_argument("--recipes", nargs="+", help="names of candidates, peers too; all of them unless given")
    parser.add_argument("--books", type=Path, help="folder with the books as their packages have them")
    parser.add_argument("--peers", type=Path, default=Path(".peers/quality"), help="the folder that setup.sh filled")
    parser.add_argument("--results", type=Path, default=Path(results), help="a JSONL file to add to")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--markdown", action="store_true", help="measure nothing, print the tables of what there is")
    options = parser.parse_args()
    if not options.markdown:
        # Before transformers is imported, which looks for its backends then.
        sys.path.append(str(options.peers.resolve()))
        if options.threads:
            torch.set_num_threads(options.threads)
    return options
