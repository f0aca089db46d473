"""LoRA as a folder in PEFT's format, which vLLM, SGLang and others read too."""

from pathlib import Path
from typing import Literal

import torch
from torch import nn

from gralora.export.convert import LoraExport, LoraOptions, convert
from gralora.export.layouts import ExpertsLayout
from gralora.export.verify import LoraFile, open_lora
from gralora.export.write import write_export
from gralora.files.checkpoint import Adapter, open_adapter


def to_lora(
    source: str | Path | nn.Module,
    output: str | Path | None = None,
    *,
    dtype: torch.dtype | None = None,
    max_rank: int | None = None,
    max_error: float | None = None,
    per_layer: bool = False,
    target: Literal["serving", "peft"] = "serving",
    experts: ExpertsLayout = "stacked",
    overwrite: bool = False,
    adapter_name: str = "default",
) -> LoraExport:
    """Convert a GraLoRA adapter to an equivalent LoRA adapter.

    *Exact*: without compression every value is copied or zero if an integer `lora_alpha` can state the scale;
    otherwise B times the scale is rounded to float32. The base model is not needed.

    Args:
        source: Folder of an adapter, or a model that carries one.
        output: Folder to write. It appears after it was read back and compared in float64. None writes nothing.
        dtype: Data type of the tensors. None keeps the stored dtype; computed values are at least float32.
        max_rank: Highest rank; layers above it are compressed to their best approximation of that rank.
        max_error: Relative Frobenius error that compression may cost; the smallest rank within it is chosen.
        per_layer: Apply `max_error` to every layer instead of to the model as a whole.
        target: "serving", or "peft" to carry over trained biases, whole modules and rows of embeddings.
        experts: How the experts of a mixture are written: "stacked" as PEFT's LoRA has them (`target_parameters`), or
            "per-expert" under the names of transformers 4, gate and up apart, as vLLM takes them for most models.
        overwrite: Replace an adapter at `output`.
        adapter_name: Name of the adapter on a model.

    Raises:
        FileNotFoundError: `source` is not the folder of an adapter.
        ValueError: The adapter is damaged or holds more than LoRA can be served with, adapts a
            layer that LoRA cannot, or an option breaks its rule.
        RuntimeError: The written update differs from the adapter's.

    Example:
        >>> from gralora import GraloraConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), GraloraConfig(r=4, alpha=8, target_modules=["0"]))
        >>> lora = to_lora(model)
        >>> lora.rank, lora.config["lora_alpha"], list(lora.tensors)
        (8, 16, ['base_model.model.0.lora_A.weight', 'base_model.model.0.lora_B.weight'])
    """
    options = LoraOptions(
        dtype=dtype, max_rank=max_rank, max_error=max_error, per_layer=per_layer, target=target, experts=experts
    )
    if output is None:
        return convert(open_adapter(source, adapter_name), options)
    return write_export(source, output, options, write_folder, overwrite=overwrite, adapter_name=adapter_name)


def write_folder(adapter: Adapter, export: LoraExport, folder: Path) -> LoraFile:
    """Write the folder and open it again."""
    export.write(folder)
    return open_lora(folder, export.experts)
