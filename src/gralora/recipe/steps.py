"""The Trainer callback of a training run."""

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

from gralora.recipe.progress import Reporter


class StepCallback(TrainerCallback):
    """Report each step, stop at a signal, and refuse a loss that is not finite."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter
        self.stopping = False
        self.began = 0.0
        self.tokens = 0  # since the start of the process, as TRL counts them
        self.seconds = 0.0

    def tokens_per_second(self) -> float | None:
        """Return the mean over all steps, or None without any."""
        return self.tokens / self.seconds if self.seconds else None

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let SIGINT and SIGTERM end the run after the current step; a second signal ends it at once.

        Python allows signal handlers in the main thread only; in other threads this changes nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = True
        self.reporter.note("stopping after this step; press Ctrl-C again to stop at once, without saving the step")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start timing the step."""
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop, if a signal came."""
        if self.stopping:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        """Check the loss and report the step.

        Raises:
            RuntimeError: The loss or the gradient norm is not finite.
        """
        if "loss" not in logs:
            return
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise RuntimeError(
                    f"The training {name} is not finite at step {state.global_step}: {logs[name]}. Nothing was "
                    f"saved at this step. Start a new run in another folder with a lower `lr` (it is "
                    f'{args.learning_rate:g}), or with `dtype="float32"`.'
                )
        seconds = time.perf_counter() - self.began
        tokens = logs["num_tokens"] - self.tokens
        self.tokens, self.seconds = logs["num_tokens"], self.seconds + seconds
        self.reporter.step(state.global_step, logs["loss"], tokens / seconds)
