"""Adapters on a base that transformers' tensor parallelism has sliced.

Each of the processes holds a slice of the base weight and the whole adapter. What a plan calls "colwise" takes
the whole input and returns a slice of the output features; "rowwise" takes a slice of the input features and
returns the whole output. Only the middle tensor `h = x · A` crosses the slices, `k·r + hybrid_r` numbers a token:

    plan       forward                                      backward
    colwise    h from the whole x; the slice's columns of B  sum the gradient of h over the processes
    rowwise    sum h over the processes; all columns of B    nothing
    others     x and output are whole: as in one process     nothing

The factor that is sliced (B in "colwise", A in "rowwise") has a gradient in its slice only, which is summed too.
So all processes hold the same parameters and the same gradients, and optimizers, clipping and saving work as usual.
"""

import functools
import re
from collections.abc import Iterator
from enum import Enum
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from jaxtyping import Float
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce, wait_tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from gralora.tuner.blocks import Factors, exchange
from gralora.tuner.config import LayerSettings
from gralora.tuner.layer import GraloraLayer


class Layout(Enum):
    """Which features of a layer a process holds."""

    OUT_SLICE = "colwise"
    IN_SLICE = "rowwise"
    WHOLE = "whole"


_LAYOUTS = {
    "colwise": Layout.OUT_SLICE,
    "rowwise": Layout.IN_SLICE,
    # Around these, transformers gathers or slices, so that the layer's input and output are whole.
    "colwise_gather_output": Layout.WHOLE,
    "colwise_rep": Layout.WHOLE,
    "rowwise_split_input": Layout.WHOLE,
    "rowwise_rep": Layout.WHOLE,
}


def placement_of(model: nn.Module, name: str, module: nn.Module) -> tuple[Layout, DeviceMesh] | None:
    """Return how tensor parallelism slices a module of `model`, or None for a model that is not parallel.

    Args:
        model: Model that the adapter is put on.
        name: Name of the module in it.
        module: The module, which `placement_refusal` does not refuse.
    """
    plan, mesh = _plan_and_mesh(model, name)
    if mesh is None:
        return None
    return (_LAYOUTS[plan] if isinstance(getattr(module, "weight", None), DTensor) else Layout.WHOLE), mesh


def placement_refusal(
    model: nn.Module, name: str, module: nn.Module, kind: type[GraloraLayer], quantised: bool
) -> str | None:
    """Return why no adapter can follow the way in which tensor parallelism slices a module, or None.

    Args:
        model: Model that the adapter is put on.
        name: Name of the module in it.
        module: The module.
        kind: The kind of layer that it gets.
        quantised: Whether its weight is quantised.
    """
    weight = getattr(module, "weight", None)
    sliced = isinstance(weight, DTensor)
    plan, mesh = _plan_and_mesh(model, name)
    if mesh is None:
        managed_by_fsdp = getattr(module, "_is_fsdp_managed_module", False)
        if sliced and (not managed_by_fsdp or "tp" in (weight.device_mesh.mesh_dim_names or ())):
            return (
                "a layer whose weight is sliced must be in a tensor-parallel plan of transformers; got a DTensor with "
                f"placements {weight.placements}, and no plan. Load the model with "
                '`from_pretrained(..., distributed_config=DistributedConfig(tp_size=..., tp_plan="auto"))`.'
            )
        return None
    if not sliced and plan in (None, "replicate"):
        return None
    way_out = "Change its plan with `DistributedConfig(tp_plan={...})`."
    if plan not in _LAYOUTS:
        known = ", ".join(map(repr, _LAYOUTS))
        return f"its tensor-parallel plan must be one of {known}; got {plan!r}. {way_out}"
    if quantised or not sliced:
        return (
            f"a layer of the tensor-parallel plan {plan!r} must have an unquantised weight that is a DTensor, as "
            f"transformers 5.17 and later make it; got {type(weight).__name__}. {way_out}"
        )
    if not kind.can_be_sliced:
        return f"{kind.noun} must not be sliced by tensor parallelism; its plan is {plan!r}. {way_out}"
    return None


def whole_training_refusal(model: nn.Module, name: str, module: nn.Module) -> str | None:
    """Return why a copy of a module cannot be trained, as PEFT does for `modules_to_save`, or None."""
    if any(isinstance(p, DTensor) for p in module.parameters()) and _plan_and_mesh(model, name)[1] is not None:
        return (
            "a module in `modules_to_save` must not be sliced by tensor parallelism; PEFT's copy of it would get no "
            "gradient. Make it a target, or take it out of the tensor-parallel plan."
        )
    return None


def _plan_and_mesh(model: nn.Module, name: str) -> tuple[str | None, DeviceMesh | None]:
    """Return the plan of the module `name` and the mesh, as the model around it that transformers loaded says."""
    owner, rest = model, name
    while (mesh := getattr(owner, "_device_mesh", None)) is None and "." in rest:
        child, _, rest = rest.partition(".")
        owner = owner.get_submodule(child)
    if not isinstance(mesh, DeviceMesh) or (mesh.mesh_dim_names and "tp" not in mesh.mesh_dim_names):
        return None, None
    mesh = mesh["tp"] if mesh.ndim > 1 else mesh
    if mesh.size() == 1:
        return None, None
    generic = re.sub(r"\.\d+(?=\.|$)", ".*", rest)
    return (getattr(owner, "tp_plan", None) or {}).get(generic), mesh


class TensorParallelLayer(GraloraLayer):
    """A layer in tensor parallelism, where every process holds a slice of the base layer, or all of it.

    The parameters are whole, `in_features` and `out_features` those of the whole layer.

    Attributes:
        kind: The kind of layer that it is in a model of one process.
    """

    kind: ClassVar[type[GraloraLayer]]

    def __init__(
        self,
        base_layer: nn.Module,
        quantization_backend: QuantizationBackend | None,
        layout: Layout,
        mesh: DeviceMesh,
    ) -> None:
        super().__init__(base_layer, quantization_backend)
        self.layout = layout
        self.mesh = mesh

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Pickle finds classes by name, and `parallel` makes this one at run time.
        return _new, (self.kind,), self.__getstate__()

    def add_adapter(self, adapter_name: str, settings: LayerSettings, on_meta: bool = False) -> None:
        """Create the parameters of one adapter, the same in every process; each process must call this."""
        super().add_adapter(adapter_name, settings, on_meta)
        if not on_meta:
            for tensor in self.factors(adapter_name):
                if tensor is not None:
                    _broadcast_(tensor.detach(), self.mesh)
        if settings.gralora_dropout and self.layout is not Layout.IN_SLICE:
            self.gralora_dropout[adapter_name] = CommonDropout(settings.gralora_dropout, self.mesh)

    def _add_update(self, result: Tensor, x: Tensor, adapter_name: str, factors: Factors) -> Tensor:
        # Before dropout, whose mask the processes share: one that raises later would leave the others waiting.
        width = len(_own(self.in_features, self.mesh)) if self.layout is Layout.IN_SLICE else self.in_features
        if self.layout is not Layout.WHOLE and x.shape[-1] != width:
            raise RuntimeError(
                f"the input of a {self.layout.value!r} layer must have {width} of its {self.in_features} features in "
                f"this process; got {x.shape[-1]}. The plan of the model and what its modules pass on do not agree."
            )
        return super()._add_update(result, x, adapter_name, factors)

    def add(self, result: Tensor, x: Tensor, factors: Factors) -> Tensor:
        """Return `result + update(x)`, where either may be a slice of the features."""
        if self.layout is Layout.WHOLE:
            return super().add(result, x, factors)
        rows = x.reshape(-1, x.shape[-1])
        if self.layout is Layout.OUT_SLICE:
            update = out_slice_update(rows, factors, _own(self.out_features, self.mesh), self.mesh)
        else:
            update = in_slice_update(rows, factors, _own(self.in_features, self.mesh), self.mesh)
        return (result + update.view(result.shape)).to(result.dtype)


@functools.cache
def parallel(kind: type[GraloraLayer]) -> type[TensorParallelLayer]:
    """Return the class for layers of `kind` in a tensor-parallel model."""
    return type(f"TensorParallel{kind.__name__}", (TensorParallelLayer, kind), {"__module__": __name__, "kind": kind})


def _new(kind: type[GraloraLayer]) -> TensorParallelLayer:
    """Return an empty layer, for unpickling."""
    parallel_kind = parallel(kind)
    return parallel_kind.__new__(parallel_kind)


class CommonDropout(nn.Dropout):
    """Dropout with the same mask in every process; the inputs must be equal."""

    def __init__(self, p: float, mesh: DeviceMesh) -> None:
        super().__init__(p)
        self.mesh = mesh

    def forward(self, x: Tensor) -> Tensor:
        """Return x times the mask that the first process draws, in training."""
        if not self.training:
            return x
        return x * _broadcast_(super().forward(torch.ones_like(x)), self.mesh)


def out_slice_update(
    x: Float[Tensor, "t in"], factors: Factors, own: range, mesh: DeviceMesh
) -> Float[Tensor, "t own"]:
    """Return the output features `own` of the update by `factors`."""
    A, B, A_general, B_general = factors
    k, n, _ = A.shape
    B = _sum_gradient(B, mesh)
    h = _sum_gradient(exchange(torch.bmm(x.unflatten(1, (k, n)).transpose(0, 1), A)), mesh)
    update = torch.cat([h[i] @ B[i, :, part] for i, part in _by_block(own, B.shape[2])], dim=1)
    if A_general is not None and B_general is not None:
        B_general = _sum_gradient(B_general, mesh)[own.start : own.stop]
        update = update + _sum_gradient(x @ A_general.T, mesh) @ B_general.T
    return update


def in_slice_update(
    x: Float[Tensor, "t own"], factors: Factors, own: range, mesh: DeviceMesh
) -> Float[Tensor, "t out"]:
    """Return the update by `factors`, of which `x` is the input features `own`."""
    A, B, A_general, B_general = factors
    k, n, r = A.shape
    A = _sum_gradient(A, mesh)
    h = [x.new_zeros(x.shape[0], r)] * k
    for j, part in _by_block(own, n):
        first = j * n + part.start - own.start
        h[j] = x[:, first : first + part.stop - part.start] @ A[j, part]
    update = torch.bmm(exchange(_sum(torch.stack(h), mesh)), B).transpose(0, 1).flatten(1)
    if A_general is not None and B_general is not None:
        A_general = _sum_gradient(A_general, mesh)[:, own.start : own.stop]
        update = update + _sum(x @ A_general.T, mesh) @ B_general.T
    return update


def _own(features: int, mesh: DeviceMesh) -> range:
    """Return the features in this process's slice: equal slices, and what is left in the last ones."""
    size, rank = -(-features // mesh.size()), mesh.get_local_rank()
    return range(min(rank * size, features), min((rank + 1) * size, features))


def _by_block(features: range, width: int) -> Iterator[tuple[int, slice]]:
    """Yield each block of `width` features that `features` reaches, with the part of the block."""
    for block in range(features.start // width, -(-features.stop // width)):
        first = block * width
        yield block, slice(max(features.start - first, 0), min(features.stop - first, width))


def _sum(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return the sum over all processes; they continue alike, so the gradient passes unchanged."""
    return _Sum.apply(tensor, mesh)


def _sum_gradient(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return `tensor`; the processes continue with different slices of it, so the gradients are summed."""
    return _SumGradient.apply(tensor, mesh)


# Each is the other's backward pass, so that derivatives of any order are summed where they have to be.
class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, mesh: DeviceMesh) -> Tensor:
        ctx.mesh = mesh
        return wait_tensor(all_reduce(tensor.contiguous(), "sum", mesh))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return _SumGradient.apply(g, ctx.mesh), None


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, mesh: DeviceMesh) -> Tensor:
        ctx.mesh = mesh
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(g, ctx.mesh), None


def _broadcast_(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """Give `tensor` the first process's values, in place."""
    group = mesh.get_group()
    dist.broadcast(tensor, dist.get_global_rank(group, 0), group=group)
    return tensor
