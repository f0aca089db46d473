import bitsandbytes as bnb
import pytest
import torch
from contract import LayerContract
from torch import nn


@pytest.mark.filterwarnings("ignore:Merge lora module:UserWarning")
class TestLinear4bit(LayerContract):
    exact_dtype = torch.float32  # bitsandbytes computes in 32 or 16 bits
    rounds_once = False  # a merged weight is quantised again
    transforms = False  # its product is an autograd function without a rule for vmap

    def make_base(self, dtype):
        dense = nn.Linear(192, 96, dtype=dtype)
        base = bnb.nn.Linear4bit(192, 96, compute_dtype=dtype, quant_type="nf4")
        base.load_state_dict(dense.state_dict())
        return base.to("cpu")

    def make_input(self, dtype):
        return torch.randn(2, 5, 192, dtype=dtype)

    def weight(self, base):
        return bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state).double()

    def output(self, base, x, weight):
        return nn.functional.linear(x, weight, base.bias.double())
