"""`gralora chat`."""

import re
import sys
from typing import Any

from gralora.cli import answering
from gralora.cli.answering import DEFAULTS, ending_quietly, note, write
from gralora.recipe.answering.generation import GenerationOptions

_COMMANDS = "/reset forgets the conversation, /system TEXT sets the system prompt, /quit or Ctrl-D ends"
_COMMAND = re.compile(r"/(\w+)(?:\s+(.*))?")


def chat(
    adapter: answering.Adapter,
    model: answering.Model = None,
    system: answering.System = None,
    max_new_tokens: answering.MaxNewTokens = DEFAULTS["max_new_tokens"],
    adapter_on: answering.AdapterOn = True,
    temperature: answering.Temperature = DEFAULTS["temperature"],
    top_p: answering.TopP = None,
    top_k: answering.TopK = None,
    dtype: answering.Dtype = DEFAULTS["dtype"],
    load_in: answering.LoadIn = None,
    allow_missing: answering.AllowMissing = False,
    threads: answering.Threads = None,
    seed: answering.Seed = DEFAULTS["seed"],
) -> None:
    """Chat with a base model and an adapter: a line is a message, and the conversation goes on.

    /reset forgets the conversation, /system TEXT sets the system prompt and forgets, /quit ends. Ctrl-C ends an answer.
    """
    options = GenerationOptions(
        adapter=adapter,
        model=model,
        use_adapter=adapter_on,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        dtype=dtype,
        load_in=load_in,  # pyright: ignore[reportArgumentType] (checked there)
        allow_missing=allow_missing,
        threads=threads,
        seed=seed,
    )
    with ending_quietly():
        from gralora.recipe.answering.answer import answering as opened
        from gralora.recipe.answering.chat import Chat

        with opened(options) as answerer:
            answerer.require_chat_template()
            at_terminal = sys.stdin.isatty()
            if at_terminal:
                import readline  # noqa: F401 (lets `input` edit its line)

                note(_COMMANDS)
            _converse(Chat(answerer, note), at_terminal)


def _converse(conversation: Any, at_terminal: bool) -> None:
    while True:
        try:
            text = input("> " if at_terminal else "").strip()
        except EOFError:
            if at_terminal:
                write("\n")
            return
        if command := _COMMAND.fullmatch(text):
            if command[1] == "quit":
                return
            _obey(conversation, command[1], (command[2] or "").strip())
        elif text:
            _answer(conversation, text, at_terminal)


def _obey(conversation: Any, name: str, text: str) -> None:
    if name == "reset":
        conversation.reset()
    elif name == "system":
        conversation.system = text or None
        conversation.reset()
    else:
        note(f"there is no command /{name}: {_COMMANDS}")


def _answer(conversation: Any, text: str, at_terminal: bool) -> None:
    """Print the answer. At a terminal, a message that is refused and Ctrl-C end it alone, not the conversation."""
    try:
        conversation.say(text, write)
    except ValueError as error:
        if not at_terminal:
            raise
        note(f"error: {error}")
    except KeyboardInterrupt:
        if not at_terminal:
            raise
    write("\n")
