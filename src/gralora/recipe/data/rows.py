"""One example, a list of examples, and messages about bad ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

_REPORTED = 5  # number of bad rows described in one message

Message = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One example: a conversation that ends with an answer of the assistant, or plain text.

    Attributes:
        where: Position in the source, for messages: "line 7".
        prompt: Conversation before the last answer; empty for plain text.
        answer: The last message, of role "assistant"; for plain text, the text.
        is_plain: Whether the row was given as texts, so that it needs no chat template.
        tools: JSON schemas of the functions that the assistant may call.
        first_learned: Index of the first message of the conversation whose answers may be learned.
    """

    where: str
    prompt: tuple[Message, ...]
    answer: Message
    is_plain: bool
    tools: tuple[dict[str, Any], ...] = ()
    first_learned: int = 0

    @property
    def completion(self) -> str:
        """Text of the last answer; empty where it only calls functions."""
        return self.answer.get("content", "")

    @property
    def messages(self) -> list[Message]:
        """The whole conversation."""
        return [*self.prompt, self.answer]

    @property
    def is_text(self) -> bool:
        """Whether the row is plain text without a prompt."""
        return not self.prompt


@dataclass(frozen=True)
class Rows(Sequence[Row]):
    """Rows in order.

    Attributes:
        rows: The rows.
        notes: What the user should know about them, such as ignored fields; each is said once.
    """

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Row, ...]: ...
    def __getitem__(self, index: int | slice) -> Row | tuple[Row, ...]:
        return self.rows[index]


def quoted(names: Sequence[str]) -> str:
    """Return the names in backticks: "`a`, `b` and `c`"."""
    marked = [f"`{name}`" for name in names]
    return " and ".join(filter(None, [", ".join(marked[:-1]), marked[-1]]))


def source_names(sources: str | Sequence[str]) -> str:
    """Return the names of sources for messages: "'a.jsonl' and '-'"."""
    names = [sources] if isinstance(sources, str) else list(sources)
    return " and ".join(filter(None, [", ".join(map(repr, names[:-1])), repr(names[-1])]))


def raise_for(problems: Sequence[str], sources: str | Sequence[str], way_out: str = "") -> None:
    """Raise a ValueError that describes the first few bad rows, if there are any."""
    if not problems:
        return
    more = f"; and {len(problems) - _REPORTED} more" if len(problems) > _REPORTED else ""
    rows = "row" if len(problems) == 1 else "rows"
    described = "; ".join(problems[:_REPORTED])
    raise ValueError(f"{len(problems)} bad {rows} in {source_names(sources)}: {described}{more}.{way_out}")
