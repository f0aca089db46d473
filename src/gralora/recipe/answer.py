"""Answering a prompt with a base model and an adapter from a folder."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from gralora import pretrained
from gralora.checks import is_number, require_integer
from gralora.files.adapter_config import read_config
from gralora.files.checkpoint import open_adapter
from gralora.recipe.data import TemplateRefusal, encode_prompt
from gralora.recipe.decoding import generate_ids
from gralora.recipe.progress import Reporter, quiet_libraries


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """Options for answering a prompt.

    Attributes:
        adapter: Folder of an adapter.
        model: Base model; None for the one that the adapter names.
        use_adapter: Whether to use the adapter; False for the base model alone.
        max_new_tokens: Maximum length of the answer.
        temperature: Sampling temperature; 0 for greedy decoding.
        dtype: Dtype of the base model: "auto", "float32", "bfloat16" or "float16".
        seed: Random seed for sampling.

    Raises:
        ValueError: A value breaks its rule.
    """

    adapter: str
    model: str | None = None
    use_adapter: bool = True
    max_new_tokens: int = 256
    temperature: float = 0.0
    dtype: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        require_integer("max_new_tokens", self.max_new_tokens)
        if not is_number(self.temperature) or not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"`temperature` must be zero or a finite positive number; got temperature={self.temperature!r}."
            )
        require_integer("seed", self.seed, minimum=0, maximum=2**32 - 1)
        pretrained.choose_dtype(self.dtype)


def generate(options: GenerationOptions, prompt: str, write: Callable[[str], None]) -> None:
    """Answer `prompt`, and pass the text to `write` piece by piece.

    Raises:
        ValueError: The prompt is empty, the adapter cannot be used, or no base model is named.
        FileNotFoundError: The adapter or the base model does not exist.
    """
    from peft import PeftModel

    if not prompt.strip():
        raise ValueError("`prompt` must have text; got none.")
    base = _checked_base_model(options)
    with quiet_libraries(_StderrNotes()):
        model, tokenizer = pretrained.load(base, options.dtype)
        if options.use_adapter:
            model = PeftModel.from_pretrained(model, options.adapter)
        if torch.cuda.is_available():
            model = model.to("cuda")
        torch.manual_seed(options.seed)
        _stream_answer(model, tokenizer, prompt.strip("\n"), options.max_new_tokens, options.temperature, write)


def _checked_base_model(options: GenerationOptions) -> str:
    """Check the adapter, and return the name of the base model."""
    config = read_config(options.adapter)
    # PEFT loads the authors' format with a wrong scale, and values that are not finite without a message.
    if options.use_adapter and config.get("peft_type") == "GRALORA":
        adapter = open_adapter(options.adapter)
        for name in adapter.layers:
            adapter.factors(name)
    base = options.model or config.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"`model` must be given: the adapter in {options.adapter!r} names no base model.")
    return base


def _stream_answer(
    model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, temperature: float, write: Callable[[str], None]
) -> None:
    from transformers import TextStreamer

    class Writer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            write(text)

    try:
        ids = encode_prompt([{"role": "user", "content": prompt}], True, tokenizer)
    except TemplateRefusal as error:
        raise ValueError(f"`prompt` {error}") from None
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    model.eval()
    streamer = Writer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    generate_ids(model, tokenizer, [ids], max_new_tokens, streamer, **sampling)


class _StderrNotes(Reporter):
    """Print notes to standard error; standard output is for the answer."""

    def note(self, text: str) -> None:
        """Print a line."""
        print(text, file=sys.stderr)
