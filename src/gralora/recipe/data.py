"""Reading rows, reporting bad rows by line, and encoding rows as tokens.

A row is a conversation that ends with an answer of the assistant. With a tokenizer that has a chat
template, `prompt`/`completion` text is a conversation of one question and its answer; without a template
it is plain text. Training, scoring and answering use the same functions, so that the model sees the same
tokens at inference as in training.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from gralora.optional import require

IGNORED = -100  # label of a token that the loss ignores
_REPORTED = 5  # number of bad rows described in one message
_FILE_SUFFIXES = (".jsonl", ".json", ".ndjson")

Message = dict[str, str]


class TemplateRefusal(ValueError):
    """The chat template refuses a conversation. The text is a predicate: "is refused by the chat template: ..."."""


@dataclass(frozen=True)
class Row:
    """One example.

    Attributes:
        where: Position in the source, for messages: "line 7".
        prompt: Conversation before the answer.
        completion: Answer of the assistant.
        is_plain: Whether the row was given as two texts.
    """

    where: str
    prompt: tuple[Message, ...]
    completion: str
    is_plain: bool


@dataclass(frozen=True)
class EncodedRows:
    """Rows encoded as tokens.

    Attributes:
        input_ids: Tokens of each row.
        labels: The same tokens, with -100 where the loss ignores a token.
        truncated: Number of rows that were truncated, with part of the answer left.
        earlier_answers_ignored: Whether a row has several answers of which only the last one is learned.
    """

    input_ids: list[list[int]]
    labels: list[list[int]]
    truncated: int
    earlier_answers_ignored: bool

    def fingerprint(self) -> str:
        """Return a hash of all tokens and labels, in order."""
        digest = hashlib.sha256()
        for ids, labels in zip(self.input_ids, self.labels, strict=True):
            digest.update(json.dumps([ids, labels]).encode())
        return digest.hexdigest()


def read_rows(source: str, option: str = "data") -> list[Row]:
    """Read the rows of a JSONL file or of a dataset.

    Args:
        source: A JSONL file, or a dataset for `datasets.load_dataset`: a folder or a name on the hub,
            `name:split` for a split other than `train`.
        option: Name of the option that holds `source`, for messages.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: Rows are bad (the message describes the first few), or there are none.
    """
    path = Path(source)
    if path.is_file():
        return parse_rows(_json_lines(path), source, option)
    if path.suffix in _FILE_SUFFIXES or (source.startswith((".", "/", "~")) and not path.is_dir()):
        raise FileNotFoundError(f"`{option}` must be a JSONL file or a dataset; there is no file {source!r}.")
    return parse_rows(_dataset_rows(source, option), source, option)


def parse_rows(items: Iterable[tuple[str, Any]], source: str, option: str = "data") -> list[Row]:
    """Return the rows of `items`, which are pairs of a position ("line 7") and a value.

    A ValueError as value marks a row that could not be read.

    Raises:
        ValueError: Rows are bad, or there are none.
    """
    rows: list[Row] = []
    problems: list[str] = []
    first_format: tuple[str, str] | None = None
    for where, item in items:
        try:
            row_format, row = _parse_row(where, item)
            first_format = first_format or (where, row_format)
            if row_format != first_format[1]:
                raise ValueError(f"has {row_format} where {first_format[0]} has {first_format[1]}; use one format")
            rows.append(row)
        except ValueError as error:
            problems.append(f"{where} {error}")
    _raise_for(problems, source)
    if not rows:
        raise ValueError(f"`{option}` must have at least one row; {source!r} is empty.")
    return rows


def encode(rows: Sequence[Row], tokenizer: Any, max_length: int, source: str) -> EncodedRows:
    """Encode rows as tokens and labels.

    The loss covers the answers of the assistant: all of them where the chat template marks them, else the
    last one.

    Args:
        rows: Rows from `read_rows`.
        tokenizer: A transformers tokenizer.
        max_length: Maximum number of tokens per row.
        source: Origin of the rows, for messages.

    Raises:
        ValueError: The chat template refuses a row, truncation would remove the whole answer of a row, or the rows
            are conversations and the tokenizer has no chat template.
    """
    marks_answers = bool(re.search(r"\{%-?\s*generation\b", tokenizer.chat_template or ""))
    stops = set(template_stop_ids(tokenizer))
    all_ids, all_labels, refused, problems = [], [], [], []
    truncated = 0
    several_answers = False
    for row in rows:
        try:
            ids, labels = (
                _encode_marked(row, tokenizer) if marks_answers else _encode_last_answer(row, tokenizer, stops)
            )
        except TemplateRefusal as error:
            refused.append(f"{row.where} {error}")
            continue
        several_answers |= not marks_answers and any(message["role"] == "assistant" for message in row.prompt)
        if all(label == IGNORED for label in labels[:max_length]):
            before = next((i for i, label in enumerate(labels) if label != IGNORED), len(labels))
            problems.append(f"{row.where} has {before} tokens before its completion, which is truncated away")
        truncated += len(ids) > max_length
        all_ids.append(ids[:max_length])
        all_labels.append(labels[:max_length])
    _raise_for(refused, source)
    _raise_for(problems, source, f" `max_length` is {max_length}: raise it, or shorten or remove these rows.")
    return EncodedRows(all_ids, all_labels, truncated, several_answers)


def check_prompts(rows: Sequence[Row], tokenizer: Any, source: str) -> None:
    """Check that the prompts of `rows` can be encoded.

    Raises:
        ValueError: The chat template refuses a row, or the rows are conversations and the tokenizer has no chat
            template.
    """
    refused = []
    for row in rows:
        try:
            encode_prompt(row.prompt, row.is_plain, tokenizer)
        except TemplateRefusal as error:
            refused.append(f"{row.where} {error}")
    _raise_for(refused, source)


def encode_prompt(prompt: Sequence[Message], is_plain: bool, tokenizer: Any) -> list[int]:
    """Return the tokens of a prompt, up to where the answer starts.

    Raises:
        TemplateRefusal: The chat template refuses the prompt.
        ValueError: The prompt is a conversation and the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        return _plain_prompt_ids(prompt, is_plain, tokenizer)
    text = _apply_template(list(prompt), tokenizer, tokenize=False, add_generation_prompt=True)
    return _ids(text, tokenizer)


def template_stop_ids(tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer: the end-of-text token and the chat template's end of a turn."""
    stops = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if tokenizer.chat_template is not None:
        answer = "the answer"
        try:
            after = _answer_text([{"role": "user", "content": "x"}], answer, tokenizer)[1].partition(answer)[2]
        except TemplateRefusal:
            return stops
        added = [token for token in _ids(after, tokenizer) if token in tokenizer.added_tokens_decoder]
        stops += [token for token in added[:1] if token not in stops]
    return stops


def _parse_row(where: str, item: Any) -> tuple[str, Row]:
    if isinstance(item, ValueError):
        raise item
    if not isinstance(item, dict):
        raise ValueError(f"is {_json_type(item)}, not a JSON object")
    has_messages, has_pair = "messages" in item, "prompt" in item or "completion" in item
    if has_messages and has_pair:
        raise ValueError("has `messages` and `prompt`/`completion`; use one of them")
    if has_messages:
        messages = _messages(item["messages"], "messages")
        if messages[-1]["role"] != "assistant":
            raise ValueError(f"ends `messages` with role {messages[-1]['role']!r}; the last one must be 'assistant'")
        if len(messages) < 2:
            raise ValueError("has one message; before the assistant's there must be another")
        return "`messages`", Row(where, tuple(messages[:-1]), messages[-1]["content"], is_plain=False)
    if not has_pair:
        near = ", ".join(map(repr, sorted(map(str, item)))) or "none"
        raise ValueError(f"has neither `messages` nor `prompt` and `completion` (its fields: {near})")
    for name in ("prompt", "completion"):
        if name not in item:
            raise ValueError(f"has no `{name}`")
    prompt, completion = item["prompt"], item["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            raise ValueError("has an empty `completion`")
        return "`prompt`/`completion` text", Row(where, ({"role": "user", "content": prompt},), completion, True)
    if isinstance(prompt, list) and isinstance(completion, list):
        answer = _messages(completion, "completion")
        if len(answer) != 1 or answer[0]["role"] != "assistant":
            raise ValueError("must have one message in `completion`, of role 'assistant'")
        return "`prompt`/`completion` messages", Row(
            where, tuple(_messages(prompt, "prompt")), answer[0]["content"], is_plain=False
        )
    raise ValueError(
        f"must have text, or lists of messages, in both `prompt` and `completion`; got {_json_type(prompt)} and "
        f"{_json_type(completion)}"
    )


def _messages(value: Any, name: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"must have a list of messages in `{name}`; got {_json_type(value)}")
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            raise ValueError(f"has {_json_type(message)} as message {number} of `{name}`, not an object")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                problem = "no" if key not in message else f"{_json_type(message[key])} as"
                raise ValueError(f"has {problem} `{key}` in message {number} of `{name}`; it must be text")
    if not value[-1]["content"].strip():
        raise ValueError(f"has an empty last message in `{name}`")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    if value == []:
        return "an empty array"
    return names.get(type(value), "a number")


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if not text.strip():
                    continue
                yield f"line {number}", json.loads(text)
            except UnicodeDecodeError:
                yield f"line {number}", ValueError("is not UTF-8 text")
            except json.JSONDecodeError as error:
                yield f"line {number}", ValueError(f"is not valid JSON: {error.msg} at column {error.colno}")
            except RecursionError:
                yield f"line {number}", ValueError("is nested too deeply")


def _dataset_rows(source: str, option: str) -> Iterator[tuple[str, Any]]:
    require("datasets", extra="train")
    import datasets
    import datasets.exceptions

    name, _, split = source.partition(":") if not os.path.exists(source) else (source, "", "")
    try:
        dataset = datasets.load_dataset(name, split=split or "train")
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError, OSError, ValueError) as error:
        raise ValueError(
            f"`{option}` must be a JSONL file or a dataset that loads; {source!r} is not a file, and loading it as a "
            f"dataset failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from None
    for number, row in enumerate(dataset, start=1):
        yield f"row {number}", row


def _raise_for(problems: list[str], source: str, way_out: str = "") -> None:
    if not problems:
        return
    more = f"; and {len(problems) - _REPORTED} more" if len(problems) > _REPORTED else ""
    rows = "row" if len(problems) == 1 else "rows"
    raise ValueError(f"{len(problems)} bad {rows} in {source!r}: {'; '.join(problems[:_REPORTED])}{more}.{way_out}")


def _encode_marked(row: Row, tokenizer: Any) -> tuple[list[int], list[int]]:
    encoded = _apply_template(
        [*row.prompt, {"role": "assistant", "content": row.completion}],
        tokenizer,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    mask = encoded["assistant_masks"]
    labels = [i if learned else IGNORED for i, learned in zip(encoded["input_ids"], mask, strict=True)]
    return list(encoded["input_ids"]), labels


def _encode_last_answer(row: Row, tokenizer: Any, stops: set[int]) -> tuple[list[int], list[int]]:
    # Prompt and answer are tokenized separately, so that no token spans the start of the answer.
    if tokenizer.chat_template is None:
        prompt = _plain_prompt_ids(row.prompt, row.is_plain, tokenizer)
        answer = _ids(row.completion, tokenizer)
    else:
        prompt_text, answer_text = _answer_text(list(row.prompt), row.completion, tokenizer)
        prompt, answer = _ids(prompt_text, tokenizer), _ids(answer_text, tokenizer)
    if not stops.intersection(answer) and tokenizer.eos_token_id is not None:
        answer.append(tokenizer.eos_token_id)
    return prompt + answer, [IGNORED] * len(prompt) + answer


def _answer_text(prompt: list[Message], completion: str, tokenizer: Any) -> tuple[str, str]:
    before = _apply_template(prompt, tokenizer, tokenize=False, add_generation_prompt=True)
    whole = _apply_template(
        [*prompt, {"role": "assistant", "content": completion}], tokenizer, tokenize=False, add_generation_prompt=False
    )
    # A template may open the turn differently when the answer is known; then the prompt ends earlier.
    length = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
    return whole[:length], whole[length:]


def _apply_template(messages: list[Message], tokenizer: Any, **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except TemplateError as error:
        raise TemplateRefusal(f"is refused by the chat template: {error}") from None


def _plain_prompt_ids(prompt: Sequence[Message], is_plain: bool, tokenizer: Any) -> list[int]:
    if not is_plain:
        raise ValueError(
            "Rows must have `prompt`/`completion` text for a model whose tokenizer has no chat template; got "
            "conversations. Use the chat version of the model, or rows of text."
        )
    ids = list(tokenizer(prompt[-1]["content"])["input_ids"])
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _ids(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
