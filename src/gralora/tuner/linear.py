"""GraLoRA on linear layers: `nn.Linear`, quantised or not, and transformers' `Conv1D`."""

from typing import Any

import torch
from peft.tuners.tuners_utils import _get_in_out_features
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D as TransformersConv1D

from gralora.tuner import blocks, fused
from gralora.tuner.layer import GraloraLayer
from gralora.tuner.merging.weight import WeightRef


class Linear(GraloraLayer):
    """GraLoRA on `nn.Linear`, and on what PEFT has a linear quantisation backend for.

    Input `[..., in]`, with any number of leading dimensions, none included; output `[..., out]`.
    """

    noun = "linear layers (quantised or not)"
    can_be_sliced = True

    @classmethod
    def covers(cls, base: nn.Module, backend: QuantizationBackend | None) -> bool:
        """Return whether `base` is a linear layer."""
        return isinstance(base, nn.Linear) if backend is None else backend.layer_type == "linear"

    @classmethod
    def features(cls, base: nn.Module, parameter_name: str = "weight") -> tuple[int, int]:
        """Return the widths of the input and the output."""
        if isinstance(base, nn.Linear):  # PEFT takes those of the slice under tensor parallelism
            return base.in_features, base.out_features
        return _get_in_out_features(base)

    def update(self, x: Tensor, factors: blocks.Factors) -> Tensor:
        """Return the adapter's output `[..., out]`; factors tied to those of an embedding may reach beyond it."""
        return blocks.apply(x, factors)[..., : self.out_features]

    def add(self, result: Tensor, x: Tensor, factors: blocks.Factors) -> Tensor:
        """Return `result + update(x)`; in one product where the dtypes agree."""
        if result.dtype != x.dtype or factors.out_features != self.out_features:
            return super().add(result, x, factors)
        rows = result.reshape(-1, self.out_features)
        return blocks.add(rows, x.reshape(-1, self.in_features), factors).view(result.shape)

    def fused(self, x: Tensor, adapter_name: str, factors: blocks.Factors) -> Tensor | None:
        """Return the output of base and adapter as one autograd function, where that is the same function."""
        if factors.out_features != self.out_features or not fused.applies(self.base_layer, x, factors):
            return None
        base: Any = self.base_layer
        dropout = self.gralora_dropout._modules[adapter_name]
        rows = x.reshape(-1, self.in_features)
        dropped = dropout(rows) if dropout.training and type(dropout) is not nn.Identity else None
        y = fused.linear(rows, dropped, base.weight, base.bias, factors, self.scaling[adapter_name])
        return y.view(*x.shape[:-1], self.out_features)


class Conv1D(Linear):
    """GraLoRA on transformers' `Conv1D`, a linear layer that stores its weight as `[in, out]`."""

    noun = "transformers' Conv1D"
    can_be_sliced = False

    @classmethod
    def covers(cls, base: nn.Module, backend: QuantizationBackend | None) -> bool:
        """Return whether `base` is a `Conv1D`."""
        return backend is None and isinstance(base, TransformersConv1D)

    def weight_ref(self) -> WeightRef:
        """Return where the weight is; as a matrix it is transposed."""
        return WeightRef(self.get_base_layer(), matrix=torch.t, stored=torch.t)
