"""`gralora train` as several processes of its own: signals, kills, restarts, and runs that compete for a folder."""

import json
import os
import signal
import subprocess
import sys
import time

import command_line
import psutil
import pytest

from gralora.recipe.options import TrainingOptions
from gralora.recipe.processes import Processes
from gralora.recipe.resume import RunState
from gralora.recipe.training import resume_run, train

pytest_plugins = ["run_fixtures"]
pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 12
SETTINGS = {"r": 4, "lr": 1e-2, "steps": STEPS, "save_steps": 2, "dtype": "float32", "threads": 1}


def flags(**settings):
    return [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture
def start():
    started = []

    def make(*command):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": os.devnull}
        started.append(
            subprocess.Popen(
                [sys.executable, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
        return started[-1]

    yield make
    for run in started:
        if run.poll() is None:
            for process in psutil.Process(run.pid).children(recursive=True):
                process.kill()
            run.kill()
        run.communicate()


@pytest.fixture(scope="module")
def alone(base_model, rows_file, tmp_path_factory):
    """The losses of one process with batches of four."""
    output = str(tmp_path_factory.mktemp("alone") / "out")
    options = TrainingOptions(**SETTINGS, batch_size=4, model=base_model, data=rows_file, output=output)
    return train(options).losses


def until(condition, run):
    """Ask again and again, since a process of its own tells nothing by itself."""
    while not condition():
        assert run.poll() is None, run.communicate()
        time.sleep(0.01)


def has_checkpoint(output):
    return any((output / "checkpoints").glob("checkpoint-*/trainer_state.json"))


def test_ctrl_c_at_the_launcher_saves_and_one_process_goes_on(start, alone, base_model, rows_file, tmp_path):
    output = tmp_path / "out"
    settings = SETTINGS | {"batch_size": 2, "model": base_model, "data": rows_file, "output": output, "processes": 2}
    run = start("-m", "gralora", "train", *flags(**settings))
    until(lambda: has_checkpoint(output), run)
    run.send_signal(signal.SIGINT)
    said, errors = run.communicate()
    assert run.returncode == 130, errors
    assert said.count("loading ") == said.count("2 at once x 2 processes") == 1
    assert said.count("interrupted after step ") == said.count("to continue: gralora train --resume") == 1
    assert "Traceback" not in errors
    result = resume_run(str(output))
    assert result.steps == STEPS
    assert result.losses == pytest.approx(alone, abs=1e-5)


def test_torchrun_restarts_a_run_of_which_a_process_was_killed(start, alone, base_model, rows_file, tmp_path):
    output = tmp_path / "out"
    settings = SETTINGS | {"batch_size": 1, "grad_accumulation": 2, "model": base_model, "data": rows_file}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    adapter = ["--rank" if flag == "--r" else flag for flag in flags(**settings, output=output)]
    run = start(*torchrun, "-m", "gralora", "train", *adapter)
    until(lambda: has_checkpoint(output), run)
    [victim] = [p for p in psutil.Process(run.pid).children() if p.environ().get("RANK") == "1"]
    victim.kill()
    said, errors = run.communicate()
    assert run.returncode == 0, errors
    assert said.count(f"{STEPS} steps") == 1
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["finished"]
    assert metrics["losses"] == pytest.approx(alone, abs=1e-5)


COMPETITORS = """
import os, sys, time
from pathlib import Path

import trl
from gralora.recipe import arguments, steps, trainer
from gralora.recipe.options import TrainingOptions
from gralora.recipe.progress import Reporter
from gralora.recipe.training import resume_run, train

folder, base, rows = Path(sys.argv[1]), *sys.argv[2:4]
output = str(folder / "out")
children = []
for me in range(4):
    if not (child := os.fork()):
        break
    children.append(child)
else:
    sys.exit(max(os.waitpid(child, 0)[1] for child in children))


def wait_for(pattern, count):
    # Again and again: the processes know each other by files alone.
    while len(list(folder.glob(pattern))) < count:
        time.sleep(0.001)


class UntilOthersAreRefused(Reporter):
    def ready(self, summary):
        wait_for(f"refused-{self.round}-*", 3)


def compete(round, action):
    (folder / f"ready-{round}-{me}").touch()
    wait_for(f"ready-{round}-*", 4)
    reporter = UntilOthersAreRefused()
    reporter.round = round
    try:
        action(reporter)
        (folder / f"won-{round}-{me}").touch()
    except ValueError as error:
        (folder / f"refused-{round}-{me}").write_text(str(error))


options = TrainingOptions(model=base, data=(rows,), output=output, r=4, steps=2, threads=1)
compete("new", lambda reporter: train(options, reporter))
compete("resumed", lambda reporter: resume_run(output, reporter=reporter))
"""


def test_of_four_runs_into_one_folder_three_are_refused(start, base_model, rows_file, tmp_path):
    runs = start("-c", COMPETITORS, str(tmp_path), base_model, rows_file)
    _, errors = runs.communicate()
    assert runs.returncode == 0, errors
    for beginning in ("new", "resumed"):
        assert len(list(tmp_path.glob(f"won-{beginning}-*"))) == 1
        refusals = [path.read_text() for path in tmp_path.glob(f"refused-{beginning}-*")]
        assert len(refusals) == 3
        for text in refusals:
            assert text.startswith("`output` must not be in use by another run; got output=")
    assert not list((tmp_path / "out").glob(".*"))


class Count(Processes):
    """Processes by their number and kind alone."""

    def __init__(self, count, kind):
        self.count, self.kind, self.launch = count, kind, None


def state_of(count, kind, **options):
    settings = {"batch_size": 2, "grad_accumulation": 3}
    return RunState(settings | options, 1, "a hash", processes=count, kind=kind)


@pytest.mark.parametrize(
    "before, now, accumulation",
    [
        ((2, "DDP"), (2, "DDP"), 3),
        ((2, "DDP"), (1, "one process"), 6),
        ((1, "one process"), (3, "DDP"), 1),
        ((4, "FSDP2"), (3, "FSDP2"), 4),
        ((2, "DeepSpeed"), (2, "DeepSpeed"), 3),
    ],
)
def test_other_processes_go_on_with_as_many_rows_in_a_step(before, now, accumulation):
    assert state_of(*before).accumulation(Count(*now)) == accumulation


@pytest.mark.parametrize(
    "before, now, reason",
    [
        ((2, "DDP"), (4, "DDP"), r"the 12 rows in a step.*got processes=4, and 8 rows at once do not divide 12"),
        ((2, "FSDP2"), (2, "DDP"), "got DDP on 2, and the run trained with FSDP2 on 2"),
        ((2, "FSDP2"), (1, "one process"), "got one process on 1, and the run trained with FSDP2 on 2"),
        ((2, "DeepSpeed"), (3, "DeepSpeed"), "got DeepSpeed on 3, and the run trained with DeepSpeed on 2"),
    ],
)
def test_processes_that_cannot_go_on_are_refused_with_the_numbers(before, now, reason):
    with pytest.raises(ValueError, match=reason):
        state_of(*before).accumulation(Count(*now))


@pytest.mark.parametrize("arguments", [("--nope",), ("--lr", "-1"), ("--config", "nowhere.yaml")])
@pytest.mark.parametrize("rank, speaks", [("0", True), ("1", False)])
def test_a_mistake_is_said_by_one_process(arguments, rank, speaks, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", rank)
    # The others leave the main process time to speak first.
    monkeypatch.setattr("gralora.recipe.processes.time.sleep", lambda seconds: None)
    assert command_line.run("train", *arguments) == 2
    assert bool(capsys.readouterr().err) == speaks
