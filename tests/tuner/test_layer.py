import pytest
import torch
from conftest import adapted_layer, small_config
from torch import nn

from gralora import get_peft_model
from gralora.tuner.factor import FactorDict


def test_assigning_keeps_a_leaf_and_requires_grad():
    layer = adapted_layer(nn.Linear(6, 4))
    layer.gralora_A["default"].requires_grad_(False)
    layer.gralora_B["default"] = layer.gralora_B["default"] * 2
    layer.gralora_A["default"] = layer.gralora_A["default"].double()
    a, b = layer.gralora_A["default"], layer.gralora_B["default"]
    assert isinstance(a, nn.Parameter)
    assert (a.is_leaf, a.requires_grad, a.dtype) == (True, False, torch.float64)
    assert (b.is_leaf, b.requires_grad) == (True, True)


def test_factor_dict_reads_like_a_parameter_dict():
    factors = FactorDict()
    factors["a"] = torch.ones(2)
    assert [name for name, _ in factors.named_parameters()] == ["a.weight"]
    assert isinstance(factors["a"], nn.Parameter)
    del factors["a"]
    assert "a" not in factors


@pytest.mark.parametrize("module", [nn.LayerNorm(4), nn.Bilinear(4, 4, 4), nn.LSTM(4, 4)], ids=str)
def test_modules_of_no_kind_are_refused_by_name(module):
    model = nn.Sequential(module)
    with pytest.raises(TypeError, match=f"'0' can(not|'t) be adapted: .*got {type(module).__name__}"):
        get_peft_model(model, small_config())
    assert model[0] is module


def test_the_layer_says_what_it_is():
    layer = adapted_layer(nn.Linear(6, 4))
    assert repr(layer).startswith("gralora.Linear(\n  in_features=6, out_features=4")
    assert layer.supports_lora_conversion()
