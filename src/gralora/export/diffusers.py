"""LoRA for diffusers: a file whose keys begin with the name of a component, and whose scale is 1."""

from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from gralora.export.convert import LoraExport, LoraOptions
from gralora.export.verify import LoraFile
from gralora.export.write import write_export
from gralora.files.checkpoint import Adapter
from gralora.files.names import COMPONENTS, DIFFUSERS_FILE, PREFIX, component_of
from gralora.files.tensors import TensorFile


def to_diffusers(
    source: str | Path | nn.Module,
    output: str | Path,
    options: LoraOptions,
    component: str | None = None,
    overwrite: bool = False,
) -> LoraExport:
    """Write the adapter of one component of a pipeline for diffusers' `load_lora_adapter` and `load_lora_weights`.

    Older versions of diffusers know no `lora_alpha` in a file, so the scale is folded into B.

    Args:
        source: Folder of an adapter, or a model that carries one.
        output: Folder to write.
        options: Options of the export; `bake_scale` is always on and `target` always "serving".
        component: Component of the pipeline. None is "unet" if the modules have the names of a UNet's, else
            "transformer".
        overwrite: Replace an export at `output`.

    Raises:
        FileNotFoundError: `source` is not the folder of an adapter.
        ValueError: As for `to_lora`, or `component` is not one of a pipeline's.
        RuntimeError: The written update differs from the adapter's.
    """
    if component not in (None, *COMPONENTS):
        raise ValueError(f"`component` must be one of {', '.join(COMPONENTS)}; got component={component!r}.")

    def write(adapter: Adapter, export: LoraExport, folder: Path) -> LoraFile:
        prefix = f"{component or component_of(adapter.layers)}."
        tensors = {prefix + key.removeprefix(PREFIX): tensor for key, tensor in export.tensors.items()}
        folder.mkdir()
        save_file(tensors, folder / DIFFUSERS_FILE, metadata={"format": "pt"})
        return LoraFile(TensorFile(folder / DIFFUSERS_FILE), prefix=prefix)

    options = replace(options, bake_scale=True, target="serving")
    return write_export(source, output, options, write, overwrite=overwrite, holds=("linear layers", "convolutions"))
