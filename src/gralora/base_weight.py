"""The weight under an adapter: can it be merged, and merging it so that every bit comes back.

`W' = round(W + Δ)` loses bits of W. Most of them are found again in `round(W' - Δ)`; a record keeps the
elements where that differs from W, as gaps and values, beside a copy of the factors that Δ comes from.
It never reads the live adapter, which may have changed by the time of the unmerge.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, UInt8
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gralora import blocks

# Elements of a weight that are worked on at a time; what a merge or an unmerge allocates beside its result.
CHUNK = 1 << 20
# A correction is forced every so many elements, so that each gap between two fits a byte.
_GAP = 255
# Share of the weight's bytes above which a record keeps its factors in the dtype of the weight.
_LARGE_FACTORS = 0.1
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Part(NamedTuple):
    """One adapter's share of a merge: its factors and the scale at that time."""

    factors: blocks.Factors
    scale: float

    @classmethod
    def gathered(cls, factors: blocks.Factors, scale: float) -> "Part":
        """Return a part with whole factors, where FSDP2 has sharded them; every process must come here then."""
        return cls(blocks.Factors(*(f.full_tensor() if isinstance(f, DTensor) else f for f in factors)), scale)


def obstacle_to_merging(base: nn.Module, backend: QuantizationBackend | None) -> str | None:
    """Return why the weight of `base` can't be read and rewritten, or None where it can."""
    if backend is not None:
        return None if backend.supports_merge else f"{backend.backend_name} weights can't be written"
    weight = getattr(base, "weight", None)
    if not isinstance(weight, nn.Parameter):
        return f"its base, {type(base).__name__}, holds no plain `weight` parameter"
    if not weight.is_floating_point() or weight.dtype.itemsize == 1:
        return f"its base weight is of type {weight.dtype}"
    return None


def absence(base: nn.Module, base_is_shared: bool) -> str | None:
    """Return why the weight of `base` can't be rewritten at the moment, for how it is sharded, or None."""
    weight = getattr(base, "weight", None)
    if isinstance(weight, DTensor):
        if base_is_shared:
            return "its base weight is sharded and tied to another one. Untie them, or take it out of `target_modules`."
        return None
    if isinstance(weight, nn.Parameter) and weight.is_floating_point() and weight.dim() != 2:
        return (
            f"only a shard of its base weight is here, of shape {tuple(weight.shape)}. Merge and unmerge inside one "
            "`with` of FSDP's `summon_full_params` or DeepSpeed's `GatheredParameters`."
        )
    # Both kinds of FSDP set the first mark, on modules; the second, on parameters, only FSDP1 does.
    if getattr(base, "_is_fsdp_managed_module", False) and not getattr(weight, "_fsdp_flattened", False):
        return (
            "its base weight is gathered for a forward pass, so that what is written to it would be lost. Call "
            "`reshard()` of the model that `fully_shard` returned first."
        )
    return None


def delta(
    parts: list[Part], dtype: torch.dtype, start: int = 0, stop: int | None = None, out: Tensor | None = None
) -> Float[Tensor, "rows in"]:
    """Return rows `start` to `stop` of the sum of the dense updates, computed in `dtype`, written to `out` if given."""
    first, *rest = parts
    total = blocks.dense(first.factors.to(dtype), first.scale, start, stop, out)
    for part in rest:
        total += blocks.dense(part.factors.to(dtype), part.scale, start, stop)
    return total


def delta_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Return what an update is added in: float32, or float64 where one of `dtypes` is."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


@contextmanager
def pinned_numerics(threads: int | None = None) -> Iterator[None]:
    """Compute as precisely and as repeatably as torch can, whatever the user has set.

    Args:
        threads: How many of them to use; by default as many as now.
    """
    precision, before = torch.get_float32_matmul_precision(), torch.get_num_threads()
    torch.set_float32_matmul_precision("highest")
    if threads is not None and threads != before:
        torch.set_num_threads(threads)
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def merge(layer: BaseTunerLayer, names: list[str], parts: list[Part], safe: bool, keep: bool) -> "MergeRecord":
    """Add the update of `parts` to the base weight of `layer` and return the way back.

    A dense weight is written in place, into the same storage; one that another module holds too is
    replaced by a parameter of its own. A quantised one is dequantised, merged and quantised again.

    Args:
        layer: Tuner layer, with `base_is_shared` and `fan_in_fan_out`.
        names: The adapters, for the record.
        parts: Their factors and scales.
        safe: Refuse a result that is not finite.
        keep: Keep what an unmerge needs.

    Raises:
        ValueError: A non-finite result with `safe`; nothing has changed then.
        RuntimeError: The weight is not loaded.
    """
    base = layer.get_base_layer()
    with pinned_numerics():
        if layer.quantization_backend is not None:
            return _merge_quantised(layer, names, parts, safe, keep)
        weight = base.weight
        if weight.device.type == "meta":
            raise RuntimeError("this layer can't be merged: its base weight is not loaded (meta device).")
        merged = torch.empty_like(weight)
        if layer.base_is_shared or not keep:
            _add_updates(weight, merged, parts, layer.fan_in_fan_out)
            record = SharedRecord(names, weight) if keep else ForgottenRecord(names)
        else:
            way_back = DenseRecord.start(names, weight, parts, layer.fan_in_fan_out)
            whole = _add_updates(weight, merged, parts, layer.fan_in_fan_out, way_back)
            record = way_back if whole else CopyRecord(names, _local(weight).clone())
        _check_finite(merged, names, safe)
        if layer.base_is_shared:
            base.weight = nn.Parameter(merged, requires_grad=weight.requires_grad)
        else:
            _local(weight).copy_(_local(merged))
        return record


def _add_updates(
    weight: Tensor, merged: Tensor, parts: list[Part], fan_in_fan_out: bool, way_back: "DenseRecord | None" = None
) -> bool:
    """Write `weight + Δ`, rounded once, to `merged`; note in `way_back` what finds `weight` again.

    Returns:
        Whether `way_back` is whole. False where it would be as large as the weight itself.
    """
    window, merged_rows = _window(weight, fan_in_fan_out), _window(merged, fan_in_fan_out).rows
    kept = parts if way_back is None else way_back.parts
    same = all(a.factors.A.dtype == b.factors.A.dtype for a, b in zip(kept, parts, strict=True))
    # What an undo will compute again should be the very same products, of tensors that lie in memory alike.
    parts = kept if same else parts
    scratch, whole = _Scratch(window, parts), way_back is not None
    kept_scratch = scratch if _sum_dtype(window, kept) == scratch.dtype else _Scratch(window, kept)
    for start, stop in _chunks(window.rows):
        original, chunk = window.rows[start:stop], merged_rows[start:stop]
        update = scratch.delta(parts, start, stop)
        chunk.copy_(scratch.sum(original, update))
        if way_back is not None and whole:
            kept_update = update if same else kept_scratch.delta(kept, start, stop)
            way_back.note(original, kept_scratch.unrounded(chunk, kept_update))
            whole = way_back.nbytes < window.rows.nbytes
    return whole


@dataclass
class MergeRecord:
    """How to undo one merge."""

    adapter_names: list[str]

    @property
    def nbytes(self) -> int:
        """Bytes held for the way back."""
        return 0

    def undo(self, layer: BaseTunerLayer) -> None:
        """Put the original weight back, bit for bit."""
        raise NotImplementedError

    def portable(self, weight: Tensor) -> tuple["MergeRecord", Tensor | None]:
        """Return a record that another process can undo, and the weight from before this merge."""
        return self, None


@dataclass
class ForgottenRecord(MergeRecord):
    """A merge that kept nothing."""

    def undo(self, layer: BaseTunerLayer) -> None:
        """Refuse.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(
            f"the merge of {', '.join(map(repr, self.adapter_names))} can't be undone: it was made with "
            "`keep_base=False`. Load the base model again."
        )


@dataclass
class SharedRecord(MergeRecord):
    """The weight that other modules hold too, which the merge left alone."""

    original: nn.Parameter

    def undo(self, layer: BaseTunerLayer) -> None:
        """Put the shared parameter back."""
        layer.get_base_layer().weight = self.original


@dataclass
class CopyRecord(MergeRecord):
    """A copy of the whole original."""

    original: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the copy."""
        return self.original.nbytes

    def undo(self, layer: BaseTunerLayer) -> None:
        """Copy the original back."""
        with torch.no_grad():
            _local(layer.get_base_layer().weight).copy_(self.original)

    def portable(self, weight: Tensor) -> tuple[MergeRecord, Tensor | None]:
        """Return this record and its copy."""
        return self, self.original


@dataclass
class DenseRecord(MergeRecord):
    """Factors, corrections and checksums, by chunk of rows; see the module's text."""

    parts: list[Part]
    gaps: list[UInt8[Tensor, " corrections"]]
    values: list[Tensor]
    checksums: list[tuple[int, ...]]
    threads: int
    fan_in_fan_out: bool

    @classmethod
    def start(cls, names: list[str], weight: Tensor, parts: list[Part], fan_in_fan_out: bool) -> "DenseRecord":
        """Return a record without corrections, which `note` adds chunk by chunk."""
        factors = sum(tensor.nbytes for part in parts for tensor in part.factors if tensor is not None)
        # Rounded factors cost more corrections and products, and are worth it where the factors are large.
        dtype = weight.dtype if factors > _LARGE_FACTORS * _local(weight).nbytes else None
        rounded = [part if dtype is None else Part(part.factors.to(dtype), part.scale) for part in parts]
        kept = [Part(blocks.Factors(*map(_clone, part.factors)), part.scale) for part in rounded]
        return cls(names, kept, [], [], [], torch.get_num_threads(), fan_in_fan_out)

    def note(self, original: Tensor, guess: Tensor) -> None:
        """Keep the elements of a chunk where `guess` is not `original`, and its checksum."""
        original = original.clone(memory_format=torch.contiguous_format)
        differs = (_bits(guess) != _bits(original)).view(-1)
        differs[_GAP - 1 :: _GAP] = True
        where = differs.nonzero().view(-1)
        self.gaps.append(torch.diff(where, prepend=where.new_tensor([-1])).to(torch.uint8))
        self.values.append(original.view(-1)[where])
        self.checksums.append(_checksum(original))

    @property
    def nbytes(self) -> int:
        """Bytes of factors and corrections."""
        factors = (tensor for part in self.parts for tensor in part.factors if tensor is not None)
        return sum(tensor.nbytes for tensor in (*factors, *self.gaps, *self.values))

    def undo(self, layer: BaseTunerLayer) -> None:
        """Take the update off again and correct what rounding changed, chunk by chunk.

        Raises:
            RuntimeError: A chunk does not come out as it was, so that the weights or this record must
                have been changed from outside.
        """
        window = _window(layer.get_base_layer().weight, self.fan_in_fan_out)
        for (start, stop), original in zip(_chunks(window.rows), self._originals(window), strict=True):
            window.rows[start:stop] = original

    def portable(self, weight: Tensor) -> tuple[MergeRecord, Tensor | None]:
        """Return a copy record, since another machine's products may round differently."""
        window = _window(weight, self.fan_in_fan_out)
        original = torch.empty_like(weight.detach())
        original_rows = _window(original, self.fan_in_fan_out).rows
        for (start, stop), chunk in zip(_chunks(window.rows), self._originals(window), strict=True):
            original_rows[start:stop] = chunk
        return CopyRecord(self.adapter_names, _local(original)), original

    def _originals(self, window: "_Window") -> Iterator[Tensor]:
        rows, scratch = window.rows, _Scratch(window, self.parts)
        for number, (start, stop) in enumerate(_chunks(rows)):
            already = rows[start:stop].clone(memory_format=torch.contiguous_format)
            if _checksum(already) == self.checksums[number]:  # an undo that was interrupted came this far
                yield already
                continue
            # The number of threads may change the order of a sum, the machine's own choice not: pin it.
            for threads in (self.threads, 1):
                with pinned_numerics(threads):
                    original = scratch.unrounded(rows[start:stop], scratch.delta(self.parts, start, stop))
                    where = self.gaps[number].cumsum(0, dtype=torch.int64).sub_(1)
                    original.view(-1)[where] = self.values[number]
                    if _checksum(original) == self.checksums[number]:
                        break
            else:
                raise RuntimeError(
                    f"the merge of {', '.join(map(repr, self.adapter_names))} can't be undone: the base weight was "
                    "changed while it was merged. Load the base model again."
                )
            yield original


class _Window(NamedTuple):
    """What this process holds of a weight, as `[out, in]`, a view: all of it, or under FSDP2 a shard."""

    rows: Tensor
    first_row: int
    first_column: int


def _window(weight: Tensor, fan_in_fan_out: bool) -> _Window:
    first = (0, 0)
    if isinstance(weight, DTensor):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        _, first = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    local = _local(weight)
    return _Window(local.T, first[1], first[0]) if fan_in_fan_out else _Window(local, *first)


def _local(weight: Tensor) -> Tensor:
    weight = weight.detach()
    return weight.to_local() if isinstance(weight, DTensor) else weight


def _sum_dtype(window: _Window, parts: list[Part]) -> torch.dtype:
    return delta_dtype(window.rows.dtype, *(part.factors.A.dtype for part in parts))


class _Scratch:
    """Memory for one chunk, used again for every chunk: fresh pages cost more than the products."""

    def __init__(self, window: _Window, parts: list[Part]) -> None:
        factors, rows = parts[0].factors, window.rows
        self.dtype = _sum_dtype(window, parts)
        self.window = window
        shape = (min(rows.shape[0], _chunk_height(rows)), rows.shape[1])
        self._delta = torch.empty(shape[0], factors.in_features, dtype=self.dtype, device=factors.A.device)
        self._sum = torch.empty(shape, dtype=self.dtype, device=rows.device)
        self._rounded = torch.empty(shape, dtype=rows.dtype, device=rows.device)

    def delta(self, parts: list[Part], start: int, stop: int) -> Tensor:
        """Return rows of the update, as wide as the window and on its device."""
        first_row, first_column = self.window.first_row, self.window.first_column
        whole = delta(parts, self.dtype, first_row + start, first_row + stop, out=self._delta[: stop - start])
        return whole[:, first_column : first_column + self._sum.shape[1]].to(self._sum.device)

    def sum(self, original: Tensor, update: Tensor) -> Tensor:
        """Return `original + update` before it is rounded."""
        return torch.add(original, update, out=self._sum[: len(update)])

    def unrounded(self, merged: Tensor, update: Tensor) -> Tensor:
        """Return `merged - update` in the dtype of `merged` and contiguous: the original, but for rounding."""
        difference = torch.sub(merged, update, out=self._sum[: len(update)])
        return self._rounded[: len(update)].copy_(difference)


def _check_finite(merged: Tensor, names: list[str], safe: bool) -> None:
    if not safe:
        return
    finite = torch.isfinite(_local(merged)).all().to(torch.uint8)
    if isinstance(merged, DTensor):  # every process must come to the same verdict
        for dimension in range(merged.device_mesh.ndim):
            group = merged.device_mesh.get_group(dimension)
            torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN, group)
    if not finite:
        raise ValueError(
            f"the merged weight must be finite; merging {', '.join(map(repr, names))} gives non-finite values. "
            "Nothing was merged."
        )


def _chunk_height(rows: Tensor) -> int:
    return max(1, CHUNK // max(1, rows.shape[1]))


def _chunks(rows: Tensor) -> list[tuple[int, int]]:
    step = _chunk_height(rows)
    return [(start, min(start + step, rows.shape[0])) for start in range(0, rows.shape[0], step)]


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(_BITS[tensor.dtype.itemsize])


def _checksum(chunk: Tensor) -> tuple[int, ...]:
    """Return numbers that a change of any element, or an exchange of two, changes."""
    words = chunk.view(torch.int64) if chunk.shape[1] * chunk.itemsize % 8 == 0 else _bits(chunk)
    sums = (words.sum(axis, dtype=torch.int64) for axis in (0, 1))
    return tuple(int((line * torch.arange(1, len(line) + 1, device=line.device)).sum()) for line in sums)


def _clone(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


# Quantised weights ----------------------------------------------------------------------------------------------------


@dataclass
class PackedRecord(MergeRecord):
    """The packed original: the base module, its weight, and the attributes that a backend overwrites."""

    base: nn.Module
    parameters: dict[str, nn.Parameter | None]
    attributes: list[tuple[Any, dict[str, Any]]]

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight."""
        weight = self.parameters.get("weight")
        return 0 if weight is None else weight.nbytes

    def undo(self, layer: BaseTunerLayer) -> None:
        """Put the packed original back, the same object with the same bits."""
        for owner, attributes in self.attributes:
            owner.__dict__.update(attributes)
        self.base.__dict__.pop("weight", None)
        self.base._parameters.clear()
        self.base._parameters.update(self.parameters)
        layer.base_layer = self.base


def _merge_quantised(layer: BaseTunerLayer, names: list[str], parts: list[Part], safe: bool, keep: bool) -> MergeRecord:
    backend: Any = layer.quantization_backend
    base = layer.get_base_layer()
    dense = dequantised(layer)
    exact = delta(parts, delta_dtype(dense.dtype, parts[0].factors.A.dtype)).to(dense.device).add_(dense)
    merged = exact.to(dense.dtype)
    _check_finite(merged, names, safe)
    record = _packed_record(names, base)
    try:
        backend.set_base_weight(layer, merged)
    except BaseException:
        record.undo(layer)
        raise
    return record if keep else ForgottenRecord(names)


def dequantised(layer: BaseTunerLayer) -> Tensor:
    """Return the quantised base weight of `layer` as a dense `[out, in]` tensor of its own."""
    base, backend = layer.get_base_layer(), cast(QuantizationBackend, layer.quantization_backend)
    state: Any = getattr(getattr(base, "weight", None), "quant_state", None)
    if not getattr(state, "packing_format_for_cpu", False):
        return backend.get_base_weight(base).detach().clone()
    # On a CPU with AVX512-BF16, bitsandbytes repacks a 4-bit weight at its first use for inference, and
    # `dequantize_4bit` reads the new format as the old one. Its own inverse works in place: on copies, then.
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse, dequantize_4bit

    absmax = state.absmax.T.reshape(-1).float()
    unpacked = copy(state)
    unpacked.original_nested = False
    data, unpacked = _convert_weight_packed_for_cpu_inverse(base.weight.data.clone(), unpacked)
    unpacked.absmax = absmax
    return dequantize_4bit(data, unpacked)


def _packed_record(names: list[str], base: nn.Module) -> PackedRecord:
    weight = getattr(base, "weight", None)
    owners = [weight, getattr(weight, "quant_state", None), getattr(base, "state", None)]
    attributes = [(owner, dict(owner.__dict__)) for owner in owners if hasattr(owner, "__dict__")]
    if "quant_state" in base.__dict__:
        attributes.append((base, {"quant_state": base.quant_state}))
    return PackedRecord(names, base, dict(base._parameters), attributes)
