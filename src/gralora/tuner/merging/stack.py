"""Merging into a stack of matrices, such as the experts of a mixture: one matrix after the other.

Each has a record of its own, and an undo recovers them one by one as it puts them back, so that neither makes a second
copy of the stack.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from gralora.tuner.merging.dense import check_finite, merged
from gralora.tuner.merging.dense_update import Part
from gralora.tuner.merging.records import ForgottenRecord, MergeRecord, kept_parts
from gralora.tuner.merging.weight import WeightRef, WeightState
from gralora.tuner.numerics import pinned_numerics


@dataclass
class StackState:
    """A stack of weights at one point of its history.

    Attributes:
        base: Module that the layer has as its base.
        ref: Where the stack is.
        parameter: The parameter that holds it.
        recover: Function that computes the weight of one expert; None where all are in the parameter.
    """

    base: nn.Module
    ref: WeightRef
    parameter: nn.Parameter
    recover: Callable[[int], WeightState] | None = None
    _done: int = 0  # experts that were put back
    _next: tuple[int, WeightState] | None = None  # the one that is being put back

    @classmethod
    def of(cls, layer: Any) -> "StackState":
        """Return where the stack of `layer` is."""
        ref = layer.weight_ref()
        return cls(layer.base_layer, ref, ref.parameter)

    def expert(self, index: int) -> WeightState:
        """Return the weight of one expert."""
        if self.recover is not None:
            return self.recover(index)
        return WeightState(self.base, self.ref._replace(expert=index), self.parameter)

    def fingerprint(self) -> tuple[int, ...]:
        """Return hashes of the bits of the whole stack."""
        return tuple(word for index in range(self.ref.experts or 0) for word in self.expert(index).fingerprint())

    def put_back(self, layer: Any) -> None:
        """Make this the weight of `layer`. After an interrupt, doing it again goes on where it was."""
        if self.recover is None:
            WeightState(self.base, self.ref, self.parameter).put_back(layer)
            return
        while self._done < (self.ref.experts or 0):
            if self._next is None or self._next[0] != self._done:
                self._next = self._done, self.recover(self._done)
            self._next[1].put_back(layer)
            self._done += 1


@dataclass
class StackRecord(MergeRecord):
    """How to undo a merge into a stack.

    Attributes:
        parts: What was merged, to be merged again after `.to`.
        experts: Records of the experts that were merged, in their order.
        original: The whole stack from before, where it is shared and the merge did not change it.
    """

    parts: list[Part]
    experts: list[MergeRecord] = field(default_factory=list)
    original: StackState | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the records of the experts, which share the factors."""
        return sum(record.nbytes for record in self.experts)

    def recover(self, state: Any) -> Any:
        """Return the stack from before this merge, which is computed when it is put back.

        Raises:
            RuntimeError: `state` holds another weight.
        """
        if refusal := self.undo_refusal(state):
            raise RuntimeError(refusal)
        if self.original is not None:
            return self.original
        return StackState(state.base, state.ref, state.parameter, partial(self._recovered, state))

    def _recovered(self, state: StackState, index: int) -> WeightState:
        now = state.expert(index)
        return self.experts[index].recover(now) if index < len(self.experts) else now

    def undo_refusal(self, state: Any) -> str | None:
        """Return why an undo would fail, or None."""
        if self.original is not None:
            return super().undo_refusal(state)
        refusals = (record.undo_refusal(state.expert(index)) for index, record in enumerate(self.experts))
        return next((refusal for refusal in refusals if refusal), None)

    def portable(self, earlier: Any) -> MergeRecord:
        """Return a record with copies of the originals, since another machine's products may round differently."""
        if self.original is not None:
            return self
        experts = [record.portable(earlier.expert(index)) for index, record in enumerate(self.experts)]
        return StackRecord(self.adapter_names, self.before, self.after, self.parts, experts)


def prepare(
    layer: Any, names: list[str], parts: list[Part], safe: bool, keep: bool, separate: bool
) -> tuple[MergeRecord, Callable[[], None]]:
    """Return the record of a merge, and a function that merges expert by expert; nothing has changed yet.

    Args:
        layer: Tuner layer whose weight is a stack.
        names: Names of the adapters.
        parts: Factors and scales of the adapters.
        safe: Refuse a result that is not finite; experts that were merged before it are restored.
        keep: Keep what an unmerge needs.
        separate: Write to a parameter of the layer's own.
    """
    before = StackState.of(layer)
    kept = kept_parts(before.parameter.detach(), parts)
    record = StackRecord(names, (), (), kept)
    if separate:
        record.original, record.before = before, before.fingerprint()
    forgotten = ForgottenRecord(names, (), ())

    def write() -> None:
        try:
            after = _write(layer, record, parts, safe)
        except BaseException:
            undone = record.original or record.recover(StackState.of(layer))
            undone.put_back(layer)
            raise
        record.after = forgotten.after = after

    return (record if keep else forgotten), write


def _write(layer: Any, record: StackRecord, parts: list[Part], safe: bool) -> tuple[int, ...]:
    """Merge every expert, noting in `record` how each is undone, and return the fingerprint of the merged stack."""
    now, after = StackState.of(layer), []
    if record.original is not None:
        now.parameter = nn.Parameter(now.parameter.detach().clone(), now.parameter.requires_grad)
        now.put_back(layer)
    with pinned_numerics():
        for index in range(now.ref.experts or 0):
            state, each = now.expert(index), [part.expert(index) for part in parts]
            kept = None if record.original is not None else [part.expert(index) for part in record.parts]
            values, undo, fingerprints = merged(state, record.adapter_names, each, kept)
            check_finite(values, now.parameter, record.adapter_names, safe)
            if undo is not None:  # first, so that every merged expert has a record
                record.experts.append(undo)
            state._replace(values=values).put_back(layer)
            after += fingerprints.after
    return tuple(after)
