import copy
import warnings

import pytest
import torch
from conftest import MLP, assert_same_bits, mlp_config, randomise, tiny_gpt2, tiny_llama, weights_of
from torch import nn

from gralora import GraloraConfig, get_peft_model


def test_dense_weights_are_merged_in_place():
    model = get_peft_model(MLP(), mlp_config())
    weight = model.base_model.model.up.base_layer.weight
    address = weight.data_ptr()
    model.merge_adapter()
    assert model.base_model.model.up.base_layer.weight is weight
    assert weight.data_ptr() == address


def two_adapters(**changes):
    model = get_peft_model(MLP(), mlp_config(**changes))
    model.add_adapter("second", mlp_config(r=4, gralora_k=2, hybrid_r=1))
    return model


def test_broken_second_adapter_is_refused_and_nothing_changed():
    model = two_adapters()
    before = weights_of(model)
    with torch.no_grad():
        model.base_model.model.down.gralora_B["second"][0, 0, 0] = float("nan")
    with pytest.raises(
        ValueError, match=r"must be finite; merging 'default', 'second'.*at 'down'; no layer was merged"
    ):
        model.merge_adapter(["default", "second"], safe_merge=True)
    assert_same_bits(before, weights_of(model))
    assert not any(m.merged for m in model.modules() if hasattr(m, "merged"))
    with pytest.raises(ValueError, match="at 'down'"):
        model.merge_and_unload(safe_merge=True, adapter_names=["default", "second"])
    assert_same_bits(before, weights_of(model))
    assert "default" in model.peft_config


def test_a_final_merge_is_refused_before_anything_changes_too():
    model = two_adapters()
    before = weights_of(model)
    with torch.no_grad():
        model.base_model.model.down.gralora_B["default"][0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"'default' has a non-finite update \(at 'down'; no layer was merged\)"):
        model.base_model.merge_adapter(safe_merge=True, keep_base=False)
    assert_same_bits(before, weights_of(model))


def test_a_finally_merged_model_moves_and_copies():
    model = two_adapters()
    x = torch.randn(3, 12)
    model.merge_adapter(["second"])
    with pytest.warns(UserWarning, match="additionally"):
        model.base_model.merge_adapter(["default"], keep_base=False)
    expected = model(x)
    assert model.base_model.model.up.merged_adapters == ["second", "default"]
    assert torch.equal(copy.deepcopy(model)(x), expected)
    torch.testing.assert_close(model.double()(x.double()).float(), expected)
    assert model.base_model.model.up.merged_adapters == ["second", "default"]


def test_an_earlier_merge_survives_a_refused_one():
    model = two_adapters()
    model.merge_adapter(["default"])
    merged = weights_of(model)
    with torch.no_grad():
        model.base_model.model.down.gralora_B["second"].fill_(float("inf"))
    with pytest.warns(UserWarning, match="additionally"), pytest.raises(ValueError, match="finite"):
        model.merge_adapter(["second"], safe_merge=True)
    assert_same_bits(merged, weights_of(model))
    assert model.base_model.model.up.merged_adapters == ["default"]


def test_without_safe_merge_a_non_finite_adapter_can_be_undone():
    model = get_peft_model(MLP(), mlp_config())
    before = weights_of(model)
    with torch.no_grad():
        model.base_model.model.up.gralora_B["default"].fill_(float("nan"))
    model.merge_adapter()
    assert model.base_model.model.up.base_layer.weight.isnan().any()
    model.unmerge_adapter()
    assert_same_bits(before, weights_of(model))


def test_an_unknown_adapter_name_is_refused():
    model = get_peft_model(MLP(), mlp_config())
    with pytest.raises(ValueError, match=r"must name adapters of this model, \['default'\]; got \['typo'\]"):
        model.merge_adapter(["typo"])


def test_disabling_a_merged_model_unmerges_it():
    model = get_peft_model(MLP(), mlp_config())
    before = weights_of(model)
    x = torch.randn(3, 12)
    with model.disable_adapter():
        base = model(x)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"), model.disable_adapter():
        assert torch.equal(model(x), base)
    assert_same_bits(before, weights_of(model))
    assert not model.base_model.model.up.merged


def test_setting_an_adapter_unmerges_first():
    model = two_adapters()
    before = weights_of(model)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("second")
    assert_same_bits(before, weights_of(model))


def test_a_merged_adapter_cannot_be_deleted():
    model = two_adapters()
    model.merge_adapter(["default"])
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("default")


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_merge_and_unload_is_a_plain_model_with_the_same_outputs(make):
    base = make()
    layout = {name: type(m) for name, m in base.named_modules()}
    targets = ["q_proj", "down_proj"] if make is tiny_llama else ["c_attn", "c_proj"]
    model = randomise(get_peft_model(base, GraloraConfig(r=8, gralora_k=2, hybrid_r=2, target_modules=targets)))
    tokens = torch.arange(10)[None]
    expected = model(tokens).logits
    plain = model.merge_and_unload(progressbar=False)
    assert {name: type(m) for name, m in plain.named_modules()} == layout
    torch.testing.assert_close(plain(tokens).logits, expected, atol=1e-5, rtol=1e-5)
    assert not hasattr(plain, "peft_config")


def tied_model():
    return randomise(
        get_peft_model(
            tiny_llama(tie_word_embeddings=True), GraloraConfig(r=8, gralora_k=2, target_modules=["lm_head", "q_proj"])
        ),
        0.2,
    )


@pytest.fixture
def tie_warning():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        yield


@pytest.mark.usefixtures("tie_warning")
def test_a_tied_weight_is_not_merged_behind_its_twin():
    model = tied_model()
    tokens = torch.arange(10)[None]
    llama = model.base_model.model
    before, expected, shared = weights_of(model), model(tokens).logits, llama.model.embed_tokens.weight
    model.merge_adapter()
    assert torch.equal(llama.model.embed_tokens.weight, before["base_model.model.model.embed_tokens.weight"])
    torch.testing.assert_close(model(tokens).logits, expected, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    assert llama.lm_head.base_layer.weight is shared is llama.model.embed_tokens.weight
    assert_same_bits(before, weights_of(model))


@pytest.mark.usefixtures("tie_warning")
def test_merge_and_unload_unties_for_good(tmp_path):
    model = tied_model()
    tokens = torch.arange(10)[None]
    expected = model(tokens).logits
    with pytest.warns(UserWarning, match="no longer tied"):
        plain = model.merge_and_unload()
    assert not plain.config.tie_word_embeddings
    plain.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path)
    torch.testing.assert_close(again(tokens).logits, expected, atol=1e-5, rtol=1e-5)
    assert again.lm_head.weight is not again.model.embed_tokens.weight


def test_a_weight_that_cannot_be_rewritten_is_refused_before_anything_changes():
    class Strange(nn.Linear):
        pass

    base = MLP()
    base.down = Strange(24, 6)
    model = get_peft_model(base, mlp_config())
    frozen = model.base_model.model.down.base_layer
    weight = frozen.weight.detach()
    del frozen._parameters["weight"]
    frozen.weight = weight
    before = weights_of(model)
    with pytest.raises(
        RuntimeError, match=r"Nothing was merged: 'down' cannot be, because.*no plain `weight` parameter"
    ):
        model.merge_adapter()
    assert_same_bits(before, weights_of(model))


def test_merging_nothing_and_unmerging_nothing_warn():
    model = get_peft_model(MLP(), mlp_config())
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    model.merge_adapter()
    with pytest.warns(UserWarning, match="already merged, nothing to do"):
        model.merge_adapter()
