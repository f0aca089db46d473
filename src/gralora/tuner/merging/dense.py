"""Merging into one matrix: the sum, and what an undo needs."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from gralora.tuner.merging.dense_update import Part, Scratch, sum_dtype
from gralora.tuner.merging.records import CopyRecord, DenseRecord, MergeRecord
from gralora.tuner.merging.rows import as_integers, chunks, digest
from gralora.tuner.merging.weight import WeightState


class Fingerprints(NamedTuple):
    """Hashes of the bits of a weight before and after a merge."""

    before: tuple[int, ...]
    after: tuple[int, ...]


def merged(
    now: WeightState, names: list[str], parts: list[Part], kept: list[Part] | None
) -> tuple[Tensor, MergeRecord | None, Fingerprints]:
    """Return `weight + Δ`, rounded once, as it is stored; the record that undoes it; and fingerprints of both weights.

    Args:
        now: The weight.
        names: Names of the adapters.
        parts: Factors and scales of the adapters.
        kept: The same, owned by the record, in the dtype in which it keeps them; None for no record.
    """
    window = now.window
    merged = torch.empty_like(window.rows)
    record = None if kept is None else DenseRecord(names, (), (), kept)
    kept = kept or parts
    same = all(a.factors.A.dtype == b.factors.A.dtype for a, b in zip(kept, parts, strict=True))
    # An undo computes these products again, so their operands need the same memory layout.
    parts = kept if same else parts
    scratch, whole, before, after = Scratch(window, parts), record is not None, [], []
    kept_scratch = scratch if sum_dtype(window.rows, kept) == scratch.dtype else Scratch(window, kept)
    for start, stop in chunks(window.rows):
        original, chunk = window.rows[start:stop].contiguous(), merged[start:stop]
        update = scratch.delta(parts, start, stop)
        chunk.copy_(scratch.sum(original, update))
        before.append(digest(original))
        after.append(digest(chunk))
        if record is not None and whole:
            kept_update = update if same else kept_scratch.delta(kept, start, stop)
            record.note(original, kept_scratch.unrounded(chunk, kept_update))
            whole = record.nbytes < window.rows.nbytes
    values, fingerprints = now.ref.stored(merged), Fingerprints(as_integers(before), as_integers(after))
    if record is None:
        return values, None, fingerprints
    if whole:
        record.before, record.after = fingerprints
        return values, record, fingerprints
    return values, CopyRecord(names, *fingerprints, now.stored.clone()), fingerprints


def check_finite(merged: Tensor, weight: Tensor | None, names: list[str], safe: bool) -> None:
    """Refuse a merged weight that is not finite, where a `safe` merge is asked for."""
    if safe and not agreed(bool(torch.isfinite(merged).all()), weight):
        raise ValueError(
            f"the merged weight must be finite; merging {', '.join(map(repr, names))} gives non-finite values. "
            "Nothing was merged."
        )


def agreed(verdict: bool, weight: Tensor | None) -> bool:
    """Return whether every process that holds a part of `weight` came to a true `verdict`; all of them must ask."""
    if not isinstance(weight, DTensor):
        return verdict
    everywhere = torch.tensor(verdict, dtype=torch.uint8, device=weight.device)
    for dimension in range(weight.device_mesh.ndim):
        group = weight.device_mesh.get_group(dimension)
        torch.distributed.all_reduce(everywhere, torch.distributed.ReduceOp.MIN, group)
    return bool(everywhere)
