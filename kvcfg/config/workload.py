"""The `workload` group: what the cache is planned for, what it is measured on, and whose requests it replays."""

from __future__ import annotations

from pydantic import Field

from kvcfg.config.base import Config


class WorkloadConfig(Config):
    """Sequences that share the cache, and the text that measures it."""

    max_batch_size: int | None = Field(None, ge=1)
    """Sequences held at the same time, per replica. null = as many as fit."""

    max_seq_len: int | None = Field(None, ge=1)
    """Longest sequence, prompt and answer, in tokens. null = the model's context."""

    text: str | None = None
    """Path of a UTF-8 text file to measure on. null = Python's own language reference (pydoc_data.topics)."""

    first_token: int = Field(8192, ge=0)
    """Where in the text the first window starts, in tokens."""

    num_windows: int = Field(2, ge=1)
    """Windows to measure, one after the other."""

    window_tokens: int = Field(1024, ge=2)
    """Length of a window in tokens; every token but the last is a prediction that counts."""

    decode_tokens: int = Field(32, ge=1)
    """Tokens generated after a window to time decoding."""

    trace: str | None = None
    """Path of a request trace to replay: JSON lines with hash_ids, tokens or text, also gzipped. null = none."""

    trace_block_size: int = Field(512, ge=1)
    """Tokens of the block that one of the trace's hash_ids names."""
