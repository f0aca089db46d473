"""`gralora train`."""

import shlex
from dataclasses import fields
from typing import Annotated, Any

import typer

from gralora.cli.options import option
from gralora.recipe.malloc import keep_freed_memory
from gralora.recipe.options import DEFAULT_EPOCHS, PACKAGED_TASK, PACKAGED_TASK_STEPS, TrainingOptions
from gralora.recipe.options_file import overlay, read_options_file
from gralora.recipe.progress import ConsoleReporter
from gralora.recipe.result import TrainingResult
from gralora.recipe.resume import resume_refusal
from gralora.recipe.training import resume_run
from gralora.recipe.training import train as run_training

_DEFAULTS = {field.name: field.default for field in fields(TrainingOptions)}


def _with_default(name: str, help: str) -> Any:
    return option(help, default=_DEFAULTS[name])


def train(
    model: Annotated[str | None, _with_default("model", "Base model: folder, hub name or GGUF file.")] = None,
    data: Annotated[
        str | None,
        option("JSONL file of `messages` or `prompt`/`completion`, or a dataset, `name:split`.", default=PACKAGED_TASK),
    ] = None,
    eval: Annotated[
        str | None, option("Held-out rows in the same formats, scored by exact match before and after training.")
    ] = None,
    r: Annotated[int | None, _with_default("r", "Rank.")] = None,
    hybrid_r: Annotated[int | None, _with_default("hybrid_r", "Rank of the plain LoRA beside the blocks.")] = None,
    alpha: Annotated[float | None, _with_default("alpha", "The update's scale is alpha / (r + hybrid_r).")] = None,
    k: Annotated[int | None, _with_default("k", "Blocks per side of each weight; divides r.")] = None,
    dropout: Annotated[float | None, _with_default("dropout", "Dropout probability of the adapter's input.")] = None,
    target_modules: Annotated[
        str | None,
        _with_default("target_modules", "Module names separated by commas, or a regular expression."),
    ] = None,
    lr: Annotated[float | None, _with_default("lr", "Peak learning rate; linear warm-up, then cosine decay.")] = None,
    steps: Annotated[
        int | None,
        option("Number of steps, instead of --epochs.", default=f"{PACKAGED_TASK_STEPS} for {PACKAGED_TASK}"),
    ] = None,
    epochs: Annotated[
        float | None, option("Number of passes over the rows, instead of --steps.", default=f"{DEFAULT_EPOCHS:g}")
    ] = None,
    batch_size: Annotated[int | None, _with_default("batch_size", "Rows per step.")] = None,
    max_length: Annotated[
        int | None, _with_default("max_length", "Maximum tokens per row; longer rows are truncated.")
    ] = None,
    dtype: Annotated[
        str | None, _with_default("dtype", "Dtype of the base model: auto, float32, bfloat16 or float16.")
    ] = None,
    output: Annotated[str | None, _with_default("output", "Folder to write, new or empty.")] = None,
    resume: Annotated[bool, option("Continue the interrupted run in --output, with its options.", "--resume")] = False,
    seed: Annotated[
        int | None, _with_default("seed", "Random seed for starting values, order of rows and dropout.")
    ] = None,
    threads: Annotated[int | None, option("Number of CPU threads.", default="torch's own")] = None,
    gradient_checkpointing: Annotated[
        bool | None, option("Use less memory, about a fifth slower.", "--gradient-checkpointing")
    ] = None,
    config: Annotated[
        str | None, option("YAML file of these options; options on the command line take precedence.")
    ] = None,
) -> None:
    """Fine-tune a causal language model with a GraLoRA adapter.

    Without --model and --data, this trains the embedded default: SmolLM2-135M-Instruct on a packaged task.
    """
    named = {
        "model": model,
        "data": data,
        "eval": eval,
        "r": r,
        "hybrid_r": hybrid_r,
        "alpha": alpha,
        "k": k,
        "dropout": dropout,
        "target_modules": target_modules,
        "lr": lr,
        "steps": steps,
        "epochs": epochs,
        "batch_size": batch_size,
        "max_length": max_length,
        "dtype": dtype,
        "output": output,
        "seed": seed,
        "threads": threads,
        "gradient_checkpointing": gradient_checkpointing,
    }
    given = overlay(
        read_options_file(config) if config else {},
        {name: value for name, value in named.items() if value is not None},
    )
    resume = given.pop("resume", False) or resume
    output = given.pop("output", _DEFAULTS["output"])
    keep_freed_memory()
    reporter = ConsoleReporter()
    try:
        if resume:
            result = resume_run(output, given, reporter)
        else:
            result = run_training(TrainingOptions(output=output, **given), reporter)
    except KeyboardInterrupt:
        reporter.close()
        started = resume_refusal(output) is None
        reporter.note(
            f"stopped. To continue: {_resume_command(output)}" if started else "stopped before the first step"
        )
        raise typer.Exit(130) from None
    finally:
        reporter.close()
    _print_result(result, reporter)
    if result.interrupted:
        raise typer.Exit(130)


def _print_result(result: TrainingResult, reporter: ConsoleReporter) -> None:
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
    speed = f", {result.tokens_per_second:,.0f} tokens/s" if result.tokens_per_second else ""
    reporter.note(f"{result.steps} steps{speed}, {result.seconds:.0f} s in total, last loss {result.losses[-1]:.4f}")
    reporter.note(f"wrote {result.output}: the adapter, README.md, metrics.json, loss.png")
    reporter.note(f"next: gralora generate {shlex.quote(result.output)} --prompt {shlex.quote(prompt)}")


def _resume_command(output: str) -> str:
    return f"gralora train --resume --output {shlex.quote(output)}"
