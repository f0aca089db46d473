import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gralora.recipe.answer import GenerationOptions, generate

pytest_plugins = ["run_fixtures"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folder(adapter, tmp_path, monkeypatch):
    """A copy of a trained adapter; the base model must not be loaded."""
    monkeypatch.setattr("gralora.pretrained.load", None)
    return Path(shutil.copytree(adapter, tmp_path / "adapter"))


def change_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "`max_new_tokens` must be a positive integer; got max_new_tokens=0"),
        ({"max_new_tokens": True}, "`max_new_tokens` must be a positive integer; got max_new_tokens=True"),
        ({"temperature": float("nan")}, "`temperature` must be zero or a finite positive number"),
        ({"temperature": "hot"}, "got temperature='hot'"),
        ({"seed": -1}, "`seed` must be an integer from 0 to 4294967295; got seed=-1"),
        ({"seed": 2**32}, "`seed` must be an integer from 0 to 4294967295"),
        ({"dtype": "int8"}, "`dtype` must be 'auto', 'float32'"),
    ],
)
def test_a_wrong_generation_option_is_said(changes, message):
    with pytest.raises(ValueError, match="must be") as error:
        GenerationOptions(adapter="folder", **changes)
    assert message in str(error.value)


def test_an_adapter_that_names_no_base_model_needs_one(folder):
    change_config(folder, base_model_name_or_path=None)
    with pytest.raises(ValueError, match="`model` must be given"):
        generate(GenerationOptions(adapter=str(folder)), "a", print)


def test_an_adapter_in_the_format_of_the_authors_is_refused(folder):
    change_config(folder, gralora_alpha=64)
    with pytest.raises(ValueError, match="was written by the authors' repository"):
        generate(GenerationOptions(adapter=str(folder)), "a", print)


def test_an_adapter_that_is_not_finite_is_refused(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="must be finite"):
        generate(GenerationOptions(adapter=str(folder)), "a", print)
