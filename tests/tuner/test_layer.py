import pytest
from conftest import adapted_layer, small_config
from torch import nn

from gralora import get_peft_model


@pytest.mark.parametrize("module", [nn.LayerNorm(4), nn.Bilinear(4, 4, 4), nn.LSTM(4, 4)], ids=str)
def test_modules_of_no_kind_are_refused_by_name(module):
    model = nn.Sequential(module)
    with pytest.raises(TypeError, match=f"'0' cannot be adapted: .*got {type(module).__name__}"):
        get_peft_model(model, small_config())
    assert model[0] is module


def test_the_layer_says_what_it_is():
    layer = adapted_layer(nn.Linear(6, 4))
    assert repr(layer).startswith("gralora.Linear(\n  in_features=6, out_features=4")
    assert layer.supports_lora_conversion()
