"""Kinds of layers that a user has written."""

import pytest
import torch
from contract import LayerContract
from torch import nn

from gralora import GraloraConfig, GraloraLayer, get_peft_model, register_kind, unregister_kind
from gralora.tuner import blocks
from gralora.tuner.kinds import all_kinds
from gralora.tuner.linear import Linear
from gralora.tuner.merging.weight import WeightRef


class Scaled(nn.Module):
    """A linear layer of another name, whose weight is transposed and whose output is scaled."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.table = nn.Parameter(torch.randn(12, 24, dtype=dtype))

    def forward(self, x):
        return 0.5 * (x @ self.table)


class OnScaled(GraloraLayer):
    noun = "scaled layers"

    @classmethod
    def covers(cls, base, backend):
        return isinstance(base, Scaled)

    @classmethod
    def parameters_of(cls, base):
        return ("table",)

    @classmethod
    def features(cls, base, parameter_name="table"):
        return tuple(base.table.shape)

    def weight_ref(self):
        return WeightRef(self.get_base_layer(), "table", torch.t, torch.t)

    def update(self, x, factors):
        return 0.5 * blocks.apply(x, factors)


@pytest.fixture(autouse=True)
def registered():
    register_kind(OnScaled)
    register_kind(OnScaled)  # idempotent
    yield
    if OnScaled in all_kinds():
        unregister_kind(OnScaled)


class TestRegisteredKind(LayerContract):
    def make_base(self, dtype):
        return Scaled(dtype)

    def make_input(self, dtype):
        return torch.randn(2, 5, 12, dtype=dtype)

    def weight(self, base):
        return base.table.detach().double()

    def stored(self, base, delta):
        return delta.T

    def output(self, base, x, weight):
        return 0.5 * (x @ weight)


def adapted(base):
    return get_peft_model(nn.Sequential(base), GraloraConfig(r=4, target_modules=["0"])).base_model.model[0]


def test_without_the_registration_the_module_is_refused():
    assert type(adapted(Scaled())) is OnScaled
    unregister_kind(OnScaled)
    with pytest.raises(TypeError, match=r"GraLoRA adapts .*; got Scaled"):
        adapted(Scaled())
    with pytest.raises(ValueError, match="`kind` must have been registered"):
        unregister_kind(OnScaled)


def test_a_registered_kind_is_asked_before_those_of_the_package():
    class Loud(nn.Linear):
        def forward(self, x):
            return 3 * super().forward(x)

    @register_kind
    class OnLoud(Linear):
        noun = "loud layers"

        @classmethod
        def covers(cls, base, backend):
            return isinstance(base, Loud)

        def update(self, x, factors):
            return 3 * super().update(x, factors)

        def add(self, result, x, factors):
            return GraloraLayer.add(self, result, x, factors)

    try:
        model = get_peft_model(nn.Sequential(Loud(8, 4)), GraloraConfig(r=4, target_modules=["0"], init_weights=False))
        assert type(model.base_model.model[0]) is OnLoud
        x = torch.randn(3, 8)
        before = model(x)
        model.merge_adapter()
        torch.testing.assert_close(model(x), before)
    finally:
        unregister_kind(OnLoud)


def test_what_is_no_kind_is_refused():
    class Nothing(GraloraLayer):
        pass

    with pytest.raises(TypeError, match=r"must be a subclass of gralora\.GraloraLayer"):
        register_kind(nn.Linear)
    with pytest.raises(TypeError, match="must define covers, features, update, noun; Nothing does not"):
        register_kind(Nothing)
