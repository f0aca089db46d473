"""The folder that a run writes: the adapter and its papers, the checkpoints, and what resuming needs.

    adapter_model.safetensors, adapter_config.json   the adapter
    README.md, metrics.json, loss.png                the model card, the numbers, the loss curve
    run.json                                         the options, and what is known since the start
    checkpoints/checkpoint-<step>/                   of the Trainer

A file appears under its name when it is whole: a run that is killed leaves the old one or the new one.
"""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_PARTIAL = ".partial-"
_ADAPTER_CONFIG = "adapter_config.json"


class RunFolder:
    """The output folder of one run."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"

    @property
    def has_run(self) -> bool:
        """There is a run to resume."""
        return (self.path / "run.json").is_file()

    def claim(self, resume: bool) -> None:
        """Check that a run may write here, and make the folder.

        Raises:
            ValueError: There is something in it, or nothing to resume.
            RuntimeError: It can't be written.
        """
        if resume:
            if not self.has_run:
                raise ValueError(f"`resume` needs the folder of an earlier run; {str(self.path)!r} has no run.json.")
        elif self.path.is_file() or (self.path.is_dir() and any(self.path.iterdir())):
            raise ValueError(
                f"`output` must be a new or an empty folder; got {str(self.path)!r}. Name another one, or add "
                "--resume to go on with the run in it."
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for leftover in self.path.glob(f"{_PARTIAL}*"):
                shutil.rmtree(leftover, ignore_errors=True)
            with self.replacing():
                pass
        except OSError as error:
            raise RuntimeError(
                f"`output` must be a folder that can be written; got {str(self.path)!r}: {error}"
            ) from None

    def read_run(self) -> dict[str, Any]:
        """Return what `write_run` wrote.

        Raises:
            ValueError: `run.json` is damaged.
        """
        try:
            return json.loads((self.path / "run.json").read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"`run.json` in {str(self.path)!r} can't be read: {error}") from None

    def write_run(self, run: dict[str, Any]) -> None:
        """Write `run.json`."""
        with self.replacing() as folder:
            write_json(folder / "run.json", run)

    def last_checkpoint(self) -> tuple[Path, int] | None:
        """Return the newest whole checkpoint and its step, or None. One that was cut short is passed over."""
        found = []
        for folder in self.checkpoints.glob("checkpoint-*"):
            try:
                # The Trainer writes this file last.
                step = json.loads((folder / "trainer_state.json").read_text())["global_step"]
            except (OSError, ValueError, KeyError):
                continue
            found.append((step, folder))
        return max(found)[::-1] if found else None

    @contextmanager
    def replacing(self) -> Iterator[Path]:
        """Give a hidden folder to write files to; at the end they move into this one, at an error they vanish."""
        # Inside, since the parent may be another file system.
        partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=self.path))
        try:
            yield partial
            # The config last: without it there is no adapter here yet.
            for file in sorted(partial.iterdir(), key=lambda file: file.name == _ADAPTER_CONFIG):
                os.replace(file, self.path / file.name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_loss_curve(path: Path, losses: list[float]) -> None:
    """Write the picture of the loss over the steps."""
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
    """Turn the ways in which torch, safetensors and Python say that the disk is full into one clear error."""
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        # safetensors keeps the system's text, torch only says that it failed to write.
        told = ("No space left on device", "os error 28", "Disk quota exceeded", "PytorchStreamWriter failed writing")
        if full or any(text in str(error) for text in told):
            raise RuntimeError(
                f"The disk is full: {str(folder)!r} could not be written. What was whole there before still is. Free "
                "some space and go on with --resume."
            ) from error
        raise
