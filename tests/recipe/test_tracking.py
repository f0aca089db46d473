import os

import pytest
from runs import Recorder, interrupt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_language_model import write_rows

from gralora.recipe.training import resume_run, train

pytest_plugins = ["run_fixtures"]
pytestmark = pytest.mark.usefixtures("one_thread")


def scalars(folder, name):
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_reads_the_losses_of_a_run_and_of_its_continuation(options, tmp_path):
    validation = write_rows(tmp_path / "validation.jsonl", count=4, start=30)
    settings = {"log_to": "tensorboard", "eval_data": validation, "eval_steps": 4}
    train(options(**settings), Recorder(3, interrupt))
    result = resume_run(str(tmp_path / "out"))
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ
    logs = tmp_path / "out" / "logs"
    steps, values = zip(*scalars(logs, "train/loss"), strict=True)
    assert steps == tuple(range(1, 9))
    assert values == pytest.approx(result.losses)
    assert scalars(logs, "eval/loss") == [(step, pytest.approx(loss)) for step, loss in result.eval_losses]
