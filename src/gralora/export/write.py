"""The frame of every exporter: check, convert, write hidden, read back, then appear."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from gralora.export.convert import LoraExport, LoraOptions, convert
from gralora.export.verify import LoraFile, compare
from gralora.files.atomic import appearing, check_output
from gralora.files.checkpoint import Adapter, folders_read, open_adapter
from gralora.files.names import module_name
from gralora.tuner.layer import gralora_layers
from gralora.tuner.numerics import threads_for

# What float32 may add to the error of an update, relative to its norm.
_TOLERANCE = 1e-6

Writer = Callable[[Adapter, LoraExport, Path], LoraFile]


def write_export(
    source: str | Path | nn.Module,
    output: str | Path,
    options: LoraOptions,
    writer: Writer,
    *,
    overwrite: bool = False,
    adapter_name: str = "default",
    kind: Literal["folder", "file"] = "folder",
) -> LoraExport:
    """Convert an adapter and write it; `output` appears only when what was read back is right.

    Args:
        source: Folder of an adapter, or a model that carries one.
        output: Folder or file to write.
        options: Options of the export.
        writer: Writes the LoRA to a path that does not exist, and returns the LoRA factors that it wrote.
        overwrite: Replace an export at `output`.
        adapter_name: Name of the adapter on a model.
        kind: What `writer` writes.

    Raises:
        FileNotFoundError: `source` is not the folder of an adapter.
        ValueError: The output, the adapter or an option is refused.
        RuntimeError: The written update differs from the adapter's.
    """
    path = check_output(output, overwrite, folders_read(source), kind=kind)
    adapter = open_for_export(source, adapter_name)
    export = convert(adapter, options)
    with appearing(path) as hidden:
        export = _measured(adapter, export, writer(adapter, export, hidden), options)
    return replace(export, path=path)


def open_for_export(source: str | Path | nn.Module, adapter_name: str) -> Adapter:
    """Open an adapter that is to be exported as LoRA.

    Raises:
        FileNotFoundError: The folder or one of its files is missing.
        ValueError: The source is not a complete GraLoRA adapter in PEFT's format, or adapts convolutions.
    """
    adapter = open_adapter(source, adapter_name)
    if isinstance(source, nn.Module) and (refusal := _convolution_refusal(source, adapter_name)):
        raise ValueError(refusal)
    return adapter


def _convolution_refusal(model: nn.Module, adapter_name: str) -> str | None:
    """Return why an adapter on `model` has no LoRA with two matrices in each layer, or None."""
    for name, layer in gralora_layers(model).items():
        weight = None if layer.quantization_backend else layer.weight_ref().parameter
        if layer.has_adapter(adapter_name) and weight is not None and weight.dim() > 2:
            return (
                f"{module_name(name)!r} cannot be exported as LoRA: adapters of convolutions are not supported yet. "
                "Merge it into the model."
            )
    return None


def _measured(adapter: Adapter, export: LoraExport, written: LoraFile, options: LoraOptions) -> LoraExport:
    """Return `export` with the errors that reading it back found.

    Raises:
        RuntimeError: The written update differs from the adapter's by more than compression and rounding.
    """
    half = options.dtype not in (None, torch.float32)
    # Both factors are rounded, each by up to half of eps, and a sum may cancel.
    tolerance = 2 * torch.finfo(options.dtype).eps if half else _TOLERANCE
    way_out = " Its values may be too small for the dtype: export it in float32." if half else ""
    layers = []
    for layer in export.layers:
        with threads_for(adapter.largest):
            measured = compare(adapter.factors(layer.name), adapter.layers[layer.name].scale, written, layer.name)
        if not measured.relative <= layer.relative_error + tolerance:
            raise RuntimeError(
                f"Nothing was exported: what was read back gives another update at {layer.name!r}, off by "
                f"{measured.relative:.1e} of its norm, with at most {tolerance:.1e} for rounding.{way_out}"
            )
        layers.append(replace(layer, measured=measured))
    return replace(export, layers=tuple(layers))
