"""A progress bar on stderr, where somebody is watching."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def progress_bar(title: str, num_steps: int) -> Iterator[Callable[[], None]]:
    """Show how many of `num_steps` are done; the yielded function counts one more.

    The bar is drawn on terminals only; elsewhere a single line says what runs.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(title, highlight=False, markup=False)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=num_steps)
        yield lambda: bar.advance(task)
