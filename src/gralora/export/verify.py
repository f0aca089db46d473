"""Reading an export back and comparing it with the adapter it was made of, in float64."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gralora.files.checkpoint import PREFIX, TensorFile, read_config, tensor_path
from gralora.tuner import blocks
from gralora.tuner.blocks import Factors

_ROWS = 1024  # of ΔW in memory at once


@dataclass(frozen=True)
class LayerError:
    """How far the written ΔW is from the adapter's.

    Attributes:
        largest: Largest difference of two entries.
        norm: Frobenius norm of the difference.
        of: Frobenius norm of ΔW.
    """

    largest: float
    norm: float
    of: float

    @property
    def relative(self) -> float:
        """`norm / of`."""
        return self.norm / self.of if self.of else self.norm


class LoraFile:
    """The factors that a program will read.

    Args:
        folder: That of a LoRA adapter.
        tensors: A file without a config instead, whose scale is one.
        prefix: What the keys begin with.
    """

    def __init__(self, folder: Path, tensors: Path | None = None, prefix: str = PREFIX) -> None:
        self._file = TensorFile(tensors or tensor_path(folder))
        self._prefix = prefix
        config = {"lora_alpha": 1, "r": 1} if tensors else read_config(folder)
        self.scale = config["lora_alpha"] / config["r"]

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """Return `lora_A` and `lora_B` of one module in float64."""
        lora_a, lora_b = (self._file.read(f"{self._prefix}{name}.lora_{x}.weight").double() for x in "AB")
        return lora_a, lora_b


@torch.no_grad()
def compare(factors: Factors, scale: float, written: LoraFile, name: str) -> LayerError:
    """Return how far the written update of one layer is from that of `factors`, some rows at a time."""
    A, B, A_general, B_general = factors.to(torch.float64)
    lora_a, lora_b = written.pair(name)
    k, m = B.shape[0], B.shape[2]
    step = max(1, _ROWS // k)
    largest = norm = of = 0.0
    for start in range(0, m, step):
        stop = min(m, start + step)
        rows = torch.cat([torch.arange(i * m + start, i * m + stop) for i in range(k)])
        general = None if B_general is None else B_general[rows]
        ours = blocks.dense(Factors(A, B[:, :, start:stop], A_general, general), scale)
        theirs = (lora_b[rows] @ lora_a).mul_(written.scale)
        of += float(ours.square().sum())
        difference = theirs.sub_(ours)
        largest = max(largest, float(difference.abs().max()))
        norm += float(difference.square().sum())
    return LayerError(largest, norm**0.5, of**0.5)


def worst(layers: Iterable[Any]) -> Any | None:
    """Return the layer with the largest measured difference of two entries, or None where none was measured."""
    return max((layer for layer in layers if layer.measured), key=lambda layer: layer.measured.largest, default=None)
