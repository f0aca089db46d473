"""Norms, ranks and settings of an adapter, layer by layer, from its files."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gralora.export.engines import VLLM_RANKS, vllm_max_lora_rank
from gralora.export.layouts import kind_of, lora_refusal
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
        target: Name of the module in the base model, or of the parameter.
        kind: What it is, as a noun in the plural: "linear layers", "experts".
        experts: Number of matrices where the weight is a stack of them, one for each expert; None for one matrix.
        r: Rank of the blocks.
        hybrid_r: Rank of the hybrid part.
        k: Blocks per side.
        scale: Factor of the update.
        norm: Frobenius norm of ΔW, of the whole stack.
        relative_norm: Frobenius norm of ΔW divided by that of W; None without the base, or if it has no such weight.
        effective_rank: Exponential of the entropy of the singular values (Roy and Vetterli, EUSIPCO 2007);
            the mean over a stack.
        lora_rank: Rank of the exact LoRA, `k·r + hybrid_r`.
        needed_rank: Numerical rank of ΔW, the lowest LoRA rank that loses nothing; the highest in a stack.
        parameters: Number of trained values.
    """

    target: str
    kind: str
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
        no_lora_for: What it adapts that no LoRA can adapt equally, or None.
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
    no_lora_for: str | None
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
        if self.no_lora_for:
            return (
                f"PEFT and transformers as it is. No LoRA has the same update on its {self.no_lora_for}, so LoRA "
                "engines need it merged: `gralora merge`."
            )
        kinds = {layer.kind for layer in self.layers}
        if kinds & {"convolutions", "embeddings", "parameters"}:
            return (
                "PEFT and transformers as it is, and as LoRA after `gralora export`, which says which engines take it; "
                "others need it merged: `gralora merge`."
            )
        if kinds != {"linear layers"}:
            rank = self.vllm_max_lora_rank or VLLM_RANKS[-1]
            return (
                f"PEFT and transformers as it is; vLLM (--max-lora-rank {rank}), SGLang and llama.cpp after "
                "`gralora export`, which says how they take experts."
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
        no_lora_for=next((kind_of(layer) for layer in opened.layers.values() if lora_refusal(layer)), None),
        lora_rank=lora_rank,
        vllm_max_lora_rank=vllm_max_lora_rank(lora_rank),
    )


@torch.no_grad()
def block_norms(factors: Factors, scale: float) -> Float[Tensor, "k k"]:
    """Return the Frobenius norms of the blocks of ΔW; rows are output blocks, columns are input blocks."""
    delta = blocks.dense(factors.to(torch.float64), scale)
    k = factors.k
    return delta.unflatten(0, (k, -1)).unflatten(2, (k, -1)).square().sum((1, 3)).sqrt()


def _measure(adapter: Adapter, name: str, weights: BaseWeights | None) -> LayerReport:
    layer = adapter.layers[name]
    norms, effective, needed = [], [], []
    for factors in adapter.matrices(name):
        s = svd.singular_values(factors, layer.scale)
        norms.append(float(s.square().sum().sqrt()))
        effective.append(svd.effective_rank(s))
        needed.append(svd.numerical_rank(s, factors))
    norm = math.hypot(*norms)
    of = weights.norm(layer.weight_name, layer.weight_shape) if weights else None
    return LayerReport(
        target=name,
        kind=kind_of(layer),
        experts=layer.experts,
        r=layer.settings.r,
        hybrid_r=layer.settings.hybrid_r,
        k=layer.settings.gralora_k,
        scale=layer.scale,
        norm=norm,
        relative_norm=norm / of if of else None,
        effective_rank=sum(effective) / len(effective),
        lora_rank=layer.rank,
        needed_rank=max(needed),
        parameters=layer.parameters,
    )
