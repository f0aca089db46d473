"""The dense update of adapters, by rows, in the precision in which a merge adds it."""

import functools
from typing import NamedTuple

import torch
from jaxtyping import Inexact
from torch import Tensor
from torch.distributed.tensor import DTensor

from gralora.tuner import blocks
from gralora.tuner.merging.rows import Window, chunk_height


class Part(NamedTuple):
    """The factors and the scale of one adapter at the time of a merge."""

    factors: blocks.Factors
    scale: float

    @classmethod
    def gathered(cls, factors: blocks.Factors, scale: float) -> "Part":
        """Return a part with whole factors; where FSDP2 has sharded them, every process must call this."""
        return cls(blocks.Factors(*(f.full_tensor() if isinstance(f, DTensor) else f for f in factors)), scale)

    def expert(self, index: int) -> "Part":
        """Return the part of one expert, views into the stack."""
        return Part(self.factors.expert(index), self.scale)

    def kept(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> "Part":
        """Return an independent copy, in `dtype` and on `device` where they are given."""
        return Part(
            blocks.Factors(
                *(None if f is None else f.detach().to(device, dtype, copy=True) for f in self.factors),
            ),
            self.scale,
        )


def delta(
    parts: list[Part], dtype: torch.dtype, start: int = 0, stop: int | None = None, out: Tensor | None = None
) -> Inexact[Tensor, "rows in"]:
    """Return rows `start` to `stop` of the sum of the dense updates, computed in `dtype`, written to `out` if given.

    Parts whose last input blocks reach beyond the weight differently far are summed as far as all of them reach.
    """
    first, *rest = parts
    width = min(part.factors.in_features for part in parts)
    total = blocks.dense(first.factors.to(dtype), first.scale, start, stop, out)[:, :width]
    for part in rest:
        total += blocks.dense(part.factors.to(dtype), part.scale, start, stop)[:, :width]
    return total


def delta_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype in which an update is added: float32, or the one that holds all of `dtypes` if wider."""
    return functools.reduce(blocks.wider, dtypes, torch.float32)


def sum_dtype(rows: Tensor, parts: list[Part]) -> torch.dtype:
    """Return the dtype in which the update of `parts` is added to `rows`."""
    return delta_dtype(rows.dtype, *(part.factors.A.dtype for part in parts))


class Scratch:
    """Buffers for one chunk, reused for every chunk, since fresh pages cost more than the products."""

    def __init__(self, window: Window, parts: list[Part]) -> None:
        factors, rows = parts[0].factors, window.rows
        self.dtype = sum_dtype(rows, parts)
        self.window = window
        shape = (min(rows.shape[0], chunk_height(rows)), rows.shape[1])
        self._delta = torch.empty(shape[0], factors.in_features, dtype=self.dtype, device=factors.A.device)
        self._sum = torch.empty(shape, dtype=self.dtype, device=rows.device)
        self._rounded = torch.empty(shape, dtype=rows.dtype, device=rows.device)

    def delta(self, parts: list[Part], start: int, stop: int) -> Tensor:
        """Return rows of the update, restricted to the columns of the window, on its device."""
        first_row, first_column = self.window.first_row, self.window.first_column
        whole = delta(parts, self.dtype, first_row + start, first_row + stop, out=self._delta[: stop - start])
        return whole[:, first_column : first_column + self._sum.shape[1]].to(self._sum.device)

    def sum(self, original: Tensor, update: Tensor) -> Tensor:
        """Return `original + update` before it is rounded."""
        return torch.add(original, update, out=self._sum[: len(update)])

    def unrounded(self, merged: Tensor, update: Tensor) -> Tensor:
        """Return `merged - update` in the dtype of `merged`, contiguous: the original up to rounding."""
        difference = torch.sub(merged, update, out=self._sum[: len(update)])
        return self._rounded[: len(update)].copy_(difference)
