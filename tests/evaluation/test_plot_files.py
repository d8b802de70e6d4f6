"""When a picture is refused."""

from __future__ import annotations

import pytest

import kvcfg
from kvcfg.evaluation import plot_files
from kvcfg.evaluation.plot_files import check_plot


@pytest.mark.parametrize("path", ["a", "a.txt", "a.png.gz"])
def test_other_kinds_of_file_are_refused(path: str) -> None:
    with pytest.raises(kvcfg.ConfigError, match=r"must end in \.png, \.svg or \.pdf. Try: plot=.*\.png"):
        check_plot(path)


def test_missing_matplotlib_is_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot_files, "find_spec", lambda name: None)
    with pytest.raises(kvcfg.BackendUnavailable, match=r"pip install kvcfg\[plot\]"):
        check_plot("a.png")
