"""Files that pictures are written to."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from kvcfg.errors import BackendUnavailable, ConfigError, KvcfgError, Problem

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")


def check_plot(path: str) -> None:
    """Refuse a plot that could not be drawn, before anything is computed for it.

    Raises:
        ConfigError: if the name is not one of a picture.
        BackendUnavailable: if matplotlib is not installed.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        fix = f"plot={Path(path).stem or 'plot'}.png"
        raise ConfigError(Problem("plot", f"must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}", path, fix))
    if find_spec("matplotlib") is None:
        raise BackendUnavailable(f"plot={path} needs matplotlib: pip install kvcfg[plot]. Try: plot=null")


def save_plot(figure: Figure, path: str) -> None:
    """Write a picture; the suffix says which kind.

    Raises:
        KvcfgError: if the file cannot be written.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160)
    except OSError as error:
        raise KvcfgError(f"plot={path} cannot be written: {error.strerror}") from error
