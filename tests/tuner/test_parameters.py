"""Adapters on parameters of any module, by `W + ΔW` in their place."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from conftest import assert_same_bits, weights_of
from contract import LayerContract, assert_near, layer_of
from mixtures import MODELS, Block, moe_config, tiny, with_dense_updates
from peft import PeftModel
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from gralora import GraloraConfig, get_peft_model
from gralora.tuner.layer import gralora_layers
from gralora.tuner.parameters import ParameterLayer


class Mixed(nn.Module):
    """A module with a matrix, a stack of matrices and a vector, none of them under the name "weight"."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.table = nn.Parameter(torch.randn(24, 12, dtype=dtype))
        self.stack = nn.Parameter(torch.randn(3, 12, 24, dtype=dtype))
        self.scale = nn.Parameter(torch.randn(24, dtype=dtype))

    def forward(self, x):
        return (self.stack @ (self.scale * (x @ self.table.T)).unsqueeze(-1).unsqueeze(-3)).squeeze(-1).sum(-2)


class TestMatrix(LayerContract):
    target = "layer.table"
    targets = {"target_modules": [], "target_parameters": ["layer.table"]}
    transforms = True

    def make_base(self, dtype):
        return Mixed(dtype)

    def make_input(self, dtype):
        return torch.randn(2, 5, 12, dtype=dtype)

    def weight(self, base):
        return base.table.detach().double()

    def output(self, base, x, weight):
        return torch.func.functional_call(_exact(base), {"table": weight}, (x,))

    def test_the_hooks_of_the_base_run_and_an_output_that_they_keep_is_not_changed(self):
        """The update is inside the base, so what its hook returns is the output."""
        layer, x = layer_of(self.adapt(hybrid_r=2)), self.make_input(self.exact_dtype)
        expected, seen, kept = self.expected(layer, x, "default"), [], torch.ones(1)
        layer.base_layer.register_forward_hook(lambda _, args, y: seen.append(y) or kept)
        assert layer(x) is kept
        assert_near(seen[0], expected, self.exact_dtype)

    def test_one_dropout_draw_feeds_both_parts(self):
        """The adapter does not see the parameter's input."""
        with pytest.raises(ValueError, match=r"'layer\.table' cannot be adapted: .* gralora_dropout=0"):
            self.adapt(gralora_dropout=0.5)


def _exact(base):
    exact = copy.deepcopy(base).double()
    exact._forward_hooks.clear()
    return exact


def mixed_model(**changes):
    """An adapter on both parameters, and the model without it."""
    plain = nn.Sequential(Mixed())
    settings = {"r": 4, "target_modules": [], "target_parameters": ["0.table", "0.stack"], "init_weights": False}
    return get_peft_model(copy.deepcopy(plain), GraloraConfig(**(settings | changes))), plain


def test_several_parameters_of_a_module_have_layers_around_each_other():
    model, plain = mixed_model(rank_pattern={"0.stack": 6}, alpha_pattern={"table": 3.0}, k_pattern={"stack": 3})
    layer = model.base_model.model[0]
    assert {name: found.r["default"] for name, found in layer.nest().items()} == {"stack": 6, "table": 4}
    assert layer.nest()["stack"].gralora_A["default"].shape == (3, 3, 8, 6)
    x = torch.randn(5, 12, dtype=torch.float64)
    torch.testing.assert_close(model(x), with_dense_updates(model, plain)(x))
    assert layer.stack is layer.get_base_layer().stack  # callers read what they know


def test_each_of_several_parameters_is_merged_and_restored_by_itself():
    model, _ = mixed_model()
    outer = model.base_model.model[0]
    x, before = torch.randn(5, 12, dtype=torch.float64), weights_of(model)
    expected = model(x)
    outer.base_layer.merge()
    torch.testing.assert_close(model(x), expected)
    outer.merge()
    torch.testing.assert_close(model(x), expected)
    outer.base_layer.unmerge()
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    assert_same_bits(before, weights_of(model))
    plain = model.unload()
    assert type(plain[0]) is Mixed


def test_a_merge_is_refused_where_the_module_is_called_from_elsewhere_too():
    model, _ = mixed_model()
    inner = model.base_model.model
    inner.add_module("elsewhere", inner[0].get_base_layer())
    before = weights_of(model)
    for merge in (model.merge_adapter, inner[0].merge, inner[0].base_layer.merge):
        with pytest.raises(RuntimeError, match="its base is called from elsewhere in the model too"):
            merge()
        assert_same_bits(before, weights_of(model))


def test_a_second_adapter_goes_on_the_same_parameters():
    model, plain = mixed_model()
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    assert sum(isinstance(module, ParameterLayer) for module in model.modules()) == 2
    model.base_model.set_adapter(["default", "second"])
    x = torch.randn(5, 12, dtype=torch.float64)
    torch.testing.assert_close(model(x), with_dense_updates(model, plain, "default", "second")(x))
    model.delete_adapter("default")
    torch.testing.assert_close(model(x), with_dense_updates(model, plain, "second")(x))


def test_a_second_adapter_on_other_parameters_of_the_module_is_refused():
    model, _ = mixed_model()
    before = dict(model.named_modules())
    other = GraloraConfig(r=4, target_modules=[], target_parameters=["0.table"])
    with pytest.raises(
        ValueError, match=r"must adapt the same of its parameters.*\['stack', 'table'\], got \['table'\]"
    ):
        model.add_adapter("second", other)
    assert dict(model.named_modules()) == before
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize(
    ("parameter", "reason"),
    [("scale", "must be a matrix or a stack of matrices; got the shape"), ("codes", "floating-point type")],
)
def test_a_parameter_that_is_no_weight_is_refused(parameter, reason):
    model = nn.Sequential(Mixed())
    model[0].codes = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=f"'0.{parameter}' cannot be adapted: .*{reason}"):
        get_peft_model(model, GraloraConfig(r=4, target_modules=[], target_parameters=[f"0.{parameter}"]))
    assert type(model[0]) is Mixed


def test_a_parameter_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"No `target_modules` passed but also no `target_parameters` found"):
        get_peft_model(nn.Sequential(Mixed()), GraloraConfig(r=4, target_modules=[], target_parameters=["absent"]))


def test_the_weight_of_a_linear_layer_gets_the_layer_of_linear_layers():
    model = nn.Sequential(nn.Linear(4, 8))
    model = get_peft_model(model, GraloraConfig(r=4, target_modules=[], target_parameters=["0.weight"]))
    assert not isinstance(model.base_model.model[0], ParameterLayer)


@pytest.mark.parametrize("of", ["experts", "any module"])
def test_offloaded_weights(of):
    """accelerate loads them in a hook of the module that holds them."""
    config = {"r": 4, "target_modules": [], "init_weights": False}
    if of == "experts":
        plain, config["target_parameters"] = Block(mixtral_experts()), ["layer.gate_up_proj", "layer.down_proj"]
    else:
        plain, config["target_parameters"] = nn.Sequential(Mixed()), ["0.table", "0.stack"]
    x = torch.randn(7, 12, dtype=torch.float64)
    here = get_peft_model(copy.deepcopy(plain), GraloraConfig(**config))
    offloaded = get_peft_model(cpu_offload(plain, execution_device="cpu"), GraloraConfig(**config))
    assert next(iter(gralora_layers(offloaded.base_model.model).values())).weight_ref().parameter.is_meta
    layers = (gralora_layers(model.base_model.model).values() for model in (here, offloaded))
    for one, other in zip(*layers, strict=True):
        for name in ("gralora_A", "gralora_B"):
            getattr(other, name)["default"] = getattr(one, name)["default"]
    with torch.no_grad():
        torch.testing.assert_close(offloaded(x), here(x))


def mixtral_experts():
    config = MixtralConfig(hidden_size=12, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    experts = MixtralExperts(config).double()
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    return experts


def test_experts_that_run_in_expert_parallelism_are_computed_with_whole_weights():
    """Some of the pairs belong to experts of other processes then, so that rows cannot be sorted by expert."""
    experts = mixtral_experts()
    names = ["layer.gate_up_proj", "layer.down_proj"]
    model = get_peft_model(Block(copy.deepcopy(experts)), moe_config(target_parameters=names))
    x = torch.randn(7, 12, dtype=torch.float64)
    expected = with_dense_updates(model, Block(experts))(x)
    model.base_model.model.layer.get_base_layer()._is_expert_parallel = True
    torch.testing.assert_close(model(x), expected)


@pytest.mark.filterwarnings("ignore:This adapter uses `target_parameters`")
@pytest.mark.parametrize("name", MODELS)
def test_training_moves_every_factor_and_is_saved(name, tmp_path):
    plain = tiny(name, torch.float32)
    model = get_peft_model(
        copy.deepcopy(plain), moe_config(init_weights=True, gralora_dropout=0.1 * (name != "llama4"))
    )
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.02)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    tokens, losses = torch.randint(3, 64, (4, 12)), []
    for _ in range(8):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not any(torch.equal(before[n], p) for n, p in model.named_parameters() if n in before)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(plain, tmp_path).eval()
    assert torch.equal(loaded(tokens).logits, model.eval()(tokens).logits)
