"""How LoRA files hold the matrices of a layer, by kind of layer.

Every layer is one matrix ΔW `[out, in]`, or for experts one of each, with LoRA factors `lora_A [rank, in]` and
`lora_B [out, rank]`. PEFT's files hold

    linear, 2-D parameter   lora_A.weight [rank, in]               lora_B.weight [out, rank]
    convolution             lora_A.weight [rank, in, *kernel]      lora_B.weight [out, rank, 1, …]
    embedding               lora_embedding_A [rank, vocabulary]    lora_embedding_B [d, rank]
    stack of experts        lora_A.weight [experts·rank, in]       lora_B.weight [out, rank·experts]

with the expert as the slowest index of A's rows and the fastest of B's columns. Of experts that store `[in, out]`
without an attribute `is_transposed`, PEFT takes the two sides the other way round.
"""

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from gralora.files.checkpoint import AdaptedLayer, Adapter
from gralora.files.names import LORA_FACTORS

Experts = Literal["stacked", "per-expert"]
_EMBEDDING_FACTORS = ("lora_embedding_A", "lora_embedding_B")
HALVES = ("gate_proj", "up_proj")  # of a fused `gate_up_proj`


class Pair(NamedTuple):
    """LoRA factors of one matrix."""

    a: Float[Tensor, "rank in"]
    b: Float[Tensor, "out rank"]


def refusal(layer: AdaptedLayer) -> str | None:
    """Return why a layer has no equivalent LoRA in PEFT's files, and the way out, or None."""
    if layer.kind == "attention":
        return "PEFT's LoRA on attention applies the update of the output projection twice. Merge the adapter."
    if layer.kind == "conv" and "groups" in layer.record:
        return "PEFT's LoRA on a convolution with groups sees all channels, so it is another map. Merge the adapter."
    return None


def linear_refusal(adapter: Adapter, program: str) -> str | None:
    """Return which layer is not linear, for a program that knows LoRA on linear layers only, or None."""
    other = next((layer for layer in adapter.layers.values() if layer.kind != "linear"), None)
    if other is None:
        return None
    what = (
        "a stack of experts"
        if other.experts
        else {"conv": "a convolution", "embedding": "an embedding"}.get(other.kind)
    )
    return (
        f"{other.weight!r} cannot be exported for {program}, which takes LoRA on linear layers; it is "
        f"{what or 'another parameter'}. Merge the adapter into the model with `gralora merge`."
    )


def assemble(layer: AdaptedLayer, pairs: list[Pair], experts: Experts) -> dict[str, Tensor]:
    """Return the tensors of a layer by their names in a LoRA file, without the prefix.

    Args:
        layer: The layer.
        pairs: Factors of its matrices.
        experts: How stacks are written.
    """
    if layer.experts is None:
        return dict(zip(_names(layer), _shaped(layer, pairs[0]), strict=True))
    if experts == "per-expert":
        return dict(_per_expert(layer, pairs))
    sides = [_as_peft_has_it(layer, pair) for pair in pairs]
    a = torch.cat([pair.a for pair in sides])
    b = torch.stack([pair.b for pair in sides], dim=2).flatten(1)
    return dict(zip(_names(layer), (a, b), strict=True))


def disassemble(layer: AdaptedLayer, read: Callable[[str], Tensor], experts: Experts) -> Iterator[Pair]:
    """Yield the factors of each matrix of a layer.

    Args:
        layer: The layer.
        read: Returns a tensor by its name in the file, without the prefix.
        experts: How stacks were written.
    """
    if layer.experts is None:
        a, b = (read(name) for name in _names(layer))
        yield Pair(a.flatten(1), b.flatten(1))
        return
    if experts == "per-expert":
        yield from _from_experts(layer, read)
        return
    a, b = (read(name) for name in _names(layer))
    a, b = a.unflatten(0, (layer.experts, -1)), b.unflatten(1, (-1, layer.experts))
    for index in range(layer.experts):
        yield _as_peft_has_it(layer, Pair(a[index], b[:, :, index]))


def _names(layer: AdaptedLayer) -> list[str]:
    factors = _EMBEDDING_FACTORS if layer.kind == "embedding" else LORA_FACTORS
    return [f"{layer.name}.{factor}" for factor in factors]


def _shaped(layer: AdaptedLayer, pair: Pair) -> tuple[Tensor, Tensor]:
    a, b = pair
    if layer.kind == "embedding":
        return a[:, : layer.in_features].contiguous(), b
    if layer.kind == "conv":
        _, *kernel = layer.record["shape"]
        return a.unflatten(1, kernel), b.view(*b.shape, *[1] * (len(kernel) - 1))
    return a, b


def _as_peft_has_it(layer: AdaptedLayer, pair: Pair) -> Pair:
    """Swap the sides where PEFT takes the stored matrix `[in, out]` for one of `[out, in]`; its own inverse."""
    return Pair(pair.b.T, pair.a.T) if layer.record.get("unmarked") else pair


def _per_expert(layer: AdaptedLayer, pairs: list[Pair]) -> Iterator[tuple[str, Tensor]]:
    module, _, parameter = layer.weight.rpartition(".")
    for index, (a, b) in enumerate(pairs):
        parts = [(parameter, b)]
        if parameter == "gate_up_proj":
            parts = list(zip(HALVES, _halves(layer, b), strict=True))
        for name, rows in parts:
            # Tensors in a file must not share memory.
            yield f"{module}.{index}.{name}.{LORA_FACTORS[0]}", a.clone()
            yield f"{module}.{index}.{name}.{LORA_FACTORS[1]}", rows.contiguous()


def _from_experts(layer: AdaptedLayer, read: Callable[[str], Tensor]) -> Iterator[Pair]:
    module, _, parameter = layer.weight.rpartition(".")
    for index in range(layer.experts or 0):
        names = HALVES if parameter == "gate_up_proj" else (parameter,)
        a, *others = (read(f"{module}.{index}.{name}.{LORA_FACTORS[0]}") for name in names)
        rows = [read(f"{module}.{index}.{name}.{LORA_FACTORS[1]}") for name in names]
        if any(not torch.equal(a, other) for other in others):
            raise RuntimeError(f"{layer.weight!r}: gate and up of expert {index} must have the same `lora_A`.")
        yield Pair(a, _joined(layer, rows))


def _halves(layer: AdaptedLayer, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of gate and of up."""
    if layer.record.get("interleaved"):
        return b[::2], b[1::2]
    gate, up = b.chunk(2)
    return gate, up


def _joined(layer: AdaptedLayer, rows: list[Tensor]) -> Tensor:
    """Return the rows of gate and up in the order in which they are stored together."""
    if len(rows) == 2 and layer.record.get("interleaved"):
        return torch.stack(rows, dim=1).flatten(0, 1)
    return torch.cat(rows)
