"""Starting values of an adapter."""

import math
from collections.abc import Callable

import torch

from gralora.tuner.blocks import Factors


def zero_update_(factors: Factors) -> None:
    """Fill `factors` in place so that the update is exactly zero: A random, B zero.

    A is Kaiming-uniform with a = sqrt 5 by block, that is, uniform within 1/sqrt(n), since a block's
    fan-in is n; `A_general` is within 1/sqrt(in).
    """
    for A, B in _pairs(factors):
        _uniform_(A)
        B.zero_()


def random_(factors: Factors) -> None:
    """Fill `factors` in place with a random update, for tests: A as in `zero_update_`, B within 1/sqrt(rank)."""
    for A, B in _pairs(factors):
        _uniform_(A)
        _uniform_(B)


# By the value of `init_weights`. Each fills detached tensors in place; on the meta device nothing happens.
STARTS: dict[bool, Callable[[Factors], None]] = {True: zero_update_, False: random_}


def _pairs(factors: Factors) -> list[tuple[torch.Tensor, torch.Tensor]]:
    A, B, A_general, B_general = factors
    pairs = [(A, B)]
    if A_general is not None and B_general is not None:
        pairs.append((A_general, B_general))
    return pairs


def _uniform_(factor: torch.Tensor) -> None:
    """Draw within 1/sqrt(fan-in); the fan-in of every factor is its second dimension."""
    bound = 1 / math.sqrt(factor.shape[1])
    with torch.no_grad():
        factor.uniform_(-bound, bound)
