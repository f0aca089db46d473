import os
import subprocess
import sys

import pytest

from gralora.files.atomic import (
    appearing,
    appearing_once,
    check_output,
    clean_up_killed_runs,
    discard_unfinished,
    replacing_files,
)


@pytest.fixture
def dead():
    """A process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process


def test_what_a_killed_run_left_is_cleaned_up(dead, tmp_path):
    out = tmp_path / "out"
    hidden = tmp_path / f".out.{dead.pid}.x.partial"
    (hidden / "out.old").mkdir(parents=True)
    (hidden / "out.old/config.json").write_text("old")
    (hidden / "out").mkdir()
    clean_up_killed_runs(out)
    assert (out / "config.json").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_what_another_output_left_is_not_touched(dead, tmp_path):
    hidden = tmp_path / f".out.{dead.pid}.{os.getppid()}.x.partial"
    hidden.mkdir()
    clean_up_killed_runs(tmp_path / "out")
    assert hidden.is_dir()


def test_what_a_running_process_writes_is_left_alone(tmp_path):
    hidden = tmp_path / f".out.{os.getppid()}.x.partial"
    hidden.mkdir()
    clean_up_killed_runs(tmp_path / "out")
    assert hidden.is_dir()


def test_an_error_removes_the_folders_that_were_made_for_the_output(tmp_path):
    with pytest.raises(RuntimeError, match="failed"), appearing(tmp_path / "deep/er/out") as hidden:
        hidden.mkdir()
        raise RuntimeError("failed")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("kind", "other"), [("folder", "file"), ("file", "folder")])
def test_a_file_is_replaced_by_a_file_and_a_folder_by_a_folder(kind, other, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=f"`output` must be a {kind} to be overwritten; '.*{other}' is not"):
        check_output(tmp_path / other, overwrite=True, kind=kind)
    assert check_output(tmp_path / kind, overwrite=True, kind=kind) == tmp_path / kind


def test_a_mark_may_ask_for_several_files(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").write_text("{}")
    marks = (("config.json", "*.safetensors"),)
    with pytest.raises(ValueError, match=r"`output` must hold config.json and \*.safetensors to be overwritten"):
        check_output(tmp_path / "out", overwrite=True, marks=marks)
    (tmp_path / "out/model.safetensors").write_text("")
    assert check_output(tmp_path / "out", overwrite=True, marks=marks) == tmp_path / "out"


def test_an_output_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"`output` must be in a writable folder; got .*, and '.*/file' is not one"):
        check_output(tmp_path / "file/deep/out", overwrite=False)


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_permissions_follow_the_umask(umask, tmp_path):
    def write(folder):
        (folder / "config.json").touch(mode=0o600)
        (folder / "sub").mkdir(mode=0o700)
        (folder / "sub/more.json").touch(mode=0o600)

    with appearing(tmp_path / "appearing") as hidden:
        hidden.mkdir(mode=0o700)
        write(hidden)
    with appearing_once(tmp_path / "appearing_once") as hidden:
        write(hidden)
    (tmp_path / "replacing_files").mkdir()
    with replacing_files(tmp_path / "replacing_files") as hidden:
        write(hidden)
    for written in tmp_path.rglob("*"):
        assert written.stat().st_mode & 0o777 == (0o777 if written.is_dir() else 0o666) & ~umask, written


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_link_is_never_replaced(overwrite, tmp_path):
    (tmp_path / "out").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="`output` must"):
        check_output(tmp_path / "out", overwrite)


def test_a_cached_folder_appears_when_it_is_complete(tmp_path):
    folder = tmp_path / "cache/model"
    with appearing_once(folder) as hidden:
        (hidden / "config.json").write_text("new")
        assert not folder.exists()
    assert (folder / "config.json").read_text() == "new"
    assert folder.stat().st_mode & 0o777 == 0o755
    assert os.listdir(folder.parent) == ["model"]


def test_the_faster_process_wins(tmp_path):
    folder = tmp_path / "model"
    with appearing_once(folder) as hidden:
        (hidden / "config.json").write_text("slow")
        folder.mkdir()
        (folder / "config.json").write_text("fast")
    assert (folder / "config.json").read_text() == "fast"
    assert os.listdir(tmp_path) == ["model"]


def test_an_error_caches_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="failed"), appearing_once(tmp_path / "model") as hidden:
        (hidden / "config.json").write_text("half")
        raise RuntimeError("failed")
    assert os.listdir(tmp_path) == []


def test_a_cached_folder_that_cannot_be_moved_is_an_error(tmp_path):
    (tmp_path / "model").write_text("a file")
    with pytest.raises(OSError, match="model"), appearing_once(tmp_path / "model"):
        pass
    assert os.listdir(tmp_path) == ["model"]


def test_files_are_replaced_and_the_named_one_last(tmp_path, monkeypatch):
    (tmp_path / "adapter_config.json").write_text("old")
    (tmp_path / "README.md").write_text("kept")
    moved, replace = [], os.replace
    monkeypatch.setattr("gralora.files.atomic.os.replace", lambda old, new: (moved.append(new.name), replace(old, new)))
    with replacing_files(tmp_path) as hidden:
        (hidden / "adapter_config.json").write_text("new")
        (hidden / "zebra.txt").write_text("new")
        assert (tmp_path / "adapter_config.json").read_text() == "old"
    assert moved == ["zebra.txt", "adapter_config.json"]
    assert (tmp_path / "adapter_config.json").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["README.md", "adapter_config.json", "zebra.txt"]


def test_an_error_replaces_no_file(tmp_path):
    (tmp_path / "run.json").write_text("old")
    with pytest.raises(RuntimeError, match="failed"), replacing_files(tmp_path) as hidden:
        (hidden / "run.json").write_text("new")
        raise RuntimeError("failed")
    assert (tmp_path / "run.json").read_text() == "old"
    assert os.listdir(tmp_path) == ["run.json"]


def test_what_a_killed_replacement_left_is_discarded(tmp_path):
    (tmp_path / ".partial-x").mkdir()
    (tmp_path / ".partial-x/run.json").write_text("half")
    (tmp_path / "run.json").write_text("old")
    discard_unfinished(tmp_path)
    assert os.listdir(tmp_path) == ["run.json"]


SAVES = """
import os, signal, sys
from pathlib import Path
import torch
from torch import nn
import gralora
from gralora.files.atomic import replacing_files

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
    with replacing_files(folder) as partial:
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
