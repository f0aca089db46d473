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
from torch.utils.checkpoint import checkpoint
from transformers import SiglipVisionConfig, SiglipVisionModel

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
        return Holder(base, self.arguments)

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
        return torch.func.functional_call(exact, {self.parameter: weight}, self.arguments(x), {"need_weights": False})[
            0
        ]

    def test_the_hooks_of_the_base_run_and_an_output_that_they_keep_is_not_changed(self):
        """The update is inside the base, so what its hook returns is the output."""
        layer, x = layer_of(self.adapt(hybrid_r=2)), self.make_input(self.exact_dtype)
        expected, seen, kept = self.expected(layer, x, "default"), [], (torch.ones(1), None)
        layer.base_layer.register_forward_hook(lambda _, args, y: seen.append(y[0]) or kept)
        assert self.call(layer, x) is kept[0]
        assert_near(seen[0], expected, self.exact_dtype)

    def test_one_dropout_draw_feeds_both_parts(self):
        """The adapter does not see the input of a weight."""
        base = self.make_base(torch.float32)
        with pytest.raises(ValueError, match=rf"'{self.target}' cannot be adapted: .* gralora_dropout=0"):
            self.adapt(base=base, gralora_dropout=0.5)
        assert type(base) is nn.MultiheadAttention

    @pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching")
    def test_functional_call_under_vmap_gives_the_gradients_of_each_sample(self):
        super().test_functional_call_under_vmap_gives_the_gradients_of_each_sample()


class Holder(nn.Module):
    def __init__(self, layer, arguments):
        super().__init__()
        self.layer, self.arguments = layer, arguments

    def forward(self, x):
        return self.layer(*self.arguments(x), need_weights=False)[0]


class TestPackedWeight(AttentionContract):
    parameter = "in_proj_weight"


class TestWeightOfTheValue(AttentionContract):
    parameter = "v_proj_weight"

    def make_base(self, dtype):
        return attention(dtype, batch_first=True, kdim=WIDTH, vdim=12)

    def arguments(self, x):
        return x, x, x[..., :12]


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
        {"attn_mask": torch.randn(5, 7, dtype=torch.float64), "need_weights": False},
        {"attn_mask": torch.ones(5, 7, dtype=torch.bool).triu(1), "is_causal": True, "need_weights": False},
    ):
        with torch.set_grad_enabled(grad):
            for eval_mode in (False, True):
                found = layer.train(not eval_mode)(query, key, value, **arguments)
                expected = dense.train(not eval_mode)(query, key, value, **arguments)
                for one, other in zip(found, expected, strict=True):
                    if one is not None or other is not None:
                        torch.testing.assert_close(one, other)


def test_an_input_without_a_batch_dimension():
    plain = Block(attention())
    model = adapted(plain)
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(model(x), dense_of(model, plain)(x))


def test_the_attention_s_own_dropout_draws_as_without_an_adapter():
    plain = Block(attention(dropout=0.4, batch_first=True))
    model = adapted(plain)
    dense, x, results = dense_of(model, plain), torch.randn(2, 5, WIDTH, dtype=torch.float64), []
    for module in (model, dense):
        torch.manual_seed(3)
        results.append(module.train()(x))
    torch.testing.assert_close(*results)
    assert not torch.allclose(results[1], dense.eval()(x))


@pytest.mark.parametrize("training", [True, False])
def test_a_fresh_adapter_changes_nothing_exactly(training):
    plain = Block(attention(torch.float32, batch_first=True)).requires_grad_(False).train(training)
    model = adapted(plain, init_weights=True).train(training)
    x = torch.randn(2, 5, WIDTH)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_are_those_of_dense_weights(options):
    plain = nn.ModuleDict({"attn": attention(**options)})
    model = adapted(plain)
    dense = dense_of(model, plain).requires_grad_(True)
    widths = WIDTH, options.get("kdim", WIDTH), options.get("vdim", WIDTH)
    inputs = [torch.randn(5, 3, width, dtype=torch.float64) for width in widths]
    found, expected = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
    y = model.base_model.model["attn"](*found)[0]
    g = torch.randn_like(y)
    y.backward(g)
    dense["attn"](*expected)[0].backward(g)
    torch.testing.assert_close([x.grad for x in found], [x.grad for x in expected])
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


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_gradients_through_nested_tensors_are_those_without_them():
    model = adapted(nn.TransformerEncoder(encoder_layer(), 2), target_modules=["self_attn"])
    inner, x = model.base_model.model, torch.randn(3, 6, WIDTH, dtype=torch.float64)
    mask = torch.arange(6).expand(3, 6) >= torch.tensor([[6], [4], [0]])
    wanted = [p for p in model.parameters() if p.requires_grad]
    gradients = []
    for nested in (True, False):
        inner.train(not nested)
        y = inner(x[:2], src_key_padding_mask=mask[:2])
        assert bool(y[mask[:2]].any()) is not nested  # where it was nested, the padding is zero
        gradients.append(torch.autograd.grad(y[~mask[:2]].square().sum(), wanted))
    torch.testing.assert_close(*gradients)
    y = inner.eval()(x, src_key_padding_mask=mask)  # with a row of padding alone
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(y.sum(), wanted))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("grad", [True, False])
def test_nested_tensors_are_taken_as_without_an_adapter(grad):
    plain = nn.ModuleDict({"attn": attention(batch_first=True)}).eval()
    layer = adapted(plain).eval().base_model.model["attn"]
    one, other = (
        torch.nested.nested_tensor([torch.randn(n, WIDTH, dtype=torch.float64) for n in (5, 3)]) for _ in range(2)
    )
    refused = pytest.raises(AssertionError, match="does not support NestedTensor outside of its fast path")
    with torch.set_grad_enabled(grad):
        assert layer(one, one, value=one)[0].is_nested
        with refused:
            layer(one, other, other)
        with refused:
            layer(one, one, one, attn_mask=torch.zeros(5, 5, dtype=torch.bool))
        with pytest.raises(NotImplementedError, match="`adapter_names`"):
            layer(one, one, one, adapter_names=["default", "default"])


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("training", [True, False])
def test_an_encoder_compiles_whole(training):
    inner = adapted(nn.TransformerEncoder(encoder_layer(), 2), target_modules=["self_attn"]).base_model.model
    inner.train(training)
    x = torch.randn(3, 6, WIDTH, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(inner, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(compiled(x), inner(x))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_of_an_encoder(use_reentrant):
    model = adapted(nn.TransformerEncoder(encoder_layer(), 2), target_modules=["self_attn"]).train()
    inner, x = model.base_model.model, torch.randn(3, 6, WIDTH, dtype=torch.float64, requires_grad=True)
    wanted = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(inner(x).square().sum(), wanted)
    checkpoint(inner, x, use_reentrant=use_reentrant).square().sum().backward()
    torch.testing.assert_close([p.grad for p in wanted], list(expected))


def test_an_encoder_can_be_made_of_an_adapted_layer():
    plain = encoder_layer()
    model = adapted(plain, target_modules=["self_attn"])
    found, expected = (
        nn.TransformerEncoder(layer, 2).eval() for layer in (model.base_model.model, dense_of(model, plain))
    )
    x = torch.randn(3, 6, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(found(x), expected(x))


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


def test_lora_does_nothing_inside_an_encoder_in_eval_mode():
    """The fast path reads the frozen weights. Where this test fails, PEFT has mended it."""
    plain = nn.Sequential(encoder_layer()).eval()
    config = peft.LoraConfig(r=4, target_modules=["self_attn"], init_lora_weights=False)
    lora = peft.get_peft_model(copy.deepcopy(plain), config).eval()
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(lora(x), plain(x))


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
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
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


@pytest.mark.parametrize("own_weights", [True, False])
def test_a_weight_that_another_layer_holds_too_is_merged_into_a_copy(own_weights):
    plain = Block(attention(batch_first=True))
    plain.other = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
    plain.other.weight = plain.attn.out_proj.weight
    model, x = adapted(plain), torch.randn(2, 5, WIDTH, dtype=torch.float64)
    inner, expected, before = model.base_model.model, model(x), plain.other.weight.clone()
    model.merge_adapter(own_weights=own_weights)
    torch.testing.assert_close(model(x), expected)
    assert torch.equal(inner.other.weight, before)
    model.unmerge_adapter()
    assert inner.attn.out_proj.weight is inner.other.weight
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), expected)
    assert torch.equal(merged.other.weight, before)


def test_a_safe_merge_of_one_weight_that_is_not_finite_changes_neither():
    model = adapted(Block(attention()))
    before = weights_of(model)
    with torch.no_grad():
        model.base_model.model.attn.nest()["in_proj_weight"].gralora_B["default"][0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"finite.*at 'attn.base_layer'; no layer was merged"):
        model.merge_adapter(safe_merge=True)
    assert_same_bits(before, weights_of(model))


def test_a_conversion_while_merged_keeps_the_way_back():
    model = adapted(Block(attention(torch.float32)))
    before = {name: weight.double() for name, weight in weights_of(model).items()}
    model.merge_adapter()
    model.double()
    model.unmerge_adapter()
    assert_same_bits(before, weights_of(model))


def test_the_packed_weight_alone_can_be_adapted():
    model = adapted(Block(attention()), target_modules=[], target_parameters=["attn.in_proj_weight"])
    assert set(model.base_model.model.attn.nest()) == {"in_proj_weight"}
    with pytest.raises(TypeError, match=r"'attn.out_proj' cannot be adapted: .* name 'attn' in `target_modules`"):
        adapted(Block(attention()), target_modules=[], target_parameters=["attn.out_proj.weight"])


def test_all_linear_beside_the_packed_weight_stores_what_it_chose():
    plain = Block(attention())
    plain.linear = nn.Linear(WIDTH, WIDTH)
    with pytest.warns(UserWarning, match="leaves out 'attn.out_proj'") as seen:
        model = adapted(plain, target_modules="all-linear", target_parameters=["attn.in_proj_weight"])
    assert len(seen) == 1  # and nothing about experts
    config = model.peft_config["default"]
    assert (config.target_modules, config.target_parameters) == ({"linear"}, ["in_proj_weight"])


def test_biases_that_would_not_be_trained_are_refused():
    with pytest.raises(ValueError, match=r"`bias='gralora_only'` trains the parameter `bias`.*Use `bias='none'`"):
        adapted(Block(attention()), bias="gralora_only")
    adapted(Block(attention(bias=False)), bias="gralora_only")
    model = adapted(Block(attention()), bias="all")
    assert model.base_model.model.attn.out_proj.bias.requires_grad


def test_attention_without_the_weights_is_refused():
    quantizable = torch.ao.nn.quantizable.MultiheadAttention(WIDTH, HEADS)
    without = attention()
    without.in_proj_weight = None
    for module, reason in ((quantizable, "compute with its own weights"), (without, "'in_proj_weight' is None")):
        with pytest.raises(TypeError, match=rf"'attn.in_proj_weight' cannot be adapted: .*{reason}"):
            get_peft_model(Block(module), attention_config())


@pytest.mark.filterwarnings("ignore:This adapter uses")
def test_a_model_of_transformers_that_has_the_module(tmp_path):
    settings = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": HEADS}
    plain = SiglipVisionModel(SiglipVisionConfig(image_size=16, patch_size=8, **settings)).eval()
    model = adapted(
        plain, target_modules=["head.attention"], rank_pattern={"attention": 6}, k_pattern={"out_proj.weight": 3}
    )
    image = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        found = model.eval()(pixel_values=image).pooler_output
        torch.testing.assert_close(found, dense_of(model, plain)(pixel_values=image).pooler_output)
        model.save_pretrained(tmp_path)
        plain.load_adapter(tmp_path)
        assert torch.equal(plain.eval()(pixel_values=image).pooler_output, found)
