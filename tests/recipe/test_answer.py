import json

import pytest

from gralora.recipe.answer import GenerationOptions


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    return str(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "`max_new_tokens` must be a positive integer; got max_new_tokens=0"),
        ({"max_new_tokens": True}, "`max_new_tokens` must be a positive integer; got max_new_tokens=True"),
        ({"temperature": float("nan")}, "`temperature` must be zero or a finite positive number"),
        ({"temperature": "hot"}, "got temperature='hot'"),
        ({"dtype": "int8"}, "`dtype` must be 'auto', 'float32'"),
    ],
)
def test_a_wrong_generation_option_is_said(folder, changes, message):
    with pytest.raises(ValueError, match="must be") as error:
        GenerationOptions(adapter=folder, **changes)
    assert message in str(error.value)


def test_the_adapter_names_the_base_model(folder, tmp_path):
    assert GenerationOptions(adapter=folder).base_model() == "org/base"
    assert GenerationOptions(adapter=folder, model="mine").base_model() == "mine"
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="`model` must be given"):
        GenerationOptions(adapter=folder).base_model()
