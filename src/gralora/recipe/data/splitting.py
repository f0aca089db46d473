"""Setting rows aside for validation."""

import json
import random
from collections import defaultdict
from collections.abc import Sequence

from gralora.recipe.data.rows import Row


def split_rows(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Divide rows into training rows and validation rows, both in their order.

    Equal rows stay together, so that no validation row is trained on. Where they are many, the validation rows are
    fewer than their share.

    Args:
        rows: All rows.
        share: Share of the rows to set aside, between 0 and 1.
        seed: Random seed; the same rows, share and seed give the same division.

    Raises:
        ValueError: The share is not between 0 and 1, or one of the parts would be empty.
    """
    if not 0 < share < 1:
        raise ValueError(f"`validation_share` must be between 0 and 1; got validation_share={share!r}.")
    equal_rows: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        equal_rows[_content(row)].append(index)
    if len(equal_rows) < 2:
        raise ValueError(
            f"`validation_share` needs at least two different rows; got {len(rows)} rows, {len(equal_rows)} different."
        )
    groups = list(equal_rows.values())
    random.Random(seed).shuffle(groups)
    wanted = max(1, round(share * len(rows)))
    held_out: set[int] = set()
    for group in groups:
        if len(held_out) + len(group) <= wanted and len(held_out) + len(group) < len(rows):
            held_out.update(group)
    if not held_out:
        held_out.update(min(groups, key=len))
    training = [row for index, row in enumerate(rows) if index not in held_out]
    return training, [rows[index] for index in sorted(held_out)]


def count_repeated(rows: Sequence[Row], others: Sequence[Row]) -> int:
    """Return how many of `rows` are among `others` as well."""
    known = {_content(row) for row in others}
    return sum(_content(row) in known for row in rows)


def _content(row: Row) -> str:
    return json.dumps([row.messages, row.tools], default=str)
