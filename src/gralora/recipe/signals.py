"""Signals that end a run: Ctrl-C, a closed terminal, a scheduler's SIGTERM."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_NUMBERS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
# A terminal and a launcher both pass a Ctrl-C on: signals this close together are one.
_SECONDS_OF_ONE = 1.0


class Signals:
    """Turns signals into a request to stop: at once, or after the current step while training.

    Attributes:
        stopping: Whether the run shall end after the current step.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        self.stopping = False
        self._note = note
        self._training = False
        self._came = float("-inf")

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Raise KeyboardInterrupt at SIGINT, SIGTERM and SIGHUP; ignored signals, as under nohup, stay ignored.

        Python allows signal handlers in the main thread only; in other threads this changes nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = [number for number in _NUMBERS if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def after_the_step(self) -> Iterator[None]:
        """Let the first signal end the training after the current step; a second one ends it at once."""
        self._training = True
        try:
            yield
        finally:
            self._training = False

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal end the run at once again, within `after_the_step`."""
        before, self._training = self._training, False
        try:
            yield
        finally:
            self._training = before

    def _on_signal(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        again = now - self._came < _SECONDS_OF_ONE
        self._came = now
        if not self._training:
            raise KeyboardInterrupt
        if self.stopping and again:
            return
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = True
        self._note("stopping after this step; press Ctrl-C again to stop at once, without saving the step")
