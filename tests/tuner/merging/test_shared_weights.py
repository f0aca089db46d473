"""Weights that more than one module holds: a merge changes only the adapted module."""

import copy
import warnings

import bitsandbytes as bnb
import pytest
import torch
from accelerate import cpu_offload
from conftest import MLP, assert_same_bits, mlp_config, tiny_llama, weights_of
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration

from gralora import GraloraConfig, get_peft_model


class Twins(nn.Module):
    """An adapted layer `a`, and `b`, which is left alone."""

    def __init__(self, tie=lambda twins: None):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        tie(self)

    def forward(self, x):
        return self.a(x), self.b(x)


def same_module(twins):
    twins.b = getattr(twins.a, "base_layer", twins.a)


def same_parameter(twins):
    twins.b.weight = getattr(twins.a, "base_layer", twins.a).weight


def same_storage(twins):
    twins.b.weight.data = getattr(twins.a, "base_layer", twins.a).weight.data


def a_parameter_over_it(twins):
    twins.b.weight = nn.Parameter(getattr(twins.a, "base_layer", twins.a).weight.data)


def slices_that_overlap(twins):
    buffer = torch.randn(12, 8)
    getattr(twins.a, "base_layer", twins.a).weight.data, twins.b.weight.data = buffer[:8], buffer[4:]


def a_fused_buffer(twins):
    twins.register_buffer("fused", torch.randn(16, 8))
    getattr(twins.a, "base_layer", twins.a).weight.data = twins.fused[:8]
    twins.b.register_forward_hook(lambda module, args, y: nn.functional.linear(args[0], twins.fused[4:12]))


def a_view_as_an_attribute(twins):
    weight = getattr(twins.a, "base_layer", twins.a).weight
    twins.transposed = weight.detach().T
    twins.b.register_forward_hook(lambda module, args, y: args[0] @ twins.transposed)


TIES = [same_parameter, same_storage, a_parameter_over_it, slices_that_overlap, a_fused_buffer, a_view_as_an_attribute]
CONFIG = {"r": 4, "target_modules": ["a"], "init_weights": False}


def adapted(tie, when):
    """Return twins tied before or after an adapter is put on `a`, and that of the float64 oracle."""
    twins = Twins(tie) if when == "before" else Twins()
    model = get_peft_model(twins, GraloraConfig(**CONFIG))
    if when == "after":
        tie(twins)
    return model


def check(model, merge, unmerge):
    x = torch.randn(3, 8)
    before, (a, b) = weights_of(model), model(x)
    merge(model)
    merged_a, merged_b = model(x)
    assert torch.equal(merged_b, b)
    torch.testing.assert_close(merged_a, a, atol=1e-5, rtol=1e-5)
    assert not torch.equal(merged_a, b)
    unmerge(model)
    assert_same_bits(before, weights_of(model))
    for now, then in zip(model(x), (a, b), strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("through", ["model", "layer"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("tie", TIES)
def test_the_twin_is_left_alone(tie, when, through):
    model = adapted(tie, when)
    owner = model.base_model if through == "model" else model.base_model.model.a
    verbs = ("merge_adapter", "unmerge_adapter") if through == "model" else ("merge", "unmerge")
    check(model, *(lambda _, verb=verb: getattr(owner, verb)() for verb in verbs))


@pytest.mark.parametrize("copied", [False, True])
def test_a_base_that_is_called_from_elsewhere_too(copied):
    model = adapted(same_module, "after")
    if copied:
        model.merge_adapter()
        twin = copy.deepcopy(model)
        model.unmerge_adapter()
        base = twin.base_model.model.b
        assert twin.base_model.model.a.base_layer is not base
        twin.unmerge_adapter()
        assert twin.base_model.model.a.base_layer is base
        return
    base = model.base_model.model.b
    check(model, lambda m: m.merge_adapter(), lambda m: m.unmerge_adapter())
    assert model.base_model.model.a.base_layer is base


def test_a_base_that_is_called_from_elsewhere_with_another_forward_is_refused():
    model = adapted(same_module, "after")
    base = model.base_model.model.b
    base.forward = base.forward
    before = weights_of(model)
    with pytest.raises(RuntimeError, match=r"Nothing was merged: 'a' cannot be, because its base, Linear, is called"):
        model.merge_adapter()
    assert_same_bits(before, weights_of(model))


@pytest.mark.parametrize("tie", [*TIES, same_module])
def test_merge_and_unload_leaves_the_twin_alone(tie):
    model = adapted(tie, "after")
    x = torch.randn(3, 8)
    a, b = model(x)
    plain_a, plain_b = model.merge_and_unload()(x)
    torch.testing.assert_close(plain_a, a, atol=1e-5, rtol=1e-5)
    assert torch.equal(plain_b, b)


@pytest.mark.parametrize("tie", TIES[1:4])
def test_both_adapted_and_merged_one_after_the_other(tie):
    model = get_peft_model(Twins(tie), GraloraConfig(**CONFIG | {"target_modules": ["a", "b"]}))
    x = torch.randn(3, 8)
    before, expected = weights_of(model), model(x)
    layers = model.base_model.model.a, model.base_model.model.b
    for verb in ("merge", "unmerge"):
        for layer in layers:
            getattr(layer, verb)()
            for now, then in zip(model(x), expected, strict=True):
                torch.testing.assert_close(now, then, atol=1e-5, rtol=1e-5)
    assert_same_bits(before, weights_of(model))


def test_disjoint_slices_of_one_buffer_are_merged_in_place():
    def fused(twins):
        buffer = torch.randn(16, 8)
        twins.a.weight.data, twins.b.weight.data = buffer[:8], buffer[8:]

    model = adapted(fused, "before")
    address = model.base_model.model.a.base_layer.weight.data_ptr()
    check(model, lambda m: m.merge_adapter(), lambda m: m.unmerge_adapter())
    model.merge_adapter()
    assert model.base_model.model.a.base_layer.weight.data_ptr() == address


def another_model_over(model):
    other = MLP()
    other.load_state_dict(
        {
            n.removeprefix("base_model.model.").replace("base_layer.", ""): t
            for n, t in weights_of_itself(model).items()
        },
        assign=True,
    )
    return other


def weights_of_itself(model):
    return {name: t for name, t in model.state_dict().items() if "gralora_" not in name}


def test_own_weights_leave_another_model_alone():
    model = get_peft_model(MLP(), mlp_config())
    other = another_model_over(model)
    x = torch.randn(3, 12)
    before, expected, others = weights_of(model), model(x), other(x)
    model.merge_adapter(own_weights=True)
    torch.testing.assert_close(model(x), expected)
    assert torch.equal(other(x), others)
    model.unmerge_adapter()
    assert_same_bits(before, weights_of(model))
    shared = model.base_model.model.up.base_layer.weight
    assert shared.data_ptr() == other.up.weight.data_ptr()
    model.merge_adapter(own_weights=True)
    plain = model.merge_and_unload()
    torch.testing.assert_close(plain(x), expected)
    assert torch.equal(other(x), others)


def test_a_merge_that_changes_nothing_gives_the_tie_back():
    model = adapted(same_parameter, "before")
    model.base_model.model.a.set_scale("default", 0.0)
    model.merge_adapter()
    model.unmerge_adapter()
    assert model.base_model.model.a.base_layer.weight is model.base_model.model.b.weight


def test_moving_a_model_with_a_tied_weight_that_is_merged():
    model = adapted(same_parameter, "before")
    x = torch.randn(3, 8)
    before = {name: weight.double() for name, weight in weights_of(model).items()}
    model.merge_adapter()
    outputs = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.double()
    for now, then in zip(model(x.double()), outputs, strict=True):
        torch.testing.assert_close(now.float(), then)
    model.unmerge_adapter()
    assert_same_bits(before, weights_of(model))
    assert model.base_model.model.a.base_layer.weight is model.base_model.model.b.weight


def test_an_offloaded_tied_weight_is_left_alone():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        model = get_peft_model(
            tiny_llama(tie_word_embeddings=True), GraloraConfig(r=4, target_modules=["lm_head"], init_weights=False)
        )
    cpu_offload(model, execution_device=torch.device("cpu"))
    tokens = torch.arange(10)[None]
    embed = model.get_input_embeddings()
    with torch.no_grad():
        logits, embedded = model(tokens).logits, embed(tokens)
        model.merge_adapter()
        torch.testing.assert_close(model(tokens).logits, logits, atol=1e-5, rtol=1e-5)
        assert torch.equal(embed(tokens), embedded)
        model.unmerge_adapter()
        assert torch.equal(model(tokens).logits, logits)
        assert torch.equal(embed(tokens), embedded)


def test_an_8_bit_base_that_is_called_from_elsewhere_too():
    twins = Twins()
    twins.a = bnb.nn.Linear8bitLt(8, 8, has_fp16_weights=False)
    model = get_peft_model(twins.to("cpu"), GraloraConfig(**CONFIG))
    same_module(model.base_model.model)
    x = torch.randn(3, 8)
    expected = model(x)[1]
    model.merge_adapter()
    assert torch.equal(model(x)[1], expected)
    model.unmerge_adapter()
    assert torch.equal(model(x)[1], expected)
    assert torch.equal(model.merge_and_unload()(x)[1], expected)


def test_a_copy_of_a_model_whose_tie_came_later_is_on_the_safe_side():
    model = copy.deepcopy(adapted(lambda twins: None, "before"))
    same_parameter(model.base_model.model)
    x = torch.randn(3, 8)
    expected = model(x)[1]
    model.base_model.model.a.merge()
    assert torch.equal(model(x)[1], expected)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Input and output embeddings")
def test_a_model_with_three_tied_weights_is_whole_on_disk_after_merge_and_unload(tmp_path):
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    base = BartForConditionalGeneration(BartConfig(**sizes, **heads, encoder_layers=1, decoder_layers=1)).eval()
    model = get_peft_model(base, GraloraConfig(r=4, target_modules=["lm_head"], init_weights=False))
    tokens = torch.arange(4, 14)[None]
    expected = model(input_ids=tokens, decoder_input_ids=tokens).logits
    model.merge_and_unload().save_pretrained(tmp_path)
    again = BartForConditionalGeneration.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(input_ids=tokens, decoder_input_ids=tokens).logits, expected, atol=1e-4, rtol=1e-4)
