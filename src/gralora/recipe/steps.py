"""The Trainer callbacks of a training run."""

import math
import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from gralora.recipe.processes import Processes
from gralora.recipe.progress import Reporter
from gralora.recipe.signals import Signals


class StepCallback(TrainerCallback):
    """Report each step and each evaluation, stop at a signal, and refuse a loss that is not finite."""

    def __init__(self, reporter: Reporter, signals: Signals, processes: Processes | None = None) -> None:
        self.reporter = reporter
        self.signals = signals
        self.processes = processes or Processes()
        self.began = 0.0
        self.tokens = 0  # since the start of the process, as TRL counts them
        self.seconds = 0.0

    def tokens_per_second(self) -> float | None:
        """Return the mean over all steps, or None without any."""
        return self.tokens / self.seconds if self.seconds else None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start timing the step."""
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop, if a signal came to any process."""
        if self.processes.any(self.signals.stopping):
            self.signals.stopping = True
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        """Check the loss and report the step, or the loss of an evaluation.

        Raises:
            RuntimeError: The loss is not finite, or the gradient norm of a step that is not passed over.
        """
        if "eval_loss" in logs:
            if not math.isfinite(logs["eval_loss"]):
                self.processes.stop(
                    f"The evaluation loss is not finite at step {state.global_step}: {logs['eval_loss']}. Start a new "
                    "run in another folder with a lower `lr`, or look at the validation rows."
                )
            self.reporter.evaluated(state.global_step, logs["eval_loss"])
        if "loss" not in logs:
            return
        # Autocast to float16 scales the loss, and passes over a step whose scaled gradients overflow.
        scaled = getattr(kwargs.get("optimizer"), "scaler", None) is not None
        for name in ("loss",) if scaled else ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                self.processes.stop(
                    f"The training {name} is not finite at step {state.global_step}: {logs[name]}. Nothing was "
                    f"saved at this step. Start a new run in another folder with a lower `lr` (it is "
                    f'{args.learning_rate:g}), or with `dtype="float32"`.'
                )
        seconds = time.perf_counter() - self.began
        tokens = logs["num_tokens"] - self.tokens
        self.tokens, self.seconds = logs["num_tokens"], self.seconds + seconds
        self.reporter.step(state.global_step, logs["loss"], tokens / seconds)


class BeginCallback(TrainerCallback):
    """Act once the Trainer has spread the model over the processes and has loaded the checkpoint."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Act."""
        self.act()


class SampleCallback(TrainerCallback):
    """Show an answer of the model every few steps."""

    def __init__(self, every: int, answer: Callable[[], tuple[str, str]], reporter: Reporter) -> None:
        self.every = every
        self.answer = answer
        self.reporter = reporter

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Answer the prompt, if it is time."""
        if state.global_step % self.every == 0:
            self.reporter.sample(state.global_step, *self.answer())
