"""The command line: `gralora <verb>`. One file a verb; they parse, call and print."""

import os
import sys

_ERRORS = (ValueError, TypeError, RuntimeError, OSError, ImportError)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a mistake of the user's ends it with a message and status 2.

    Args:
        arguments: Instead of those of the process.
    """
    try:
        from gralora.optional import require

        require("typer", "rich", "yaml", extra="train")
        _app()(arguments)
    except _ERRORS as error:
        if os.environ.get("GRALORA_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _app():
    import typer

    from gralora.cli import export, generate, import_, inspect, merge, train

    app = typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        help="GraLoRA adapters: fine-tune a language model, merge the result, export it, look at it.",
    )
    app.command("train")(train.train)
    app.command("generate")(generate.generate)
    app.command("merge")(merge.merge)
    app.command("export")(export.export)
    app.command("import")(import_.import_)
    app.command("inspect")(inspect.inspect)
    return app
