"""`gralora train`."""

import shlex
from typing import Annotated, Any

import typer

from gralora.recipe.malloc import keep_freed_memory
from gralora.recipe.options_file import merge, read_options_file
from gralora.recipe.progress import ConsoleReporter
from gralora.recipe.run_folder import RunFolder
from gralora.recipe.training import TrainingOptions, TrainingResult, options_of_run
from gralora.recipe.training import train as run_training

_DEFAULTS = TrainingOptions.__dataclass_fields__


def _option(text: str) -> Any:
    return typer.Option(help=text, show_default=False)


def _with_default(name: str, text: str) -> Any:
    return _option(f"{text} (default {_DEFAULTS[name].default})")


def train(
    model: Annotated[str | None, _with_default("model", "Base model: folder, hub name or GGUF file.")] = None,
    data: Annotated[
        str | None,
        _option("JSONL of `messages` or `prompt`/`completion`, or a dataset, `name:split`. (default: a packaged task)"),
    ] = None,
    eval: Annotated[str | None, _option("Held-out rows, likewise: scored by exact match before and after.")] = None,
    r: Annotated[int | None, _with_default("r", "Rank.")] = None,
    hybrid_r: Annotated[int | None, _with_default("hybrid_r", "Rank of a plain LoRA beside the blocks.")] = None,
    alpha: Annotated[float | None, _with_default("alpha", "Update scale is alpha / (r + hybrid_r).")] = None,
    k: Annotated[int | None, _with_default("k", "Blocks per side of each weight; divides r.")] = None,
    dropout: Annotated[float | None, _with_default("dropout", "Of the adapter's input.")] = None,
    target_modules: Annotated[
        str | None, _with_default("target_modules", "Names with commas between, or a regular expression.")
    ] = None,
    lr: Annotated[float | None, _with_default("lr", "Peak learning rate; warm-up, then cosine.")] = None,
    steps: Annotated[int | None, _option("How many steps; or --epochs.")] = None,
    epochs: Annotated[float | None, _option("How often each row is seen. (default 3)")] = None,
    batch_size: Annotated[int | None, _with_default("batch_size", "Rows of a step.")] = None,
    max_length: Annotated[int | None, _with_default("max_length", "Tokens to keep of a row.")] = None,
    dtype: Annotated[
        str | None, _with_default("dtype", "Of the base model: auto, float32, bfloat16 or float16.")
    ] = None,
    output: Annotated[str | None, _with_default("output", "Folder to write, new or empty.")] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with the interrupted run in --output, with its options.", show_default=False
        ),
    ] = False,
    seed: Annotated[int | None, _with_default("seed", "Of the start, the order of rows and dropout.")] = None,
    threads: Annotated[int | None, _option("Processor threads.")] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option("--gradient-checkpointing", help="Less memory, about a fifth slower.", show_default=False),
    ] = None,
    config: Annotated[str | None, _option("YAML file of these options; the command line wins over it.")] = None,
) -> None:
    """Fine-tune a causal language model with a GraLoRA adapter.

    Without --model and --data, the embedded default: SmolLM2-135M-Instruct and a packaged task.
    """
    given = {name: value for name, value in locals().items() if name not in ("config", "resume") and value is not None}
    given = merge(read_options_file(config) if config else {}, given)
    resume = given.pop("resume", False) or resume
    output = given.pop("output", _DEFAULTS["output"].default)
    options = options_of_run(output, given) if resume else TrainingOptions(output=output, **given)
    keep_freed_memory()
    reporter = ConsoleReporter()
    try:
        result = run_training(options, reporter)
    except KeyboardInterrupt:
        reporter.close()
        started = RunFolder(output).has_run
        reporter.note(f"stopped. To go on: {_resume_command(output)}" if started else "stopped before the first step")
        raise typer.Exit(130) from None
    finally:
        reporter.close()
    _print_result(result, reporter)
    if result.interrupted:
        raise typer.Exit(130)


def _print_result(result: TrainingResult, reporter: ConsoleReporter) -> None:
    if result.interrupted:
        reporter.note(
            f"interrupted after step {result.steps} of {result.total_steps}; checkpoint and adapter are saved"
        )
        reporter.note(f"to go on: {_resume_command(result.output)}")
        return
    prompt = "..."
    if result.example is not None:
        prompt = result.example["prompt"]
        reporter.note("")
        for name in ("prompt", "before", "after", "reference"):
            reporter.note(f"{name + ':':<11}{' '.join((result.example[name] or '').split())[:160]}")
        reporter.note("")
        reporter.note(f"exact match on held-out rows: {result.before:.1%} before, {result.after:.1%} after")
    speed = f", {result.tokens_per_second:,.0f} tokens/s" if result.tokens_per_second else ""
    reporter.note(f"{result.steps} steps{speed}, {result.seconds:.0f} s in all, last loss {result.losses[-1]:.4f}")
    reporter.note(f"wrote {result.output}: the adapter, README.md, metrics.json, loss.png")
    reporter.note(f"next: gralora generate {shlex.quote(result.output)} --prompt {shlex.quote(prompt)}")


def _resume_command(output: str) -> str:
    return f"gralora train --resume --output {shlex.quote(output)}"
