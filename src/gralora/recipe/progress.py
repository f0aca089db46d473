"""Reporting the progress of a run, and silencing the libraries that it uses."""

import datetime
import importlib.util
import logging
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from gralora.optional import require

_NOISY_LOGGERS = ("transformers", "trl", "datasets", "accelerate", "bitsandbytes", "peft", "huggingface_hub")
_SECONDS_BETWEEN_LINES = 5  # where the output is not a terminal


@dataclass(frozen=True)
class RunSummary:
    """Facts about a run that is about to train.

    Attributes:
        model: Name of the base model.
        dtype: Dtype of the base weights.
        device: Device of the model.
        targets: Number of adapted layers by the last part of their name.
        trainable_parameters: Number of parameters of the adapter.
        all_parameters: Number of parameters of the model, including the adapter.
        r: Rank of the adapter.
        hybrid_r: Rank of the plain LoRA beside the blocks.
        k: Blocks per side.
        scale: Factor of the update.
        train_rows: Number of training rows.
        truncated_rows: Number of training rows that were truncated.
        eval_rows: Number of held-out rows.
        validation_rows: Number of rows whose loss is measured during training.
        steps: Number of steps of the whole run.
        first_step: Number of steps that were done before a resume.
        batch_size: Rows that one process handles at once.
        grad_accumulation: Number of such batches in a step of one process.
        processes: Number of processes.
        memory: Estimate of the memory that training takes, in bytes, by part; None where it was not made.
    """

    model: str
    dtype: str
    device: str
    targets: dict[str, int]
    trainable_parameters: int
    all_parameters: int
    r: int
    hybrid_r: int
    k: int
    scale: float
    train_rows: int
    truncated_rows: int
    eval_rows: int
    validation_rows: int
    steps: int
    first_step: int
    batch_size: int
    grad_accumulation: int
    processes: int
    memory: dict[str, int] | None = None

    @property
    def global_batch(self) -> int:
        """Number of rows in a step."""
        return self.batch_size * self.grad_accumulation * self.processes


class Reporter:
    """Receives the progress events of a run. This base class ignores them; subclasses override methods."""

    def note(self, text: str) -> None:
        """Receive a message for the user."""

    def ready(self, summary: RunSummary) -> None:
        """Receive the facts of the run, after loading and before training."""

    def step(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Receive the results of step number `step`."""

    def evaluated(self, step: int, loss: float) -> None:
        """Receive the loss on the validation rows after step number `step`."""

    def sample(self, step: int, prompt: str, answer: str) -> None:
        """Receive the model's answer to a prompt after step number `step`."""

    def scoring(self, what: str, done: int, rows: int) -> None:
        """Receive the number of held-out rows answered so far, `what` ("before" or "after") training."""

    def close(self) -> None:
        """Receive the end of the run."""


class ConsoleReporter(Reporter):
    """Shows progress on the terminal with rich: a table, a bar and lines."""

    def __init__(self) -> None:
        require("rich", extra="train")
        from rich.console import Console

        self.console = Console(soft_wrap=True)
        self._bar: Any = None
        self._task: Any = None
        self._steps = 0
        self._last_line = float("-inf")
        self._eval_text = ""
        self._pace = _Pace()

    def note(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, markup=False, highlight=False)

    def ready(self, summary: RunSummary) -> None:
        """Print the facts as a table."""
        from rich.table import Table

        self._steps = summary.steps
        hybrid = f" + {summary.hybrid_r} hybrid" if summary.hybrid_r else ""
        share = summary.trainable_parameters / summary.all_parameters
        cut = f", {summary.truncated_rows} truncated to the maximum length" if summary.truncated_rows else ""
        done = f", {summary.first_step} done" if summary.first_step else ""
        rows = {
            "base model": f"{summary.model} ({summary.dtype} on {summary.device})",
            "targets": ", ".join(f"{count} {name}" for name, count in summary.targets.items()),
            "trainable parameters": f"{summary.trainable_parameters:,} ({share:.2%} of {summary.all_parameters:,})",
            "rank r": f"{summary.r}{hybrid}",
            "blocks per side k": str(summary.k),
            "scale": f"{summary.scale:g}",
            "rows": f"{summary.train_rows:,} to train on{cut}; {_held_out(summary)}",
            "steps": f"{summary.steps:,} of {_batch(summary)}{done}",
        }
        if summary.memory:
            parts = ", ".join(f"{size / 2**20:,.0f} MiB {name}" for name, size in summary.memory.items())
            rows["memory, estimated"] = f"{sum(summary.memory.values()) / 2**20:,.0f} MiB: {parts}"
        table = Table(show_header=False)
        for name, value in rows.items():
            table.add_row(name, value)
        self.console.print(table, highlight=False)

    def step(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Update the bar; where the output is not a terminal, print a line every few seconds."""
        text = f"loss {loss:.4f}{self._eval_text}  {tokens_per_second:,.0f} tokens/s"
        self._show("training", step, self._steps, text)

    def evaluated(self, step: int, loss: float) -> None:
        """Show the evaluation loss beside that of the steps, and print a line."""
        self._eval_text = f"  eval loss {loss:.4f}"
        self.note(f"step {step}: eval loss {loss:.4f}")

    def sample(self, step: int, prompt: str, answer: str) -> None:
        """Print the prompt and the answer."""
        self.note(f"step {step}: {' '.join(prompt.split())[:160]}")
        self.note(f"    -> {' '.join(answer.split())[:320]}")

    def scoring(self, what: str, done: int, rows: int) -> None:
        """Update the bar of the held-out rows."""
        self._show(f"scoring {what}", done, rows, "")

    def _show(self, name: str, done: int, total: int, text: str) -> None:
        left = self._pace.left(name, done, total)
        if not self.console.is_terminal:
            due = time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES
            if due or done == total or self._pace.just_began:
                self._last_line = time.monotonic()
                self.note(f"{name} {done}/{total}  {text}{left}".rstrip())
            return
        if self._pace.just_began:
            self.close()  # a training that stopped early leaves its bar
        if self._bar is None:
            from rich import progress

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeRemainingColumn(),
                progress.TextColumn("{task.fields[text]}"),
                console=self.console,
            )
            self._bar.start()
            self._task = self._bar.add_task(name, total=total, text=text)
        self._bar.update(self._task, completed=done, text=text)
        if done >= total:
            self.close()

    def close(self) -> None:
        """Stop updating the bar and leave it on the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class _Pace:
    """Estimates the time left from the mean pace so far."""

    def __init__(self) -> None:
        self.just_began = False
        self._name = ""
        self._first = (0, 0.0)

    def left(self, name: str, done: int, total: int) -> str:
        """Return the time left as text, empty before the second event of `name` and at the end."""
        now = time.monotonic()
        self.just_began = name != self._name
        if self.just_began:
            self._name, self._first = name, (done, now)
        first, began = self._first
        if done <= first or done >= total:
            return ""
        seconds = round((now - began) / (done - first) * (total - done))
        return f"  {datetime.timedelta(seconds=seconds)} left"


def _held_out(summary: RunSummary) -> str:
    parts = []
    if summary.validation_rows:
        parts.append(f"{summary.validation_rows:,} for the evaluation loss")
    if summary.eval_rows or not parts:
        parts.append(f"{summary.eval_rows:,} held out")
    return "; ".join(parts)


def _batch(summary: RunSummary) -> str:
    factors = [f"{summary.batch_size} at once"]
    if summary.grad_accumulation > 1:
        factors.append(f"{summary.grad_accumulation} accumulated")
    if summary.processes > 1:
        factors.append(f"{summary.processes} processes")
    rows = f"{summary.global_batch} rows"
    return rows if len(factors) == 1 else f"{rows} ({' x '.join(factors)})"


@contextmanager
def quiet_libraries(reporter: Reporter) -> Iterator[None]:
    """Suppress progress bars, logs and deprecations of the libraries; turn other warnings into notes, each once.

    With `GRALORA_VERBOSE` set in the environment, the libraries speak as they like.
    """
    if os.environ.get("GRALORA_VERBOSE"):
        yield
        return
    noted: set[str] = set()

    def note(message: Warning | str, *_: Any) -> None:
        if (text := str(message)) not in noted:
            noted.add(text)
            reporter.note(f"note: {text}")

    loggers = [logging.getLogger(name) for name in _NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    bars = _bars()
    enabled = [module.is_progress_bar_enabled() for module in bars]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.showwarning = note
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        for module in bars:
            module.disable_progress_bar()
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            for module, was_enabled in zip(bars, enabled, strict=True):
                if was_enabled:
                    module.enable_progress_bar()


def _bars() -> list[Any]:
    """Return the modules that turn progress bars on and off."""
    from transformers.utils import logging as transformers_logging

    modules: list[Any] = [transformers_logging]
    if importlib.util.find_spec("datasets"):
        from datasets.utils import logging as datasets_logging

        modules.append(datasets_logging)
    return modules
