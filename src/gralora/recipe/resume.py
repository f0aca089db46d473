"""Resuming an interrupted run.

A run writes its state to `run.json` before the first step: its options, the number of threads, a hash of
the encoded rows, and the score of the base model. While it trains, the Trainer writes checkpoints. To
resume is to

1. read the state and take the options from it; the caller may repeat options, and change those in `_FREE`;
2. refuse rows that encode differently from those of the run;
3. continue from the newest checkpoint whose files are whole, or from step 0 where there is none.

On the CPU, with the same number of threads and steps, the losses and the adapter are then the same, bit for
bit, as those of a run that was not interrupted. A finished run is loaded, and trained further only if more
steps are asked for.
"""

import json
import os
import zipfile
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gralora.checks import is_number, require_integer, require_text
from gralora.files.atomic import replacing_files
from gralora.pretrained import stored_name
from gralora.recipe.options import PACKAGED_TASK, TrainingOptions
from gralora.recipe.options_file import overlay, to_yaml
from gralora.recipe.processes import Processes
from gralora.recipe.run_folder import RUN_FILE, RunFolder, write_json

# Options that may differ from those of the run. Hashes of the rows stand for their sources.
_FREE = {"output", "threads", "steps", "epochs", "data", "eval", "eval_data", "log_to", "sample_every", "push_to_hub"}
_NAMES = {field.name for field in fields(TrainingOptions)}


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
        stopped_early: Whether the run ended since its evaluation loss fell no more.
        processes: Number of processes when the run began, by which the rows of a step follow from the options.
        kind: `Processes.kind`, on which the form of the checkpoints depends.
        launch: `Processes.launch`, by which a restart of torchrun knows the run as its own.
        held_out_sha256: Hash of the held-out rows; None in runs that an earlier version began.
    """

    options: dict[str, Any]
    threads: int
    data_sha256: str
    before: BaseScore | None = None
    stopped_early: bool = False
    processes: int = 1
    kind: str = "one process"
    launch: str | None = None
    held_out_sha256: str | None = None

    @classmethod
    def start(
        cls, options: TrainingOptions, data_sha256: str, processes: Processes, held_out_sha256: str | None = None
    ) -> "RunState":
        """Return the state of a new run."""
        return cls(
            stored_options(options),
            torch.get_num_threads(),
            data_sha256,
            processes=processes.count,
            kind=processes.kind,
            launch=processes.launch,
            held_out_sha256=held_out_sha256,
        )

    @classmethod
    def read(cls, output: str) -> "RunState":
        """Return the state of the run in the folder `output`.

        Raises:
            ValueError: There is no run, or `run.json` is damaged.
        """
        if reason := resume_refusal(output):
            raise ValueError(reason)
        try:
            stored = json.loads((Path(output) / RUN_FILE).read_text())
            before = BaseScore(**stored["before"]) if stored.get("before") else None
            options = {name: value for name, value in dict(stored["options"]).items() if name in _NAMES}
            early = bool(stored.get("stopped_early"))
            count, kind, launch = stored.get("processes", 1), stored.get("kind", "one process"), stored.get("launch")
            held_out = stored.get("held_out_sha256")
            state = cls(options, stored["threads"], stored["data_sha256"], before, early, count, kind, launch, held_out)
            require_integer("threads", state.threads)
            require_integer("processes", state.processes)
            require_text("kind", state.kind)
            require_text("data_sha256", state.data_sha256)
            if before and not (is_number(before.exact_match) and isinstance(before.first_answer, str)):
                raise ValueError(f"got before={before!r}")
            state.options_for(output)
            return state
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"`output` must hold a readable run.json; {output!r} does not: {error!r}") from None

    def write(self, folder: RunFolder) -> None:
        """Write `run.json` and `config.yaml`."""
        stored: dict[str, Any] = {
            "options": self.options,
            "threads": self.threads,
            "data_sha256": self.data_sha256,
            "processes": self.processes,
            "kind": self.kind,
        }
        if self.launch is not None:
            stored["launch"] = self.launch
        if self.held_out_sha256 is not None:
            stored["held_out_sha256"] = self.held_out_sha256
        if self.before is not None:
            stored["before"] = self.before._asdict()
        if self.stopped_early:
            stored["stopped_early"] = True
        with replacing_files(folder.path, last=RUN_FILE) as partial:
            write_json(partial / RUN_FILE, stored)
            several = {"processes": self.processes} if self.processes > 1 else {}
            (partial / "config.yaml").write_text(to_yaml(self.options | several), encoding="utf-8")

    def options_for(self, output: str, given: dict[str, Any] | None = None) -> TrainingOptions:
        """Return the options of the run for the folder `output`, with those of `given` that may change.

        Raises:
            ValueError: `given` has another value for an option that must stay.
        """
        run = TrainingOptions(**self.options, output=output, threads=self.threads)
        if not given:
            return run
        wanted = located(TrainingOptions(**overlay({**self.options, "threads": self.threads}, given), output=output))
        for name in given:
            if name not in _FREE and getattr(wanted, name) != getattr(run, name):
                raise ValueError(
                    f"`{name}` must be that of the run to resume; got {name}={given[name]!r}, and the run has "
                    f"{getattr(run, name)!r}. Leave it out, or start a new run in another folder."
                )
        return wanted

    def accumulation(self, processes: Processes) -> int:
        """Return the batches that each process accumulates, so that a step has as many rows as when the run began.

        Raises:
            ValueError: These processes cannot continue the run.
        """
        defaults = TrainingOptions.__dataclass_fields__
        size, times = (self.options.get(n, defaults[n].default) for n in ("batch_size", "grad_accumulation"))
        if reason := self._kind_refusal(processes):
            raise ValueError(reason)
        rows, at_once = size * times * self.processes, size * processes.count
        if rows % at_once:
            raise ValueError(
                f"`processes` must keep the {rows} rows in a step of the run to resume, which trained on "
                f"{self.processes} with a batch size of {size}; got processes={processes.count}, and {at_once} rows at "
                f"once do not divide {rows}. Resume it on {self.processes}."
            )
        return rows // at_once

    def _kind_refusal(self, processes: Processes) -> str | None:
        """Return why checkpoints of the run cannot be read by these processes, or None."""
        whole = ("one process", "DDP")
        same = processes.kind == self.kind or (processes.kind in whole and self.kind in whole)
        if same and (processes.kind != "DeepSpeed" or processes.count == self.processes):
            return None
        return (
            f"`resume_run` must use the processes of the run, which shape its checkpoints; got {processes.kind} on "
            f"{processes.count}, and the run trained with {self.kind} on {self.processes}. Start it in the same way."
        )

    def data_refusal(self, data: tuple[str, ...], data_sha256: str, held_out_sha256: str | None = None) -> str | None:
        """Return why the run cannot be resumed on rows with these fingerprints, or None."""
        if data_sha256 == self.data_sha256:
            if self.held_out_sha256 in (None, held_out_sha256):
                return None
            return (
                "`eval` and `eval_data` must hold the rows of the run to resume; they have changed, and scores before "
                "and after would not compare. Restore them, or start a new run in another folder."
            )
        return (
            f"`data` must hold the rows of the run to resume; {', '.join(data) or PACKAGED_TASK!r} has changed, or its "
            "tokenizer has. Restore it, or start a new run in another folder."
        )


def located(options: TrainingOptions) -> TrainingOptions:
    """Return `options` with absolute paths, which hold in any working directory, for files and folders here."""
    several = {name: tuple(map(_located, getattr(options, name))) for name in ("data", "eval", "eval_data")}
    start_from = options.start_from and _located(options.start_from)
    return replace(options, model=stored_name(options.model), start_from=start_from, **several)


def _located(source: str) -> str:
    path, colon, split = source.partition(":")
    if os.path.exists(source):
        return os.path.abspath(source)
    return f"{os.path.abspath(path)}{colon}{split}" if colon and os.path.exists(path) else source


def stored_options(options: TrainingOptions) -> dict[str, Any]:
    """Return the options that a run stores: all but `output` and `threads`, with absolute paths."""
    values = {name: value for name, value in asdict(located(options)).items() if name not in ("output", "threads")}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


class Checkpoint(NamedTuple):
    """A checkpoint of the Trainer."""

    step: int
    path: Path


def resume_refusal(output: str) -> str | None:
    """Return why there is no run to resume in the folder `output`, or None."""
    if (Path(output) / RUN_FILE).is_file():
        return None
    return f"`resume_run` needs the folder of an earlier run; {output!r} has no {RUN_FILE}."


def last_checkpoint(folder: RunFolder) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest checkpoint whose files are whole, or None, and why newer ones are not used."""
    found, problems = [], []
    for path in folder.checkpoints.glob("checkpoint-*"):
        if reason := _damage(path):
            problems.append(f"{path.name}: {reason}")
        else:
            found.append(Checkpoint(json.loads((path / "trainer_state.json").read_text())["global_step"], path))
    newest = max(found, default=None)
    newer = [p for p in problems if newest is None or _step_of(p) > newest.step]
    return newest, sorted(newer, key=_step_of)


def _step_of(name: str) -> int:
    digits = name.partition(":")[0].rpartition("-")[2]
    return int(digits) if digits.isdigit() else -1


def _damage(checkpoint: Path) -> str | None:
    """Return which file of a checkpoint is missing or not whole, or None."""
    from safetensors import SafetensorError, safe_open

    try:
        # The Trainer writes this file last.
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        if not isinstance(state["global_step"], int):
            return "trainer_state.json names no step"
    except (OSError, ValueError, KeyError, TypeError):
        return "trainer_state.json is missing or not whole"
    weights = ("adapter_model.safetensors", "global_step*", "pytorch_model_fsdp*")
    if not any(any(checkpoint.glob(pattern)) for pattern in weights):
        return "the adapter is missing"
    for file in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt"):
                    pass
            elif file.suffix in (".pt", ".pth", ".bin"):
                with zipfile.ZipFile(file) as archive:
                    if archive.testzip() is not None:
                        return f"{file.name} is damaged"
            elif not file.stat().st_size:
                return f"{file.name} is empty"
        except (OSError, SafetensorError, zipfile.BadZipFile):
            return f"{file.name} is not whole"
    return None


def find_best_again(checkpoint: Checkpoint) -> None:
    """Correct the path of the best checkpoint in the Trainer's state, if the folder of the run was moved or copied."""
    file = checkpoint.path / "trainer_state.json"
    state = json.loads(file.read_text())
    best = state.get("best_model_checkpoint")
    moved = checkpoint.path.parent / Path(best).name if best else None
    if moved and moved != Path(best) and moved.is_dir():
        with replacing_files(checkpoint.path, last=file.name) as partial:
            write_json(partial / file.name, state | {"best_model_checkpoint": str(moved)})


class _LoadedError(Exception):
    """The Trainer has loaded what it shall not train further."""


def load_finished(trainer: Any, checkpoint: Checkpoint) -> None:
    """Load the adapter and the history of a run whose steps are all done, as the Trainer would before one more step.

    Every process must call this.
    """
    from transformers import TrainerState

    from gralora.recipe.steps import BeginCallback

    state = TrainerState.load_from_json(str(checkpoint.path / "trainer_state.json"))
    best = state.best_model_checkpoint
    weights = Path(best) if best and trainer.args.load_best_model_at_end else checkpoint.path

    def stop() -> None:
        raise _LoadedError

    # The last callback, after those that act at the beginning too.
    trainer.add_callback(BeginCallback(stop))
    with suppress(_LoadedError):
        trainer.train(resume_from_checkpoint=str(weights))
    trainer.is_in_train = False
    trainer.state = state
