"""Text out of a model: greedy answers for scoring, and one answer streamed as it is made."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gralora.recipe.data import Row, encode_prompt, template_stop_ids

_SLACK = 8  # tokens an answer may run past the longest reference before it is cut


@dataclass(frozen=True)
class Score:
    """How many held-out rows a model answers word for word.

    Attributes:
        correct: Answers equal to the reference, white space at the ends aside.
        rows: How many were asked.
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
    """Answer the prompt of every row greedily, and count the answers that are right word for word.

    An answer may be as long as the longest reference and a little more.

    Args:
        model: A causal language model; put into evaluation mode, and back.
        tokenizer: Its tokenizer.
        rows: At least one.
        batch_size: Rows generated at once.
        on_rows_done: Called with the number of rows done so far.
    """
    prompts = [encode_prompt(row.prompt, row.is_plain, tokenizer) for row in rows]
    references = [tokenizer(row.completion, add_special_tokens=False)["input_ids"] for row in rows]
    limit = max(map(len, references)) + _SLACK
    by_length = sorted(range(len(rows)), key=lambda index: len(prompts[index]))
    answers = [""] * len(rows)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(rows), batch_size):
            chosen = by_length[start : start + batch_size]
            for index, answer in zip(
                chosen, _greedy(model, tokenizer, [prompts[index] for index in chosen], limit), strict=True
            ):
                answers[index] = answer
            on_rows_done(min(start + batch_size, len(rows)))
    finally:
        model.train(was_training)
    correct = sum(answer.strip() == row.completion.strip() for answer, row in zip(answers, rows, strict=True))
    return Score(correct, len(rows), tuple(answers))


def stream_answer(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    write: Callable[[str], None],
) -> None:
    """Answer one prompt, and pass the text to `write` piece by piece.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer; its chat template is used where it has one.
        prompt: What the user says.
        max_new_tokens: Tokens at most.
        temperature: 0 for greedy decoding, else the temperature of sampling.
        write: Takes the pieces.
    """
    from transformers import TextStreamer

    class Writer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            write(text)

    ids = torch.tensor([encode_prompt([{"role": "user", "content": prompt}], True, tokenizer)], device=model.device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    streamer = Writer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.eval()
    _generate(model, tokenizer, ids, torch.ones_like(ids), max_new_tokens, streamer=streamer, **sampling)


def _greedy(model: Any, tokenizer: Any, prompts: list[list[int]], limit: int) -> list[str]:
    longest = max(map(len, prompts))
    # Left, so that the last position of every row is the last token of its prompt.
    ids = torch.tensor([[_pad_id(tokenizer)] * (longest - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    output = _generate(model, tokenizer, ids, mask, limit, do_sample=False)
    return tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)


def _generate(model: Any, tokenizer: Any, ids: torch.Tensor, mask: torch.Tensor, limit: int, **kwargs: Any) -> Any:
    from transformers import GenerationConfig

    known = getattr(model.generation_config, "eos_token_id", None)
    stops = {*([known] if isinstance(known, int) else known or ()), *template_stop_ids(tokenizer)}
    streamer = kwargs.pop("streamer", None)
    settings = GenerationConfig(
        max_new_tokens=limit, eos_token_id=sorted(stops) or None, pad_token_id=_pad_id(tokenizer), **kwargs
    )
    with torch.no_grad():
        return model.generate(
            input_ids=ids, attention_mask=mask, generation_config=settings, streamer=streamer, use_cache=True
        )


def _pad_id(tokenizer: Any) -> int:
    return 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
