"""A conversation in memory, which is cut from its oldest turns where it becomes too long."""

from collections.abc import Callable

from gralora.recipe.answering.answer import Answerer
from gralora.recipe.answering.prompts import Message

_SHARE_FOR_ANSWER = 4  # an answer gets at least this part of what the model takes


class Chat:
    """A conversation with a model.

    Attributes:
        messages: The turns so far, without the system prompt.
        system: The system prompt, or None.

    Args:
        answerer: What answers.
        note: Receives messages for the user.
    """

    def __init__(self, answerer: Answerer, note: Callable[[str], None]) -> None:
        self.messages: list[Message] = []
        self.system = answerer.options.system
        self._answerer = answerer
        self._note = note

    def say(self, text: str, write: Callable[[str], None]) -> None:
        """Answer `text`, and pass the answer to `write` piece by piece.

        An answer that a KeyboardInterrupt ends stays in the conversation as far as it came; a message that is refused
        does not.

        Raises:
            ValueError: The message is too long, or the chat template refuses the conversation.
        """
        pieces: list[str] = []

        def keep(piece: str) -> None:
            pieces.append(piece)
            write(piece)

        turns = self._fitting([*self.messages, {"role": "user", "content": text}])
        self._note_cut(len(self.messages) + 1 - len(turns))
        try:
            self._answerer.stream(self._with_system(turns), keep)
        finally:
            if pieces:
                self.messages = [*turns, {"role": "assistant", "content": "".join(pieces)}]

    def reset(self) -> None:
        """Forget all turns; the system prompt stays."""
        self.messages = []

    def _with_system(self, turns: list[Message]) -> list[Message]:
        return [{"role": "system", "content": self.system}, *turns] if self.system else turns

    def _fitting(self, turns: list[Message]) -> list[Message]:
        """Return the newest turns that leave room for an answer, or the last one alone."""
        limit = self._answerer.context_length
        if limit is None:
            return turns
        room = limit - min(self._answerer.options.max_new_tokens, limit // _SHARE_FOR_ANSWER)
        while len(turns) > 1 and len(self._answerer.encode(self._with_system(turns))) > room:
            turns = turns[2:]
        return turns

    def _note_cut(self, count: int) -> None:
        if count:
            self._note(f"note: the conversation is too long for the model; its {count} oldest messages are left out")
