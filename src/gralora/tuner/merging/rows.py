"""Rows of a weight: the ones that this process holds, in chunks, and hashes of their bits."""

import functools
from typing import NamedTuple

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.distributed.tensor import DTensor

# Elements of a weight in one chunk, which bounds the memory of a merge or an unmerge beside its result.
CHUNK = 1 << 20
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Window(NamedTuple):
    """The part of a weight `[out, in]` that this process holds: all of it, or under FSDP2 a shard."""

    rows: Tensor
    first_row: int
    first_column: int


def local(weight: Tensor) -> Tensor:
    """Return what this process holds of `weight`, detached, in the same memory."""
    weight = weight.detach()
    return weight.to_local() if isinstance(weight, DTensor) else weight


def overwrite(weight: Tensor, values: Tensor) -> None:
    """Copy `values` into the memory of `weight`, which may have been made in inference mode."""
    with torch.inference_mode(weight.is_inference()), torch.no_grad():
        local(weight).copy_(local(values))


def chunk_height(rows: Tensor) -> int:
    """Return the number of rows in a chunk."""
    return max(1, CHUNK // max(1, rows.shape[1]))


def chunks(rows: Tensor) -> list[tuple[int, int]]:
    """Return the first row of each chunk, and the one after its last."""
    step = chunk_height(rows)
    return [(start, min(start + step, rows.shape[0])) for start in range(0, rows.shape[0], step)]


def bits(tensor: Tensor) -> Tensor:
    """Return the elements as integers of the same width, a view."""
    return tensor.view(_BITS[tensor.dtype.itemsize])


def digest(chunk: Shaped[Tensor, "..."]) -> Tensor:
    """Return a hash of the bits of `chunk`, a scalar on its device.

    The sum over its words of at most 32 bits, each times an odd random number of 64, modulo 2^64 (multilinear
    hashing). One changed word always changes the hash: an odd number times a difference below 2^32 is no
    multiple of 2^64. Any other change is missed with a probability of at most 2^-31.
    """
    flat = chunk.contiguous().view(-1)
    if flat.storage_offset() * flat.itemsize % 4:
        flat = flat.clone()
    words = flat.view(_BITS[4 if flat.nbytes % 4 == 0 else flat.itemsize])
    return words.to(torch.int64).mul_(_multipliers(len(words).bit_length(), words.device)[: len(words)]).sum()


def fingerprint(rows: Tensor) -> tuple[int, ...]:
    """Return the digest of every chunk of a matrix."""
    return as_integers([digest(rows[start:stop]) for start, stop in chunks(rows)])


def as_integers(digests: list[Tensor]) -> tuple[int, ...]:
    """Return digests as Python numbers, fetched from their device at once."""
    return tuple(torch.stack(digests).tolist()) if digests else ()


@functools.lru_cache(maxsize=8)
def _multipliers(magnitude: int, device: torch.device) -> Tensor:
    """Return `2^magnitude` odd random numbers, always the same."""
    generator = torch.Generator("cpu").manual_seed(0x6A09E667)
    numbers = torch.randint(-(2**62), 2**62, (1 << magnitude,), generator=generator, dtype=torch.int64, device="cpu")
    return numbers.mul_(2).add_(1).to(device)
