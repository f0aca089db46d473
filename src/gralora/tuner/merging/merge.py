"""Merging into one base weight: whether it is possible, and everything that has to be known before it is written."""

from collections.abc import Callable

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gralora.tuner.merging import dense, quantised, stack
from gralora.tuner.merging.dense_update import Part
from gralora.tuner.merging.records import ForgottenRecord, MergeRecord, SharedRecord, TiedRecord, kept_parts
from gralora.tuner.merging.sharing import UNSHARED, Sharing, own_copy
from gralora.tuner.merging.weight import WeightRef, WeightState
from gralora.tuner.numerics import pinned_numerics


def rewrite_refusal(ref: WeightRef, backend: QuantizationBackend | None) -> str | None:
    """Return why a weight can never be read and rewritten, and the way out, or None where it can."""
    way_out = "to merge, load the base model in 16 or 32 bits"
    if backend is not None:
        return None if backend.supports_merge else f"{backend.backend_name} weights cannot be written; {way_out}"
    # PEFT's wrapper of trainable tokens computes its `weight` when asked, from tensors that may be on meta.
    weight = None if isinstance(ref.owner, AuxiliaryTrainingWrapper) else ref.parameter
    if not isinstance(weight, Tensor if _flattened_by_fsdp1(ref.owner) else nn.Parameter):
        return f"its base, {type(ref.owner).__name__}, holds no plain `{ref.name}` parameter"
    if type(weight) not in (nn.Parameter, Tensor, DTensor):
        return f"its base weight is a {type(weight).__name__}; {way_out}"
    if not weight.is_floating_point() or weight.dtype.itemsize == 1:
        return f"its base weight is of type {weight.dtype}; {way_out}"
    return None


def absence_refusal(ref: WeightRef) -> str | None:
    """Return why a weight cannot be rewritten at the moment, because of how it is sharded, or None."""
    weight = ref.parameter
    if isinstance(weight, DTensor):
        sharded = "only a part of its stack of experts is here. Merge in a process that holds the whole model."
        return None if ref.experts is None else sharded
    # FSDP1 and ZeRO-3 leave a vector, which may be empty, in the state of a weight.
    flat = isinstance(weight, nn.Parameter) and weight.is_floating_point() and weight.dim() < 2
    if flat or (_flattened_by_fsdp1(ref.owner) and not isinstance(weight, nn.Parameter)):
        return (
            "only a shard of its base weight is here. Merge and unmerge inside one `with` of FSDP's "
            "`summon_full_params` or DeepSpeed's `GatheredParameters`."
        )
    # Both kinds of FSDP mark their modules so; FSDP1 alone marks the parameter, or says that it was flattened.
    fsdp1 = getattr(weight, "_fsdp_flattened", False) or _flattened_by_fsdp1(ref.owner)
    if getattr(ref.owner, "_is_fsdp_managed_module", False) and not fsdp1:
        return (
            "its base weight is gathered for a forward pass, so that what is written to it would be lost. Call "
            "`reshard()` of the model that `fully_shard` returned first."
        )
    return None


def separation_refusal(base: nn.Module, ref: WeightRef, sharing: Sharing, own_weights: bool) -> str | None:
    """Return why a weight cannot be replaced by one of its own where it has to be, or None."""
    if isinstance(ref.parameter, DTensor):
        if sharing:
            return "its base weight is sharded and tied to another one. Untie them, or take it out of `target_modules`."
        if own_weights:
            return "its base weight is sharded, so it cannot be replaced by one of its own (`own_weights=True`)."
    if sharing.module and "forward" in base.__dict__:
        return (
            f"its base, {type(base).__name__}, is called from elsewhere in the model too, and its `forward` was "
            "replaced (by offloading, say), so it cannot be copied. Merge before that, or take it out of "
            "`target_modules`."
        )
    return None


def _flattened_by_fsdp1(base: nn.Module) -> bool:
    """Return whether FSDP1 (`use_orig_params=False`) makes a parameter of the weight in `summon_full_params` only."""
    return not getattr(base, "_fsdp_use_orig_params", True)


def prepare(
    layer: BaseTunerLayer,
    names: list[str],
    parts: list[Part],
    safe: bool = False,
    keep: bool = True,
    sharing: Sharing = UNSHARED,
) -> tuple[MergeRecord, Callable[[], None]]:
    """Compute the merge of `parts` into the base weight of `layer`; nothing has changed yet.

    A dense weight is written in state, into the same storage; one that another module holds too is
    replaced by a parameter of its own. A quantised one is dequantised, merged and quantised again.

    Args:
        layer: Tuner layer.
        names: Names of the adapters, for the record.
        parts: Factors and scales of the adapters.
        safe: Refuse a result that is not finite.
        keep: Keep what an unmerge needs.
        sharing: What of the base others hold, which must stay as it is.

    Returns:
        The record that undoes the merge, and a function that writes the merged weight.

    Raises:
        ValueError: A non-finite result with `safe`.
        RuntimeError: The weight is not loaded.
    """
    now = WeightState.of(layer)
    own_module = own_copy(now.base) if sharing.module else None
    with pinned_numerics():
        if layer.quantization_backend is not None:
            merged, record, write = quantised.prepare(layer, names, parts, keep, own_module)
            dense.check_finite(merged, now.parameter, names, safe)
            return record, write
        if now.parameter.device.type == "meta":
            raise RuntimeError("this layer cannot be merged: its base weight is not loaded (meta device).")
        if now.ref.experts is not None:
            return stack.prepare(layer, names, parts, safe, keep, bool(sharing))
        kept = kept_parts(now.stored, parts) if keep and not sharing else None
        values, record, fingerprints = dense.merged(now, names, parts, kept)
        dense.check_finite(values, now.parameter, names, safe)
        if record is None:
            record = SharedRecord(names, *fingerprints, now) if keep else ForgottenRecord(names, *fingerprints)
        state = now._replace(values=values)
        if sharing:
            if values.stride() != now.parameter.stride():  # keep its memory layout (`channels_last`, say)
                values = torch.empty_like(now.parameter).copy_(values)
            parameter = nn.Parameter(values, now.parameter.requires_grad)
            base = own_module or now.base
            owner = base if now.ref.owner is now.base else now.ref.owner
            state = WeightState(base, now.ref._replace(owner=owner), parameter)
        return record, lambda: state.put_back(layer)


def take_over(
    layer: BaseTunerLayer, names: list[str], leader: BaseTunerLayer, keep: bool
) -> tuple[MergeRecord, Callable[[], None]]:
    """Return the record of giving `layer` the merged weight of `leader`, and a function that does it."""
    now = WeightState.of(layer)
    merged = now._replace(parameter=WeightState.of(leader).parameter)
    if keep:
        record: MergeRecord = TiedRecord(names, (), (), now, merged.parameter)
    else:
        record = ForgottenRecord(names, now.fingerprint(), merged.fingerprint())
    return record, lambda: merged.put_back(layer)
