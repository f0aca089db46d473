"""Subclasses of nn.Linear: those that compute the same are merged, others are not, or are refused."""

import copy

import pytest
import torch
from contract import LayerContract, assert_near, hold, layer_of
from torch import nn

from gralora import GraloraLayer, get_peft_model


def adapt(base):
    return get_peft_model(hold(base), LayerContract().config())


class ByMatrix(nn.Linear):
    """A subclass that computes the same in another way, as Falcon's does."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


class Activated(nn.Linear):
    def forward(self, x):
        return nn.functional.gelu(super().forward(x))


class WithArgument(nn.Linear):
    def forward(self, x, factor):
        return factor * super().forward(x)


class Router(nn.Linear):
    """A subclass that returns more than a tensor, as Llama 4's does."""

    def forward(self, x):
        return super().forward(x), None


class Widened(nn.Linear):
    def forward(self, x):
        return super().forward(x).repeat(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_subclass_of_linear_that_computes_the_same_merges(dtype):
    model, x = adapt(ByMatrix(12, 24, dtype=dtype)), torch.randn(3, 12, dtype=dtype)
    expected = model(x)
    model.merge_adapter()
    assert_near(model(x), expected, dtype)


@pytest.mark.parametrize("kind", [Activated, WithArgument])
def test_a_subclass_of_linear_that_computes_something_else_trains_and_is_not_merged(kind):
    base = kind(12, 24)
    before = copy.deepcopy(base.state_dict())
    with pytest.warns(UserWarning, match="1 adapted layers cannot be merged: its base, .* `gralora.register_kind`"):
        model = adapt(base)
    x, arguments = torch.randn(3, 12), (2.0,) if kind is WithArgument else ()
    layer = layer_of(model)
    update = x @ layer.get_delta_weight("default").T
    torch.testing.assert_close(layer(x, *arguments), base(x, *arguments) + update)
    with pytest.raises(RuntimeError, match=f"its base, {kind.__name__}, has a `forward` of its own"):
        model.merge_adapter()
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())


@pytest.mark.parametrize(("kind", "got"), [(Router, "a tuple"), (Widened, r"the shape \(2, 48\)")])
def test_a_subclass_of_linear_that_returns_something_else_is_refused(kind, got):
    with pytest.raises(TypeError, match=rf"{kind.__name__} has a `forward` of its own, which returns {got}. `gralora"):
        adapt(kind(12, 24))


def test_all_linear_leaves_a_subclass_out_that_returns_something_else():
    model = nn.Sequential(nn.Linear(12, 12), Router(12, 12))
    with pytest.warns(UserWarning, match="leaves out '1'"):
        model = get_peft_model(model, LayerContract().config(target_modules="all-linear"))
    assert isinstance(model.base_model.model[0], GraloraLayer)
    assert type(model.base_model.model[1]) is Router


def test_a_merge_that_overflowed_can_still_be_undone_on_a_subclass():
    model = adapt(ByMatrix(12, 24))
    layer = layer_of(model)
    before = layer.base_layer.weight.detach().clone()
    with torch.no_grad():
        layer.gralora_B["default"].fill_(float("inf"))
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, before)
