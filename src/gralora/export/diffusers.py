"""LoRA for diffusers: a file whose keys begin with the component, and whose scale is one."""

from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from gralora.export.lora import LoraExport, LoraOptions, check_written, convert
from gralora.export.verify import LoraFile
from gralora.files.atomic import appearing, check_output
from gralora.files.checkpoint import PREFIX, Adapter, open_adapter

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"  # that diffusers looks for in a folder
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
_UNET = ("down_blocks.", "up_blocks.", "mid_block.")


def to_diffusers(
    source: str | Path | nn.Module,
    output: str | Path,
    options: LoraOptions,
    component: str | None = None,
    overwrite: bool = False,
) -> LoraExport:
    """Write an adapter of one component of a pipeline for diffusers' `load_lora_adapter` and `load_lora_weights`.

    Older versions of diffusers know no `lora_alpha` in a file, so the scale is folded into B.

    Args:
        source: Folder of an adapter, or a model that carries one.
        output: Folder to write.
        options: What is wanted; the scale is folded in whatever they say.
        component: Of the pipeline; by default "unet" where the modules have a UNet's names, else "transformer".
        overwrite: Replace an export at `output`.

    Raises:
        ValueError: As `to_lora`, or a component that a pipeline has none of.
    """
    if component not in (None, *COMPONENTS):
        raise ValueError(f"`component` must be one of {', '.join(COMPONENTS)}; got component={component!r}.")
    inputs = () if isinstance(source, nn.Module) else (Path(source),)
    path = check_output(output, overwrite, inputs)
    adapter = open_adapter(source)
    options = replace(options, bake_scale=True, target="serving")
    export = convert(adapter, options)
    prefix = f"{component or _component_of(adapter)}."
    tensors = {prefix + key.removeprefix(PREFIX): tensor for key, tensor in export.tensors.items()}
    with appearing(path) as folder:
        folder.mkdir()
        save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        export = check_written(adapter, export, LoraFile(folder, folder / WEIGHTS_NAME, prefix), options)
    return replace(export, path=path)


def _component_of(adapter: Adapter) -> str:
    return "unet" if any(name.startswith(_UNET) for name in adapter.layers) else "transformer"
