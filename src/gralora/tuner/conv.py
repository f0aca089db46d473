"""GraLoRA on convolutions: the blocks are blocks of channels.

The weight `[out, in / groups, *kernel]`, flattened to `[out, in / groups * prod(kernel)]`, is channel-major, so a block
of its columns is a block of input channels with the whole kernel. Without groups the update is then two convolutions:
with `k` groups from the channel blocks to the rank, and with `k` groups and a kernel of one from the rank to the output
blocks. With groups it is the convolution by ΔW, which costs as much as the base.
"""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn

from gralora.tuner import blocks
from gralora.tuner.layer import GraloraLayer
from gralora.tuner.merging.weight import WeightRef

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FUNCTIONS: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}  # by the dimensions of the kernel


class Conv(GraloraLayer):
    """GraLoRA on `nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d`.

    Parameters as LoRA's at rank r: `gralora_A` is `[k, in/groups/k * prod(kernel), r]`, `gralora_B` is `[k, r, out/k]`.
    """

    noun = "convolutions (nn.Conv1d, nn.Conv2d, nn.Conv3d)"

    @classmethod
    def covers(cls, base: nn.Module, backend: QuantizationBackend | None) -> bool:
        """Return whether `base` is a convolution that is not transposed."""
        return backend is None and isinstance(base, _CONVOLUTIONS)

    @classmethod
    def refusal(cls, base: Any) -> str | None:
        """Return why a convolution cannot be adapted, or None."""
        if base.in_channels == base.groups > 1:
            return (
                "a convolution must see more than one channel in each output; got a depthwise one, whose weight is "
                f"small: groups={base.groups}. Train it whole, by `modules_to_save`."
            )
        own = type(base).forward, type(base)._conv_forward
        if own not in {(kind.forward, kind._conv_forward) for kind in _CONVOLUTIONS}:
            return f"a convolution must have PyTorch's own `forward`; {type(base).__name__} has another one."
        return None

    @classmethod
    def features(cls, base: Any, parameter_name: str = "weight") -> tuple[int, int]:
        """Return the widths of the weight as a matrix `[out, in / groups * prod(kernel)]`."""
        return base.in_channels // base.groups * math.prod(base.kernel_size), base.out_channels

    def weight_ref(self) -> WeightRef:
        """Return where the weight is; as a matrix it is `[out, in / groups * prod(kernel)]`."""
        base: Any = self.get_base_layer()
        stored = partial(torch.unflatten, dim=1, sizes=(-1, *base.kernel_size))
        return WeightRef(base, matrix=partial(torch.flatten, start_dim=1), stored=stored)

    def record(self) -> dict[str, Any]:
        """Return the shape of the base weight, `[out, in / groups, *kernel]`, and settings that are not the default."""
        base: Any = self.get_base_layer()
        shape = [base.out_channels, base.in_channels // base.groups, *base.kernel_size]
        further = {
            "groups": base.groups if base.groups > 1 else None,
            "dilation": list(base.dilation) if max(base.dilation) > 1 else None,
            "padding_mode": base.padding_mode if base.padding_mode != "zeros" else None,
        }
        return {"kind": "conv", "shape": shape} | {name: value for name, value in further.items() if value}

    def update(self, x: Tensor, factors: blocks.Factors) -> Tensor:
        """Return the adapter's output `[batch, out, *spatial]`, without `batch` where `x` has none."""
        base: Any = self.get_base_layer()
        if base.groups > 1:
            # LoRA's convolution with groups sees all channels, so it is no update of this weight and cannot be merged.
            return _convolve(base, x, blocks.update_matrix(factors), base.groups)
        A, B, A_general, B_general = factors
        k = factors.k
        if base.in_channels % k:  # a block may end inside a channel: compute the update as plain LoRA then
            lora_A, lora_B = blocks.lora_factors(factors)
            return _pointwise(base, _convolve(base, x, lora_A, 1), lora_B, groups=1)
        middle = _exchange(_convolve(base, x, A.mT.flatten(0, 1), k), k, -1 - len(base.kernel_size))
        update = _pointwise(base, middle, B.mT.flatten(0, 1), groups=k)
        if A_general is None or B_general is None:
            return update
        return update + _pointwise(base, _convolve(base, x, A_general, 1), B_general, groups=1)


def _convolve(base: Any, x: Tensor, rows: Tensor, groups: int) -> Tensor:
    """Return the convolution of `x` as `base` does it, by the kernels in `rows`, without bias."""
    weight = _unflatten(rows, (base.in_channels // groups, *base.kernel_size))
    padding = base.padding
    if base.padding_mode != "zeros":
        x, padding = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode), 0
    return _FUNCTIONS[len(base.kernel_size)](x, weight, None, base.stride, padding, base.dilation, groups)


def _pointwise(base: Any, x: Tensor, rows: Tensor, groups: int) -> Tensor:
    """Return the convolution of `x` with kernels of one element."""
    size = len(base.kernel_size)
    return _FUNCTIONS[size](x, _unflatten(rows, (rows.shape[1], *(1,) * size)), groups=groups)


def _exchange(middle: Tensor, k: int, channels: int) -> Tensor:
    """Swap the block index with the block inside the rank: channels `(j i s)` become `(i j s)`."""
    split = middle.unflatten(channels, (k, k, -1))
    return split.transpose(channels - 2, channels - 1).flatten(channels - 2, channels)


def _unflatten(rows: Tensor, kernel: tuple[int, ...]) -> Tensor:
    return rows.unflatten(1, kernel)
