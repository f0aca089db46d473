"""Answering conversations with a base model and an adapter from a folder."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from gralora import pretrained
from gralora.files.adapter_config import read_config
from gralora.files.checkpoint import open_adapter, open_tensors
from gralora.recipe.answering.decoding import generate_ids
from gralora.recipe.answering.generation import GenerationOptions
from gralora.recipe.answering.prompts import Message
from gralora.recipe.data import TemplateRefusal, encode_prompt
from gralora.recipe.progress import Reporter, quiet_libraries
from gralora.tuner.layer import gralora_layers


class Answerer:
    """A model that answers conversations, and its tokenizer.

    The adapter is merged into the base model in memory, so that it costs no time, where that is possible.

    Args:
        options: What answers, and how.
        base: Name of the base model.
        note: Receives messages for the user.
    """

    def __init__(self, options: GenerationOptions, base: str, note: Callable[[str], None]) -> None:
        self.options = options
        self._note = note
        if options.threads:
            torch.set_num_threads(options.threads)
        adapter = options.adapter if options.use_adapter else None
        model, self.tokenizer = pretrained.load(
            base, options.dtype, load_in=options.load_in, allow_missing=options.allow_missing, adapter=adapter
        )
        is_quantised = getattr(model, "is_quantized", False)
        if torch.cuda.is_available() and not is_quantised:
            model = model.to("cuda")
        if adapter is not None:
            tuned = pretrained.load_adapter(model, adapter)
            refusal = "the base model is quantised, and merging would round it again" if is_quantised else None
            refusal = refusal or _merge_refusal(tuned)
            if refusal:
                note(f"note: the adapter is not merged into the base model, and answers come slower: {refusal}")
            model = tuned if refusal else _merged(tuned)
        self.model: Any = model.eval()
        torch.manual_seed(options.seed)

    @property
    def context_length(self) -> int | None:
        """Number of tokens that the model takes, prompt and answer together; None if it has no limit."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens of a conversation, up to where the answer starts.

        Raises:
            ValueError: The tokenizer has no chat template for it, or the template refuses it.
        """
        messages = list(messages)
        if self.options.system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.options.system})
        if len(messages) > 1:
            self.require_chat_template()
        try:
            return encode_prompt(messages, len(messages) == 1, self.tokenizer)
        except TemplateRefusal as error:
            raise ValueError(f"`prompt` {error}") from None

    def require_chat_template(self) -> None:
        """Check that the tokenizer can encode a conversation of several turns.

        Raises:
            ValueError: It has no chat template.
        """
        if self.tokenizer.chat_template is None:
            raise ValueError(
                "`model` must have a tokenizer with a chat template for a conversation or a system prompt; this one "
                "has none. Use the chat version of the model, or a single prompt."
            )

    def room_refusal(self, ids: Sequence[int]) -> str | None:
        """Return why there is no room for an answer to a conversation of these tokens, or None."""
        limit = self.context_length
        if limit is None or len(ids) < limit:
            return None
        return f"it has {len(ids)} tokens, and the model takes {limit} with the answer"

    def stream(self, messages: Sequence[Message], write: Callable[[str], None]) -> str:
        """Answer one conversation, pass the text to `write` piece by piece, and return it.

        Raises:
            ValueError: The conversation cannot be encoded, or is too long.
        """
        from transformers import TextStreamer

        pieces: list[str] = []

        class Writer(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                pieces.append(text)
                write(text)

        self._generate([self.encode(messages)], Writer(self.tokenizer, skip_prompt=True, skip_special_tokens=True))
        return "".join(pieces)

    def answers(self, conversations: Sequence[Sequence[Message]]) -> Iterator[str]:
        """Yield the answer to each conversation, in their order; several are generated at once.

        All are encoded before the first is answered.

        Raises:
            ValueError: A conversation cannot be encoded, or is too long.
        """
        prompts = []
        for number, messages in enumerate(conversations, start=1):
            try:
                prompts.append(self.encode(messages))
                self._check_room(prompts[-1])
            except ValueError as error:
                raise ValueError(f"{error} (prompt {number} of {len(conversations)})") from None
        size = self.options.batch_size
        for start in range(0, len(prompts), size):
            ids = self._generate(prompts[start : start + size])
            yield from self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    def _check_room(self, ids: Sequence[int]) -> None:
        if refusal := self.room_refusal(ids):
            raise ValueError(f"`prompt` must leave room for an answer; {refusal}.")

    def _generate(self, prompts: list[list[int]], streamer: Any = None) -> torch.Tensor:
        options = self.options
        longest = max(prompts, key=len)
        self._check_room(longest)
        length, limit = options.max_new_tokens, self.context_length
        if limit is not None and len(longest) + length > limit:
            length = limit - len(longest)
            self._note(f"note: answers end after {length} tokens, since the model takes {limit} with the prompt")
        sampling: dict[str, Any] = {"do_sample": bool(options.temperature)}
        if options.temperature:
            given = {"temperature": options.temperature, "top_p": options.top_p, "top_k": options.top_k}
            sampling |= {name: value for name, value in given.items() if value is not None}
        return generate_ids(self.model, self.tokenizer, prompts, length, streamer, **sampling)


@contextmanager
def answering(options: GenerationOptions) -> Iterator[Answerer]:
    """Load what answers, quietly; messages for the user go to standard error.

    Raises:
        ValueError: The adapter cannot be used, does not fit the base model, or no base model is named.
        FileNotFoundError: The adapter or the base model does not exist.
        ImportError: A library is missing; the message has the command that installs it.
    """
    base = checked_base_model(options)
    reporter = _StderrNotes()
    with quiet_libraries(reporter):
        yield Answerer(options, base, reporter.note)


def generate(options: GenerationOptions, prompt: str, write: Callable[[str], None]) -> None:
    """Answer `prompt`, and pass the text to `write` piece by piece.

    Raises:
        ValueError: The prompt is empty, the adapter cannot be used, or no base model is named.
        FileNotFoundError: The adapter or the base model does not exist.
    """
    if not prompt.strip():
        raise ValueError("`prompt` must have text; got none.")
    with answering(options) as answerer:
        answerer.stream([{"role": "user", "content": prompt.strip("\n")}], write)


def checked_base_model(options: GenerationOptions) -> str:
    """Check the adapter without loading a model, and return the name of the base model.

    Raises:
        ValueError: The adapter is damaged, or no base model is named.
        FileNotFoundError: A file of the adapter is missing, or the base model is at none of the places it may be at.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    config = read_config(options.adapter)
    if options.use_adapter:
        method = config.get("peft_type")
        if method not in PEFT_TYPE_TO_CONFIG_MAPPING:
            raise ValueError(
                f"`adapter` must say its method; the config of {options.adapter!r} has peft_type={method!r}."
            )
        # PEFT loads the authors' format with a wrong scale, and values that are not finite without a message.
        if method == "GRALORA":
            adapter = open_adapter(options.adapter)
            for name in adapter.layers:
                adapter.factors(name)
        else:
            open_tensors(options.adapter)
    if options.model:
        return options.model
    named = config.get("base_model_name_or_path")
    if not named:
        raise ValueError(f"`model` must be given: the adapter in {options.adapter!r} names no base model.")
    return pretrained.base_of_adapter(options.adapter, named)


def _merge_refusal(tuned: Any) -> str | None:
    """Return why an adapter cannot be merged into its base model, or None."""
    layers = gralora_layers(tuned)
    if not layers:
        return None if hasattr(tuned.base_model, "merge_and_unload") else "its method changes no weights"
    return next((refusal for layer in layers.values() if (refusal := layer.merge_refusal())), None)


def _merged(tuned: Any) -> Any:
    """Return the base model with the adapter merged in, in place, without a copy of its weights."""
    if not gralora_layers(tuned):
        return tuned.merge_and_unload()
    tuned.base_model.merge_adapter(keep_base=False)
    return tuned.base_model.unload_merged(["default"])


class _StderrNotes(Reporter):
    """Print notes to standard error; standard output is for the answer."""

    def note(self, text: str) -> None:
        """Print a line."""
        print(text, file=sys.stderr)
