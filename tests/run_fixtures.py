"""Fixtures of tiny training runs, as a plugin: a test module gets them by `pytest_plugins = ["run_fixtures"]`.

No second conftest.py, since tests import the first one by its name.
"""

import pytest
from runs import SETTINGS, adapter_bytes
from tiny_language_model import save_model, write_rows

from gralora.recipe.options import TrainingOptions
from gralora.recipe.training import train


@pytest.fixture(scope="session")
def base_model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture
def options(base_model, rows_file, tmp_path):
    def make(**changes):
        settings = {**SETTINGS, "model": base_model, "data": rows_file, "output": str(tmp_path / "out")}
        return TrainingOptions(**(settings | changes))

    return make


@pytest.fixture(scope="session")
def unbroken(base_model, rows_file, tmp_path_factory):
    """The result and the adapter's bytes of a run that nothing interrupts."""
    output = tmp_path_factory.mktemp("unbroken") / "out"
    return train(TrainingOptions(**SETTINGS, model=base_model, data=rows_file, output=str(output))), adapter_bytes(
        output
    )


@pytest.fixture(scope="session")
def adapter(base_model, rows_file, tmp_path_factory):
    """The folder of an adapter that was trained for one step."""
    output = str(tmp_path_factory.mktemp("adapter") / "out")
    train(TrainingOptions(model=base_model, data=rows_file, output=output, r=4, steps=1))
    return output
