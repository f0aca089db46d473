import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from runs import SETTINGS, Recorder, adapter_bytes, contents, interrupt, stop_at_once
from tiny_language_model import write_rows

from gralora.recipe.options import TrainingOptions
from gralora.recipe.options_file import read_options_file
from gralora.recipe.processes import Processes
from gralora.recipe.resume import Checkpoint, RunState, find_best_again, last_checkpoint
from gralora.recipe.run_folder import RunFolder
from gralora.recipe.training import resume_run, train

pytest_plugins = ["run_fixtures"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("step", [1, 4, 5])
def test_an_interrupted_run_ends_as_an_unbroken_one_bit_for_bit(options, unbroken, tmp_path, step):
    handler = signal.getsignal(signal.SIGINT)
    partial = train(options(), Recorder(step, interrupt))
    assert partial.interrupted
    assert partial.steps == step + 1  # the step during which the signal came
    assert signal.getsignal(signal.SIGINT) is handler
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()

    whole = resume_run(str(tmp_path / "out"))
    assert whole.losses == unbroken[0].losses
    assert partial.losses == whole.losses[: partial.steps]
    assert adapter_bytes(tmp_path / "out") == unbroken[1]


@pytest.fixture(scope="module")
def died(base_model, rows_file, tmp_path_factory):
    """The folder of a run that died after its checkpoints of steps 4 and 6."""
    output = tmp_path_factory.mktemp("died") / "out"
    with pytest.raises(KeyboardInterrupt):
        train(
            TrainingOptions(**SETTINGS, model=base_model, data=rows_file, output=str(output)), Recorder(7, stop_at_once)
        )
    return output


def cut(name):
    def damage(checkpoint):
        file = checkpoint / name
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        cut("trainer_state.json"),
        cut("adapter_model.safetensors"),
        cut("optimizer.pt"),
        lambda checkpoint: (checkpoint / "adapter_model.safetensors").unlink(),
        lambda checkpoint: (checkpoint / "rng_state.pth").write_bytes(b""),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_passed_over(died, tmp_path, damage):
    output = shutil.copytree(died, tmp_path / "out")
    folder = RunFolder(str(output))
    newest, problems = last_checkpoint(folder)
    assert (newest.step, problems) == (6, [])
    damage(newest.path)
    older, problems = last_checkpoint(folder)
    assert older.step == 4
    assert len(problems) == 1
    assert problems[0].startswith("checkpoint-6: ")


def test_a_run_that_died_goes_on_from_its_last_whole_checkpoint(died, unbroken, tmp_path):
    output = shutil.copytree(died, tmp_path / "out")
    cut("optimizer.pt")(output / "checkpoints" / "checkpoint-6")
    recorder = Recorder()
    assert resume_run(str(output), reporter=recorder).losses == unbroken[0].losses
    assert "note: checkpoint-6: optimizer.pt is not whole; the checkpoint is not used" in recorder.notes
    assert "note: the run goes on from step 4" in recorder.notes
    assert adapter_bytes(output) == unbroken[1]


def test_a_run_that_died_before_its_first_checkpoint_starts_over(options, unbroken, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(options(), Recorder(1, stop_at_once))
    assert resume_run(str(tmp_path / "out")).losses == unbroken[0].losses


def test_resuming_a_finished_run_changes_nothing(options, unbroken):
    output = Path(unbroken[0].output)
    result = resume_run(str(output))
    assert result.losses == unbroken[0].losses
    assert adapter_bytes(output) == unbroken[1]


def test_resuming_takes_the_options_of_the_run_and_no_others(options, tmp_path):
    train(options(seed=3), Recorder(1, interrupt))
    output = str(tmp_path / "out")
    assert RunState.read(output).options_for(output, {"threads": 2}) == options(seed=3, threads=2)
    with pytest.raises(ValueError, match=r"`lr` must be that of the run to resume; got lr=0.5, and the run has 0.01"):
        resume_run(output, {"threads": 1, "r": 4, "lr": 0.5})
    with pytest.raises(ValueError, match=r"`seed` must be that of the run to resume"):
        resume_run(output, {"seed": 0})
    with pytest.raises(ValueError, match=r"has no run\.json"):
        resume_run(str(tmp_path / "elsewhere"))


def test_a_finished_run_takes_more_steps(options, unbroken, tmp_path):
    short = train(options(steps=4, scheduler="constant", warmup=0))
    more = resume_run(str(tmp_path / "out"), {"steps": 8})
    whole = train(options(output=str(tmp_path / "whole"), scheduler="constant", warmup=0))
    assert more.steps == 8
    assert more.losses[:4] == short.losses
    assert more.losses == whole.losses
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(tmp_path / "whole")
    assert RunState.read(str(tmp_path / "out")).options["steps"] == 8


def test_more_passes_replace_a_number_of_steps(options, tmp_path):
    train(options(steps=5))
    assert resume_run(str(tmp_path / "out"), {"epochs": 2.0}).steps == 10


def test_fewer_steps_than_are_done_are_refused(options, tmp_path):
    train(options(steps=4))
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match="`steps` must be at least the 4 that the run has done; got 2"):
        resume_run(str(tmp_path / "out"), {"steps": 2})
    assert contents(tmp_path / "out") == before


def test_the_same_rows_may_lie_elsewhere(options, unbroken, tmp_path):
    """As those from standard input or from a substituted process do."""
    data = tmp_path / "rows.jsonl"
    write_rows(data)
    train(options(data=str(data)), Recorder(3, interrupt))
    moved = data.rename(tmp_path / "moved.jsonl")
    with pytest.raises(FileNotFoundError):
        resume_run(str(tmp_path / "out"))
    assert resume_run(str(tmp_path / "out"), {"data": str(moved)}).losses == unbroken[0].losses


def test_a_run_is_resumed_from_another_folder(options, unbroken, tmp_path, monkeypatch):
    for name, source in (("model", Path(options().model)), ("rows.jsonl", Path(options().data[0]))):
        (tmp_path / name).symlink_to(source)
    monkeypatch.chdir(tmp_path)
    relative = {"model": "model", "data": "rows.jsonl", "output": "out"}
    train(options(**relative), Recorder(3, interrupt))
    monkeypatch.chdir("/")
    result = resume_run(str(tmp_path / "out"), {"model": str(tmp_path / "model")})
    assert result.losses == unbroken[0].losses
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "model")


def test_other_held_out_rows_are_refused_and_the_same_may_lie_elsewhere(options, tmp_path):
    held_out = tmp_path / "held-out.jsonl"
    write_rows(held_out, count=2, start=30)
    train(options(eval=str(held_out), steps=3), Recorder(1, interrupt))
    output = str(tmp_path / "out")
    moved = held_out.rename(tmp_path / "moved.jsonl")
    write_rows(held_out, count=2, start=40)
    with pytest.raises(ValueError, match="`eval` and `eval_data` must hold the rows of the run to resume"):
        resume_run(output)
    assert resume_run(output, {"eval": str(moved)}).after is not None


def test_the_number_of_threads_is_that_of_the_last_call(options, tmp_path):
    train(options(threads=1), Recorder(1, interrupt))
    assert not resume_run(str(tmp_path / "out"), {"threads": 2}).interrupted
    assert RunState.read(str(tmp_path / "out")).threads == 2


def test_resuming_on_other_rows_is_refused(options, tmp_path):
    data = tmp_path / "rows.jsonl"
    write_rows(data)
    train(options(data=str(data)), Recorder(1, interrupt))
    write_rows(data, start=1)
    with pytest.raises(ValueError, match="has changed"):
        resume_run(str(tmp_path / "out"))


def test_a_run_of_an_earlier_version_is_resumed(options, unbroken, tmp_path):
    """The file as version 0.1.0 writes it, without an option that is newer than the run."""
    train(options(), Recorder(1, interrupt))
    output = tmp_path / "out"
    stored = json.loads((output / "run.json").read_text())
    assert stored.keys() == {"options", "threads", "data_sha256", "processes", "kind", "held_out_sha256"}
    del stored["processes"], stored["kind"], stored["held_out_sha256"]
    del stored["options"]["gradient_checkpointing"]
    (output / "run.json").write_text(json.dumps(stored))
    assert resume_run(str(tmp_path / "out")).losses == unbroken[0].losses


def test_the_base_model_is_scored_once_in_a_run(options, tmp_path):
    held_out = write_rows(tmp_path / "held-out.jsonl", count=2)
    train(options(eval=held_out, steps=3), Recorder(1, interrupt))
    stored = json.loads((tmp_path / "out" / "run.json").read_text())
    assert stored["before"].keys() == {"exact_match", "first_answer"}
    recorder = Recorder()
    result = resume_run(str(tmp_path / "out"), reporter=recorder)
    assert {what for what, _, _ in recorder.scores} == {"after"}
    assert result.example["before"] == stored["before"]["first_answer"]


def test_a_state_is_read_back_as_it_was_written(options, tmp_path):
    state = RunState.start(options(), "a hash", Processes())
    state.write(RunFolder(str(tmp_path)))
    assert RunState.read(str(tmp_path)) == state
    assert "processes" not in read_options_file(str(tmp_path / "config.yaml"))
    replace(state, processes=2).write(RunFolder(str(tmp_path)))
    assert read_options_file(str(tmp_path / "config.yaml"))["processes"] == 2


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"options": 1, "threads": 1, "data_sha256": ""}',
        '{"options": {}, "threads": "x", "data_sha256": "a"}',
        '{"options": {"r": "x"}, "threads": 1, "data_sha256": "a"}',
        '{"options": {}, "threads": 1, "data_sha256": 1}',
        '{"options": {}, "threads": 1, "data_sha256": "a", "before": {"exact_match": "x", "first_answer": ""}}',
    ],
)
def test_a_damaged_state_is_said(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"`output` must hold a readable run\.json"):
        RunState.read(str(tmp_path))


def test_a_refused_resume_writes_nothing(options, tmp_path):
    train(options(), Recorder(1, interrupt))
    output = tmp_path / "out"
    (output / ".partial-killed").mkdir()
    before = contents(output)
    with pytest.raises(ValueError, match="must be that of the run"):
        resume_run(str(output), {"lr": 0.5})
    assert contents(output) == before
    assert (output / ".partial-killed").is_dir()
    with pytest.raises(ValueError, match="`resume_run` needs the folder of an earlier run"):
        resume_run(str(tmp_path / "elsewhere"))
    assert not (tmp_path / "elsewhere").exists()


def test_the_best_checkpoint_of_a_copied_run_is_its_own(tmp_path):
    for run in ("first", "copy"):
        for step in (2, 4):
            folder = tmp_path / run / f"checkpoint-{step}"
            folder.mkdir(parents=True)
            best = {"best_model_checkpoint": str(tmp_path / "first" / "checkpoint-2")}
            (folder / "trainer_state.json").write_text(json.dumps(best))
    newest = tmp_path / "copy" / "checkpoint-4"
    find_best_again(Checkpoint(4, newest))
    stored = json.loads((newest / "trainer_state.json").read_text())
    assert stored == {"best_model_checkpoint": str(tmp_path / "copy" / "checkpoint-2")}
