"""The protocol: one reference a window, every candidate against it, and nothing measured twice."""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from books import Window, windows_of
from candidates import Candidate, Paged, Running, experiment_of, full_precision_by_page, recipes
from parts import Figures, Part, PartStore
from peers import peers
from rows import FLOOR, YARDSTICK
from torch import Tensor

import kvcfg
from kvcfg.cache.namespace import model_identity
from kvcfg.config.experiment import ExperimentConfig
from kvcfg.config.recipes import balances_rope
from kvcfg.evaluation.quality import agreement, full_precision, logits, noise_floor
from kvcfg.integrations.loading import load_tokenizer

ROUNDING = 1e-9
"""KL that the arithmetic of float32 explains: what a model may lose when its RoPE pairs are balanced."""

FLOAT32 = "cache.kv_cache_format=float32"


class Task(NamedTuple):
    """What is to be measured of one model.

    Attributes:
        model: name of its preset.
        page_sizes: of kvcfg's caches, in tokens.
        names: candidates to measure, or None for all; the yardstick and the noise floor always are.
        num_windows: of each book.
        window_tokens: length of a window.
        batch_size: windows at a time.
    """

    model: str
    page_sizes: Sequence[int]
    names: Sequence[str] | None
    num_windows: int
    window_tokens: int
    batch_size: int = 1

    def experiment(self, *overrides: str, page_size: int | None = None) -> ExperimentConfig:
        """An experiment on this model whose cache holds one window."""
        return experiment_of(self.model, page_size or self.page_sizes[0], self.window_tokens, list(overrides))

    def candidates(self) -> list[Candidate]:
        """The candidates of this task; stops if a name is none of them."""
        known = [
            full_precision_by_page(self.model, self.window_tokens),
            *(
                item
                for size in self.page_sizes
                for item in recipes(self.model, size, self.window_tokens, self.batch_size)
            ),
            *peers(self.model, self.window_tokens),
        ]
        if self.names is None:
            return known
        names = list(dict.fromkeys(candidate.name for candidate in known))
        if unknown := [name for name in self.names if name not in names]:
            sys.exit(f"--recipes {' '.join(unknown)}: there are {', '.join(names)}")
        return [candidate for candidate in known if candidate.name in (FLOOR, YARDSTICK, *self.names)]

    def windows(self, books: dict[str, Path]) -> list[Window]:
        """Windows of all books in turn, so that a run that is cut off has some of each."""
        tokenizer = load_tokenizer(self.experiment())
        cut = [windows_of(name, path, tokenizer, self.num_windows, self.window_tokens) for name, path in books.items()]
        return [window for one_of_each in zip(*cut, strict=True) for window in one_of_each]


class LoadedModels:
    """A model as it was published, and with balanced RoPE pairs where recipes ask for that."""

    def __init__(self) -> None:
        self._loaded: dict[tuple[str, bool], Any] = {}

    def of(self, experiment: ExperimentConfig) -> Any:
        """The experiment's model; loaded on first use."""
        key = (experiment.model.name, balances_rope(experiment))
        if key not in self._loaded:
            model = kvcfg.load(experiment).model
            # The same attention over every cache, peers' too: differences are the caches' alone.
            model.set_attn_implementation("sdpa")
            self._loaded[key] = model
        return self._loaded[key]


@torch.no_grad()
def measure_all(task: Task, books: dict[str, Path], store: PartStore) -> None:
    """Measure what the file does not hold yet, window by window."""
    published, candidates, windows = task.experiment(FLOAT32), task.candidates(), task.windows(books)
    measured = store.measured()
    missing = [
        [candidate for candidate in candidates if _part(candidate, published, window, "").key not in measured]
        for window in windows
    ]
    if not any(missing):
        return
    models = LoadedModels()
    check(task, models, windows[0].tokens)
    ready: dict[Candidate, Running | None] = {}
    for number, (window, wanted) in enumerate(zip(windows, missing, strict=True), 1):
        begin = time.monotonic()
        wanted = [candidate for candidate in wanted if ready.get(candidate, candidate) is not None]
        reference = logits(models.of(published), window.tokens[None], full_precision)[0] if wanted else None
        for candidate in wanted:
            try:
                running = ready.get(candidate) or candidate.start(models)
                ready[candidate] = running
                outcome: Figures | str = measure(running, reference, window)
            except Exception as error:
                # Not tried on the windows that follow: it is left out of the table, not the others with it.
                ready[candidate] = None
                outcome = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            store.append(_part(candidate, published, window, outcome))
        seconds, peak = time.monotonic() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"{task.model}: window {number} of {len(windows)} ({window.text}), {len(wanted)} candidates in "
            f"{seconds:.0f} s, {peak:.1f} GiB at most",
            file=sys.stderr,
        )


def check(task: Task, models: LoadedModels, window: Tensor) -> None:
    """Stop unless float32 pages lose nothing, and balanced RoPE pairs no more than rounding."""
    published = models.of(task.experiment(FLOAT32))
    reference = logits(published, window[None], full_precision)[0]
    floor = noise_floor(published, window)
    limits = {f"float32 pages of {size}": (task.experiment(FLOAT32, page_size=size), floor) for size in task.page_sizes}
    balanced = task.experiment(FLOAT32, "quantization.balance_rope=true")
    limits["float32 pages, RoPE pairs balanced"] = (balanced, max(floor, ROUNDING))
    for name, (experiment, limit) in limits.items():
        cache = Paged(experiment, models.of(experiment))
        kl = agreement(reference, logits(cache.model, window[None], cache)[0], window).kl.mean().item()
        if not abs(kl) <= limit:
            sys.exit(f"{task.model}: {name} have a KL of {kl:.2e}; above {limit:.2e} it is no rounding: no figures")
        print(f"{task.model}: {name} have a KL of {kl:.1e}; the noise floor is {floor:.1e}", file=sys.stderr)


def measure(running: Running, reference: Tensor, window: Window) -> Figures:
    """One candidate on one window.

    Args:
        running: the candidate.
        reference: `[window_tokens, vocabulary]` logits in full precision.
        window: what was read.
    """
    read = agreement(reference, logits(running.model, window.tokens[None], running)[0], window.tokens)
    costs = running.costs()
    return Figures(
        kl=read.kl.float().numpy(),
        nll=read.nll.mean().item(),
        nll_reference=read.nll_reference.mean().item(),
        top1=read.same_top1.double().mean().item(),
        bits=costs.bits,
        bits_effective=costs.bits_effective,
        clip_rate=costs.clip_rate,
        note=costs.note,
    )


def identity(candidate: Candidate, experiment: ExperimentConfig) -> str:
    """Digest of all that decides a candidate's figures besides the text."""
    decides = {"candidate": candidate.described, "weights": model_identity(experiment.model)}
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


def _part(candidate: Candidate, experiment: ExperimentConfig, window: Window, outcome: Figures | str) -> Part:
    return Part(
        model=experiment.model.name,
        candidate=candidate.name,
        kind=candidate.kind,
        page_size=candidate.page_size,
        identity=identity(candidate, experiment),
        text=window.text,
        text_sha=window.text_sha,
        first_token=window.first_token,
        window_tokens=len(window.tokens),
        outcome=outcome,
    )
