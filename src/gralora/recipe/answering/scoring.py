"""Scoring a model on held-out rows by exact match."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gralora.recipe.answering.decoding import generate_ids
from gralora.recipe.data import Row, encode_prompt
from gralora.recipe.processes import Processes

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
    processes: Processes | None = None,
) -> Score:
    """Answer the prompt of every row greedily, and count the answers that equal the reference.

    An answer is cut a few tokens after the length of the longest reference. Several processes each answer a part of
    the rows, and all return the whole score.

    Args:
        model: A causal language model. It is in evaluation mode during the call.
        tokenizer: The tokenizer of the model.
        rows: The held-out rows, at least one.
        batch_size: Number of rows generated at once.
        on_rows_done: Called with the number of rows done so far.
        processes: The processes that call this; None for this one alone.
    """
    processes = processes or Processes()
    in_step = processes.share_model
    prompts = [encode_prompt(row.prompt, row.is_plain, tokenizer, row.tools) for row in rows]
    references = [tokenizer(row.completion, add_special_tokens=False)["input_ids"] for row in rows]
    limit = max(map(len, references)) + _SLACK
    by_length = sorted(range(len(rows)), key=lambda index: len(prompts[index]))
    mine = by_length[processes.rank :: processes.count]
    most = math.ceil(len(rows) / processes.count)
    found: list[tuple[int, str]] = []
    was_training = model.training
    model.eval()
    try:
        for start in range(0, most if in_step else len(mine), batch_size):
            # A process without rows left generates all the same, where the others need its shard.
            chosen = mine[start : start + batch_size]
            asked = [prompts[index] for index in chosen or by_length[:1]]
            ids = generate_ids(model, tokenizer, asked, limit, in_step=in_step, do_sample=False)
            texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
            found += zip(chosen, texts, strict=False)
            on_rows_done(min((start + batch_size) * processes.count, len(rows)))
    finally:
        model.train(was_training)
    answers = [text for _, text in sorted(processes.gathered(found))]
    correct = sum(answer.strip() == row.completion.strip() for answer, row in zip(answers, rows, strict=True))
    return Score(correct, len(rows), tuple(answers))
