"""The output folder of a training run.

    adapter_model.safetensors, adapter_config.json   the adapter
    README.md, metrics.json, loss.png                the model card, the numbers, the loss curve
    config.yaml                                      the options, for `gralora train --config`
    run.json                                         the state of the run, for resuming
    checkpoints/checkpoint-<step>/                   checkpoints of the Trainer
    logs/                                            what `--log-to tensorboard` writes

A file appears under its name only when it is complete: a run that is killed leaves the old file or the new one.
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gralora.files.atomic import discard_unfinished, replacing_files
from gralora.recipe.claim import Claim

RUN_FILE = "run.json"


class RunFolder:
    """The output folder of one run."""

    def __init__(self, path: str) -> None:
        self.path = Path(path).absolute()
        self.checkpoints = self.path / "checkpoints"
        self.logs = self.path / "logs"
        self._claim = Claim(self.path)

    def new_run_refusal(self) -> str | None:
        """Return why a new run cannot write here, or None. Hidden files of killed runs do not count."""
        if not self.path.exists() or (self.path.is_dir() and not self._visible()):
            return None
        return (
            f"`output` must be a new or an empty folder; got output={str(self.path)!r}. Name another one, or "
            "continue the run in it with `resume_run`."
        )

    def writing_refusal(self) -> str | None:
        """Return why the folder cannot be made or written, or None, without trying."""
        parent = next(folder for folder in (self.path, *self.path.parents) if folder.exists())
        if parent.is_dir() and os.access(parent, os.W_OK | os.X_OK):
            return None
        return f"`output` must be a folder that can be written; got output={str(self.path)!r}."

    def claim(self) -> str | None:
        """Make the folder, and claim it until `release` or `leave`.

        Returns:
            A note for the user where folders cannot be claimed, or None.

        Raises:
            ValueError: Another run has claimed the folder.
            RuntimeError: The folder cannot be written.
        """
        return self._claim.take()

    def release(self) -> None:
        """Give the claim back."""
        self._claim.release()

    def prepare(self) -> None:
        """Remove what killed runs left unfinished, and write to the claimed folder once as a test.

        Raises:
            RuntimeError: The folder cannot be written.
        """
        try:
            discard_unfinished(self.path)
            with replacing_files(self.path):
                pass
        except OSError as error:
            raise RuntimeError(
                f"`output` must be a folder that can be written; got output={str(self.path)!r}: {error}"
            ) from None

    def leave(self) -> None:
        """Give the claim back. What cannot be resumed is removed, as if the run had never begun."""
        if not (self.path / RUN_FILE).is_file():
            for folder in (self.checkpoints, self.logs):
                shutil.rmtree(folder, ignore_errors=True)
            discard_unfinished(self.path)
        self.release()

    def _visible(self) -> list[Path]:
        return [entry for entry in self.path.iterdir() if not entry.name.startswith(".")]


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_loss_curve(path: Path, losses: Sequence[float], eval_losses: Sequence[tuple[int, float]] = ()) -> None:
    """Write a plot of the training loss over the steps, and of the evaluation loss where there is one.

    The axis is logarithmic where the losses span more than a factor of ten.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(range(1, len(losses) + 1), losses, marker="." if len(losses) < 50 else None, label="training")
    if eval_losses:
        steps, values = zip(*eval_losses, strict=True)
        axes.plot(steps, values, marker="o", label="evaluation")
        axes.legend()
    everything = [*losses, *(value for _, value in eval_losses)]
    if min(everything) > 0 and max(everything) > 10 * min(everything):
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=120)
