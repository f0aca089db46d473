"""Starting several processes, with a package called `gralora` that is quicker to import than the real one."""

import os
import signal
import subprocess
import sys
import time

import pytest

from gralora.recipe import launch

STAND_IN = """
import os, signal, sys, time
from pathlib import Path

folder, what = Path(sys.argv[1]), sys.argv[2]
rank, count, threads = (os.environ[name] for name in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS"))
received = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, frame: received.append(number))
(folder / f"started-{rank}").write_text(f"{count} {threads} {sys.argv[1:]}")
if what == "fails":
    sys.exit(3 if rank == "1" else 0)
if what == "waits":
    while not received:
        time.sleep(0.02)
    time.sleep(0.3)  # so that a second signal would arrive
    (folder / f"received-{rank}").write_text(str(received))
    sys.exit(130)
"""


@pytest.fixture
def start(tmp_path):
    (tmp_path / "gralora").mkdir()
    (tmp_path / "gralora" / "__init__.py").touch()
    (tmp_path / "gralora" / "__main__.py").write_text(STAND_IN)
    source = os.path.dirname(os.path.dirname(os.path.dirname(launch.__file__)))
    script = (
        f"import sys; sys.path[:] = [p for p in sys.path if p != {str(tmp_path)!r}]; sys.path.insert(0, {source!r}); "
        "from gralora.recipe.launch import launch; sys.exit(launch(sys.argv[1:], 2))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"PYTHONPATH": str(tmp_path), "HF_HOME": str(tmp_path / "no configuration of accelerate")}
    started = []

    def make(*arguments):
        command = [sys.executable, "-c", script, str(tmp_path), *arguments]
        started.append(
            subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
            )
        )
        return started[-1]

    yield make
    for process in started:
        process.kill()
        process.communicate()


def assert_says_nothing(output, errors):
    """Nothing but what transformers says when it is imported."""
    assert output == b""
    assert [line for line in errors.splitlines() if b"kernels" not in line] == []


def until_started(folder):
    while not all((folder / f"started-{rank}").exists() for rank in (0, 1)):
        time.sleep(0.05)


def test_every_process_gets_the_command_line_and_the_status_is_that_of_the_one_that_failed(start, tmp_path):
    run = start("fails", "--lr", "0.1")
    said = run.communicate()
    assert run.returncode == 3
    assert_says_nothing(*said)
    threads = max(1, (os.cpu_count() or 1) // 2)
    for rank in (0, 1):
        arguments = [str(tmp_path), "fails", "--lr", "0.1"]
        assert (tmp_path / f"started-{rank}").read_text() == f"2 {threads} {arguments}"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_each_process_once(number, start, tmp_path):
    run = start("waits")
    until_started(tmp_path)
    run.send_signal(number)
    said = run.communicate()
    assert run.returncode == 128 + number
    assert_says_nothing(*said)
    for rank in (0, 1):
        assert (tmp_path / f"received-{rank}").read_text() == str([int(number)])


@pytest.fixture
def no_launcher(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def test_a_process_that_was_started_starts_no_others(no_launcher, monkeypatch):
    assert [launch.is_to_launch(processes) for processes in (None, 1, 2)] == [False, False, True]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert [launch.is_to_launch(processes) for processes in (None, 2)] == [False, False]
    with pytest.raises(ValueError, match="got processes=3, and there are 2"):
        launch.is_to_launch(3)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ValueError, match="got processes=2, and there are 1"):
        launch.is_to_launch(2)


def test_numbers_that_cannot_be_started_are_refused(no_launcher, monkeypatch):
    with pytest.raises(ValueError, match="`processes` must be a positive integer; got processes=0"):
        launch.is_to_launch(0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert launch.is_to_launch(2)
    with pytest.raises(ValueError, match="at most the number of GPUs, 2; got processes=3"):
        launch.is_to_launch(3)


@pytest.mark.parametrize("kind, flag", [("FSDP", False), ("DEEPSPEED", False), ("MULTI_CPU", True), ("NO", True)])
def test_the_configuration_of_accelerate_decides_the_way(kind, flag, tmp_path, monkeypatch):
    from accelerate.commands.config import config_args

    file = tmp_path / "default_config.yaml"
    file.write_text(f"compute_environment: LOCAL_MACHINE\ndistributed_type: {kind!r}\nnum_processes: 8\n")
    for name in ("default_config_file", "default_yaml_config_file"):
        monkeypatch.setattr(config_args, name, str(file))
    arguments = launch._accelerate_arguments(["train"], 2)
    assert ("--multi_gpu" in arguments) == flag
    assert "--mixed_precision" not in arguments
    assert arguments[-3:] == ["-m", "gralora", "train"]
