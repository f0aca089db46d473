import os
import subprocess
import sys

import pytest

from gralora.recipe import run_folder
from gralora.recipe.run_folder import RunFolder


def test_files_move_into_place_config_last_and_not_at_all_after_an_error(tmp_path, monkeypatch):
    moved = []
    move = os.replace
    monkeypatch.setattr(run_folder.os, "replace", lambda a, b: (moved.append(b.name), move(a, b)))
    folder = RunFolder(str(tmp_path))
    with folder.replacing() as partial:
        for name in ("adapter_config.json", "adapter_model.safetensors", "z"):
            (partial / name).write_text(name)
    assert moved[-1] == "adapter_config.json"
    with pytest.raises(ZeroDivisionError), folder.replacing() as partial:
        (partial / "z").write_text("new")
        _ = 1 / 0
    assert (tmp_path / "z").read_text() == "z"


SAVES = """
import os, signal, sys
from pathlib import Path
import torch
from torch import nn
import gralora
from gralora.recipe.run_folder import RunFolder

torch.set_num_threads(1)
folder = Path(sys.argv[1])
config = gralora.GraloraConfig(r=4, target_modules=["0"], init_weights=False)
model = gralora.get_peft_model(nn.Sequential(nn.Linear(8, 8)), config)

def save(value, die_at=0):
    # In a process of its own, which kills itself at the given moment of its file system work.
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    calls = 0
    def watch(event, args):
        nonlocal calls
        if event in ("open", "os.rename", "os.mkdir", "os.rmdir") and str(folder) in str(args[0]):
            calls += 1
            if calls == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    sys.addaudithook(watch)
    with RunFolder(str(folder)).replacing() as partial:
        model.save_pretrained(partial)
    os._exit(calls)

from safetensors.torch import load_file
moments = os.waitstatus_to_exitcode(save(1.0))
assert moments > 10
for moment in sorted({1 + i * (moments - 1) // 9 for i in range(10)}):
    assert save(1.0) >> 8 == moments
    assert os.waitstatus_to_exitcode(save(2.0, moment)) == -signal.SIGKILL
    tensors = load_file(folder / "adapter_model.safetensors")
    values = {float(value) for tensor in tensors.values() for value in tensor.unique()}
    assert values in ({1.0}, {2.0}), (moment, values)
    assert gralora.GraloraConfig.from_pretrained(folder).r == 4
    assert (folder / "README.md").read_text().startswith("---")
    visible = sorted(entry for entry in os.listdir(folder) if not entry.startswith("."))
    assert visible == ["README.md", "adapter_config.json", "adapter_model.safetensors"], visible
print("held at", moments, "moments")
"""


def test_killed_while_the_adapter_is_saved_there_is_the_old_or_the_new(tmp_path):
    """SIGKILL at ten moments of the file system work."""
    done = subprocess.run([sys.executable, "-c", SAVES, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "held at" in done.stdout


def test_asking_whether_a_run_may_write_here_makes_no_folder(tmp_path):
    folder = RunFolder(str(tmp_path / "new"))
    assert folder.new_run_refusal() is None
    assert not folder.path.exists()
    folder.prepare()
    assert folder.new_run_refusal() is None
    (folder.path / "mine").touch()
    assert "pass `resume=True` to continue the run in it" in folder.new_run_refusal()


def test_preparing_removes_what_a_killed_run_left(tmp_path):
    (tmp_path / ".partial-killed").mkdir()
    RunFolder(str(tmp_path)).prepare()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RuntimeError, match="`output` must be a folder that can be written"):
        RunFolder(str(tmp_path / "file" / "out")).prepare()
