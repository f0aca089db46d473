"""Answering a prompt with a base model and an adapter from a folder."""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from gralora import pretrained
from gralora.recipe.generation import stream_answer
from gralora.recipe.progress import Reporter, quiet_libraries


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """What answers, and how.

    Attributes:
        adapter: Folder of an adapter.
        model: Base model; None for the one that the adapter names.
        use_adapter: False for the base model alone.
        max_new_tokens: Length of the answer at most.
        temperature: 0 for greedy decoding.
        dtype: Of the base model.
        seed: Of the sampling.

    Raises:
        ValueError: A value breaks its rule.
        FileNotFoundError: `adapter` is not the folder of an adapter.
    """

    adapter: str
    model: str | None = None
    use_adapter: bool = True
    max_new_tokens: int = 256
    temperature: float = 0.0
    dtype: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` must be a positive integer; got max_new_tokens={self.max_new_tokens}.")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"`temperature` must be zero or a positive number; got temperature={self.temperature}.")
        pretrained.choose_dtype(self.dtype)
        if not (Path(self.adapter) / "adapter_config.json").is_file():
            raise FileNotFoundError(
                f"`adapter` must be the folder of an adapter; {self.adapter!r} has no adapter_config.json."
            )

    def base_model(self) -> str:
        """Return the name of the base model.

        Raises:
            ValueError: None is given, and the adapter names none.
        """
        if self.model:
            return self.model
        stored = json.loads((Path(self.adapter) / "adapter_config.json").read_text()).get("base_model_name_or_path")
        if not stored:
            raise ValueError(f"`model` must be given: the adapter in {self.adapter!r} names no base model.")
        return stored


def generate(options: GenerationOptions, prompt: str, write: Callable[[str], None]) -> None:
    """Answer `prompt`, and pass the text to `write` piece by piece.

    Raises:
        ValueError: An empty prompt.
    """
    from peft import PeftModel

    if not prompt.strip():
        raise ValueError("`prompt` must have text; got none.")
    with quiet_libraries(_StderrNotes()):
        model, tokenizer = pretrained.load(options.base_model(), options.dtype)
        if options.use_adapter:
            model = PeftModel.from_pretrained(model, options.adapter)
        if torch.cuda.is_available():
            model = model.to("cuda")
        torch.manual_seed(options.seed)
        stream_answer(model, tokenizer, prompt.strip("\n"), options.max_new_tokens, options.temperature, write)


class _StderrNotes(Reporter):
    """Standard output is for the answer."""

    def note(self, text: str) -> None:
        """Print a line."""
        print(text, file=sys.stderr)
