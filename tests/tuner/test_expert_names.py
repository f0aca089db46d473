"""Names of experts in transformers 4, and what `"all-linear"` makes of experts."""

import copy

import pytest
import torch
from conftest import tiny_llama
from mixtures import EXPERTS, MODELS, moe_config, tiny
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn

from gralora import GraloraConfig, get_peft_model
from gralora.tuner.layer import gralora_layers

ALL_LINEAR = pytest.mark.filterwarnings("ignore:`target_modules='all-linear'` adapts the experts too")


def adapted(model):
    """The names of the adapted weights, with those of parameters."""
    layers = gralora_layers(model.base_model.model).items()
    names = ((name.replace(".base_layer", ""), layer.parameter_name) for name, layer in layers)
    return {name.removeprefix("model.") if p == "weight" else f"{name.removeprefix('model.')}.{p}" for name, p in names}


def of_each_layer(*ends):
    return {f"layers.{layer}.{end}" for layer in range(2) for end in ends}


def mixtral_with(**changes):
    settings = {"r": 4, "alpha": 8, "init_weights": False}
    return get_peft_model(tiny("mixtral", torch.float32), GraloraConfig(**(settings | changes)))


STACKS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")


def test_all_linear_layers_include_the_experts_and_say_how_many():
    with pytest.warns(UserWarning, match=r"adapts the experts too: 4 stacks of 4 experts \('down_proj', 'gate_up_pr"):
        model = mixtral_with(target_modules="all-linear")
    assert adapted(model) == of_each_layer(*ATTENTION, *STACKS)  # and not the router, `mlp.gate`
    config = model.peft_config["default"]
    assert sorted(config.target_parameters) == ["down_proj", "gate_up_proj"]
    again = mixtral_with(target_modules=config.target_modules, target_parameters=config.target_parameters)
    assert adapted(again) == adapted(model)


@pytest.mark.parametrize(
    ("exclude", "left"), [(["experts"], ()), (["down_proj"], STACKS[:1]), (r".*layers\.\d\.mlp\.experts", ())]
)
@ALL_LINEAR
def test_experts_can_be_excluded(exclude, left):
    model = mixtral_with(target_modules="all-linear", exclude_modules=exclude)
    assert adapted(model) == of_each_layer(*ATTENTION, *left)


@ALL_LINEAR
def test_stacks_that_the_blocks_do_not_fit_are_left_out_of_all_linear_layers():
    with pytest.warns(UserWarning, match=r"leaves out .*'model.layers.0.mlp.experts.down_proj'"):
        model = mixtral_with(target_modules="all-linear", r=8, gralora_k=8)  # does not divide 36, nor 12
    assert adapted(model) == of_each_layer("self_attn.q_proj", "self_attn.o_proj", STACKS[0])


def test_a_list_with_the_names_of_transformers_4_adapts_the_parameters_at_twice_the_rank():
    model = mixtral_with(target_modules=["q_proj", "w1", "w2", "w3"])
    assert adapted(model) == of_each_layer("self_attn.q_proj", *STACKS)
    layers = gralora_layers(model.base_model.model)
    ranks = {layer.parameter_name: (layer.r["default"], layer.scaling["default"]) for layer in layers.values()}
    assert ranks == {"weight": (4, 2.0), "gate_up_proj": (8, 2.0), "down_proj": (4, 2.0)}


def test_names_that_modules_have_too_stay_targets():
    """The first layer of this model is a plain MLP, and each other one has shared experts."""
    targets = ["gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(tiny("deepseek_v3", torch.float32), GraloraConfig(r=4, target_modules=targets))
    expected = {f"layers.0.mlp.{name}" for name in targets} | {
        f"layers.1.mlp.shared_experts.{name}" for name in targets
    }
    assert adapted(model) == expected | {f"layers.1.{name}" for name in STACKS}


def test_names_of_shared_experts_mean_them_alone():
    targets = [f"shared_experts.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
    model = get_peft_model(tiny("deepseek_v3", torch.float32), GraloraConfig(r=4, target_modules=targets))
    assert adapted(model) == {f"layers.1.mlp.{name}" for name in targets}


@ALL_LINEAR
@pytest.mark.filterwarnings("ignore:This adapter uses")
@pytest.mark.filterwarnings("ignore:`target_modules='all-linear'` leaves out .*feed_forward.router")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("exclude", [None, ["experts"], ["down_proj"]])
def test_a_saved_adapter_on_all_linear_layers_is_on_the_same_ones_again(name, exclude, tmp_path):
    plain = tiny(name, torch.float32)
    config = GraloraConfig(r=4, target_modules="all-linear", exclude_modules=exclude, init_weights=False)
    model = get_peft_model(copy.deepcopy(plain), config).eval()
    model.save_pretrained(tmp_path)
    loaded, tokens = PeftModel.from_pretrained(plain, tmp_path).eval(), torch.randint(3, 64, (2, 7))
    assert adapted(loaded) == adapted(model)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_a_regular_expression_with_the_names_of_transformers_4():
    model = mixtral_with(target_modules=r".*\.(q_proj|experts\.(w1|w2|w3))")
    assert adapted(model) == of_each_layer("self_attn.q_proj", *STACKS)
    model = mixtral_with(target_modules=r".*\.experts\.w2")
    assert adapted(model) == of_each_layer(STACKS[1])


def test_the_router_is_adapted_where_it_is_named():
    model = mixtral_with(target_modules=["gate", "w2"])
    assert adapted(model) == of_each_layer("mlp.gate", STACKS[1])


def test_half_of_a_fused_weight_is_refused():
    with pytest.raises(ValueError, match=r"must name all of \['w1', 'w3'\].* 'gate_up_proj'.*'w3' is missing"):
        mixtral_with(target_modules=["q_proj", "w1"])


def test_the_parameters_of_a_model_without_old_names_are_named():
    expected = r"match no module: 'w1'.*target_parameters=\['experts.down_proj', 'experts.gate_up_proj'\]"
    with pytest.warns(UserWarning, match=expected):
        get_peft_model(tiny("gpt_oss", torch.float32), GraloraConfig(r=4, target_modules=["q_proj", "w1"]))


def test_a_dense_model_is_not_touched():
    config = GraloraConfig(r=4, target_modules=["gate_proj", "up_proj"])
    get_peft_model(tiny_llama(), config)
    assert config.target_parameters is None


def test_the_callers_config_is_as_before_where_the_adapter_is_refused():
    config = GraloraConfig(r=5, gralora_k=5, target_modules=["w1", "w2", "w3"])
    before = dict(vars(config))
    with pytest.raises(ValueError, match=r"gate_up_proj' cannot be adapted: `gralora_k` must divide `in_features`"):
        get_peft_model(tiny("mixtral", torch.float32), config)
    assert vars(config) == before


@pytest.mark.filterwarnings("ignore:This adapter uses")
def test_a_checkpoint_of_transformers_4_is_refused(tmp_path):
    moe_config(target_modules=["w1", "w2", "w3"], target_parameters=None).save_pretrained(tmp_path)
    old = "base_model.model.model.layers.0.block_sparse_moe.experts.0.w1"
    save_file(
        {f"{old}.gralora_A": torch.zeros(2, 12, 4), f"{old}.gralora_B": torch.zeros(2, 4, 18)},
        tmp_path / "adapter_model.safetensors",
    )
    with pytest.raises(ValueError, match="made with transformers 4, where every expert was a module of its own"):
        PeftModel.from_pretrained(tiny("mixtral", torch.float32), tmp_path)


def test_experts_that_are_modules_still_are_adapted_as_modules():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(4, 4)}) for _ in range(2))

    model = get_peft_model(Block(), GraloraConfig(r=4, target_modules=["w1"]))
    assert adapted(model) == {"experts.0.w1", "experts.1.w1"}


def test_the_names_of_parameters_are_the_ends_of_full_names():
    for names in (list(EXPERTS), ["gate_up_proj", "down_proj"], [f"model.layers.0.{stack}" for stack in STACKS]):
        model = mixtral_with(target_modules=[], target_parameters=names)
        layers = range(1) if names[0].startswith("model.") else range(2)
        assert adapted(model) == {f"layers.{layer}.{stack}" for layer in layers for stack in STACKS}
