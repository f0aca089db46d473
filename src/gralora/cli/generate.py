"""`gralora generate`."""

import sys
from dataclasses import fields
from typing import Annotated, Any

import typer

from gralora.cli.options import argument, option
from gralora.files.adapter_config import read_config
from gralora.recipe.answer import GenerationOptions
from gralora.recipe.answer import generate as run_generation

_DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(GenerationOptions)}


def generate(
    adapter: Annotated[str, argument("Folder of an adapter.", "ADAPTER")],
    model: Annotated[str | None, option("Base model.", default="the one that the adapter names")] = None,
    prompt: Annotated[str | None, option("Text to answer.", default="standard input")] = None,
    max_new_tokens: Annotated[
        int, option("Maximum length of the answer in tokens.", default=_DEFAULTS["max_new_tokens"])
    ] = _DEFAULTS["max_new_tokens"],
    adapter_on: Annotated[
        bool, option("Use the adapter, or the base model alone.", "--adapter/--no-adapter", default="adapter")
    ] = True,
    temperature: Annotated[
        float, option("Sampling temperature; 0 for greedy decoding.", default=_DEFAULTS["temperature"])
    ] = _DEFAULTS["temperature"],
    dtype: Annotated[
        str,
        option("Dtype of the base model: auto, float32, bfloat16 or float16.", default=_DEFAULTS["dtype"]),
    ] = _DEFAULTS["dtype"],
    seed: Annotated[int, option("Random seed for sampling.", default=_DEFAULTS["seed"])] = _DEFAULTS["seed"],
) -> None:
    """Answer a prompt with a base model and an adapter; prints the text while it is generated."""
    options = GenerationOptions(
        adapter=adapter,
        model=model,
        use_adapter=adapter_on,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        dtype=dtype,
        seed=seed,
    )
    read_config(adapter)  # a wrong folder is reported before a prompt is read
    try:
        if prompt is None:
            if sys.stdin.isatty():
                print("reading the prompt from standard input; end with Ctrl-D", file=sys.stderr)
            prompt = sys.stdin.read()
        run_generation(options, prompt, _write)
    except KeyboardInterrupt:
        _write("\n")
        raise typer.Exit(130) from None
    _write("\n")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
