"""The options for answering prompts, with their defaults and checks."""

import math
from dataclasses import dataclass

from gralora.checks import full_dtype_name, is_number, require_integer
from gralora.pretrained import LoadIn, check_load_in


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """Options for answering prompts.

    Attributes:
        adapter: Folder of an adapter.
        model: Base model; None for the one that the adapter names.
        use_adapter: Whether to use the adapter; False for the base model alone.
        system: System prompt of conversations that bring none; None for the chat template's own.
        max_new_tokens: Maximum length of an answer.
        temperature: Sampling temperature; 0 for greedy decoding.
        top_p: Share of the probability that is sampled from, the likeliest tokens first; None for the model's own.
        top_k: Number of tokens that are sampled from, the likeliest ones; None for the model's own.
        batch_size: Number of prompts that are answered at once.
        dtype: Dtype of the base model: "auto", "float32", "bfloat16" or "float16".
        load_in: "4bit" or "8bit": quantise the base model while it is loaded.
        allow_missing: Whether the base model may lack weights, which then start at random.
        threads: Number of CPU threads; None keeps the current setting.
        seed: Random seed for sampling.

    Raises:
        ValueError: A value breaks its rule.
    """

    adapter: str
    model: str | None = None
    use_adapter: bool = True
    system: str | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    batch_size: int = 8
    dtype: str = "auto"
    load_in: LoadIn | None = None
    allow_missing: bool = False
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require_integer("max_new_tokens", self.max_new_tokens)
        require_integer("batch_size", self.batch_size)
        for name in ("top_k", "threads"):
            if getattr(self, name) is not None:
                require_integer(name, getattr(self, name))
        if not is_number(self.temperature) or not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"`temperature` must be zero or a finite positive number; got temperature={self.temperature!r}."
            )
        if self.top_p is not None and (not is_number(self.top_p) or not 0 < self.top_p <= 1):
            raise ValueError(f"`top_p` must be a number above 0 and up to 1; got top_p={self.top_p!r}.")
        for name in ("top_p", "top_k"):
            if getattr(self, name) is not None and not self.temperature:
                raise ValueError(f"`{name}` must come with a `temperature` above 0, without which nothing is sampled.")
        require_integer("seed", self.seed, minimum=0, maximum=2**32 - 1)
        full_dtype_name(self.dtype, allow_auto=True)
        check_load_in(self.load_in)
