"""The frozen weight under an adapter: where it is, how it reads as a matrix, and its values at one time."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gralora.tuner.merging.rows import Window, fingerprint, local, overwrite


def identity(weight: Tensor) -> Tensor:
    """Return `weight`."""
    return weight


class WeightRef(NamedTuple):
    """Where a frozen weight is, and how it reads as a matrix `[out, in]`.

    Attributes:
        owner: Module that holds the parameter, usually the base layer.
        name: Name of the parameter in it.
        matrix: Maps the stored weight, or a shard of it, to `[out, in]`; a view where the memory layout allows.
        stored: Maps `[out, in]`, or the part of it that is here, back to the shape of the stored weight, a view.
        experts: Number of matrices, where the parameter is a stack of them; `matrix` and `stored` map one.
        expert: Which one of a stack this is; None for all.
    """

    owner: nn.Module
    name: str = "weight"
    matrix: Callable[[Tensor], Tensor] = identity
    stored: Callable[[Tensor], Tensor] = identity
    experts: int | None = None
    expert: int | None = None

    @property
    def parameter(self) -> nn.Parameter | None:
        """The weight; None where a packed format has none."""
        return getattr(self.owner, self.name, None)

    def in_parameter(self, parameter: Tensor) -> Tensor:
        """Return the stored weight in the parameter that holds it: all of it, or its part of a stack, a view."""
        return parameter if self.expert is None else parameter[self.expert]


class WeightState(NamedTuple):
    """A base weight at one point of its history: the module and the parameter that hold it, and its values."""

    base: nn.Module
    ref: WeightRef
    parameter: nn.Parameter
    values: Tensor | None = None  # of the shape stored here; None where they are in the parameter

    @classmethod
    def of(cls, layer: Any, ref: WeightRef | None = None) -> "WeightState":
        """Return where the weight of `layer` is, or the one that `ref` says."""
        found: WeightRef = ref or layer.weight_ref()
        return cls(layer.base_layer, found, cast(nn.Parameter, found.parameter))

    @property
    def stored(self) -> Tensor:
        """The values of this process, as they are stored."""
        return local(self.ref.in_parameter(self.parameter) if self.values is None else self.values)

    @property
    def window(self) -> Window:
        """The rows that this process holds, and where they begin in the whole matrix."""
        rows = self.ref.matrix(self.stored)
        if not isinstance(self.parameter, DTensor):
            return Window(rows, 0, 0)
        return Window(rows, *_first_row_and_column(self.parameter, self.ref.matrix))

    def fingerprint(self) -> tuple[int, ...]:
        """Return hashes of the bits of the weight that is here; records compare them."""
        return fingerprint(self.window.rows)

    def put_back(self, layer: Any) -> None:
        """Make this the weight of `layer`. Doing it again changes nothing."""
        if self.values is not None:
            overwrite(self.ref.in_parameter(self.parameter), self.values)
        # Straight into the dictionaries: one step each, which no interrupt can divide.
        self.ref.owner._parameters[self.ref.name] = self.parameter
        layer._modules["base_layer"] = self.base


def _first_row_and_column(weight: DTensor, matrix: Callable[[Tensor], Tensor]) -> tuple[int, int]:
    """Return where this process's shard begins in the matrix of the whole weight."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, first = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    # A view knows where it begins, and on meta it costs nothing.
    whole = torch.empty(weight.shape, device="meta")
    shard = whole[tuple(slice(start, start + size) for start, size in zip(first, shape, strict=True))]
    rows = matrix(whole)
    row_stride, column_stride = rows.stride()
    if row_stride >= column_stride and len(rows) > 1:
        row, rest = divmod(shard.storage_offset(), row_stride)
        return row, rest // column_stride
    column, rest = divmod(shard.storage_offset(), column_stride)
    return rest // row_stride, column
