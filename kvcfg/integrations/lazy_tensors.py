"""Tensors that are computed once somebody looks at them.

Models of transformers hand keys, values and masks on to their attention function and hardly ever touch them. What is
handed on here has shape, dtype and device, and its numbers only where any operation of torch asks for them; so an
attention function that knows better can take the origin instead, and everything else works as with plain tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class LazyTensor(Tensor):
    """A tensor that any operation replaces by what `read` gives."""

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *args: Any) -> LazyTensor:
        """A tensor without numbers; other arguments are the subclass's."""
        made: LazyTensor = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        return made

    def read(self) -> Tensor:
        """The plain tensor."""
        raise NotImplementedError

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute with plain tensors."""
        args, kwargs = tree_map_only(LazyTensor, lambda item: item.read(), (args, kwargs or {}))
        return function(*args, **kwargs)
