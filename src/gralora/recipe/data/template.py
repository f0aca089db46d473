"""Rendering conversations with the chat template, and finding the answers in the text."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gralora.recipe.data.rows import Message, quoted

# Parts of an answer. A library may copy one name of the reasoning to the others.
_ANSWER_FIELDS = (("tool_calls",), ("reasoning_content", "reasoning", "thinking"))
_CHECKED_FIELDS = {"role", "content", *(field for fields in _ANSWER_FIELDS for field in fields)}
_TRIED = 20  # number of rows in which a field without any effect is looked at


class TemplateRefusal(ValueError):
    """The chat template refuses a conversation. The text is a predicate: "is refused by the chat template: ..."."""


@dataclass(frozen=True)
class Rendering:
    """A rendered conversation.

    Attributes:
        text: The text.
        answers: Start and end of each answer that is learned, in order.
    """

    text: str
    answers: tuple[tuple[int, int], ...]


def apply_template(messages: Sequence[Message], tools: Sequence[dict[str, Any]], tokenizer: Any, **options: Any) -> Any:
    """Return what the tokenizer's `apply_chat_template` returns.

    Raises:
        TemplateRefusal: The template fails, for whatever reason.
    """
    from jinja2 import TemplateError

    # Older releases of transformers give null to the template, which most templates print.
    known = [{key: value for key, value in message.items() if value is not None} for message in messages]
    try:
        try:
            return tokenizer.apply_chat_template(known, tools=list(tools) or None, **options)
        except TypeError:
            # Some templates join the arguments of a call, as JSON, with text.
            if (texts := _with_arguments_as_text(known)) == known:
                raise
            return tokenizer.apply_chat_template(texts, tools=list(tools) or None, **options)
    except TemplateError as error:
        reason = str(error)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise TemplateRefusal(f"is refused by the chat template: {' '.join(reason.split())}") from None


def _with_arguments_as_text(messages: list[Message]) -> list[Message]:
    def as_text(call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        return call | {"function": function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}}

    return [
        message | {"tool_calls": [as_text(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def render(
    messages: Sequence[Message], tools: Sequence[dict[str, Any]], tokenizer: Any, for_generation: bool = False
) -> str:
    """Return the text of a conversation; `for_generation` opens the turn of the assistant at its end.

    Raises:
        TemplateRefusal: The template refuses the conversation.
    """
    return apply_template(messages, tools, tokenizer, tokenize=False, add_generation_prompt=for_generation)


def has_marks(tools: Sequence[dict[str, Any]], tokenizer: Any) -> bool:
    """Return whether the chat template marks the answers of the assistant."""
    template = tokenizer.get_chat_template(tools=list(tools) or None)
    return bool(re.search(r"\{%-?\s*generation\b", template))


def render_answers(
    messages: Sequence[Message], tools: Sequence[dict[str, Any]], tokenizer: Any, learned: Sequence[int]
) -> list[Rendering]:
    """Render a conversation so that every learned answer stands as the model would generate it.

    That is one text, unless the template changes earlier turns once later ones follow, such as one that removes
    their reasoning. Then the answers that the text does not hold are in texts that end earlier.

    Args:
        messages: The conversation.
        tools: JSON schemas of its functions.
        tokenizer: The tokenizer.
        learned: Indices of the answers, at least one, in order.

    Raises:
        TemplateRefusal: The template refuses the conversation, or an answer cannot be found.
    """
    renderings = []
    remaining = list(learned)
    while remaining:
        last = remaining[-1]
        text = render(messages[: last + 1], tools, tokenizer)
        spans = {index: _answer_span(messages[: last + 1], index, tools, tokenizer, text) for index in remaining}
        if spans[last] is None:
            raise TemplateRefusal(
                f"has an answer in message {last + 1} before which the chat template changes the conversation"
            )
        renderings.append(Rendering(text, tuple(span for span in spans.values() if span)))
        remaining = [index for index in remaining if spans[index] is None]
    return renderings[::-1]


def answer_start(
    messages: Sequence[Message], index: int, tools: Sequence[dict[str, Any]], tokenizer: Any, text: str
) -> int | None:
    """Return where message `index`, an answer, starts in the text of a conversation that begins with `messages`.

    None where the text does not begin as the prompt of this answer does.

    Raises:
        TemplateRefusal: The template refuses the conversation before the answer.
    """
    if index == 0:
        raise TemplateRefusal("begins with an answer; before it there must be another message")
    before = render(messages[:index], tools, tokenizer, for_generation=True)
    if text.startswith(before):
        return len(before)
    # A template may open the turn differently when the answer is known; then the prompt ends earlier.
    start = next((i for i, (a, b) in enumerate(zip(text, before, strict=False)) if a != b), len(text))
    context = _without_end(render(messages[:index], tools, tokenizer), tokenizer)
    return start if start >= len(context) else None


def _answer_span(
    messages: Sequence[Message], index: int, tools: Sequence[dict[str, Any]], tokenizer: Any, text: str
) -> tuple[int, int] | None:
    start = answer_start(messages, index, tools, tokenizer, text)
    if start is None:
        return None
    if index == len(messages) - 1:
        return start, len(text)
    after = render(messages[: index + 1], tools, tokenizer)
    for end in (after, _without_end(after, tokenizer)):
        if text.startswith(end) and len(end) > start:
            return start, len(end)
    return None


def _without_end(text: str, tokenizer: Any) -> str:
    """Return a text without the end-of-text token, which some templates put after the last turn."""
    return text.removesuffix(tokenizer.eos_token) if tokenizer.eos_token else text


class IgnoredFields:
    """Finds what the chat template leaves out of conversations."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._used: set[str] = set()
        self._used_roles: set[str] = set()
        self._tried: dict[str, int] = {}

    def check(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], text: str) -> None:
        """Check that the template renders everything of a conversation that the model learns or answers to.

        Args:
            messages: The conversation.
            tools: JSON schemas of its functions.
            text: Its rendering.

        Raises:
            TemplateRefusal: The template ignores content, tools, function calls or reasoning.
        """
        if tools and self._is_same(messages, (), text):
            raise TemplateRefusal("has `tools`, which the chat template ignores")
        for number, message in enumerate(messages):
            content = message.get("content", "").strip()
            # Text may be elsewhere by chance, so the first message of a role is always tried.
            if content and (content not in text or message["role"] not in self._used_roles):
                other = [*messages[:number], message | {"content": f"{content} x"}, *messages[number + 1 :]]
                if self._is_same(other, tools, text):
                    raise TemplateRefusal(
                        f"has a message of role {message['role']!r}, whose content the chat template ignores"
                    )
                self._used_roles.add(message["role"])
        for fields in _ANSWER_FIELDS:
            having = [i for i, message in enumerate(messages) if any(field in message for field in fields)]
            if having:
                # A template may leave out what is earlier, such as reasoning.
                turns = messages[: having[-1] + 1]
                rendered = text if len(turns) == len(messages) else render(turns, tools, self._tokenizer)
                if self._is_same(_without(turns, fields), tools, rendered):
                    present = [field for field in fields if field in turns[-1]]
                    raise TemplateRefusal(
                        f"has {quoted(present)} in message {len(turns)}, which the chat template ignores"
                    )
        self._try_others(messages, tools, text)

    def names(self) -> list[str]:
        """Return the other fields of messages, such as `name`, that had no effect on any conversation."""
        return [field for field in self._tried if field not in self._used]

    def _try_others(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], text: str) -> None:
        others = {field: None for message in messages for field in message if field not in _CHECKED_FIELDS}
        for field in others:
            if field not in self._used and self._tried.get(field, 0) < _TRIED:
                self._tried[field] = self._tried.get(field, 0) + 1
                if not self._is_same(_without(messages, (field,)), tools, text):
                    self._used.add(field)

    def _is_same(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], text: str) -> bool:
        try:
            return render(messages, tools, self._tokenizer) == text
        except TemplateRefusal:
            return False


def _without(messages: Sequence[Message], fields: Iterable[str]) -> list[Message]:
    return [{key: value for key, value in message.items() if key not in fields} for message in messages]
