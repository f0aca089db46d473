"""The command line: `gralora <verb>`. One file a verb, which parses, calls and prints."""

import os
import sys
from typing import Any

_ERRORS = (ValueError, TypeError, RuntimeError, OSError, ImportError)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. A mistake of the user ends it with a message and status 2.

    With `GRALORA_TRACEBACK` set in the environment, errors keep their traceback.

    Args:
        arguments: Arguments; None for those of the process.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    verbs: dict[str, Any] = {}
    try:
        from gralora.optional import require

        require("typer", "rich", "yaml", extra="train")
        command = build_command()
        verbs = command.commands
        command(arguments)
    except _ERRORS as error:
        if os.environ.get("GRALORA_TRACEBACK"):
            raise
        print(f"error: {_respelled(error, verbs.get(arguments[0]) if arguments else None)}", file=sys.stderr)
        sys.exit(2)


def _respelled(error: Exception, verb: Any) -> str:
    from gralora.cli.errors import with_flags

    return str(error) if verb is None else with_flags(str(error), verb)


def build_command() -> Any:
    """Return the click command of `gralora`, with one subcommand for each verb."""
    import typer

    from gralora.cli import export, generate, import_, inspect, merge, train

    app = typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        help="GraLoRA adapters: fine-tune a language model, merge the result, export it, inspect it.",
    )
    app.command("train")(train.train)
    app.command("generate")(generate.generate)
    app.command("merge")(merge.merge)
    app.command("export")(export.export)
    app.command("import")(import_.import_)
    app.command("inspect")(inspect.inspect)
    return typer.main.get_command(app)
