"""`gralora train`."""

import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gralora.cli.options import ARGUMENTS, option, with_options_of
from gralora.recipe.options import TrainingOptions
from gralora.recipe.options_file import option_types, overlay, read_options_file
from gralora.recipe.processes import disconnect, give_way, is_main_process

if TYPE_CHECKING:
    from gralora.recipe.progress import Reporter
    from gralora.recipe.result import TrainingResult

_OUTPUT = TrainingOptions.__dataclass_fields__["output"].default


@with_options_of(TrainingOptions, option_types())
def train(
    context: typer.Context,
    resume: Annotated[
        bool, option("Continue the interrupted run in --output, with its options.", "--resume", group="Run")
    ] = False,
    processes: Annotated[
        int | None,
        option(
            "Number of processes to start on this machine, one for each GPU; accelerate's configuration decides how "
            "they train.",
            default=1,
            group="Run",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        option(
            "Check everything, show the table with an estimate of the memory, and write nothing.",
            "--dry-run",
            group="Run",
        ),
    ] = False,
    config: Annotated[
        str | None,
        option("YAML file of these options; options on the command line take precedence.", group="Run"),
    ] = None,
    **given: Any,
) -> None:
    """Fine-tune a causal language model with a GraLoRA adapter.

    Without --model and --data, this trains the embedded default: SmolLM2-135M-Instruct on a packaged task.
    """
    options = overlay(
        read_options_file(config) if config else {},
        {name: value for name, value in given.items() if value is not None and value != []},
    )
    from gralora.recipe.launch import is_to_launch, launch

    resume = options.pop("resume", False) or resume
    in_file = options.pop("processes", None)
    processes = in_file if processes is None else processes
    if is_to_launch(processes):
        raise typer.Exit(launch(context.meta[ARGUMENTS], int(processes or 1)))
    output = options.pop("output", _OUTPUT)
    if resume and dry_run:
        raise ValueError("`resume` or `dry_run` must be given, not both.")
    _run(output, options, resume, dry_run)


def _run(output: str, given: dict[str, Any], resume: bool, dry_run: bool) -> None:
    # A mistake in an option is said before the libraries are imported, which takes seconds.
    options = None if resume else TrainingOptions(output=output, **given)
    from gralora.recipe import training
    from gralora.recipe.malloc import keep_freed_memory
    from gralora.recipe.progress import ConsoleReporter, Reporter
    from gralora.recipe.resume import resume_refusal

    keep_freed_memory()
    reporter = ConsoleReporter() if is_main_process() else Reporter()
    try:
        if options is None:
            result = training.resume_run(output, given, reporter)
        elif dry_run:
            training.dry_run(options, reporter)
            reporter.note("everything is in order; nothing was written")
            return
        else:
            result = training.train(options, reporter)
    except KeyboardInterrupt:
        reporter.close()
        if resume_refusal(output) is None:
            reporter.note(f"stopped. To continue: {_resume_command(output)}")
        else:
            reporter.note("stopped before the first step; nothing was written")
        give_way()
        raise typer.Exit(130) from None
    finally:
        reporter.close()
    if is_main_process():
        _print_result(result, reporter)
    disconnect()
    if result.interrupted:
        give_way()
        raise typer.Exit(130)


def _print_result(result: "TrainingResult", reporter: "Reporter") -> None:
    if result.interrupted:
        reporter.note(
            f"interrupted after step {result.steps} of {result.total_steps}; the checkpoint and the adapter are saved"
        )
        reporter.note(f"to continue: {_resume_command(result.output)}")
        return
    prompt = "..."
    if result.example is not None:
        prompt = result.example["prompt"]
        reporter.note("")
        for name in ("prompt", "before", "after", "reference"):
            reporter.note(f"{name + ':':<11}{' '.join((result.example[name] or '').split())[:160]}")
        reporter.note("")
        reporter.note(f"exact match on held-out rows: {result.before:.1%} before, {result.after:.1%} after")
    if result.stopped_early:
        reporter.note(f"stopped after step {result.steps} of {result.total_steps}: the evaluation loss fell no more")
    if result.best_step:
        best = dict(result.eval_losses)[result.best_step]
        reporter.note(f"kept the adapter of step {result.best_step}, whose evaluation loss is {best:.4f}")
    speed = f", {result.tokens_per_second:,.0f} tokens/s" if result.tokens_per_second else ""
    losses = f"last loss {result.losses[-1]:.4f}"
    if result.eval_losses:
        losses += f", evaluation loss {result.eval_losses[-1][1]:.4f}"
    reporter.note(f"{result.steps} steps{speed}, {result.seconds:.0f} s in total, {losses}")
    reporter.note(f"wrote {result.output}: the adapter, README.md, metrics.json, loss.png, config.yaml")
    reporter.note(f"next: gralora generate {shlex.quote(result.output)} --prompt {shlex.quote(prompt)}")


def _resume_command(output: str) -> str:
    return f"gralora train --resume --output {shlex.quote(output)}"
