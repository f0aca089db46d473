"""The base class of tuner layers that adapters can be merged into: the merges, and how each is undone."""

import warnings
import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gralora.tuner.merging import merge
from gralora.tuner.merging.dense_update import Part
from gralora.tuner.merging.quantised import PackedRecord, PackedState, packed_weight
from gralora.tuner.merging.records import CHANGED, ForgottenRecord, MergeRecord
from gralora.tuner.merging.sharing import UNSHARED, Sharing, is_alone, sharing_in
from gralora.tuner.merging.stack import StackRecord, StackState
from gralora.tuner.merging.weight import WeightRef, WeightState


class MergeableLayer(nn.Module, BaseTunerLayer):
    """A tuner layer that knows what was merged into its base weight.

    A subclass says where the weight is (`weight_ref`), which adapters there are (`has_adapter`) and what their
    updates are (`part`).

    Attributes:
        base_layer: The frozen layer.
        quantization_backend: PEFT's access to a quantised base, or None.
    """

    def __init__(self, base_layer: nn.Module, quantization_backend: QuantizationBackend | None = None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = quantization_backend
        self._sharing = UNSHARED  # last known; used when the model is gone
        self._model: weakref.ref[nn.Module] | None = None
        self._merges: list[MergeRecord] = []

    def weight_ref(self) -> WeightRef:
        """Return where the base weight is, and how it reads as a matrix."""
        return WeightRef(self.get_base_layer())

    def has_adapter(self, adapter_name: str) -> bool:
        """Return whether this layer has an adapter of that name."""
        raise NotImplementedError

    def part(self, adapter_name: str) -> Part:
        """Return the factors and the scale of an adapter, as a merge takes them."""
        raise NotImplementedError

    @property
    def merged_adapters(self) -> list[str]:
        """Names of the adapters that are merged into the base weight, in the order of merging."""
        return [name for record in self._merges for name in record.adapter_names]

    def rewrite_refusal(self) -> str | None:
        """Return why the base weight can never be merged into, or None where it can."""
        return merge.rewrite_refusal(self.weight_ref(), self.quantization_backend)

    def merge_refusal(self, own_weights: bool = False) -> str | None:
        """Return why no merge is possible at the moment, and the way out; None where one is."""
        if refusal := self.rewrite_refusal():
            return f"{refusal}. Training and inference still work."
        return self._absence_refusal() or merge.separation_refusal(
            self.get_base_layer(), self.weight_ref(), self._sharing, own_weights
        )

    def unmerge_refusal(self) -> str | None:
        """Return why the merges cannot be undone, or None.

        Reads the weight once. With several merges it computes the whole undo without writing it.
        """
        if not self._merges:
            return None
        if absence := self._absence_refusal():
            return f"this layer cannot be unmerged: {absence}"
        if len(self._merges) > 1 and (reason := self._history()[1]):
            return self._forgotten(reason).undo_refusal(self.weight_state())
        return self._merges[-1].undo_refusal(self.weight_state())

    def _absence_refusal(self) -> str | None:
        if self.quantization_backend is not None:
            return None
        if self._merges and self.rewrite_refusal():
            return f"{CHANGED}. Load the base model again."
        return merge.absence_refusal(self.weight_ref())

    def weight_state(self) -> WeightState:
        """Return where the base weight is now."""
        if self.quantization_backend is not None:
            return cast(Any, PackedState.of(self))
        return cast(Any, StackState).of(self) if self.weight_ref().experts is not None else WeightState.of(self)

    def note_sharing(self, sharing: Sharing, model: nn.Module) -> None:
        """Remember what other parts of `model` hold of the base."""
        self._sharing, self._model = sharing, weakref.ref(model)

    def merge(
        self,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        keep_base: bool = True,
        own_weights: bool = False,
    ) -> None:
        """Merge adapters into the base weight, all of them or none.

        Args:
            safe_merge: Refuse a result that is not finite.
            adapter_names: Names of the adapters; the active ones by default. Merged ones are skipped.
            keep_base: Keep what `unmerge` needs to give the base weight its bits back.
            own_weights: Write to a new parameter. By default that is done only where another part of the model
                holds the old one.

        Raises:
            ValueError: A non-finite result with `safe_merge`.
            RuntimeError: The base weight cannot be read or rewritten.
        """
        if self._disable_adapters:
            warnings.warn("The adapters are disabled: nothing is merged. Enable them first.", stacklevel=2)
            return
        model = None if self._model is None else self._model()
        if is_alone(self):
            self._sharing = UNSHARED
        elif model is not None:
            self._sharing = sharing_in(model, [self])[self]
        elif not isinstance(self.weight_ref().parameter, DTensor):
            self._sharing = self._sharing._replace(weight=True)  # unknown: assume that it is shared
        self.merge_with_known_sharing(safe_merge, adapter_names, keep_base, own_weights)

    def merge_with_known_sharing(
        self,
        safe_merge: bool,
        adapter_names: list[str] | None,
        keep_base: bool = True,
        own_weights: bool = False,
        leader: "MergeableLayer | None" = None,
    ) -> None:
        """Merge like `merge`, also while adapters are disabled. Call `note_sharing` first.

        A `leader` is a layer with the same adapters, which held the same weight and was merged before: its merged
        weight is taken over, so that both hold one again.
        """
        wanted = check_adapters_to_merge(self, adapter_names)
        names = [name for name in dict.fromkeys(wanted) if self.has_adapter(name)]
        if not names:
            return
        if refusal := self.merge_refusal(own_weights):
            raise RuntimeError(f"this layer cannot be merged: {refusal}")
        if (
            leader is not None
            and leader.merged_adapters == [*self.merged_adapters, *names]
            and not self._sharing.module
        ):
            self._write_merge(*merge.take_over(self, names, leader, keep_base))
            return
        parts = [self.part(name) for name in names]
        sharing = self._sharing._replace(weight=True) if own_weights else self._sharing
        self._write_merge(*merge.prepare(self, names, parts, safe_merge, keep_base, sharing))

    def _write_merge(self, record: MergeRecord, write: Callable[[], None]) -> None:
        earlier = self._merges
        final = isinstance(record, ForgottenRecord)
        if final:  # earlier merges can no longer be undone
            record.adapter_names = [*self.merged_adapters, *record.adapter_names]
        # Record first: a merged weight always has its record.
        try:
            self._merges = [record] if final else [*earlier, record]
            write()
        except BaseException:
            if not final:
                self.undo_merges(len(earlier))
            elif self.weight_state().fingerprint() != record.after:
                self._merges = earlier
            raise

    def names_to_merge(self, adapter_names: list[str] | None) -> list[str]:
        """Return which of the named adapters, by default the active ones, this layer has and has not merged yet."""
        wanted = self.active_adapters if adapter_names is None else adapter_names
        return [name for name in wanted if self.has_adapter(name) and name not in self.merged_adapters]

    def unmerge(self) -> None:
        """Undo every merge, or none; the base weight gets its bits back.

        Raises:
            RuntimeError: The base weight is not here as a whole, or was changed since; nothing has changed then.
        """
        if not self._merges:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        self.undo_merges()

    def undo_merges(self, depth: int = 0) -> None:
        """Undo all merges but the first `depth`, or none.

        Raises:
            RuntimeError: As in `unmerge`.
        """
        if len(self._merges) <= depth:
            return
        if absence := self._absence_refusal():
            raise RuntimeError(f"this layer cannot be unmerged: {absence}")
        state = self.weight_state()
        for record in reversed(self._merges[depth:]):
            state = record.recover(state)
        try:
            state.put_back(self)
            self._merges = self._merges[:depth]
        except BaseException:  # after an interrupt, finish: only assignments are left
            state.put_back(self)
            self._merges = self._merges[:depth]
            raise

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the base layer, merged or as it was (PEFT calls this from `merge_and_unload` and `unload`)."""
        if merge:
            if missing := self.names_to_merge(adapter_names):
                self.merge_with_known_sharing(safe_merge, missing)
        elif self.merged:
            self.unmerge()
        return self.get_base_layer()

    def __getstate__(self) -> dict[str, Any]:
        # Deepcopy and pickle: an undo must not depend on the machine that made the merge.
        history, reason = self._history()
        merges = [record.portable(earlier) for record, earlier in reversed(history)]
        return self.__dict__ | {"_model": None, "_merges": merges if reason is None else [self._forgotten(reason)]}

    def _history(self) -> tuple[list[tuple[MergeRecord, Any]], str | None]:
        """Return every merge, the latest first, with the weight from before it; or why that is not known."""
        history, state = [], self.weight_state()
        for record in reversed(self._merges):
            if isinstance(record, ForgottenRecord):
                return [], record.reason
            try:
                state = record.recover(state)
            except RuntimeError:
                return [], CHANGED
            history.append((record, state))
        return history, None

    def _forgotten(self, reason: str) -> ForgottenRecord:
        return ForgottenRecord(self.merged_adapters, (), (), reason)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MergeableLayer":
        # `.to`, `.half`, `.cuda` of a merged layer: both the merged weight and the one that comes back are converted.
        if self._merges:
            packed = self.quantization_backend is not None
            weight: Any = packed_weight(self.get_base_layer()) if packed else self.weight_ref().parameter
            with torch.no_grad():
                probe = fn(torch.empty(0, dtype=weight.dtype, device=weight.device))
            if (probe.dtype, probe.device) != (weight.dtype, weight.device):
                self._convert_merged(fn, recurse, to_meta=probe.is_meta)
                return self
        super()._apply(fn, recurse)
        return self

    def _convert_merged(self, fn: Callable[[Tensor], Tensor], recurse: bool, to_meta: bool) -> None:
        history, reason = self._history()
        reason = "its weights were moved to the meta device" if to_meta else reason
        if reason is not None:
            super()._apply(fn, recurse)
            self._merges = [self._forgotten(reason)]
            return
        if isinstance(self._merges[0], PackedRecord | StackRecord):
            merges: list[Any] = self._merges
            self.undo_merges()
            super()._apply(fn, recurse)
            for record in merges:
                self._write_merge(*merge.prepare(self, record.adapter_names, record.parts, sharing=self._sharing))
            return
        # Values that only a record holds are converted here; parameters by the module that holds them, or below.
        converted = [None if state.values is None else fn(state.values) for _, state in history]
        parameter = self.weight_ref().parameter
        super()._apply(fn, recurse)
        now, merges = self.weight_state(), []
        for (record, state), values in zip(history, converted, strict=True):
            if state.parameter is parameter:
                state = state._replace(parameter=now.parameter)
            elif (state.parameter.dtype, state.parameter.device) != (now.stored.dtype, now.stored.device):
                state.parameter.data = fn(state.parameter.data)
            earlier = state._replace(values=values)
            merges.insert(0, record.converted(earlier, now))
            now = earlier
        self._merges = merges
