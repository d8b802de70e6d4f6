"""One experiment, measured: what its cache costs, what it loses and how fast it decodes, as one row."""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch

from kvcfg.composition import overrides_of
from kvcfg.config.experiment import ExperimentConfig
from kvcfg.config.recipes import is_measured, needs_calibration, resolve_recipe
from kvcfg.errors import ConfigError, Problem
from kvcfg.evaluation.fingerprint import fingerprint
from kvcfg.evaluation.progress import progress_bar
from kvcfg.evaluation.quality import compare, noise_floor
from kvcfg.evaluation.retrieval.request import RetrievalRequest, task_scores
from kvcfg.evaluation.speed import attention_of, decode_step_seconds, first_token_seconds, tokens_per_second
from kvcfg.evaluation.storing import stored_error
from kvcfg.evaluation.text import text_sha, text_windows
from kvcfg.integrations.calibration import load_calibration
from kvcfg.integrations.calibration_files import calibration_path
from kvcfg.integrations.loading import load, load_tokenizer
from kvcfg.integrations.transformers import TransformersCache, build
from kvcfg.params import MultiKVCacheParams
from kvcfg.results.row import ResultRow
from kvcfg.version import __version__

_log = logging.getLogger("kvcfg")

_NAMED_FORMATS = 3
"""Formats that a row names one by one; where layers have more, their number stands for them."""

_LIBRARIES = ("torch", "transformers", "hydra-core", "omegaconf", "pydantic")


def evaluate(
    experiment: ExperimentConfig,
    model: Any = None,
    *,
    overrides: Sequence[str] | None = None,
    retrieval: RetrievalRequest | None = None,
    by_head: bool = False,
) -> ResultRow:
    """Run a model over a text with the experiment's cache and with a full-precision one, and compare.

    Args:
        experiment: what to measure; `workload` names the text and its windows.
        model: a causal language model of transformers, for example one that is being trained; None loads the
            experiment's own.
        overrides: what the experiment was composed from, for the row; None derives it.
        retrieval: tasks to ask beside it; None asks none.
        by_head: also say what storing does to the keys and values of each layer and head.

    Raises:
        ConfigError: if the text or the model's context is too short for the windows, or for the tasks' prompts.
        ShapeError: if the model's layers are not those of the config.
        BackendUnavailable, CapacityError: as `load` and `build`.
    """
    if model is None:
        model = load(experiment).model
    workload = experiment.workload
    tokenizer = load_tokenizer(experiment)
    windows = text_windows(workload, tokenizer)
    retrieval = retrieval or RetrievalRequest(())
    asked = retrieval.prompts(tokenizer, experiment.model.max_seq_len)
    pages = build(sized_to_windows(experiment, retrieval.num_tokens), model)

    def candidate(batch_size: int) -> TransformersCache:
        pages.release()
        return TransformersCache(pages)

    if needs_calibration(resolve_recipe(experiment)):
        _warn_of_known_text(experiment)
    params = pages.params
    recipes = list(dict.fromkeys(group.storage for group in params.params if group.stores_pages))
    names = list(dict.fromkeys(recipe.format_name for recipe in recipes))
    format_name = "+".join(names) if len(names) <= _NAMED_FORMATS else f"{len(names)} formats"
    title = f"{format_name} on {experiment.model.name}, pages of {params.page_size}"
    with evaluating(model), progress_bar(title, workload.num_windows + 2 + len(asked)) as step_done:
        agreement = compare(model, windows, candidate, step_done)
        held = pages.bytes_in_use
        floor = noise_floor(model, windows[0])
        step_done()
        clip_rate = pages.clip_rate
        last_token = int(windows[-1, -1])
        first_token = first_token_seconds(model, candidate(1), windows[-1])
        seconds = decode_step_seconds(model, TransformersCache(pages), last_token, workload.decode_tokens)
        step_done()
        tasks = task_scores(model, tokenizer, asked, candidate, step_done) if asked else None
        error = stored_error(model, windows[0], candidate(1)) if by_head else None
    if clip_rate > 0:
        _log.warning(
            "%s on %s: %.2g%% of the numbers were cut off, since scales do not follow them. Try: quantization=fp8",
            format_name,
            experiment.model.name,
            100 * clip_rate,
        )
    numbers = sum(_numbers_per_token(params)) * workload.window_tokens
    return ResultRow(
        fingerprint=fingerprint(experiment),
        model=experiment.model.name,
        device=torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type,
        format=format_name,
        recipe="; ".join(map(str, recipes)),
        attention=attention_of(model, pages),
        page_size=params.page_size,
        bytes_per_token_planned=params.bytes_per_token,
        bytes_per_token_allocated=pages.bytes_per_token,
        bits_per_element=_bits_per_element(params),
        bits_effective=8 * held / numbers,
        num_predictions=len(agreement.kl),
        ppl=agreement.nll.mean().exp().item(),
        ppl_reference=agreement.nll_reference.mean().exp().item(),
        kl=agreement.kl.mean().item(),
        kl_ci=agreement.kl_interval(),
        kl_p99=agreement.kl.quantile(0.99).item(),
        kl_by_depth=agreement.kl_by_depth(workload.num_windows),
        noise_floor=floor,
        top1=agreement.same_top1.double().mean().item(),
        clip_rate=clip_rate,
        experimental=not all(is_measured(group.storage) for group in params.params if group.grows),
        first_token_ms=1000 * first_token,
        peak_cache_bytes=held,
        tasks=tasks,
        stored_error=error,
        decode_tokens_per_s=tokens_per_second(seconds),
        text_sha=text_sha(workload),
        overrides=tuple(overrides_of(experiment) if overrides is None else overrides),
        config=experiment.model_dump(mode="json"),
        versions=_versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Run a model without dropout; afterwards it is as it was, whatever happened."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _warn_of_known_text(experiment: ExperimentConfig) -> None:
    """A calibration knows the text that it was made of; figures on that text are too good."""
    made, workload = load_calibration(calibration_path(experiment)).provenance, experiment.workload
    last = workload.first_token + workload.num_windows * workload.window_tokens
    overlap = made.first_token < last and workload.first_token < made.first_token + made.num_tokens
    if overlap and made.text_sha == text_sha(workload):
        _log.warning(
            "%s was calibrated on tokens of the windows that are measured: another text loses more. "
            "Try: workload.first_token=%d",
            experiment.model.name,
            made.first_token + made.num_tokens,
        )


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), "kvcfg": __version__, **{name: version(name) for name in _LIBRARIES}}


def sized_to_windows(experiment: ExperimentConfig, least_tokens: int = 0) -> ExperimentConfig:
    """The same experiment with a cache for one window and what is decoded after it, or more where that is asked."""
    workload = experiment.workload
    tokens = workload.window_tokens + workload.decode_tokens
    if tokens > experiment.model.max_seq_len:
        context = experiment.model.max_seq_len
        rule = f"and decode_tokens={workload.decode_tokens} must together fit in the model's context of {context}"
        fitting = context - workload.decode_tokens
        raise ConfigError(
            Problem("workload.window_tokens", rule, workload.window_tokens, f"workload.window_tokens={fitting}")
        )
    one_window = workload.model_copy(update={"max_batch_size": 1, "max_seq_len": max(tokens, least_tokens)})
    return experiment.model_copy(update={"workload": one_window})


def _numbers_per_token(params: MultiKVCacheParams) -> list[int]:
    """Numbers that each group stores of a token, over all layers, copies on other shards not counted."""
    return [
        group.num_layers * (1 if group.is_mla else group.n_kv_heads) * (group.head_dim + group.value_dim)
        for group in params.params
    ]


def _bits_per_element(params: MultiKVCacheParams) -> float:
    size = params.page_size
    bits = [8 * group.storage.page_bytes(size, 1, group.head_dim, group.value_dim) / size for group in params.params]
    widths = [group.head_dim + group.value_dim for group in params.params]
    numbers = _numbers_per_token(params)
    return sum(n * b / w for n, b, w in zip(numbers, bits, widths, strict=True)) / sum(numbers)
