import copy
import pickle

import oracle
import pytest
import torch
from conftest import MLP, assert_same_bits, mlp_config, weights_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from gralora import get_peft_model
from gralora.tuner.config import LayerSettings
from gralora.tuner.factor import FactorDict
from gralora.tuner.kinds import kind_for, kind_refusal


def make_layer(base, n_in, n_out, k=2, s=2, q=0, alpha=3.0, dropout=0.0, init_weights=False, name="default"):
    layer = kind_for(base, None)(base)
    add(layer, name, k, s, q, alpha, dropout, init_weights)
    layer.set_adapter(name)
    return layer


def add(layer, name, k=2, s=2, q=0, alpha=3.0, dropout=0.0, init_weights=False):
    layer.add_adapter(name, LayerSettings(k * s, q, alpha, k, dropout, init_weights, False))


def oracle_update(layer, x, name="default"):
    return oracle.apply(x, *layer.factors(name), layer.scaling[name])


@settings(deadline=None, max_examples=50)
@given(
    st.tuples(st.integers(1, 8), st.integers(1, 2), st.integers(1, 4), st.integers(1, 4), st.sampled_from([0, 3])),
    st.lists(st.integers(0, 3), max_size=4),
    st.booleans(),
)
def test_forward_delta_and_merge_are_the_double_loop(shape, lead, conv):
    k, s, n, m, q = shape
    base = (Conv1D(k * m, k * n) if conv else nn.Linear(k * n, k * m)).double()
    layer = make_layer(base, k * n, k * m, k, s, q)
    x = torch.randn(*lead, k * n, dtype=torch.float64)
    # Conv1D itself takes no empty batch
    expected = (x @ base.weight + base.bias if conv else base(x)) + oracle_update(layer, x)
    if conv and (not lead or x.numel() == 0):
        return
    torch.testing.assert_close(layer(x), expected)
    delta = oracle.dense(*layer.factors("default"), layer.scaling["default"])
    torch.testing.assert_close(layer.get_delta_weight("default"), delta.T if conv else delta)
    layer.merge()
    torch.testing.assert_close(layer(x), expected)


def test_input_need_not_be_contiguous():
    layer = make_layer(nn.Linear(6, 4), 6, 4)
    x = torch.randn(6, 5, 3).permute(1, 2, 0)
    assert not x.is_contiguous()
    torch.testing.assert_close(layer(x), layer(x.contiguous()))


def test_a_fresh_adapter_changes_nothing_exactly():
    base = nn.Linear(6, 4)
    layer = make_layer(base, 6, 4, q=2, init_weights=True)
    x = torch.randn(5, 6)
    assert torch.equal(layer(x), base(x))


def test_several_adapters_add_up_switch_and_disable():
    base = nn.Linear(6, 4)
    layer = make_layer(base, 6, 4)
    add(layer, "other", k=1, s=3, q=2)
    x = torch.randn(5, 6, dtype=torch.float32)
    default, other = oracle_update(layer, x).float(), oracle_update(layer, x, "other").float()
    torch.testing.assert_close(layer(x), base(x) + default)
    layer.set_adapter("other")
    torch.testing.assert_close(layer(x), base(x) + other)
    layer.set_adapter(["default", "other"])
    torch.testing.assert_close(layer(x), base(x) + default + other)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), base(x))
    layer.enable_adapters(True)
    layer.delete_adapter("default")
    torch.testing.assert_close(layer(x), base(x) + other)
    assert all("default" not in getattr(layer, a) for a in layer.adapter_layer_names + layer.other_param_names)


def test_one_dropout_draw_feeds_both_parts():
    base = nn.Linear(8, 8)
    layer = make_layer(base, 8, 8, q=2, dropout=0.5)
    x = torch.randn(64, 8)
    torch.manual_seed(7)
    result = layer(x)
    torch.manual_seed(7)
    dropped = nn.functional.dropout(x, 0.5)
    torch.testing.assert_close(result, base(x) + oracle_update(layer, dropped).float())
    assert not torch.allclose(result, layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), base(x) + oracle_update(layer, x).float())


def test_forward_changes_no_weight():
    layer = make_layer(nn.Linear(6, 4), 6, 4, q=2)
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    layer(torch.randn(5, 6)).sum().backward()
    assert all(torch.equal(before[name], t) for name, t in layer.state_dict().items())


@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_output_and_gradients_keep_their_dtypes(dtype, master):
    layer = make_layer(nn.Linear(6, 4, dtype=dtype), 6, 4, q=2)
    for holder in layer.modules():
        if type(holder).__name__ == "Factor":
            holder.to(master)
    x = torch.randn(5, 6, dtype=dtype, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    assert layer.gralora_A["default"].grad.dtype == master


def test_output_dtype_is_that_of_the_base_under_autocast():
    layer = make_layer(nn.Linear(6, 4), 6, 4, q=2)
    x = torch.randn(5, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), atol=0.05, rtol=0.05)  # 8 bits of mantissa


class Cached(nn.Linear):
    """A base that returns the same tensor every time."""

    def forward(self, x):
        if not hasattr(self, "kept"):
            self.kept = super().forward(x)
        return self.kept


class Halving(nn.Linear):
    """A base whose output has another dtype than its input."""

    def forward(self, x):
        return super().forward(x).half()


def test_a_cached_base_output_is_never_changed():
    layer = make_layer(Cached(6, 4), 6, 4, q=2)
    x = torch.randn(5, 6)
    first, second = layer(x), layer(x)
    assert torch.equal(first, second)


def test_output_dtype_is_that_of_an_odd_base():
    layer = make_layer(Halving(6, 4), 6, 4)
    x = torch.randn(5, 6)
    assert layer(x).dtype == torch.float16
    torch.testing.assert_close(layer(x), (layer.base_layer(x) + oracle_update(layer, x)).half(), atol=1e-2, rtol=1e-2)


def test_assigning_keeps_a_leaf_and_requires_grad():
    layer = make_layer(nn.Linear(6, 4), 6, 4)
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


def test_hooks_on_the_holders_run():
    layer = make_layer(nn.Linear(6, 4), 6, 4, q=2)
    seen = []
    for name in layer.adapter_layer_names:
        getattr(layer, name)._modules["default"].register_forward_hook(lambda *_, name=name: seen.append(name))
    layer(torch.randn(5, 6))
    assert seen == list(layer.adapter_layer_names)


@pytest.mark.parametrize("through", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@pytest.mark.parametrize("merged", [False, True])
def test_copies_are_whole_and_independent(through, merged):
    layer = make_layer(nn.Linear(6, 4), 6, 4, q=2)
    original = layer.base_layer.weight.detach().clone()
    if merged:
        layer.merge()
    x = torch.randn(5, 6)
    twin = through(layer)
    assert torch.equal(twin(x), layer(x))
    with torch.no_grad():
        layer.gralora_B["default"].zero_()
    if merged:
        twin.unmerge()
        assert torch.equal(twin.base_layer.weight, original)
    assert not torch.equal(twin(x), layer.base_layer(x))


def test_functional_call_and_vmap():
    layer = make_layer(nn.Linear(6, 4), 6, 4, q=2)
    x = torch.randn(3, 5, 6)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(3):
        single = torch.func.grad(loss)(parameters, x[i])
        for name, gradient in single.items():
            torch.testing.assert_close(per_sample[name][i], gradient)


def test_scale_api():
    layer = make_layer(nn.Linear(6, 4), 6, 4)
    start = layer.scaling["default"]
    layer.scale_layer(2.0)
    layer.scale_layer(3.0)
    assert layer.scaling["default"] == 6 * start
    layer.unscale_layer(3.0)
    assert layer.scaling["default"] == pytest.approx(2 * start)
    layer.unscale_layer()
    assert layer.scaling["default"] == start
    layer.set_scale("default", 0.5)
    assert layer.scaling["default"] == 0.5 * start
    layer.set_scale("absent", 3.0)


def test_adapter_names_are_refused():
    layer = make_layer(nn.Linear(6, 4), 6, 4)
    with pytest.raises(NotImplementedError, match="cannot be used yet"):
        layer(torch.randn(2, 6), adapter_names=["default", "default"])


def test_blocks_that_do_not_fit_are_refused():
    layer = kind_for(nn.Linear(6, 4), None)(nn.Linear(6, 4))
    with pytest.raises(ValueError, match=r"`gralora_k` must divide `out_features`; got gralora_k=3.*: 1, 2\."):
        add(layer, "default", k=3, s=2)


@pytest.mark.parametrize("module", [nn.ConvTranspose2d(2, 2, 1), nn.LayerNorm(4), nn.MultiheadAttention(4, 1)])
def test_other_modules_are_refused(module):
    assert f"got {type(module).__name__}" in kind_refusal(module, None)


def test_layer_is_no_linear_and_says_what_it_is():
    layer = make_layer(nn.Linear(6, 4), 6, 4)
    assert not isinstance(layer, nn.Linear)
    assert repr(layer).startswith("gralora.Linear(\n  in_features=6, out_features=4")
    assert layer.supports_lora_conversion()


def test_moving_a_merged_layer():
    model = get_peft_model(MLP(), mlp_config())
    before = {name: weight.double() for name, weight in weights_of(model).items()}
    model.merge_adapter()
    model.double()
    assert model.base_model.model.up.base_layer.weight.dtype == torch.float64
    assert model.base_model.model.up.merged
    model.unmerge_adapter()
    assert_same_bits(before, weights_of(model))
