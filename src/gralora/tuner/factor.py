"""The holders of an adapter's parameters."""

from typing import Any

from torch import Tensor, nn


class Factor(nn.Module):
    """Module that holds one tensor and returns it when called.

    A parameter inside a module that is called meets the hooks of accelerate and FSDP, and its name,
    `….gralora_A.default.weight`, is one that TRL finds when it copies an adapter.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self) -> Tensor:
        """Return the tensor."""
        weight = self.weight
        # PEFT's FSDP1 policy makes this a unit of its own, whose weight is a view of memory that is freed on return.
        return weight if type(weight) is nn.Parameter else weight.clone()


class TiedFactor(nn.Module):
    """Module that returns the tensor of another holder when called, or its transpose, and has no parameter.

    Args:
        source: The other holder.
        layer: The layer that has it.
        container: Name of the container in which the layer has it.
        transposed: Whether to return the transpose.
    """

    def __init__(self, source: nn.Module, layer: nn.Module, container: str, transposed: bool) -> None:
        super().__init__()
        self._source = (source, layer, container)  # in a tuple, so that they do not become parts of this module
        self._transposed = transposed

    @property
    def layer(self) -> Any:
        """The layer that has the other holder."""
        return self._source[1]

    @property
    def holder(self) -> Any:
        """The other holder, in the unit that FSDP1 may have put around it."""
        source, layer, container = self._source
        holders: Any = layer._modules[container]
        return next((h for h in holders.values() if getattr(h, "_fsdp_wrapped_module", None) is source), source)

    def tensor(self) -> Tensor:
        """Return the tensor without calling the other holder.

        It is no attribute `weight`: PEFT's FSDP1 policy would take this module for one that has a parameter.
        """
        return self._turned(self.holder.weight)

    def forward(self) -> Tensor:
        """Return the tensor, by calling the other holder."""
        return self._turned(self.holder())

    def assign(self, value: Tensor) -> None:
        """Put `value` into the other holder."""
        weight = nn.Parameter(self._turned(value.detach()).contiguous(), self.holder.weight.requires_grad)
        self._source[0].weight = weight

    def _turned(self, tensor: Tensor) -> Tensor:
        return tensor.mT if self._transposed else tensor


def tensor_of(holder: Any) -> Tensor:
    """Return the tensor of a holder without calling it."""
    return holder.tensor() if isinstance(holder, TiedFactor) else holder.weight


class FactorDict(nn.ModuleDict):
    """Adapter name to parameter, stored as `Factor` modules.

    `factors["default"]` is the parameter itself; `items()` and `values()` give the holders, as PEFT
    expects of a ModuleDict. Assigning a tensor gives a leaf that keeps the `requires_grad` of the
    parameter it replaces.
    """

    def __getitem__(self, key: str) -> Any:
        return tensor_of(self._modules[key])

    def __setitem__(self, key: str, value: Tensor | nn.Module) -> None:
        if isinstance(value, nn.Module):
            super().__setitem__(key, value)
            return
        if key in self and isinstance(holder := self._modules[key], TiedFactor):
            holder.assign(value)
            return
        requires_grad = self[key].requires_grad if key in self else value.requires_grad
        if key not in self:
            super().__setitem__(key, Factor(value.detach()))
        self._modules[key].weight = nn.Parameter(value.detach(), requires_grad=requires_grad)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A state dict of PEFT's own tuner has `gralora_A.<name>` where ours has `gralora_A.<name>.weight`.
        for name in self:
            if prefix + name in state_dict:
                state_dict[f"{prefix}{name}.weight"] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *args)
