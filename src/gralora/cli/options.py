"""Declaring the options of a verb."""

from typing import Any

import typer
from rich.markup import escape


def argument(help: str, metavar: str) -> Any:
    """Return a required typer argument, shown as `metavar` in usage lines as in error messages."""
    return typer.Argument(help=help, metavar=metavar, show_default=False)


def option(help: str, *names: str, default: Any = None) -> Any:
    """Return a typer option whose help ends with its default, where `default` is given.

    Args:
        help: Meaning of the option.
        *names: Spellings, where they differ from the parameter's name with hyphens.
        default: Value or text to show as the default.
    """
    # Typer reads help texts as rich markup, in which a bare "[default: 2]" would be a tag and vanish.
    shown = help if default is None else f"{help} {escape(f'[default: {default}]')}"
    return typer.Option(*names, help=shown, show_default=False)
