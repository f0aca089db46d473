# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""How a merge is undone so that every bit comes back, and what sees to it that nothing else does.

`W' = round(W + Δ)` loses bits of W. Most of them are found again in `round(W' - Δ)`; a record keeps the
elements where that differs from W, as gaps and values, beside a copy of the factors that Δ comes from.
It never reads the live adapter, which may have changed by the time of the unmerge.

Every kind of record computes an undo completely first, refuses if the weight is not the one that the merge left,
and then writes.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from gralora.tuner import numerics
from gralora.tuner.merging.dense_update import Part, Scratch
from gralora.tuner.merging.rows import as_integers, bits, chunks, digest
from gralora.tuner.merging.weight import WeightState

# A correction is forced every so many elements, so that each gap between two fits a byte.
_GAP = 255
CHANGED = "the base weight was changed while it was merged"
# Share of the weight's bytes above which a record keeps its factors in the dtype of the weight.
_LARGE_FACTORS = 0.1


@dataclass
class MergeRecord:
    """How to undo one merge.

    Attributes:
        adapter_names: Names of the merged adapters.
        before: Fingerprint of the weight before the merge.
        after: Fingerprint of the weight that the merge left.
    """

    adapter_names: list[str]
    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that the record holds."""
        return 0

    def recover(self, state: WeightState) -> WeightState:
        """Return the weight from before this merge; nothing changes.

        Args:
            state: The weight that this merge left.

        Raises:
            RuntimeError: `state` holds another weight, or nothing was kept.
        """
        found = state.fingerprint()
        if found == self.after:
            return self._recover(state)
        if found == self.before:  # an undo or a merge that was interrupted came this far
            return state
        raise self.changed()

    def _recover(self, state: WeightState) -> WeightState:
        raise NotImplementedError

    def undo_refusal(self, state: WeightState) -> str | None:
        """Return why an undo would fail, as far as reading the weight can show, or None."""
        found = state.fingerprint()
        return None if found in (self.before, self.after) else str(self.changed())

    def changed(self) -> RuntimeError:
        """Return the error for a weight that was changed from outside."""
        return RuntimeError(f"the merge of {self._named()} cannot be undone: {CHANGED}. Load the base model again.")

    def portable(self, earlier: WeightState) -> "MergeRecord":
        """Return a record that another process can undo; `earlier` is what `recover` gives."""
        return self

    def converted(self, earlier: WeightState, now: WeightState) -> "MergeRecord":
        """Return the record of the same merge after `.to` and its kin.

        Args:
            earlier: The weight from before the merge, converted.
            now: The weight that the merge left, converted.
        """
        raise NotImplementedError

    def _named(self) -> str:
        return ", ".join(map(repr, self.adapter_names))


@dataclass
class ForgottenRecord(MergeRecord):
    """A merge that cannot be undone."""

    reason: str = "it was made with `keep_base=False`"

    def recover(self, state: WeightState) -> WeightState:
        """Refuse.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(self.undo_refusal(state))

    def undo_refusal(self, state: WeightState) -> str:
        """Return why the merge cannot be undone."""
        return f"the merge of {self._named()} cannot be undone: {self.reason}. Load the base model again."


@dataclass
class SharedRecord(MergeRecord):
    """The original weight, which other modules hold too and the merge did not change."""

    original: WeightState

    def _recover(self, state: WeightState) -> WeightState:
        return self.original

    def converted(self, earlier: WeightState, now: WeightState) -> MergeRecord:
        """Return the record with fingerprints of the converted weights."""
        return SharedRecord(self.adapter_names, earlier.fingerprint(), now.fingerprint(), self.original)


@dataclass
class TiedRecord(MergeRecord):
    """The original weight of a layer that took over the merged weight of another one, whose record knows its bits."""

    original: WeightState
    merged: nn.Parameter

    def recover(self, state: WeightState) -> WeightState:
        """Return the weight from before this merge; nothing changes.

        Raises:
            RuntimeError: `state` holds another weight.
        """
        if refusal := self.undo_refusal(state):
            raise RuntimeError(refusal)
        return self.original

    def undo_refusal(self, state: WeightState) -> str | None:
        """Return why an undo would fail, or None."""
        known = state.parameter is self.merged or state.parameter is self.original.parameter
        return None if known else str(self.changed())

    def converted(self, earlier: WeightState, now: WeightState) -> MergeRecord:
        """Return the record with the converted weights."""
        return TiedRecord(self.adapter_names, (), (), self.original, now.parameter)


@dataclass
class CopyRecord(MergeRecord):
    """A copy of the whole original."""

    original: Tensor

    @classmethod
    def between(cls, names: list[str], earlier: WeightState, now: WeightState) -> "CopyRecord":
        """Return the record of a merge that led from `earlier` to `now`."""
        return cls(names, earlier.fingerprint(), now.fingerprint(), earlier.stored.clone())

    @property
    def nbytes(self) -> int:
        """Bytes of the copy."""
        return self.original.nbytes

    def _recover(self, state: WeightState) -> WeightState:
        return state._replace(values=self.original)

    def converted(self, earlier: WeightState, now: WeightState) -> MergeRecord:
        """Return the record with the converted original."""
        return CopyRecord.between(self.adapter_names, earlier, now)


def kept_parts(weight: Tensor, parts: list[Part]) -> list[Part]:
    """Return copies of `parts` for the record of a merge into `weight`."""
    factors = sum(tensor.nbytes for part in parts for tensor in part.factors if tensor is not None)
    # Rounded factors cost more corrections and products, and are worth it where the factors are large.
    dtype = weight.dtype if factors > _LARGE_FACTORS * weight.nbytes else None
    return [part.kept(dtype) for part in parts]


@dataclass
class DenseRecord(MergeRecord):
    """Factors and corrections, by chunks of rows; see the module's docstring."""

    parts: list[Part]
    gaps: list[UInt8[Tensor, " corrections"]] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    environment: tuple[int, str, bool] = field(default_factory=numerics.environment)

    def note(self, original: Tensor, guess: Tensor) -> None:
        """Keep the elements of a chunk where `guess` is not `original`; both are contiguous."""
        differs = (bits(guess) != bits(original)).view(-1)
        differs[_GAP - 1 :: _GAP] = True
        where = differs.nonzero().view(-1)
        self.gaps.append(torch.diff(where, prepend=where.new_tensor([-1])).to(torch.uint8))
        self.values.append(original.view(-1)[where])

    @property
    def nbytes(self) -> int:
        """Bytes of factors and corrections."""
        factors = (tensor for part in self.parts for tensor in part.factors if tensor is not None)
        return sum(tensor.nbytes for tensor in (*factors, *self.gaps, *self.values))

    def undo_refusal(self, state: WeightState) -> str | None:
        """Return why an undo would fail, or None; the products are only recomputed where they may have changed."""
        if refusal := super().undo_refusal(state):
            return refusal
        if self.environment == numerics.environment():
            return None
        try:
            self.recover(state)
        except RuntimeError as error:
            return str(error)
        return None

    def _recover(self, state: WeightState) -> WeightState:
        window = state.window
        original = torch.empty_like(window.rows)
        scratch = Scratch(window, self.parts)
        for number, (start, stop) in enumerate(chunks(window.rows)):
            merged = window.rows[start:stop]
            # The number of threads may change the order of a sum, so it is pinned.
            for threads in (self.environment[0], 1):
                with numerics.pinned_numerics(threads):
                    chunk = scratch.unrounded(merged, scratch.delta(self.parts, start, stop))
                    where = self.gaps[number].cumsum(0, dtype=torch.int64).sub_(1)
                    chunk.view(-1)[where] = self.values[number]
                    if int(digest(chunk)) == self.before[number]:
                        break
            else:
                raise self.changed()
            original[start:stop] = chunk
        return state._replace(values=state.ref.stored(original))

    def portable(self, earlier: WeightState) -> MergeRecord:
        """Return a copy record, since another machine's products may round differently."""
        return CopyRecord(self.adapter_names, self.before, self.after, earlier.stored.clone())

    def converted(self, earlier: WeightState, now: WeightState) -> MergeRecord:
        """Return a record that finds the converted original in the converted weight."""
        window, original_rows = now.window, earlier.window.rows
        parts = [part.kept(device=window.rows.device) for part in self.parts]
        record = DenseRecord(self.adapter_names, (), (), parts)
        scratch, before, after = Scratch(window, parts), [], []
        with numerics.pinned_numerics():
            for start, stop in chunks(window.rows):
                merged = window.rows[start:stop]
                original = original_rows[start:stop].contiguous()
                record.note(original, scratch.unrounded(merged, scratch.delta(parts, start, stop)))
                before.append(digest(original))
                after.append(digest(merged))
            record.before, record.after = as_integers(before), as_integers(after)
        whole = record.nbytes < window.rows.nbytes
        return record if whole else CopyRecord.between(self.adapter_names, earlier, now)
