# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""The singular value decomposition of an update, from its blocks, without the dense matrix.

The factors are block-diagonal up to a permutation, so an orthonormal basis of each side is one small QR a
block: `A[j] = Qa_j Ra_j` and `B[i]ᵀ = Qb_i Rb_i`. In these bases ΔW is a matrix of k·r rows and columns with the
block structure of the factors `Ra` and `Rbᵀ`. Its singular values are those of ΔW, and cutting off the smallest is
optimal in the Frobenius norm (Eckart and Young). All is computed in float64.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from gralora.tuner import blocks
from gralora.tuner.blocks import Factors


class Basis(NamedTuple):
    """Orthonormal columns: k diagonal blocks of p = min(width, r) columns, and dense columns orthogonal to them."""

    by_block: Float[Tensor, "k width p"]
    dense: Float[Tensor, "features rest"] | None

    def combine(self, weights: Float[Tensor, "size rank"]) -> Float[Tensor, "features rank"]:
        """Return the columns times `weights`."""
        k, _, p = self.by_block.shape
        combined = torch.bmm(self.by_block, weights[: k * p].unflatten(0, (k, p))).flatten(0, 1)
        return combined if self.dense is None else combined + self.dense @ weights[k * p :]


class Core(NamedTuple):
    """ΔW in orthonormal bases of both sides, as `left · matrix · rightᵀ`."""

    left: Basis
    matrix: Float[Tensor, "left_size right_size"]
    right: Basis


@torch.no_grad()
def core_of(factors: Factors, scale: float) -> Core:
    """Return a small matrix with the singular values of ΔW, and its bases."""
    A, B, A_general, B_general = factors.to(torch.float64)
    right, right_r = torch.linalg.qr(A)
    left, left_r = torch.linalg.qr(B.mT)
    matrix = blocks.dense(Factors(A=right_r, B=left_r.mT), scale)
    if A_general is None or B_general is None:
        return Core(Basis(left, None), matrix, Basis(right, None))
    right_in, right_rest, right_dense = _split_off(A_general.T, right)
    left_in, left_rest, left_dense = _split_off(B_general, left)
    matrix = torch.cat(
        [
            torch.cat([matrix + scale * left_in @ right_in.T, scale * left_in @ right_rest.T], dim=1),
            torch.cat([scale * left_rest @ right_in.T, scale * left_rest @ right_rest.T], dim=1),
        ]
    )
    return Core(Basis(left, left_dense), matrix, Basis(right, right_dense))


@torch.no_grad()
def singular_values(factors: Factors, scale: float) -> Float[Tensor, " size"]:
    """Return the singular values of ΔW that can differ from zero, descending."""
    return torch.linalg.svdvals(core_of(factors, scale).matrix)


@torch.no_grad()
def best_lora(
    factors: Factors, scale: float, rank: int
) -> tuple[Float[Tensor, "kept in"], Float[Tensor, "out kept"], Float[Tensor, " size"]]:
    """Return LoRA matrices whose product is the best approximation of ΔW of that rank, and the singular values.

    Each matrix carries the square root of the singular values. Numerically zero ones are left out, so there may be
    fewer than `rank` rows. *Exact* to rounding if `rank` is at least the numerical rank.
    """
    left, matrix, right = core_of(factors, scale)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    kept = min(rank, numerical_rank(s, factors))
    root = s[:kept].sqrt()
    return right.combine(vh[:kept].T * root).T, left.combine(u[:, :kept] * root), s


def numerical_rank(s: Float[Tensor, " size"], factors: Factors) -> int:
    """Return the number of singular values `s` that are above the rounding errors of the decomposition."""
    if not s.numel() or not s[0]:
        return 0
    threshold = s[0] * max(factors.in_features, factors.out_features) * torch.finfo(s.dtype).eps
    return int((s > threshold).sum())


def effective_rank(s: Float[Tensor, " size"]) -> float:
    """Return the exponential of the entropy of `s / s.sum()` (Roy and Vetterli, EUSIPCO 2007)."""
    if not s.sum():
        return 0.0
    shares = s[s > 0] / s.sum()
    return float((-(shares * shares.log()).sum()).exp())


def tail_norms(s: Float[Tensor, " size"]) -> Float[Tensor, " size_and_one"]:
    """Return the Frobenius error of keeping 0, 1, 2, … singular values."""
    return torch.cat([s.square().flip(0).cumsum(0).flip(0), s.new_zeros(1)]).sqrt()


def _split_off(
    columns: Float[Tensor, "features hybrid_r"], by_block: Float[Tensor, "k width p"]
) -> tuple[Float[Tensor, "size hybrid_r"], Float[Tensor, "rest hybrid_r"], Float[Tensor, "features rest"]]:
    """Decompose `columns` into by_block · inside + basis · triangle; return inside, triangle and basis."""
    k, width, p = by_block.shape
    inside, rest = columns.new_zeros(k * p, columns.shape[1]), columns
    # A second projection takes away what rounding left of the first.
    for _ in range(2):
        part = torch.bmm(by_block.mT, rest.unflatten(0, (k, width)))
        rest = rest - torch.bmm(by_block, part).flatten(0, 1)
        inside = inside + part.flatten(0, 1)
    basis, triangle = torch.linalg.qr(rest)
    return inside, triangle, basis
