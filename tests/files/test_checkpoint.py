import pytest
import torch
from adapters import DAMAGES, adapted, edit_config, edit_tensors, lora, save_adapter
from conftest import small_config
from mixtures import EXPERTS, save_mixture_and_adapter
from torch import nn

from gralora import get_peft_model, to_lora
from gralora.files.checkpoint import folders_read, open_adapter
from gralora.tuner.blocks import Factors


@pytest.fixture
def folder(tmp_path):
    return save_adapter(tmp_path / "adapter")


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_damaged_adapter_gives_one_line_and_writes_nothing(damage, message, folder, tmp_path):
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        to_lora(folder, tmp_path / "deep/lora")
    assert "\n" not in str(raised.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]


def test_a_model_without_a_gralora_adapter_is_refused():
    with pytest.raises(
        ValueError, match=r"adapter default of PeftModel.* must hold a GraLoRA adapter; .* peft_type='LORA'"
    ):
        open_adapter(lora())
    with pytest.raises(ValueError, match=r"`adapter_name` must be one of \['default'\]; got adapter_name='other'"):
        open_adapter(adapted(), "other")


@pytest.mark.parametrize("hybrid_r", [0, 3])
def test_the_header_says_what_the_tensors_are(hybrid_r, tmp_path):
    adapter = open_adapter(save_adapter(tmp_path / "adapter", hybrid_r=hybrid_r))
    for name, layer in adapter.layers.items():
        factors = adapter.factors(name)
        assert isinstance(factors, Factors)
        assert (layer.in_features, layer.out_features) == (factors.in_features, factors.out_features)
        assert layer.parameters == sum(factor.numel() for factor in factors if factor is not None)
        assert layer.rank == 2 * 8 + hybrid_r
        assert layer.scale == 16 / (8 + hybrid_r)
        assert layer.dtype == torch.float32
    assert adapter.largest == 32 * 48
    assert adapter.extras == ()


def test_a_folder_is_read_and_a_model_is_not(tmp_path):
    assert folders_read(str(tmp_path)) == (tmp_path,)
    assert folders_read(adapted()) == ()


def test_experts_are_read_by_the_names_of_their_parameters(tmp_path):
    model = save_mixture_and_adapter(tmp_path, rank_pattern={EXPERTS[0]: 8}, alpha_pattern={"down_proj": 3})
    adapter = open_adapter(tmp_path / "adapter")
    stack = "model.layers.1.mlp.experts"
    assert {name.rpartition(".")[2] for name in adapter.layers} == {"q_proj", "gate_up_proj", "down_proj"}
    up, down = adapter.layers[f"{stack}.gate_up_proj"], adapter.layers[f"{stack}.down_proj"]
    assert (up.module, down.module) == (f"{stack}.base_layer", stack)
    assert (up.experts, up.in_features, up.out_features, up.settings.r, up.rank) == (4, 24, 72, 8, 18)
    assert (down.experts, down.in_features, down.out_features, down.settings.r, down.scale) == (4, 36, 24, 4, 0.5)
    assert up.weight_shape == tuple(model.get_base_model().get_parameter(f"{up.module}.base_layer.gate_up_proj").shape)
    for source in (adapter, open_adapter(model)):
        for name, layer in source.layers.items():
            factors, matrices = source.factors(name), list(source.matrices(name))
            assert layer.parameters == sum(factor.numel() for factor in factors if factor is not None)
            assert len(matrices) == (layer.experts or 1)
            if layer.experts:
                assert torch.equal(matrices[2].B, factors.B[2])
    assert adapter.largest == 24 * 72


def test_the_sizes_of_embeddings_and_convolutions_are_those_of_their_weights():
    model = get_peft_model(
        nn.Sequential(nn.Embedding(13, 8), nn.Conv2d(4, 6, (3, 2))), small_config(target_modules=["0", "1"])
    )
    words, convolution = open_adapter(model).layers.values()
    assert (words.in_features, words.padded_in_features, words.out_features) == (13, 14, 8)
    assert words.parameters == sum(p.numel() for n, p in model.named_parameters() if "0.gralora_" in n)
    assert (convolution.in_features, convolution.out_features) == (24, 6)
    assert (words.weight_shape, convolution.weight_shape) == ((13, 8), (6, 4, 3, 2))


def cut_one_expert(tensors):
    key = next(key for key in tensors if key.endswith("experts.gralora_B"))
    return tensors | {key: tensors[key][:3].contiguous()}


def flatten_a_stack(tensors):
    return {key: t[0].contiguous() if ".experts.gralora" in key else t for key, t in tensors.items()}


def without_experts(tensors):
    return {key: tensor for key, tensor in tensors.items() if "experts" not in key}


def stacked(tensors):
    return {key: torch.stack([t, t]) if "q_proj" in key else t for key, t in tensors.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            cut_one_expert,
            r"`gralora_B` must fit .* got shape \[3, 2, 4, 12\] at 'model.layers.0.mlp.experts.down_proj'",
        ),
        (without_experts, "must hold tensors for all of `layer_kinds`; it has none for 'model.layers.0.mlp.experts'"),
        (stacked, r"`gralora_A` must have three dimensions, or .* got shape \[2, 2, 12, 4\] at 'model.layers.0.self_"),
    ],
)
def test_stacks_that_do_not_fit_are_refused(change, message, tmp_path):
    save_mixture_and_adapter(tmp_path)
    edit_tensors(tmp_path / "adapter", change)
    with pytest.raises(ValueError, match=message):
        open_adapter(tmp_path / "adapter")


def test_nested_layers_without_a_record_are_refused(tmp_path):
    save_mixture_and_adapter(tmp_path)
    edit_config(tmp_path / "adapter", '"layer_kinds"', '"other"')
    with pytest.raises(ValueError, match=r"got shape \[4, 2, 18, 4\] at 'model.layers.0.mlp.experts'"):
        open_adapter(tmp_path / "adapter")
    edit_tensors(tmp_path / "adapter", flatten_a_stack)
    with pytest.raises(ValueError, match=r"'.*experts.base_layer' must be described in `layer_kinds`; the config of"):
        open_adapter(tmp_path / "adapter")


def test_a_weight_of_another_shape_than_recorded_is_refused():
    model = get_peft_model(nn.Sequential(nn.Conv1d(4, 6, 3)), small_config())
    model.peft_config["default"].layer_kinds["0"]["shape"] = [6, 4, 5]
    with pytest.raises(ValueError, match=r"must fit the config .*, weight \[6, 4, 5\]\); got shape \[2, 6, 4\] at '0'"):
        open_adapter(model)
