"""Formats of rows, each recognised by its fields."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from gralora.recipe.data.rows import Message, Row, Rows, quoted, raise_for

Item = dict[str, Any]

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
}


@dataclass(frozen=True)
class _Format:
    required: tuple[str, ...]
    optional: tuple[str, ...]
    parse: Callable[[str, Item], Row]

    @property
    def name(self) -> str:
        return "/".join(f"`{field}`" for field in self.required)

    def is_complete(self, item: Item) -> bool:
        return all(field in item for field in self.required)


class RowParser:
    """Turns the items of one source into rows, and keeps what is to say about them.

    Attributes:
        rows: Rows so far.
        problems: Descriptions of bad rows, with their positions.
        ignored_fields: Fields that no row used, in the order of their appearance.
    """

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.problems: list[str] = []
        self.ignored_fields: dict[str, None] = {}
        self._first: tuple[str, _Format] | None = None

    def add(self, where: str, item: Any) -> None:
        """Add the item at position `where`; a ValueError as item marks a row that could not be read."""
        try:
            self.rows.append(self._parse(where, item))
        except ValueError as error:
            self.problems.append(f"{where} {error}")

    def _parse(self, where: str, item: Any) -> Row:
        if isinstance(item, ValueError):
            raise item
        if not isinstance(item, dict):
            raise ValueError(f"is {_json_type(item)}, not a JSON object")
        item = {field: value for field, value in item.items() if value is not None}
        row_format = _format_of(item)
        row = row_format.parse(where, item)
        _require_characters(row)
        first_where, first = self._first = self._first or (where, row_format)
        if row_format is not first:
            raise ValueError(f"has {row_format.name} where {first_where} has {first.name}; use one format")
        used = (*row_format.required, *row_format.optional)
        self.ignored_fields |= {str(field): None for field in item if field not in used}
        return row


def _require_characters(row: Row) -> None:
    """Check that no text has half of a surrogate pair, which JSON's escapes can write and no tokenizer takes."""
    for message in row.messages:
        try:
            str(message.get("content") or "").encode()
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])
            raise ValueError(f"has half of a surrogate pair, {half}, in the text of role {message['role']!r}") from None


def parse_rows(items: Iterable[tuple[str, Any]], source: str, option: str = "data") -> Rows:
    """Return the rows of `items`, which are pairs of a position ("line 7") and a value.

    A ValueError as value marks a row that could not be read.

    Raises:
        ValueError: Rows are bad, or there are none.
    """
    parser = RowParser()
    for where, item in items:
        parser.add(where, item)
    raise_for(parser.problems, source)
    if not parser.rows:
        raise ValueError(f"`{option}` must have at least one row; {source!r} is empty.")
    return Rows(tuple(parser.rows), ignored_note(parser.ignored_fields))


def ignored_note(fields: Iterable[str], source: str | None = None) -> tuple[str, ...]:
    """Return the note about ignored fields, if there are any."""
    names = list(fields)
    if not names:
        return ()
    subject = f"field {quoted(names)} is" if len(names) == 1 else f"fields {quoted(names)} are"
    return (f"the {subject} ignored{f' in {source!r}' if source else ''}.",)


def _format_of(item: Item) -> _Format:
    complete = [row_format for row_format in _FORMATS if row_format.is_complete(item)]
    # Datasets of pairs often have a `text` of both as well.
    if len(complete) > 1 and complete[-1] is _TEXT:
        del complete[-1]
    if len(complete) > 1:
        raise ValueError(f"has {complete[0].name} and {complete[1].name}; use one of them")
    if complete:
        return complete[0]
    for row_format in (_PAIR, _ALPACA):
        missing = [field for field in row_format.required if field not in item]
        if len(missing) < len(row_format.required):
            raise ValueError(f"has no {quoted(missing)}")
    known = ", ".join(row_format.name for row_format in _FORMATS[:-1])
    fields = ", ".join(map(repr, sorted(map(str, item)))) or "none"
    raise ValueError(f"has none of {known} and {_TEXT.name} (its fields: {fields})")


def _from_messages(where: str, item: Item) -> Row:
    return _conversation(where, _messages(item["messages"], "messages"), "messages", item)


def _from_conversations(where: str, item: Item) -> Row:
    messages = _messages(item["conversations"], "conversations")
    if system := _text(item, "system"):
        if messages[0]["role"] == "system":
            raise ValueError("has `system` and a system message in `conversations`; use one of them")
        messages.insert(0, {"role": "system", "content": system})
    return _conversation(where, messages, "conversations", item)


def _from_pair(where: str, item: Item) -> Row:
    prompt, completion = item["prompt"], item["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            raise ValueError("has an empty `completion`")
        return _with_tools(_plain_row(where, prompt, completion), item)
    if isinstance(prompt, list) and isinstance(completion, list):
        before, answers = _messages(prompt, "prompt"), _messages(completion, "completion")
        if answers[0]["role"] != "assistant":
            raise ValueError(f"begins `completion` with role {answers[0]['role']!r}; it must be 'assistant'")
        return replace(_conversation(where, before + answers, "completion", item), first_learned=len(before))
    raise ValueError(
        f"must have text, or lists of messages, in both `prompt` and `completion`; got {_json_type(prompt)} and "
        f"{_json_type(completion)}"
    )


def _from_alpaca(where: str, item: Item) -> Row:
    instruction, output = _text(item, "instruction"), _text(item, "output")
    if not output.strip():
        raise ValueError("has an empty `output`")
    question = "\n".join(filter(None, [instruction, _text(item, "input")]))
    system, history = _text(item, "system"), _history(item.get("history", []))
    if not system and not history:
        return _plain_row(where, question, output)
    messages = [{"role": "system", "content": system}] if system else []
    for asked, answered in (*history, (question, output)):
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return Row(where, tuple(messages[:-1]), messages[-1], is_plain=False)


def _from_text(where: str, item: Item) -> Row:
    text = _text(item, "text")
    if not text.strip():
        raise ValueError("has an empty `text`")
    return Row(where, (), {"role": "assistant", "content": text}, is_plain=True)


_PAIR = _Format(("prompt", "completion"), ("tools",), _from_pair)
_ALPACA = _Format(("instruction", "output"), ("input", "system", "history"), _from_alpaca)
_TEXT = _Format(("text",), (), _from_text)
_FORMATS = (
    _Format(("messages",), ("tools",), _from_messages),
    _Format(("conversations",), ("system", "tools"), _from_conversations),
    _PAIR,
    _ALPACA,
    _TEXT,
)


def _plain_row(where: str, prompt: str, completion: str) -> Row:
    return Row(where, ({"role": "user", "content": prompt},), {"role": "assistant", "content": completion}, True)


def _conversation(where: str, messages: list[Message], name: str, item: Item) -> Row:
    last = messages[-1]
    if last["role"] != "assistant":
        raise ValueError(f"ends `{name}` with role {last['role']!r}; the last one must be 'assistant'")
    if not last.get("content", "").strip() and "tool_calls" not in last:
        raise ValueError(f"has an empty last message in `{name}`")
    if len(messages) < 2:
        raise ValueError("has one message; before the assistant's there must be another")
    return _with_tools(Row(where, tuple(messages[:-1]), last, is_plain=False), item)


def _with_tools(row: Row, item: Item) -> Row:
    tools = _parsed_list(item.get("tools", []))
    if not isinstance(tools, list):
        raise ValueError(f"must have a list of JSON schemas in `tools`; got {_json_type(tools)}")
    if not tools:
        return row
    schemas = [_parsed(tool, dict) for tool in tools]
    for number, schema in enumerate(schemas, start=1):
        if not isinstance(schema, dict):
            raise ValueError(f"has {_json_type(schema)} as entry {number} of `tools`, not a JSON schema")
    # A conversation from now on: plain text has no place for them.
    return replace(row, tools=tuple(_wrapped_function(schema) for schema in schemas), is_plain=False)


def _wrapped_function(value: Item) -> Item:
    """Return a function, or a call of one, in the form that chat templates expect."""
    return {"type": "function", "function": value} if "name" in value and "function" not in value else value


def _messages(value: Any, name: str) -> list[Message]:
    value = _parsed_list(value)
    if not isinstance(value, list) or not value:
        raise ValueError(f"must have a list of messages in `{name}`; got {_json_type(value)}")
    return [_message(message, f"message {number} of `{name}`") for number, message in enumerate(value, start=1)]


def _message(value: Any, place: str) -> Message:
    if not isinstance(value, dict):
        raise ValueError(f"has {_json_type(value)} as {place}, not an object")
    is_sharegpt = "from" in value and "role" not in value
    role_key, content_key = ("from", "value") if is_sharegpt else ("role", "content")
    role, content = value.get(role_key), value.get(content_key)
    if not isinstance(role, str):
        raise ValueError(_wrong_text(value, role_key, place))
    message: Message = {"role": role}
    if is_sharegpt:
        if role not in _SHAREGPT_ROLES:
            known = ", ".join(map(repr, _SHAREGPT_ROLES))
            raise ValueError(f"has {role!r} as `from` in {place}; it must be one of {known}")
        message["role"] = _SHAREGPT_ROLES[role]
    calls = value.get("tool_calls")
    if is_sharegpt and role == "function_call":
        calls, content = _parsed(content, list | dict), None
        calls = [calls] if isinstance(calls, dict) else calls
        if not isinstance(calls, list) or not calls:
            raise ValueError(f"has no function call in {place}; it must be a JSON object or an array of them")
    if isinstance(content, list):
        content = _joined_parts(content, place)
    if content is not None or not calls:
        if not isinstance(content, str):
            raise ValueError(_wrong_text(value, content_key, place))
        message["content"] = content
    if calls:
        message["tool_calls"] = _tool_calls(calls, place)
    read = (role_key, content_key, "tool_calls")
    return message | {key: field for key, field in value.items() if key not in read and field is not None}


def _wrong_text(value: Item, key: str, place: str) -> str:
    problem = f"{_json_type(value[key])} as" if key in value else "no"
    return f"has {problem} `{key}` in {place}; it must be text"


def _joined_parts(parts: list[Any], place: str) -> str:
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            what = f"a part of type {kind!r}" if kind else f"{_json_type(part)} as a part"
            raise ValueError(f"has {what} in {place}; only text is trained on")
        texts.append(part["text"])
    return "".join(texts)


def _tool_calls(calls: Any, place: str) -> list[Item]:
    calls = _parsed_list(calls)
    if not isinstance(calls, list):
        raise ValueError(f"has {_json_type(calls)} as `tool_calls` in {place}, not an array")
    return [_tool_call(call, place) for call in calls]


def _tool_call(call: Any, place: str) -> Item:
    call = _wrapped_function(call) if isinstance(call, dict) else {}
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"has a function call without a name in {place}")
    # Chat templates write the arguments as JSON themselves.
    arguments = _parsed(function.get("arguments") or {}, dict)
    if not isinstance(arguments, dict):
        raise ValueError(f"has arguments of {function['name']!r} in {place} that are not a JSON object")
    return call | {"function": function | {"arguments": arguments}}


def _history(value: Any) -> list[tuple[str, str]]:
    value = _parsed_list(value)
    is_pairs = isinstance(value, list) and all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        for pair in value
    )
    if not is_pairs:
        raise ValueError("must have pairs of a question and its answer in `history`")
    return [(asked, answered) for asked, answered in value]


def _text(item: Item, field: str) -> str:
    value = item.get(field, "")
    if not isinstance(value, str):
        raise ValueError(f"has {_json_type(value)} as `{field}`; it must be text")
    return value


def _parsed_list(value: Any) -> Any:
    return _parsed(value, list)


def _parsed(value: Any, kind: Any) -> Any:
    """Return what JSON text holds if it is of the given kind, else the value itself; tables hold lists as text."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return parsed if isinstance(parsed, kind) else value


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    if value == []:
        return "an empty array"
    return names.get(type(value), "a number")
