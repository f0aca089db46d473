import io
import logging
import warnings

import pytest
from rich.console import Console
from runs import Recorder
from transformers.utils import logging as transformers_logging

from gralora.recipe.progress import ConsoleReporter, quiet_libraries


def test_libraries_are_quiet_for_a_while_and_their_warnings_become_notes():
    recorder, logger = Recorder(), logging.getLogger("transformers")
    level, bars = logger.level, transformers_logging.is_progress_bar_enabled()
    with pytest.raises(ZeroDivisionError), quiet_libraries(recorder):
        assert not transformers_logging.is_progress_bar_enabled()
        assert logger.level == logging.ERROR
        with warnings.catch_warnings():  # what pytest's filters make errors of
            warnings.simplefilter("always", UserWarning)
            warnings.warn("look", stacklevel=1)
            warnings.warn("old", FutureWarning, stacklevel=1)
        _ = 1 / 0
    assert recorder.notes == ["note: look"]
    assert (logger.level, transformers_logging.is_progress_bar_enabled()) == (level, bars)


def test_without_a_terminal_there_are_lines_and_the_last_one_always(capsys):
    reporter = ConsoleReporter()
    for done in (0, 1, 2):
        reporter.scoring("before", done, 2)
    reporter.close()
    assert capsys.readouterr().out.splitlines() == ["scoring before 0/2", "scoring before 2/2"]


def test_a_log_file_gets_the_time_left(capsys, monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("gralora.recipe.progress.time.monotonic", lambda: next(clock))
    reporter = ConsoleReporter()
    for done in (0, 1, 2, 3):
        reporter.scoring("before", done, 3)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "scoring before 0/3"
    assert all(line.endswith(" left") for line in lines[1:-1])
    assert lines[-1] == "scoring before 3/3"


def test_libraries_speak_when_they_are_asked_to(monkeypatch):
    monkeypatch.setenv("GRALORA_VERBOSE", "1")
    level = logging.getLogger("transformers").level
    with quiet_libraries(Recorder()):
        assert logging.getLogger("transformers").level == level
        assert transformers_logging.is_progress_bar_enabled()


def test_a_bar_ends_where_the_next_one_begins():
    """A training that stops early has steps left."""
    reporter = ConsoleReporter()
    reporter.console = Console(force_terminal=True, file=io.StringIO())
    for name, total in (("training", 100), ("scoring after", 20)):
        reporter._show(name, 1, total, "")
        (task,) = reporter._bar.tasks
        assert (task.description, task.completed, task.total) == (name, 1, total)
    reporter.close()
