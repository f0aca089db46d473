"""What `gralora generate` and `gralora chat` share: their options, and how they end."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Annotated, Any

import typer

from gralora.cli.options import argument, option
from gralora.recipe.answering.generation import GenerationOptions

DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(GenerationOptions)}

Adapter = Annotated[str, argument("Folder of an adapter.", "ADAPTER")]
Model = Annotated[str | None, option("Base model.", default="the one that the adapter names")]
System = Annotated[str | None, option("System prompt.", default="the chat template's own")]
MaxNewTokens = Annotated[int, option("Maximum length of an answer in tokens.", default=DEFAULTS["max_new_tokens"])]
AdapterOn = Annotated[
    bool, option("Use the adapter, or the base model alone.", "--adapter/--no-adapter", default="adapter")
]
Temperature = Annotated[float, option("Sampling temperature; 0 for greedy decoding.", default=DEFAULTS["temperature"])]
TopP = Annotated[
    float | None,
    option("Sample from the likeliest tokens that have this share of the probability.", default="the model's own"),
]
TopK = Annotated[int | None, option("Sample from this number of the likeliest tokens.", default="the model's own")]
Dtype = Annotated[
    str, option("Dtype of the base model: auto, float32, bfloat16 or float16.", default=DEFAULTS["dtype"])
]
LoadIn = Annotated[str | None, option("4bit or 8bit: quantise the base model while it is loaded.")]
AllowMissing = Annotated[bool, option("Let weights that the base model lacks start at random.", "--allow-missing")]
Threads = Annotated[int | None, option("Number of CPU threads.", default="torch's own")]
Seed = Annotated[int, option("Random seed for sampling.", default=DEFAULTS["seed"])]


@contextmanager
def ending_quietly() -> Iterator[None]:
    """End the process with status 130 on Ctrl-C, and with 141 where nobody reads the output any more."""
    try:
        yield
    except KeyboardInterrupt:
        write("\n")
        raise typer.Exit(130) from None
    except BrokenPipeError:
        # Nothing may be flushed to the pipe again when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(141) from None


def write(text: str) -> None:
    """Write to standard output at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def note(text: str) -> None:
    """Print a line for the user to standard error."""
    print(text, file=sys.stderr)
