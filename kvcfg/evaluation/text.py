"""The text that a cache is measured on, cut into windows of tokens."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcfg.config.workload import WorkloadConfig
from kvcfg.errors import ConfigError, Problem


def read_text(workload: WorkloadConfig) -> str:
    """The text of a workload: a file, or the language reference that comes with Python (460 kB of English).

    Raises:
        ConfigError: if the file cannot be read as UTF-8.
    """
    if workload.text is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics))
    try:
        return Path(workload.text).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        rule = f"must be a readable UTF-8 file ({error.__class__.__name__}: {error})"
        raise ConfigError(Problem("workload.text", rule, workload.text, "workload.text=null")) from error


def text_sha(workload: WorkloadConfig) -> str:
    """sha256 of the text of a workload."""
    return hashlib.sha256(read_text(workload).encode()).hexdigest()


def text_windows(workload: WorkloadConfig, tokenizer: Any) -> Tensor:
    """Consecutive windows of the text.

    Returns:
        `[num_windows, window_tokens]` int64 token ids.

    Raises:
        ConfigError: if the text is too short.
    """
    with warnings.catch_warnings():
        # The tokenizer warns that the text is longer than the model's context; only windows of it are used.
        warnings.simplefilter("ignore")
        tokens = tokenizer(read_text(workload), add_special_tokens=False, verbose=False)["input_ids"]
    last = workload.first_token + workload.num_windows * workload.window_tokens
    if len(tokens) < last:
        rule = f"the text has {len(tokens):,} tokens, the windows end at {last:,}"
        fitting = max(0, len(tokens) - workload.num_windows * workload.window_tokens)
        fix = f"workload.first_token={fitting}" if fitting else "workload.num_windows=1 workload.first_token=0"
        raise ConfigError(Problem("workload.first_token", rule, workload.first_token, fix))
    return torch.tensor(tokens[workload.first_token : last]).view(workload.num_windows, workload.window_tokens)
