"""Running the command line inside the test process."""

import pytest

from gralora import cli


def run(*arguments):
    """Return the exit status."""
    with pytest.raises(SystemExit) as exit:
        cli.main(list(arguments))
    return exit.value.code or 0
