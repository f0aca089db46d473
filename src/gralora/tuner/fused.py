"""The fast path: a frozen linear layer and its adapter as one autograd function.

The plain path spends its time on copies, on extra passes over `[t, out]` and in Python. Here the output of
the frozen layer is this function's own, so the update is added in place; every product reads or writes
slices without copying them; the scale is folded into the small B; and the only copy is the exchange of the
middle tensor `[k, t, r]`. `applies` says where this is the same function as the plain path.

The update is computed in the dtype of the input, with two exceptions, where it is computed apart: with few tokens
in the widest dtype of input and factors, since the factors are the large tensors then; and for float16 in at least
float32, since the range of float16 is too small for a small B and for sums over many tokens.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd import forward_ad
from torch.nn.modules import linear as _linear_module
from torch.nn.modules import module as _module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from gralora.tuner.blocks import Factors, exchange, wider
from gralora.tuner.dtypes import compute_dtype, update_dtype, without_autocast

# Up to here the factors are the large tensors and the activations the small ones: a decoding step, say.
FEW_TOKENS = 32
_PLAIN = (Tensor, nn.Parameter)


def applies(base: nn.Module, x: Tensor, factors: Factors) -> bool:
    """Return whether `linear` on this base, input and adapter is the same function as the plain path."""
    if torch.compiler.is_compiling() or type(base) is not nn.Linear or type(x) not in _PLAIN:
        return False
    weight, bias = base._parameters.get("weight"), base.bias
    trained = factors.A.requires_grad
    return (
        type(weight) is nn.Parameter  # a parametrized weight is none
        and not weight.requires_grad
        and (bias is None or not bias.requires_grad)
        and x.dtype == weight.dtype
        and x.is_floating_point()  # the gradients of complex products are not these
        and x.device == weight.device
        and x.layout == weight.layout == torch.strided
        and not x.is_nested
        # The plain path of a partly frozen adapter saves no more than its trained part needs.
        and all(
            f is None or (type(f) in _PLAIN and f.device == weight.device and f.requires_grad == trained)
            for f in factors
        )
        and (not torch._C._is_any_autocast_enabled() or compute_dtype(x) == x.dtype)
        and not _is_watched(base)
    )


def _is_watched(base: nn.Module) -> bool:
    """Return whether other code observes the base: a hook, a patch, a tracer, a dispatch mode or a transform."""
    return bool(
        base._forward_hooks
        or base._forward_pre_hooks
        or base._backward_hooks
        or base._backward_pre_hooks
        or "forward" in base.__dict__
        or base._compiled_call_impl is not None
        or _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
        or (nn.Linear.__call__, nn.Linear._call_impl, nn.Linear.forward, F.linear) != _TORCHS_OWN
        or torch._C._get_tracing_state() is not None
        # Selective checkpointing keeps outputs, to which nothing may be added in place then.
        or torch._C._len_torch_dispatch_stack() > 0
        or (torch._C._len_torch_function_stack() > 0 and _is_function_watched())
        or is_transformed()
    )


def _is_function_watched() -> bool:
    """Return whether a mode sees what `F.linear` returns; the one of a default device changes nothing."""
    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())


def _torchs_own() -> tuple[Any, ...]:
    """Return what calling a linear layer runs; nothing where that is patched already."""
    functions = nn.Linear.__call__, nn.Linear._call_impl, nn.Linear.forward
    origins = _module, _module, _linear_module
    own = (getattr(f, "__globals__", None) is vars(origin) for f, origin in zip(functions, origins, strict=True))
    return (*functions, F.linear) if all(own) else ()


_TORCHS_OWN = _torchs_own()


def is_transformed() -> bool:
    """Return whether a functorch transform or forward-mode differentiation is active."""
    return _functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


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
        factors: Adapter as stored, of any dtypes; its gradients come in these.
        scale: Factor of the whole update.
    """
    with without_autocast(x):
        if torch.is_grad_enabled():
            return _Linear.apply(x, dropped, weight, bias, *factors, scale)
        return _forward(x, x if dropped is None else dropped, weight, bias, factors, scale)[0]


def _dtype_apart(x: Tensor, factors: Factors) -> torch.dtype | None:
    """Return the dtype of an update that is computed apart from the base's output, or None."""
    if x.dtype == torch.float16:
        return update_dtype(x.dtype, factors)
    return factors.widest(x.dtype) if x.shape[0] <= FEW_TOKENS else None


def _cast(factors: Factors, dtype: torch.dtype) -> Factors:
    return factors if all(f is None or f.dtype == dtype for f in factors) else factors.to(dtype)


def _scale_on_b(factors: Factors, scale: float, dtype: torch.dtype) -> Factors:
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
    if tensor.dtype != dtype:  # the product is computed in the dtype of the tensor
        tensor = tensor.to(wider(tensor.dtype, dtype))
    scaled = torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)
    return torch.mul(tensor, scale, out=scaled)


def _forward(
    x: Tensor, dropped: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors, scale: float
) -> tuple[Tensor, Factors, Tensor, Tensor | None]:
    """Return the output, the factors of its products, the middle tensors: `[k, t, r]`, exchanged; `[t, hybrid_r]`."""
    y = F.linear(x, weight, bias)
    dtype = _dtype_apart(x, factors)
    if dtype is not None:
        factors = _cast(factors, dtype)
        update, middle, middle_general = _update(dropped.to(dtype), factors)
        return y.add_(update, alpha=scale), factors, middle, middle_general
    A, B, A_general, B_general = factors = _scale_on_b(factors, scale, x.dtype)
    k = A.shape[0]
    middle = exchange(torch.bmm(_by_block(dropped, k), A))
    for y_i, middle_i, B_i in zip(y.chunk(k, 1), middle.unbind(), B.unbind(), strict=True):
        y_i.addmm_(middle_i, B_i)
    if A_general is None or B_general is None:
        return y, factors, middle, None
    middle_general = dropped @ A_general.T
    y.addmm_(middle_general, B_general.T)
    return y, factors, middle, middle_general


def _update(x: Tensor, factors: Factors) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the update without its scale, and the two middle tensors."""
    A, B, A_general, B_general = factors
    middle = exchange(torch.bmm(_by_block(x, A.shape[0]), A))
    update = torch.bmm(middle, B).transpose(0, 1).flatten(1)
    if A_general is None or B_general is None:
        return update, middle, None
    middle_general = x @ A_general.T
    update.addmm_(middle_general, B_general.T)
    return update, middle, middle_general


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
        stored = Factors(A, B, A_general, B_general)
        adapter_input = x if dropped is None else dropped
        y, factors, *middles = _forward(x, adapter_input, weight, bias, stored, scale)
        ctx.scale, ctx.dtype_apart = scale, _dtype_apart(x, stored)
        # Saving the stored factors costs nothing, and a second derivative needs them.
        for_factors = (adapter_input, *middles) if any(ctx.needs_input_grad[4:8]) else (None, None, None)
        ctx.save_for_backward(weight, *stored, *factors, *for_factors)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        weight, *saved = ctx.saved_tensors
        stored, factors, for_factors = Factors(*saved[:4]), Factors(*saved[4:8]), saved[8:]
        batched = _functorch.is_legacy_batchedtensor(g)  # of `is_grads_batched`
        with without_autocast(g):
            if torch.is_grad_enabled() or batched or is_transformed():
                gradients = _differentiable_gradients(ctx, g, weight, stored, for_factors[0])
            else:
                gradients = _gradients(ctx, g, weight, stored, factors, *for_factors)
        dx, d_dropped, *d_factors = gradients
        return dx, d_dropped, None, None, *d_factors, None


def _gradients(
    ctx: Any,
    g: Tensor,
    weight: Tensor,
    stored: Factors,
    factors: Factors,
    x: Tensor | None,
    middle: Tensor | None,
    middle_general: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, dropped and the factors, those that are wanted."""
    for_x, for_dropped, _, _, for_a, for_b, for_a_general, for_b_general, _ = ctx.needs_input_grad
    dx = g @ weight if for_x else None
    d_dropped = g.new_zeros(g.shape[0], weight.shape[1]) if for_dropped else dx
    A, B, A_general, B_general = factors
    scale_of_b = ctx.scale
    if ctx.dtype_apart is not None:  # neither B nor the middle tensors carry the scale: g does
        g, scale_of_b = _scaled(g, ctx.scale, ctx.dtype_apart), 1.0

    # d_middle is the gradient of the product x·A, block by block, exchanged back.
    g_by_block = _by_block(g, A.shape[0])
    d_middle = exchange(torch.bmm(g_by_block, B.transpose(1, 2)))
    d_middle_general = None if B_general is None else g @ B_general
    if d_dropped is not None:
        _add_to_input_gradient(d_dropped, d_middle, A, d_middle_general, A_general)
    dA = dB = dA_general = dB_general = None
    x = None if x is None else x.to(A.dtype)
    if for_a and x is not None:
        dA = _scaled(_gradient_of_A(_by_block(x, A.shape[0]), d_middle), 1.0, stored.A.dtype)
    if for_b and middle is not None:
        dB = _scaled(torch.bmm(middle.transpose(1, 2), g_by_block), scale_of_b, stored.B.dtype)
    if for_a_general and x is not None and d_middle_general is not None and stored.A_general is not None:
        dA_general = _scaled(d_middle_general.T @ x, 1.0, stored.A_general.dtype)
    if for_b_general and middle_general is not None and stored.B_general is not None:
        dB_general = _scaled(g.T @ middle_general, scale_of_b, stored.B_general.dtype)
    return dx, d_dropped if for_dropped else None, dA, dB, dA_general, dB_general


def _differentiable_gradients(
    ctx: Any, g: Tensor, weight: Tensor, stored: Factors, x: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return the same as `_gradients`, by formulas that autograd can differentiate and transforms can batch."""
    for_x, for_dropped = ctx.needs_input_grad[:2]
    dtype = g.dtype if ctx.dtype_apart is None else ctx.dtype_apart
    A, B, A_general, B_general = stored.to(dtype)
    scaled = g.to(dtype) * ctx.scale
    g_by_block = _by_block(scaled, A.shape[0])
    d_middle = exchange(torch.bmm(g_by_block, B.transpose(1, 2)))
    # The adapter's share of the gradient of its input. (`is_grads_batched` knows no `flatten`.)
    share = torch.bmm(d_middle, A.transpose(1, 2)).transpose(0, 1).reshape(g.shape[0], weight.shape[1])
    dA = dB = dA_general = dB_general = None
    if A_general is not None and B_general is not None:
        share = share + scaled @ B_general @ A_general
    if x is not None:
        x = x.to(dtype)
        x_by_block = _by_block(x, A.shape[0])
        dA = torch.bmm(x_by_block.transpose(1, 2), d_middle).to(stored.A.dtype)
        dB = torch.bmm(exchange(torch.bmm(x_by_block, A)).transpose(1, 2), g_by_block).to(stored.B.dtype)
        if stored.A_general is not None and stored.B_general is not None and A_general is not None:
            dA_general = ((scaled @ B_general).T @ x).to(stored.A_general.dtype)
            dB_general = (scaled.T @ (x @ A_general.T)).to(stored.B_general.dtype)
    share = share.to(g.dtype)
    if for_dropped:
        return g @ weight if for_x else None, share, dA, dB, dA_general, dB_general
    return g @ weight + share if for_x else None, None, dA, dB, dA_general, dB_general


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
        share = torch.bmm(d_middle, A.transpose(1, 2)).transpose(0, 1).flatten(1)
        if d_middle_general is not None:
            share.addmm_(d_middle_general, A_general)
        gradient += share
        return
    for gradient_j, middle_j, A_j in zip(gradient.chunk(A.shape[0], 1), d_middle.unbind(), A.unbind(), strict=True):
        gradient_j.addmm_(middle_j, A_j.T)
    if d_middle_general is not None:
        gradient.addmm_(d_middle_general, A_general)
