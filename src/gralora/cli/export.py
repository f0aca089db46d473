"""`gralora export`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from gralora.export.diffusers import to_diffusers
from gralora.export.engines import engines_for, llama_cpp_command, ways_out
from gralora.export.gguf import to_gguf
from gralora.export.lora import LoraExport, LoraOptions, to_lora
from gralora.pretrained import DTYPES

_FORMATS = ("lora", "gguf", "diffusers")


def _option(help: str, *names: str) -> Any:
    return typer.Option(*names, help=help, show_default=False)


def export(
    adapter: Annotated[str, typer.Argument(help="Folder of an adapter.", show_default=False)],
    output: Annotated[str, typer.Argument(help="What to write: a folder, or a file OUT.gguf.", show_default=False)],
    format: Annotated[str, _option("lora, gguf or diffusers. [default: lora]")] = "lora",
    target: Annotated[
        str, _option("serving, or peft to carry over trained biases, modules and tokens. [default: serving]", "--for")
    ] = "serving",
    dtype: Annotated[str | None, _option("float32, bfloat16 or float16. [default: as it is stored]")] = None,
    max_rank: Annotated[int | None, _option("Compress layers of a higher rank.")] = None,
    max_error: Annotated[float | None, _option("Compress to the rank that costs at most this relative error.")] = None,
    per_layer: Annotated[bool, _option("--max-error holds for every layer.", "--per-layer")] = False,
    name: Annotated[str | None, _option("What requests call the adapter. [default: that of the folder]")] = None,
    base: Annotated[str | None, _option("Base model, instead of the one the adapter names.")] = None,
    llama_cpp: Annotated[str | None, _option("Checkout of llama.cpp, instead of the package.")] = None,
    component: Annotated[str | None, _option("Of a diffusers pipeline: unet, transformer or a text encoder.")] = None,
    overwrite: Annotated[bool, _option("Replace an export at OUTPUT.", "--overwrite")] = False,
) -> None:
    """Write an adapter as LoRA, for vLLM, SGLang, llama.cpp, diffusers and others.

    Exact, unless --max-rank, --max-error or --dtype ask for less. What was written is read back and compared.
    """
    if format not in _FORMATS:
        raise ValueError(f"`format` must be lora, gguf or diffusers; got format={format!r}.")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"`dtype` must be float32, bfloat16 or float16; got dtype={dtype!r}.")
    if target != "serving" and format != "lora":
        raise ValueError(f"`for` must be serving with --format {format}; got for={target!r}.")
    wanted: dict[str, Any] = {
        "dtype": DTYPES[dtype] if dtype else None,
        "max_rank": max_rank,
        "max_error": max_error,
        "per_layer": per_layer,
    }
    if format == "lora":
        written = to_lora(adapter, output, target=target, overwrite=overwrite, **wanted)
    elif format == "gguf":
        written = to_gguf(adapter, output, LoraOptions(**wanted), base, llama_cpp, overwrite)
    else:
        written = to_diffusers(adapter, output, LoraOptions(**wanted), component, overwrite)
    _print_errors(written)
    print(f"wrote {output}: LoRA of rank {written.rank} on {len(written.layers)} modules")
    if format == "lora" and target == "serving":
        base = base or written.config["base_model_name_or_path"] or "BASE"
        _print_engines(written, base, name or Path(output).name, output)
    elif format == "gguf":
        print(f"  llama.cpp  {llama_cpp_command(output)}")


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


def _print_engines(written: LoraExport, base: str, name: str, output: str) -> None:
    for engine in engines_for(written.rank, base, name, output):
        print(f"  {engine.name:10} {engine.command or f'can not serve it: {engine.reason}'}")
    print(f"  {'llama.cpp':10} gralora export --format gguf, then {llama_cpp_command('OUT.gguf')}")
    if ways := ways_out(written.rank):
        print(f"  ways out: {ways}")
