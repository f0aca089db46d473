# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""The mathematics of GraLoRA on plain tensors: one map, three views.

The weight `[out, in]` is cut into k by k blocks. Input block `j` has `n = in/k` features, output block
`i` has `m = out/k`, and the pair (i, j) owns an adapter of rank `s = r/k`. With `A[j]` of shape `[n, r]`
read as `[n, (i s)]` and `B[i]` of shape `[r, m]` read as `[(j s), m]`, output block `i` of the update is

    scale * sum_j x_j · A[j][:, i·s:(i+1)·s] · B[i][j·s:(j+1)·s, :]

(Jung et al., NeurIPS 2025, arXiv 2505.20355, section 3). The hybrid part is a plain LoRA of rank
`hybrid_r` beside it: `scale * B_general · A_general · x`.

`apply` and `add` are the map itself, `dense` and `update_matrix` its matrix, `lora_factors` the same matrix as a
product of two. Nothing here knows about modules or PEFT.

The experts of a mixture each have a map of their own: their factors lie in one stack, `[experts, k, n, r]` and so on.
`update_matrix` takes a stack; for the others, take one expert out of it.
"""

from typing import NamedTuple

import torch
from jaxtyping import Inexact
from torch import Tensor


class Factors(NamedTuple):
    """The tensors of one adapter on one layer, on one device; all with a first dimension of experts, or none."""

    A: Inexact[Tensor, "*experts k n r"]
    B: Inexact[Tensor, "*experts k r m"]
    A_general: Inexact[Tensor, "*experts hybrid_r in"] | None = None
    B_general: Inexact[Tensor, "*experts out hybrid_r"] | None = None

    @property
    def k(self) -> int:
        """Blocks per side of the weight."""
        return self.A.shape[-3]

    @property
    def s(self) -> int:
        """Rank of one pair of blocks, `r / k`."""
        return self.A.shape[-1] // self.A.shape[-3]

    @property
    def in_features(self) -> int:
        """Width of the input, `k * n`."""
        return self.A.shape[-3] * self.A.shape[-2]

    @property
    def out_features(self) -> int:
        """Width of the output, `k * m`."""
        return self.B.shape[-3] * self.B.shape[-1]

    @property
    def transposed(self) -> "Factors":
        """The factors of the transposed ΔW, views of the same tensors."""
        A, B, A_general, B_general = self
        general = None if A_general is None or B_general is None else (B_general.mT, A_general.mT)
        return Factors(B.mT, A.mT, *(general or ()))

    def expert(self, index: int) -> "Factors":
        """Return the factors of one expert, views into the stack."""
        A, B, *general = self
        return Factors(A[index], B[index], *(factor if factor is None else factor[index] for factor in general))

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> "Factors":
        """Return the same factors in `dtype`, and on `device` where one is given."""
        A, B, A_general, B_general = self
        return Factors(
            A.to(device=device, dtype=dtype),
            B.to(device=device, dtype=dtype),
            None if A_general is None else A_general.to(device=device, dtype=dtype),
            None if B_general is None else B_general.to(device=device, dtype=dtype),
        )

    def scaled(self, scale: float, dtype: torch.dtype, device: torch.device | None = None) -> "Factors":
        """Return the same factors in `dtype`, the B's times `scale`, computed in the wider dtype and rounded once."""
        A, B, A_general, B_general = self.to(self.widest(dtype), device)
        return Factors(A, B * scale, A_general, None if B_general is None else B_general * scale).to(dtype)

    def widest(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype that holds every value of `dtype` and of the factors."""
        for factor in self:
            if factor is not None and factor.dtype != dtype:
                dtype = wider(dtype, factor.dtype)
        return dtype


def factor_shapes(
    k: int, r: int, hybrid_r: int, in_features: int, out_features: int, experts: tuple[int, ...] = ()
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...] | None, tuple[int, ...] | None]:
    """Return the shapes of `Factors`, in its order; None for the hybrid part where `hybrid_r` is 0.

    Where k does not divide `in_features`, the last input block reaches beyond them.

    Example:
        >>> factor_shapes(k=2, r=4, hybrid_r=0, in_features=6, out_features=10)
        ((2, 3, 4), (2, 4, 5), None, None)
        >>> factor_shapes(k=2, r=4, hybrid_r=1, in_features=5, out_features=10, experts=(8,))
        ((8, 2, 3, 4), (8, 2, 4, 5), (8, 1, 6), (8, 10, 1))
    """
    n = -(-in_features // k)
    A, B = (*experts, k, n, r), (*experts, k, r, out_features // k)
    return (
        A,
        B,
        (*experts, hybrid_r, k * n) if hybrid_r else None,
        (*experts, out_features, hybrid_r) if hybrid_r else None,
    )


def wider(first: torch.dtype, second: torch.dtype) -> torch.dtype:
    """Return the dtype that holds every value of both. torch does not promote 8-bit floats, so the other dtype wins."""
    if first.itemsize == 1 or second.itemsize == 1:
        return second if first.itemsize == 1 else first
    return torch.promote_types(first, second)


def exchange(h: Inexact[Tensor, "k t r"]) -> Inexact[Tensor, "k t r"]:
    """Swap the block index with the block inside the rank: `[j, t, (i s)]` becomes `[i, t, (j s)]`.

    Its own inverse. This is the only place where a block of the input meets another block of the output.
    """
    k, t, r = h.shape
    return h.view(k, t, k, r // k).permute(2, 1, 0, 3).reshape(k, t, r)


def add(
    result: Inexact[Tensor, "t out"], x: Inexact[Tensor, "t in"], factors: Factors, scale: float = 1.0
) -> Inexact[Tensor, "t out"]:
    """Return `result + update(x)`; `result` is not changed.

    Args:
        result: Output of the frozen layer, of the dtype of `x`.
        x: Input, all leading dimensions flattened into t.
        factors: Adapter, of the dtype of `x`.
        scale: Factor of the whole update.
    """
    A, B, A_general, B_general = factors
    k, n, _ = A.shape
    middle = exchange(torch.bmm(x.unflatten(1, (k, n)).transpose(0, 1), A))
    by_block = result.unflatten(1, (k, B.shape[2])).transpose(0, 1)
    result = torch.baddbmm(by_block, middle, B, alpha=scale).transpose(0, 1).flatten(1)
    if A_general is not None and B_general is not None:
        result = torch.addmm(result, x @ A_general.T, B_general.T, alpha=scale)
    return result


def apply(x: Inexact[Tensor, "*lead in"], factors: Factors, scale: float = 1.0) -> Inexact[Tensor, "*lead out"]:
    """Return the update alone, for any number of leading dimensions, none included.

    Raises:
        ValueError: The last dimension of `x` is not the width that `factors` take.

    Example:
        >>> ones = Factors(A=torch.ones(2, 3, 2), B=torch.ones(2, 2, 1))
        >>> apply(torch.arange(6.0), ones, scale=1.0)
        tensor([15., 15.])
    """
    if x.shape[-1] != factors.in_features:
        raise ValueError(f"`x` must have {factors.in_features} features in its last dimension; got {tuple(x.shape)}.")
    zero = x.new_zeros(x[..., 0].numel(), factors.out_features)
    return add(zero, x.reshape(-1, factors.in_features), factors, scale).view(*x.shape[:-1], factors.out_features)


@torch.no_grad()
def dense(
    factors: Factors,
    scale: float,
    start: int = 0,
    stop: int | None = None,
    out: Inexact[Tensor, "rows in"] | None = None,
) -> Inexact[Tensor, "rows in"]:
    """Return the matrix ΔW `[out, in]` of the update, `apply(x) = x ΔWᵀ`, without gradient.

    Every block is one product of `[m, s]` and `[s, n]` written into its place, so that the result is the
    only tensor of its size. The rank is at most min(k·r + hybrid_r, in, out).

    Args:
        factors: Adapter.
        scale: Factor of the whole update.
        start: First row that is wanted.
        stop: Row after the last one; all by default.
        out: Where to write it, a new tensor by default.
    """
    A, B, A_general, B_general = factors
    k, n, _ = A.shape
    m, s = B.shape[2], factors.s
    stop = k * m if stop is None else stop
    delta = A.new_empty(stop - start, k * n) if out is None else out
    for i in range(start // m, -(-stop // m)):
        first, last = max(start, i * m), min(stop, (i + 1) * m)
        B_i = B[i, :, first - i * m : last - i * m].T
        for j in range(k):
            block = delta[first - start : last - start, j * n : (j + 1) * n]
            torch.mm(B_i[:, j * s : (j + 1) * s], A[j, :, i * s : (i + 1) * s].T, out=block)
    if A_general is not None and B_general is not None:
        delta.addmm_(B_general[start:stop], A_general)
    return delta.mul_(scale)


def update_matrix(factors: Factors) -> Inexact[Tensor, "*experts out in"]:
    """Return ΔW of scale 1 as a tensor with gradients, of one weight or of a stack; `dense` is faster without."""
    A, B, A_general, B_general = factors
    k, s = factors.k, factors.s
    # Letters: e experts, j input block, i output block; m by n is the size of a block.
    by_block = torch.einsum("...jnis,...ijsm->...imjn", A.unflatten(-1, (k, s)), B.unflatten(-2, (k, s)))
    update = by_block.flatten(-2).flatten(-3, -2)
    if A_general is not None and B_general is not None:
        update = update + B_general @ A_general
    return update


def lora_factors(
    factors: Factors,
) -> tuple[Inexact[Tensor, "rank in"], Inexact[Tensor, "out rank"]]:
    """Return LoRA matrices whose product is the unscaled ΔW, *exact*: every entry is copied or zero.

    The rank is `k·r + hybrid_r`. `lora_A` is block-diagonal, r rows for each input block; the columns
    `j·r + i·s …` of `lora_B` hold the j-th slice of `B[i]` in the rows of output block i.
    """
    A, B, A_general, B_general = factors
    k, _, r = A.shape
    m, s = B.shape[2], factors.s
    lora_a = torch.block_diag(*(block.T for block in A))
    lora_b = B.new_zeros(k, m, k, k, s)
    for i in range(k):
        lora_b[i, :, :, i] = B[i].view(k, s, m).permute(2, 0, 1)
    lora_b = lora_b.view(k * m, k * r)
    if A_general is not None and B_general is not None:
        lora_a = torch.cat([lora_a, A_general])
        lora_b = torch.cat([lora_b, B_general], dim=1)
    return lora_a, lora_b
