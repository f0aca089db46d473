"""Reading an export back and comparing it with its adapter, in float64."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from gralora.export.layouts import ExpertsLayout, Pair, pairs_of
from gralora.files.adapter_config import read_config
from gralora.files.checkpoint import AdaptedLayer, Adapter, open_tensors
from gralora.files.names import PREFIX
from gralora.files.tensors import TensorFile
from gralora.tuner import blocks
from gralora.tuner.blocks import Factors

# Rows of ΔW in memory at once.
_ROWS = 1024


@dataclass(frozen=True)
class LayerError:
    """Difference of the written ΔW from that of the adapter.

    Attributes:
        largest: Largest absolute difference of two entries.
        norm: Frobenius norm of the difference.
        reference_norm: Frobenius norm of the adapter's ΔW.
    """

    largest: float
    norm: float
    reference_norm: float

    @property
    def relative(self) -> float:
        """`norm / reference_norm`, or `norm` if ΔW is zero."""
        return self.norm / self.reference_norm if self.reference_norm else self.norm


class LoraFile:
    """The LoRA factors in a written file.

    Args:
        tensors: The file.
        scale: Factor of the update that the reading program will use.
        prefix: Prefix of the keys.
        experts: How stacks of experts were written.
    """

    def __init__(
        self, tensors: TensorFile, scale: float = 1.0, prefix: str = PREFIX, experts: ExpertsLayout = "stacked"
    ) -> None:
        self.scale = scale
        self._tensors = tensors
        self._prefix = prefix
        self._experts: ExpertsLayout = experts

    def pairs(self, layer: AdaptedLayer) -> Iterator[Pair]:
        """Read the LoRA of each matrix of one layer, in float64."""
        return pairs_of(layer, self._tensors.read, self._prefix, self._experts)


def open_lora(folder: Path, experts: ExpertsLayout = "stacked") -> LoraFile:
    """Open a folder in PEFT's format, whose config states the scale."""
    config = read_config(folder)
    return LoraFile(open_tensors(folder), config["lora_alpha"] / config["r"], experts=experts)


@torch.no_grad()
def compare(adapter: Adapter, name: str, written: LoraFile) -> LayerError:
    """Compare the written update of one layer with that of the adapter, matrix by matrix."""
    layer = adapter.layers[name]
    errors = [
        _compare_matrices(factors, layer.scale, pair, written.scale)
        for factors, pair in zip(adapter.matrices(name), written.pairs(layer), strict=True)
    ]
    return LayerError(
        max(error.largest for error in errors),
        math.hypot(*(error.norm for error in errors)),
        math.hypot(*(error.reference_norm for error in errors)),
    )


def _compare_matrices(factors: Factors, scale: float, pair: Pair, written_scale: float) -> LayerError:
    """Compare one matrix with the product of a pair, some rows at a time."""
    A, B, A_general, B_general = factors.to(torch.float64)
    k, m = B.shape[0], B.shape[2]
    step = max(1, _ROWS // k)
    largest = squared = reference_squared = 0.0
    for start in range(0, m, step):
        stop = min(m, start + step)
        rows = torch.cat([torch.arange(i * m + start, i * m + stop) for i in range(k)])
        general = None if B_general is None else B_general[rows]
        ours = blocks.dense(Factors(A, B[:, :, start:stop], A_general, general), scale)
        theirs = (pair.b[rows] @ pair.a).mul_(written_scale)
        ours = ours[:, : theirs.shape[1]]  # the last input block may reach beyond the input
        reference_squared += float(ours.square().sum())
        difference = theirs.sub_(ours)
        largest = max(largest, float(difference.abs().max()))
        squared += float(difference.square().sum())
    return LayerError(largest, squared**0.5, reference_squared**0.5)
