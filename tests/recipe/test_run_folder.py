import pytest

from gralora.recipe.run_folder import RunFolder


def test_asking_whether_a_run_may_write_here_makes_no_folder(tmp_path):
    folder = RunFolder(str(tmp_path / "new"))
    assert folder.new_run_refusal() is None
    assert not folder.path.exists()
    folder.claim()
    folder.prepare()
    assert folder.new_run_refusal() is None
    (folder.path / "mine").touch()
    assert "continue the run in it with `resume_run`" in folder.new_run_refusal()


def test_preparing_removes_what_a_killed_run_left(tmp_path):
    (tmp_path / ".partial-killed").mkdir()
    RunFolder(str(tmp_path)).prepare()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RuntimeError, match="`output` must be a folder that can be written"):
        RunFolder(str(tmp_path / "file" / "out")).prepare()
