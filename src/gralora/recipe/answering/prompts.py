"""Reading prompts from a file: one a line, or JSON objects with a `prompt` or `messages`."""

import json
from pathlib import Path
from typing import Any

Message = dict[str, str]

_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_REPORTED = 5  # number of bad lines described in one message


def read_prompts(source: str | Path) -> list[list[Message]]:
    """Return the conversations to answer, one for each line of a file that is not blank.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not text, lines are bad (the message describes the first few), or there are none.
    """
    path = Path(source)
    if not path.exists() or path.is_dir():  # it may be a pipe
        raise FileNotFoundError(f"`prompts` must be a file of prompts; there is no file {str(source)!r}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"`prompts` must be UTF-8 text; {str(source)!r} is not.") from None
    return parse_prompts(text, str(source), path.suffix in _JSON_SUFFIXES)


def parse_prompts(text: str, source: str, is_json: bool = False) -> list[list[Message]]:
    """Return the conversations in the lines of `text`.

    Args:
        text: Lines of text, or of JSON objects.
        source: Origin of the text, for messages.
        is_json: Whether the lines must be JSON; else they are if the first one is a JSON object.

    Raises:
        ValueError: Lines are bad, or there are none.
    """
    # Not `splitlines`, which also ends a line at separators that JSON allows inside a string.
    numbered = [(number, line.rstrip("\r")) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not numbered:
        raise ValueError(f"`prompts` must have at least one prompt; {source!r} has none.")
    if not is_json and not _is_object(numbered[0][1]):
        return [[{"role": "user", "content": line}] for _, line in numbered]
    conversations, problems = [], []
    for number, line in numbered:
        try:
            conversations.append(_conversation(line))
        except ValueError as error:
            problems.append(f"line {number} {error}")
    if problems:
        more = f"; and {len(problems) - _REPORTED} more" if len(problems) > _REPORTED else ""
        count = f"{len(problems)} bad line{'s' if len(problems) > 1 else ''}"
        raise ValueError(f"{count} in {source!r}: {'; '.join(problems[:_REPORTED])}{more}.")
    return conversations


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _conversation(line: str) -> list[Message]:
    try:
        item = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not valid JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    if not isinstance(item, dict) or ("prompt" in item) == ("messages" in item):
        raise ValueError("must be a JSON object with either `prompt` or `messages`")
    if item.get("tools"):
        raise ValueError("has `tools`, which answers here cannot call")
    if isinstance(prompt := item.get("prompt"), str):
        if not prompt.strip():
            raise ValueError("has an empty `prompt`")
        return [{"role": "user", "content": prompt}]
    name = "messages" if "messages" in item else "prompt"
    messages = _messages(item[name], name)
    if messages[-1]["role"] == "assistant":
        raise ValueError(f"ends `{name}` with role 'assistant'; the last one must be another, which is to be answered")
    return messages


def _messages(value: Any, name: str) -> list[Message]:
    rule = "text or a list of messages" if name == "prompt" else "a list of messages"
    if not isinstance(value, list) or not value:
        raise ValueError(f"must have {rule} in `{name}`")
    for number, message in enumerate(value, start=1):
        wanted = ("role", "content")
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in wanted):
            raise ValueError(f"must have text as `role` and `content` of message {number} of `{name}`")
        if further := sorted(message.keys() - set(wanted)):
            raise ValueError(f"has `{further[0]}` in message {number} of `{name}`, which cannot be answered to")
    return [{"role": message["role"], "content": message["content"]} for message in value]
