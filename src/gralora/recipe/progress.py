"""Reporting the progress of a run, and silencing the libraries that it uses."""

import logging
import sys
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
        steps: Number of steps of the whole run.
        first_step: Number of steps that were done before a resume.
        batch_size: Rows per step.
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
    steps: int
    first_step: int
    batch_size: int


class Reporter:
    """Receives the progress events of a run. This base class ignores them; subclasses override methods."""

    def note(self, text: str) -> None:
        """Receive a message for the user."""

    def ready(self, summary: RunSummary) -> None:
        """Receive the facts of the run, after loading and before training."""

    def step(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Receive the results of step number `step`."""

    def scoring(self, what: str, done: int, rows: int) -> None:
        """Receive the number of held-out rows answered so far, `what` ("before" or "after") training."""


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
            "rows": f"{summary.train_rows:,} to train on{cut}; {summary.eval_rows:,} held out",
            "steps": f"{summary.steps:,} of {summary.batch_size} rows{done}",
        }
        table = Table(show_header=False)
        for name, value in rows.items():
            table.add_row(name, value)
        self.console.print(table, highlight=False)

    def step(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Update the bar; where the output is not a terminal, print a line every few seconds."""
        text = f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s"
        self._show("training", step, self._steps, text)

    def scoring(self, what: str, done: int, rows: int) -> None:
        """Update the bar of the held-out rows."""
        self._show(f"scoring {what}", done, rows, "")

    def _show(self, name: str, done: int, total: int, text: str) -> None:
        if not self.console.is_terminal:
            due = time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES
            if due or done == total:
                self._last_line = time.monotonic()
                self.note(f"{name} {done}/{total}  {text}".rstrip())
            return
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


@contextmanager
def quiet_libraries(reporter: Reporter) -> Iterator[None]:
    """Suppress progress bars, logs and deprecations of the libraries; turn other warnings into notes, each once."""
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
    if "datasets" in sys.modules:
        from datasets.utils import logging as datasets_logging

        modules.append(datasets_logging)
    return modules
