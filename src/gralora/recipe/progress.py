"""What a run tells its user while it goes, and keeping the libraries below it quiet."""

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
_SECONDS_BETWEEN_LINES = 5  # where the output is no terminal


@dataclass(frozen=True)
class RunSummary:
    """What is about to be trained.

    Attributes:
        model: Name of the base model.
        dtype: Of its weights.
        device: Where it is.
        targets: Name of each adapted kind of layer, to how many there are.
        trainable_parameters: Of the adapter.
        all_parameters: Of the model, the adapter included.
        r, hybrid_r, k, scale: Of the adapter.
        train_rows, truncated_rows, eval_rows: Rows of the data.
        steps: Of the whole run.
        first_step: Steps that are done already, for a resumed run.
        batch_size: Rows of a step.
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
    """Hears what a run does; this one says nothing. Inherit and override."""

    def note(self, text: str) -> None:
        """Something the user should know."""

    def ready(self, summary: RunSummary) -> None:
        """Everything is loaded; nothing was trained yet."""

    def step(self, step: int, loss: float, tokens_per_second: float) -> None:
        """One step is done, and `step` of them in all."""

    def scoring(self, what: str, done: int, rows: int) -> None:
        """`done` of the held-out rows are answered, `what` ("before" or "after" training)."""


class ConsoleReporter(Reporter):
    """A table, a bar and lines on the terminal, through rich."""

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
        """Print the table."""
        from rich.table import Table

        self._steps = summary.steps
        hybrid = f" + {summary.hybrid_r} hybrid" if summary.hybrid_r else ""
        share = summary.trainable_parameters / summary.all_parameters
        cut = f", {summary.truncated_rows} cut to the maximal length" if summary.truncated_rows else ""
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
        """Move the bar; where the output is no terminal, print a line every few seconds."""
        text = f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s"
        self._show("training", step, self._steps, text)

    def scoring(self, what: str, done: int, rows: int) -> None:
        """Move the bar of the held-out rows."""
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
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


@contextmanager
def quiet_libraries(reporter: Reporter) -> Iterator[None]:
    """Keep the bars, logs and deprecations of the libraries below off the screen; warnings become notes."""
    loggers = [logging.getLogger(name) for name in _NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    bars = _bars()
    enabled = [is_enabled() for is_enabled, _, _ in bars]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.showwarning = lambda message, *_: reporter.note(f"note: {message}")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        for _, _, disable in bars:
            disable()
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            for (_, enable, _), was_enabled in zip(bars, enabled, strict=True):
                if was_enabled:
                    enable()


def _bars() -> list[Any]:
    from transformers.utils import logging as transformers_logging

    bars = [
        (
            transformers_logging.is_progress_bar_enabled,
            transformers_logging.enable_progress_bar,
            transformers_logging.disable_progress_bar,
        )
    ]
    if "datasets" in sys.modules:
        from datasets.utils import logging as datasets_logging

        bars.append(
            (
                datasets_logging.is_progress_bar_enabled,
                datasets_logging.enable_progress_bar,
                datasets_logging.disable_progress_bar,
            )
        )
    return bars
