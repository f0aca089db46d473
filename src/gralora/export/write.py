"""The frame of every exporter: check, convert, write hidden, read back, then appear."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from gralora.export.convert import LoraExport, LoraOptions, convert
from gralora.export.layouts import kind_of
from gralora.export.verify import LoraFile, compare
from gralora.files.atomic import appearing, check_output
from gralora.files.checkpoint import Adapter, folders_read, open_adapter
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
    holds: tuple[str, ...] | None = None,
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
        holds: What the format can adapt, as `layouts.kind_of` says it; None for all that LoRA can.

    Raises:
        FileNotFoundError: `source` is not the folder of an adapter.
        ValueError: The output, the adapter or an option is refused.
        RuntimeError: The written update differs from the adapter's.
    """
    path = check_output(output, overwrite, folders_read(source), kind=kind)
    adapter = open_adapter(source, adapter_name)
    for name, layer in adapter.layers.items():
        if holds is not None and kind_of(layer) not in holds:
            raise ValueError(
                f"{name!r} cannot be exported to this format: it holds adapters of {', '.join(holds)} only; got "
                f"{kind_of(layer)}. Export the adapter as a folder of LoRA, or merge it with `gralora merge`."
            )
    export = convert(adapter, options)
    with appearing(path) as hidden:
        export = _measured(adapter, export, writer(adapter, export, hidden), options)
    return replace(export, path=path)


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
            measured = compare(adapter, layer.name, written)
        if not measured.relative <= layer.relative_error + tolerance:
            raise RuntimeError(
                f"Nothing was exported: what was read back gives another update at {layer.name!r}, off by "
                f"{measured.relative:.1e} of its norm, with at most {tolerance:.1e} for rounding.{way_out}"
            )
        layers.append(replace(layer, measured=measured))
    return replace(export, layers=tuple(layers))
