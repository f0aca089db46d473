"""Declaring an option of a verb."""

from typing import Any

import typer


def option(help: str, *names: str, default: Any = None) -> Any:
    """Return a typer option that shows `default` at the end of its help, where one is given.

    Args:
        help: What the option means.
        *names: Spellings, where they are not the parameter's name with hyphens.
        default: What the option is without being named.
    """
    shown = help if default is None else f"{help} [default: {default}]"
    return typer.Option(*names, help=shown, show_default=False)
