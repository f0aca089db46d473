"""Reading an export back and comparing it with its adapter, in float64."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gralora.files.adapter_config import read_config
from gralora.files.checkpoint import open_tensors
from gralora.files.names import LORA_FACTORS, PREFIX, key_of
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
    """

    def __init__(self, tensors: TensorFile, scale: float = 1.0, prefix: str = PREFIX) -> None:
        self.scale = scale
        self._tensors = tensors
        self._prefix = prefix

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """Return `lora_A` and `lora_B` of one module in float64."""
        lora_a, lora_b = (self._tensors.read(key_of(name, factor, self._prefix)).double() for factor in LORA_FACTORS)
        return lora_a, lora_b


def open_lora(folder: Path) -> LoraFile:
    """Open a folder in PEFT's format, whose config states the scale."""
    config = read_config(folder)
    return LoraFile(open_tensors(folder), config["lora_alpha"] / config["r"])


@torch.no_grad()
def compare(factors: Factors, scale: float, written: LoraFile, name: str) -> LayerError:
    """Compare the written update of one layer with that of `factors`, some rows at a time."""
    A, B, A_general, B_general = factors.to(torch.float64)
    lora_a, lora_b = written.pair(name)
    k, m = B.shape[0], B.shape[2]
    step = max(1, _ROWS // k)
    largest = squared = reference_squared = 0.0
    for start in range(0, m, step):
        stop = min(m, start + step)
        rows = torch.cat([torch.arange(i * m + start, i * m + stop) for i in range(k)])
        general = None if B_general is None else B_general[rows]
        ours = blocks.dense(Factors(A, B[:, :, start:stop], A_general, general), scale)
        theirs = (lora_b[rows] @ lora_a).mul_(written.scale)
        reference_squared += float(ours.square().sum())
        difference = theirs.sub_(ours)
        largest = max(largest, float(difference.abs().max()))
        squared += float(difference.square().sum())
    return LayerError(largest, squared**0.5, reference_squared**0.5)
