"""`quantization=auto`: the formats of each layer, keys and values apart, that lose least for their bytes.

Every side of every layer is probed by itself (`allocation_probes.py`), the best formats for all together are worked
out (`planning/allocation.py`), and what they lose is measured on the windows of the workload. The probes read the
window after those, so that nothing is judged on what it was found on.

Costs of many sides in few bits add up to somewhat less or more than they do together; a few runs with all of them say
by which factor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from torch import Tensor

from kvcfg.config.experiment import ExperimentConfig
from kvcfg.errors import CapacityError, ConfigError, GateError, Problem
from kvcfg.evaluation.allocation_probes import PROBE_FORMAT, Prober, squared_errors, without_budget
from kvcfg.evaluation.measure import evaluate, evaluating
from kvcfg.evaluation.progress import progress_bar
from kvcfg.evaluation.text import text_windows
from kvcfg.integrations.loading import load, load_tokenizer
from kvcfg.planning.allocation import Allocation, FormatCost, best_allocations, fewest_bytes, least_kl
from kvcfg.planning.layer_formats import (
    FOUND_FORMATS,
    Side,
    bytes_for_sides,
    open_sides,
    side_bytes,
    starting_point,
    with_formats,
)
from kvcfg.results.row import ResultRow
from kvcfg.units import readable_bytes

_CORRECTIONS = 3
"""Runs with all sides in the formats that were found, to correct the sum of what they cost alone by."""

_LEAST_FACTOR = 0.1

Sizes = Mapping[str, Mapping[Side, int]]


@dataclass(frozen=True, slots=True)
class FoundFormats:
    """The formats that were found, and what they lose.

    Attributes:
        experiment: what was asked, with the formats in the place of `auto`.
        formats: the format of every side that was open.
        kl_predicted: mean KL on the window that the probes read, in nats.
        found_from: where in the text the window begins that the probes read, in tokens.
        row: what was measured, on the windows of the workload.
    """

    experiment: ExperimentConfig
    formats: Mapping[Side, str]
    kl_predicted: float
    found_from: int
    row: ResultRow

    @property
    def overrides(self) -> tuple[str, ...]:
        """What to write in the place of `quantization=auto`."""
        from kvcfg.evaluation.allocation_text import recipe_overrides

        return recipe_overrides(self.experiment)

    def to_dict(self) -> dict[str, Any]:
        """The answer as plain values that JSON can hold."""
        return {
            "recipe": list(self.overrides),
            "kl_predicted": self.kl_predicted,
            "kl": self.row.kl,
            "kl_ci": list(self.row.kl_ci),
            "bits_per_element": self.row.bits_per_element,
            "bytes_per_token": self.row.bytes_per_token_planned,
            "found_from": self.found_from,
            "formats": [
                {"layer": side.layer, "side": side.what, "format": name} for side, name in self.formats.items()
            ],
        }

    def table(self) -> str:
        """The answer as text for people."""
        from kvcfg.evaluation.allocation_text import found_text

        return found_text(self)


def find_formats(experiment: ExperimentConfig, model: Any = None, *, max_kl: float | None = None) -> FoundFormats:
    """Find the formats of each layer that take least bytes for a KL, or lose least in a budget of bytes.

    Args:
        experiment: what was asked, with `quantization=auto`. The workload names the text, and with
            `cache.kv_cache_memory_bytes` the sequences that must fit.
        model: a causal language model of transformers; None loads the experiment's own.
        max_kl: largest mean KL that the formats may be predicted to lose; None = the least that fits.

    Raises:
        ConfigError: if neither a KL nor a budget is given, no layer is open to choice, or the text is too short.
        CapacityError: if not even the smallest formats fit in the budget.
        GateError: if not even the largest formats keep to `max_kl`, or those that do exceed the budget.
    """
    if max_kl is None and experiment.cache.kv_cache_memory_bytes is None:
        rule = "must be given for quantization=auto, or cache.kv_cache_memory_bytes with the workload that must fit"
        raise ConfigError(Problem("gate.max_kl", rule, None, "gate.max_kl=0.005"))
    start = starting_point(experiment)
    sides = open_sides(start)
    sizes = {name: side_bytes(start, sides, name) for name in FOUND_FORMATS}
    room = bytes_for_sides(start, sides)
    _check_room(sizes, room)
    if model is None:
        model = load(start).model
    window, found_from = _probe_window(start)
    title = f"probing {len(sides)} sides of {start.model.name} on {len(window):,} tokens"
    with evaluating(model), progress_bar(title, len(sides) + 1 + _CORRECTIONS) as run_done:
        prober = Prober(model, window, run_done)
        finest = prober.kl(with_formats(start, dict.fromkeys(sides, FOUND_FORMATS[-1])))
        best = best_allocations(_costs(sides, sizes, prober.kl_of_sides(start, sides), squared_errors(start)))
        factor = 1.0
        for _ in range(_CORRECTIONS):
            tried = _choice(best, finest, factor, max_kl, room)
            lost = prober.kl(with_formats(start, _formats(sides, tried))) - finest
            factor = max(lost / tried.kl, _LEAST_FACTOR) if tried.kl else factor
    chosen = _choice(best, finest, factor, max_kl, room)
    found = with_formats(start, _formats(sides, chosen))
    row = evaluate(without_budget(found), model, overrides=())
    return FoundFormats(found, _formats(sides, chosen), finest + factor * chosen.kl, found_from, row)


def _probe_window(start: ExperimentConfig) -> tuple[Tensor, int]:
    """The window after those of the workload, and where it begins."""
    workload = start.workload
    after = workload.num_windows + 1
    windows = text_windows(workload.model_copy(update={"num_windows": after}), load_tokenizer(start))
    return windows[-1], workload.first_token + workload.num_windows * workload.window_tokens


def _costs(
    sides: Sequence[Side], sizes: Sizes, probed: Mapping[Side, float], errors: Mapping[str, float]
) -> list[list[FormatCost]]:
    """What each format costs each side, beyond what it costs in the finest one."""
    least = errors[FOUND_FORMATS[-1]]
    return [
        [
            FormatCost(sizes[name][side], probed[side] * max(0.0, errors[name] - least) / errors[PROBE_FORMAT])
            for name in FOUND_FORMATS
        ]
        for side in sides
    ]


def _formats(sides: Sequence[Side], chosen: Allocation) -> dict[Side, str]:
    return {side: FOUND_FORMATS[choice] for side, choice in zip(sides, chosen.chosen, strict=True)}


def _choice(best: Sequence[Allocation], finest: float, factor: float, max_kl: float | None, room: float) -> Allocation:
    """The allocation that is asked for, where KL is that of the finest formats and `factor` times what is added."""
    room_bytes = best[-1].num_bytes if room == inf else int(room)
    if max_kl is None:
        found = least_kl(best, room_bytes)
        assert found is not None, "_check_room saw to it"
        return found
    found = fewest_bytes(best, (max_kl - finest) / factor)
    if found is None:
        raise GateError(
            f"with all layers in {FOUND_FORMATS[-1]} KL is {finest:.3g} already, above gate.max_kl={max_kl:g}. "
            f"Try: gate.max_kl={2 * finest:.2g}"
        )
    if found.num_bytes > room_bytes:
        fitting = least_kl(best, room_bytes)
        assert fitting is not None, "_check_room saw to it"
        raise GateError(
            f"no formats keep to gate.max_kl={max_kl:g} in the memory given; the least KL there is predicted to be "
            f"{finest + factor * fitting.kl:.3g}. Try: gate.max_kl=null"
        )
    return found


def _check_room(sizes: Sizes, room: float) -> None:
    least = sum(sizes[FOUND_FORMATS[0]].values())
    if least > room:
        raise CapacityError(
            f"with all layers in {FOUND_FORMATS[0]} a page takes {readable_bytes(least)}, and there is room for pages "
            f"of {readable_bytes(max(0, int(room)))}. Try: fewer or shorter sequences (workload.max_batch_size, "
            "workload.max_seq_len), or a larger cache.kv_cache_memory_bytes"
        )
