"""Verbs that write to a disk of a few hundred kilobytes, a file system of its own."""

import json
import os
import subprocess
import sys

import pytest

from gralora import to_lora

pytest_plugins = ["run_fixtures"]

# Runs as root of a user namespace, where it may mount.
SCRIPT = """
import contextlib, io, json, subprocess, sys
from pathlib import Path
from gralora import cli

disk, model, rows, adapter, lora = map(Path, sys.argv[1:])
results = {}


def run(name, size, *arguments):
    action = "remount," if disk.is_mount() else ""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"{action}size={size}", "tmpfs", disk], check=True)
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
        try:
            cli.main([str(argument) for argument in arguments])
            status = 0
        except SystemExit as exit:
            status = exit.code or 0
    results[name] = status, printed.getvalue(), sorted(path.name for path in disk.iterdir())


train = ["train", "--model", model, "--data", rows, "--r", 4, "--steps", 4, "--threads", 1, "--dtype", "float32"]
run("train at the start", "4k", *train, "--output", disk / "early")
run("train at a checkpoint", "200k", *train, "--output", disk / "out")
run("resume", "20m", "train", "--resume", "--output", disk / "out")
run("the same without trouble", "20m", *train, "--output", disk / "other")
out, other = ((disk / name / "adapter_model.safetensors").read_bytes() for name in ("out", "other"))
results["same bits"] = out == other
subprocess.run(["umount", disk], check=True)
run("merge", "64k", "merge", model, adapter, disk / "merged")
run("export", "8k", "export", adapter, disk / "lora", "--format", "lora")
run("import", "8k", "import", lora, disk / "imported")
print("RESULTS" + json.dumps(results))
"""


@pytest.fixture(scope="module")
def results(base_model, rows_file, adapter, tmp_path_factory):
    alone = ["unshare", "--map-root-user", "--mount"]
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("this system lets no user mount a file system of his own")
    folder = tmp_path_factory.mktemp("disk")
    lora = folder / "lora"
    to_lora(adapter, lora)
    disk = folder / "small"
    disk.mkdir()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    arguments = [disk, base_model, rows_file, adapter, lora]
    command = [*alone, sys.executable, "-c", SCRIPT, *map(str, arguments)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
    return json.loads(run.stdout.partition("RESULTS")[2])


@pytest.mark.parametrize("name", ["train at the start", "train at a checkpoint", "merge", "export", "import"])
def test_a_full_disk_is_one_line(results, name):
    status, printed, left = results[name]
    assert status == 2
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert "The disk is full" in line
    assert "Traceback" not in printed
    assert left == (["out"] if name == "train at a checkpoint" else [])


def test_a_run_goes_on_when_there_is_space_again(results):
    assert results["resume"][0] == 0
    assert results["same bits"]
