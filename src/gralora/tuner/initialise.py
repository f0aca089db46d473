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
    A, B, A_general, B_general = factors
    _uniform_(A, fan_in=A.shape[-2])
    B.zero_()
    if A_general is not None and B_general is not None:
        _uniform_(A_general, fan_in=A_general.shape[-1])
        B_general.zero_()


def random_(factors: Factors) -> None:
    """Fill `factors` in place with a random update, for tests: A as in `zero_update_`, B within 1/sqrt(rank)."""
    zero_update_(factors)
    _, B, _, B_general = factors
    _uniform_(B, fan_in=B.shape[-2])
    if B_general is not None:
        _uniform_(B_general, fan_in=B_general.shape[-1])


# By the value of `init_weights`. Each fills detached tensors in place; on the meta device nothing happens.
STARTS: dict[bool, Callable[[Factors], None]] = {True: zero_update_, False: random_}


def _uniform_(factor: torch.Tensor, fan_in: int) -> None:
    """Draw within 1/sqrt(fan-in)."""
    bound = 1 / math.sqrt(fan_in)
    with torch.no_grad():
        factor.uniform_(-bound, bound)
