"""The weight under an adapter: can it be merged, what is it, and merging it so that every bit comes back."""

from dataclasses import dataclass

import torch
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn


@dataclass
class MergeRecord:
    """What one merge needs to be undone: the names it merged, and the parameter and bits it replaced."""

    adapter_names: list[str]
    original: Tensor
    shared: nn.Parameter | None

    def undo(self, base: nn.Module) -> None:
        """Put the original weight of `base` back, bit for bit."""
        if self.shared is not None:
            base.weight = self.shared
        else:
            with torch.no_grad():
                base.weight.copy_(self.original)


def obstacle_to_merging(base: nn.Module, backend: QuantizationBackend | None) -> str | None:
    """Return why the weight of `base` can't be read and rewritten, or None where it can."""
    if backend is not None:
        return f"its base weight is quantised ({backend.backend_name})"
    weight = getattr(base, "weight", None)
    if not isinstance(weight, nn.Parameter):
        return f"its base, {type(base).__name__}, holds no plain `weight` parameter"
    if not weight.is_floating_point():
        return f"its base weight is of type {weight.dtype}"
    return None


def merged_weight(weight: Tensor, delta: Tensor) -> Tensor:
    """Return `weight + delta`, added in the precision of `delta` and rounded once to that of `weight`."""
    return (weight.detach().to(delta.dtype) + delta).to(weight.dtype)


def merge(base: nn.Module, merged: Tensor, adapter_names: list[str], is_shared: bool) -> MergeRecord:
    """Write `merged` over the weight of `base` and return the way back.

    A weight that another module holds too gets a parameter of its own instead, so that nothing is merged
    behind the twin's back.
    """
    weight = base.weight
    if is_shared:
        base.weight = nn.Parameter(merged, requires_grad=weight.requires_grad)
        return MergeRecord(adapter_names, merged.new_empty(0), shared=weight)
    record = MergeRecord(adapter_names, weight.detach().clone(), shared=None)
    with torch.no_grad():
        weight.copy_(merged)
    return record
