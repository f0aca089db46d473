"""GraLoRA on a parameter of any module, by calling the module with `W + ΔW` in the parameter's place."""

from collections.abc import Callable
from typing import Any

import torch
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn
from torch.func import functional_call

from gralora.tuner import blocks
from gralora.tuner.dtypes import without_autocast
from gralora.tuner.layer import GraloraLayer
from gralora.tuner.merging.sharing import own_copy
from gralora.tuner.merging.weight import WeightRef, identity

# Experts that store their weights as `[experts, in, out]` without saying so in an attribute `is_transposed`.
_TRANSPOSED = {"Llama4TextExperts"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class ParameterLayer(GraloraLayer):
    """GraLoRA on one parameter of a module: a matrix `[out, in]`, or a stack of matrices, one for each expert.

    Several adapted parameters of a module have a layer each, around one another. The outermost is called, and calls
    the module once. Factors of a stack are stacks: `gralora_A` is `[experts, k, n, r]`.
    """

    noun = "parameters that are a matrix or a stack of matrices (`target_parameters`)"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.experts = shape_of(self.get_base_layer(), self.parameter_name)[:-2]

    @classmethod
    def covers(cls, base: nn.Module, backend: QuantizationBackend | None) -> bool:
        """Return False: only a parameter that is asked for by its name is adapted so."""
        return False

    @classmethod
    def parameter_refusal(cls, base: nn.Module, parameter_name: str) -> str | None:
        """Return why a parameter of `base` cannot be adapted, or None."""
        parameter, shape = _parameter(base, parameter_name), shape_of(base, parameter_name)
        if len(shape) not in (2, 3):
            return f"a parameter must be a matrix or a stack of matrices; got the shape {shape}."
        if type(parameter) is not nn.Parameter:
            return f"a parameter must be a plain nn.Parameter; got {type(parameter).__name__}."
        if not parameter.is_floating_point() or parameter.dtype.itemsize == 1:
            return f"a parameter must be of a floating-point type of 16 bits or more; got {parameter.dtype}."
        return None

    @classmethod
    def dropout_refusal(cls, base: nn.Module, parameter_name: str) -> str | None:
        """Return why the input of a parameter cannot be dropped out, or None where it can."""
        return "an adapter on a parameter must have gralora_dropout=0, since it does not see the parameter's input."

    @classmethod
    def features(cls, base: nn.Module, parameter_name: str = "weight") -> tuple[int, int]:
        """Return the widths of one matrix."""
        out_features, in_features = shape_of(base, parameter_name)[-2:]
        return (out_features, in_features) if is_transposed(base, parameter_name) else (in_features, out_features)

    def weight_ref(self) -> WeightRef:
        """Return where the parameter is."""
        path, _, name = self.parameter_name.rpartition(".")
        base = self.get_base_layer()
        turn = torch.t if is_transposed(base, self.parameter_name) else identity
        return WeightRef(base.get_submodule(path), name, turn, turn, *self.experts)

    def record(self) -> dict[str, Any]:
        """Return the name of the parameter and how a stack is stored.

        "transposed": its matrices are `[in, out]`, "unmarked": without an attribute that says so, "interleaved": the
        rows of gate and up alternate.
        """
        base: Any = self.get_base_layer()
        transposed = is_transposed(base, self.parameter_name)
        flags = {
            "transposed": transposed,
            "unmarked": transposed and not getattr(base, "is_transposed", False),
            "interleaved": self.parameter_name == "gate_up_proj" and not getattr(base, "is_concatenated", True),
        }
        set_flags = {name: True for name, is_set in flags.items() if is_set}
        return {"kind": "parameter", "parameter": self.parameter_name} | set_flags

    def weight_name(self, name: str) -> str:
        """Return the name of the module and of the parameter."""
        while name.endswith(".base_layer"):
            name = name.removesuffix(".base_layer")
        return f"{name}.{self.parameter_name}"

    def nest(self) -> dict[str, GraloraLayer]:
        """Return the layers of all adapted parameters of the module by their names; this one is first."""
        found: dict[str, GraloraLayer] = {}
        layer: Any = self
        while isinstance(layer, ParameterLayer):
            found[layer.parameter_name] = layer
            layer = layer.base_layer
        return found

    def merge_refusal(self, own_weights: bool = False) -> str | None:
        """Return why no merge is possible at the moment, and the way out; None where one is."""
        if any(layer._sharing.module for layer in self.nest().values()):
            return (
                "its base is called from elsewhere in the model too, which must not see the merged weights. Put the "
                "adapter on a copy, or take it out of `target_modules`."
            )
        return super().merge_refusal(own_weights)

    def __getattr__(self, name: str) -> Any:
        # Callers read attributes of the module that they know: `num_experts`, `in_proj_bias`, `batch_first`.
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self._modules.get("base_layer")
            if base is None or (name.startswith("_") and name != "_qkv_same_embed_dim"):
                raise
            return getattr(base, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's output with the updates of all active adapters added to its parameters.

        Raises:
            NotImplementedError: `adapter_names` asks for a different adapter in each row.
        """
        if kwargs.pop("adapter_names", None) is not None:
            raise NotImplementedError(
                "`adapter_names`, a different adapter for each row of a batch, cannot be used yet."
            )
        base = self.get_base_layer()
        applied: dict[GraloraLayer, list[str]] = {}
        for layer in self.nest().values():
            if names := layer._applied_adapters():
                applied[layer] = names
        if not applied:
            return base(*args, **kwargs)
        return call_with_hooks(base, self.adapted_forward(base, applied), args, kwargs)

    def adapted_forward(self, base: nn.Module, applied: dict[GraloraLayer, list[str]]) -> Callable[..., Any]:
        """Return the forward of `base` with the adapters in `applied`, without the hooks of `base`.

        Args:
            base: The module.
            applied: The layers of its parameters that have adapters to apply, and their names.
        """

        def forward(*args: Any, **kwargs: Any) -> Any:
            weights = {layer.parameter_name: _updated(layer, names) for layer, names in applied.items()}
            return functional_call(_without_hooks(base) if _is_hooked(base) else base, weights, args, kwargs)

        return forward

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the module, with the adapters of all its parameters merged or taken off."""
        for layer in self.nest().values():
            super(ParameterLayer, layer).unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        return self.get_base_layer()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return False: PEFT converts matrices of linear layers only. `gralora export` converts these."""
        return False


def is_transposed(base: nn.Module, parameter_name: str) -> bool:
    """Return whether the matrices of a stack are stored as `[in, out]`."""
    stack = len(shape_of(base, parameter_name)) == 3
    return stack and (getattr(base, "is_transposed", False) or type(base).__name__ in _TRANSPOSED)


def call_with_hooks(base: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Return `forward(*args, **kwargs)`, run in the place of the forward of `base`, between its hooks."""
    # accelerate puts its own function in the place of `forward` and calls `_old_forward`.
    name = "_old_forward" if "_old_forward" in base.__dict__ else "forward"
    own = base.__dict__.get(name)
    if not _is_hooked(base):
        return forward(*args, **kwargs)
    base.__dict__[name] = forward
    try:
        return base(*args, **kwargs)
    finally:
        if own is None:
            del base.__dict__[name]
        else:
            base.__dict__[name] = own


def _is_hooked(base: nn.Module) -> bool:
    """Return whether calling `base` does more than its class's forward."""
    return "forward" in base.__dict__ or any(getattr(base, hooks) for hooks in _HOOKS)


def _without_hooks(base: nn.Module) -> nn.Module:
    """Return a copy of `base` with the same parameters and children, and without hooks."""
    plain = own_copy(base)
    for name in ("forward", "_old_forward", "_hf_hook"):
        plain.__dict__.pop(name, None)
    for hooks in _HOOKS:
        plain.__dict__[hooks].clear()
    return plain


def _updated(layer: GraloraLayer, names: list[str]) -> Tensor:
    """Return the parameter of `layer` plus the updates of the named adapters, summed in at least float32."""
    ref = layer.weight_ref()
    weight: Any = ref.parameter
    dtype = blocks.wider(weight.dtype, torch.float32)
    with without_autocast(weight):
        total = weight.to(dtype)
        for name in names:
            factors = layer.factors(name, call=True).scaled(layer.scaling[name], dtype, weight.device)
            update = blocks.update_matrix(factors)
            total = total + (update.mT if ref.matrix is torch.t else update)
        return total.to(weight.dtype)


def _parameter(base: nn.Module, parameter_name: str) -> Any:
    path, _, name = parameter_name.rpartition(".")
    return getattr(base.get_submodule(path), name)


def shape_of(base: nn.Module, parameter_name: str) -> tuple[int, ...]:
    """Return the shape of a parameter of `base`."""
    parameter = _parameter(base, parameter_name)
    return tuple(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves an empty tensor
