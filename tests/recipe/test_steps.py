import signal
import threading

import pytest
from runs import Recorder, interrupt
from transformers import TrainerControl

from gralora.recipe.steps import StepCallback
from gralora.recipe.training import train

pytest_plugins = ["run_fixtures"]
pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_loss_that_is_not_finite_stops_the_run(options, tmp_path):
    with pytest.raises(RuntimeError, match=r"not finite at step \d.*lower `lr` .*, or with `dtype=\"float32\"`"):
        train(options(lr=1e30))
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_second_signal_stops_at_once_and_the_handlers_come_back():
    recorder = Recorder()
    callback, control = StepCallback(recorder), TrainerControl()
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), callback.interruptible():
        callback.on_step_end(None, None, control)
        assert not control.should_training_stop
        interrupt()
        callback.on_step_end(None, None, control)
        assert control.should_save
        assert control.should_training_stop
        interrupt()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert len(recorder.notes) == 1


def test_a_thread_beside_the_main_one_leaves_the_handlers_alone():
    seen = []

    def look():
        with StepCallback(Recorder()).interruptible():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]
