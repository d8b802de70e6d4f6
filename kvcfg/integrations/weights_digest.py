"""Which model this is: a digest of the weights in memory, and of what else decides its keys.

Names and file times say what was asked for; a digest also tells a model that was trained on, or changed on loading.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

_AT_ONCE = 2**22
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NO_MATTER = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")


def model_fingerprint(model: Any) -> str:
    """sha256 over config and weights of a model of transformers, as they are in memory; reads every weight once.

    A change of any single weight shows, down to its last bit. Other dtypes are other weights.
    """
    config = {key: value for key, value in model.config.get_text_config().to_dict().items() if key not in _NO_MATTER}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weights in sorted(model.state_dict().items()):
        digest.update(f"{name} {weights.dtype} {tuple(weights.shape)} {_checksum(weights)}\n".encode())
    return digest.hexdigest()


def _checksum(weights: Tensor) -> int:
    """Bits of every number times an odd number that its place decides, added up modulo 2^64, where they are kept."""
    words = weights.detach().contiguous().view(-1)
    if words.is_complex():
        words = torch.view_as_real(words).view(-1)
    words = words.view(_INTEGERS[words.dtype.itemsize])
    total = 0
    for start in range(0, len(words), _AT_ONCE):
        part = words[start : start + _AT_ONCE]
        places = torch.arange(start, start + len(part), device=part.device)
        total += int((part.long() * (2 * places + 1)).sum())
    return total % 2**64
