import logging
import warnings

import pytest
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
