"""Scoring a model on held-out rows by exact match."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gralora.recipe.data import Row, encode_prompt
from gralora.recipe.decoding import generate_ids

_SLACK = 8  # number of tokens that an answer may be longer than the longest reference


@dataclass(frozen=True)
class Score:
    """The answers of a model to held-out rows.

    Attributes:
        correct: Number of answers equal to the reference, apart from white space at the ends.
        rows: Number of rows.
        answers: All answers, in the order of the rows.
    """

    correct: int
    rows: int
    answers: tuple[str, ...]

    @property
    def exact_match(self) -> float:
        """Share of correct answers."""
        return self.correct / self.rows


def score_exact_match(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    batch_size: int = 32,
    on_rows_done: Callable[[int], None] = lambda count: None,
) -> Score:
    """Answer the prompt of every row greedily, and count the answers that equal the reference.

    An answer is cut a few tokens after the length of the longest reference.

    Args:
        model: A causal language model. It is in evaluation mode during the call.
        tokenizer: The tokenizer of the model.
        rows: The held-out rows, at least one.
        batch_size: Number of rows generated at once.
        on_rows_done: Called with the number of rows done so far.
    """
    prompts = [encode_prompt(row.prompt, row.is_plain, tokenizer, row.tools) for row in rows]
    references = [tokenizer(row.completion, add_special_tokens=False)["input_ids"] for row in rows]
    limit = max(map(len, references)) + _SLACK
    by_length = sorted(range(len(rows)), key=lambda index: len(prompts[index]))
    answers = [""] * len(rows)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(rows), batch_size):
            chosen = by_length[start : start + batch_size]
            ids = generate_ids(model, tokenizer, [prompts[index] for index in chosen], limit, do_sample=False)
            for index, answer in zip(chosen, tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
                answers[index] = answer
            on_rows_done(min(start + batch_size, len(rows)))
    finally:
        model.train(was_training)
    correct = sum(answer.strip() == row.completion.strip() for answer, row in zip(answers, rows, strict=True))
    return Score(correct, len(rows), tuple(answers))
