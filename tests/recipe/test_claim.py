"""Claims of real processes; the claim's file is loaded by itself, so that they start at once."""

import errno
import fcntl
import os
import signal
import subprocess
import sys

import pytest

from gralora.recipe import claim
from gralora.recipe.claim import CLAIM_FILE, Claim

SCRIPT = f"""
import runpy, sys
from pathlib import Path

Claim = runpy.run_path({claim.__file__!r})["Claim"]
print("ready", flush=True)
sys.stdin.readline()
claim = Claim(Path(sys.argv[1]))
try:
    claim.take()
except ValueError as error:
    print("refused:", error, flush=True)
    sys.exit()
print("taken", flush=True)
sys.stdin.readline()
claim.release()
print("released", flush=True)
"""


class Run:
    """A process that claims `folder` when it is told to."""

    def __init__(self, folder):
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.hears() == "ready"

    def go_on(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def hears(self):
        return self.process.stdout.readline().strip()


@pytest.fixture
def start():
    runs = []

    def make(folder):
        runs.append(Run(folder))
        return runs[-1]

    yield make
    for run in runs:
        run.process.kill()
        run.process.communicate()


@pytest.mark.parametrize("state", ["absent", "empty", "holds a run", "holds what a killed run left"])
def test_of_four_runs_that_start_together_one_goes_on(state, start, tmp_path):
    folder = tmp_path / "deep" / "out"
    if state != "absent":
        folder.mkdir(parents=True)
    if state == "holds a run":
        (folder / "run.json").write_text("{}")
    if state == "holds what a killed run left":
        (folder / CLAIM_FILE).write_text("{}")
    runs = [start(folder) for _ in range(4)]
    for run in runs:
        run.go_on()
    said = [run.hears() for run in runs]
    [winner] = [run for run, text in zip(runs, said, strict=True) if text == "taken"]
    refusals = [text for text in said if text != "taken"]
    assert len(refusals) == 3
    for text in refusals:
        assert text.startswith("refused: `output` must not be in use by another run; got output=")
    again = start(folder)
    again.go_on()
    assert f"into which process {winner.process.pid} on {os.uname().nodename} is training" in again.hears()
    winner.go_on()
    assert winner.hears() == "released"
    assert not (folder / CLAIM_FILE).exists()
    assert folder.exists() == (state != "absent")


def test_a_killed_run_frees_its_claim(start, tmp_path):
    first, second = start(tmp_path), start(tmp_path)
    first.go_on()
    assert first.hears() == "taken"
    first.process.send_signal(signal.SIGKILL)
    first.process.wait()
    assert (tmp_path / CLAIM_FILE).exists()
    second.go_on()
    assert second.hears() == "taken"


def test_a_claim_is_held_within_a_process_too_and_taken_again_after_it_was_given_back(tmp_path):
    first, second = Claim(tmp_path), Claim(tmp_path)
    assert first.take() is None
    with pytest.raises(ValueError, match="into which process"):
        second.take()
    first.release()
    assert second.take() is None
    second.release()
    assert list(tmp_path.iterdir()) == []


def test_release_keeps_what_was_written_and_removes_new_empty_folders(tmp_path):
    kept, empty = Claim(tmp_path / "a" / "b"), Claim(tmp_path / "c" / "d")
    kept.take()
    empty.take()
    (tmp_path / "a" / "b" / "file").touch()
    kept.release()
    empty.release()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "file"]


def test_a_file_that_another_run_removed_meanwhile_is_not_taken_for_the_claim(tmp_path, monkeypatch):
    lock, locked = fcntl.flock, []

    def flock(file, how):
        lock(file, how)
        if not locked:  # as a run does that ends between our opening and our locking
            (tmp_path / CLAIM_FILE).unlink()
        locked.append(file)

    monkeypatch.setattr(fcntl, "flock", flock)
    held = Claim(tmp_path)
    held.take()
    assert len(locked) == 2
    with pytest.raises(ValueError, match="in use"):
        Claim(tmp_path).take()
    held.release()


def test_where_files_cannot_be_locked_the_user_is_told(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    held = Claim(tmp_path / "out")
    assert "cannot lock files" in held.take()
    assert list((tmp_path / "out").iterdir()) == []
    held.release()
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RuntimeError, match=r"`output` must be a folder that can be written; got output='.*file/out'"):
        Claim(tmp_path / "file" / "out").take()
