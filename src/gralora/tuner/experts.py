"""GraLoRA on the experts of a mixture, computed from the factors of each expert.

PEFT's LoRA forms `W + ΔW` of every expert at every forward. Here the pairs of a token and one of its experts are
sorted by expert, as transformers does for its grouped products, and the factors are applied to the sorted rows:

    up   = x · W_upᵀ + update(x)          by expert
    down = gate(up) · W_downᵀ + update(gate(up))

Forward and backward then cost what plain low-rank products cost, and no tensor of the size of the weights is made.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.integrations import moe

from gralora.tuner.blocks import Factors
from gralora.tuner.dtypes import update_dtype, without_autocast
from gralora.tuner.layer import GraloraLayer
from gralora.tuner.parameters import ParameterLayer, shape_of

# Rows that padding may add to a batched product, as a multiple of the rows that are needed.
_PADDING = 4


class Experts(ParameterLayer):
    """GraLoRA on the stacked weights of experts that follow transformers' experts interface, in all its layouts."""

    noun = "stacks of experts (`target_parameters`)"

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
        if getattr(base, "_is_expert_parallel", False) or not by_name.keys() <= set(self.projections(base)):
            return super().adapted_forward(base, applied)

        def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            return experts_forward(base, by_name, hidden_states, top_k_index, top_k_weights)

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


class Routing(NamedTuple):
    """Pairs of a token and an expert, sorted by expert; p is their number.

    Attributes:
        order: Positions of the sorted pairs among the unsorted.
        experts: Expert of each sorted pair.
        stops: Pair after the last one of each expert.
    """

    order: Int[Tensor, " p"]
    experts: Int[Tensor, " p"]
    stops: Int[Tensor, " experts"]

    @classmethod
    def of(cls, top_k_index: Tensor, number: int) -> "Routing":
        """Return the routing of `top_k_index` `[tokens, top_k]` to `number` experts."""
        experts, order = torch.sort(top_k_index.reshape(-1))
        # `histc` takes floats on a CPU only; unlike `bincount` it never synchronises with a GPU.
        values = experts.float() if experts.device.type in ("cpu", "mps") else experts.int()
        counts = torch.histc(values, bins=number, min=0, max=number - 1)
        return cls(order, experts, torch.cumsum(counts, 0, dtype=torch.int32))

    def padding(self) -> "Padding | None":
        """Return where the pairs are if every expert gets as many rows as the busiest; None where that is too many."""
        if self.stops.device.type != "cpu" or torch.compiler.is_compiling():
            return None  # the number of rows would have to be fetched from the device
        counts = torch.diff(self.stops, prepend=self.stops.new_zeros(1))
        number, rows = len(counts), int(counts.max())
        if number * rows > _PADDING * len(self.experts):
            return None
        starts = self.stops - counts
        places = torch.arange(len(self.experts)) - starts[self.experts] + rows * self.experts
        source = torch.zeros(number * rows, dtype=torch.int64).index_copy_(0, places, torch.arange(len(places)))
        return Padding(places, source)


class Padding(NamedTuple):
    """Sorted pairs, laid out with the same number of rows for every expert.

    Attributes:
        places: Row of each pair.
        source: Pair of each row; any pair for the rows that are not needed.
    """

    places: Int[Tensor, " p"]
    source: Int[Tensor, " rows"]


def experts_forward(
    base: Any,
    adapters: dict[str, list[tuple[GraloraLayer, str]]],
    hidden_states: Float[Tensor, "t hidden"],
    top_k_index: Int[Tensor, "t top_k"],
    top_k_weights: Float[Tensor, "t top_k"],
) -> Float[Tensor, "t hidden"]:
    """Return what `base` returns, with adapters on its projections.

    Args:
        base: Experts that follow transformers' interface.
        adapters: Name of a projection to the layers and names of the adapters on it.
        hidden_states: Input.
        top_k_index: Experts of each token.
        top_k_weights: Their weights in the output.
    """
    routing = Routing.of(top_k_index, base.num_experts)
    padding = routing.padding() if adapters else None
    top_k = top_k_index.shape[-1]

    def project(x: Tensor, name: str) -> Tensor:
        weight = getattr(base, name)
        y = grouped_product(x, weight if base.is_transposed else weight.mT, routing)
        if base.has_bias:
            y = y + getattr(base, f"{name}_bias")[routing.experts]
        for layer, adapter_name in adapters.get(name, ()):
            stored = layer.factors(adapter_name, call=True)
            dtype = update_dtype(weight.dtype, stored)
            factors = stored.scaled(layer.scaling[adapter_name], dtype, x.device)
            inputs = layer.inputs(x, adapter_name, dtype)
            with without_autocast(x):
                y = y + experts_update(inputs, factors, routing, padding).to(y.dtype)
        return y

    up_name, down_name = Experts.projections(base)
    up = project(hidden_states[routing.order // top_k], up_name)
    down = project(base._apply_gate(up) if base.has_gate else base.act_fn(up), down_name)
    if base.has_post_expert_norm:
        down = base.post_expert_norm(down)
    weighted = down * top_k_weights.reshape(-1)[routing.order].unsqueeze(-1)
    unsorted = torch.empty_like(routing.order)
    unsorted[routing.order] = torch.arange(len(routing.order), device=unsorted.device)
    total = weighted[unsorted].view(len(hidden_states), top_k, weighted.shape[-1]).sum(1)
    return total.to(hidden_states.dtype)


def experts_update(
    x: Float[Tensor, "p in"], factors: Factors, routing: Routing, padding: Padding | None
) -> Float[Tensor, "p out"]:
    """Return the updates of sorted rows, each by the factors of its expert.

    Args:
        x: Input of each pair, sorted by expert, of the dtype of `factors`.
        factors: Stacks of factors.
        routing: Which rows belong to which expert.
        padding: How to lay the rows out for batched products; None for grouped ones.
    """
    A, B, A_general, B_general = factors
    experts, k, n, _ = A.shape
    s = factors.s
    if padding is not None:
        rows = x[padding.source].view(experts, -1, k, n).transpose(1, 2)
        middle = (rows @ A).unflatten(-1, (k, s)).permute(0, 3, 2, 1, 4).flatten(-2)
        update = (middle @ B).transpose(1, 2).flatten(2)
        if A_general is not None and B_general is not None:
            update = update + rows.transpose(1, 2).flatten(2) @ A_general.mT @ B_general.mT
        return update.flatten(0, 1)[padding.places]
    by_input = [grouped_product(x[:, j * n : (j + 1) * n], A[:, j], routing) for j in range(k)]
    middle = torch.stack(by_input).unflatten(-1, (k, s)).permute(2, 1, 0, 3).flatten(-2)
    update = torch.cat([grouped_product(middle[i], B[:, i], routing) for i in range(k)], 1)
    if A_general is not None and B_general is not None:
        update = update + grouped_product(grouped_product(x, A_general.mT, routing), B_general.mT, routing)
    return update


def grouped_product(
    x: Float[Tensor, "p n"], weights: Float[Tensor, "experts n m"], routing: Routing
) -> Float[Tensor, "p m"]:
    """Return the product of each sorted row of `x` with the matrix of its expert, in the dtype of `weights`."""
    if weights.dtype == torch.float64:  # which torch's own does not take
        return torch.ops.transformers.grouped_mm_fallback(x.to(weights.dtype), weights, routing.stops)
    return moe._grouped_mm(x, weights, routing.stops)
