"""The fast path: a frozen linear layer and its adapter as one autograd function.

What the plain path loses is lost to copies, to extra passes over `[t, out]` and to Python. Here the
output of the frozen layer is made, so that it may be added to in place; every product reads or writes
slices where they lie; the scale rides on the small B; and the only copy is the exchange of the middle
tensor `[k, t, r]`. `applies` says where this is the same function as the plain path.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.nn.modules import module as _module

from gralora.blocks import Factors, exchange

# Up to here the factors are the large tensors and the activations the small ones: a decoding step, say.
FEW_TOKENS = 32
_PLAIN = (Tensor, nn.Parameter)


def applies(base: nn.Module, x: Tensor, factors: Factors) -> bool:
    """Return whether `linear` on this base, input and adapter is the same function as the plain path."""
    if torch.compiler.is_compiling() or type(base) is not nn.Linear or type(x) not in _PLAIN:
        return False
    weight, bias = base._parameters.get("weight"), base.bias
    return (
        type(weight) is nn.Parameter  # a parametrized weight is none
        and not weight.requires_grad
        and (bias is None or not bias.requires_grad)
        and x.dtype == weight.dtype
        and x.device == weight.device
        and x.layout == weight.layout == torch.strided
        and not x.is_nested
        and all(f is None or (type(f) in _PLAIN and f.device == weight.device) for f in factors)
        and (not torch._C._is_any_autocast_enabled() or compute_dtype(x) == x.dtype)
        and not _is_watched(base)
    )


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that a linear layer computes in on `x`: its own, or autocast's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _is_watched(base: nn.Module) -> bool:
    """Return whether somebody else is watching: a hook, a tracer, functorch, forward mode."""
    return bool(
        base._forward_hooks
        or base._forward_pre_hooks
        or base._backward_hooks
        or base._backward_pre_hooks
        or "forward" in base.__dict__
        or _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def linear(
    x: Float[Tensor, "t in"],
    dropped: Float[Tensor, "t in"] | None,
    weight: Float[Tensor, "out in"],
    bias: Float[Tensor, " out"] | None,
    factors: Factors,
    scale: float,
) -> Float[Tensor, "t out"]:
    """Return `x · weightᵀ + bias + update(x)` for a frozen `weight` and `bias`.

    Args:
        x: Input, all leading dimensions flattened into t, of the dtype of `weight`.
        dropped: The adapter's input where dropout makes it another one, else None.
        weight: Frozen weight.
        bias: Frozen bias.
        factors: Adapter as stored; it is cast to the dtype of `weight`, its gradients come in its own.
        scale: Factor of the whole update.

    Raises:
        RuntimeError: From torch, where a second derivative is asked for.
    """
    if torch.is_grad_enabled():
        return _Linear.apply(x, dropped, weight, bias, *factors, scale)
    adapter_input = x if dropped is None else dropped
    if _is_few(x, factors):
        return _forward_few(x, adapter_input, weight, bias, factors, scale)[0]
    return _forward(x, adapter_input, weight, bias, _cast(factors, weight.dtype, scale))[0]


def _is_few(x: Tensor, factors: Factors) -> bool:
    """Return whether the activations are smaller than the factors, so that they are what is cast, and never down."""
    return (
        x.shape[0] <= FEW_TOKENS
        and (factors.A.dtype == x.dtype or factors.A.dtype.itemsize > x.dtype.itemsize)
        and not torch._C._is_any_autocast_enabled()  # it would cast them back
    )


def _cast(factors: Factors, dtype: torch.dtype, scale: float) -> Factors:
    """Return the factors in `dtype`, the scale folded into the B's."""
    A, B, A_general, B_general = factors
    return Factors(
        A.to(dtype),
        _scaled(B, scale, dtype),
        None if A_general is None else A_general.to(dtype),
        None if B_general is None else _scaled(B_general, scale, dtype),
    )


def _scaled(tensor: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Return `scale * tensor`, rounded once to `dtype`; where anything is computed, contiguous."""
    if scale == 1:
        return tensor.to(dtype, memory_format=torch.contiguous_format)
    if tensor.dtype.itemsize < dtype.itemsize:  # the product is computed in the dtype of the tensor
        tensor = tensor.to(dtype)
    scaled = torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)
    return torch.mul(tensor, scale, out=scaled)


def _forward(
    x: Tensor, dropped: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the output and the two middle tensors, `[k, t, r]` exchanged and `[t, hybrid_r]`."""
    A, B, A_general, B_general = factors
    k = A.shape[0]
    y = F.linear(x, weight, bias)
    middle = exchange(torch.bmm(_by_block(dropped, k), A))
    for y_i, middle_i, B_i in zip(y.chunk(k, 1), middle.unbind(), B.unbind(), strict=True):
        y_i.addmm_(middle_i, B_i)
    if A_general is None or B_general is None:
        return y, middle, None
    middle_general = dropped @ A_general.T
    y.addmm_(middle_general, B_general.T)
    return y, middle, middle_general


def _forward_few(
    x: Tensor, dropped: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors, scale: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return what `_forward` does, the update computed in the dtype of the factors."""
    A, B, A_general, B_general = factors
    y = F.linear(x, weight, bias)
    dropped = dropped.to(A.dtype)
    middle = exchange(torch.bmm(_by_block(dropped, A.shape[0]), A))
    update = torch.bmm(middle, B).transpose(0, 1).flatten(1)
    middle_general = None
    if A_general is not None and B_general is not None:
        middle_general = dropped @ A_general.T
        update.addmm_(middle_general, B_general.T)
    return y.add_(update, alpha=scale), middle, middle_general


def _by_block(x: Tensor, k: int) -> Tensor:
    """Return rows `[t, (k n)]` as `[k, t, n]`, a view."""
    return x.view(x.shape[0], k, -1).transpose(0, 1) if x.shape[0] else x.new_empty(k, 0, x.shape[1] // k)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        A_general: Tensor | None,
        B_general: Tensor | None,
        scale: float,
    ) -> Tensor:
        factors = Factors(A, B, A_general, B_general)
        adapter_input = x if dropped is None else dropped
        ctx.few, ctx.scale, ctx.master_dtype = _is_few(x, factors), scale, A.dtype
        if ctx.few:
            y, *middles = _forward_few(x, adapter_input, weight, bias, factors, scale)
        else:
            factors = _cast(factors, weight.dtype, scale)
            y, *middles = _forward(x, adapter_input, weight, bias, factors)
        ctx.save_for_backward(adapter_input, weight, *factors, *middles)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B, A_general, B_general, middle, middle_general = ctx.saved_tensors
        for_x, for_dropped, _, _, for_a, for_b, for_a_general, for_b_general, _ = ctx.needs_input_grad
        k = A.shape[0]
        dx = g @ weight if for_x else None
        d_dropped = torch.zeros_like(x) if for_dropped else dx
        scale_of_b = ctx.scale
        if ctx.few:  # neither B nor the middle tensors carry the scale: g does
            x, g, scale_of_b = x.to(A.dtype), _scaled(g, ctx.scale, A.dtype), 1.0

        def master(gradient: Tensor, factor: float = 1.0) -> Tensor:
            return _scaled(gradient, factor, ctx.master_dtype)

        # d_middle is the gradient of the product x·A, block by block, exchanged back.
        g_by_block = _by_block(g, k)
        d_middle = exchange(torch.bmm(g_by_block, B.transpose(1, 2)))
        d_middle_general = None if B_general is None else g @ B_general
        if d_dropped is not None:
            _add_to_input_gradient(d_dropped, d_middle, A, d_middle_general, A_general)
        dA = dB = dA_general = dB_general = None
        if for_a:
            dA = master(_gradient_of_A(_by_block(x, k), d_middle))
        if for_b:
            dB = master(torch.bmm(middle.transpose(1, 2), g_by_block), scale_of_b)
        if for_a_general and d_middle_general is not None:
            dA_general = master(d_middle_general.T @ x)
        if for_b_general and middle_general is not None:
            dB_general = master(g.T @ middle_general, scale_of_b)
        return dx, d_dropped if for_dropped else None, None, None, dA, dB, dA_general, dB_general, None


def _gradient_of_A(x_by_block: Tensor, d_middle: Tensor) -> Tensor:
    """Return `x_jᵀ · d_middle_j` for every j, `[k, n, r]`."""
    if x_by_block.shape[1] <= FEW_TOKENS:
        return torch.bmm(x_by_block.transpose(1, 2), d_middle)
    # With many rows, the short side first takes a third of the time, the transposed copy included.
    return torch.bmm(d_middle.transpose(1, 2), x_by_block).transpose(1, 2)


def _add_to_input_gradient(
    gradient: Tensor, d_middle: Tensor, A: Tensor, d_middle_general: Tensor | None, A_general: Tensor | None
) -> None:
    """Add the adapter's share to the gradient of its input, in place."""
    if gradient.dtype != A.dtype:
        gradient += torch.bmm(d_middle, A.transpose(1, 2)).transpose(0, 1).flatten(1)
        if d_middle_general is not None:
            gradient += d_middle_general @ A_general
        return
    for gradient_j, middle_j, A_j in zip(gradient.chunk(A.shape[0], 1), d_middle.unbind(), A.unbind(), strict=True):
        gradient_j.addmm_(middle_j, A_j.T)
    if d_middle_general is not None:
        gradient.addmm_(d_middle_general, A_general)
