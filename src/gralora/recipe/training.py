"""Fine-tuning a causal language model with a GraLoRA adapter, on TRL's SFTTrainer.

result = train(TrainingOptions(model="folder", data="rows.jsonl", output="my-adapter"))
"""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from gralora.files.disk import explaining_full_disk
from gralora.optional import require
from gralora.recipe import hub
from gralora.recipe.options import TrainingOptions
from gralora.recipe.processes import Processes, is_main_process
from gralora.recipe.progress import Reporter, RunSummary, quiet_libraries
from gralora.recipe.result import TrainingResult
from gralora.recipe.resume import RunState, resume_refusal, stored_options
from gralora.recipe.run import Run
from gralora.recipe.run_folder import RunFolder
from gralora.recipe.signals import Signals

# The options of a run, and its state where it was begun before.
_Beginning = tuple[TrainingOptions, RunState | None]


def train(options: TrainingOptions, reporter: Reporter | None = None) -> TrainingResult:
    """Train an adapter and write its folder; `resume_run` continues an interrupted run.

    While it trains, SIGINT, SIGTERM and SIGHUP end the run after the current step and save everything; a second
    signal ends it at once. Before the first step they end it at once, and nothing is left that cannot be resumed.

    Args:
        options: What to train, on which rows, and how.
        reporter: Receives progress events; silent by default.

    Raises:
        ValueError: A bad option, or bad rows.
        FileNotFoundError: A file or the model does not exist.
        ImportError: A library is missing; the message has the command that installs it.
        RuntimeError: The loss is not finite, `output` cannot be written, or the disk is full.
        KeyboardInterrupt: A signal ended the run at once.
    """

    def begin(folder: RunFolder, processes: Processes) -> _Beginning:
        # torchrun starts the same command again after a failure: it goes on with what it began.
        if processes.restarted and resume_refusal(options.output) is None:
            state = RunState.read(options.output)
            if state.launch == processes.launch:
                return state.options_for(options.output, stored_options(options)), state
        if reason := folder.new_run_refusal():
            raise ValueError(reason)
        _require_libraries(options)
        return options, None

    return _carry_out(options.output, begin, reporter)


def resume_run(output: str, given: dict[str, Any] | None = None, reporter: Reporter | None = None) -> TrainingResult:
    """Continue the interrupted run in the folder `output`, with its options.

    Args:
        output: Folder of the run.
        given: Options by name. They must be those of the run, but for `steps` and `epochs`, which may ask for more,
            and for `threads`, `data` (its rows must be the same), `log_to`, `sample_every` and `push_to_hub`.
        reporter: Receives progress events; silent by default.

    Raises:
        ValueError: There is no run, an option differs from the run's, or the rows have changed.
        FileNotFoundError: A file or the model does not exist.
        ImportError: A library is missing; the message has the command that installs it.
        RuntimeError: The loss is not finite, `output` cannot be written, or the disk is full.
        KeyboardInterrupt: A signal ended the run at once.
    """

    def begin(folder: RunFolder, processes: Processes) -> _Beginning:
        state = RunState.read(output)
        options = state.options_for(output, given)
        _require_libraries(options)
        return options, state

    return _carry_out(output, begin, reporter, resumes=True)


def dry_run(options: TrainingOptions, reporter: Reporter | None = None) -> RunSummary:
    """Check everything that `train` checks, estimate the memory, and write nothing.

    The model is loaded, and one batch goes through it.

    Returns:
        The facts of the run, with the estimate.

    Raises:
        ValueError: As in `train`; `FileNotFoundError`, `ImportError` and `RuntimeError` likewise.
    """
    from gralora.recipe.memory import estimate_memory

    _require_libraries(options)
    reporter = _reporter_here(reporter)
    planned = RunFolder(options.output)
    if reason := planned.new_run_refusal() or planned.writing_refusal():
        raise ValueError(reason)
    with tempfile.TemporaryDirectory() as folder, quiet_libraries(reporter):
        processes = Processes()
        run = Run(options, RunFolder(folder), None, reporter, Signals(reporter.note), processes)
        run.load()
        # One process cannot run the model alone where it has a part of it.
        summary = replace(run.summary(), memory=None if processes.share_model else estimate_memory(run.trainer))
        reporter.ready(summary)
    return summary


def _require_libraries(options: TrainingOptions) -> None:
    from gralora.recipe.arguments import require_trackers, trainer_refusal
    from gralora.recipe.start import read_start

    require("trl", "datasets", "matplotlib", extra="train")
    require_trackers(options)
    if options.start_from:
        read_start(options.start_from)
    if reason := trainer_refusal(options):
        raise ValueError(reason)
    if options.push_to_hub:
        hub.check_access(options.push_to_hub)


def _reporter_here(reporter: Reporter | None) -> Reporter:
    """Return `reporter` in the main process, and a silent one in the others."""
    return reporter if reporter and is_main_process() else Reporter()


def _carry_out(
    output: str,
    begin: Callable[[RunFolder, Processes], _Beginning],
    reporter: Reporter | None,
    resumes: bool = False,
) -> TrainingResult:
    """Claim the folder, begin in the main process, and carry out the run in all."""
    reporter = _reporter_here(reporter)
    signals, folder = Signals(reporter.note), RunFolder(output)
    with signals.caught(), quiet_libraries(reporter):
        processes = Processes()
        claimed = False

        def claim_and_begin() -> tuple[TrainingOptions, RunState | None, str]:
            nonlocal claimed
            # What is no folder, or no run, is not to be claimed.
            reason = resume_refusal(output) if resumes else folder.path.is_file() and folder.new_run_refusal()
            if reason:
                raise ValueError(reason)
            if note := folder.claim():
                reporter.note(note)
            try:
                begun = begin(folder, processes)
                folder.prepare()
            except BaseException:
                folder.release()
                raise
            claimed = True
            return *begun, str(folder.path)

        try:
            options, state, path = processes.from_main(claim_and_begin)
            if options.threads:
                torch.set_num_threads(options.threads)
            way_out = "Free some space, then continue with `resume_run`, or start again."
            with explaining_full_disk(folder.path, way_out):
                run = Run(options, RunFolder(path), state, reporter, signals, processes)
                run.load()
                return run.carry_out()
        finally:
            if claimed:
                folder.leave()
