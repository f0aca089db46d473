"""The output folder of a training run.

    adapter_model.safetensors, adapter_config.json   the adapter
    README.md, metrics.json, loss.png                the model card, the numbers, the loss curve
    run.json                                         the state of the run, for resuming
    checkpoints/checkpoint-<step>/                   checkpoints of the Trainer

A file appears under its name only when it is complete: a run that is killed leaves the old file or the new one.
"""

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gralora.files.atomic import discard_unfinished, replacing_files


class RunFolder:
    """The output folder of one run."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"

    def new_run_refusal(self) -> str | None:
        """Return why a new run cannot write here, or None."""
        if not self.path.is_file() and not (self.path.is_dir() and any(self.path.iterdir())):
            return None
        return (
            f"`output` must be a new or an empty folder; got output={str(self.path)!r}. Name another one, or "
            "continue the run in it with `resume_run`."
        )

    def prepare(self) -> None:
        """Make the folder, remove what killed runs left unfinished, and write to it once as a test.

        Raises:
            RuntimeError: The folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            discard_unfinished(self.path)
            with replacing_files(self.path):
                pass
        except OSError as error:
            raise RuntimeError(
                f"`output` must be a folder that can be written; got output={str(self.path)!r}: {error}"
            ) from None


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_loss_curve(path: Path, losses: list[float]) -> None:
    """Write a plot of the loss over the steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(range(1, len(losses) + 1), losses, marker="." if len(losses) < 50 else None)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


@contextmanager
def explaining_full_disk(folder: Path) -> Iterator[None]:
    """Turn the errors by which torch, safetensors and Python report a full disk into one clear error.

    Raises:
        RuntimeError: The disk is full.
    """
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        # safetensors keeps the system's text; torch only says that it failed to write.
        messages = (
            "No space left on device",
            "os error 28",
            "Disk quota exceeded",
            "PytorchStreamWriter failed writing",
        )
        if full or any(text in str(error) for text in messages):
            raise RuntimeError(
                f"The disk is full: {str(folder)!r} could not be written. The files that were complete are kept. Free "
                "some space, then continue with `resume_run`."
            ) from error
        raise
