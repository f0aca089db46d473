"""The packaged task: turn a customer's message into a compact JSON object of four fields.

The rows are the same on every machine. A held-out row has a combination of product, issue and urgency
that no training row has, and an order number of its own.
"""

import itertools
import json
import random
from typing import Literal

_PRODUCTS = ("kettle", "desk lamp", "blender", "camera", "backpack", "keyboard", "toaster", "office chair")
_ISSUES = {
    "damaged": ("arrived with a crack in it", "was broken when I opened the box", "came badly dented"),
    "late": ("still has not been delivered", "should have been here last week", "is stuck somewhere in the post"),
    "refund": (
        "is not for me and I want my money back",
        "has to go back, please refund me",
        "I sent back has not been refunded yet",
    ),
    "wrong_item": ("is not the one I ordered", "came in the wrong colour", "is a different model from the picture"),
    "missing_part": ("came without its cable", "has a part missing", "was packed without the screws"),
    "how_to": (
        "came without instructions I understand",
        "needs setting up and I cannot",
        "is fine but I need to know how to clean it",
    ),
}
_URGENCIES = {
    "high": ("This is urgent!", "I need this solved today.", "Please act at once."),
    "normal": ("Please let me know.", "Looking forward to your answer.", "Can you help?"),
    "low": ("No hurry at all.", "Whenever you have time.", "It can wait."),
}
_GREETINGS = ("Hi,", "Hello,", "Good morning,", "Dear team,")
_ORDERS = ("Order {}.", "My order number is {}.", "It is order {}.")

_DATA_SEED = 20355
_TRAIN_ROWS = 640
_EVAL_ROWS = 32


def support_rows(split: Literal["train", "eval"]) -> list[dict[str, str]]:
    """Return the rows of one split, each with a `prompt` and a `completion`.

    Example:
        >>> support_rows("eval")[0]["completion"].startswith('{"product":"')
        True
    """
    draw = random.Random(_DATA_SEED)
    combinations = list(itertools.product(_PRODUCTS, _ISSUES, _URGENCIES))
    draw.shuffle(combinations)
    held_out, seen = combinations[:_EVAL_ROWS], combinations[_EVAL_ROWS:]
    orders = iter(draw.sample(range(10000, 100000), _EVAL_ROWS + _TRAIN_ROWS))
    evaluation = [_row(draw, combination, next(orders)) for combination in held_out]
    if split == "eval":
        return evaluation
    rows = [
        _row(draw, combination, next(orders)) for combination in itertools.islice(itertools.cycle(seen), _TRAIN_ROWS)
    ]
    draw.shuffle(rows)
    return rows


def _row(draw: random.Random, combination: tuple[str, str, str], order: int) -> dict[str, str]:
    product, issue, urgency = combination
    complaint = f"{draw.choice(_GREETINGS)} the {product} {draw.choice(_ISSUES[issue])}."
    sentences = [complaint, draw.choice(_ORDERS).format(order), draw.choice(_URGENCIES[urgency])]
    answer = {"product": product, "issue": issue, "order": str(order), "urgency": urgency}
    return {"prompt": " ".join(sentences), "completion": json.dumps(answer, separators=(",", ":"))}
