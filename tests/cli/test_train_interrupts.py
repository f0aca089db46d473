"""Ctrl-C in a real process, at every phase of a run."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from runs import adapter_bytes
from tiny_language_model import write_rows

from gralora.recipe.resume import resume_refusal
from gralora.recipe.training import resume_run

pytest_plugins = ["run_fixtures"]
pytestmark = pytest.mark.usefixtures("one_thread")

# What the run prints when a phase begins.
PHASES = {"loading": "loading ", "scoring before": "scoring before 0/", "training": "training 1/"}
PHASES["scoring after"] = "scoring after 0/"


def start(base_model, rows_file, held_out, output):
    settings = ["--r", "4", "--steps", "8", "--batch-size", "4", "--dtype", "float32", "--threads", "1"]
    settings += ["--model", base_model, "--data", rows_file, "--eval", held_out, "--output", output]
    command = [sys.executable, "-m", "gralora", "train", *settings]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def wait_for_torch(process):
    """Return once the process has begun to load torch: it is importing then."""
    maps = Path(f"/proc/{process.pid}/maps")
    while "libtorch" not in maps.read_text():
        assert process.poll() is None


def wait_for_line(process, text):
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith(text):
            return
    raise AssertionError("".join(seen))


def test_a_signal_ends_every_phase_with_one_line_and_a_folder_that_resumes_or_is_gone(base_model, rows_file, tmp_path):
    held_out = write_rows(tmp_path / "held-out.jsonl", count=40, start=20)
    numbers = {"training": signal.SIGHUP, "loading": signal.SIGTERM}
    phases = ("imports", *PHASES, "none")

    def run(phase):
        process = start(base_model, rows_file, held_out, str(tmp_path / phase))
        if phase == "imports":
            wait_for_torch(process)
        elif phase != "none":
            wait_for_line(process, PHASES[phase])
        if phase != "none":
            process.send_signal(numbers.get(phase, signal.SIGINT))
        printed, _ = process.communicate()
        return process.returncode, printed

    with ThreadPoolExecutor(len(phases)) as pool:
        endings = dict(zip(phases, pool.map(run, phases), strict=True))
    assert endings["none"][0] == 0
    for phase in ("imports", *PHASES):
        status, printed = endings[phase]
        assert status == 130, (phase, printed)
        assert "Traceback" not in printed, (phase, printed)
        output = tmp_path / phase
        if resume_refusal(str(output)):
            assert not output.exists(), phase
        else:
            resume_run(str(output))
            assert adapter_bytes(output) == adapter_bytes(tmp_path / "none"), phase
    assert not (tmp_path / "imports").exists()
    assert not (tmp_path / "loading").exists()
    assert "stopped" in endings["imports"][1]
    assert "to continue: gralora train --resume" in endings["training"][1]
