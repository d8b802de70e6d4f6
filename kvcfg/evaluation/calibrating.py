"""Measure on a text what calibrated recipes need of a model's keys and values."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from torch import Tensor

from kvcfg.config.experiment import ExperimentConfig
from kvcfg.config.recipes import balances_rope
from kvcfg.errors import ConfigError, Problem
from kvcfg.evaluation.key_balance import gained_bits, key_transforms
from kvcfg.evaluation.key_moments import LEADING_TOKENS, HeadMoments, MomentCollector
from kvcfg.evaluation.progress import progress_bar
from kvcfg.evaluation.text import text_sha, text_windows
from kvcfg.integrations.calibration import Calibration, Provenance
from kvcfg.integrations.loading import load, load_tokenizer
from kvcfg.integrations.transformers import check_model, layer_places
from kvcfg.integrations.weights_digest import model_fingerprint
from kvcfg.version import __version__

_FEWEST_TOKENS = 2 * LEADING_TOKENS


def calibrate(experiment: ExperimentConfig, model: Any = None) -> Calibration:
    """Run a model over the windows of a workload and take down what its keys and values are like.

    Calibrate on another text, or another part of it, than you measure on. `key_balance.py` says what is computed.

    Args:
        experiment: the model, the text (`workload`), the page size, and whether RoPE pairs are balanced.
        model: a causal language model of transformers; None loads the experiment's own.

    Returns:
        The calibration; `save` it to `calibration_path(experiment)` for `quantization.calibration=null` to find it.

    Raises:
        ConfigError: if the text or the model's context is too short for the windows, or keys are not finite.
        ShapeError: if the model's layers are not those of the config, or do not show their keys.
        BackendUnavailable: as `load`.
    """
    _check_windows(experiment)
    if model is None:
        model = load(experiment).model
    check_model(experiment, model)
    groups, workload = experiment.model.layer_groups, experiment.workload
    layer_places(groups)
    windows = text_windows(workload, load_tokenizer(experiment))
    collector = MomentCollector(groups, experiment.cache.kv_cache_page_size)
    was_training = model.training
    model.eval()
    title = f"calibrating {experiment.model.name} on {windows.numel():,} tokens"
    with progress_bar(title, len(windows)) as step_done:
        for window in windows.unbind():
            collector.run(model, window)
            step_done()
    model.train(was_training)
    provenance = Provenance(
        kvcfg_version=__version__,
        model=experiment.model.name,
        model_fingerprint=model_fingerprint(model),
        balance_rope=balances_rope(experiment),
        num_layers=experiment.model.num_layers,
        text_sha=text_sha(workload),
        first_token=workload.first_token,
        num_tokens=windows.numel(),
        page_size=experiment.cache.kv_cache_page_size,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    layers = [_layer(collector.layers.get(layer), layer) for layer in range(provenance.num_layers)]
    transforms, key_amax, value_amax, gains = zip(*layers, strict=True)
    return Calibration(transforms, key_amax, value_amax, gains, provenance)


def _layer(moments: HeadMoments | None, layer: int) -> tuple[Tensor | None, ...]:
    """Transform, largest magnitudes and gain of one layer, as they are stored."""
    if moments is None:
        return None, None, None, None
    keys, queries = moments.keys.cpu(), moments.queries.cpu()
    if not (keys.isfinite().all() and queries.isfinite().all()):
        raise ConfigError(Problem("model", f"makes keys or queries in layer {layer} that are no finite numbers"))
    transforms = key_transforms(keys, queries)
    gains = gained_bits(keys, queries, transforms)
    return tuple(item.cpu().float() for item in (transforms, moments.key_amax, moments.value_amax, gains))


def _check_windows(experiment: ExperimentConfig) -> None:
    tokens, context, key = experiment.workload.window_tokens, experiment.model.max_seq_len, "workload.window_tokens"
    if tokens > context:
        rule = f"must fit in the model's context of {context}"
        raise ConfigError(Problem(key, rule, tokens, f"{key}={context}"))
    if tokens < _FEWEST_TOKENS:
        rule = f"must be at least {_FEWEST_TOKENS} to calibrate on: the first {LEADING_TOKENS} are left out"
        raise ConfigError(Problem(key, rule, tokens, f"{key}={min(1024, context)}"))
