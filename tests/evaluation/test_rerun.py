"""A row measured again: what repeats, what does not, and what else has changed."""

from __future__ import annotations

from dataclasses import replace

from kvcfg.evaluation.rerun import Rerun, rerun
from tests.evaluation.test_sides import INT8, row_of

ROW = row_of(INT8, "a" * 64)


def test_same_figures_repeat_whatever_the_speed() -> None:
    made = Rerun(ROW, replace(ROW, decode_tokens_per_s=99.0), ())
    assert made.repeats and "Every figure repeats." in made.table()


def test_other_kl_does_not_repeat() -> None:
    made = Rerun(ROW, replace(ROW, kl=1.1e-3), ())
    assert not made.repeats
    assert [figure.name for figure in made.figures if figure.repeats is False] == ["kl"]


def test_config_of_the_row_is_run_and_what_changed_is_told(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    asked = []

    def evaluate(experiment, overrides):  # type: ignore[no-untyped-def]
        asked.append(experiment)
        return replace(ROW, versions={"kvcfg": "1"}, fingerprint="b" * 64, device="gpu")

    monkeypatch.setattr("kvcfg.evaluation.rerun.evaluate", evaluate)
    made = rerun(replace(ROW, overrides=(*INT8, "cache.kv_cache_page_size=64")))
    assert asked[0].cache.kv_cache_page_size == 128
    text = " ".join(made.notes)
    assert "a preset has changed" in text and "kvcfg was 0, and is 1" in text and "now on gpu" in text
