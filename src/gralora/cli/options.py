"""Declaring the options of a verb."""

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperCommand

from gralora.recipe.processes import StoppedTogetherError, speaks

# Where the context of a verb has the command line, for a verb that starts itself in other processes.
ARGUMENTS = "gralora.arguments"
_CLICK_TYPES = {tuple: list[str]}


def argument(help: str, metavar: str) -> Any:
    """Return a required typer argument, shown as `metavar` in usage lines as in error messages."""
    return typer.Argument(help=help, metavar=metavar, show_default=False)


def option(help: str, *names: str, default: Any = None, group: str | None = None) -> Any:
    """Return a typer option whose help ends with its default, where `default` is given.

    Args:
        help: Meaning of the option.
        *names: Spellings, where they differ from the parameter's name with hyphens.
        default: Value or text to show as the default.
        group: Heading in the help under which the option stands.
    """
    # Typer reads help texts as rich markup, in which a bare "[default: 2]" would be a tag and vanish.
    shown = escape(help) if default is None else f"{escape(help)} {escape(f'[default: {default}]')}"
    return typer.Option(*names, help=shown, show_default=False, rich_help_panel=group)


def with_options_of(options: type, types: Mapping[str, type]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that gives a verb one command-line option for each field of a dataclass.

    The verb receives them by keyword, None where an option is not given. Its own parameters come last.

    Args:
        options: Dataclass whose fields have `group`, `help`, `shown` and `flags` in their metadata.
        types: Type of each field: int, float, str, bool or tuple; fields of another type get no option.
    """

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(verb, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
        made = []
        for field in dataclasses.fields(options):
            kind = types[field.name]
            if kind not in (int, float, str, bool, tuple):
                continue
            flag = f"--{field.name.replace('_', '-')}"
            about: Any = field.metadata
            shown = None if about["shown"] is False or about["shown"] == () else about["shown"]
            declared = option(about["help"], flag, *about["flags"], default=shown, group=about["group"])
            annotation = Annotated[_CLICK_TYPES.get(kind, kind) | None, declared]
            made.append(
                inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            )
        own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        verb.__signature__ = inspect.Signature([*made, *own])  # type: ignore[attr-defined]
        verb.__annotations__ = {p.name: p.annotation for p in (*made, *own)}
        return verb

    return decorate


class Verb(TyperCommand):
    """A command that refuses a single-valued option which is given twice."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments.

        Raises:
            BadParameter: An option with one value is given twice.
            StoppedTogetherError: The arguments are wrong, and another process says so.
        """
        try:
            return self._parsed(ctx, args)
        except typer.BadParameter.__base__ as error:  # pyright: ignore[reportGeneralTypeIssues]
            if speaks():
                raise
            raise StoppedTogetherError(str(error)) from None

    def _parsed(self, ctx: Any, args: list[str]) -> list[str]:
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for parameter in order:
            many = parameter.param_type_name == "argument" or parameter.multiple
            if not many and order.count(parameter) > 1:
                raise typer.BadParameter("it is given more than once, and takes one value.", ctx, parameter)
        ctx.meta[ARGUMENTS] = [ctx.info_name, *args]
        return super().parse_args(ctx, args)


def with_verbose(verb: Callable[..., None]) -> Callable[..., None]:
    """Return a verb with the flag `--verbose`, which lets the libraries speak; see `quiet_libraries`."""
    flag = option("Show what the libraries say: warnings, logs, progress bars.", "--verbose", "-v")
    own = list(inspect.signature(verb, eval_str=True).parameters.values())
    added = inspect.Parameter(
        "verbose", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, flag]
    )

    @functools.wraps(verb)
    def speaking(*, verbose: bool = False, **given: Any) -> None:
        if verbose:
            os.environ["GRALORA_VERBOSE"] = "1"  # for the processes that this one starts, too
        verb(**given)

    speaking.__signature__ = inspect.Signature([*own, added])  # type: ignore[attr-defined]
    speaking.__annotations__ = {p.name: p.annotation for p in (*own, added)}
    return speaking
