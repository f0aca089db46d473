"""`gralora generate`."""

import sys
from typing import Annotated

import typer

from gralora.recipe.answer import GenerationOptions
from gralora.recipe.answer import generate as run_generation


def generate(
    adapter: Annotated[str, typer.Argument(help="Folder of an adapter.", show_default=False)],
    model: Annotated[
        str | None, typer.Option(help="Base model, instead of the one the adapter names.", show_default=False)
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="What to say; without it, standard input.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the answer at most, in tokens.")] = 256,
    adapter_on: Annotated[
        bool, typer.Option("--adapter/--no-adapter", help="With the adapter, or the base model alone.")
    ] = True,
    temperature: Annotated[float, typer.Option(help="0 for the likeliest answer, more for a freer one.")] = 0.0,
    dtype: Annotated[str, typer.Option(help="Of the base model: auto, float32, bfloat16 or float16.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
) -> None:
    """Answer a prompt with a base model and an adapter; the text comes as it is made."""
    options = GenerationOptions(
        adapter=adapter,
        model=model,
        use_adapter=adapter_on,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        dtype=dtype,
        seed=seed,
    )
    try:
        run_generation(options, sys.stdin.read() if prompt is None else prompt, _write)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    finally:
        _write("\n")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
