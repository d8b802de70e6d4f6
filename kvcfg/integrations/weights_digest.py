"""Which model this is: a digest of the weights in memory, and of what else decides its keys.

Names and file times say what was asked for; a digest also tells a model that was trained on, or changed on loading.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

_BYTES_AT_ONCE = 2**26
_NO_MATTER = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")


def model_fingerprint(model: Any) -> str:
    """sha256 over config and weights of a model of transformers, as they are in memory; reads every weight once.

    A change of any single weight shows, down to its last bit. Other dtypes are other weights.
    """
    config = {key: value for key, value in model.config.get_text_config().to_dict().items() if key not in _NO_MATTER}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weights in sorted(model.state_dict().items()):
        digest.update(f"\n{name} {weights.dtype} {tuple(weights.shape)}\n".encode())
        for part in weights.detach().contiguous().view(-1).view(torch.uint8).split(_BYTES_AT_ONCE):
            digest.update(part.cpu().numpy())
    return digest.hexdigest()
