import torch
from contract import LayerContract
from torch import nn
from transformers.pytorch_utils import Conv1D


class TestLinear(LayerContract):
    def make_base(self, dtype):
        return nn.Linear(12, 24, dtype=dtype)

    def make_input(self, dtype):
        return torch.randn(2, 5, 12, dtype=dtype)

    def output(self, base, x, weight):
        return nn.functional.linear(x, weight, None if base.bias is None else base.bias.double())


class TestLinearWithoutBias(TestLinear):
    def make_base(self, dtype):
        return nn.Linear(12, 24, bias=False, dtype=dtype)


class TestConv1D(LayerContract):
    def make_base(self, dtype):
        return Conv1D(24, 12).to(dtype)

    def make_input(self, dtype):
        return torch.randn(2, 5, 12, dtype=dtype)

    def output(self, base, x, weight):
        return x @ weight + base.bias.double()

    def stored(self, base, delta):
        return delta.T
