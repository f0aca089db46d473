import torch
from conftest import adapted_layer
from torch import nn

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
