"""`gralora generate`."""

import json
import sys
from typing import Annotated, Any

from gralora.cli import answering
from gralora.cli.answering import DEFAULTS, ending_quietly, note, write
from gralora.cli.options import option
from gralora.recipe.answering.generation import GenerationOptions
from gralora.recipe.answering.prompts import Message, parse_prompts, read_prompts

_FORMATS = ("text", "jsonl")


def generate(
    adapter: answering.Adapter,
    model: answering.Model = None,
    prompt: Annotated[str | None, option("Text to answer.", default="standard input")] = None,
    prompts: Annotated[
        str | None,
        option(
            "File of several prompts, one a line, or JSONL with `prompt` or `messages`; - for standard input. "
            "Excludes --prompt."
        ),
    ] = None,
    format: Annotated[
        str | None, option("With --prompts: text, or jsonl with prompt and answer.", default="text")
    ] = None,
    batch_size: Annotated[
        int | None, option("With --prompts: number of prompts answered at once.", default=DEFAULTS["batch_size"])
    ] = None,
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
    """Answer a prompt with a base model and an adapter, and print the text while it is generated.

    The adapter is merged into the base model in memory first, where that is possible.
    """
    if prompts is None and (format is not None or batch_size is not None):
        name = "format" if format is not None else "batch_size"
        raise ValueError(f"`{name}` must come with `prompts`.")
    if prompts is not None and prompt is not None:
        raise ValueError("`prompt` or `prompts` must be given, not both.")
    if format not in (None, *_FORMATS):
        raise ValueError(f"`format` must be {' or '.join(_FORMATS)}; got format={format!r}.")
    options = GenerationOptions(
        adapter=adapter,
        model=model,
        use_adapter=adapter_on,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        batch_size=DEFAULTS["batch_size"] if batch_size is None else batch_size,
        dtype=dtype,
        load_in=load_in,  # pyright: ignore[reportArgumentType] (checked there)
        allow_missing=allow_missing,
        threads=threads,
        seed=seed,
    )
    with ending_quietly():
        from gralora.recipe.answering import answer

        answer.checked_base_model(options)  # a wrong folder is reported before a prompt is read
        if prompts is not None:
            _answer_all(options, _conversations(prompts), as_json=format == "jsonl")
        else:
            answer.generate(options, _read_stdin("the prompt") if prompt is None else prompt, write)
            write("\n")


def _conversations(prompts: str) -> list[list[Message]]:
    if prompts == "-":
        return parse_prompts(_read_stdin("the prompts, one a line"), "standard input")
    return read_prompts(prompts)


def _answer_all(options: GenerationOptions, conversations: list[list[Message]], as_json: bool) -> None:
    from gralora.recipe.answering.answer import answering as opened

    with opened(options) as answerer:
        for number, answer in enumerate(answerer.answers(conversations)):
            if as_json:
                write(json.dumps(_asked(conversations[number]) | {"answer": answer}, ensure_ascii=False) + "\n")
            else:
                write(("\n" if number else "") + answer.strip("\n") + "\n")


def _asked(messages: list[Message]) -> dict[str, Any]:
    """Return what was asked, under the names of the input."""
    is_plain = len(messages) == 1 and messages[0]["role"] == "user"
    return {"prompt": messages[0]["content"]} if is_plain else {"messages": messages}


def _read_stdin(what: str) -> str:
    if sys.stdin.isatty():
        note(f"reading {what} from standard input; end with Ctrl-D")
    return sys.stdin.read()
