"""Encoding rows as tokens and labels.

With a tokenizer that has a chat template, `prompt`/`completion` text is a conversation of one question and its
answer; without a template it is plain text.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gralora.recipe.data.rows import Message, Row, quoted, raise_for
from gralora.recipe.data.template import (
    IgnoredFields,
    TemplateRefusal,
    answer_start,
    apply_template,
    has_marks,
    render,
    render_answers,
)
from gralora.recipe.options import TRAIN_ON

IGNORED = -100  # label of a token that the loss ignores

_ROWS_AT_ONCE = 1000  # number of rows that are tokenised in one call

# Tokens, and labels.
_Sequence = tuple[list[int], list[int]]


@dataclass(frozen=True)
class _Text:
    """Text of one sequence, cut where answers start and end.

    Attributes:
        pieces: The text, and whether each piece is learned.
        is_document: Whether the first piece starts a document: not rendered by a template.
    """

    pieces: list[tuple[str, bool]]
    is_document: bool


@dataclass(frozen=True)
class EncodedRows:
    """Rows encoded as tokens.

    Attributes:
        input_ids: Tokens of each sequence.
        labels: The same tokens, with -100 where the loss ignores a token.
        truncated: Number of rows that were truncated, with part of an answer left.
        notes: What the user should know about the encoding; each is said once.
    """

    input_ids: list[list[int]]
    labels: list[list[int]]
    truncated: int
    notes: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """Return a hash of all tokens and labels, in order."""
        digest = hashlib.sha256()
        for ids, labels in zip(self.input_ids, self.labels, strict=True):
            digest.update(json.dumps([ids, labels]).encode())
        return digest.hexdigest()


def encode(
    rows: Sequence[Row],
    tokenizer: Any,
    max_length: int,
    source: str | Sequence[str],
    train_on: str = "all-answers",
) -> EncodedRows:
    """Encode rows as tokens and labels.

    An answer is learned with the end of its turn. Plain text is learned whole, with an end-of-text token. Answers
    are where the chat template marks them, or else where the renderings of shorter conversations end. A row is one
    sequence, or several where the template changes earlier turns once later ones follow.

    Args:
        rows: Rows from `read_rows`.
        tokenizer: A transformers tokenizer.
        max_length: Maximum number of tokens per sequence.
        source: Origin of the rows, for messages.
        train_on: What the loss covers: "all-answers", of `prompt`/`completion` those in `completion`; "last-answer";
            or "everything", prompts as well.

    Raises:
        ValueError: The chat template refuses a row or ignores a part of it, truncation would remove all answers of a
            row, or the rows are conversations and the tokenizer has no chat template.
    """
    if train_on not in TRAIN_ON:
        raise ValueError(f"`train_on` must be one of {', '.join(map(repr, TRAIN_ON))}; got train_on={train_on!r}.")
    encoder = _Encoder(tokenizer, train_on)
    all_ids, all_labels, problems = [], [], []
    truncated = 0
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        for row, sequences in encoder.encode(rows[start : start + _ROWS_AT_ONCE]):
            kept = [(ids, labels) for ids, labels in sequences if any(i != IGNORED for i in labels[:max_length])]
            truncated += any(len(ids) > max_length for ids, _ in sequences)
            if not kept:
                before = next((i for i, label in enumerate(sequences[0][1]) if label != IGNORED), 0)
                problems.append(f"{row.where} has {before} tokens before its completion, which is truncated away")
            for ids, labels in kept:
                all_ids.append(ids[:max_length])
                all_labels.append(labels[:max_length])
    raise_for(encoder.refused, source)
    raise_for(problems, source, f" `max_length` is {max_length}: raise it, or shorten or remove these rows.")
    return EncodedRows(all_ids, all_labels, truncated, encoder.notes())


def check_prompts(rows: Sequence[Row], tokenizer: Any, source: str | Sequence[str]) -> None:
    """Check that `rows` can be scored: that their prompts can be encoded, and that each has an answer of text.

    Raises:
        ValueError: A row has no answer to compare with, the chat template refuses or ignores a part of a row, or the
            rows are conversations and the tokenizer has no chat template.
    """
    ignored = IgnoredFields(tokenizer)
    refused = []
    for row in rows:
        try:
            if reason := _scoring_refusal(row):
                raise TemplateRefusal(reason)
            encode_prompt(row.prompt, row.is_plain, tokenizer, row.tools)
            if tokenizer.chat_template is not None:
                ignored.check(row.messages, row.tools, render(row.messages, row.tools, tokenizer))
        except TemplateRefusal as error:
            refused.append(f"{row.where} {error}")
    raise_for(refused, source)


def encode_prompt(
    prompt: Sequence[Message], is_plain: bool, tokenizer: Any, tools: Sequence[dict[str, Any]] = ()
) -> list[int]:
    """Return the tokens of a prompt, up to where the answer starts.

    Raises:
        TemplateRefusal: The chat template refuses the prompt.
        ValueError: The prompt is a conversation and the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        _require_plain(is_plain)
        return _document_ids([prompt[-1]["content"]], tokenizer)[0]
    return _ids([render(prompt, tools, tokenizer, for_generation=True)], tokenizer)[0]


def template_stop_ids(tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer: the end-of-text token and the chat template's end of a turn."""
    stops = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if tokenizer.chat_template is not None:
        answer = "the answer"
        messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}]
        try:
            (rendering,) = render_answers(messages, (), tokenizer, [1])
        except TemplateRefusal:
            return stops
        after = rendering.text[rendering.answers[0][0] :].partition(answer)[2]
        added = [token for token in _ids([after], tokenizer)[0] if token in tokenizer.added_tokens_decoder]
        stops += [token for token in added[:1] if token not in stops]
    return stops


class _Encoder:
    """Encodes batches of rows, and keeps what is to say about all of them."""

    def __init__(self, tokenizer: Any, train_on: str) -> None:
        self.refused: list[str] = []
        self._tokenizer = tokenizer
        self._train_on = train_on
        self._stops = set(template_stop_ids(tokenizer))
        self._ignored = IgnoredFields(tokenizer)
        self._divided = 0
        self._unprompted = 0

    def encode(self, rows: Sequence[Row]) -> Iterator[tuple[Row, list[_Sequence]]]:
        """Yield every row that is not refused, with its sequences."""
        encoded: list[tuple[Row, list[_Sequence]]] = []
        waiting: list[tuple[list[_Sequence], _Text]] = []
        for row in rows:
            sequences: list[_Sequence] = []
            try:
                if self._tokenizer.chat_template is None or row.is_text:
                    waiting.append((sequences, _plain_text(row)))
                elif self._uses_marks(row):
                    sequences.append(self._marked(row))
                else:
                    waiting += [(sequences, text) for text in self._rendered(row)]
            except TemplateRefusal as error:
                self.refused.append(f"{row.where} {error}")
                continue
            encoded.append((row, sequences))
        tokenized = _tokenize([text for _, text in waiting], self._tokenizer)
        for (sequences, text), pieces in zip(waiting, tokenized, strict=True):
            sequences.append(self._labelled(text, pieces))
        yield from encoded

    def notes(self) -> tuple[str, ...]:
        """Return what the user should know."""
        notes = []
        if names := self._ignored.names():
            notes.append(f"the chat template ignores {quoted(names)} of messages.")
        if self._divided:
            notes.append(
                f"the chat template changes earlier turns once later ones follow, so that {self._divided} "
                f"{'conversation is' if self._divided == 1 else 'conversations are'} trained on as several sequences, "
                "each answer as the model would generate it."
            )
        if self._unprompted:
            notes.append(
                f"{self._unprompted} {'conversation begins' if self._unprompted == 1 else 'conversations begin'} with "
                "an answer, which is not learned: nothing comes before it."
            )
        return tuple(notes)

    def _uses_marks(self, row: Row) -> bool:
        return self._train_on != "everything" and self._tokenizer.is_fast and has_marks(row.tools, self._tokenizer)

    def _first_learned(self, row: Row) -> int:
        return row.first_learned if self._train_on == "all-answers" else len(row.prompt)

    def _rendered(self, row: Row) -> list[_Text]:
        messages, first = row.messages, self._first_learned(row)
        learned = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= first]
        if learned[0] == 0:
            self._unprompted += 1
            del learned[0]
        renderings = render_answers(messages, row.tools, self._tokenizer, learned)
        self._ignored.check(messages, row.tools, renderings[-1].text)
        self._divided += len(renderings) > 1
        texts = []
        for rendering in renderings:
            pieces, end = [], 0
            for start, stop in rendering.answers:
                pieces += [(rendering.text[end:start], False), (rendering.text[start:stop], True)]
                end = stop
            texts.append(_Text(pieces, is_document=False))
        return texts

    def _marked(self, row: Row) -> _Sequence:
        messages, first = row.messages, self._first_learned(row)
        encoded = apply_template(
            messages, row.tools, self._tokenizer, return_dict=True, return_assistant_tokens_mask=True
        )
        text = render(messages, row.tools, self._tokenizer)
        self._ignored.check(messages, row.tools, text)
        learned_from = 0
        if any(message["role"] == "assistant" for message in messages[:first]):
            start = answer_start(messages, first, row.tools, self._tokenizer, text)
            learned_from = None if start is None else encoded.char_to_token(start)
            if learned_from is None:
                raise TemplateRefusal(f"has an answer in message {first + 1} whose start in the text is not found")
        ids, mask = list(encoded["input_ids"]), encoded["assistant_masks"]
        labels = [token if mask[i] and i >= learned_from else IGNORED for i, token in enumerate(ids)]
        if all(label == IGNORED for label in labels):
            raise TemplateRefusal("has no answer that the chat template marks as one")
        return ids, labels

    def _labelled(self, text: _Text, pieces: list[list[int]]) -> _Sequence:
        end = self._tokenizer.eos_token_id
        # A document may hold the token anywhere; an answer that holds one has ended.
        last = pieces[-1][-1:] if len(pieces) == 1 else pieces[-1]
        if end is not None and not self._stops.intersection(last):
            pieces[-1].append(end)
        ids = [token for piece in pieces for token in piece]
        labels = []
        for piece, (_, is_learned) in zip(pieces, text.pieces, strict=True):
            labels += piece if is_learned or self._train_on == "everything" else [IGNORED] * len(piece)
        return ids, labels


def _scoring_refusal(row: Row) -> str | None:
    if row.is_text:
        return "is plain `text`, which has no answer to compare with"
    if not row.completion.strip():
        return "ends with a function call, which is not compared; the last answer must have text"
    return None


def _plain_text(row: Row) -> _Text:
    _require_plain(row.is_plain)
    prompt = [(message["content"], False) for message in row.prompt]
    return _Text([*prompt, (row.completion, True)], is_document=True)


def _require_plain(is_plain: bool) -> None:
    if not is_plain:
        raise ValueError(
            "Rows must have `prompt`/`completion` text for a model whose tokenizer has no chat template; got "
            "conversations. Use the chat version of the model, or rows of text."
        )


def _tokenize(texts: Sequence[_Text], tokenizer: Any) -> list[list[list[int]]]:
    """Return the tokens of every piece, which for the part before an answer are those of a prompt.

    A rendered text is tokenised as a whole, and cut. Where a token spans a cut, its pieces are tokenised one by one.
    """
    tokens: list[list[list[int]] | None] = [None] * len(texts)
    whole = [index for index, text in enumerate(texts) if not text.is_document]
    if whole and tokenizer.is_fast:
        joined = ["".join(piece for piece, _ in texts[index].pieces) for index in whole]
        encodings = tokenizer(joined, add_special_tokens=False).encodings
        for index, encoding in zip(whole, encodings, strict=True):
            tokens[index] = _cut(encoding, [len(piece) for piece, _ in texts[index].pieces])
    rest = [index for index, pieces in enumerate(tokens) if pieces is None]
    starts = [texts[index].pieces[0][0] for index in rest if texts[index].is_document]
    documents = iter(_document_ids(starts, tokenizer))
    others = [piece for index in rest for piece, _ in texts[index].pieces[texts[index].is_document :]]
    single = iter(_ids(others, tokenizer))
    for index in rest:
        tokens[index] = [
            next(documents if texts[index].is_document and number == 0 else single)
            for number in range(len(texts[index].pieces))
        ]
    return [pieces for pieces in tokens if pieces is not None]


def _cut(encoding: Any, lengths: Sequence[int]) -> list[list[int]] | None:
    """Return the tokens of consecutive pieces of a text, or None where a token spans a cut."""
    cuts, position = [0], 0
    for length in lengths[:-1]:
        position += length
        token = encoding.char_to_token(position)
        # Offsets may leave out white space at the start of a token, so the end of the one before decides.
        if not token or encoding.token_to_chars(token - 1)[1] != position:
            return None
        cuts.append(token)
    ids = encoding.ids
    return [ids[start:end] for start, end in zip(cuts, [*cuts[1:], len(ids)], strict=True)]


def _document_ids(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Return the tokens of texts that start a document, with a token for that but none for its end."""
    if not texts:
        return []
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    documents = []
    for tokens in tokenizer(list(texts))["input_ids"]:
        first = 1 if start is not None and tokens[:2] == [start, start] else 0
        last = len(tokens) - 1 if tokens and tokens[-1] == end else len(tokens)
        documents.append(list(tokens[first:last]))
    return documents


def _ids(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    return [list(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]] if texts else []
