import torch
from conftest import adapted_layer
from contract import LayerContract, assert_near, layer_of
from hypothesis import given, settings
from hypothesis import strategies as st
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


@settings(deadline=None, max_examples=50)
@given(
    st.tuples(st.integers(1, 8), st.integers(1, 2), st.integers(1, 4), st.integers(1, 4), st.sampled_from([0, 3])),
    st.lists(st.integers(0, 3), max_size=4),
    st.sampled_from([TestLinear, TestConv1D]),
)
def test_any_sizes_and_leading_dimensions(shape, lead, kind):
    k, s, n, m, hybrid_r = shape
    if kind is TestConv1D and 0 in (len(lead), *lead):
        return  # Conv1D itself takes neither a single vector nor an empty batch
    base = Conv1D(k * m, k * n) if kind is TestConv1D else nn.Linear(k * n, k * m)
    model = kind().adapt(base=base.double(), k=k, r=k * s, hybrid_r=hybrid_r)
    x = torch.randn(*lead, k * n, dtype=torch.float64)
    expected = kind().expected(layer_of(model), x, "default")
    torch.testing.assert_close(model(x), expected)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)


def test_the_input_need_not_be_contiguous():
    layer = adapted_layer(nn.Linear(6, 4))
    x = torch.randn(6, 5, 3).permute(1, 2, 0)
    assert not x.is_contiguous()
    torch.testing.assert_close(layer(x), layer(x.contiguous()))


class Halving(nn.Linear):
    """A base whose output has another dtype than its input."""

    def forward(self, x):
        return super().forward(x).half()


def test_the_output_dtype_is_that_of_a_base_that_changes_it():
    contract = TestLinear()
    layer, x = layer_of(contract.adapt(base=Halving(12, 24))), contract.make_input(torch.float32)
    assert layer(x).dtype == torch.float16
    assert_near(layer(x), contract.expected(layer, x, "default"), torch.float16)
