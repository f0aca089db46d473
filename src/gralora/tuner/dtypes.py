"""The dtype in which an update is computed."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from gralora.tuner.blocks import Factors, wider

_NO_CONTEXT = nullcontext()


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that a linear layer computes in on `x`: its own, or autocast's."""
    if _is_autocast(x) and x.is_floating_point() and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which no product with `x` is cast."""
    return torch.autocast(x.device.type, enabled=False) if _is_autocast(x) else _NO_CONTEXT


def _is_autocast(x: Tensor) -> bool:
    # The first check is fast; the second raises on devices without autocast, such as meta.
    return torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type)


def update_dtype(dtype: torch.dtype, factors: Factors) -> torch.dtype:
    """Return the dtype of an update in a layer that computes in `dtype`: the same, but never float16."""
    return wider(factors.widest(dtype), torch.float32) if dtype == torch.float16 else dtype
