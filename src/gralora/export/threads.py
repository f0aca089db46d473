"""How many threads the small matrices of an adapter are worth."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_SMALL = 2048 * 2048  # elements of a weight


@contextmanager
def threads_for(largest: int) -> Iterator[None]:
    """Compute with one thread where the largest weight has few elements, else with as many as before.

    Measured: on a machine whose cores others use too, LAPACK's threads waiting for each other make the
    decomposition of a 64x64 matrix 500 times slower.

    Args:
        largest: Elements of the largest weight that is adapted.
    """
    before = torch.get_num_threads()
    if largest <= _SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
