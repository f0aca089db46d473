"""Norms, ranks and settings of an adapter, layer by layer, from its files."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gralora.export.engines import VLLM_RANKS, vllm_max_lora_rank
from gralora.files.checkpoint import Adapter, open_adapter
from gralora.files.model_weights import BaseWeights
from gralora.files.names import CONFIG_FILE, TENSOR_FILE
from gralora.tuner import blocks, svd
from gralora.tuner.blocks import Factors
from gralora.tuner.numerics import threads_for


@dataclass(frozen=True)
class LayerReport:
    """Measurements of one adapted layer.

    Attributes:
        target: Name of the adapted weight in the base model: of the module, or of a parameter.
        experts: Number of matrices in a stack; None for a single one. Norms are those of the stack.
        r: Rank of the blocks.
        hybrid_r: Rank of the hybrid part.
        k: Blocks per side.
        scale: Factor of the update.
        norm: Frobenius norm of ΔW.
        relative_norm: Frobenius norm of ΔW divided by that of W; None without the base, or if it has no such weight.
        effective_rank: Exponential of the entropy of the singular values (Roy and Vetterli, EUSIPCO 2007); the mean
            over experts.
        lora_rank: Rank of the exact LoRA, `k·r + hybrid_r`.
        needed_rank: Numerical rank of ΔW, the lowest LoRA rank that loses nothing; the highest of the experts'.
        parameters: Number of trained values.
    """

    target: str
    experts: int | None
    r: int
    hybrid_r: int
    k: int
    scale: float
    norm: float
    relative_norm: float | None
    effective_rank: float
    lora_rank: int
    needed_rank: int
    parameters: int


@dataclass(frozen=True)
class Report:
    """Measurements of an adapter.

    Attributes:
        adapter: Folder of the adapter.
        base_model: Base model that the adapter names.
        layers: Measurements of each layer.
        norm: Frobenius norm of all updates together.
        parameters: Number of trained values in the factors.
        also_trained: Keys of trained biases, whole modules and rows of embeddings.
        bytes: Size of config and tensor file in bytes.
        lora_rank: Highest `lora_rank` of a layer, which is the rank of an export.
        vllm_max_lora_rank: Smallest `--max-lora-rank` of vLLM that takes the rank; None if none does.
    """

    adapter: str
    base_model: str | None
    layers: tuple[LayerReport, ...]
    norm: float
    parameters: int
    also_trained: tuple[str, ...]
    bytes: int
    lora_rank: int
    vllm_max_lora_rank: int | None

    @property
    def served_on(self) -> str:
        """Programs that can serve the adapter, and how, as text."""
        if self.also_trained:
            return (
                "PEFT and transformers as it is. It holds more than factors, so LoRA engines need it merged: "
                "`gralora merge`."
            )
        others = "SGLang and llama.cpp after `gralora export`"
        if self.vllm_max_lora_rank is None:
            return (
                f"PEFT and transformers as it is, {others}; vLLM after `gralora export --max-rank {VLLM_RANKS[-1]}` "
                "or lower, or merged."
            )
        return f"PEFT and transformers as it is, vLLM (--max-lora-rank {self.vllm_max_lora_rank}), {others}."

    def to_dict(self) -> dict[str, Any]:
        """Return all fields and `served_on` as values that JSON can hold."""
        return asdict(self) | {"served_on": self.served_on}


def inspect(adapter: str | Path, base: str | Path | None = None) -> Report:
    """Measure an adapter. The base model is not loaded; its weights are read one by one if it is given.

    Args:
        adapter: Folder of the adapter.
        base: Folder of the base model, for norms relative to its weights.

    Raises:
        FileNotFoundError: A folder or one of its files is missing.
        ValueError: A file is damaged, or the adapter is not GraLoRA.
    """
    opened = open_adapter(adapter)
    weights = BaseWeights(Path(base)) if base else None
    with threads_for(opened.largest):
        layers = tuple(_measure(opened, name, weights) for name in opened.layers)
    lora_rank = max(layer.lora_rank for layer in layers)
    return Report(
        adapter=str(adapter),
        base_model=opened.config.base_model_name_or_path,
        layers=layers,
        norm=math.sqrt(sum(layer.norm**2 for layer in layers)),
        parameters=sum(layer.parameters for layer in layers),
        also_trained=opened.extras,
        bytes=sum((Path(adapter) / name).stat().st_size for name in (CONFIG_FILE, TENSOR_FILE)),
        lora_rank=lora_rank,
        vllm_max_lora_rank=vllm_max_lora_rank(lora_rank),
    )


@torch.no_grad()
def block_norms(matrices: Iterable[Factors], scale: float) -> Float[Tensor, "k k"]:
    """Return the Frobenius norms of the blocks of ΔW; rows are output blocks, columns are input blocks.

    Args:
        matrices: Factors of one matrix, or of each expert of a stack, whose blocks are taken together.
        scale: Factor of the update.
    """
    total = 0.0
    for factors in matrices:
        delta = blocks.dense(factors.to(torch.float64), scale)
        total += delta.unflatten(0, (factors.k, -1)).unflatten(2, (factors.k, -1)).square().sum((1, 3))
    return torch.as_tensor(total).sqrt()


def _measure(adapter: Adapter, name: str, weights: BaseWeights | None) -> LayerReport:
    layer, matrices = adapter.layers[name], list(adapter.matrices(name))
    spectra = [svd.singular_values(factors, layer.scale) for factors in matrices]
    norm = math.sqrt(sum(float(s.square().sum()) for s in spectra))
    of = weights.norm(layer.weight, layer.matrix_shape) if weights else None
    return LayerReport(
        target=layer.weight,
        experts=layer.experts,
        r=layer.settings.r,
        hybrid_r=layer.settings.hybrid_r,
        k=layer.settings.gralora_k,
        scale=layer.scale,
        norm=norm,
        relative_norm=norm / of if of else None,
        effective_rank=sum(map(svd.effective_rank, spectra)) / len(spectra),
        lora_rank=layer.rank,
        needed_rank=max(svd.numerical_rank(*pair) for pair in zip(spectra, matrices, strict=True)),
        parameters=layer.parameters,
    )
