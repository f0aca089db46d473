"""The command line: `gralora <verb>`. One file a verb, which parses, calls and prints.

A verb's file imports the library inside its function, so that `--help` does not wait for torch.
"""

import logging
import os
import sys
from typing import Annotated, Any

from gralora import __version__
from gralora.recipe.processes import StoppedTogetherError, give_way, is_main_process, speaks

_ERRORS = (ValueError, TypeError, RuntimeError, OSError, ImportError)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. A mistake of the user ends it with a message and status 2, Ctrl-C with status 130.

    With `GRALORA_TRACEBACK` set in the environment, errors keep their traceback.

    Args:
        arguments: Arguments; None for those of the process.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    verbs: dict[str, Any] = {}
    try:
        from gralora.optional import require

        require("typer", "rich", "yaml", extra="train")
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # what it logs at its import concerns nobody here
        if "WORLD_SIZE" in os.environ:
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # what DDP warns of, the Trainer chose
        command = build_command()
        verbs = command.commands
        command(arguments, prog_name="gralora", standalone_mode=True)
    except KeyboardInterrupt:
        if is_main_process():
            print("stopped", file=sys.stderr)
        sys.exit(130)
    except SystemExit as end:
        # Typer makes an interrupt an `Exit` without a word.
        if isinstance(getattr(end.__context__, "__cause__", None), KeyboardInterrupt) and is_main_process():
            print("stopped", file=sys.stderr)
        raise
    except StoppedTogetherError:
        if os.environ.get("GRALORA_TRACEBACK"):
            raise
        give_way()
        sys.exit(2)
    except _ERRORS as error:
        if os.environ.get("GRALORA_TRACEBACK"):
            raise
        if speaks():
            print(f"error: {_respelled(error, verbs.get(arguments[0]) if arguments else None)}", file=sys.stderr)
        else:
            give_way()
        sys.exit(2)


def _respelled(error: Exception, verb: Any) -> str:
    from gralora.cli.errors import with_flags

    text = str(error) or type(error).__name__
    return text if verb is None else with_flags(text, verb)


def build_command() -> Any:
    """Return the click command of `gralora`, with one subcommand for each verb."""
    import typer

    from gralora.cli import chat, export, generate, import_, inspect, merge, train
    from gralora.cli.options import Verb, option, with_verbose

    app = typer.Typer(
        no_args_is_help=True,
        invoke_without_command=True,
        pretty_exceptions_enable=False,
        help="GraLoRA adapters: fine-tune a language model, merge the result, export it, inspect it.",
    )

    @app.callback()
    def gralora(
        version: Annotated[bool, option("Show the version.", "--version")] = False,
    ) -> None:
        if version:
            print(f"gralora {__version__}")
            raise typer.Exit

    for name, verb in {
        "train": train.train,
        "generate": generate.generate,
        "chat": chat.chat,
        "merge": merge.merge,
        "export": export.export,
        "import": import_.import_,
        "inspect": inspect.inspect,
    }.items():
        app.command(name, cls=Verb)(with_verbose(verb))
    return typer.main.get_command(app)
