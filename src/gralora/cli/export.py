"""`gralora export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from gralora.checks import dtype_named
from gralora.cli.options import argument, option

if TYPE_CHECKING:
    from gralora.export.convert import LoraExport

# As `gralora.export.formats` describes them, whose import would slow down every `--help`.
_FORMATS = "lora (a folder for vLLM, SGLang and PEFT), gguf (a file for llama.cpp), diffusers (a folder for diffusers)"
_GGUF_SUFFIX = ".gguf"


def export(
    adapter: Annotated[str, argument("Folder of an adapter.", "ADAPTER")],
    output: Annotated[str, argument("Folder to write, or file OUT.gguf.", "OUTPUT")],
    format: Annotated[
        str | None, option(f"Format to write: {_FORMATS}.", default="gguf for OUT.gguf, else lora")
    ] = None,
    target: Annotated[
        str,
        option("serving, or peft to carry over trained biases, modules and tokens.", "--for", default="serving"),
    ] = "serving",
    dtype: Annotated[str | None, option("float32, bfloat16 or float16.", default="the stored one")] = None,
    max_rank: Annotated[int | None, option("Compress layers of a higher rank.")] = None,
    max_error: Annotated[float | None, option("Compress to the smallest rank within this relative error.")] = None,
    per_layer: Annotated[bool, option("Apply --max-error to every layer.", "--per-layer")] = False,
    name: Annotated[str | None, option("Name of the adapter in requests.", default="name of the folder")] = None,
    base: Annotated[str | None, option("Base model.", default="the one that the adapter names")] = None,
    llama_cpp: Annotated[str | None, option("Checkout of llama.cpp.", default="the installed package")] = None,
    experts: Annotated[
        str | None,
        option(
            "How LoRA holds the experts of a mixture. stacked: as PEFT does, for PEFT, and for vLLM where it takes "
            "such files. per-expert: under the names of transformers 4 (gate_proj, up_proj, down_proj; w1, w3, w2 for "
            "Mixtral and MiniMax), for vLLM and SGLang, and for PEFT with models whose experts it renames.",
            default="stacked",
        ),
    ] = None,
    component: Annotated[
        str | None, option("Component of a diffusers pipeline: unet, transformer or a text encoder.")
    ] = None,
    overwrite: Annotated[bool, option("Replace an export at OUTPUT.", "--overwrite")] = False,
) -> None:
    """Write an adapter as LoRA, for vLLM, SGLang, llama.cpp, diffusers and others.

    The export is exact without --max-rank, --max-error and --dtype. It is read back and compared.
    """
    from gralora.export.convert import LoraOptions
    from gralora.export.engines import VLLM_RANKS
    from gralora.export.formats import FORMATS

    if format is None:
        format = "gguf" if output.endswith(_GGUF_SUFFIX) else "lora"
    if format not in FORMATS:
        raise ValueError(f"`format` must be one of {', '.join(FORMATS)}; got format={format!r}.")
    chosen = FORMATS[format]
    options = LoraOptions(
        dtype=dtype_named(dtype) if dtype else None,
        max_rank=max_rank,
        max_error=max_error,
        per_layer=per_layer,
        target=target,
    )
    if target not in chosen.targets:
        raise ValueError(f"`target` must be {' or '.join(chosen.targets)} for {format}; got target={target!r}.")
    if output.endswith(_GGUF_SUFFIX) and format != "gguf":
        raise ValueError(
            f"`output` must not end in .gguf for `format={format}`, which writes a folder; got {output!r}."
        )
    further = {"base": base, "llama_cpp": llama_cpp, "component": component, "experts": experts, "name": name}
    prints_commands = chosen.engines is not None and target == "serving"
    used = {*chosen.takes, *(chosen.commands_take if prints_commands else ())}
    if unused := [name for name, value in further.items() if value is not None and name not in used]:
        what = format if target == "serving" else f"{format} `target={target}`"
        raise ValueError(f"`{unused[0]}` must not be given for {what}; got {unused[0]}={further[unused[0]]!r}.")
    taken = {name: further[name] for name in chosen.takes}
    written = chosen.export(adapter, output, options, overwrite=overwrite, **taken)
    _print_errors(written)
    print(f"wrote {output}: LoRA of rank {written.rank} on {len(written.layers)} weights")
    if chosen.engines and target == "serving":
        base = base or written.config["base_model_name_or_path"] or "BASE"
        kinds = {layer.kind for layer in written.layers}
        engines = chosen.engines(written.rank, base, name or Path(output).name, output, kinds, written.experts)
        for engine in engines:
            print(f"  {engine.name:10} {engine.command or f'cannot serve it: {engine.reason}'}")
            if engine.note:
                print(f"             {engine.note}")
        if written.rank > VLLM_RANKS[-1]:
            print(
                f"  ways out: --max-rank {VLLM_RANKS[-1]} compresses the adapter; `gralora merge` merges it into the "
                "model."
            )


def _print_errors(written: LoraExport) -> None:
    compressed = [layer for layer in written.layers if layer.kept < layer.rank]
    if compressed:
        width = max(len(layer.name) for layer in compressed)
        for layer in compressed:
            print(
                f"  {layer.name:{width}}  rank {layer.rank} -> {layer.kept}  relative error {layer.relative_error:.3e}"
            )
        print(f"compressed: relative error {written.relative_error:.3e} of the whole")
    worst = written.worst
    if worst and worst.measured:
        relative = max(layer.measured.relative for layer in written.layers if layer.measured)
        print(
            f"read back: largest difference {worst.measured.largest:.2e}, at {worst.name}; largest relative error of a "
            f"layer {relative:.2e}"
        )
