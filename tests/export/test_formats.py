import inspect

import pytest
from adapters import save_adapter

from gralora.export import LoraOptions
from gralora.export.formats import FORMATS


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_takes_what_it_says(name):
    chosen = FORMATS[name]
    names = set(inspect.signature(chosen.export).parameters)
    assert {"source", "output", "options", "overwrite", *chosen.takes} == names
    assert "serving" in chosen.targets
    assert chosen.description


def test_the_lora_of_the_table_is_that_of_to_lora(tmp_path):
    export = FORMATS["lora"].export(save_adapter(tmp_path / "adapter"), tmp_path / "lora", LoraOptions(max_rank=3))
    assert (export.rank, export.path) == (3, tmp_path / "lora")
