"""Checks of single values and the names of dtypes: one rule and one message for all callers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

# Checking a name must not cost the import of torch: a command line does it before anything else.
if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")
_SHORT_NAMES = {
    "fp32": "float32",
    "float": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
}


def require_text(name: str, value: Any) -> None:
    """Check that `value` is a string that is not empty.

    Raises:
        ValueError: It is not.
    """
    if not isinstance(value, str) or not value:
        raise ValueError(f"`{name}` must be text; got {name}={value!r}.")


def require_integer(name: str, value: Any, minimum: int = 1, maximum: int | None = None) -> None:
    """Check that `value` is an integer from `minimum` to `maximum`; a bool is not an integer here.

    Raises:
        ValueError: It is not.

    Example:
        >>> require_integer("r", True)
        Traceback (most recent call last):
        ...
        ValueError: `r` must be a positive integer; got r=True.
    """
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if is_integer and minimum <= value and (maximum is None or value <= maximum):
        return
    rule = {1: "a positive integer", 0: "zero or a positive integer"}.get(minimum, f"an integer of at least {minimum}")
    if maximum is not None:
        rule = f"an integer from {minimum} to {maximum}"
    raise ValueError(f"`{name}` must be {rule}; got {name}={value!r}.")


def require_positive(name: str, value: Any) -> None:
    """Check that `value` is a finite positive number; a bool is not a number here.

    Raises:
        ValueError: It is not.
    """
    if not is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"`{name}` must be a finite positive number; got {name}={value!r}.")


def is_number(value: Any) -> bool:
    """Return whether `value` is an int or a float; a bool is neither here."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype, without "torch.".

    Example:
        >>> import torch
        >>> dtype_name(torch.bfloat16)
        'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def full_dtype_name(name: str, allow_auto: bool = False) -> str:
    """Return the full name of a dtype that may be given by a short one: bf16, fp16, fp32, half, float.

    Args:
        name: Name of the dtype.
        allow_auto: Whether "auto" is a name, too.

    Raises:
        ValueError: Another name.

    Example:
        >>> full_dtype_name("bf16")
        'bfloat16'
    """
    full = _SHORT_NAMES.get(name, name)
    names = [*(("auto",) if allow_auto else ()), *DTYPES]
    if full not in names:
        raise ValueError(f"`dtype` must be {', '.join(map(repr, names[:-1]))} or {names[-1]!r}; got dtype={name!r}.")
    return full


def dtype_named(name: str, auto: torch.dtype | None = None) -> torch.dtype:
    """Return the dtype called `name`: float32, bfloat16 or float16, or a short name of these.

    Args:
        name: Name of the dtype.
        auto: The dtype that "auto" stands for; None where "auto" is not allowed.

    Raises:
        ValueError: Another name.
    """
    full = full_dtype_name(name, allow_auto=auto is not None)
    if auto is not None and full == "auto":
        return auto
    import torch

    return getattr(torch, full)
