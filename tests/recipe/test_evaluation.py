import json

import pytest
import torch
from runs import Recorder, adapter_bytes, interrupt
from tiny_language_model import write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from gralora import PeftModel
from gralora.recipe.data import encode, read_rows
from gralora.recipe.resume import RunState
from gralora.recipe.training import resume_run, train

pytest_plugins = ["run_fixtures"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def validation(tmp_path):
    return write_rows(tmp_path / "validation.jsonl", count=4, start=30)


def loss_of(adapter, base_model, rows_file):
    """The mean loss of batches of four rows, by transformers alone."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_model), adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    encoded = encode(read_rows(rows_file), tokenizer, 1024, rows_file)
    width = max(map(len, encoded.input_ids))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in encoded.input_ids])
    labels = torch.tensor([row + [-100] * (width - len(row)) for row in encoded.labels])
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels).loss.item()


def test_the_loss_on_other_rows_is_measured_while_training(options, base_model, validation, tmp_path):
    recorder = Recorder()
    result = train(options(eval_data=validation, eval_steps=3), recorder)
    assert [step for step, _ in result.eval_losses] == [3, 6, 8]
    assert recorder.summary.validation_rows == 4
    assert recorder.evaluations == list(result.eval_losses)
    assert result.eval_losses[-1][1] == pytest.approx(loss_of(tmp_path / "out", base_model, validation), rel=1e-5)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["eval_losses"] == [list(pair) for pair in result.eval_losses]
    assert result.best_step is None


def test_measuring_the_loss_changes_nothing_in_training(options, unbroken, validation, tmp_path):
    assert train(options(eval_data=validation, eval_steps=2)).losses == unbroken[0].losses
    assert adapter_bytes(tmp_path / "out") == unbroken[1]


def test_a_share_of_the_rows_is_held_out(options):
    recorder = Recorder()
    result = train(options(validation_share=0.2, steps=2), recorder)
    assert (recorder.summary.train_rows, recorder.summary.validation_rows) == (16, 4)
    assert result.eval_losses


def test_the_best_adapter_is_kept(options, base_model, validation, tmp_path):
    """With a rate that is far too high, the loss rises after the first evaluations."""
    result = train(options(eval_data=validation, eval_steps=1, keep_best=True, lr=0.5, scheduler="constant"))
    best = min(result.eval_losses, key=lambda pair: pair[1])
    assert best[0] < result.steps
    assert result.best_step == best[0]
    assert best[1] == pytest.approx(loss_of(tmp_path / "out", base_model, validation), rel=1e-5)
    again = resume_run(str(tmp_path / "out"))
    assert (again.best_step, again.eval_losses) == (result.best_step, result.eval_losses)
    assert best[1] == pytest.approx(loss_of(tmp_path / "out", base_model, validation), rel=1e-5)


def test_a_run_whose_loss_falls_no_more_stops_early_and_stays_stopped(options, validation, tmp_path):
    settings = {"eval_data": validation, "eval_steps": 1, "patience": 2, "lr": 0.5, "scheduler": "constant"}
    result = train(options(steps=20, **settings))
    assert result.stopped_early
    assert not result.interrupted
    assert result.steps == result.best_step + 2
    output = str(tmp_path / "out")
    assert RunState.read(output).stopped_early
    before = adapter_bytes(tmp_path / "out")
    again = resume_run(output)
    assert (again.steps, again.stopped_early) == (result.steps, True)
    assert adapter_bytes(tmp_path / "out") == before


def test_patience_counts_on_over_an_interruption(options, validation, tmp_path):
    settings = {"eval_data": validation, "eval_steps": 1, "patience": 3, "lr": 0.5, "scheduler": "constant"}
    whole = train(options(steps=20, output=str(tmp_path / "whole"), **settings))
    assert whole.stopped_early
    part = train(options(steps=20, **settings), Recorder(whole.steps - 2, interrupt))
    assert part.interrupted
    rest = resume_run(str(tmp_path / "out"))
    assert (rest.steps, rest.losses, rest.best_step) == (whole.steps, whole.losses, whole.best_step)
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(tmp_path / "whole")


def test_the_best_adapter_is_found_after_the_folder_was_moved(options, validation, tmp_path):
    settings = {"eval_data": validation, "eval_steps": 1, "keep_best": True, "lr": 0.5, "scheduler": "constant"}
    whole = train(options(output=str(tmp_path / "whole"), **settings))
    train(options(**settings), Recorder(5, interrupt))
    (tmp_path / "out").rename(tmp_path / "moved")
    rest = resume_run(str(tmp_path / "moved"))
    assert rest.best_step == whole.best_step
    assert adapter_bytes(tmp_path / "moved") == adapter_bytes(tmp_path / "whole")


def test_answers_are_shown_while_training_and_change_nothing_in_it(options, unbroken, tmp_path):
    recorder = Recorder()
    result = train(options(sample_every=4), recorder)
    assert [(step, prompt) for step, prompt, _ in recorder.samples] == [(4, "say 0"), (8, "say 0")]
    assert result.losses == unbroken[0].losses
    assert adapter_bytes(tmp_path / "out") == unbroken[1]


def test_held_out_rows_that_are_trained_on_are_said(options, rows_file, tmp_path):
    recorder = Recorder()
    other = write_rows(tmp_path / "other.jsonl", count=3, start=18)
    train(options(steps=1, eval_data=other, eval=write_rows(tmp_path / "new.jsonl", count=1, start=40)), recorder)
    (note,) = [note for note in recorder.notes if "trained on" in note]
    assert note.startswith("note: 2 of the 3 rows for the evaluation loss are trained on as well")
