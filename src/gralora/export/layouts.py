"""Where the LoRA matrices of a layer lie in a file, for each kind of layer: written here, and read back here.

A layer has one matrix, or a stack of them, one for each expert. With R the rank of the export:

| weight | `lora_A` | `lora_B` |
| --- | --- | --- |
| matrix `[out, in]` | `[R, in]` | `[out, R]` |
| stack of E matrices | `[E·R, in]`, the expert slowest | `[out, R·E]`, the expert fastest |
| embedding `[V, d]` | `lora_embedding_A` `[R, V]` | `lora_embedding_B` `[d, R]` |
| convolution | `[R, in, *kernel]` | `[out, R, 1, …]` |

A stack can be written for each expert instead, under the names that the experts had in transformers 4, as matrices.
Gate and up, which are one matrix now, then have the same `lora_A`, and their rows of `lora_B`.

These are the layouts of PEFT's LoRA. It takes the first dimension of a stack's matrices for the output, unless the
module has `is_transposed=True`. Where a module stores them as `[in, out]` without saying so, the pair of the transposed
update is written.
"""

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from gralora.files.checkpoint import AdaptedLayer
from gralora.files.names import LORA_EMBEDDING_FACTORS, LORA_FACTORS, PREFIX, key_of

ExpertsLayout = Literal["stacked", "per-expert"]
TRANSPOSED_EXPERTS = "transposed experts"  # whose pairs of transposed updates only PEFT reads
_MIXTRAL_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


class Pair(NamedTuple):
    """The LoRA of one matrix: `b · a` is its update without the scale."""

    a: Float[Tensor, "rank in"]
    b: Float[Tensor, "out rank"]


def lora_refusal(layer: AdaptedLayer, experts: ExpertsLayout = "stacked") -> str | None:
    """Return why no LoRA in PEFT's format means the update of this layer, or None."""
    record = layer.record
    if record.kind == "attention":
        return (
            "PEFT's LoRA applies the update of an attention's output projection twice (0.21), so an exact LoRA would "
            "be wrong there."
        )
    if record.kind == "conv" and record.groups > 1:
        return (
            f"it is a convolution of {record.groups} groups, and PEFT's LoRA of such a one sees all channels, so it is "
            "another map."
        )
    dropped = "dilation" if record.dilation else "padding mode" if record.padding_mode != "zeros" else None
    if record.kind == "conv" and dropped:
        return f"PEFT's LoRA leaves out the {dropped} of a convolution (0.21), so it is another map."
    if experts == "per-expert" and layer.experts is not None:
        if record.parameter not in ("gate_up_proj", "up_proj", "down_proj"):
            return f"the experts' parameter {record.parameter!r} has no names for each expert; export it stacked."
        if record.partial:
            return (
                "it was imported from a LoRA, which does not tell how gate and up are stored. Load it on its base "
                "model and save it once, which notes that."
            )
        return None
    if record.transposed and not record.unmarked and layer.experts == 1:
        return "PEFT's LoRA takes a stack of one matrix for a plain weight, and would add the update transposed."
    if record.kind not in ("linear", "conv", "embedding", "parameter"):
        return f"it is of the kind {record.kind!r}, whose LoRA is not known."
    return None


def kind_of(layer: AdaptedLayer) -> str:
    """Return what the layer adapts, as a noun in the plural."""
    if layer.experts is not None:
        return TRANSPOSED_EXPERTS if layer.record.unmarked else "experts"
    nouns = {"linear": "linear layers", "conv": "convolutions", "embedding": "embeddings", "parameter": "parameters"}
    return nouns.get(layer.record.kind, layer.record.kind)


def tensors_of(layer: AdaptedLayer, pairs: list[Pair], experts: ExpertsLayout = "stacked") -> dict[str, Tensor]:
    """Return the tensors of one layer by their keys, given the LoRA of each of its matrices, all of one rank.

    Args:
        layer: Adapted layer.
        pairs: LoRA of each matrix.
        experts: How stacks are written.
    """
    first, last = _factors(layer)
    if layer.experts is None:
        ((a, b),) = pairs
        if layer.record.kind == "conv" and layer.record.shape:
            kernel = layer.record.shape[2:]
            a, b = a.unflatten(1, (-1, *kernel)), b.view(*b.shape, *(1 for _ in kernel))
    elif experts == "per-expert":
        return _tensors_by_expert(layer, pairs)
    else:
        if layer.record.unmarked:
            pairs = [Pair(b.T, a.T) for a, b in pairs]
        a = torch.cat([a for a, _ in pairs])
        b = torch.stack([b for _, b in pairs], 2).flatten(1)
    return {key_of(layer.module, first): a.contiguous(), key_of(layer.module, last): b.contiguous()}


def pairs_of(
    layer: AdaptedLayer, read: Callable[[str], Tensor], prefix: str = PREFIX, experts: ExpertsLayout = "stacked"
) -> Iterator[Pair]:
    """Read the LoRA of each matrix of one layer from a file, in float64.

    Args:
        layer: Adapted layer.
        read: Function that returns the tensor of a key.
        prefix: Prefix of the keys.
        experts: How stacks were written.
    """
    if layer.experts is not None and experts == "per-expert":
        yield from _pairs_by_expert(layer, read, prefix)
        return
    a, b = (read(key_of(layer.module, factor, prefix)).double() for factor in _factors(layer))
    if layer.experts is None:
        yield Pair(a.flatten(1), b.flatten(1))
        return
    for a_of_one, b_of_one in zip(a.chunk(layer.experts), b.unflatten(1, (-1, layer.experts)).unbind(2), strict=True):
        yield Pair(b_of_one.T, a_of_one.T) if layer.record.unmarked else Pair(a_of_one, b_of_one)


def projections_of(layer: AdaptedLayer) -> tuple[str, ...]:
    """Return the names of the weights of one expert that are in a stack, in the order of their rows."""
    parameter = layer.record.parameter or ""
    names = ("gate_proj", "up_proj") if parameter == "gate_up_proj" else (parameter,)
    return tuple(_MIXTRAL_NAMES[name] for name in names) if layer.record.former == "mixtral" else names


def _tensors_by_expert(layer: AdaptedLayer, pairs: list[Pair]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for index, (a, b) in enumerate(pairs):
        modules = _modules_of_expert(layer, index)
        for number, module in enumerate(modules):
            # Each tensor has memory of its own, or it could not be saved.
            tensors[key_of(module, LORA_FACTORS[0])] = a.clone(memory_format=torch.contiguous_format)
            tensors[key_of(module, LORA_FACTORS[1])] = b[_rows(layer, number, len(modules))].clone()
    return tensors


def _pairs_by_expert(layer: AdaptedLayer, read: Callable[[str], Tensor], prefix: str) -> Iterator[Pair]:
    for index in range(layer.experts or 0):
        modules = _modules_of_expert(layer, index)
        first, *others = (read(key_of(module, LORA_FACTORS[0], prefix)).double() for module in modules)
        if not all(torch.equal(first, other) for other in others):
            raise RuntimeError(f"{modules[0]!r} must have the same lora_A as {modules[-1]!r}; it has another one.")
        b = first.new_empty(layer.out_features, len(first))
        for number, module in enumerate(modules):
            b[_rows(layer, number, len(modules))] = read(key_of(module, LORA_FACTORS[1], prefix)).double()
        yield Pair(first, b)


def _modules_of_expert(layer: AdaptedLayer, index: int) -> list[str]:
    """Return the names that the weights of one expert had as modules."""
    experts = layer.name.rpartition(".")[0]
    if layer.record.former == "mixtral":
        experts = f"{experts.rpartition('.mlp.')[0]}.block_sparse_moe.experts"
    return [f"{experts}.{index}.{name}" for name in projections_of(layer)]


def _rows(layer: AdaptedLayer, number: int, count: int) -> slice:
    """Return which rows of a fused weight are those of its weight `number` of `count`."""
    if layer.record.interleaved:
        return slice(number, None, count)
    height = layer.out_features // count
    return slice(number * height, (number + 1) * height)


def _factors(layer: AdaptedLayer) -> tuple[str, str]:
    return LORA_EMBEDDING_FACTORS if layer.record.kind == "embedding" else LORA_FACTORS
