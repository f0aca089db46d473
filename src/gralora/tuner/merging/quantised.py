"""Merging into packed weights: dequantise, merge, quantise again; an undo restores the packed original."""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from peft.utils.quantization_utils import (
    ForwardOnlyQuantizationBackend,
    QuantizationBackend,
    resolve_quantization_backend,
)
from torch import Tensor, nn

from gralora.tuner.merging.dense_update import Part, delta, sum_dtype
from gralora.tuner.merging.records import ForgottenRecord, MergeRecord
from gralora.tuner.merging.rows import as_integers, digest
from gralora.tuner.merging.weight import WeightState


def backend_of(module: nn.Module, **quantization: Any) -> QuantizationBackend | None:
    """Return PEFT's quantisation backend of a module, or None for a plain one.

    Args:
        module: Layer of a base model.
        **quantization: What PEFT's `get_quantization_kwargs` found in the model.
    """
    try:
        return resolve_quantization_backend(module, **quantization)
    except ValueError:  # torchao without transformers' quantizer, whose recipe a merge would need
        return ForwardOnlyQuantizationBackend("torchao")


class PackedState(NamedTuple):
    """A packed weight at one time: its module, parameters, and the attributes that a backend overwrites."""

    base: nn.Module
    parameters: dict[str, nn.Parameter | None]
    attributes: list[tuple[Any, dict[str, Any]]]

    @classmethod
    def of(cls, layer: Any) -> "PackedState":
        """Return where the packed weight of `layer` is."""
        base = layer.base_layer
        weight = getattr(base, "weight", None)
        owners = [weight, getattr(weight, "quant_state", None), getattr(base, "state", None)]
        attributes = [(owner, dict(owner.__dict__)) for owner in owners if hasattr(owner, "__dict__")]
        if "quant_state" in base.__dict__:
            attributes.append((base, {"quant_state": base.quant_state}))
        return cls(base, dict(base._parameters), attributes)

    @property
    def weight(self) -> Tensor | None:
        """The packed weight, where it is a parameter."""
        return self.parameters.get("W_q", self.parameters.get("weight"))

    def fingerprint(self) -> tuple[int, ...]:
        """Return hashes of the bits of the packed weight, the same before and after bitsandbytes repacks it."""
        weight: Any = packed_weight(self.base) if self.weight is None else self.weight
        if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
            return as_integers([digest(_unpacked_for_cpu(weight)[0].detach())])
        return as_integers([digest(tensor.detach()) for tensor in _plain_tensors(weight)])

    def put_back(self, layer: Any) -> None:
        """Make this the weight of `layer`, the same objects with the same bits. Doing it again changes nothing."""
        for owner, attributes in self.attributes:
            owner.__dict__.update(attributes)
        self.base.__dict__.pop("weight", None)
        self.base._parameters.update(self.parameters)
        layer._modules["base_layer"] = self.base


@dataclass
class PackedRecord(MergeRecord):
    """The packed original, and what was merged, to be merged again after `.to`."""

    original: PackedState
    parts: list[Part]

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight and of the factors."""
        factors = (tensor for part in self.parts for tensor in part.factors if tensor is not None)
        weight = self.original.weight
        return sum(tensor.nbytes for tensor in factors) + (0 if weight is None else weight.nbytes)

    def _recover(self, state: WeightState) -> Any:
        return self.original


def prepare(
    layer: Any, names: list[str], parts: list[Part], keep: bool, own_module: nn.Module | None
) -> tuple[Tensor, MergeRecord, Callable[[], None]]:
    """Return the merged weight, its record, and a function that writes it; nothing has changed yet.

    Args:
        layer: Tuner layer with a `quantization_backend` that can write.
        names: Names of the adapters.
        parts: Factors and scales of the adapters.
        keep: Keep the packed original, for an unmerge.
        own_module: Module that becomes the base, where other parts of the model call the present one.
    """
    backend: Any = layer.quantization_backend
    if own_module is not None and "state" in own_module.__dict__:
        own_module.__dict__["state"] = copy(
            own_module.__dict__["state"]
        )  # bitsandbytes keeps its 8-bit weight there, too
    dense = dequantised(layer)
    exact = delta(parts, sum_dtype(dense, parts)).to(dense.device).add_(dense)
    merged, original = exact.to(dense.dtype), PackedState.of(layer)
    before = original.fingerprint()
    record = (
        PackedRecord(names, before, before, original, [part.kept() for part in parts])
        if keep
        else ForgottenRecord(names, before, before)
    )

    def write() -> None:
        try:
            if own_module is not None:
                layer._modules["base_layer"] = own_module
            backend.set_base_weight(layer, merged)
            record.after = PackedState.of(layer).fingerprint()
        except BaseException:
            original.put_back(layer)
            raise

    return merged, record, write


def dequantised(layer: Any) -> Tensor:
    """Return the quantised base weight of `layer` as a dense `[out, in]` tensor of its own."""
    base, backend = layer.get_base_layer(), cast(QuantizationBackend, layer.quantization_backend)
    state: Any = getattr(getattr(base, "weight", None), "quant_state", None)
    if not getattr(state, "packing_format_for_cpu", False):
        return backend.get_base_weight(base).detach().clone()
    from bitsandbytes.functional import dequantize_4bit

    absmax = state.absmax.T.reshape(-1).float()
    data, unpacked = _unpacked_for_cpu(base.weight)
    unpacked.absmax = absmax
    return dequantize_4bit(data, unpacked)


def packed_weight(base: Any) -> Any:
    """Return the tensor that holds the packed weight."""
    return base.W_q if hasattr(base, "W_q") else base.weight


def _plain_tensors(tensor: Any) -> list[Tensor]:
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor.data]
    return [plain for name in tensor.__tensor_flatten__()[0] for plain in _plain_tensors(getattr(tensor, name))]


def _unpacked_for_cpu(weight: Any) -> tuple[Tensor, Any]:
    # On a CPU with AVX512-BF16, bitsandbytes repacks a 4-bit weight at its first use for inference, and
    # `dequantize_4bit` reads the new format as the old one. Its own inverse works in state: on copies, then.
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    state = copy(weight.quant_state)
    state.original_nested = False
    return _convert_weight_packed_for_cpu_inverse(weight.data.clone(), state)


def keep_trainable(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights for the CPU in evaluation mode.

    No gradient goes through packed weights, so that an evaluation would silently spoil the training after it.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
