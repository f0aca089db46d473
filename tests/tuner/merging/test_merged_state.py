"""A merged model keeps the outputs of the merge, whatever happens next; unmerge restores the base or refuses."""

import copy

import bitsandbytes as bnb
import pytest
import torch
from conftest import MLP, assert_same_bits, mlp_config, randomise, weights_of
from peft import LoraConfig
from peft import get_peft_model as peft_get_peft_model
from torch import nn
from torch.nn.utils import parametrize

from gralora import GraloraConfig, get_peft_model
from gralora.tuner.merging import rows

CHANGED = "the base weight was changed while it was merged"


def adapted(dtype=torch.float32, **changes):
    return get_peft_model(MLP(dtype), mlp_config(**changes))


def wide(dtype=torch.bfloat16):
    """A model whose layers are large beside their adapters, so that a merge keeps little."""
    base = nn.Sequential()
    base.up, base.down = nn.Linear(64, 96, dtype=dtype), nn.Linear(96, 64, dtype=dtype)
    return get_peft_model(base, mlp_config(r=2, gralora_k=2))


def rescaled(model, ratio):
    """Make the updates `ratio` times as large as the weights."""
    for layer in (model.base_model.model.up, model.base_model.model.down):
        size = layer.get_delta_weight("default").abs().mean() / layer.base_layer.weight.detach().abs().mean().float()
        layer.scaling["default"] *= ratio / size.item()
    return model


def merged_with(record):
    """Return a merged model whose merge records are of this kind."""
    model = rescaled(wide(), 1000.0 if record == "CopyRecord" else 0.03)
    if record == "SharedRecord":
        layers = model.base_model.model.up, model.base_model.model.down
        model.base_model.model.also = nn.ParameterList([layer.base_layer.weight for layer in layers])
    model.merge_adapter()
    return model


# Merging while the adapters are off -----------------------------------------------------------------------------------


@pytest.mark.parametrize("through", ["model", "layer"])
def test_while_disabled_nothing_is_merged_and_outputs_are_the_base_s(through):
    model = adapted()
    x = torch.randn(3, 12)
    before, expected = weights_of(model), model(x)
    with model.disable_adapter():
        base = model(x)
        owners = [model.base_model] if through == "model" else [model.base_model.model.up, model.base_model.model.down]
        for owner in owners:
            with pytest.warns(UserWarning, match="The adapters are disabled: nothing is merged"):
                owner.merge_adapter() if through == "model" else owner.merge()
        assert torch.equal(model(x), base)
    assert torch.equal(model(x), expected)
    assert_same_bits(before, weights_of(model))


def test_merge_and_unload_merges_what_is_disabled_as_with_lora():
    results = []
    for config in (mlp_config(), LoraConfig(r=6, target_modules=["up", "down"], init_lora_weights=False)):
        torch.manual_seed(0)
        model = peft_get_peft_model(MLP(), config)
        x = torch.linspace(-1, 1, 36).view(3, 12)
        expected = model(x)
        model.base_model.disable_adapter_layers()
        results.append((model.merge_and_unload()(x) - expected).abs().max() < 1e-5)
    assert results == [True, True]


# Moving and converting ------------------------------------------------------------------------------------------------

CONVERSIONS = {
    "to the same device": (lambda model: model.to("cpu"), torch.bfloat16),
    "to the same dtype": (lambda model: model.bfloat16(), torch.bfloat16),
    "float": (lambda model: model.float(), torch.float32),
    "double": (lambda model: model.double(), torch.float64),
    "half": (lambda model: model.half(), torch.float16),
}


@pytest.mark.parametrize("record", ["DenseRecord", "CopyRecord", "SharedRecord"])
@pytest.mark.parametrize(("convert", "dtype"), CONVERSIONS.values(), ids=CONVERSIONS)
def test_a_conversion_keeps_the_weights_of_the_merge_and_the_way_back(convert, dtype, record):
    model = merged_with(record)
    layers = model.base_model.model.up, model.base_model.model.down
    model.unmerge_adapter()
    originals = {name: weight.to(dtype) for name, weight in weights_of(model).items()}
    model.merge_adapter()
    assert all(type(layer._merges[0]).__name__ == record for layer in layers)
    merged = {name: weight.to(dtype) for name, weight in weights_of(model).items()}
    randomise(model, 1.0)
    for layer in layers:
        layer.set_scale("default", 7.0)
    convert(model)
    assert_same_bits(merged, weights_of(model))
    model.unmerge_adapter()
    assert_same_bits(originals, weights_of(model))


def test_two_merges_are_converted_one_by_one():
    model = adapted(torch.bfloat16)
    model.add_adapter("second", mlp_config(r=4, gralora_k=2, hybrid_r=1))
    originals = {name: weight.float() for name, weight in weights_of(model).items()}
    model.merge_adapter(["default"])
    once = {name: weight.float() for name, weight in weights_of(model).items()}
    with pytest.warns(UserWarning, match="additionally"):
        model.merge_adapter(["second"])
    model.float()
    layers = model.base_model.model.up, model.base_model.model.down
    for layer in layers:
        layer.undo_merges(1)
    assert_same_bits(once, weights_of(model))
    model.unmerge_adapter()
    assert_same_bits(originals, weights_of(model))


def test_a_quantised_base_is_merged_anew_with_the_adapter_of_the_merge():
    holder = nn.ModuleDict({"layer": bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False).to("cpu")})
    model = get_peft_model(holder, GraloraConfig(r=8, target_modules=["layer"], init_weights=False))
    layer, x = model.base_model.model["layer"], torch.randn(3, 64)
    original = layer.base_layer.weight.data.clone()
    model.merge_adapter()
    expected = layer(x)
    randomise(model, 1.0)
    model.to("cpu")
    assert torch.equal(layer(x), expected)
    model.double().float()
    assert torch.equal(layer(x), expected)
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight.data, original)


def test_unmerge_is_refused_after_a_move_to_the_meta_device():
    model = adapted()
    model.merge_adapter()
    model.to("meta")
    with pytest.raises(RuntimeError, match="cannot be undone: its weights were moved to the meta device"):
        model.unmerge_adapter()


# Changed from outside -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("through", ["model", "layer"])
@pytest.mark.parametrize("record", ["DenseRecord", "CopyRecord", "SharedRecord"])
@pytest.mark.filterwarnings("ignore:The adapters are merged")
def test_an_edit_while_merged_is_never_discarded(record, through, monkeypatch):
    monkeypatch.setattr(rows, "CHUNK", 256)
    model = merged_with(record)
    layers = model.base_model.model.up, model.base_model.model.down
    assert all(type(layer._merges[0]).__name__ == record for layer in layers)
    with torch.no_grad():
        layers[1].base_layer.weight[-1, -1] *= -1
    edited = weights_of(model)
    owner = model.base_model if through == "model" else layers[1]
    with pytest.raises(RuntimeError, match=CHANGED):
        owner.unmerge_adapter() if through == "model" else owner.unmerge()
    for refused in (lambda: model.set_adapter("default"), model.base_model.disable_adapter_layers, model.unload):
        with pytest.raises(RuntimeError, match=f"Nothing was unmerged: at 'down', .*{CHANGED}"):
            refused()
    assert_same_bits(edited, weights_of(model))
    assert layers[0].merged and layers[1].merged
    for converted, dtype in ((copy.deepcopy(model), torch.bfloat16), (model.double(), torch.float64)):
        assert_same_bits({name: weight.to(dtype) for name, weight in edited.items()}, weights_of(converted))
        with pytest.raises(RuntimeError, match=CHANGED):
            converted.unmerge_adapter()


def test_an_edit_of_a_quantised_weight_while_merged_is_never_discarded():
    holder = nn.ModuleDict({"layer": bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False).to("cpu")})
    model = get_peft_model(holder, GraloraConfig(r=8, target_modules=["layer"], init_weights=False))
    model.merge_adapter()
    with torch.no_grad():
        model.base_model.model["layer"].base_layer.weight.data[3, 3] += 1
    with pytest.raises(RuntimeError, match=CHANGED):
        model.unmerge_adapter()


def test_products_that_differ_are_detected_before_a_row_is_written(monkeypatch):
    """On another machine, for example, the environment differs, and so do the products."""
    monkeypatch.setattr(rows, "CHUNK", 256)
    model = merged_with("DenseRecord")
    merged = weights_of(model)
    record = model.base_model.model.down._merges[0]
    record.environment = (1, "another", True)
    record.parts[0].factors.B.mul_(1.5)
    with pytest.raises(RuntimeError, match="Nothing was unmerged: at 'down'"):
        model.unmerge_adapter()
    assert_same_bits(merged, weights_of(model))
    with pytest.raises(RuntimeError, match="cannot be undone"):
        model.base_model.model.down.unmerge()
    assert_same_bits(merged, weights_of(model))


# Inference mode, hooks and parametrizations ---------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("made_in_it", [False, True])
def test_a_merge_in_inference_mode_leaves_usable_weights(made_in_it, tied):
    with torch.inference_mode(made_in_it):
        base = MLP()
        if tied:
            base.also = base.up.weight
        model = get_peft_model(base, mlp_config())
    x = torch.randn(3, 12)
    with torch.no_grad():
        before, expected = weights_of(model), model(x)
    with torch.inference_mode():
        model.merge_adapter()
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
    if not made_in_it:  # torch itself takes no gradient through what was
        for weight in (model.base_model.model.up.base_layer.weight, model.base_model.model.down.base_layer.weight):
            weight.requires_grad_(True)
        model(x).sum().backward()
        assert weight.grad is not None
        weight.requires_grad_(False)
    with torch.inference_mode():
        model.unmerge_adapter()
    assert_same_bits(before, weights_of(model))


class Doubled(nn.Module):
    def forward(self, factor):
        return 2 * factor


CHANGES = {
    "a forward of its own": lambda holder: setattr(holder, "forward", lambda: 2 * holder.weight),
    "a parametrization": lambda holder: parametrize.register_parametrization(holder, "weight", Doubled()),
    "a forward hook": lambda holder: holder.register_forward_hook(lambda module, args, factor: 2 * factor),
}


@pytest.mark.parametrize("factor", ["gralora_A", "gralora_B", "gralora_A_general"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_forward_and_merge_agree_on_what_changes_a_factor(change, factor):
    model = adapted(hybrid_r=2)
    layer, x = model.base_model.model.up, torch.randn(3, 12)
    plain = layer(x)
    change(getattr(layer, factor)._modules["default"])
    expected = layer(x)
    assert not torch.allclose(expected, plain)
    torch.testing.assert_close(layer.base_layer(x) + x @ layer.get_delta_weight("default").T, expected)
    layer.merge()
    torch.testing.assert_close(layer(x), expected)


def test_an_adapter_that_is_named_twice_is_merged_once():
    model, x = adapted(), torch.randn(3, 12)
    expected = model(x)
    model.merge_adapter(["default", "default"])
    torch.testing.assert_close(model(x), expected)


def test_a_layer_whose_earlier_merge_is_final_keeps_all_layers_merged():
    model = get_peft_model(MLP(), mlp_config(target_modules=["down"]), adapter_name="first")
    model.add_adapter("second", mlp_config())
    model.base_model.merge_adapter(["first"], keep_base=False)
    with pytest.warns(UserWarning, match="additionally"):
        model.merge_adapter(["second"])
    merged = weights_of(model)
    with pytest.raises(RuntimeError, match=r"Nothing was unmerged: at 'down'.*keep_base=False"):
        model.unmerge_adapter()
    assert_same_bits(merged, weights_of(model))
    assert model.base_model.model.up.merged


def test_the_default_device_does_not_matter():
    model = adapted()
    before = weights_of(model)
    rows._multipliers.cache_clear()
    with torch.device("meta"):
        model.merge_adapter()
        model.unmerge_adapter()
    assert_same_bits(before, weights_of(model))
