"""The table of export formats, which the command line reads. A new format is one file and one entry here."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from gralora.export.convert import LoraExport, LoraOptions
from gralora.export.diffusers import to_diffusers
from gralora.export.engines import Engine, gguf_engines, lora_engines
from gralora.export.gguf import to_gguf
from gralora.export.layouts import ExpertsLayout
from gralora.export.lora import write_folder
from gralora.export.write import write_export


def _to_lora(
    source: str | Path | nn.Module,
    output: str | Path,
    options: LoraOptions,
    experts: ExpertsLayout | None = None,
    overwrite: bool = False,
) -> LoraExport:
    options = replace(options, experts=experts or "stacked")
    return write_export(source, output, options, write_folder, overwrite=overwrite)


@dataclass(frozen=True)
class Format:
    """One export format.

    Attributes:
        description: Text that says what is written and for which programs.
        export: Function that takes source, output, options, `overwrite` and what `takes` names.
        takes: Names of further arguments of `export`.
        targets: Values of `LoraOptions.target` that the format supports.
        engines: Function that returns how programs serve the export, as `engines.lora_engines`; None if no
            command serves it.
        commands_take: Names of the further arguments that `engines` puts into commands.
    """

    description: str
    export: Callable[..., LoraExport]
    takes: tuple[str, ...] = ()
    targets: tuple[str, ...] = ("serving",)
    engines: Callable[..., list[Engine]] | None = None
    commands_take: tuple[str, ...] = ()


FORMATS = {
    "lora": Format(
        "a folder for vLLM, SGLang and PEFT",
        _to_lora,
        takes=("experts",),
        targets=("serving", "peft"),
        engines=lora_engines,
        commands_take=("base", "name"),
    ),
    "gguf": Format("a file for llama.cpp", to_gguf, takes=("base", "llama_cpp"), engines=gguf_engines),
    "diffusers": Format("a folder for diffusers", to_diffusers, takes=("component",)),
}
