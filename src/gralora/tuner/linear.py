"""GraLoRA on linear layers: `nn.Linear`, quantised or not, and transformers' `Conv1D`."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import _get_in_out_features
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D as TransformersConv1D

from gralora.tuner import blocks, fused
from gralora.tuner.dtypes import without_autocast
from gralora.tuner.layer import GraloraLayer
from gralora.tuner.merging.weight import WeightRef

_WAY_OUT = "`gralora.register_kind` adds a kind that knows it"


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
    def refusal(cls, base: nn.Module) -> str | None:
        """Return why a subclass of `nn.Linear` cannot be adapted, or None."""
        trial = _trial(base) if cls.update is Linear.update else None
        if trial is None or trial.y is None or getattr(trial.y, "shape", None) == trial.expected.shape:
            return None
        got = f"the shape {tuple(trial.y.shape)}" if isinstance(trial.y, Tensor) else f"a {type(trial.y).__name__}"
        return (
            f"a linear layer must return a tensor [..., out_features]; {type(base).__name__} has a `forward` of its "
            f"own, which returns {got}. {_WAY_OUT}."
        )

    def rewrite_refusal(self) -> str | None:
        """Return why the base weight can never be merged into, or None where it can."""
        if refusal := super().rewrite_refusal():
            return refusal
        base = self.get_base_layer()
        knows_it = type(self).update is not Linear.update  # a kind of a user's own
        if knows_it or self.quantization_backend is not None or _is_linear(base):
            return None
        return (
            f"its base, {type(base).__name__}, has a `forward` of its own, which computes something else than "
            f"nn.Linear. {_WAY_OUT}"
        )

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
        if result.dtype != x.dtype or self.pads_outputs:
            return super().add(result, x, factors)
        rows = result.reshape(-1, self.out_features)
        return blocks.add(rows, x.reshape(-1, self.in_features), factors).view(result.shape)

    def fused(self, x: Tensor, adapter_name: str, factors: blocks.Factors) -> Tensor | None:
        """Return the output of base and adapter as one autograd function, where that is the same function."""
        if self.pads_outputs or not fused.applies(self.base_layer, x, factors):
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


class _Trial(NamedTuple):
    """What the own forward of a subclass of nn.Linear makes of a small input."""

    y: Any  # None where it fails
    expected: Tensor  # what nn.Linear makes of it


def _trial(base: Any) -> _Trial | None:
    """Call a forward that is not nn.Linear's own; None where there is none, or where it cannot be called."""
    if not isinstance(base, nn.Linear) or type(base).forward is nn.Linear.forward or hasattr(base, "_hf_hook"):
        return None
    weight = base._parameters.get("weight")
    if type(weight) is not nn.Parameter or weight.shape != (base.out_features, base.in_features) or weight.is_meta:
        return None  # sharded, packed, or not loaded
    if not weight.is_floating_point() or weight.dtype.itemsize == 1:
        return None
    x = torch.linspace(-1, 1, 2 * base.in_features, dtype=weight.dtype, device=weight.device).unflatten(0, (2, -1))
    with torch.no_grad(), without_autocast(x):
        expected = F.linear(x, weight, base.bias)
        try:
            return _Trial(type(base).forward(base, x), expected)
        except Exception:  # of any type, since any code may be called here
            return _Trial(None, expected)


def _is_linear(base: nn.Module) -> bool:
    """Return whether `base` computes what nn.Linear does, but for rounding; True where that cannot be tried."""
    trial = _trial(base)
    if trial is None or not trial.expected.isfinite().all():
        return True
    if not isinstance(trial.y, Tensor):
        return False
    y, expected = trial
    tolerance = max(torch.finfo(tensor.dtype).eps for tensor in trial) ** 0.5
    return bool((y.double() - expected.double()).norm() <= tolerance * expected.double().norm())
