"""Choosing one LoRA rank for all layers of an export."""

import torch
from torch import Tensor

from gralora.files.checkpoint import Adapter
from gralora.tuner import svd

# Below this share of the norm, singular values are rounding errors of the decomposition.
_ROUNDING = 1e-12


def common_rank(adapter: Adapter, max_rank: int | None, max_error: float | None, per_layer: bool) -> int:
    """Return the rank of every layer of the LoRA: programs ask for one rank in the config.

    Args:
        adapter: Adapter to export.
        max_rank: Highest rank allowed; None for the rank of the exact LoRA.
        max_error: Relative Frobenius error allowed; the smallest rank within it is chosen. None for no compression
            below `max_rank`.
        per_layer: Apply `max_error` to every layer instead of to the model as a whole.

    Raises:
        ValueError: No rank up to `max_rank` is within `max_error`.
    """
    full = max(layer.rank for layer in adapter.layers.values())
    limit = full if max_rank is None else min(full, max_rank)
    if max_error is None:
        return limit
    errors = _errors_by_rank(adapter, full, per_layer)
    enough = errors <= max(max_error, _ROUNDING)
    enough[0] = False
    needed = int(enough.nonzero()[0]) if enough.any() else full
    if needed > limit:
        raise ValueError(
            f"`max_rank` must be at least {needed} for max_error={max_error:g}; got max_rank={max_rank}, with which "
            f"the error is {float(errors[limit]):.3g}."
        )
    return needed


def _errors_by_rank(adapter: Adapter, full: int, per_layer: bool) -> Tensor:
    """Return the relative error of compression to rank 0, 1, …, `full`."""
    tails = []
    for name, layer in adapter.layers.items():
        squares = torch.zeros(full + 1, dtype=torch.float64)  # those of a stack's matrices add up
        for factors in adapter.matrices(name):
            norms = svd.tail_norms(svd.singular_values(factors, layer.scale))
            squares[: len(norms)] += norms.square()
        tails.append(squares.sqrt())
    errors = torch.stack(tails)
    if per_layer:
        return (errors / errors[:, :1].clamp_min(torch.finfo(errors.dtype).tiny)).amax(0)
    return errors.square().sum(0).sqrt() / errors[:, 0].square().sum().sqrt().clamp_min(1e-300)
