import errno
import json
import os

import pytest
import torch
from peft import PeftModel
from runs import Recorder, adapter_bytes, interrupt
from tiny_language_model import write_rows
from transformers import AutoModelForCausalLM

from gralora.recipe import run
from gralora.recipe.options import TrainingOptions
from gralora.recipe.training import resume_run, train

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

pytest_plugins = ["run_fixtures"]
pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_run_writes_an_adapter_that_peft_loads_and_its_papers(options, base_model, tmp_path):
    held_out = write_rows(tmp_path / "held-out.jsonl", count=3, start=20)
    recorder = Recorder()
    result = train(options(eval=held_out, steps=3), recorder)
    output = tmp_path / "out"

    assert (result.steps, result.total_steps, len(result.losses), result.interrupted) == (3, 3, 3, False)
    assert (result.before, result.after) == (0.0, 0.0)
    assert result.example["reference"] == "20 20"
    assert recorder.scores == [("before", 0, 3), ("before", 3, 3), ("after", 0, 3), ("after", 3, 3)]
    assert recorder.summary.targets == dict.fromkeys(LAYERS, 2)
    assert (recorder.summary.r, recorder.summary.k, recorder.summary.scale) == (4, 2, 2)
    assert recorder.summary.trainable_parameters == 2 * 4 * (4 * (16 + 16) + 3 * (16 + 24))

    base = AutoModelForCausalLM.from_pretrained(base_model)
    ids = torch.tensor([[5, 6, 7]])
    expected = base(ids).logits
    tuned = PeftModel.from_pretrained(base, output)
    assert not torch.equal(tuned(ids).logits, expected)
    assert tuned.peft_config["default"].base_model_name_or_path == base_model
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["losses"] == list(result.losses)
    assert metrics["exact_match_before"] == 0.0
    assert metrics["finished"] is True
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "exact match on held-out rows, after | 0.0%" in (output / "README.md").read_text()
    assert not list(output.glob(".partial-*"))


def test_the_base_keeps_its_dtype_and_the_adapter_is_float32(options, monkeypatch):
    seen = {}

    def look(self, path, tensors):
        seen.update({name: p.dtype for name, p in self.model.named_parameters()})

    monkeypatch.setattr(run.Run, "_save_adapter", look)
    train(options(dtype="bfloat16", steps=1))
    assert {dtype for name, dtype in seen.items() if "gralora" in name} == {torch.float32}
    assert {dtype for name, dtype in seen.items() if "gralora" not in name} == {torch.bfloat16}


def test_scoring_before_training_changes_nothing_in_it(options, unbroken, tmp_path):
    held_out = write_rows(tmp_path / "held-out.jsonl", count=2)
    assert train(options(eval=held_out)).losses == unbroken[0].losses
    assert adapter_bytes(tmp_path / "out") == unbroken[1]


@pytest.mark.parametrize("content", ["a folder with a file", "a file"])
def test_an_output_with_something_in_it_is_refused_before_anything_is_loaded(tmp_path, content):
    output = tmp_path / "out"
    if content == "a file":
        output.write_text("mine")
    else:
        output.mkdir()
        (output / "mine").write_text("mine")
    with pytest.raises(ValueError, match="must be a new or an empty folder"):
        train(TrainingOptions(output=str(output), model="./nowhere", data="nowhere.jsonl"))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        ValueError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
    ],
)
def test_a_full_disk_is_said_and_what_was_there_stays(options, tmp_path, monkeypatch, error):
    train(options(), Recorder(1, interrupt))
    output = tmp_path / "out"
    before = {file.name: file.read_bytes() for file in output.iterdir() if file.is_file()}

    def fail(*_):
        raise error

    monkeypatch.setattr(run, "write_loss_curve", fail)
    with pytest.raises(RuntimeError, match="The disk is full"):
        resume_run(str(output))
    assert before == {file.name: file.read_bytes() for file in output.iterdir() if file.is_file()}
    assert sorted(path.name for path in output.iterdir()) == sorted([*before, "checkpoints"])


def test_steps_follow_from_epochs(options):
    recorder = Recorder()
    assert train(options(steps=None, epochs=0.5), recorder).steps == 3
    assert recorder.summary.steps == 3


def test_a_missing_library_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr("gralora.optional.importlib.util.find_spec", lambda name: None if name == "trl" else True)
    with pytest.raises(ImportError, match=r'trl must be installed for this. Run: pip install "gralora\[train\]"'):
        train(TrainingOptions())
