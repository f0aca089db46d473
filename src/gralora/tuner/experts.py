"""GraLoRA on the experts of a mixture, computed from the factors of each expert.

PEFT's LoRA forms `W + ΔW` of every expert at every forward. Here the pairs of a token and one of its experts are
sorted by expert, as transformers does for its grouped products, and the factors are applied to the sorted rows:

    up   = x · W_upᵀ + update(x)          by expert
    down = gate(up) · W_downᵀ + update(gate(up))

Forward and backward then cost what low-rank products cost, and no tensor of the size of the weights is made. The
products are in `grouped`.
"""

import inspect
from collections.abc import Callable
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.integrations import moe

from gralora.tuner.dtypes import update_dtype, without_autocast
from gralora.tuner.grouped import Routing, add_update, product
from gralora.tuner.layer import GraloraLayer
from gralora.tuner.parameters import ParameterLayer, shape_of

# Types of models whose experts were `block_sparse_moe.experts.N.w1`, `.w3` (gate, up) and `.w2` in transformers 4.
_LIKE_MIXTRAL = {"mixtral", "minimax", "minimax_m2"}


class Experts(ParameterLayer):
    """GraLoRA on the stacked weights of experts that follow transformers' experts interface, in all its layouts."""

    noun = "stacks of experts (`target_parameters`)"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        # Here, since the compiler cannot trace how an interface is recognised.
        self._projections = self.projections(self.get_base_layer())

    def record(self) -> dict[str, Any]:
        """Return the record of a parameter, and whether the experts were named as in Mixtral in transformers 4."""
        config: Any = getattr(self.get_base_layer(), "config", None)
        former = {"former": "mixtral"} if getattr(config, "model_type", None) in _LIKE_MIXTRAL else {}
        return super().record() | former

    @classmethod
    def projections(cls, base: nn.Module) -> tuple[str, ...]:
        """Return the names of the stacked weights, the first one first; none for another module."""
        if not follows_interface(base):
            return ()
        return ("gate_up_proj" if getattr(base, "has_gate", True) else "up_proj", "down_proj")

    @classmethod
    def dropout_refusal(cls, base: nn.Module, parameter_name: str) -> str | None:
        """Return None for a projection, whose inputs are seen."""
        if parameter_name in cls.projections(base):
            return None
        return super().dropout_refusal(base, parameter_name)

    def adapted_forward(self, base: nn.Module, applied: dict[GraloraLayer, list[str]]) -> Callable[..., Any]:
        """Return the forward of `base` with the adapters in `applied`."""
        by_name: dict[str, list[tuple[GraloraLayer, str]]] = {
            layer.parameter_name: [(layer, name) for name in names] for layer, names in applied.items()
        }
        if getattr(base, "_is_expert_parallel", False) or not by_name.keys() <= set(self._projections):
            return super().adapted_forward(base, applied)

        def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            return experts_forward(base, self._projections, by_name, hidden_states, top_k_index, top_k_weights)

        return forward


def follows_interface(base: nn.Module) -> bool:
    """Return whether `base` is of a class that transformers' `use_experts_implementation` has made."""
    code = getattr(type(base).forward, "__code__", None)
    return code is not None and code.co_filename == inspect.getsourcefile(moe) and hasattr(base, "is_transposed")


def expert_stacks(base: nn.Module) -> tuple[str, ...]:
    """Return the names of the stacks of weights in `base`, if it holds the experts of a mixture."""
    if not type(base).__name__.endswith("Experts"):
        return Experts.projections(base)
    stacks = tuple(name for name, p in base._parameters.items() if p is not None and len(shape_of(base, name)) == 3)
    return Experts.projections(base) or stacks


def experts_forward(
    base: Any,
    projections: tuple[str, ...],
    adapters: dict[str, list[tuple[GraloraLayer, str]]],
    hidden_states: Float[Tensor, "t hidden"],
    top_k_index: Int[Tensor, "t top_k"],
    top_k_weights: Float[Tensor, "t top_k"],
) -> Float[Tensor, "t hidden"]:
    """Return what `base` returns, with adapters on its projections.

    Args:
        base: Experts that follow transformers' interface.
        projections: Names of their weights, the first one first.
        adapters: Name of a projection to the layers and names of the adapters on it.
        hidden_states: Input.
        top_k_index: Experts of each token.
        top_k_weights: Their weights in the output.
    """
    routing = Routing(top_k_index, base.num_experts)

    def project(x: Tensor, tokens: Tensor | None, name: str) -> Tensor:
        weight = getattr(base, name)
        y = product(x, weight if base.is_transposed else weight.mT, routing)
        if base.has_bias:
            y = y + getattr(base, f"{name}_bias")[routing.experts]
        for layer, adapter_name in adapters.get(name, ()):
            factors = layer.factors(adapter_name, call=True)
            dropped = layer.gralora_dropout[adapter_name](x)
            dtype = update_dtype(weight.dtype, factors)
            with without_autocast(x):
                y = add_update(
                    y, dropped, tokens if dropped is x else None, factors, layer.scaling[adapter_name], dtype, routing
                )
        return y

    up_name, down_name = projections
    up = project(routing.rows_of(hidden_states), hidden_states, up_name)
    down = project(base._apply_gate(up) if base.has_gate else base.act_fn(up), None, down_name)
    if base.has_post_expert_norm:
        down = base.post_expert_norm(down)
    weighted = routing.by_token(down) * top_k_weights.unsqueeze(-1)
    return weighted.sum(1).to(hidden_states.dtype)
