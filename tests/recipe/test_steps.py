import math
from types import SimpleNamespace

import pytest
from runs import Recorder, interrupt
from tiny_language_model import write_rows
from transformers import TrainerControl

from gralora.recipe.signals import Signals
from gralora.recipe.steps import StepCallback
from gralora.recipe.training import resume_run, train

pytest_plugins = ["run_fixtures"]
pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_loss_that_is_not_finite_stops_the_run(options, tmp_path):
    with pytest.raises(RuntimeError, match=r"not finite at step \d.*lower `lr` .*, or with `dtype=\"float32\"`"):
        train(options(lr=1e30))
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_signal_is_obeyed_at_the_end_of_a_step():
    signals, control = Signals(print), TrainerControl()
    callback = StepCallback(Recorder(), signals)
    callback.on_step_end(None, None, control)
    assert not control.should_training_stop
    signals.stopping = True
    callback.on_step_end(None, None, control)
    assert control.should_save
    assert control.should_training_stop


def test_gradients_that_overflow_end_a_run_unless_their_scale_is_adapted():
    state, arguments = SimpleNamespace(global_step=1), SimpleNamespace(learning_rate=1.0)
    logs = {"loss": 1.0, "grad_norm": math.inf, "num_tokens": 5}
    callback = StepCallback(Recorder(), Signals(print))
    callback.on_log(arguments, state, None, logs, optimizer=SimpleNamespace(scaler=object()))
    with pytest.raises(RuntimeError, match="grad_norm is not finite"):
        callback.on_log(arguments, state, None, logs, optimizer=SimpleNamespace(scaler=None))
    with pytest.raises(RuntimeError, match="training loss is not finite"):
        callback.on_log(arguments, state, None, logs | {"loss": math.nan}, optimizer=SimpleNamespace(scaler=object()))


def test_an_evaluation_loss_that_is_not_finite_stops_the_run():
    callback = StepCallback(Recorder(), Signals(print))
    state = SimpleNamespace(global_step=3)
    with pytest.raises(RuntimeError, match="The evaluation loss is not finite at step 3: nan"):
        callback.on_log(None, state, None, {"eval_loss": float("nan")})


def test_a_signal_during_the_last_step_ends_the_run_without_scoring(options, tmp_path):
    held_out = write_rows(tmp_path / "held-out.jsonl", count=2, start=30)
    recorder = Recorder(2, interrupt)
    result = train(options(eval=held_out, steps=3), recorder)
    assert (result.steps, result.interrupted, result.after) == (3, False, None)
    assert {what for what, _, _ in recorder.scores} == {"before"}
    assert resume_run(str(tmp_path / "out")).after is not None
