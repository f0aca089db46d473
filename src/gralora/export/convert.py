"""GraLoRA to LoRA in memory: the equivalent adapter in a form that every program with LoRA support loads.

A GraLoRA adapter is a LoRA of rank `k·r + hybrid_r` with block-sparse factors (`blocks.lora_factors`), so the
conversion copies values. Programs ask for one rank for all layers, one integer `lora_alpha`, and no tensors but
`lora_A` and `lora_B`.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from gralora.checks import DTYPES, dtype_named, is_number, require_integer
from gralora.export.layouts import ExpertsLayout, Pair, kind_of, lora_refusal, tensors_of
from gralora.export.lora_config import common_alpha, lora_config
from gralora.export.rank import common_rank
from gralora.export.verify import LayerError
from gralora.files.adapter_folder import AdapterFolder
from gralora.files.checkpoint import AdaptedLayer, Adapter
from gralora.tuner import blocks, svd
from gralora.tuner.blocks import Factors
from gralora.tuner.numerics import threads_for

_WAYS_OUT = "Merge it into the model with `gralora merge`, or export it for PEFT with `target='peft'`."


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """Options of an export.

    Attributes:
        dtype: Data type of the written tensors. None keeps the stored dtype; computed values are at least float32.
        max_rank: Highest rank; layers above it are compressed.
        max_error: Relative Frobenius error that compression may cost; the smallest rank within it is chosen.
        per_layer: Apply `max_error` to every layer instead of to the model as a whole.
        target: "serving" refuses what only PEFT's LoRA can carry over: trained biases, modules and tokens.
        experts: "stacked" writes the experts of a mixture as PEFT's LoRA has them, "per-expert" each under the names
            that it had in transformers 4.
        bake_scale: Fold the scale into B even where `lora_alpha` could state it.

    Raises:
        ValueError: A value breaks its rule.
    """

    dtype: torch.dtype | None = None
    max_rank: int | None = None
    max_error: float | None = None
    per_layer: bool = False
    target: Literal["serving", "peft"] = "serving"
    experts: ExpertsLayout = "stacked"
    bake_scale: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in (None, *map(dtype_named, DTYPES)):
            raise ValueError(f"`dtype` must be float32, bfloat16 or float16; got dtype={self.dtype!r}.")
        if self.max_rank is not None:
            require_integer("max_rank", self.max_rank)
        if self.max_error is not None and not (is_number(self.max_error) and 0 <= self.max_error < 1):
            raise ValueError(f"`max_error` must be in [0, 1); got max_error={self.max_error!r}.")
        if self.per_layer and self.max_error is None:
            raise ValueError("`per_layer` must come with `max_error`.")
        if self.target not in ("serving", "peft"):
            raise ValueError(f"`target` must be 'serving' or 'peft'; got target={self.target!r}.")
        if self.experts not in ("stacked", "per-expert"):
            raise ValueError(f"`experts` must be 'stacked' or 'per-expert'; got experts={self.experts!r}.")


@dataclass(frozen=True)
class ExportedLayer:
    """The result for one layer.

    Attributes:
        name: Name of the module in the base model, or of the parameter.
        kind: What the layer adapts, as a noun in the plural: "linear layers", "experts".
        rank: Rank of the exact LoRA, `k·r + hybrid_r`.
        kept: Number of rows of `lora_A` that are not padding; of a stack, those of the expert with the most.
        relative_error: Frobenius norm of what compression cut off, relative to that of ΔW; 0 for a copy.
        measured: Error found by reading the written file back; None before that.
    """

    name: str
    kind: str
    rank: int
    kept: int
    relative_error: float
    measured: LayerError | None = None


@dataclass
class LoraExport(AdapterFolder):
    """A LoRA adapter made from a GraLoRA adapter.

    Attributes:
        rank: Rank of every layer.
        layers: The result for each layer.
        relative_error: Frobenius norm of what compression cut off in the whole model, relative to that of ΔW.
        experts: How stacks of experts are written.
        path: Folder or file that was written; None before that.
    """

    rank: int
    layers: tuple[ExportedLayer, ...]
    relative_error: float
    experts: ExpertsLayout = "stacked"
    path: Path | None = None

    @property
    def worst(self) -> ExportedLayer | None:
        """The layer with the largest measured difference of two entries, or None before anything was read back."""
        measured = [(layer.measured.largest, layer) for layer in self.layers if layer.measured]
        return max(measured, key=lambda pair: pair[0])[1] if measured else None


def convert(adapter: Adapter, options: LoraOptions) -> LoraExport:
    """Convert `adapter` to LoRA, one layer at a time.

    Raises:
        ValueError: The adapter holds more than LoRA can be served with, a layer that LoRA cannot adapt, or values that
            are not finite.
    """
    for name, layer in adapter.layers.items():
        if refusal := lora_refusal(layer, options.experts):
            raise ValueError(
                f"{name!r} cannot be exported as LoRA: {refusal} Merge it into the model with `gralora merge`."
            )
    if options.target == "serving" and (refusal := serving_refusal(adapter)):
        raise ValueError(refusal)
    with threads_for(adapter.largest):
        return _convert(adapter, options)


def serving_refusal(adapter: Adapter) -> str | None:
    """Return why programs that serve LoRA cannot take the adapter: it has more than factors. None if they can."""
    if adapter.config.ensure_weight_tying:
        return (
            "An adapter to be served as LoRA must not tie layers; got ensure_weight_tying=True: programs would put it "
            f"on the embedding alone. {_WAYS_OUT}"
        )
    if adapter.config.layer_replication:
        return (
            "An adapter to be served as LoRA must fit the base model's own layers; got layer_replication="
            f"{adapter.config.layer_replication!r}. {_WAYS_OUT}"
        )
    if not (adapter.extras or adapter.config.modules_to_save):
        return None
    if adapter.config.trainable_token_indices:
        got = f"trainable_token_indices={adapter.config.trainable_token_indices!r}"
    elif adapter.config.modules_to_save:
        got = f"modules_to_save={sorted(adapter.config.modules_to_save)!r}"
    elif adapter.config.bias != "none":
        got = f"bias={adapter.config.bias!r}, with {len(adapter.extras)} trained biases"
    else:
        got = f"also {adapter.extras[0]!r}" + (f" and {len(adapter.extras) - 1} more" if adapter.extras[1:] else "")
    return f"An adapter to be served as LoRA must hold factors alone; got {got} in {adapter.where!r}. {_WAYS_OUT}"


def _convert(adapter: Adapter, options: LoraOptions) -> LoraExport:
    rank = common_rank(adapter, options.max_rank, options.max_error, options.per_layer)
    lora_alpha = rank if options.bake_scale else common_alpha(adapter, rank)
    compresses = options.max_rank is not None or options.max_error is not None
    tensors: dict[str, Tensor] = {}
    layers, lost_squared, total_squared = [], 0.0, 0.0
    for name, layer in adapter.layers.items():
        # B of every matrix times what `lora_alpha` does not state.
        scale = layer.scale / (lora_alpha / rank)
        matrices = [_lora_of(layer, factors, scale, rank, compresses) for factors in adapter.matrices(name)]
        lost, total = (sum(values) for values in zip(*((m.lost, m.total) for m in matrices), strict=True))
        lost_squared, total_squared = lost_squared + lost, total_squared + total
        kept = max(matrix.pair.a.shape[0] for matrix in matrices)
        layers.append(ExportedLayer(name, kind_of(layer), layer.rank, kept, math.sqrt(lost / total) if total else 0.0))
        pairs = [Pair(_pad(pair.a, rank, 0), _pad(pair.b, rank, 1)) for pair, _, _ in matrices]
        for key, tensor in tensors_of(layer, pairs, options.experts).items():
            tensors[key] = _cast(tensor, options.dtype, name)
    for key in adapter.extras:
        tensors[key] = adapter.tensors.read(key)
    return LoraExport(
        config=lora_config(adapter, rank, lora_alpha, options.experts),
        tensors=tensors,
        rank=rank,
        layers=tuple(layers),
        relative_error=math.sqrt(lost_squared / total_squared) if total_squared else 0.0,
        experts=options.experts,
    )


class _Lora(NamedTuple):
    """The LoRA of one matrix; `lost` and `total` are the squares of the norms of what was cut off and of all."""

    pair: Pair
    lost: float
    total: float


def _lora_of(layer: AdaptedLayer, factors: Factors, scale: float, rank: int, compresses: bool) -> _Lora:
    """Return the LoRA of one matrix, exact if its rank allows, else the best of that rank."""
    if layer.rank <= rank:
        lora_a, lora_b = blocks.lora_factors(factors)
        if scale != 1:
            lora_b = (lora_b.double() * scale).to(_computed(layer))
        lost, total = 0.0, float(svd.core_of(factors, scale).matrix.square().sum()) if compresses else 0.0
    else:
        lora_a, lora_b, s = svd.best_lora(factors, scale, rank)
        lora_a, lora_b = lora_a.to(_computed(layer)), lora_b.to(_computed(layer))
        lost, total = float(s[lora_a.shape[0] :].square().sum()), float(s.square().sum())
    return _Lora(Pair(lora_a[:, : layer.in_features], lora_b), lost, total)


def _computed(layer: AdaptedLayer) -> torch.dtype:
    """Return the dtype of computed values where the stored dtype is kept."""
    return torch.promote_types(layer.dtype, torch.float32)


def _pad(matrix: Float[Tensor, "rows columns"], rank: int, dim: int) -> Tensor:
    missing = rank - matrix.shape[dim]
    if not missing:
        return matrix.contiguous()
    zeros = matrix.new_zeros(*(missing if d == dim else size for d, size in enumerate(matrix.shape)))
    return torch.cat([matrix, zeros], dim)


def _cast(matrix: Tensor, dtype: torch.dtype | None, name: str) -> Tensor:
    if dtype is None:
        return matrix
    cast = matrix.to(dtype)
    if not torch.isfinite(cast).all():
        raise ValueError(
            f"`dtype` must hold every value; got dtype={dtype} with {float(matrix.abs().max()):.3g} at {name!r}. Take "
            "bfloat16."
        )
    return cast
