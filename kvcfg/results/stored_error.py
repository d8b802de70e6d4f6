"""What storing does to the keys and values of each layer and head."""

from __future__ import annotations

from dataclasses import dataclass

Heads = list[list[float | None]]
"""A number a layer of the model and a KV head of it; no heads where a layer stores nothing of its own, None where a
head has no such numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredError:
    """Relative error of one window's keys and values as a cache stored them: ||stored - given|| / ||given||.

    Attributes:
        keys: by layer and head; of latents, where a layer stores these (MLA).
        values: the same of values.
    """

    keys: Heads
    values: Heads
