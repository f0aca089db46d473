# pyright: strict
"""The shortest `target_modules` that mean the chosen modules and no others."""

import re
from collections.abc import Iterable


def exact_targets(chosen: Iterable[str], others: Iterable[str]) -> set[str] | str:
    r"""Return `target_modules` that PEFT matches with every name in `chosen` and none in `others`.

    PEFT takes a name of a list as the end of a module's name. Each chosen module gets the shortest end that
    no other module has. Where even a full name is the end of another one, the result is a regular
    expression over the whole name.

    Example:
        >>> sorted(exact_targets(["layers.0.q", "layers.1.q", "mlp.down"], ["layers.0", "layers.1", "down"]))
        ['mlp.down', 'q']
        >>> exact_targets(["layers.0.q", "proj"], ["layers.0", "enc.proj"])
        '(.*\\.)?(q)|proj'
    """
    taken = {end for name in others for end in _ends(name)}
    ends: set[str] = set()
    whole: set[str] = set()
    for name in chosen:
        end = next((end for end in _ends(name) if end not in taken), None)
        ends.add(end) if end else whole.add(name)
    if not whole:
        return ends
    alternatives = [re.escape(name) for name in sorted(whole)]
    if ends:
        alternatives.insert(0, rf"(.*\.)?({'|'.join(re.escape(end) for end in sorted(ends))})")
    return "|".join(alternatives)


def _ends(name: str) -> Iterable[str]:
    parts = name.split(".")
    return (".".join(parts[start:]) for start in reversed(range(len(parts))))
