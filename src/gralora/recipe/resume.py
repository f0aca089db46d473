"""Resuming an interrupted run.

A run writes its state to `run.json` before the first step: its options, the number of threads, a hash of
the encoded rows, and the score of the base model. While it trains, the Trainer writes checkpoints. To
resume is to

1. read the state and take the options from it; the caller may repeat options, but not change them;
2. refuse rows that encode differently from those of the run;
3. continue from the newest complete checkpoint, or from step 0 where there is none.

On the CPU, with the same number of threads, the losses and the adapter are then the same, bit for bit, as
those of a run that was not interrupted. A finished run is loaded, not trained further.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gralora.checks import is_number, require_integer, require_text
from gralora.files.atomic import replacing_files
from gralora.recipe.options import PACKAGED_TASK, TrainingOptions
from gralora.recipe.run_folder import RunFolder, write_json

_RUN_FILE = "run.json"
# Options that may differ from those of the run. They are not stored as its options.
_FREE = {"output", "threads"}
_DEFAULTS = {field.name: field.default for field in fields(TrainingOptions)}


class BaseScore(NamedTuple):
    """The base model on the held-out rows, measured once per run."""

    exact_match: float
    first_answer: str


@dataclass(frozen=True)
class RunState:
    """What a run stores in `run.json`.

    Attributes:
        options: Values of the options by name, without `output` and `threads`.
        threads: Number of CPU threads, on which the exact bits depend.
        data_sha256: `EncodedRows.fingerprint` of the training rows.
        before: Score of the base model; None without held-out rows, or before it is measured.
    """

    options: dict[str, Any]
    threads: int
    data_sha256: str
    before: BaseScore | None = None

    @classmethod
    def start(cls, options: TrainingOptions, data_sha256: str) -> "RunState":
        """Return the state of a new run."""
        stored = {name: value for name, value in asdict(options).items() if name not in _FREE}
        return cls(stored, torch.get_num_threads(), data_sha256)

    @classmethod
    def read(cls, output: str) -> "RunState":
        """Return the state of the run in the folder `output`.

        Raises:
            ValueError: There is no run, or `run.json` is damaged.
        """
        if reason := resume_refusal(output):
            raise ValueError(reason)
        try:
            stored = json.loads((Path(output) / _RUN_FILE).read_text())
            before = BaseScore(**stored["before"]) if stored.get("before") else None
            state = cls(dict(stored["options"]), stored["threads"], stored["data_sha256"], before)
            require_integer("threads", state.threads)
            require_text("data_sha256", state.data_sha256)
            if before and not (is_number(before.exact_match) and isinstance(before.first_answer, str)):
                raise ValueError(f"got before={before!r}")
            state.options_for(output)
            return state
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"`output` must hold a readable run.json; {output!r} does not: {error!r}") from None

    def write(self, folder: RunFolder) -> None:
        """Write `run.json`."""
        stored: dict[str, Any] = {
            "options": self.options,
            "threads": self.threads,
            "data_sha256": self.data_sha256,
        }
        if self.before is not None:
            stored["before"] = self.before._asdict()
        with replacing_files(folder.path) as partial:
            write_json(partial / _RUN_FILE, stored)

    def options_refusal(self, given: dict[str, Any]) -> str | None:
        """Return why the run cannot be resumed with the options `given`, or None; only `threads` may differ."""
        for name, value in given.items():
            stored = self.options.get(name, _DEFAULTS.get(name))
            if name not in _FREE and value != stored:
                return (
                    f"`{name}` must be that of the run to resume; got {name}={value!r}, and the run has {stored!r}. "
                    "Leave it out, or start a new run in another folder."
                )
        return None

    def options_for(self, output: str, threads: int | None = None) -> TrainingOptions:
        """Return the options of the run, for the folder `output` and a number of CPU threads."""
        stored = {name: value for name, value in self.options.items() if name in _DEFAULTS and name not in _FREE}
        return TrainingOptions(**stored, output=output, threads=threads or self.threads)

    def data_refusal(self, data: str | None, data_sha256: str) -> str | None:
        """Return why the run cannot be resumed on rows from `data` with this fingerprint, or None."""
        if data_sha256 == self.data_sha256:
            return None
        return (
            f"`data` must hold the rows of the run to resume; {data or PACKAGED_TASK!r} has changed, or its tokenizer "
            "has. Restore it, or start a new run in another folder."
        )


class Checkpoint(NamedTuple):
    """A checkpoint of the Trainer."""

    step: int
    path: Path


def resume_refusal(output: str) -> str | None:
    """Return why there is no run to resume in the folder `output`, or None."""
    if (Path(output) / _RUN_FILE).is_file():
        return None
    return f"`resume_run` needs the folder of an earlier run; {output!r} has no {_RUN_FILE}."


def last_checkpoint(folder: RunFolder) -> Checkpoint | None:
    """Return the newest complete checkpoint, or None; an incomplete one is skipped."""
    found = []
    for path in folder.checkpoints.glob("checkpoint-*"):
        try:
            # The Trainer writes this file last.
            step = json.loads((path / "trainer_state.json").read_text())["global_step"]
        except (OSError, ValueError, KeyError):
            continue
        found.append(Checkpoint(step, path))
    return max(found, default=None)


def load_finished(trainer: Any, checkpoint: Checkpoint) -> None:
    """Load the adapter and the history of a run whose steps are all done; the Trainer itself would do one more."""
    from peft import load_peft_weights, set_peft_model_state_dict
    from transformers import TrainerState

    set_peft_model_state_dict(trainer.model, load_peft_weights(str(checkpoint.path), device="cpu"))
    trainer.state = TrainerState.load_from_json(str(checkpoint.path / "trainer_state.json"))
