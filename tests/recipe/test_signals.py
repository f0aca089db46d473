import os
import signal
import threading

import pytest

from gralora.recipe import signals as module
from gralora.recipe.signals import Signals

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def send(number):
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def handlers_come_back():
    before = [signal.getsignal(number) for number in NUMBERS]
    yield
    assert [signal.getsignal(number) for number in NUMBERS] == before


@pytest.mark.parametrize("number", NUMBERS)
def test_before_the_first_step_a_signal_stops_at_once(number):
    signals = Signals(print)
    with pytest.raises(KeyboardInterrupt), signals.caught():
        send(number)
    assert not signals.stopping


@pytest.mark.parametrize("number", NUMBERS)
def test_while_training_the_first_signal_asks_and_the_second_stops(number, monkeypatch):
    monkeypatch.setattr(module, "_SECONDS_OF_ONE", 0.0)
    notes = []
    signals = Signals(notes.append)
    with pytest.raises(KeyboardInterrupt), signals.caught(), signals.after_the_step():
        send(number)
        assert signals.stopping
        send(number)
    assert len(notes) == 1


def test_a_signal_that_a_launcher_passes_on_again_is_one(monkeypatch):
    monkeypatch.setattr(module, "_SECONDS_OF_ONE", 60.0)
    signals = Signals(print)
    with signals.caught(), signals.after_the_step():
        send(signal.SIGINT)
        send(signal.SIGTERM)
    assert signals.stopping


def test_after_training_a_signal_stops_at_once_again():
    signals = Signals(print)
    with pytest.raises(KeyboardInterrupt), signals.caught():
        with signals.after_the_step():
            pass
        send(signal.SIGTERM)


def test_a_signal_that_is_ignored_stays_ignored():
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals(print).caught():
            send(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_thread_beside_the_main_one_leaves_the_handlers_alone():
    seen = []

    def look():
        with Signals(print).caught():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]
