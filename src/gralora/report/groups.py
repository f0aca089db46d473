# pyright: strict
"""Layers of one kind of module together, and names that are short enough for a table."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from gralora.report.inspect import LayerReport

_CUT = "…"


class Group(NamedTuple):
    """The layers whose names differ in numbers alone."""

    name: str
    layers: tuple[LayerReport, ...]


def by_kind(layers: Sequence[LayerReport]) -> list[Group]:
    """Return the groups of `layers`, in order, under the shortest ends of their names that tell them apart.

    `model.layers.0.self_attn.q_proj` and `model.layers.1.self_attn.q_proj` are the group `q_proj`.
    """
    found: dict[tuple[str, ...], list[LayerReport]] = {}
    for layer in layers:
        parts = tuple("*" if part.isdecimal() else part for part in layer.target.split("."))
        found.setdefault(parts, []).append(layer)
    return [Group(".".join(_end(parts, list(found))), tuple(group)) for parts, group in found.items()]


def _end(parts: tuple[str, ...], others: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    lengths = range(1, len(parts) + 1)
    length = next((n for n in lengths if sum(other[-n:] == parts[-n:] for other in others) == 1), len(parts))
    return parts[-length:]


def shortened(names: Sequence[str], width: int) -> list[str]:
    """Return the names in at most `width` characters each, as far as their numbers and last parts allow.

    Parts in the middle give way to "…", those that most names share first, and numbers never.

    Example:
        >>> shortened(["model.layers.12.self_attn.q_proj", "model.layers.13.mlp.up_proj", "lm_head"], 22)
        ['…12.self_attn.q_proj', '…layers.13.mlp.up_proj', 'lm_head']
    """
    shares = Counter(part for name in names for part in dict.fromkeys(name.split(".")))
    return [_shortened(name, width, shares) for name in names]


def _shortened(name: str, width: int, shares: Counter[str]) -> str:
    parts = name.split(".")
    droppable = [index for index, part in enumerate(parts[:-1]) if not part.isdecimal()]
    droppable.sort(key=lambda index: -shares[parts[index]])
    for index in droppable:
        if len(_joined(parts)) <= width:
            break
        parts[index] = _CUT
    short = _joined(parts)
    if len(short) <= width or width < len(_CUT) + 2:
        return short
    tail = (width - len(_CUT) + 1) // 2
    return short[: width - len(_CUT) - tail] + _CUT + short[-tail:]


def _joined(parts: Sequence[str]) -> str:
    return re.sub(rf"\.?{_CUT}\.?(?:{_CUT}\.?)*", _CUT, ".".join(parts))
