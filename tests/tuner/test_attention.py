"""Attention, compared with attention of dense weights. PEFT's LoRA is no oracle: see the tests that say so."""

import copy

import oracle
import peft
import pytest
import torch
from conftest import assert_same_bits, weights_of
from contract import LayerContract, assert_near, copy_by_pickle, layer_of
from peft import PeftModel
from torch import nn

from gralora import GraloraConfig, get_peft_model
from gralora.tuner.attention import Attention
from gralora.tuner.layer import gralora_layers

WIDTH, HEADS = 24, 4


def attention(dtype=torch.float64, **changes):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(WIDTH, HEADS, dtype=dtype, **changes)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module


def attention_config(**changes):
    settings = {"r": 4, "alpha": 8, "target_modules": ["attn"], "init_weights": False, "hybrid_r": 2}
    return GraloraConfig(**(settings | changes))


class Block(nn.Module):
    """Self-attention of its input."""

    def __init__(self, attn):
        super().__init__()
        self.attn = attn

    def forward(self, x, **arguments):
        return self.attn(x, x, x, **arguments)[0]


def adapted(plain, **changes):
    return get_peft_model(copy.deepcopy(plain), attention_config(**changes))


def dense_of(model, plain, *names):
    """`plain` with the dense updates of the adapters in its weights."""
    dense = copy.deepcopy(plain)
    for name, layer in gralora_layers(model.base_model.model).items():
        parameter = dense.get_parameter(layer.weight_name(name))
        with torch.no_grad():
            for adapter in names or ("default",):
                parameter += layer.get_delta_weight(adapter)
    return dense


class AttentionContract(LayerContract):
    """One weight of self-attention; the update is inside the module."""

    fresh_is_exact = False  # torch computes attention otherwise where gradients are asked for

    def make_base(self, dtype):
        return attention(dtype, batch_first=True)

    def make_input(self, dtype):
        return torch.randn(2, 5, WIDTH, dtype=dtype)

    def arguments(self, x):
        return x, x, x

    def call(self, module, x):
        return module(*self.arguments(x), need_weights=False)[0]

    def hold(self, base):
        return Holder(base)

    @property
    def target(self):
        return f"layer.{self.parameter}"

    @property
    def targets(self):
        return {"target_modules": [], "target_parameters": [self.target]}

    def weight(self, base):
        return base.get_parameter(self.parameter).detach().double()

    def output(self, base, x, weight):
        exact = copy.deepcopy(base).double()
        exact._forward_hooks.clear()
        return torch.func.functional_call(exact, {self.parameter: weight}, (x, x, x), {"need_weights": False})[0]

    def test_the_hooks_of_the_base_run_and_an_output_that_they_keep_is_not_changed(self):
        """The update is inside the base, so what its hook returns is the output."""
        layer, x = layer_of(self.adapt(hybrid_r=2)), self.make_input(self.exact_dtype)
        expected, seen, kept = self.expected(layer, x, "default"), [], (torch.ones(1), None)
        layer.base_layer.register_forward_hook(lambda _, args, y: seen.append(y[0]) or kept)
        assert self.call(layer, x) is kept[0]
        assert_near(seen[0], expected, self.exact_dtype)

    def test_one_dropout_draw_feeds_both_parts(self):
        with pytest.raises(ValueError, match=r"cannot be adapted: .* gralora_dropout=0"):
            self.adapt(gralora_dropout=0.5)

    def test_functional_call_under_vmap_gives_the_gradients_of_each_sample(self):
        pytest.skip("functional_call of a module that itself uses functional_call is tested for other parameters")


class Holder(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x, x, x, need_weights=False)[0]


class TestPackedWeight(AttentionContract):
    parameter = "in_proj_weight"


OPTIONS = [
    {},
    {"batch_first": True},
    {"bias": False},
    {"add_bias_kv": True, "add_zero_attn": True},
    {"kdim": 12, "vdim": 36},
]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_outputs_and_weights_of_cross_attention(options, grad):
    plain = nn.ModuleDict({"attn": attention(**options)})
    model = adapted(plain)
    layer, dense = model.base_model.model["attn"], dense_of(model, plain)["attn"].requires_grad_(False)
    assert set(layer.nest()) == set(Attention.parameters_of(dense))
    query = torch.randn(5, 3, WIDTH, dtype=torch.float64)
    key = torch.randn(7, 3, options.get("kdim", WIDTH), dtype=torch.float64)
    value = torch.randn(7, 3, options.get("vdim", WIDTH), dtype=torch.float64)
    if options.get("batch_first"):
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    padded = torch.zeros(3, 7, dtype=torch.bool)
    padded[1, 5:] = True
    for arguments in (
        {"need_weights": False},
        {"need_weights": True},
        {"average_attn_weights": False},
        {"key_padding_mask": padded},
        {"attn_mask": torch.ones(5, 7, dtype=torch.bool).triu(2)},
    ):
        with torch.set_grad_enabled(grad):
            for eval_mode in (False, True):
                found = layer.train(not eval_mode)(query, key, value, **arguments)
                expected = dense.train(not eval_mode)(query, key, value, **arguments)
                for one, other in zip(found, expected, strict=True):
                    if one is not None or other is not None:
                        torch.testing.assert_close(one, other)


def test_gradients_are_those_of_dense_weights():
    plain = Block(attention(batch_first=True))
    model = adapted(plain)
    dense = dense_of(model, plain).requires_grad_(True)
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    g = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    model(x).backward(g)
    dense(x).backward(g)
    for name, layer in gralora_layers(model.base_model.model).items():
        of_weight = dense.get_parameter(layer.weight_name(name)).grad
        leaves = [f.detach().clone().requires_grad_() for f in layer.factors("default")]
        (oracle.dense(*leaves, layer.scaling["default"]) * of_weight).sum().backward()
        for leaf, factor in zip(leaves, layer.factors("default"), strict=True):
            torch.testing.assert_close(leaf.grad, factor.grad)


def encoder_layer(**changes):
    torch.manual_seed(0)
    settings = {"dim_feedforward": 48, "batch_first": True, "dropout": 0.0, "dtype": torch.float64}
    return nn.TransformerEncoderLayer(WIDTH, HEADS, **(settings | changes))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("container", [True, False])
def test_inside_pytorch_s_encoder(container, masked, training, grad):
    """PEFT's LoRA does nothing here in eval mode: the encoder's fast path reads the frozen weights."""
    plain = nn.TransformerEncoder(encoder_layer(), 2) if container else nn.Sequential(encoder_layer())
    model = adapted(plain, target_modules=["self_attn"])
    dense = dense_of(model, plain).requires_grad_(False).train(training)
    x = torch.randn(3, 6, WIDTH, dtype=torch.float64)
    arguments = {}
    if masked and container:
        arguments["src_key_padding_mask"] = torch.arange(6).expand(3, 6) >= torch.tensor([[6], [4], [3]])
    inner = model.train(training).base_model.model
    with torch.set_grad_enabled(grad):
        found, expected = inner(x, **arguments), dense(x, **arguments)
        without = plain.train(training)(x, **arguments)
    keep = ~arguments["src_key_padding_mask"] if arguments else torch.ones(3, 6, dtype=torch.bool)
    torch.testing.assert_close(found[keep], expected[keep])
    assert (without[keep] - expected[keep]).norm() > 0.1


def test_inside_pytorch_s_decoder():
    plain = nn.TransformerDecoderLayer(WIDTH, HEADS, 48, 0.0, batch_first=True, dtype=torch.float64)
    model = adapted(plain, target_modules=["self_attn", "multihead_attn"]).eval()
    x, memory = torch.randn(2, 5, WIDTH, dtype=torch.float64), torch.randn(2, 4, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(model(x, memory), dense_of(model, plain).eval()(x, memory))


def test_lora_applies_the_update_of_the_output_projection_twice():
    """Why nothing here is compared with LoRA. Where this test fails, PEFT has mended it."""
    plain = Block(attention(torch.float64, batch_first=True))
    config = peft.LoraConfig(r=4, target_modules=["attn"], init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(plain), config)
    lora = model.base_model.model.attn
    x, errors = torch.randn(2, 5, WIDTH, dtype=torch.float64), []
    for times in (1, 2):
        dense = copy.deepcopy(plain)
        with torch.no_grad():
            dense.attn.in_proj_weight += lora.get_delta_weight("default")
            dense.attn.out_proj.weight += times * lora.base_layer.out_proj.get_delta_weight("default")
        errors.append((model(x) - dense(x)).norm() / dense(x).norm())
    assert errors[0] > 0.01 > 1e-6 > errors[1]


@pytest.mark.parametrize("through", [copy.deepcopy, copy_by_pickle])
def test_merging_saving_and_copies(through, tmp_path):
    plain = Block(attention(torch.float32, batch_first=True))
    model = adapted(plain)
    x, before = torch.randn(2, 5, WIDTH), weights_of(model)
    expected = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    twin = through(model)
    twin.unmerge_adapter()
    torch.testing.assert_close(twin(x), expected)
    model.unmerge_adapter()
    assert_same_bits(before, weights_of(model))
    with pytest.warns(UserWarning, match="`layer_kinds`"):
        model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(x), model.eval()(x))
    assert loaded.peft_config["default"].layer_kinds == {
        "attn": {"kind": "attention", "parameter": "out_proj.weight"},
        "attn.base_layer": {"kind": "attention", "parameter": "in_proj_weight"},
    }
    merged = model.merge_and_unload()
    assert type(merged.attn) is nn.MultiheadAttention
    torch.testing.assert_close(merged(x), expected)


def test_several_adapters_and_none():
    plain = Block(attention(batch_first=True))
    model = adapted(plain)
    model.add_adapter("second", attention_config(r=6, gralora_k=3))
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    model.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(model(x), dense_of(model, plain, "default", "second")(x))
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(x), plain.requires_grad_(False)(x))


def test_settings_by_the_name_of_the_module_and_of_the_weight():
    model = adapted(Block(attention()), rank_pattern={"attn": 8, "in_proj_weight": 6})
    ranks = {name: layer.r["default"] for name, layer in model.base_model.model.attn.nest().items()}
    assert ranks == {"out_proj.weight": 8, "in_proj_weight": 6}


@pytest.mark.parametrize("targets", [["out_proj"], r".*attn\.out_proj"])
def test_the_output_projection_alone_is_refused_with_the_way_out(targets):
    model = Block(attention())
    with pytest.raises(TypeError, match=r"reads this layer's weight instead of calling it.* name 'attn' in"):
        get_peft_model(model, attention_config(target_modules=targets))
    assert type(model.attn.out_proj) is not Attention


def test_blocks_that_do_not_fit_are_refused_by_the_name_of_the_weight():
    with pytest.raises(ValueError, match=r"'attn\.in_proj_weight' cannot be adapted: `gralora_k` must divide"):
        adapted(Block(attention()), r=10, gralora_k=5)


def test_attributes_that_callers_read():
    model = adapted(Block(attention(batch_first=True)))
    layer, base = model.base_model.model.attn, model.base_model.model.attn.get_base_layer()
    names = "embed_dim num_heads head_dim dropout batch_first kdim vdim _qkv_same_embed_dim in_proj_weight in_proj_bias"
    for name in (*names.split(), "out_proj", "bias_k", "bias_v", "add_zero_attn"):
        assert getattr(layer, name) is getattr(base, name)
    assert layer.merge_masks == base.merge_masks


def test_a_subclass_runs_its_own_forward():
    class Doubled(nn.MultiheadAttention):
        def forward(self, query, *args, **kwargs):
            return super().forward(2 * query, *args, **kwargs)

    module = Doubled(WIDTH, HEADS, batch_first=True, dtype=torch.float64)
    plain = Block(module)
    model = adapted(plain)
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(model(x), dense_of(model, plain)(x))


def test_half_precision_and_autocast():
    plain = Block(attention(torch.float32, batch_first=True))
    model = adapted(plain)
    x = torch.randn(2, 5, WIDTH)
    expected = dense_of(model, plain)(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    assert (y.float() - expected).norm() < 0.03 * expected.norm()
    half = model.bfloat16()
    assert (half(x.bfloat16()).float() - expected).norm() < 0.05 * expected.norm()
